"""The simulator's event loop under speculative decoding: the engine's scheduler, with accepted tokens drawn by chance.

What the model would agree with is not in a log of lengths; how often it did is, by application (traces/acceptance.py).
So each draw is a function of the request and of the place in its answer alone: equal runs, and equal requests in
other deployments, see equal chances. Runs of steps are not jumped over: each one may bring other tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit
from ..runtime.scheduler import commit
from ..runtime.scheduler_state import NUM_RUNNING, PLAN_PREEMPTED, PLAN_SIZE, PLAN_TOKENS, Plan, State
from ..runtime.speculation import room_for_drafts
from .loop_notes import (
    ARRIVED,
    DRAINED,
    ENDED,
    GAVE_UP,
    OUT_OF_ROOM,
    OUT_OF_SLOTS,
    PAUSED,
    QUEUED,
    STEPS,
    Bounds,
    Gaps,
    Requests,
    Times,
    admit,
    awake_s,
    has_room,
    note_ended,
    note_tokens,
    schedule_carrying,
)
from .step_time import StepTables, adapters_s, composed_time_s, composition, copies_s, fills_s

# streams of a request's chances
_DRAFTS = 1
_ACCEPTS = 2


class Chances(NamedTuple):
    """What speculation brings each of n requests.

    drafted      (n,) float64  share of its steps that have proposals to verify
    probability  (n,) float64  of a proposal to be kept where those before it were
    most         (2,) int64    tokens proposed in a step; 1 where a draft model proposes them, which takes time, else 0
    totals       (3,) int64    drafts, draft tokens and accepted tokens so far, all requests together
    """

    drafted: NDArray[np.float64]
    probability: NDArray[np.float64]
    most: NDArray[np.int64]
    totals: NDArray[np.int64]


@njit
def chance(request: int, place: int, stream: int) -> float:
    """The number in [0, 1) of a request, a place of its answer and a stream, by SplitMix64's mixing."""
    mixed = np.uint64(request + 1) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= np.uint64(place + 1) * np.uint64(0xD1342543DE82EF95)
    mixed += np.uint64(stream) * np.uint64(0x2545F4914F6CDD1D)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return float(mixed >> np.uint64(11)) * 2.0**-53


@njit
def propose(state: State, chances: Chances) -> None:
    for index in range(state.counts[NUM_RUNNING]):
        slot = state.running[index]
        request = state.request_id[slot]
        place = state.num_tokens[slot] - state.num_prompt_tokens[slot]
        proposes = chance(request, place, _DRAFTS) < chances.drafted[request]
        state.num_draft_tokens[slot] = room_for_drafts(state, slot, chances.most[0]) if proposes else 0


@njit
def accept(state: State, plan: Plan, chances: Chances) -> None:
    for row in range(plan.counts[PLAN_SIZE]):
        drafts, kept = plan.num_drafts[row], 0
        if plan.samples[row] and drafts > 0:
            slot = plan.slot[row]
            request = state.request_id[slot]
            p = chances.probability[request]
            drawn = chance(request, state.num_tokens[slot] - state.num_prompt_tokens[slot], _ACCEPTS)
            power = p
            while kept < drafts and drawn < power:
                kept += 1
                power *= p
            chances.totals[0] += 1
            chances.totals[1] += drafts
            chances.totals[2] += kept
        plan.accepted[row] = 1 + kept


@njit
def draft_time_s(tables: StepTables, plan: Plan) -> float:
    """Seconds of the draft model's passes before a step: one that catches up, then one for each further proposal."""
    tokens, samples, deepest = 0, 0, 0
    context = pairs = 0.0
    for row in range(plan.counts[PLAN_SIZE]):
        drafts = plan.num_drafts[row]
        own = plan.num_tokens[row] - drafts
        tokens += own
        samples += drafts > 0
        deepest = max(deepest, drafts)
        if own == 1:
            context += plan.start[row] + 1
        else:
            pairs += own * (plan.start[row] + 0.5 * (own + 1))
    total_s = composed_time_s(tables, tokens, plan.counts[PLAN_SIZE], samples, context, pairs)
    for done in range(1, deepest):
        rows, context = 0, 0.0
        for row in range(plan.counts[PLAN_SIZE]):
            if plan.num_drafts[row] > done:
                rows += 1
                context += plan.start[row] + 1 + done
        total_s += composed_time_s(tables, rows, rows, rows, context, 0.0)
    return total_s


@njit
def run_speculative(
    state: State,
    plan: Plan,
    tables: StepTables,
    draft_tables: StepTables,
    requests: Requests,
    times: Times,
    gaps: Gaps,
    bounds: Bounds,
    k: int,
    chances: Chances,
    queue: NDArray[np.int64],
    ended: NDArray[np.int64],
    cursor: NDArray[np.int64],
    clock: NDArray[np.float64],
    until_s: float,
    stop_at_end: bool,
) -> int:
    """`event_loop.run_replica` where steps verify proposals.

    A step's time counts every token that it computes, and samples at every place of a proposal; with a draft model
    also what that takes before (draft_tables; not looked at without one).
    """
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
        if not has_room(state, gaps, cursor, 1 + chances.most[0]):
            status = OUT_OF_ROOM
            break
        if now_s >= until_s:
            status = PAUSED
            break
        propose(state, chances)
        schedule_carrying(state, plan, cursor)
        size = plan.counts[PLAN_SIZE]
        if size == 0:
            if plan.counts[PLAN_PREEMPTED] > 0:
                continue
            if cursor[ARRIVED] == cursor[QUEUED]:
                status = DRAINED
                break
            now_s = requests.arrival_s[queue[cursor[ARRIVED]]]
            continue
        samples, context, pairs = composition(plan, tables.prompt_pairs)
        for row in range(size):
            samples += plan.num_drafts[row]
        step_s = composed_time_s(tables, plan.counts[PLAN_TOKENS], size, samples, context, pairs)
        step_s += copies_s(tables, plan) + fills_s(tables, plan) + adapters_s(tables, state, plan, 0)
        if chances.most[1] > 0:
            step_s += draft_time_s(draft_tables, plan)
        accept(state, plan, chances)
        now_s += step_s
        clock[1] += step_s
        clock[2] = now_s
        cursor[STEPS] += 1
        note_tokens(state, plan, times, gaps, cursor, k, math.nan, now_s, client_s)
        commit(state, plan)
        if not note_ended(state, plan, requests, times, bounds, k, ended, cursor, now_s + client_s):
            status = GAVE_UP
            break
    clock[0] = now_s
    return status
