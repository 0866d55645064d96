"""Runs of equal decode steps: between two events a batch that only decodes does not change, so the simulator jumps."""

from __future__ import annotations

from ..kernels.jit import njit
from . import kv_cache
from .request_blocks import hold_blocks
from .scheduler import commit
from .scheduler_state import (
    ADMISSION,
    BLOCK_SIZE,
    ESTIMATED_PEAK,
    MAX_NUM_SEQS,
    NUM_RUNNING,
    NUM_WAITING,
    PLAN_ADMITTED,
    PLAN_PREEMPTED,
    PLAN_SIZE,
    PLAN_TOKENS,
    Plan,
    State,
)


@njit
def is_decode_run(state: State, plan: Plan) -> bool:
    """Is the plan one token for each running request, so that the next plans are the same until something happens."""
    size = plan.counts[PLAN_SIZE]
    may_admit = state.counts[NUM_WAITING] > 0 and size < state.limits[MAX_NUM_SEQS]
    if may_admit and state.limits[ADMISSION] == ESTIMATED_PEAK:
        return False  # an answer that outlives its estimate changes who may be admitted
    return bool(
        plan.counts[PLAN_TOKENS] == size
        and size == state.counts[NUM_RUNNING]
        and plan.counts[PLAN_ADMITTED] == 0
        and plan.counts[PLAN_PREEMPTED] == 0
    )


@njit
def decode_run_length(state: State, plan: Plan, most: int) -> int:
    """How many times (1 to `most`) a decode plan repeats before a request ends or blocks run out.

    Between two events the running set does not change: nobody arrives, ends, is preempted, or admitted (free blocks
    only get fewer).
    """
    steps = most
    for row in range(plan.counts[PLAN_SIZE]):
        slot = plan.slot[row]
        if not plan.samples[row]:
            return 1
        steps = min(steps, state.max_num_tokens[slot] - state.num_tokens[slot])
    block_size = state.limits[BLOCK_SIZE]
    available = kv_cache.num_available(state.blocks)
    if plan.counts[PLAN_SIZE] * (steps // block_size + 1) <= available:
        return steps  # no request can need more, so nobody is asked
    while steps > 1:
        needed = 0
        for row in range(plan.counts[PLAN_SIZE]):
            slot = plan.slot[row]
            # the s-th step computes token num_tokens + s - 1, whose KV needs a place
            blocks = (state.num_tokens[slot] + steps + block_size - 2) // block_size
            needed += blocks - state.num_blocks[slot]
        if needed <= available:
            break
        steps = max(1, steps // 2)
    return steps


@njit
def commit_decode_run(state: State, plan: Plan, steps: int) -> None:
    """Commit a decode plan as if it had been scheduled and committed `steps` times (at most `decode_run_length`)."""
    if steps > 1:
        for row in range(plan.counts[PLAN_SIZE]):
            slot = plan.slot[row]
            hold_blocks(state, plan, slot, state.num_tokens[slot] + steps - 1)
            state.num_tokens[slot] += steps - 1
            state.num_computed_tokens[slot] = state.num_tokens[slot]
            plan.num_tokens[row] = steps
    commit(state, plan)
