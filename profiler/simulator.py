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
from ..runtime.decode_runs import commit_decode_run, decode_run_length, is_decode_run
from ..runtime.router import new_router, num_prefix_hashes, route
from ..runtime.scheduler import add_request, commit, schedule
from ..runtime.scheduler_state import (
    MAX_NUM_SEQS,
    NUM_BLOCKS_FROM_HOST,
    NUM_BLOCKS_TO_HOST,
    NUM_HOST_HIT_TOKENS,
    NUM_PREEMPTIONS,
    NUM_PREFIX_HIT_TOKENS,
    NUM_RUNNING,
    NUM_SWAPPED,
    PLAN_FINISHED,
    PLAN_PREEMPTED,
    PLAN_SIZE,
    PLAN_TOKENS,
    Plan,
    State,
    grow,
    new_plan,
    new_state,
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
_PAUSED = 3

# places in the cursor of a replica
_ARRIVED = 0  # requests of its queue that the scheduler has seen
_QUEUED = 1
_STEPS = 2
_ENDED = 3
_BEGUN = 4  # steps, of a pipeline
_FIRST_PLACES = 1024  # of a queue that grows

# fields of SimulationResult that the scheduler counts
_TOTALS = {
    "preemptions": NUM_PREEMPTIONS,
    "swaps": NUM_SWAPPED,
    "prefix_hit_tokens": NUM_PREFIX_HIT_TOKENS,
    "host_hit_tokens": NUM_HOST_HIT_TOKENS,
    "blocks_to_host": NUM_BLOCKS_TO_HOST,
    "blocks_from_host": NUM_BLOCKS_FROM_HOST,
}
_METRIC_CODE = {"ttft": 0, "ttf": 1, "tpot": 2, "e2e": 3}


class _Requests(NamedTuple):
    """Requests in order of arrival, n rows.

    arrival_s (n,) float64 when the scheduler sees it; scheduled_s (n,) float64 when the client wanted it sent;
    input_tokens, max_num_tokens, hash_start, num_hashes, priority (n,) int64
    adapter (n,) int64 number of the adapter, 0 for none
    """

    arrival_s: NDArray[np.float64]
    scheduled_s: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    max_num_tokens: NDArray[np.int64]
    hash_start: NDArray[np.int64]
    num_hashes: NDArray[np.int64]
    priority: NDArray[np.int64]
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
    preemptions        times that a request gave its blocks back
    swaps              of these, times that its blocks went to the host; the others are computed again
    prefix_hit_tokens  tokens that were found in the prefix cache, on the device
    host_hit_tokens    tokens that were found in the prefix cache, on the host only
    blocks_to_host, blocks_from_host  blocks copied. The time that this takes is not modeled
    rejected           requests longer than max_model_len
    gave_up            stopped early, because a target could no longer be met: the times are incomplete
    """

    times: RequestTimes
    steps: int
    busy_s: float
    preemptions: int
    swaps: int
    prefix_hit_tokens: int
    host_hit_tokens: int
    blocks_to_host: int
    blocks_from_host: int
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
def _admit(
    state: State, requests: _Requests, queue: NDArray[np.int64], cursor: NDArray[np.int64], now_s: float
) -> bool:
    """Hand the requests that have arrived to the scheduler; False: it is out of slots."""
    while cursor[_ARRIVED] < cursor[_QUEUED]:
        request = queue[cursor[_ARRIVED]]
        if requests.arrival_s[request] > now_s:
            break
        slot = add_request(
            state,
            request,
            requests.input_tokens[request],
            requests.max_num_tokens[request],
            requests.hash_start[request],
            requests.num_hashes[request],
            requests.priority[request],
            requests.adapter[request],
        )
        if slot < 0:
            return False
        cursor[_ARRIVED] += 1
    return True


@njit
def _note_ended(
    state: State,
    plan: Plan,
    requests: _Requests,
    times: _Times,
    bounds: _Bounds,
    k: int,
    ended: NDArray[np.int64],
    cursor: NDArray[np.int64],
    end_s: float,
) -> bool:
    """Write down which requests ended with a committed plan; False: a target can no longer be met."""
    going_on = True
    for i in range(plan.counts[PLAN_FINISHED]):
        request = state.request_id[plan.finished[i]]
        times.end_s[request] = end_s
        ended[cursor[_ENDED]] = request
        cursor[_ENDED] += 1
        for target in range(bounds.metric.shape[0]):
            if bounds.governs[target, request] and _is_late(requests, times, bounds, target, request, k):
                bounds.late[target] += 1
                going_on = going_on and bounds.late[target] <= bounds.allowed_late[target]
    return going_on


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
    queue: NDArray[np.int64],
    ended: NDArray[np.int64],
    cursor: NDArray[np.int64],
    clock: NDArray[np.float64],
    until_s: float,
) -> int:
    """The event loop of one replica; returns why it ended. No step begins at until_s or later.

    queue, ended (m,) int64: rows of `requests` that go to this replica, and those that have ended, each in order, as
    many as the cursor says; cursor (5,) int64: in the places named above; clock (2, or more,) float64: now, and busy
    seconds. All are read and written, so that a run that paused or was out of slots goes on where it stopped.
    """
    now_s = clock[0]
    client_s = tables.request_s[1]
    while True:
        if not _admit(state, requests, queue, cursor, now_s):
            status = _OUT_OF_SLOTS
            break
        if now_s >= until_s:
            status = _PAUSED
            break
        waits = cursor[_ARRIVED] < cursor[_QUEUED]
        coming_s = requests.arrival_s[queue[cursor[_ARRIVED]]] if waits else until_s

        schedule(state, plan)
        size = plan.counts[PLAN_SIZE]
        if size == 0 and plan.counts[PLAN_PREEMPTED] > 0:
            continue
        if size == 0:
            if not waits:
                status = _DRAINED
                break
            now_s = coming_s
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
                if coming_s < math.inf and state.counts[NUM_RUNNING] < state.limits[MAX_NUM_SEQS]:
                    steps = _steps_until(coming_s, now_s, first_s, growth_s, steps)
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
        cursor[_STEPS] += steps
        commit_decode_run(state, plan, steps)
        if not _note_ended(state, plan, requests, times, bounds, k, ended, cursor, now_s + client_s):
            status = _GAVE_UP
            break
    clock[0] = now_s
    return status


@njit
def _run_pipeline(
    state: State,
    plans: tuple[Plan, ...],
    tables: StepTables,
    requests: _Requests,
    times: _Times,
    bounds: _Bounds,
    k: int,
    queue: NDArray[np.int64],
    ended: NDArray[np.int64],
    cursor: NDArray[np.int64],
    clock: NDArray[np.float64],
    until_s: float,
) -> int:
    """`_run` for a replica of several pipeline stages, which begins as many steps as it has stages before it ends one.

    A step's time is what it takes through all stages, an equal part in each; rank 0 computes the first stage itself,
    and a stage takes steps in order. clock (3 + stages,) float64: also when the step begun last leaves the last stage,
    and when each step under way does.
    """
    stages = len(plans)
    now_s = clock[0]
    client_s = tables.request_s[1]
    while True:
        if not _admit(state, requests, queue, cursor, now_s):
            status = _OUT_OF_SLOTS
            break
        if now_s >= until_s:
            status = _PAUSED
            break
        began_s = now_s
        while cursor[_BEGUN] - cursor[_STEPS] < stages:
            number = cursor[_BEGUN] % stages
            plan = plans[number]
            schedule(state, plan)
            size = plan.counts[PLAN_SIZE]
            if size == 0:
                break
            samples, context, pairs = composition(plan)
            step_s = composed_time_s(tables, plan.counts[PLAN_TOKENS], size, samples, context, pairs)
            clock[2] = max(now_s + step_s, clock[2] + step_s / stages)
            clock[3 + number] = clock[2]
            now_s += step_s / stages
            cursor[_BEGUN] += 1
        if cursor[_BEGUN] == cursor[_STEPS]:
            if plan.counts[PLAN_PREEMPTED] > 0:
                continue
            if cursor[_ARRIVED] == cursor[_QUEUED]:
                status = _DRAINED
                break
            now_s = requests.arrival_s[queue[cursor[_ARRIVED]]]
            continue
        number = cursor[_STEPS] % stages
        plan = plans[number]
        now_s = max(now_s, clock[3 + number])
        clock[1] += now_s - began_s
        for row in range(plan.counts[PLAN_SIZE]):
            if plan.samples[row]:
                slot = plan.slot[row]
                taken = state.num_tokens[slot] - state.num_prompt_tokens[slot] + 1
                request = state.request_id[slot]
                if taken == 1:
                    times.first_s[request] = now_s + client_s
                if taken == k:
                    times.kth_s[request] = now_s + client_s
        commit(state, plan)
        cursor[_STEPS] += 1
        if not _note_ended(state, plan, requests, times, bounds, k, ended, cursor, now_s + client_s):
            status = _GAVE_UP
            break
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


class _Totals(NamedTuple):
    """What one replica did, as in SimulationResult."""

    steps: int
    busy_s: float
    counted: NDArray[np.int64]  # the counts that _TOTALS names


class _Run(NamedTuple):
    """What all replicas share."""

    policy: str
    hashes: NDArray[np.int64]
    blocks_per_hash: int
    tables: StepTables
    requests: _Requests
    times: _Times
    bounds: _Bounds
    k: int
    jump: bool


class _Replica:
    """One replica on its own virtual clock.

    queue, ended, cursor, clock  as in `_run`
    outstanding_tokens           that its requests may take which had not ended at the last `advance`
    """

    def __init__(self, pool: Pool, run: _Run, queue: NDArray[np.int64] | None = None) -> None:
        """queue: rows of the requests that it gets, where that is known beforehand."""
        self.state = new_state(
            pool, policy=run.policy, hashes=run.hashes, blocks_per_hash=run.blocks_per_hash, own_content=True
        )
        self.queue = np.zeros(_FIRST_PLACES, np.int64) if queue is None else queue
        self.ended = np.zeros_like(self.queue)
        self.cursor = np.zeros(5, np.int64)
        self.cursor[_QUEUED] = 0 if queue is None else len(queue)
        self.clock = np.zeros(3 + pool.pipeline_parallel_size)
        self.outstanding_tokens = 0
        self._plans = tuple(new_plan(pool) for _ in range(pool.pipeline_parallel_size))
        self._run = run
        self._gone = 0

    def add(self, request: int) -> None:
        if self.cursor[_QUEUED] == len(self.queue):
            self.queue, self.ended = (np.concatenate([x, np.zeros_like(x)]) for x in (self.queue, self.ended))
        self.queue[self.cursor[_QUEUED]] = request
        self.cursor[_QUEUED] += 1
        self.outstanding_tokens += int(self._run.requests.max_num_tokens[request])

    def advance(self, until_s: float) -> int:
        """Compute every step that begins before until_s; returns why the loop ended."""
        if self.clock[0] < until_s and self.cursor[_ENDED] < self.cursor[_QUEUED]:
            while (status := self._loop(until_s)) == _OUT_OF_SLOTS:
                self.state = grow(self.state)
        else:
            status = _DRAINED
        requests, times = self._run.requests, self._run.times
        client_s = self._run.tables.request_s[1]
        while self._gone < self.cursor[_ENDED]:
            request = self.ended[self._gone]
            if times.end_s[request] - client_s > until_s:
                break
            self.outstanding_tokens -= int(requests.max_num_tokens[request])
            self._gone += 1
        return int(status)

    def _loop(self, until_s: float) -> int:
        run, own = self._run, (self.queue, self.ended, self.cursor, self.clock, until_s)
        shared = (run.tables, run.requests, run.times, run.bounds, run.k)
        if len(self._plans) > 1:
            return _run_pipeline(self.state, self._plans, *shared, *own)
        return _run(self.state, self._plans[0], *shared, run.jump, *own)

    def totals(self) -> _Totals:
        counted = self.state.counts[list(_TOTALS.values())]
        return _Totals(int(self.cursor[_STEPS]), float(self.clock[1]), counted)


def _serve_in_turn(pool: Pool, run: _Run, rows: NDArray[np.int64]) -> tuple[int, list[_Totals]]:
    """Round robin: who gets what is known beforehand, so that one replica after the other runs through."""
    totals = []
    status = _DRAINED
    for index in range(pool.replicas):
        replica = _Replica(pool, run, rows[index :: pool.replicas].copy())
        status = replica.advance(math.inf)
        totals.append(replica.totals())
        if status == _GAVE_UP:
            break
    return status, totals


def _serve_routed(pool: Pool, run: _Run, rows: NDArray[np.int64], most_hashes: int) -> tuple[int, list[_Totals]]:
    """Route each request by how the replicas stand when it arrives, which takes all of them there first."""
    replicas = [_Replica(pool, run) for _ in range(pool.replicas)]
    router = new_router(pool)
    requests = run.requests
    status = _DRAINED
    for row in rows.tolist():
        arrival_s = float(requests.arrival_s[row])
        if _GAVE_UP in [replica.advance(arrival_s) for replica in replicas]:
            status = _GAVE_UP
            break
        outstanding = np.array([replica.outstanding_tokens for replica in replicas], np.int64)
        first, hashes = requests.hash_start[row], min(most_hashes, requests.num_hashes[row])
        prefix = run.hashes[first : first + hashes]
        replicas[route(router, outstanding, int(requests.max_num_tokens[row]), prefix)].add(row)
    else:
        if _GAVE_UP in [replica.advance(math.inf) for replica in replicas]:
            status = _GAVE_UP
    return status, [replica.totals() for replica in replicas]


def simulate(
    trace: Trace,
    pool: Pool,
    tables: StepTables,
    *,
    policy: str = "paretune",
    k: int = 30,
    rate: float = 1.0,
    priority: Sequence[int] | None = None,
    give_up: Sequence[Target] = (),
    jump: bool = True,
) -> SimulationResult:
    """Serve a trace on a virtual clock.

    Requests go to the pool's replicas as the server's router sends them (runtime/router.py). With max_loras they wait
    for their adapters' slots and share prefixes with those of their adapter alone, as in the engine; a pool that takes
    no adapters serves them on the base.

    Args:
        trace: the requests; their recorded output lengths are taken as known to the client, not to the scheduler.
        pool: limits, cache and number of replicas.
        tables: step times of one replica.
        policy: `Deployment.scheduler_policy`.
        k: of TTF-k.
        rate: arrivals are that many times as fast as recorded.
        priority: of each request, where the pool schedules by it, lower first; left out (a log has none): all equal.
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
    priorities = np.zeros(n, np.int64) if priority is None else np.array(priority, np.int64)
    if priorities.shape != (n,):
        raise ValueError(f"priority must have one number for each of {n} requests, not shape {priorities.shape}")
    adapters = np.zeros(n, np.int64)
    if trace.adapter is not None and pool.max_loras > 0:
        adapters = trace.adapter.codes.astype(np.int64) + 1  # a request without one has the code -1
    bounds = _bounds(trace, give_up, k)
    # blocks beyond those of every request together are never touched: a huge cache costs no memory here
    touched = max(1, int((-(-max_num_tokens[fits] // pool.block_size)).sum()))
    if pool.admission != "watermark":  # which is a share of all of them
        pool = pool.model_copy(update={"num_kv_blocks": min(pool.num_kv_blocks, touched)})
    pool = pool.model_copy(update={"host_kv_blocks": min(pool.host_kv_blocks, 2 * touched)})
    requests = _Requests(
        arrival_s=scheduled_s + tables.request_s[0],
        scheduled_s=scheduled_s,
        input_tokens=input_tokens,
        max_num_tokens=max_num_tokens,
        hash_start=offsets[:-1].copy(),
        num_hashes=np.diff(offsets),
        priority=priorities,
        adapter=adapters,
    )
    run = _Run(policy, hashes, per_hash, tables, requests, times, bounds, k, jump)
    # the server counts the requests that it takes, so those that are too long take no turn
    rows = np.flatnonzero(fits)
    if pool.router == "round_robin":
        status, totals = _serve_in_turn(pool, run, rows)
    else:
        prefix_block = pool.block_size if trace.prefix is None else trace.prefix.block_size
        status, totals = _serve_routed(pool, run, rows, num_prefix_hashes(prefix_block))
    counted = np.sum([each.counted for each in totals], axis=0)
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
        steps=sum(each.steps for each in totals),
        busy_s=sum(each.busy_s for each in totals),
        **dict(zip(_TOTALS, counted.tolist())),
        rejected=int((~fits).sum()),
        gave_up=status == _GAVE_UP,
    )
