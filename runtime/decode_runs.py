"""Runs of decode steps: requests that each get one token a step, as long as nothing concerns one of them alone.

Between two events such a batch does not change, so the simulator jumps over many steps; and while others compute their
prompts beside it, every step still does the same with all its rows. So a run counts its steps once for all rows, and
takes the blocks that they need from the pool as they need them, without saying yet whose they are. What each has
computed is written down when somebody asks for it: when it fills a block that has a hash, when it ends, and when the
run is left. `schedule` and `commit` for each step would have done the same.

Which of several blocks with equal content has the name depends on which was full first, and on what was evicted before.
So blocks are named late, but in the order in which they were filled (`name_filled`), before others are named, looked up
or evicted; within a jump over steps that evicts, before the first that may have given a name away (`name_passes_on`).

A run's rows are the first of `State.running`. Those behind them are scheduled in the usual way (`schedule_behind`),
and join the run when they lack nothing but their last token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit
from . import kv_cache
from .request_blocks import blocks_of, hold_in, remember_full_blocks, span_hash
from .scheduler import count_answer, most_tokens, release_request
from .scheduler_state import (
    ADMISSION,
    BLOCK_SIZE,
    BLOCKS_PER_HASH,
    ESTIMATED_PEAK,
    MAX_NUM_BATCHED_TOKENS,
    NUM_RUNNING,
    NUM_WAITING,
    PLAN_FINISHED,
    POLICY,
    PREFIX_CACHING,
    VLLM_V1,
    Plan,
    State,
    slot_at,
)
from .spec import Pool

# places in DecodeRun.counts
ROWS = 0
STEP = 1
HELD_UNTIL = 2
NUM_BLOCKS = 3
NEXT_END = 4
NEXT_NAMING = 5

NEVER = 1 << 62  # a step that does not come


class DecodeRun(NamedTuple):
    """Row i is the request in slot `State.running[i]`, which lacks its last token alone.

    start     (max_num_seqs,) int64  its computed tokens, less counts[STEP]
    end       (max_num_seqs,) int64  counts[STEP] when it ends
    turn      (max_num_seqs,) int64  it begins a block in a step from a count with this remainder of the block size
    naming    (max_num_seqs,) int64  counts[STEP] at which it fills a block that has a hash, NEVER where none follows
    crossing  (block_size,) int64    rows by their turn
    blocks    (num_kv_blocks,) int32 blocks taken for the rows that are in nobody's block table yet
    counts    (6,) int64             rows; steps done; up to which step blocks are taken; those in `blocks`; the next
                                     `end`; the next `naming`
    """

    start: NDArray[np.int64]
    end: NDArray[np.int64]
    turn: NDArray[np.int64]
    naming: NDArray[np.int64]
    crossing: NDArray[np.int64]
    blocks: NDArray[np.int32]
    counts: NDArray[np.int64]


def new_decode_run(pool: Pool) -> DecodeRun:
    """A run without rows, of a replica with the limits of `pool`."""
    return DecodeRun(
        start=np.zeros(pool.max_num_seqs, np.int64),
        end=np.zeros(pool.max_num_seqs, np.int64),
        turn=np.zeros(pool.max_num_seqs, np.int64),
        naming=np.zeros(pool.max_num_seqs, np.int64),
        crossing=np.zeros(pool.block_size, np.int64),
        blocks=np.zeros(pool.num_kv_blocks, np.int32),
        counts=np.zeros(6, np.int64),
    )


@njit
def lacks_last_token(state: State, slot: int) -> bool:
    """Whether a running request's next step is one of decoding."""
    return bool(state.num_computed_tokens[slot] == state.num_tokens[slot] - 1)


@njit
def begin_run(state: State, run: DecodeRun) -> int:
    """Take the running requests that only decode into a run; those that compute more have to stand behind them.

    The caller has no plan in flight and proposes nothing.

    Returns: tokens that the run's next step reads; 0: there is no run.
    """
    size = state.counts[NUM_RUNNING]
    if size == 0 or size > state.limits[MAX_NUM_BATCHED_TOKENS]:
        return 0
    first = 0
    while first < size and lacks_last_token(state, slot_at(state.running, first)):
        slot = slot_at(state.running, first)
        if state.num_blocks[slot] != blocks_of(state, state.num_computed_tokens[slot]):
            return 0
        first += 1
    if first == 0 or next_decoding(state, first) < size:
        return 0
    run.counts[:] = 0
    run.counts[NEXT_END] = NEVER
    run.counts[NEXT_NAMING] = NEVER
    run.crossing[:] = 0
    context = 0
    for _ in range(first):
        context += join_run(state, run)
    return context


@njit
def next_decoding(state: State, place: int) -> int:
    """Place of the first running request from this one on that only decodes; behind the last where there is none."""
    while place < state.counts[NUM_RUNNING] and not lacks_last_token(state, slot_at(state.running, place)):
        place += 1
    return place


@njit
def join_run(state: State, run: DecodeRun) -> int:
    """Add the running request behind the run's rows to them; returns the tokens that it reads in its next step."""
    counts, row = run.counts, run.counts[ROWS]
    slot = slot_at(state.running, row)
    computed = state.num_computed_tokens[slot]
    run.start[row] = computed - counts[STEP]
    run.end[row] = counts[STEP] + state.max_num_tokens[slot] - state.num_tokens[slot]
    run.turn[row] = (counts[STEP] - computed) % state.limits[BLOCK_SIZE]
    run.crossing[run.turn[row]] += 1
    run.naming[row] = _next_naming(state, run, slot)
    counts[NEXT_END] = min(counts[NEXT_END], run.end[row])
    counts[NEXT_NAMING] = min(counts[NEXT_NAMING], run.naming[row])
    counts[ROWS] += 1
    return int(computed + 1)


@njit
def _hashed_blocks(state: State, slot: int) -> int:
    """Blocks of a request, from its start, whose content others may look for."""
    return int(state.num_hashes[slot] * state.limits[BLOCKS_PER_HASH] * state.limits[PREFIX_CACHING])


@njit
def take_blocks(state: State, plan: Plan, run: DecodeRun, until: int) -> int:
    """Take the blocks of the steps up to count `until`, free or evicted; returns up to which there are some."""
    counts = run.counts
    step = counts[HELD_UNTIL]
    if step >= until:
        return int(until)
    remainder = step % state.limits[BLOCK_SIZE]
    needed = _blocks_of_steps(run, remainder, until - step)
    available = kv_cache.num_available(state.blocks)
    if needed > available:
        until, needed = step, 0
        while needed + run.crossing[remainder] <= available:
            needed += run.crossing[remainder]
            until += 1
            remainder = remainder + 1 if remainder + 1 < run.crossing.shape[0] else 0
    if needed > 0:
        hold_in(state, plan, run.blocks, counts[NUM_BLOCKS], counts[NUM_BLOCKS] + needed)
        counts[NUM_BLOCKS] += needed
    counts[HELD_UNTIL] = until
    return int(until)


@njit
def evicts(state: State, run: DecodeRun, until: int) -> bool:
    """Whether the blocks of the steps up to count `until` are more than those that are free."""
    step = run.counts[HELD_UNTIL]
    needed = _blocks_of_steps(run, step % state.limits[BLOCK_SIZE], max(0, until - step))
    return bool(needed > state.blocks.counts[kv_cache.FREE])


@njit
def _blocks_of_steps(run: DecodeRun, remainder: int, steps: int) -> int:
    """Blocks that so many steps begin, from a count with this remainder of the block size on."""
    size = run.crossing.shape[0]
    needed = 0
    if steps >= size:
        needed = run.counts[ROWS] * (steps // size)
        steps %= size
    end = remainder + steps
    for i in range(remainder, min(end, size)):
        needed += run.crossing[np.uint64(i)]
    for i in range(end - size):
        needed += run.crossing[np.uint64(i)]
    return int(needed)


@njit
def prepare_step(state: State, plan: Plan, run: DecodeRun, beside: bool) -> bool:
    """Empty the plan and take the blocks of the run's next step; False: leave the run, and schedule the step whole.

    beside: `schedule_behind` follows. Then the blocks that the rows fill are named, as far as others may look for them.
    """
    plan.counts[:] = 0
    step = run.counts[STEP]
    name_filled(state, run, step)
    if take_blocks(state, plan, run, step + 1) == step:
        return False
    if not beside:
        return True
    rows = run.counts[ROWS]
    most, needed = most_tokens(state), 0
    for index in range(rows, state.counts[NUM_RUNNING]):
        slot = slot_at(state.running, index)
        tokens = min(state.num_tokens[slot], state.num_computed_tokens[slot] + most)
        needed += max(0, blocks_of(state, tokens) - state.num_blocks[slot])
    if needed > kv_cache.num_available(state.blocks):
        return False
    if state.counts[NUM_WAITING] > 0 and state.limits[ADMISSION] == ESTIMATED_PEAK:
        return False  # which looks at everybody's tokens
    planned = step + _steps_named_ahead(state)
    if run.counts[NEXT_NAMING] <= planned and state.limits[BLOCK_SIZE] == 1:
        return False  # a block that nothing is in yet is in nobody's table
    name_filled(state, run, planned)
    return True


@njit
def _steps_named_ahead(state: State) -> int:
    """By how many steps a block is named before it is full: policy vllm_v1 names what it plans."""
    return int(state.limits[POLICY] == VLLM_V1)


@njit
def next_lookup(state: State, run: DecodeRun) -> int:
    """Count of steps at which somebody who waits may find a block more than now; NEVER where none is to be named."""
    return int(run.counts[NEXT_NAMING] - _steps_named_ahead(state))


@njit
def _next_naming(state: State, run: DecodeRun, slot: int) -> int:
    """Count of steps at which a row, just written down, fills a block that has a hash."""
    size, computed = state.limits[BLOCK_SIZE], state.num_computed_tokens[slot]
    full = computed // size
    if full >= _hashed_blocks(state, slot):
        return NEVER
    return int(run.counts[STEP] + (full + 1) * size - computed)


@njit
def name_filled(state: State, run: DecodeRun, until: int) -> None:
    """Name the blocks with a hash that rows fill by this count of steps (under vllm_v1 that of the step to come), the
    one filled first before the others; of those filled in one step, in the order of rows."""
    counts, size = run.counts, state.limits[BLOCK_SIZE]
    while counts[NEXT_NAMING] <= until:
        step, following = counts[NEXT_NAMING], NEVER
        for row in range(counts[ROWS]):
            if run.naming[row] == step:
                slot = slot_at(state.running, row)
                filled = run.start[row] + step
                write_down(state, run, row)
                remember_full_blocks(state, slot, filled - size, filled)
                run.naming[row] = step + size if filled // size < _hashed_blocks(state, slot) else NEVER
            following = min(following, run.naming[row])
        counts[NEXT_NAMING] = following


@njit
def name_passes_on(state: State, run: DecodeRun, until: int) -> int:
    """The first count of steps, `until` at most, at which a row fills a block whose content has a name that nobody
    holds: once that block is evicted the name would be the row's. All that is filled has been named.

    Under vllm_v1 each of them has the name anyway.
    """
    if run.counts[NEXT_NAMING] >= until or state.limits[POLICY] == VLLM_V1:
        return until
    size, per_hash = state.limits[BLOCK_SIZE], state.limits[BLOCKS_PER_HASH]
    for row in range(run.counts[ROWS]):
        step = run.naming[row]
        if step >= until:
            continue
        slot = slot_at(state.running, row)
        index = (run.start[row] + step) // size - 1
        while step < until and index < _hashed_blocks(state, slot):
            content_hash = span_hash(state, slot, index // per_hash)
            block = kv_cache.find(state.blocks, content_hash, index % per_hash)
            if block >= 0 and kv_cache.is_cached(state.blocks, block):
                until = step
            step += size
            index += 1
    return int(until)


@njit
def write_down(state: State, run: DecodeRun, row: int) -> None:
    """Write down what a row has computed, and the blocks that hold it."""
    slot = slot_at(state.running, row)
    computed = run.start[row] + run.counts[STEP]
    needed = blocks_of(state, computed)
    table = state.block_table[state.lane[slot]]
    for i in range(state.num_blocks[slot], needed):
        run.counts[NUM_BLOCKS] -= 1
        table[i] = run.blocks[run.counts[NUM_BLOCKS]]
    state.num_blocks[slot] = needed
    state.num_computed_tokens[slot] = computed
    state.num_tokens[slot] = computed + 1


@njit
def end_rows(state: State, plan: Plan, run: DecodeRun) -> int:
    """End the requests whose last step was the one just done; they are added to `plan.finished`.

    Returns: their tokens, of prompts and answers.
    """
    counts = run.counts
    name_filled(state, run, counts[STEP])
    kept = tokens = 0
    next_end = next_naming = NEVER
    for row in range(counts[ROWS]):
        slot = slot_at(state.running, row)
        if run.end[row] == counts[STEP]:
            run.crossing[run.turn[row]] -= 1
            write_down(state, run, row)
            tokens += state.num_tokens[slot]
            count_answer(state, slot)
            release_request(state, slot)
            plan.finished[plan.counts[PLAN_FINISHED]] = slot
            plan.counts[PLAN_FINISHED] += 1
        else:
            state.running[kept] = slot
            run.start[kept] = run.start[row]
            run.end[kept] = run.end[row]
            run.turn[kept] = run.turn[row]
            run.naming[kept] = run.naming[row]
            next_end = min(next_end, run.end[row])
            next_naming = min(next_naming, run.naming[row])
            kept += 1
    for index in range(counts[ROWS], state.counts[NUM_RUNNING]):
        state.running[kept + index - counts[ROWS]] = state.running[index]
    state.counts[NUM_RUNNING] -= counts[ROWS] - kept
    counts[ROWS] = kept
    counts[NEXT_END] = next_end
    counts[NEXT_NAMING] = next_naming
    return int(tokens)


@njit
def leave_run(state: State, run: DecodeRun) -> None:
    """Write down what every row has computed, and give back the blocks that were taken for a step that did not come."""
    name_filled(state, run, run.counts[STEP])
    for row in range(run.counts[ROWS]):
        write_down(state, run, row)
    for i in range(run.counts[NUM_BLOCKS]):
        kv_cache.release(state.blocks, run.blocks[i])
    run.counts[ROWS] = 0
    run.counts[NUM_BLOCKS] = 0
