"""The simulator set up as a queue waits as queueing theory says: M/M/1, M/D/1 and M/M/c.

A step takes one tick whatever is in it, a prompt is one token, and an answer of n tokens so takes n ticks: service
times are multiples of a tick, a small part of their mean. One request at a time (max_num_seqs 1) is a single server.
Servers that share one queue are the lanes of one replica (max_num_seqs c): all lanes advance by a tick in each step,
and the first in the queue takes the first lane that is free. Someone who finds a lane free in the middle of a tick
begins at its end, so the ticks of several lanes are shorter.

Replicas behind the router are another thing: each has a queue of its own, which waits longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from paretune.profiler.simulator import simulate
from paretune.profiler.step_time import WORK_GRID, StepTables
from paretune.runtime.spec import Pool
from paretune.traces.trace import Trace

MEAN_S = 0.1
SEEDS = range(5)
REQUESTS = 100_000

# Draws `count` answers, in ticks, of a mean of so many: answers(mean_ticks, count, seed).
Answers = Callable[[int, int, int], NDArray[np.int64]]


def exponential(mean_ticks: int, count: int, seed: int) -> NDArray[np.int64]:
    # rounding up adds half a tick
    drawn = np.random.default_rng((seed, 2)).exponential(mean_ticks - 0.5, count)
    return np.ceil(drawn).astype(np.int64)


def equal(mean_ticks: int, count: int, seed: int) -> NDArray[np.int64]:
    return np.full(count, mean_ticks)


def mean_wait_s(
    lanes: int, utilization: float, answers: Answers, *, mean_ticks: int = 100, count: int = REQUESTS, **changes: Any
) -> float:
    """Mean over seeds and requests, from the arrival until the first step begins; utilization is that of one server."""
    longest = 40 * mean_ticks
    limits = Pool.model_validate(
        {
            "max_model_len": longest,
            "max_num_seqs": lanes,
            "max_num_batched_tokens": lanes,
            "num_kv_blocks": lanes * -(-longest // 128),
            "block_size": 128,
            **changes,
        }
    )
    tick_s = MEAN_S / mean_ticks
    nothing = np.zeros(len(WORK_GRID))
    tables = StepTables(
        tokens_s=np.full(lanes + 1, tick_s),
        rows_s=np.zeros(lanes + 1),
        samples_s=np.zeros(limits.max_num_samples + 1),
        decode_attention_s=nothing,
        prefill_attention_s=nothing.copy(),
        request_s=np.zeros(2),
    )
    found = []
    for seed in SEEDS:
        gaps_s = np.random.default_rng((seed, 1)).exponential(MEAN_S / (utilization * lanes * limits.replicas), count)
        trace = Trace(np.cumsum(gaps_s), np.ones(count, np.int64), answers(mean_ticks, count, seed))
        times = simulate(trace, limits, tables).times
        found.append(np.mean(times.first_token_s - tick_s - trace.arrival_s))
    return float(np.mean(found))


def erlang_c_wait_s(servers: int, load: float) -> float:
    """Mean wait of M/M/c (Erlang, 1917): the chance to wait over what the servers have to spare.

    Against the table of Kleinrock, Queueing Systems 1, 1975, two servers at load 1 wait a third of a service time.

    >>> f"{erlang_c_wait_s(2, 1.0) / MEAN_S:.4f}"
    '0.3333'
    """
    terms = [load**k / math.factorial(k) for k in range(servers)]
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(terms) + last) * MEAN_S / (servers - load)


@pytest.mark.parametrize("utilization", [0.3, 0.5])
def test_one_lane_waits_like_mm1(utilization: float) -> None:
    theory_s = utilization / (1 - utilization) * MEAN_S
    assert erlang_c_wait_s(1, utilization) == pytest.approx(theory_s)
    assert mean_wait_s(1, utilization, exponential) == pytest.approx(theory_s, rel=0.02)


@pytest.mark.parametrize("utilization", [0.5, 0.8])
def test_one_lane_with_equal_answers_waits_like_md1(utilization: float) -> None:
    # Pollaczek-Khinchine: half of M/M/1
    theory_s = utilization / (2 * (1 - utilization)) * MEAN_S
    assert mean_wait_s(1, utilization, equal) == pytest.approx(theory_s, rel=0.02)


@pytest.mark.parametrize(("servers", "utilization"), [(2, 0.6), (4, 0.6), (8, 0.7)])
def test_lanes_of_one_replica_wait_like_mmc(servers: int, utilization: float) -> None:
    theory_s = erlang_c_wait_s(servers, servers * utilization)
    assert mean_wait_s(servers, utilization, exponential, mean_ticks=1000) == pytest.approx(theory_s, rel=0.02)


def test_replicas_with_queues_of_their_own_wait_longer_than_one_shared_queue() -> None:
    few = {"mean_ticks": 100, "count": 2000}
    shared_s = mean_wait_s(4, 0.7, exponential, **few)
    routed_s, turns_s = (
        mean_wait_s(1, 0.7, exponential, replicas=4, router=router, **few)
        for router in ("least_outstanding_tokens", "round_robin")
    )
    # that router knows how long an answer will be, so it comes close to the shared queue; taking turns does not
    assert shared_s < routed_s < 0.5 * turns_s
    # and turns are still better than chance, under which each replica is an M/M/1 of its own
    assert turns_s < erlang_c_wait_s(1, 0.7)
