"""The scheduler: which requests compute how many tokens in the next step. One for the engine and the simulator.

Pure logic over NumPy arrays, compiled by Numba. It knows no prefill and no decode: every request has
`num_computed_tokens`, and a step hands out tokens so that it catches up with `num_tokens`. Chunked prefill, prefix hits
and recompute after preemption are that one rule. No clock, no tensors, no tokens, no randomness.

A step is `schedule`, then the caller computes, then `commit`. The engine does that with the wall clock and tensors, the
simulator with a virtual clock and a step-time model. Several plans may be in flight before the first is committed.

The policy: running requests first, in order of admission; when blocks run out the request admitted last gives its own
back and is computed again later (preemption by recompute); then waiting requests, first come first served, each
admitted only when the blocks of all its tokens so far are there.
"""

from __future__ import annotations

from ..kernels.jit import njit
from . import kv_cache
from .admission import admissible_prefix
from .request_blocks import block_hash, hold_blocks, release_blocks, remember_full_blocks
from .scheduler_state import (
    BLOCK_SIZE,
    CHUNKED_PREFILL,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    NUM_FREE_LANES,
    NUM_FREE_SLOTS,
    NUM_PREEMPTIONS,
    NUM_PREFIX_HIT_TOKENS,
    NUM_PREFIX_QUERY_TOKENS,
    NUM_RUNNING,
    NUM_WAITING,
    PLAN_ADMITTED,
    PLAN_FINISHED,
    PLAN_PREEMPTED,
    PLAN_SIZE,
    PLAN_TOKENS,
    PREFIX_CACHING,
    WAITING_HEAD,
    Plan,
    State,
)


@njit
def add_request(
    state: State, request_id: int, num_prompt_tokens: int, max_num_tokens: int, hash_start: int, num_hashes: int
) -> int:
    """Queue a request; its slot, or -1 when every slot is taken (then `grow`).

    The caller has checked that 1 <= num_prompt_tokens < max_num_tokens <= max_model_len.
    """
    counts = state.counts
    if counts[NUM_FREE_SLOTS] == 0:
        return -1
    counts[NUM_FREE_SLOTS] -= 1
    slot = state.free_slots[counts[NUM_FREE_SLOTS]]
    state.request_id[slot] = request_id
    state.num_prompt_tokens[slot] = num_prompt_tokens
    state.num_tokens[slot] = num_prompt_tokens
    state.num_computed_tokens[slot] = 0
    state.max_num_tokens[slot] = max_num_tokens
    state.num_cached_tokens[slot] = 0
    state.num_blocks[slot] = 0
    state.in_flight[slot] = 0
    state.aborted[slot] = False
    state.lane[slot] = -1
    state.hash_start[slot] = hash_start
    state.num_hashes[slot] = num_hashes
    size = state.waiting.shape[0]
    state.waiting[(counts[WAITING_HEAD] + counts[NUM_WAITING]) % size] = slot
    counts[NUM_WAITING] += 1
    return int(slot)


@njit
def _remove_running(state: State, index: int) -> None:
    state.counts[NUM_RUNNING] -= 1
    for i in range(index, state.counts[NUM_RUNNING]):
        state.running[i] = state.running[i + 1]


@njit
def _preempt(state: State, plan: Plan, index: int) -> None:
    """Send a running request back to the head of the queue; its tokens stay, their KV is computed again."""
    slot = state.running[index]
    _remove_running(state, index)
    release_blocks(state, slot)
    state.num_computed_tokens[slot] = 0
    counts, size = state.counts, state.waiting.shape[0]
    counts[WAITING_HEAD] = (counts[WAITING_HEAD] - 1) % size
    state.waiting[counts[WAITING_HEAD]] = slot
    counts[NUM_WAITING] += 1
    counts[NUM_PREEMPTIONS] += 1
    plan.preempted[plan.counts[PLAN_PREEMPTED]] = slot
    plan.counts[PLAN_PREEMPTED] += 1


@njit
def _append(state: State, plan: Plan, slot: int, num_tokens: int) -> None:
    row = plan.counts[PLAN_SIZE]
    plan.slot[row] = slot
    plan.start[row] = state.num_computed_tokens[slot]
    plan.num_tokens[row] = num_tokens
    state.num_computed_tokens[slot] += num_tokens
    plan.samples[row] = state.num_computed_tokens[slot] == state.num_tokens[slot]
    state.in_flight[slot] += 1
    plan.counts[PLAN_SIZE] += 1
    plan.counts[PLAN_TOKENS] += num_tokens


@njit
def _last_idle(state: State, first: int) -> int:
    """Place, from `first` on, of the running request admitted last that no plan in flight computes; -1 if none."""
    for index in range(state.counts[NUM_RUNNING] - 1, first - 1, -1):
        if state.in_flight[state.running[index]] == 0:
            return index
    return -1


@njit
def _schedule_running(state: State, plan: Plan, budget: int) -> int:
    """Let running requests catch up, in order of admission; returns the tokens left of the budget."""
    index = 0
    while index < state.counts[NUM_RUNNING] and budget > 0:
        slot = state.running[index]
        num_tokens = min(state.num_tokens[slot] - state.num_computed_tokens[slot], budget)
        if num_tokens <= 0:
            index += 1
            continue
        if hold_blocks(state, slot, state.num_computed_tokens[slot] + num_tokens):
            _append(state, plan, slot, num_tokens)
            budget -= num_tokens
            index += 1
            continue
        victim = _last_idle(state, index)
        if victim < 0:
            index += 1  # everybody behind is in flight: this request waits for their commit
        else:
            _preempt(state, plan, victim)  # then try the same place again, whoever stands there now
    return budget


@njit
def _schedule_waiting(state: State, plan: Plan, budget: int) -> None:
    """Admit waiting requests, first come first served, while tokens, lanes and blocks last."""
    counts, limits = state.counts, state.limits
    block_size = limits[BLOCK_SIZE]
    while counts[NUM_WAITING] > 0 and budget > 0 and counts[NUM_RUNNING] < limits[MAX_NUM_SEQS]:
        slot = state.waiting[counts[WAITING_HEAD]]
        hits = admissible_prefix(state, slot)
        if hits < 0:
            break
        num_tokens = state.num_tokens[slot] - hits * block_size
        if num_tokens > budget:
            if limits[CHUNKED_PREFILL] == 0:
                break
            num_tokens = budget
        counts[WAITING_HEAD] = (counts[WAITING_HEAD] + 1) % state.waiting.shape[0]
        counts[NUM_WAITING] -= 1
        counts[NUM_FREE_LANES] -= 1
        state.lane[slot] = state.free_lanes[counts[NUM_FREE_LANES]]
        row = state.block_table[state.lane[slot]]
        for i in range(hits):
            row[i] = kv_cache.find(state.blocks, block_hash(state, slot, i))
            kv_cache.claim(state.blocks, row[i])
        state.num_blocks[slot] = hits
        state.num_computed_tokens[slot] = hits * block_size
        state.num_cached_tokens[slot] = hits * block_size
        counts[NUM_PREFIX_QUERY_TOKENS] += state.num_tokens[slot]
        counts[NUM_PREFIX_HIT_TOKENS] += hits * block_size
        hold_blocks(state, slot, hits * block_size + num_tokens)
        state.running[counts[NUM_RUNNING]] = slot
        counts[NUM_RUNNING] += 1
        plan.counts[PLAN_ADMITTED] += 1
        _append(state, plan, slot, num_tokens)
        budget -= num_tokens


@njit
def schedule(state: State, plan: Plan) -> None:
    """Compose the next step into `plan`. An empty plan (counts[PLAN_SIZE] == 0) means that there is nothing to compute.

    After a preemption nothing is admitted in the same step: the blocks just given back are for those who run.
    """
    plan.counts[:] = 0
    budget = _schedule_running(state, plan, state.limits[MAX_NUM_BATCHED_TOKENS])
    if plan.counts[PLAN_PREEMPTED] == 0:
        _schedule_waiting(state, plan, budget)


@njit
def _end(state: State, slot: int) -> None:
    """Take a running request out and give back all it held."""
    for index in range(state.counts[NUM_RUNNING]):
        if state.running[index] == slot:
            _remove_running(state, index)
            break
    release_blocks(state, slot)
    state.free_slots[state.counts[NUM_FREE_SLOTS]] = slot
    state.counts[NUM_FREE_SLOTS] += 1


@njit
def commit(state: State, plan: Plan) -> None:
    """The plan has been computed: count the tokens that were accepted, and end the requests that are done.

    For each row that samples, the caller has put into `plan.accepted` how many tokens were kept (at least 1) and into
    `plan.stopped` whether they end the request; it ends in any case at max_num_tokens.
    """
    caching = state.limits[PREFIX_CACHING] != 0
    for row in range(plan.counts[PLAN_SIZE]):
        slot = plan.slot[row]
        state.in_flight[slot] -= 1
        ended = state.aborted[slot] and state.in_flight[slot] == 0
        if plan.samples[row]:
            state.num_tokens[slot] += plan.accepted[row]
            # of 1 + k speculated tokens those rejected are not computed; the newest token never is
            state.num_computed_tokens[slot] = state.num_tokens[slot] - 1
            ended = ended or plan.stopped[row] or state.num_tokens[slot] >= state.max_num_tokens[slot]
        if caching and state.num_hashes[slot] > 0:
            computed = min(plan.start[row] + plan.num_tokens[row], state.num_computed_tokens[slot])
            remember_full_blocks(state, slot, plan.start[row], computed)
        if ended:
            _end(state, slot)
            plan.finished[plan.counts[PLAN_FINISHED]] = slot
            plan.counts[PLAN_FINISHED] += 1


@njit
def abort(state: State, slot: int) -> bool:
    """End a request nobody wants any more; True if it ended now, False if it ends when its plan is committed."""
    if state.in_flight[slot] > 0:
        state.aborted[slot] = True
        return False
    counts = state.counts
    if state.lane[slot] >= 0:
        _end(state, slot)
        return True
    size = state.waiting.shape[0]
    kept = 0
    for i in range(counts[NUM_WAITING]):
        other = state.waiting[(counts[WAITING_HEAD] + i) % size]
        if other != slot:
            state.waiting[(counts[WAITING_HEAD] + kept) % size] = other
            kept += 1
    counts[NUM_WAITING] = kept
    state.free_slots[counts[NUM_FREE_SLOTS]] = slot
    counts[NUM_FREE_SLOTS] += 1
    return True
