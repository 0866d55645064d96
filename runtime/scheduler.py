"""The scheduler: which requests compute how many tokens in the next step. One for the engine and the simulator.

Pure logic over NumPy arrays, compiled by Numba. It knows no prefill and no decode: every request has
`num_computed_tokens`, and a step hands out tokens so that it catches up with `num_tokens`. Chunked prefill, prefix hits
and recompute after preemption are that one rule. No clock, no tensors, no tokens, no randomness.

A step is `schedule`, then the caller computes, then `commit`. The engine does that with the wall clock and tensors, the
simulator with a virtual clock and a step-time model. Several plans may be in flight before the first is committed.

The policy: running requests first, in order of admission; when blocks run out the request admitted last gives its own
back and is computed again later (preemption by recompute); then waiting requests, first come first served, each
admitted only when the blocks of all its tokens so far are there. A request whose adapter finds no slot waits, and
others may pass it (vLLM's rule): with every slot in use for long, it waits for long.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit
from . import adapter_slots, kv_cache
from .adapter_slots import NO_ADAPTER, AdapterSlots, new_adapter_slots
from .kv_cache import BlockPool, new_block_pool
from .spec import Pool

# places in State.limits
MAX_NUM_SEQS = 0
MAX_NUM_BATCHED_TOKENS = 1
BLOCK_SIZE = 2
CHUNKED_PREFILL = 3
PREFIX_CACHING = 4
BLOCKS_PER_HASH = 5

# places in State.counts
NUM_RUNNING = 0
NUM_WAITING = 1
WAITING_HEAD = 2
NUM_FREE_SLOTS = 3
NUM_FREE_LANES = 4
NUM_PREEMPTIONS = 5
NUM_PREFIX_QUERY_TOKENS = 6
NUM_PREFIX_HIT_TOKENS = 7

# places in Plan.counts
PLAN_SIZE = 0
PLAN_TOKENS = 1
PLAN_FINISHED = 2
PLAN_PREEMPTED = 3
PLAN_ADMITTED = 4


class State(NamedTuple):
    """All live requests of one replica, one slot each; slots are used again after a request ends.

    limits                 (6,) int64   what the spec allows, in the places named above
    counts                 (8,) int64   running totals, in the places named above
    request_id             (slots,) int64  the caller's name for the request
    num_prompt_tokens      (slots,) int64
    num_tokens             (slots,) int64  prompt + generated so far
    num_computed_tokens    (slots,) int64  tokens whose KV is cached or on its way, 0 to num_tokens
    max_num_tokens         (slots,) int64  num_tokens at which the request ends
    num_cached_tokens      (slots,) int64  tokens found in the prefix cache at the last admission
    num_blocks             (slots,) int64  blocks held
    in_flight              (slots,) int64  plans not yet committed that compute tokens of it
    aborted                (slots,) bool   ends at its next commit
    lane                   (slots,) int64  its row of block_table while running, else -1
    hash_start, num_hashes (slots,) int64  its block hashes: hashes[hash_start : hash_start + num_hashes]
    adapter                (slots,) int64  number of its adapter, set by the caller after add_request, or NO_ADAPTER
    adapter_slot           (slots,) int64  where its adapter lies while it runs, else -1
    free_slots             (slots,) int64  stack
    waiting                (slots,) int64  ring of slots: counts[NUM_WAITING] of them from counts[WAITING_HEAD]
    running                (max_num_seqs,) int64  slots in order of admission
    free_lanes             (max_num_seqs,) int64  stack
    block_table            (max_num_seqs, max_blocks) int32  block ids by lane, in order of the context
    hashes                 (m,) int64   chained content hashes, each of BLOCKS_PER_HASH whole blocks
    blocks                 BlockPool
    adapter_slots          AdapterSlots
    """

    limits: NDArray[np.int64]
    counts: NDArray[np.int64]
    request_id: NDArray[np.int64]
    num_prompt_tokens: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_computed_tokens: NDArray[np.int64]
    max_num_tokens: NDArray[np.int64]
    num_cached_tokens: NDArray[np.int64]
    num_blocks: NDArray[np.int64]
    in_flight: NDArray[np.int64]
    aborted: NDArray[np.bool_]
    lane: NDArray[np.int64]
    hash_start: NDArray[np.int64]
    num_hashes: NDArray[np.int64]
    adapter: NDArray[np.int64]
    adapter_slot: NDArray[np.int64]
    free_slots: NDArray[np.int64]
    waiting: NDArray[np.int64]
    running: NDArray[np.int64]
    free_lanes: NDArray[np.int64]
    block_table: NDArray[np.int32]
    hashes: NDArray[np.int64]
    blocks: BlockPool
    adapter_slots: AdapterSlots


class Plan(NamedTuple):
    """One step: row i computes `num_tokens[i]` tokens of request `slot[i]`, after `start[i]` that are computed already.

    slot        (max_num_seqs,) int64
    start       (max_num_seqs,) int64
    num_tokens  (max_num_seqs,) int64
    samples     (max_num_seqs,) bool   the row reaches the request's last token, so a new one is sampled
    accepted    (max_num_seqs,) int64  filled by the caller before commit: tokens kept, 1 or (speculation) more
    stopped     (max_num_seqs,) bool   filled by the caller before commit: the request ends with these tokens
    finished    (max_num_seqs,) int64  slots that ended at commit; readable until the next add_request
    preempted   (max_num_seqs,) int64  slots that gave their blocks back in this schedule
    counts      (5,) int64             in the places named above
    """

    slot: NDArray[np.int64]
    start: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    samples: NDArray[np.bool_]
    accepted: NDArray[np.int64]
    stopped: NDArray[np.bool_]
    finished: NDArray[np.int64]
    preempted: NDArray[np.int64]
    counts: NDArray[np.int64]


def new_state(
    pool: Pool, *, hashes: NDArray[np.int64] | None = None, blocks_per_hash: int = 1, slots: int = 0
) -> State:
    """An empty replica with the limits of `pool`.

    Args:
        pool: batch limits, block size and count, chunked prefill and prefix caching.
        hashes: content hashes that requests point into; none means that nothing is found in the prefix cache.
        blocks_per_hash: KV blocks that one hash covers (a trace's block may be larger than the engine's).
        slots: live requests to make room for; `grow` adds more. At least 2 x max_num_seqs.
    """
    seqs = pool.max_num_seqs
    slots = max(slots, 2 * seqs)
    max_blocks = -(-pool.max_model_len // pool.block_size)
    limits = [
        seqs,
        pool.max_num_batched_tokens,
        pool.block_size,
        int(pool.enable_chunked_prefill),
        int(pool.enable_prefix_caching),
        blocks_per_hash,
    ]
    counts = np.zeros(8, np.int64)
    counts[NUM_FREE_SLOTS] = slots
    counts[NUM_FREE_LANES] = seqs
    return State(
        limits=np.array(limits, np.int64),
        counts=counts,
        request_id=np.zeros(slots, np.int64),
        num_prompt_tokens=np.zeros(slots, np.int64),
        num_tokens=np.zeros(slots, np.int64),
        num_computed_tokens=np.zeros(slots, np.int64),
        max_num_tokens=np.zeros(slots, np.int64),
        num_cached_tokens=np.zeros(slots, np.int64),
        num_blocks=np.zeros(slots, np.int64),
        in_flight=np.zeros(slots, np.int64),
        aborted=np.zeros(slots, np.bool_),
        lane=np.full(slots, -1, np.int64),
        hash_start=np.zeros(slots, np.int64),
        num_hashes=np.zeros(slots, np.int64),
        adapter=np.zeros(slots, np.int64),
        adapter_slot=np.full(slots, -1, np.int64),
        free_slots=np.arange(slots - 1, -1, -1, dtype=np.int64),
        waiting=np.zeros(slots, np.int64),
        running=np.zeros(seqs, np.int64),
        free_lanes=np.arange(seqs - 1, -1, -1, dtype=np.int64),
        block_table=np.zeros((seqs, max_blocks), np.int32),
        hashes=np.zeros(0, np.int64) if hashes is None else hashes,
        blocks=new_block_pool(pool.num_kv_blocks),
        adapter_slots=new_adapter_slots(pool.max_loras),
    )


def new_plan(pool: Pool) -> Plan:
    """An empty plan for a replica with the limits of `pool`."""
    seqs = pool.max_num_seqs
    return Plan(
        slot=np.zeros(seqs, np.int64),
        start=np.zeros(seqs, np.int64),
        num_tokens=np.zeros(seqs, np.int64),
        samples=np.zeros(seqs, np.bool_),
        accepted=np.ones(seqs, np.int64),
        stopped=np.zeros(seqs, np.bool_),
        finished=np.zeros(seqs, np.int64),
        preempted=np.zeros(seqs, np.int64),
        counts=np.zeros(5, np.int64),
    )


# the fields of State that say something of one request; the other fields by slot are queues of slots
_OF_A_REQUEST = (
    "request_id",
    "num_prompt_tokens",
    "num_tokens",
    "num_computed_tokens",
    "max_num_tokens",
    "num_cached_tokens",
    "num_blocks",
    "in_flight",
    "aborted",
    "lane",
    "hash_start",
    "num_hashes",
    "adapter",
    "adapter_slot",
)


def grow(state: State) -> State:
    """The same replica with twice the slots; slot numbers stay what they are."""
    old = state.request_id.shape[0]
    grown: dict[str, Any] = {
        name: np.concatenate([getattr(state, name), np.zeros_like(getattr(state, name))]) for name in _OF_A_REQUEST
    }
    grown["lane"][old:] = -1
    free = int(state.counts[NUM_FREE_SLOTS])
    grown["free_slots"] = np.zeros(2 * old, np.int64)
    grown["free_slots"][:free] = state.free_slots[:free]
    grown["free_slots"][free : free + old] = np.arange(2 * old - 1, old - 1, -1)
    waiting, head = int(state.counts[NUM_WAITING]), int(state.counts[WAITING_HEAD])
    grown["waiting"] = np.zeros(2 * old, np.int64)
    grown["waiting"][:waiting] = np.roll(state.waiting, -head)[:waiting]
    counts = state.counts.copy()
    counts[NUM_FREE_SLOTS] += old
    counts[WAITING_HEAD] = 0
    return state._replace(counts=counts, **grown)


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
    state.adapter[slot] = NO_ADAPTER
    state.adapter_slot[slot] = -1
    size = state.waiting.shape[0]
    state.waiting[(counts[WAITING_HEAD] + counts[NUM_WAITING]) % size] = slot
    counts[NUM_WAITING] += 1
    return int(slot)


@njit
def block_hash(state: State, slot: int, index: int) -> int:
    """Content hash of block `index` of a request: the hash that covers it, mixed with its place under that hash and
    with the request's adapter: equal tokens give other keys and values under another adapter."""
    per_hash = state.limits[BLOCKS_PER_HASH]
    covering = state.hashes[state.hash_start[slot] + index // per_hash]
    # SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), so that a trace's ids 0, 1, 2 spread; 0 is no hash
    mixed = np.uint64(covering) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(index % per_hash + 1)
    mixed += np.uint64(state.adapter[slot]) * np.uint64(0xD6E8FEB86659FD93)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return int(max(np.int64(1), np.int64(mixed >> np.uint64(1))))


@njit
def _release_blocks(state: State, slot: int) -> None:
    """Give back every block, the lane and the adapter's slot of a running request.

    Last blocks first: they are the first to be evicted.
    """
    row = state.block_table[state.lane[slot]]
    for i in range(state.num_blocks[slot] - 1, -1, -1):
        kv_cache.release(state.blocks, row[i])
    state.num_blocks[slot] = 0
    adapter_slots.release_slot(state.adapter_slots, state.adapter_slot[slot])
    state.adapter_slot[slot] = -1
    state.free_lanes[state.counts[NUM_FREE_LANES]] = state.lane[slot]
    state.counts[NUM_FREE_LANES] += 1
    state.lane[slot] = -1


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
    _release_blocks(state, slot)
    state.num_computed_tokens[slot] = 0
    counts, size = state.counts, state.waiting.shape[0]
    counts[WAITING_HEAD] = (counts[WAITING_HEAD] - 1) % size
    state.waiting[counts[WAITING_HEAD]] = slot
    counts[NUM_WAITING] += 1
    counts[NUM_PREEMPTIONS] += 1
    plan.preempted[plan.counts[PLAN_PREEMPTED]] = slot
    plan.counts[PLAN_PREEMPTED] += 1


@njit
def _hold_blocks(state: State, slot: int, num_tokens: int) -> bool:
    """Hold blocks for its first `num_tokens` tokens; False, and nothing changed, if too few are left."""
    block_size = state.limits[BLOCK_SIZE]
    held = state.num_blocks[slot]
    if num_tokens <= held * block_size:
        return True
    needed = (num_tokens + block_size - 1) // block_size
    if needed - held > kv_cache.num_available(state.blocks):
        return False
    row = state.block_table[state.lane[slot]]
    for i in range(held, needed):
        row[i] = kv_cache.take(state.blocks)
    state.num_blocks[slot] = needed
    return True


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
        if _hold_blocks(state, slot, state.num_computed_tokens[slot] + num_tokens):
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
def _count_prefix_hits(state: State, slot: int) -> int:
    """Whole blocks of the request, from its start, that are in the cache. Its last token is always computed."""
    if state.limits[PREFIX_CACHING] == 0:
        return 0
    hashed = state.num_hashes[slot] * state.limits[BLOCKS_PER_HASH]
    limit = min(hashed, (state.num_tokens[slot] - 1) // state.limits[BLOCK_SIZE])
    hits = 0
    while hits < limit and kv_cache.find(state.blocks, block_hash(state, slot, hits)) >= 0:
        hits += 1
    return hits


@njit
def _bring_forward(state: State) -> bool:
    """Put the first waiting request whose adapter finds a slot at the head of the queue; False: there is none.

    The others keep their order. Where nobody has an adapter this is a look at the head.
    """
    counts, size = state.counts, state.waiting.shape[0]
    for i in range(counts[NUM_WAITING]):
        slot = state.waiting[(counts[WAITING_HEAD] + i) % size]
        if adapter_slots.has_slot(state.adapter_slots, state.adapter[slot]):
            for j in range(i, 0, -1):
                before = state.waiting[(counts[WAITING_HEAD] + j - 1) % size]
                state.waiting[(counts[WAITING_HEAD] + j) % size] = before
            state.waiting[counts[WAITING_HEAD]] = slot
            return True
    return False


@njit
def _schedule_waiting(state: State, plan: Plan, budget: int) -> None:
    """Admit waiting requests, first come first served, while tokens, lanes and blocks last."""
    counts, limits = state.counts, state.limits
    block_size = limits[BLOCK_SIZE]
    while counts[NUM_WAITING] > 0 and budget > 0 and counts[NUM_RUNNING] < limits[MAX_NUM_SEQS]:
        if not _bring_forward(state):
            break
        slot = state.waiting[counts[WAITING_HEAD]]
        # every hit saves a block, so a request that lacks blocks although all its hashed ones hit cannot be admitted
        total_blocks = (state.num_tokens[slot] + block_size - 1) // block_size
        available = kv_cache.num_available(state.blocks)
        hashed = state.num_hashes[slot] * limits[BLOCKS_PER_HASH] * limits[PREFIX_CACHING]
        if total_blocks - hashed > available:
            break
        hits = _count_prefix_hits(state, slot)
        cached_hits = 0
        for i in range(hits):
            if state.blocks.ref_count[kv_cache.find(state.blocks, block_hash(state, slot, i))] == 0:
                cached_hits += 1
        if total_blocks - hits > available - cached_hits:
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
        _hold_blocks(state, slot, hits * block_size + num_tokens)
        state.adapter_slot[slot] = adapter_slots.hold_slot(state.adapter_slots, state.adapter[slot])
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
def _remember_full_blocks(state: State, slot: int, before: int, after: int) -> None:
    """Name the blocks that became full as computed tokens went from `before` to `after`: others may claim them."""
    block_size = state.limits[BLOCK_SIZE]
    hashed = state.num_hashes[slot] * state.limits[BLOCKS_PER_HASH]
    row = state.block_table[state.lane[slot]]
    for i in range(before // block_size, min(after // block_size, hashed)):
        kv_cache.remember(state.blocks, row[i], block_hash(state, slot, i))


@njit
def _end(state: State, slot: int) -> None:
    """Take a running request out and give back all it held."""
    for index in range(state.counts[NUM_RUNNING]):
        if state.running[index] == slot:
            _remove_running(state, index)
            break
    _release_blocks(state, slot)
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
            _remember_full_blocks(state, slot, plan.start[row], computed)
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


@njit
def is_decode_run(state: State, plan: Plan) -> bool:
    """Is the plan one token for each running request, so that the next plans are the same until something happens."""
    size = plan.counts[PLAN_SIZE]
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
            _hold_blocks(state, slot, state.num_tokens[slot] + steps - 1)
            state.num_tokens[slot] += steps - 1
            state.num_computed_tokens[slot] = state.num_tokens[slot]
            plan.num_tokens[row] = steps
    commit(state, plan)
