"""The fewest replicas of both pools: what a walk over every pair of counts finds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from paretune.optimizer.capacity import broken, longest_answer_s
from paretune.optimizer.phase_sizing import size_phases
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


def holds(trace: Trace, deployment: Deployment, prefill: int, decode: int) -> bool:
    sized = deployment.with_replicas(prefill, decode)
    first, second = (step_model(pool).tables for pool in sized.phases)
    run = simulate_disaggregated(trace, sized, LLAMA_8B, transfer_link(sized), first, second)
    return not broken(run.result, trace, TARGETS, longest_answer_s(trace, second, sized.phases[1]))


@pytest.mark.parametrize(
    ("rate_per_s", "usd"), [(2.0, (1.0, 1.0)), (8.0, (1.0, 1.0)), (8.0, (9.0, 1.0)), (8.0, (1.0, 9.0))]
)
def test_sizing_finds_what_a_walk_over_all_pairs_finds(rate_per_s: float, usd: tuple[float, float]) -> None:
    trace, deployment = poisson_trace(200, rate_per_s), two_pools()
    pairs = itertools.product(range(1, 13), range(1, 13))
    cost = {pair: pair[0] * usd[0] + pair[1] * usd[1] for pair in pairs}
    walked = next(pair for pair in sorted(cost, key=lambda pair: cost[pair]) if holds(trace, deployment, *pair))
    found = size_phases(trace, deployment, LLAMA_8B, step_model, usd, TARGETS)
    assert found.usd_per_hour == cost[walked]
    assert holds(trace, deployment, found.prefill, found.decode)
    for prefill, decode, why in (
        (found.prefill - 1, found.decode, found.fewer[0]),
        (found.prefill, found.decode - 1, found.fewer[1]),
    ):
        if prefill and decode:
            assert why.startswith(("breaks", "does not keep up"))
            assert not holds(trace, deployment, prefill, decode)


def test_dear_prefill_replicas_are_not_traded_for_more_than_they_save() -> None:
    trace, deployment = poisson_trace(200, 8.0), two_pools()
    cheap = size_phases(trace, deployment, LLAMA_8B, step_model, (1.0, 9.0), TARGETS)
    dear = size_phases(trace, deployment, LLAMA_8B, step_model, (9.0, 1.0), TARGETS)
    assert dear.prefill <= cheap.prefill
    assert cheap.decode <= dear.decode


def test_where_no_number_holds_it_says_what_breaks() -> None:
    slow = two_pools(bytes_per_s=1e6)  # a prompt of 100 tokens takes 13 s
    found = size_phases(poisson_trace(60, 2.0), slow, LLAMA_8B, step_model, (1.0, 1.0), TARGETS, most=8)
    assert (found.prefill, found.decode) == (0, 0)
    assert "ttft" in found.reason
    assert "no number of replicas" in found.words


def test_a_link_that_is_named_bounds_the_replicas() -> None:
    pools = tuple(pool.model_copy(update={"accelerator": "H100"}) for pool in two_pools().pools)
    near = Deployment(pools=pools, kv_transfer=KvTransfer(link="NVLink 4"))
    impossible = (Target.parse("ttft:p95<=1ms"),)
    found = size_phases(poisson_trace(60, 2.0), near, LLAMA_8B, step_model, (1.0, 1.0), impossible, most=16)
    assert found.prefill == 0
    assert "NVLink 4" in found.reason
