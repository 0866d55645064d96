"""Replay a trace on a virtual clock, with the runtime's own scheduler and a step-time model.

The event loop is compiled together with the scheduler and the step-time tables. Between two events (an arrival, the end
of a request, a lack of blocks) a pure decode batch does not change, so the loop jumps over many steps at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit
from ..runtime.scheduler import (
    MAX_NUM_SEQS,
    NUM_PREEMPTIONS,
    NUM_PREFIX_HIT_TOKENS,
    NUM_RUNNING,
    PLAN_FINISHED,
    PLAN_SIZE,
    PLAN_TOKENS,
    Plan,
    State,
    add_request,
    commit_decode_run,
    decode_run_length,
    grow,
    is_decode_run,
    new_plan,
    new_state,
    schedule,
)
from ..runtime.spec import Pool
from ..traces.metrics import RequestTimes, Target
from ..traces.prefix import blocks_per_hash
from ..traces.trace import Trace
from .step_time import WORK_GRID, StepTables, composed_time_s, composition, grid_place

# why the event loop returned
_DRAINED = 0
_OUT_OF_SLOTS = 1
_GAVE_UP = 2

_METRIC_CODE = {"ttft": 0, "ttf": 1, "tpot": 2, "e2e": 3}


class _Requests(NamedTuple):
    """Requests of one replica in order of arrival, n rows.

    arrival_s (n,) float64 when the scheduler sees it; scheduled_s (n,) float64 when the client wanted it sent;
    input_tokens, max_num_tokens, hash_start, num_hashes (n,) int64
    adapter (n,) int64 number of the adapter, 0 for none
    """

    arrival_s: NDArray[np.float64]
    scheduled_s: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    max_num_tokens: NDArray[np.int64]
    hash_start: NDArray[np.int64]
    num_hashes: NDArray[np.int64]
    adapter: NDArray[np.int64]


class _Times(NamedTuple):
    """When each request's first, k-th and last token reach the client: (n,) float64 seconds, NaN until then."""

    first_s: NDArray[np.float64]
    kth_s: NDArray[np.float64]
    end_s: NDArray[np.float64]


class _Bounds(NamedTuple):
    """Targets after which a run may be given up, t rows: over allowed_late[i] governed requests later than limit_s[i].

    metric (t,) int64; limit_s (t,) float64; allowed_late, late (t,) int64; governs (t, n) bool
    """

    metric: NDArray[np.int64]
    limit_s: NDArray[np.float64]
    allowed_late: NDArray[np.int64]
    late: NDArray[np.int64]
    governs: NDArray[np.bool_]


@dataclass(frozen=True)
class SimulationResult:
    """What a deployment did with a trace, on a virtual clock.

    times              when each request's tokens reached the client; a request longer than max_model_len never finishes
    steps              steps computed, all replicas together
    busy_s             seconds of computing, summed over replicas
    preemptions        times that a request gave its blocks back and was computed again
    prefix_hit_tokens  input tokens that were found in the prefix cache
    rejected           requests longer than max_model_len
    gave_up            stopped early, because a target could no longer be met: the times are incomplete
    """

    times: RequestTimes
    steps: int
    busy_s: float
    preemptions: int
    prefix_hit_tokens: int
    rejected: int
    gave_up: bool


@njit
def _is_late(requests: _Requests, times: _Times, bounds: _Bounds, target: int, request: int, k: int) -> bool:
    scheduled_s, end_s = requests.scheduled_s[request], times.end_s[request]
    answer = requests.max_num_tokens[request] - requests.input_tokens[request]
    metric = bounds.metric[target]
    if metric == 0:
        value = times.first_s[request] - scheduled_s
    elif metric == 1:
        value = (times.kth_s[request] if answer >= k else end_s) - scheduled_s
    elif metric == 2:
        value = (end_s - times.first_s[request]) / max(1, answer - 1)
    else:
        value = end_s - scheduled_s
    return bool(value > bounds.limit_s[target])


@njit
def _steps_until(arrival_s: float, now_s: float, first_s: float, growth_s: float, most: int) -> int:
    """Steps of first_s, first_s + growth_s, ... seconds until one ends at or after an arrival; 1 to `most`."""
    wait_s = arrival_s - now_s
    if growth_s * most < 1e-9 * first_s:
        steps = wait_s / first_s
    else:
        # the root of steps * first_s + steps * (steps - 1) / 2 * growth_s = wait_s
        half = first_s - 0.5 * growth_s
        steps = (math.sqrt(half * half + 2.0 * growth_s * wait_s) - half) / growth_s
    return int(max(1.0, min(float(most), math.ceil(steps - 1e-9))))


@njit
def _run(
    state: State,
    plan: Plan,
    tables: StepTables,
    requests: _Requests,
    times: _Times,
    bounds: _Bounds,
    k: int,
    jump: bool,
    cursor: NDArray[np.int64],
    clock: NDArray[np.float64],
) -> int:
    """The event loop; returns why it ended.

    cursor (2,) int64: next request to arrive, steps so far; clock (2,) float64: now, busy seconds. Both are read and
    written, so that a run that was out of slots goes on where it stopped.
    """
    number = requests.arrival_s.shape[0]
    upcoming = cursor[0]
    now_s = clock[0]
    client_s = tables.request_s[1]
    status = _DRAINED
    while True:
        while upcoming < number and requests.arrival_s[upcoming] <= now_s:
            slot = add_request(
                state,
                upcoming,
                requests.input_tokens[upcoming],
                requests.max_num_tokens[upcoming],
                requests.hash_start[upcoming],
                requests.num_hashes[upcoming],
            )
            if slot < 0:
                break
            state.adapter[slot] = requests.adapter[upcoming]
            upcoming += 1
        if upcoming < number and requests.arrival_s[upcoming] <= now_s:
            status = _OUT_OF_SLOTS
            break

        schedule(state, plan)
        size = plan.counts[PLAN_SIZE]
        if size == 0:
            if upcoming == number:
                break
            now_s = requests.arrival_s[upcoming]
            continue

        tokens = plan.counts[PLAN_TOKENS]
        samples, context, pairs = composition(plan)
        first_s = composed_time_s(tables, tokens, size, samples, context, pairs)
        growth_s = 0.0
        steps = 1
        if jump and is_decode_run(state, plan):
            # within one segment of the table, attention grows by the same time each step: the jump is exact
            room = WORK_GRID[grid_place(context) + 1] - context
            steps = decode_run_length(state, plan, 1 + int(room / size))
            if steps > 1:
                last_s = composed_time_s(tables, tokens, size, samples, context + float((steps - 1) * size), pairs)
                growth_s = (last_s - first_s) / (steps - 1)
                # with every lane taken a newcomer changes nothing before somebody ends
                if upcoming < number and state.counts[NUM_RUNNING] < state.limits[MAX_NUM_SEQS]:
                    steps = _steps_until(requests.arrival_s[upcoming], now_s, first_s, growth_s, steps)
        run_s = steps * first_s + 0.5 * steps * (steps - 1) * growth_s

        for row in range(size):
            if plan.samples[row]:
                slot = plan.slot[row]
                before = state.num_tokens[slot] - state.num_prompt_tokens[slot]
                request = state.request_id[slot]
                if before == 0:
                    times.first_s[request] = now_s + first_s + client_s
                if before < k <= before + steps:
                    taken = k - before
                    kth_s = taken * first_s + 0.5 * taken * (taken - 1) * growth_s
                    times.kth_s[request] = now_s + kth_s + client_s
        now_s += run_s
        clock[1] += run_s
        cursor[1] += steps
        commit_decode_run(state, plan, steps)
        for i in range(plan.counts[PLAN_FINISHED]):
            request = state.request_id[plan.finished[i]]
            times.end_s[request] = now_s + client_s
            for target in range(bounds.metric.shape[0]):
                if bounds.governs[target, request] and _is_late(requests, times, bounds, target, request, k):
                    bounds.late[target] += 1
                    if bounds.late[target] > bounds.allowed_late[target]:
                        status = _GAVE_UP
        if status == _GAVE_UP:
            break
    cursor[0] = upcoming
    clock[0] = now_s
    return status


def _bounds(trace: Trace, targets: Sequence[Target], k: int) -> _Bounds:
    """Targets as arrays; those in metrics the event loop does not see (ITL, other k) are left to the caller."""
    seen = [t for t in targets if t.metric.name in _METRIC_CODE and t.metric.k in (0, k)]
    governs = np.zeros((len(seen), len(trace)), np.bool_)
    for i, target in enumerate(seen):
        governs[i] = governed_rows(trace, target)
    # the percentile interpolates between ranks: with this many late requests both neighbors are late
    allowed = [math.ceil((1 - t.percentile / 100) * (int(rows.sum()) - 1)) + 1 for t, rows in zip(seen, governs)]
    return _Bounds(
        metric=np.array([_METRIC_CODE[t.metric.name] for t in seen], np.int64),
        limit_s=np.array([t.limit_s for t in seen], np.float64),
        allowed_late=np.array(allowed, np.int64),
        late=np.zeros(len(seen), np.int64),
        governs=governs,
    )


def governed_rows(trace: Trace, target: Target) -> NDArray[np.bool_]:
    """The requests a target speaks about: as the trace says for its own targets, else those of the target's app."""
    if target in trace.targets:
        return trace.rows(target)
    if target.app is None:
        return np.ones(len(trace), np.bool_)
    if trace.app is None or target.app not in trace.app.names:
        return np.zeros(len(trace), np.bool_)
    return np.asarray(trace.app.codes == trace.app.names.index(target.app), np.bool_)


def simulate(
    trace: Trace,
    pool: Pool,
    tables: StepTables,
    *,
    k: int = 30,
    rate: float = 1.0,
    give_up: Sequence[Target] = (),
    jump: bool = True,
) -> SimulationResult:
    """Serve a trace on a virtual clock.

    Requests go to the pool's replicas in turn (round robin), as the server's router sends them. With max_loras they
    wait for their adapters' slots and share prefixes with those of their adapter alone, as in the engine; a pool that
    takes no adapters serves them on the base.

    Args:
        trace: the requests; their recorded output lengths are taken as known to the client, not to the scheduler.
        pool: limits, cache and number of replicas.
        tables: step times of one replica.
        k: of TTF-k.
        rate: arrivals are that many times as fast as recorded.
        give_up: stop as soon as one of these can no longer be met (for searches, which need no exact figure then).
        jump: take runs of equal decode steps at once; False steps one by one, to check the jumps.
    Returns: times by request in trace order, and what it took.
    Raises: BadTrace: the trace's prefix blocks do not cover whole KV blocks. ValueError: no positive rate.
    """
    if not 0 < rate < math.inf:
        raise ValueError(f"rate must be a positive number, not {rate}")
    n = len(trace)
    times = _Times(np.full(n, np.nan), np.full(n, np.nan), np.full(n, np.nan))
    scheduled_s = trace.arrival_s / rate
    input_tokens = trace.input_tokens.astype(np.int64)
    max_num_tokens = input_tokens + trace.output_tokens
    fits = max_num_tokens <= pool.max_model_len
    offsets = np.zeros(n + 1, np.int64) if trace.prefix is None else trace.prefix.offsets
    # a trace's arrays are read-only, which is another type to Numba: without the copy everything compiles twice
    hashes = np.zeros(0, np.int64) if trace.prefix is None else trace.prefix.hashes.copy()
    per_hash = 1 if trace.prefix is None else blocks_per_hash(trace.prefix.block_size, pool.block_size)
    adapters = np.zeros(n, np.int64)
    if trace.adapter is not None and pool.max_loras > 0:
        adapters = trace.adapter.codes.astype(np.int64) + 1  # a request without one has the code -1
    bounds = _bounds(trace, give_up, k)
    # blocks beyond those of every request together are never touched: a huge cache costs no memory here
    touched = int((-(-max_num_tokens[fits] // pool.block_size)).sum())
    pool = pool.model_copy(update={"num_kv_blocks": max(1, min(pool.num_kv_blocks, touched))})
    steps = preemptions = hit_tokens = 0
    busy_s = 0.0
    status = _DRAINED
    for replica in range(pool.replicas):
        # the server counts the requests that it takes, so those that are too long take no turn
        rows = np.flatnonzero(fits)[replica :: pool.replicas]
        requests = _Requests(
            arrival_s=scheduled_s[rows] + tables.request_s[0],
            scheduled_s=scheduled_s[rows],
            input_tokens=input_tokens[rows],
            max_num_tokens=max_num_tokens[rows],
            hash_start=offsets[:-1][rows],
            num_hashes=np.diff(offsets)[rows],
            adapter=adapters[rows],
        )
        part = _Times(*(np.full(len(rows), np.nan) for _ in range(3)))
        governed = bounds._replace(governs=np.ascontiguousarray(bounds.governs[:, rows]))
        state = new_state(pool, hashes=hashes, blocks_per_hash=per_hash)
        plan = new_plan(pool)
        cursor, clock = np.zeros(2, np.int64), np.zeros(2)
        while True:
            status = _run(state, plan, tables, requests, part, governed, k, jump, cursor, clock)
            if status != _OUT_OF_SLOTS:
                break
            state = grow(state)
        for whole, piece in zip(times, part):
            whole[rows] = piece
        steps += int(cursor[1])
        busy_s += float(clock[1])
        preemptions += int(state.counts[NUM_PREEMPTIONS])
        hit_tokens += int(state.counts[NUM_PREFIX_HIT_TOKENS])
        if status == _GAVE_UP:
            break
    finished = ~np.isnan(times.end_s)
    return SimulationResult(
        times=RequestTimes(
            scheduled_s=scheduled_s,
            sent_s=scheduled_s,
            first_token_s=times.first_s,
            kth_token_s=times.kth_s,
            end_s=times.end_s,
            output_tokens=np.where(finished, trace.output_tokens, 0).astype(np.int64),
            finished=finished,
            k=k,
        ),
        steps=steps,
        busy_s=busy_s,
        preemptions=preemptions,
        prefix_hit_tokens=hit_tokens,
        rejected=int((~fits).sum()),
        gave_up=status == _GAVE_UP,
    )
