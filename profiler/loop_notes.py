"""What an event loop of the simulator reads and writes: the requests, when their tokens came, where it stands.

The functions here are compiled into every loop (event_loop.py, speculative_loop.py, step_record.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit
from ..runtime.scheduler import add_request, schedule_behind
from ..runtime.scheduler_state import (
    MAX_NUM_SEQS,
    NUM_RUNNING,
    NUM_WAITING,
    PLAN_COPIES,
    PLAN_FINISHED,
    PLAN_SIZE,
    Plan,
    State,
    slot_at,
)
from .step_time import IDLE_S, StepTables

# why the event loop returned
DRAINED = 0
OUT_OF_SLOTS = 1
GAVE_UP = 2
PAUSED = 3
OUT_OF_ROOM = 4  # for gaps

# places in the cursor of a replica
ARRIVED = 0  # requests of its queue that the scheduler has seen
QUEUED = 1
STEPS = 2
ENDED = 3
BEGUN = 4  # steps, of a pipeline
RUNS = 5  # of Gaps
SINGLES = 6  # of Gaps
COPIED = 7  # blocks, by a plan that came to nothing: for the next one

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


class Gaps(NamedTuple):
    """When the tokens of one replica's requests came, so that every gap between two can be told (token_gaps.py).

    last_s         (slots,) float64  end of the step that brought a live request's last token
    Runs of steps without a pause, each step growth_s longer than the one before. Who got a token when a step began and
    again when it ended has a gap as long as the step:
    run_first_s, run_growth_s (m,) float64; run_steps (m,) int64; run_end_s (m,) float64 with the way to the client;
    run_weight (m,) int64 how many they are
    Gaps of single requests, which took more than one step, or (speculation) none:
    request (g,) int64; from_s, to_s (g,) float64 with the way to the client
    """

    last_s: NDArray[np.float64]
    run_first_s: NDArray[np.float64]
    run_growth_s: NDArray[np.float64]
    run_steps: NDArray[np.int64]
    run_end_s: NDArray[np.float64]
    run_weight: NDArray[np.int64]
    request: NDArray[np.int64]
    from_s: NDArray[np.float64]
    to_s: NDArray[np.float64]


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
def awake_s(
    state: State,
    tables: StepTables,
    requests: Requests,
    queue: NDArray[np.int64],
    cursor: NDArray[np.int64],
    now_s: float,
    idle_since_s: float,
) -> float:
    """Now, or, where a replica without requests has been idle for IDLE_S as the next one arrives, when it is awake.

    Its first step takes longer, really; here it begins later, so that whoever comes meanwhile is in it. At second 0 it
    is awake.
    """
    if tables.wake_s == 0.0 or state.counts[NUM_RUNNING] + state.counts[NUM_WAITING] > 0:
        return now_s
    if cursor[ARRIVED] < cursor[QUEUED]:
        arrival_s = requests.arrival_s[queue[cursor[ARRIVED]]]
        if arrival_s <= now_s and arrival_s - idle_since_s >= IDLE_S:
            return max(now_s, float(arrival_s + tables.wake_s))
    return now_s


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
def schedule_carrying(state: State, plan: Plan, cursor: NDArray[np.int64]) -> None:
    """`schedule`, but the copies of a plan that came to nothing are not forgotten: the next step waits for them.

    Who is preempted by swap leaves such a plan where nobody else can run, and those in flight keep their blocks.
    """
    plan.counts[:] = 0
    plan.counts[PLAN_COPIES] = cursor[COPIED]
    schedule_behind(state, plan, 0)
    cursor[COPIED] = plan.counts[PLAN_COPIES] if plan.counts[PLAN_SIZE] == 0 else 0


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
def note_tokens(
    state: State,
    plan: Plan,
    times: Times,
    gaps: Gaps,
    cursor: NDArray[np.int64],
    k: int,
    began_s: float,
    ended_s: float,
    client_s: float,
) -> int:
    """Write down what a step brings before it is committed: first and k-th tokens, and the gaps of their own.

    began_s, ended_s: of the step. Who got a token when it began has the gap of the step itself, which is not written
    down here; with a began_s that is none everybody's gap is.

    Returns: how many have the gap of the step itself.
    """
    at_s = ended_s + client_s
    weight = 0
    for row in range(plan.counts[PLAN_SIZE]):
        if plan.samples[row]:
            slot = slot_at(plan.slot, row)
            before = state.num_tokens[slot] - state.num_prompt_tokens[slot]
            request = state.request_id[slot]
            if before == 0:
                times.first_s[request] = at_s
            elif gaps.last_s[slot] == began_s:
                weight += 1
            else:
                _note_gap(gaps, cursor, request, gaps.last_s[slot] + client_s, at_s)
            gaps.last_s[slot] = ended_s
            if before < k <= before + plan.accepted[row]:
                times.kth_s[request] = at_s
            for _ in range(1, plan.accepted[row]):
                _note_gap(gaps, cursor, request, at_s, at_s)
    return weight


@njit
def note_token_times(state: State, plan: Plan, times: Times, k: int, at_s: float) -> None:
    """Of `note_tokens` the first and k-th tokens alone, for a loop that writes down gaps in its own way."""
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
def _note_gap(gaps: Gaps, cursor: NDArray[np.int64], request: int, from_s: float, to_s: float) -> None:
    place = cursor[SINGLES]
    gaps.request[place] = request
    gaps.from_s[place] = from_s
    gaps.to_s[place] = to_s
    cursor[SINGLES] += 1


@njit
def note_run(
    gaps: Gaps, cursor: NDArray[np.int64], first_s: float, growth_s: float, steps: int, end_s: float, weight: int
) -> None:
    place = cursor[RUNS]
    gaps.run_first_s[place] = first_s
    gaps.run_growth_s[place] = growth_s
    gaps.run_steps[place] = steps
    gaps.run_end_s[place] = end_s
    gaps.run_weight[place] = weight
    cursor[RUNS] += 1


@njit
def has_room(state: State, gaps: Gaps, cursor: NDArray[np.int64], tokens: int) -> bool:
    """Whether the gaps of another step, of so many tokens a request, can be written down."""
    fits = cursor[SINGLES] + tokens * state.limits[MAX_NUM_SEQS] <= gaps.request.shape[0]
    return bool(fits and cursor[RUNS] < gaps.run_steps.shape[0])
