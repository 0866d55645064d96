"""Routing: every policy's promise, as a function and in the simulator that calls it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.profiler.simulator import simulate
from paretune.runtime.router import OVERLOAD, new_router, num_prefix_hashes, route
from paretune.runtime.spec import Pool
from paretune.traces.metrics import TTFT
from paretune.traces.trace import PrefixHashes, Trace

from .test_simulator import pool, tables, trace

NO_PREFIX = np.zeros(0, np.int64)


def prefix(*hashes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(hashes, np.int64)


def loads(*tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(tokens, np.int64)


def test_round_robin_goes_by_turns_whatever_the_load() -> None:
    router = new_router(Pool(router="round_robin"))
    assert [route(router, loads(900, 0, 5), 10, prefix(1)) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_idle_replicas_take_turns_when_the_fewest_tokens_decide() -> None:
    router = new_router(Pool(router="least_outstanding_tokens"))
    assert [route(router, loads(0, 0, 0), 10, NO_PREFIX) for _ in range(4)] == [0, 1, 2, 0]


@given(
    outstanding=st.lists(st.integers(0, 1000), min_size=1, max_size=9),
    turn=st.integers(0, 8),
)
def test_nobody_has_fewer_tokens_than_the_chosen(outstanding: list[int], turn: int) -> None:
    router = new_router(Pool(router="least_outstanding_tokens"))
    router.turn[0] = turn % len(outstanding)
    chosen = route(router, loads(*outstanding), 5, NO_PREFIX)
    assert outstanding[chosen] == min(outstanding)


def test_a_prompt_follows_the_longest_beginning_that_is_known() -> None:
    router = new_router(Pool(router="prefix_affinity"))
    assert route(router, loads(0, 0), 10, prefix(7, 8)) == 0
    assert route(router, loads(10, 0), 10, prefix(7, 9)) == 0  # shares the first block
    assert route(router, loads(90, 0), 10, prefix(5)) == 1  # shares nothing
    assert route(router, loads(90, 0), 10, prefix(7, 9, 11)) == 1  # its replica is overloaded
    assert route(router, loads(10, 10), 10, prefix(7, 9, 11, 12)) == 1  # where it was last
    assert route(router, loads(10, 10), 10, prefix(7, 8)) == 0  # the other conversation stayed


@settings(deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 400)), min_size=1, max_size=60),
    replicas=st.integers(1, 5),
)
def test_no_affinity_overloads_a_replica(requests: list[tuple[int, int]], replicas: int) -> None:
    router = new_router(Pool(router="prefix_affinity"))
    outstanding = np.zeros(replicas, np.int64)
    for beginning, tokens in requests:
        before = outstanding.copy()
        chosen = route(router, outstanding, tokens, prefix(beginning, 100 + beginning))
        mean = (before.sum() + tokens) / replicas
        assert before[chosen] <= OVERLOAD * mean or before[chosen] == before.min()
        outstanding[chosen] += tokens


def test_a_trace_of_long_blocks_is_looked_at_by_at_least_one() -> None:
    assert num_prefix_hashes(16) == 32
    assert num_prefix_hashes(100_000) == 1


@pytest.mark.parametrize("policy", ["least_outstanding_tokens", "prefix_affinity"])
def test_one_replica_serves_alike_whoever_routes(policy: str) -> None:
    requests = trace(60, 10.0, 3)
    limits = pool()
    alone = simulate(requests, limits, tables(limits))
    routed = simulate(requests, limits.model_copy(update={"router": policy}), tables(limits))
    assert (routed.steps, routed.preemptions) == (alone.steps, alone.preemptions)
    np.testing.assert_allclose(routed.times.end_s, alone.times.end_s, rtol=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    policy=st.sampled_from(["least_outstanding_tokens", "prefix_affinity"]),
    rate=st.sampled_from([1.0, 20.0]),
)
def test_jumps_of_routed_replicas_change_nothing(seed: int, policy: str, rate: float) -> None:
    limits = pool(replicas=3, router=policy)
    requests = trace(80, rate, seed)
    fast = simulate(requests, limits, tables(limits))
    slow = simulate(requests, limits, tables(limits), jump=False)
    assert fast.times.finished.all()
    assert (fast.steps, fast.preemptions) == (slow.steps, slow.preemptions)
    np.testing.assert_allclose(fast.times.end_s, slow.times.end_s, rtol=1e-3)


def test_the_simulator_sends_requests_where_the_fewest_tokens_are_outstanding() -> None:
    limits = pool(replicas=2, router="least_outstanding_tokens", max_num_seqs=1)
    step = tables(limits)
    # the second request is long, so the third and fourth queue behind the first
    requests = Trace([0.0, 0.001, 0.002, 0.003], [10, 10, 10, 10], [10, 200, 10, 10])
    times = simulate(requests, limits, step).times
    one_s = float(times.end_s[0])
    assert times.end_s[2] == pytest.approx(2 * one_s, rel=0.02)
    assert times.end_s[3] == pytest.approx(3 * one_s, rel=0.02)
    in_turn = simulate(requests, limits.model_copy(update={"router": "round_robin"}), step).times
    assert in_turn.end_s[3] > times.end_s[1] > times.end_s[3]


def test_affinity_finds_more_in_the_prefix_cache_than_turns_do() -> None:
    conversations, turns = 5, 8
    rng = np.random.default_rng(0)
    order = [c for _ in range(turns) for c in rng.permutation(conversations)]
    # all of a conversation's prompts begin with the same 4 blocks of 16
    hashes = np.concatenate([np.arange(4) + 1 + 10 * conversation for conversation in order]).astype(np.int64)
    offsets = 4 * np.arange(len(order) + 1)
    requests = Trace(
        0.3 * np.arange(len(order)), [70] * len(order), [5] * len(order), prefix=PrefixHashes(hashes, offsets, 16)
    )
    found = {}
    for policy in ("round_robin", "prefix_affinity"):
        limits = pool(replicas=3, router=policy, enable_prefix_caching=True, num_kv_blocks=200)
        found[policy] = simulate(requests, limits, tables(limits))
    assert found["prefix_affinity"].prefix_hit_tokens == (len(order) - conversations) * 64
    assert found["round_robin"].prefix_hit_tokens < 0.9 * found["prefix_affinity"].prefix_hit_tokens
    better, worse = (np.nanmean(found[p].times.values(TTFT)) for p in ("prefix_affinity", "round_robin"))
    assert better < worse
