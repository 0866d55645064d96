"""The scheduler: which requests compute how many tokens in the next step. One for the engine and the simulator.

Pure logic over NumPy arrays, compiled by Numba. It knows no prefill and no decode: every request has
`num_computed_tokens`, and a step hands out tokens so that it catches up with `num_tokens`. Chunked prefill, prefix
hits, recompute after preemption and the verification of proposed tokens are that one rule. No clock, no tensors, no
tokens, no randomness.

In a pool of role "decode" a request comes with the KV of its prompt, all but the last token of it: it holds blocks for
that when it is admitted, and computes from there. Once preempted by recompute it has to compute the prompt itself (as
in vLLM), but for the blocks that the prefix cache still has: under `vllm_v1` those of the prompt are named when it is
admitted, under our policy those alone that the replica filled.

A step is `schedule`, then the caller computes, then `commit`. The engine does that with the wall clock and tensors, the
simulator with a virtual clock and a step-time model. Several plans may be in flight before the first is committed.

Running requests come first, in order of admission; when blocks run out the request admitted last (by priority: the last
in rank) gives its own back (preemption.py). Then come waiting requests in the order of the queue, each when it may
(admission.py). A request whose adapter finds no slot waits, and others may pass it (vLLM's rule, under either policy):
with every slot in use for long, it waits for long.

Policy `vllm_v1` decides as the scheduler of vLLM 0.32 (vllm/v1/core) does without asynchronous scheduling. It differs:
blocks are named when they are planned, so that a request finds what another computes in the same step (its KV is
written before any attention reads it); of blocks with equal content each one is named; and who must preempt itself ends
the turn of those that run; nothing is proposed beyond a request's end (vLLM: beyond max_model_len). Who lacks blocks
for its proposals preempts others, as there; our policy first does without them.
"""

from __future__ import annotations

from ..kernels.jit import njit
from . import waiting_queue
from .adapter_slots import NO_ADAPTER, NUM_FILLS, hold_slot
from .admission import first_tokens
from .host_blocks import drop_swapped, swap_in
from .preemption import preempt, remove_running, victim
from .request_blocks import first_unnamed_block, hold_blocks, hold_prefix, release_blocks, remember_full_blocks
from .scheduler_state import (
    BLOCK_SIZE,
    BY_PRIORITY,
    LONG_PREFILL_TOKEN_THRESHOLD,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    NUM_ADDED,
    NUM_ENDED,
    NUM_ENDED_TOKENS,
    NUM_FREE_LANES,
    NUM_FREE_SLOTS,
    NUM_RUNNING,
    NUM_WAITING,
    PARETUNE,
    PLAN_ADMITTED,
    PLAN_FILLS,
    PLAN_FINISHED,
    PLAN_PREEMPTED,
    PLAN_SIZE,
    PLAN_TOKENS,
    PLANS_IN_FLIGHT,
    POLICY,
    PREFIX_CACHING,
    PROMPTS_FROM_ELSEWHERE,
    VLLM_V1,
    Plan,
    State,
    slot_at,
)


@njit
def add_request(
    state: State,
    request_id: int,
    num_prompt_tokens: int,
    max_num_tokens: int,
    hash_start: int,
    num_hashes: int,
    priority: int = 0,
    adapter: int = NO_ADAPTER,
) -> int:
    """Queue a request; its slot, or -1 when every slot is taken (then `grow`).

    The caller has checked that 1 <= num_prompt_tokens < max_num_tokens <= max_model_len.
    """
    counts = state.counts
    if counts[NUM_FREE_SLOTS] == 0:
        return -1
    counts[NUM_FREE_SLOTS] -= 1
    slot = slot_at(state.free_slots, counts[NUM_FREE_SLOTS])
    state.request_id[slot] = request_id
    state.priority[slot] = priority * state.limits[BY_PRIORITY]
    state.arrival[slot] = counts[NUM_ADDED]
    counts[NUM_ADDED] += 1
    state.num_prompt_tokens[slot] = num_prompt_tokens
    state.num_tokens[slot] = num_prompt_tokens
    state.num_draft_tokens[slot] = 0
    state.num_computed_tokens[slot] = (num_prompt_tokens - 1) * state.limits[PROMPTS_FROM_ELSEWHERE]
    state.max_num_tokens[slot] = max_num_tokens
    state.num_cached_tokens[slot] = 0
    state.num_own_blocks[slot] = 0
    state.num_swapped_blocks[slot] = 0
    state.num_blocks[slot] = 0
    state.in_flight[slot] = 0
    state.aborted[slot] = False
    state.lane[slot] = -1
    state.hash_start[slot] = hash_start
    state.num_hashes[slot] = num_hashes
    state.adapter[slot] = adapter
    state.adapter_slot[slot] = -1
    waiting_queue.put(state, slot)
    return int(slot)


@njit
def _append(state: State, plan: Plan, slot: int, num_tokens: int) -> None:
    row = plan.counts[PLAN_SIZE]
    plan.slot[row] = slot
    plan.start[row] = state.num_computed_tokens[slot]
    plan.num_tokens[row] = num_tokens
    state.num_computed_tokens[slot] += num_tokens
    plan.num_drafts[row] = max(0, state.num_computed_tokens[slot] - state.num_tokens[slot])
    plan.samples[row] = state.num_computed_tokens[slot] >= state.num_tokens[slot]
    state.in_flight[slot] += 1
    plan.counts[PLAN_SIZE] += 1
    plan.counts[PLAN_TOKENS] += num_tokens


@njit
def most_tokens(state: State) -> int:
    """Most tokens of one request in this step. A request alone has nobody to hold up with a long prompt."""
    threshold = state.limits[LONG_PREFILL_TOKEN_THRESHOLD]
    if threshold > 0 and state.counts[NUM_RUNNING] + state.counts[NUM_WAITING] > 1:
        return int(threshold)
    return int(state.limits[MAX_NUM_BATCHED_TOKENS])


@njit
def _schedule_running(state: State, plan: Plan, first: int, budget: int, most: int) -> int:
    """Let running requests, from place `first` on, catch up in order of admission; returns what is left of the budget.

    Where several plans are in flight (one for each pipeline stage) each takes its share of the requests.
    """
    plans = state.limits[PLANS_IN_FLIGHT]
    most_rows = (state.counts[NUM_RUNNING] + plans - 1) // plans
    index = first
    while index < state.counts[NUM_RUNNING] and budget > 0 and plan.counts[PLAN_SIZE] < most_rows:
        slot = slot_at(state.running, index)
        known = state.num_tokens[slot] + state.num_draft_tokens[slot]
        num_tokens = min(known - state.num_computed_tokens[slot], most, budget)
        if num_tokens <= 0 or state.aborted[slot]:
            index += 1
            continue
        if hold_blocks(state, plan, slot, state.num_computed_tokens[slot] + num_tokens):
            _append(state, plan, slot, num_tokens)
            budget -= num_tokens
            index += 1
            continue
        if state.num_draft_tokens[slot] > 0 and state.limits[POLICY] == PARETUNE:
            state.num_draft_tokens[slot] = 0  # nobody gives blocks up for what may be rejected
            continue
        place = victim(state, plan, index)
        if place < 0:
            index += 1  # whoever could give blocks is in flight: this request waits for their commit
            continue
        budget += preempt(state, plan, place)
        if place < index:
            index -= 1
        elif place == index and state.limits[POLICY] == VLLM_V1:
            break
        # try the same place again, whoever stands there now
    return budget


@njit
def _schedule_waiting(state: State, plan: Plan, budget: int, most: int) -> None:
    """Admit waiting requests, in the order of the queue, while tokens, lanes and blocks last."""
    counts, limits = state.counts, state.limits
    while counts[NUM_WAITING] > 0 and budget > 0 and counts[NUM_RUNNING] < limits[MAX_NUM_SEQS]:
        place = waiting_queue.first_place(state)
        if place < 0:
            break
        slot = waiting_queue.at(state, place)
        computed, num_tokens = first_tokens(state, slot, budget, most)
        if num_tokens == 0:
            break
        waiting_queue.take(state, place)
        counts[NUM_FREE_LANES] -= 1
        state.lane[slot] = state.free_lanes[counts[NUM_FREE_LANES]]
        if state.num_swapped_blocks[slot] > 0:
            swap_in(state, plan, slot)
        elif state.num_computed_tokens[slot] == 0:
            hold_prefix(state, plan, slot, computed // limits[BLOCK_SIZE])
        hold_blocks(state, plan, slot, computed + num_tokens)
        filled = state.adapter_slots.counts[NUM_FILLS]
        state.adapter_slot[slot] = hold_slot(state.adapter_slots, state.adapter[slot])
        plan.counts[PLAN_FILLS] += state.adapter_slots.counts[NUM_FILLS] - filled
        state.running[counts[NUM_RUNNING]] = slot
        counts[NUM_RUNNING] += 1
        plan.counts[PLAN_ADMITTED] += 1
        _append(state, plan, slot, num_tokens)
        if limits[POLICY] == VLLM_V1:
            _remember_planned(state, plan, plan.counts[PLAN_SIZE] - 1)
        budget -= num_tokens


@njit
def _remember_planned(state: State, plan: Plan, row: int) -> None:
    """Name the blocks that a planned row will fill, as far as its tokens are known."""
    slot = slot_at(plan.slot, row)
    if state.limits[PREFIX_CACHING] != 0 and state.num_hashes[slot] > 0:
        computed = min(plan.start[row] + plan.num_tokens[row], state.num_tokens[slot])
        # a block that proposals filled, which were accepted meanwhile, has no name yet
        first = first_unnamed_block(state, slot, plan.start[row] // state.limits[BLOCK_SIZE])
        remember_full_blocks(state, slot, first * state.limits[BLOCK_SIZE], computed)


@njit
def schedule(state: State, plan: Plan) -> None:
    """Compose the next step into `plan`. An empty plan (counts[PLAN_SIZE] == 0) means that there is nothing to compute.

    After a preemption nothing is admitted in the same step: the blocks just given back are for those who run.
    """
    plan.counts[:] = 0
    schedule_behind(state, plan, 0)


@njit
def schedule_behind(state: State, plan: Plan, rows: int) -> None:
    """What `schedule` does with those that come behind the first `rows` running requests, for a plan without rows.

    Each of these computes one token in the same step, for which the caller has found a block, and cannot be preempted:
    there are blocks for the running requests behind them (decode_runs.py).
    """
    most = most_tokens(state)
    budget = _schedule_running(state, plan, rows, state.limits[MAX_NUM_BATCHED_TOKENS] - rows, most)
    if state.limits[POLICY] == VLLM_V1:
        for row in range(plan.counts[PLAN_SIZE]):
            _remember_planned(state, plan, row)
    if plan.counts[PLAN_PREEMPTED] == 0:
        _schedule_waiting(state, plan, budget, most)


@njit
def count_answer(state: State, slot: int) -> None:
    """Count an answer that ended, for estimates of others. Old ones lose weight: the mean follows the traffic."""
    counts = state.counts
    if counts[NUM_ENDED] == 1024:
        counts[NUM_ENDED] = 512
        counts[NUM_ENDED_TOKENS] //= 2
    counts[NUM_ENDED] += 1
    counts[NUM_ENDED_TOKENS] += state.num_tokens[slot] - state.num_prompt_tokens[slot]


@njit
def _end(state: State, slot: int) -> None:
    """Take a running request out and give back all it held."""
    for index in range(state.counts[NUM_RUNNING]):
        if state.running[index] == slot:
            remove_running(state, index)
            break
    release_request(state, slot)


@njit
def release_request(state: State, slot: int) -> None:
    """Give back all that a request held which has been taken out of those that run."""
    release_blocks(state, slot)
    state.free_slots[state.counts[NUM_FREE_SLOTS]] = slot
    state.counts[NUM_FREE_SLOTS] += 1


@njit
def commit(state: State, plan: Plan) -> None:
    """The plan has been computed: count the tokens that were accepted, and end the requests that are done.

    For each row that samples, the caller has put into `plan.accepted` how many tokens were kept (at least 1, at most
    one more than `plan.num_drafts`) and into `plan.stopped` whether they end the request; it ends in any case at
    max_num_tokens.
    """
    caching = state.limits[PREFIX_CACHING] != 0 and state.limits[POLICY] == PARETUNE
    for row in range(plan.counts[PLAN_SIZE]):
        slot = slot_at(plan.slot, row)
        state.in_flight[slot] -= 1
        ended = state.aborted[slot] and state.in_flight[slot] == 0
        if plan.samples[row]:
            state.num_draft_tokens[slot] = 0
            state.num_tokens[slot] += plan.accepted[row]
            # of 1 + k speculated tokens those rejected are not computed; the newest token never is
            state.num_computed_tokens[slot] = state.num_tokens[slot] - 1
            ended = ended or plan.stopped[row] or state.num_tokens[slot] >= state.max_num_tokens[slot]
        if caching and state.num_hashes[slot] > 0:
            computed = min(plan.start[row] + plan.num_tokens[row], state.num_computed_tokens[slot])
            remember_full_blocks(state, slot, plan.start[row], computed)
        if ended:
            if not state.aborted[slot]:
                count_answer(state, slot)
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
    waiting_queue.remove(state, slot)
    drop_swapped(state, slot)
    state.free_slots[counts[NUM_FREE_SLOTS]] = slot
    counts[NUM_FREE_SLOTS] += 1
    return True
