"""Runs of equal decode steps: between two events a batch that only decodes does not change, so the simulator jumps.

A run is begun, goes on for some steps at a time, loses the requests that end on its way, and is finished; only then do
the requests know what was computed. `schedule` and `commit` for each step would have done the same.
"""

from __future__ import annotations

from ..kernels.jit import njit
from . import kv_cache, waiting_queue
from .admission import first_tokens
from .kv_cache import FREE
from .request_blocks import hold_blocks, remember_full_blocks
from .scheduler import count_answer, most_tokens, release_request
from .scheduler_state import (
    ADMISSION,
    BLOCK_SIZE,
    ESTIMATED_PEAK,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    NUM_RUNNING,
    NUM_WAITING,
    PLAN_FINISHED,
    PLAN_SIZE,
    PREFIX_CACHING,
    Plan,
    State,
)


@njit
def begin_decode_run(state: State, plan: Plan) -> bool:
    """Does each running request lack its last token alone, and can nobody be admitted before one of them ends?

    Then `plan` holds the run: `slot` by row, in order of admission; in `start` the tokens whose KV is computed, in
    `num_tokens` the steps until the request ends. The caller has no plan in flight and proposes nothing.
    """
    size = state.counts[NUM_RUNNING]
    if size == 0 or size > state.limits[MAX_NUM_BATCHED_TOKENS]:
        return False
    may_admit = state.counts[NUM_WAITING] > 0 and size < state.limits[MAX_NUM_SEQS]
    if may_admit and state.limits[ADMISSION] == ESTIMATED_PEAK:
        return False  # an answer that outlives its estimate changes who may be admitted
    for row in range(size):
        slot = state.running[row]
        tokens = state.num_tokens[slot]
        if state.num_computed_tokens[slot] != tokens - 1:
            return False
        plan.slot[row] = slot
        plan.start[row] = tokens - 1
        plan.num_tokens[row] = state.max_num_tokens[slot] - tokens
    plan.counts[:] = 0
    plan.counts[PLAN_SIZE] = size
    return not (may_admit and _admits(state, plan))


@njit
def _admits(state: State, plan: Plan) -> bool:
    """Whether the next step admits somebody, or preempts: what `schedule` finds out once those that run have blocks.

    If it does not, no step does before a request ends: free blocks only get fewer.
    """
    for row in range(plan.counts[PLAN_SIZE]):
        if not hold_blocks(state, plan, plan.slot[row], plan.start[row] + 1):
            return True
    place = waiting_queue.first_place(state)
    if place < 0:
        return False
    budget = state.limits[MAX_NUM_BATCHED_TOKENS] - plan.counts[PLAN_SIZE]
    _, num_tokens = first_tokens(state, waiting_queue.at(state, place), budget, most_tokens(state))
    return num_tokens > 0


@njit
def least_num_tokens(plan: Plan) -> int:
    """Steps until the first request of a run ends, counted from its begin."""
    least = plan.num_tokens[0]
    for row in range(1, plan.counts[PLAN_SIZE]):
        least = min(least, plan.num_tokens[row])
    return int(least)


@njit
def needs_no_eviction(state: State, rows: int, steps: int) -> bool:
    """Whether free blocks surely suffice for so many steps of a run that has touched none yet.

    Then it makes no difference that blocks are held only when the run is finished, after others gave theirs back.
    """
    block_size = state.limits[BLOCK_SIZE]
    return bool(rows * ((steps + block_size - 1) // block_size) <= state.blocks.counts[FREE])


@njit
def affordable_steps(state: State, plan: Plan, most: int) -> int:
    """Steps, at most so many, of a run just begun, for which there are blocks: free or to be evicted; 0: not one."""
    block_size = state.limits[BLOCK_SIZE]
    available = kv_cache.num_available(state.blocks)
    steps = most
    while steps > 0:
        needed = 0
        for row in range(plan.counts[PLAN_SIZE]):
            blocks = (plan.start[row] + steps + block_size - 1) // block_size
            needed += max(0, blocks - state.num_blocks[plan.slot[row]])
        if needed <= available:
            break
        steps = steps // 2
    return steps


@njit
def _advance(state: State, plan: Plan, row: int, steps: int) -> None:
    slot, before = plan.slot[row], plan.start[row]
    state.num_tokens[slot] = before + 1 + steps
    state.num_computed_tokens[slot] = before + steps
    hold_blocks(state, plan, slot, before + steps)
    if state.num_hashes[slot] > 0 and state.limits[PREFIX_CACHING] != 0:
        remember_full_blocks(state, slot, before, before + steps)


@njit
def end_in_decode_run(state: State, plan: Plan, steps: int) -> int:
    """End the requests of a run that are done `steps` after its begin; they are in `plan.finished` then.

    Returns: their tokens, of prompts and answers.
    """
    plan.counts[PLAN_FINISHED] = 0
    kept = 0
    tokens = 0
    for row in range(plan.counts[PLAN_SIZE]):
        slot = plan.slot[row]
        if plan.num_tokens[row] == steps:
            if state.num_hashes[slot] > 0:
                _advance(state, plan, row, steps)
            # else nobody will look at its blocks, so it gives back those that it has
            state.num_tokens[slot] = state.max_num_tokens[slot]
            tokens += state.max_num_tokens[slot]
            count_answer(state, slot)
            release_request(state, slot)
            plan.finished[plan.counts[PLAN_FINISHED]] = slot
            plan.counts[PLAN_FINISHED] += 1
        else:
            plan.slot[kept] = slot
            plan.start[kept] = plan.start[row]
            plan.num_tokens[kept] = plan.num_tokens[row]
            state.running[kept] = slot
            kept += 1
    plan.counts[PLAN_SIZE] = kept
    state.counts[NUM_RUNNING] = kept
    return int(tokens)


@njit
def finish_decode_run(state: State, plan: Plan, steps: int) -> None:
    """Write down that every request left in a run has computed `steps` tokens since its begin."""
    if steps > 0:
        for row in range(plan.counts[PLAN_SIZE]):
            _advance(state, plan, row, steps)
