"""The simulator's event loop: one replica on a virtual clock, compiled together with the scheduler and the step tables.

Between two events (an arrival, the end of a request, a lack of blocks) a pure decode batch does not change, so the loop
jumps over many steps at once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit
from ..runtime.decode_runs import commit_decode_run, decode_run_length, is_decode_run
from ..runtime.scheduler import add_request, commit, schedule
from ..runtime.scheduler_state import (
    MAX_NUM_SEQS,
    NUM_RUNNING,
    PLAN_FINISHED,
    PLAN_PREEMPTED,
    PLAN_SIZE,
    PLAN_TOKENS,
    Plan,
    State,
)
from .step_time import WORK_GRID, StepTables, composed_time_s, composition, grid_place

# why the event loop returned
DRAINED = 0
OUT_OF_SLOTS = 1
GAVE_UP = 2
PAUSED = 3

# places in the cursor of a replica
ARRIVED = 0  # requests of its queue that the scheduler has seen
QUEUED = 1
STEPS = 2
ENDED = 3
BEGUN = 4  # steps, of a pipeline

METRIC_CODE = {"ttft": 0, "ttf": 1, "tpot": 2, "e2e": 3}


class Requests(NamedTuple):
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


class Times(NamedTuple):
    """When each request's first, k-th and last token reach the client: (n,) float64 seconds, NaN until then."""

    first_s: NDArray[np.float64]
    kth_s: NDArray[np.float64]
    end_s: NDArray[np.float64]


class Bounds(NamedTuple):
    """Targets after which a run may be given up, t rows: over allowed_late[i] governed requests later than limit_s[i].

    metric (t,) int64; limit_s (t,) float64; allowed_late, late (t,) int64; governs (t, n) bool
    """

    metric: NDArray[np.int64]
    limit_s: NDArray[np.float64]
    allowed_late: NDArray[np.int64]
    late: NDArray[np.int64]
    governs: NDArray[np.bool_]


@njit
def _is_late(requests: Requests, times: Times, bounds: Bounds, target: int, request: int, k: int) -> bool:
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
def admit(state: State, requests: Requests, queue: NDArray[np.int64], cursor: NDArray[np.int64], now_s: float) -> bool:
    """Hand the requests that have arrived to the scheduler; False: it is out of slots."""
    while cursor[ARRIVED] < cursor[QUEUED]:
        request = queue[cursor[ARRIVED]]
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
        cursor[ARRIVED] += 1
    return True


@njit
def note_ended(
    state: State,
    plan: Plan,
    requests: Requests,
    times: Times,
    bounds: Bounds,
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
        ended[cursor[ENDED]] = request
        cursor[ENDED] += 1
        for target in range(bounds.metric.shape[0]):
            if bounds.governs[target, request] and _is_late(requests, times, bounds, target, request, k):
                bounds.late[target] += 1
                going_on = going_on and bounds.late[target] <= bounds.allowed_late[target]
    return going_on


@njit
def note_tokens(state: State, plan: Plan, times: Times, k: int, at_s: float) -> None:
    """Write down whose first and k-th tokens a step brings, before it is committed."""
    for row in range(plan.counts[PLAN_SIZE]):
        if plan.samples[row]:
            slot = plan.slot[row]
            before = state.num_tokens[slot] - state.num_prompt_tokens[slot]
            request = state.request_id[slot]
            if before == 0:
                times.first_s[request] = at_s
            if before < k <= before + plan.accepted[row]:
                times.kth_s[request] = at_s


@njit
def run_replica(
    state: State,
    plan: Plan,
    tables: StepTables,
    requests: Requests,
    times: Times,
    bounds: Bounds,
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
        if not admit(state, requests, queue, cursor, now_s):
            status = OUT_OF_SLOTS
            break
        if now_s >= until_s:
            status = PAUSED
            break
        waits = cursor[ARRIVED] < cursor[QUEUED]
        coming_s = requests.arrival_s[queue[cursor[ARRIVED]]] if waits else until_s

        schedule(state, plan)
        size = plan.counts[PLAN_SIZE]
        if size == 0 and plan.counts[PLAN_PREEMPTED] > 0:
            continue
        if size == 0:
            if not waits:
                status = DRAINED
                break
            now_s = coming_s
            continue

        tokens = plan.counts[PLAN_TOKENS]
        samples, context, pairs = composition(plan, tables.prompt_pairs)
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
        cursor[STEPS] += steps
        commit_decode_run(state, plan, steps)
        if not note_ended(state, plan, requests, times, bounds, k, ended, cursor, now_s + client_s):
            status = GAVE_UP
            break
    clock[0] = now_s
    return status


@njit
def run_pipeline(
    state: State,
    plans: tuple[Plan, ...],
    tables: StepTables,
    requests: Requests,
    times: Times,
    bounds: Bounds,
    k: int,
    queue: NDArray[np.int64],
    ended: NDArray[np.int64],
    cursor: NDArray[np.int64],
    clock: NDArray[np.float64],
    until_s: float,
) -> int:
    """`run_replica` for several pipeline stages: as many steps as there are stages begin before the first of them ends.

    A step's time is what it takes through all stages, an equal part in each; rank 0 computes the first stage itself,
    and a stage takes steps in order. clock (3 + stages,) float64: also when the step begun last leaves the last stage,
    and when each step under way does.
    """
    stages = len(plans)
    now_s = clock[0]
    client_s = tables.request_s[1]
    while True:
        if not admit(state, requests, queue, cursor, now_s):
            status = OUT_OF_SLOTS
            break
        if now_s >= until_s:
            status = PAUSED
            break
        began_s = now_s
        while cursor[BEGUN] - cursor[STEPS] < stages:
            number = cursor[BEGUN] % stages
            plan = plans[number]
            schedule(state, plan)
            size = plan.counts[PLAN_SIZE]
            if size == 0:
                break
            samples, context, pairs = composition(plan, tables.prompt_pairs)
            step_s = composed_time_s(tables, plan.counts[PLAN_TOKENS], size, samples, context, pairs)
            clock[2] = max(now_s + step_s, clock[2] + step_s / stages)
            clock[3 + number] = clock[2]
            now_s += step_s / stages
            cursor[BEGUN] += 1
        if cursor[BEGUN] == cursor[STEPS]:
            if plan.counts[PLAN_PREEMPTED] > 0:
                continue
            if cursor[ARRIVED] == cursor[QUEUED]:
                status = DRAINED
                break
            now_s = requests.arrival_s[queue[cursor[ARRIVED]]]
            continue
        number = cursor[STEPS] % stages
        plan = plans[number]
        now_s = max(now_s, clock[3 + number])
        clock[1] += now_s - began_s
        note_tokens(state, plan, times, k, now_s + client_s)
        commit(state, plan)
        cursor[STEPS] += 1
        if not note_ended(state, plan, requests, times, bounds, k, ended, cursor, now_s + client_s):
            status = GAVE_UP
            break
    clock[0] = now_s
    return status
