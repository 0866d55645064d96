"""When blocks run out: who gives its own back, and what becomes of it."""

from __future__ import annotations

from ..kernels.jit import njit
from .host_blocks import swap_out
from .request_blocks import blocks_of, name_own_blocks, release_blocks
from .scheduler_state import (
    BY_PRIORITY,
    NUM_PREEMPTIONS,
    NUM_RUNNING,
    OWN_CONTENT,
    PLAN_PREEMPTED,
    PLAN_SIZE,
    PLAN_TOKENS,
    PREFIX_CACHING,
    SWAP,
    Plan,
    State,
)
from .waiting_queue import goes_before, put_back


@njit
def victim(state: State, plan: Plan, index: int) -> int:
    """Place in `running` of who gives its blocks to the request at `index`, perhaps that one itself; -1: nobody.

    The request admitted last or, by priority, the last in rank, which may be in this plan already. Who is computed by a
    plan in flight keeps its blocks.
    """
    if state.limits[BY_PRIORITY] == 0:
        for place in range(state.counts[NUM_RUNNING] - 1, index - 1, -1):
            if state.in_flight[state.running[place]] == 0:
                return place
        return -1
    last = -1
    for place in range(state.counts[NUM_RUNNING]):
        slot = state.running[place]
        if goes_before(state, slot, state.running[index]):
            continue
        planned = state.in_flight[slot] == 1 and _row_of(plan, slot) >= 0
        if (state.in_flight[slot] == 0 or planned) and (last < 0 or goes_before(state, state.running[last], slot)):
            last = place
    return last


@njit
def preempt(state: State, plan: Plan, index: int) -> int:
    """Send a running request back to the queue; its tokens stay. Their KV goes to the host, or is computed again.

    Returns: tokens that this plan had given it.
    """
    slot = state.running[index]
    remove_running(state, index)
    tokens = _unplan(state, plan, slot) if state.in_flight[slot] > 0 else 0
    computed = state.num_computed_tokens[slot]
    if state.limits[SWAP] == 0 or not swap_out(state, plan, slot, blocks_of(state, computed)):
        if state.limits[OWN_CONTENT] != 0 and state.limits[PREFIX_CACHING] != 0:
            name_own_blocks(state, slot)
        state.num_computed_tokens[slot] = 0
    state.num_draft_tokens[slot] = 0
    release_blocks(state, slot)
    put_back(state, slot)
    state.counts[NUM_PREEMPTIONS] += 1
    plan.preempted[plan.counts[PLAN_PREEMPTED]] = slot
    plan.counts[PLAN_PREEMPTED] += 1
    return tokens


@njit
def remove_running(state: State, index: int) -> None:
    """Close the gap in the order of admission."""
    state.counts[NUM_RUNNING] -= 1
    for i in range(index, state.counts[NUM_RUNNING]):
        state.running[i] = state.running[i + 1]


@njit
def _row_of(plan: Plan, slot: int) -> int:
    for row in range(plan.counts[PLAN_SIZE]):
        if plan.slot[row] == slot:
            return row
    return -1


@njit
def _unplan(state: State, plan: Plan, slot: int) -> int:
    """Take a request's row out of the plan again; returns its tokens."""
    row = _row_of(plan, slot)
    tokens = int(plan.num_tokens[row])
    state.num_computed_tokens[slot] = plan.start[row]
    state.in_flight[slot] -= 1
    plan.counts[PLAN_SIZE] -= 1
    plan.counts[PLAN_TOKENS] -= tokens
    for i in range(row, plan.counts[PLAN_SIZE]):
        plan.slot[i] = plan.slot[i + 1]
        plan.start[i] = plan.start[i + 1]
        plan.num_tokens[i] = plan.num_tokens[i + 1]
        plan.num_drafts[i] = plan.num_drafts[i + 1]
        plan.samples[i] = plan.samples[i + 1]
    return tokens
