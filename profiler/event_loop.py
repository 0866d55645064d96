"""The simulator's event loop: one replica on a virtual clock, compiled together with the scheduler and the step tables.

Between two events (an arrival, the end of a request, a lack of blocks) a pure decode batch does not change, so the loop
jumps over many steps at once; beside a prompt it goes on as one (runtime/decode_runs.py).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit
from ..runtime import kv_cache
from ..runtime.decode_runs import (
    NEVER,
    NEXT_END,
    NEXT_NAMING,
    ROWS,
    STEP,
    DecodeRun,
    begin_run,
    end_rows,
    evicts,
    join_run,
    lacks_last_token,
    leave_run,
    name_filled,
    name_passes_on,
    next_decoding,
    next_lookup,
    prepare_step,
    take_blocks,
)
from ..runtime.scheduler import commit, schedule_behind
from ..runtime.scheduler_state import (
    MAX_NUM_SEQS,
    NUM_RUNNING,
    NUM_WAITING,
    PLAN_COPIES,
    PLAN_FINISHED,
    PLAN_PREEMPTED,
    PLAN_SIZE,
    PLAN_TOKENS,
    Plan,
    State,
    slot_at,
)
from .loop_notes import (
    ARRIVED,
    BEGUN,
    DRAINED,
    ENDED,
    GAVE_UP,
    OUT_OF_ROOM,
    OUT_OF_SLOTS,
    PAUSED,
    QUEUED,
    RUNS,
    STEPS,
    Bounds,
    Gaps,
    Requests,
    Times,
    admit,
    awake_s,
    has_room,
    note_ended,
    note_run,
    note_tokens,
    schedule_carrying,
)
from .step_time import StepTables, adapters_s, composed_time_s, composition, copies_s, decode_steps, fills_s

_GOES_ON = -1


@njit
def _steps_until(arrival_s: float, now_s: float, first_s: float, growth_s: float, most: int) -> int:
    """Steps of first_s, first_s + growth_s, ... seconds until one ends at or after an arrival; 1 to `most`."""
    wait_s = arrival_s - now_s
    if most * first_s + 0.5 * most * (most - 1) * growth_s <= wait_s:
        return most  # mostly, and then what follows would keep all the rest waiting
    if growth_s * most < 1e-9 * first_s:
        steps = wait_s / first_s
    else:
        # the root of steps * first_s + steps * (steps - 1) / 2 * growth_s = wait_s
        half = first_s - 0.5 * growth_s
        steps = (math.sqrt(half * half + 2.0 * growth_s * wait_s) - half) / growth_s
    return int(max(1.0, min(float(most), math.ceil(steps - 1e-9))))


@njit
def run_replica(
    state: State,
    plan: Plan,
    run: DecodeRun,
    tables: StepTables,
    requests: Requests,
    times: Times,
    gaps: Gaps,
    bounds: Bounds,
    k: int,
    jump: bool,
    queue: NDArray[np.int64],
    ended: NDArray[np.int64],
    cursor: NDArray[np.int64],
    clock: NDArray[np.float64],
    until_s: float,
    stop_at_end: bool,
) -> int:
    """The event loop of one replica; returns why it ended. No step begins at until_s or later.

    jump: requests that decode are a run while they can be. It is left before this returns.
    stop_at_end: pause after the step with which a request ends, before anybody else is admitted.
    queue, ended (m,) int64: rows of `requests` that go to this replica, and those that have ended, each in order, as
    many as the cursor says; cursor (8,) int64: in the places named above; clock (3, or more,) float64: now, busy
    seconds, and the end of the last step. All are read and written, so that a run that paused or was out of slots goes
    on where it stopped.
    """
    client_s = tables.request_s[1]
    status = _GOES_ON
    seen = cursor[ENDED]
    # of the run: tokens that its next step reads; count of steps at which the next k-th token comes
    context, next_kth = 0, NEVER
    # the run is to be left; the next step has to be scheduled whole
    leaves, whole = False, False
    copied = 0  # blocks, for the next step
    run.counts[ROWS] = 0
    while True:
        now_s = clock[0]
        if leaves or (status != _GOES_ON and run.counts[ROWS] > 0):
            for row in range(run.counts[ROWS]):
                gaps.last_s[state.running[row]] = now_s
            leave_run(state, run)
            context, leaves = 0, False
        if status != _GOES_ON:
            return status
        if stop_at_end and cursor[ENDED] > seen:
            status = PAUSED
            continue
        now_s = clock[0] = awake_s(state, tables, requests, queue, cursor, now_s, clock[2])
        if not admit(state, requests, queue, cursor, now_s):
            status = OUT_OF_SLOTS
            continue
        if not has_room(state, gaps, cursor, 1):
            status = OUT_OF_ROOM
            continue
        if now_s >= until_s:
            status = PAUSED
            continue
        waits = cursor[ARRIVED] < cursor[QUEUED]
        coming_s = min(requests.arrival_s[queue[cursor[ARRIVED]]], until_s) if waits else until_s
        if jump and not whole and run.counts[ROWS] == 0 and _came_together(state, gaps, now_s):
            context = begin_run(state, run)
            next_kth = _next_kth(state, run, k)
        whole = False
        rows = run.counts[ROWS]
        waiting = state.counts[NUM_WAITING] > 0 and rows < state.limits[MAX_NUM_SEQS]
        beside = waiting or state.counts[NUM_RUNNING] > rows
        if rows > 0 and not prepare_step(state, plan, run, beside):
            leaves, whole = True, True
            copied += plan.counts[PLAN_COPIES]
            continue
        if rows == 0:
            plan.counts[:] = 0
        plan.counts[PLAN_COPIES] += copied  # of which a plan holds so many and no more
        copied = 0
        if rows == 0 or beside:
            schedule_behind(state, plan, rows)  # of no rows: `schedule`
        size = plan.counts[PLAN_SIZE]
        if size == 0:
            if rows > 0:
                own = (context, next_kth, coming_s, ended, cursor, clock, stop_at_end)
                context, next_kth, goes_on = _decode(state, plan, run, tables, requests, times, gaps, bounds, k, *own)
                status = _GOES_ON if goes_on else GAVE_UP
            elif plan.counts[PLAN_PREEMPTED] == 0:
                if waits:
                    clock[0] = coming_s
                else:
                    status = DRAINED
            else:
                copied = plan.counts[PLAN_COPIES]
            continue
        samples, decode_context, pairs = composition(plan, tables.prompt_pairs)
        step_s = composed_time_s(
            tables, rows + plan.counts[PLAN_TOKENS], rows + size, rows + samples, context + decode_context, pairs
        )
        step_s += copies_s(tables, plan) + fills_s(tables, plan) + adapters_s(tables, state, plan, rows)
        ended_s = now_s + step_s
        weight = rows + note_tokens(state, plan, times, gaps, cursor, k, now_s, ended_s, client_s)
        note_run(gaps, cursor, step_s, 0.0, 1, ended_s + client_s, weight)
        clock[0] = clock[2] = ended_s
        clock[1] += step_s
        cursor[STEPS] += 1
        if rows > 0:
            if next_kth <= run.counts[STEP] + 1:
                next_kth = _note_kth(state, run, times, k, 1, now_s, step_s, 0.0, client_s)
            run.counts[STEP] += 1
            context += rows
            name_filled(state, run, run.counts[STEP])  # before `commit` names those of the others
            if run.counts[NEXT_END] == run.counts[STEP]:
                context -= end_rows(state, plan, run)
        commit(state, plan)
        if not note_ended(state, plan, requests, times, bounds, k, ended, cursor, ended_s + client_s):
            status = GAVE_UP
        rows = run.counts[ROWS]
        while 0 < rows < state.counts[NUM_RUNNING]:
            slot = slot_at(state.running, rows)
            if not lacks_last_token(state, slot) or gaps.last_s[slot] != ended_s:
                break
            next_kth = min(next_kth, run.counts[STEP] + _to_kth(state, slot, k))
            context += join_run(state, run)
            rows += 1
        leaves = rows > 0 and next_decoding(state, rows) < state.counts[NUM_RUNNING]


@njit
def _came_together(state: State, gaps: Gaps, now_s: float) -> bool:
    """Whether each running request that only decodes got its last token just now: otherwise its next gap is its own."""
    for index in range(state.counts[NUM_RUNNING]):
        slot = slot_at(state.running, index)
        if lacks_last_token(state, slot) and gaps.last_s[slot] != now_s:
            return False
    return True


@njit
def _to_kth(state: State, slot: int, k: int) -> int:
    """Steps until the k-th token of a request comes, whose tokens so far are written down."""
    steps = k - (state.num_tokens[slot] - state.num_prompt_tokens[slot])
    return int(steps) if steps > 0 else NEVER


@njit
def _next_kth(state: State, run: DecodeRun, k: int) -> int:
    """Count of steps of a run just begun at which the first k-th token comes."""
    first = NEVER
    for row in range(run.counts[ROWS]):
        first = min(first, _to_kth(state, slot_at(state.running, row), k))
    return first


@njit
def _note_kth(
    state: State,
    run: DecodeRun,
    times: Times,
    k: int,
    steps: int,
    now_s: float,
    first_s: float,
    growth_s: float,
    client_s: float,
) -> int:
    """Write down the k-th tokens that come in so many more steps of a run; returns at which count the next one comes,
    of those that will not have ended by then."""
    step = run.counts[STEP]
    later = NEVER
    for row in range(run.counts[ROWS]):
        slot = slot_at(state.running, row)
        taken = k - (run.start[row] + step + 1 - state.num_prompt_tokens[slot])
        if 0 < taken <= steps:
            kth_s = taken * first_s + 0.5 * taken * (taken - 1) * growth_s
            times.kth_s[state.request_id[slot]] = now_s + kth_s + client_s
        elif taken > steps and step + taken <= run.end[row]:
            later = min(later, step + taken)
    return int(later)


@njit
def _decode(
    state: State,
    plan: Plan,
    run: DecodeRun,
    tables: StepTables,
    requests: Requests,
    times: Times,
    gaps: Gaps,
    bounds: Bounds,
    k: int,
    context: int,
    next_kth: int,
    coming_s: float,
    ended: NDArray[np.int64],
    cursor: NDArray[np.int64],
    clock: NDArray[np.float64],
    stop_at_end: bool,
) -> tuple[int, int, bool]:
    """Jump through a run of decode steps, from one request's end to the next, until somebody else may be admitted or
    blocks run out. There are blocks for the first step.

    Returns: tokens that the run's next step reads; the count of steps at which the next k-th token comes; and False
    where a target can no longer be met.
    """
    client_s = tables.request_s[1]
    now_s, counts = clock[0], run.counts
    copied_s = copies_s(tables, plan)  # for the first step
    looking = state.counts[NUM_WAITING] > 0 and counts[ROWS] < state.limits[MAX_NUM_SEQS]
    goes_on = True
    while True:
        rows, step = counts[ROWS], counts[STEP]
        first_s, growth_s, steps = decode_steps(tables, rows, float(context))
        first_s += adapters_s(tables, state, plan, rows)
        steps = min(counts[NEXT_END] - step, steps)
        # with every lane taken a newcomer changes nothing before somebody ends
        if steps > 1 and coming_s < math.inf and rows < state.limits[MAX_NUM_SEQS]:
            steps = _steps_until(coming_s, now_s, first_s, growth_s, steps)
        if looking:
            steps = min(steps, next_lookup(state, run) - step)
        # each step waits for the blocks that it pushes to the host; and who finds fewer of its blocks there than before
        # may need less to begin with (admission first_chunk)
        to_host = kv_cache.num_blocks(state.host_blocks) > 0 and evicts(state, run, step + steps)
        if to_host or copied_s > 0.0:
            steps = 1
        if counts[NEXT_NAMING] < step + steps and evicts(state, run, step + steps):
            name_filled(state, run, step)
            steps = name_passes_on(state, run, step + steps) - step
        plan.counts[PLAN_COPIES] = 0
        steps = take_blocks(state, plan, run, step + steps) - step
        if steps == 0:
            break
        first_s += copied_s + copies_s(tables, plan)
        copied_s = 0.0
        if next_kth <= step + steps:
            next_kth = _note_kth(state, run, times, k, steps, now_s, first_s, growth_s, client_s)
        run_s = steps * first_s + 0.5 * steps * (steps - 1) * growth_s
        now_s += run_s
        clock[1] += run_s
        counts[STEP] += steps
        cursor[STEPS] += steps
        context += steps * rows
        note_run(gaps, cursor, first_s, growth_s, steps, now_s + client_s, rows)
        if counts[STEP] == counts[NEXT_END]:
            plan.counts[PLAN_FINISHED] = 0
            context -= end_rows(state, plan, run)
            goes_on = note_ended(state, plan, requests, times, bounds, k, ended, cursor, now_s + client_s)
            others = state.counts[NUM_WAITING] + state.counts[NUM_RUNNING] - counts[ROWS]
            if counts[ROWS] == 0 or others > 0 or not goes_on or stop_at_end:
                break
        if to_host or coming_s <= now_s or cursor[RUNS] == gaps.run_steps.shape[0]:
            break
        if looking and next_lookup(state, run) <= counts[STEP]:
            break
    clock[0] = clock[2] = now_s
    return context, next_kth, goes_on


@njit
def run_pipeline(
    state: State,
    plans: tuple[Plan, ...],
    tables: StepTables,
    requests: Requests,
    times: Times,
    gaps: Gaps,
    bounds: Bounds,
    k: int,
    queue: NDArray[np.int64],
    ended: NDArray[np.int64],
    cursor: NDArray[np.int64],
    clock: NDArray[np.float64],
    until_s: float,
    stop_at_end: bool,
) -> int:
    """`run_replica` for several pipeline stages: as many steps as there are stages begin before the first of them ends.

    A step's time is what it takes through all stages, an equal part in each; rank 0 computes the first stage itself,
    and a stage takes steps in order. clock (3 + stages,) float64: also when the step begun last leaves the last stage,
    and when each step under way does.
    """
    stages = len(plans)
    now_s = clock[0]
    client_s = tables.request_s[1]
    seen = cursor[ENDED]
    while True:
        if stop_at_end and cursor[ENDED] > seen:
            status = PAUSED
            break
        now_s = awake_s(state, tables, requests, queue, cursor, now_s, clock[2])
        if not admit(state, requests, queue, cursor, now_s):
            status = OUT_OF_SLOTS
            break
        if not has_room(state, gaps, cursor, 1):
            status = OUT_OF_ROOM
            break
        if now_s >= until_s:
            status = PAUSED
            break
        began_s = now_s
        while cursor[BEGUN] - cursor[STEPS] < stages:
            number = cursor[BEGUN] % stages
            plan = plans[number]
            schedule_carrying(state, plan, cursor)
            size = plan.counts[PLAN_SIZE]
            if size == 0:
                break
            samples, context, pairs = composition(plan, tables.prompt_pairs)
            step_s = composed_time_s(tables, plan.counts[PLAN_TOKENS], size, samples, context, pairs)
            step_s += copies_s(tables, plan) + fills_s(tables, plan) + adapters_s(tables, state, plan, 0)
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
        note_tokens(state, plan, times, gaps, cursor, k, math.nan, now_s, client_s)
        commit(state, plan)
        cursor[STEPS] += 1
        if not note_ended(state, plan, requests, times, bounds, k, ended, cursor, now_s + client_s):
            status = GAVE_UP
            break
    clock[0] = now_s
    return status
