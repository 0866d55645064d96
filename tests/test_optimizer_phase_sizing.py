"""The fewest replicas of both pools: what a walk over every pair of counts finds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.optimizer.capacity import broken, longest_answer_s
from paretune.optimizer.phase_sizing import cheapest_counts, size_phases
from paretune.profiler.disaggregated import simulate_disaggregated
from paretune.profiler.kv_transfer import transfer_link
from paretune.runtime.spec import Deployment, KvTransfer, Pool
from paretune.traces.metrics import Target
from paretune.traces.trace import Trace

from .optimizer_examples import poisson_trace, step_model
from .test_profiler_operators import LLAMA_8B

LIMITS = {"max_model_len": 512, "num_kv_blocks": 1024, "max_num_seqs": 8, "max_num_batched_tokens": 512}
TARGETS = tuple(map(Target.parse, ("ttft:p95<=2s", "tpot:p95<=90ms")))


def two_pools(**transfer: Any) -> Deployment:
    pools = (Pool.model_validate({**LIMITS, "role": "prefill"}), Pool.model_validate({**LIMITS, "role": "decode"}))
    figures = {"bytes_per_s": 50e9, "latency_s": 1e-5, "source": "a test, 2026-11-27", **transfer}
    return Deployment(pools=pools, kv_transfer=KvTransfer.model_validate(figures))


def holds(trace: Trace, deployment: Deployment, targets: tuple[Target, ...], prefill: int, decode: int) -> bool:
    sized = deployment.with_replicas(prefill, decode)
    first, second = (step_model(pool).tables for pool in sized.phases)
    run = simulate_disaggregated(trace, sized, LLAMA_8B, transfer_link(sized), first, second)
    return not broken(run.result, trace, targets, longest_answer_s(trace, second, sized.phases[1]))


TIGHT = tuple(map(Target.parse, ("ttft:p95<=150ms", "tpot:p95<=25ms")))


@pytest.mark.parametrize(
    ("rate_per_s", "targets", "usd", "most"),
    [
        (8.0, TARGETS, (1.0, 1.0), (1, 1)),
        (8.0, TIGHT, (1.0, 1.0), (4, 4)),
        (60.0, TARGETS, (1.0, 1.0), (7, 7)),
        (60.0, TARGETS, (9.0, 1.0), (5, 12)),
        (30.0, TIGHT, (1.0, 9.0), (12, 2)),
        (60.0, TIGHT, (1.0, 1.0), (12, 12)),
    ],
)
def test_sizing_finds_what_a_walk_over_all_pairs_finds(
    rate_per_s: float, targets: tuple[Target, ...], usd: tuple[float, float], most: tuple[int, int]
) -> None:
    trace, deployment = poisson_trace(200, rate_per_s), two_pools()
    pairs = itertools.product(range(1, most[0] + 1), range(1, most[1] + 1))
    cost = {pair: pair[0] * usd[0] + pair[1] * usd[1] for pair in pairs}
    walked = next(pair for pair in sorted(cost, key=lambda x: cost[x]) if holds(trace, deployment, targets, *pair))
    found = size_phases(trace, deployment, LLAMA_8B, step_model, usd, targets)
    assert found.usd_per_hour == cost[walked]
    assert holds(trace, deployment, targets, found.prefill, found.decode)
    for prefill, decode, why in (
        (found.prefill - 1, found.decode, found.fewer[0]),
        (found.prefill, found.decode - 1, found.fewer[1]),
    ):
        if prefill and decode:
            assert why.startswith(("breaks", "does not keep up"))
            assert not holds(trace, deployment, targets, prefill, decode)


@settings(max_examples=300, deadline=None)
@given(
    least=st.lists(st.integers(1, 20), min_size=1, max_size=20),
    usd=st.tuples(st.floats(0.5, 20), st.floats(0.5, 20)),
)
def test_the_search_is_exact_where_more_replicas_never_do_worse(least: list[int], usd: tuple[float, float]) -> None:
    # decode replicas that 1, 2, 3, ... prefill replicas need, never more with more of them; with more yet the last
    steps = [max(least[i:]) for i in range(len(least))]

    def enough(prefill: int, decode: int) -> bool:
        return decode >= steps[min(prefill, len(steps)) - 1]

    found = cheapest_counts(enough, usd, 64)
    assert found is not None
    assert enough(*found)
    cost = [(i + 1) * usd[0] + need * usd[1] for i, need in enumerate(steps)]
    assert found[0] * usd[0] + found[1] * usd[1] == pytest.approx(min(cost))


def test_a_hole_among_counts_that_hold_is_stepped_over() -> None:
    # six prefill replicas fail where five and seven hold, as may happen with requests in turn
    found = cheapest_counts(lambda prefill, decode: prefill in (5, 7, 8, 9, 10, 16), (1.0, 9.0), 64)
    assert found == (5, 1)


def test_who_is_dear_is_bought_less_of() -> None:
    trace, deployment = poisson_trace(200, 60.0), two_pools()
    cheap = size_phases(trace, deployment, LLAMA_8B, step_model, (1.0, 9.0), TIGHT)
    dear = size_phases(trace, deployment, LLAMA_8B, step_model, (9.0, 1.0), TIGHT)
    assert dear.prefill < cheap.prefill
    assert cheap.decode < dear.decode


def test_where_no_number_holds_it_says_what_breaks() -> None:
    slow = two_pools(bytes_per_s=1e6)  # a prompt of 100 tokens takes 13 s
    found = size_phases(poisson_trace(60, 2.0), slow, LLAMA_8B, step_model, (1.0, 1.0), TARGETS, most=8)
    assert (found.prefill, found.decode) == (0, 0)
    assert "ttft" in found.reason
    assert found.words.startswith("no equal numbers of replicas, doubled up to 8, hold the targets: breaks ttft")


def test_a_link_that_is_named_bounds_the_replicas() -> None:
    pools = tuple(pool.model_copy(update={"accelerator": "H100"}) for pool in two_pools().pools)
    near = Deployment(pools=pools, kv_transfer=KvTransfer(link="NVLink 4"))
    impossible = (Target.parse("ttft:p95<=1ms"),)
    found = size_phases(poisson_trace(60, 2.0), near, LLAMA_8B, step_model, (1.0, 1.0), impossible, most=16)
    assert found.prefill == 0
    assert found.words.startswith("no numbers of replicas up to 16 that NVLink 4 joins hold the targets: breaks ttft")


def test_unequal_counts_within_a_links_reach_are_found() -> None:
    # eight devices: four of each fail, five and three hold
    def holds(prefill: int, decode: int) -> bool:
        assert prefill + decode <= 8
        return prefill >= 5 and decode >= 2

    assert cheapest_counts(holds, (1.0, 1.0), 256, lambda decode: max(0, 8 - decode)) == (5, 2)


@settings(max_examples=300, deadline=None)
@given(
    need=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    devices=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    usd=st.tuples(st.floats(0.5, 20), st.floats(0.5, 20)),
    joined=st.integers(2, 40),
    most=st.integers(1, 20),
)
def test_within_a_reach_the_search_finds_what_a_walk_over_all_pairs_finds(
    need: tuple[int, int], devices: tuple[int, int], usd: tuple[float, float], joined: int, most: int
) -> None:
    def reach(decode: int) -> int:
        return max(0, min(most, (joined - decode * devices[1]) // devices[0]))

    def holds(prefill: int, decode: int) -> bool:
        assert prefill <= reach(decode)
        # the product of both counts matters, too, so that there is more than one corner
        return prefill * decode >= need[0] * need[1] and decode >= need[1] // 2

    pairs = [(p, d) for d in range(1, most + 1) for p in range(1, reach(d) + 1) if holds(p, d)]
    found = cheapest_counts(holds, usd, most, reach)
    assert (found is None) == (not pairs)
    if found is not None:
        assert found[0] * usd[0] + found[1] * usd[1] == pytest.approx(min(p * usd[0] + d * usd[1] for p, d in pairs))


def test_a_named_link_is_walked_over_pairs_that_are_not_equal() -> None:
    pools = tuple(pool.model_copy(update={"accelerator": "H100"}) for pool in two_pools().pools)
    near = Deployment(pools=pools, kv_transfer=KvTransfer(link="NVLink 4"))
    trace = poisson_trace(200, 30.0)
    counts = [(prefill, decode) for prefill in range(1, 8) for decode in range(1, 9 - prefill)]
    walked = {pair for pair in counts if holds(trace, near, TIGHT, *pair)}
    assert walked
    assert not any(prefill == decode for prefill, decode in walked)
    found = size_phases(trace, near, LLAMA_8B, step_model, (1.0, 1.0), TIGHT)
    assert (found.prefill, found.decode) in walked
    assert found.usd_per_hour == min(sum(pair) for pair in walked)
