"""What the scheduler knows and what it decides: the live requests of one replica (State) and one step of theirs (Plan).

Plain NumPy arrays, so that the same compiled functions work on them in the engine and in the simulator.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit
from .adapter_slots import AdapterSlots, new_adapter_slots
from .kv_cache import BlockPool, new_block_pool
from .spec import Pool

# places in State.limits
MAX_NUM_SEQS = 0
MAX_NUM_BATCHED_TOKENS = 1
BLOCK_SIZE = 2
CHUNKED_PREFILL = 3
PREFIX_CACHING = 4
BLOCKS_PER_HASH = 5
POLICY = 6
LONG_PREFILL_TOKEN_THRESHOLD = 7
BY_PRIORITY = 8
ADMISSION = 9
WATERMARK_BLOCKS = 10
SWAP = 11
OWN_CONTENT = 12
PLANS_IN_FLIGHT = 13
PROMPTS_FROM_ELSEWHERE = 14

# State.limits[POLICY]
PARETUNE = 0
VLLM_V1 = 1
POLICIES = ("paretune", "vllm_v1")

# State.limits[ADMISSION]
ON_DEMAND = 0
FIRST_CHUNK = 1
WATERMARK = 2
ESTIMATED_PEAK = 3
ADMISSIONS = ("on_demand", "first_chunk", "watermark", "estimated_peak")

# places in State.counts
NUM_RUNNING = 0
NUM_WAITING = 1
WAITING_HEAD = 2
NUM_FREE_SLOTS = 3
NUM_FREE_LANES = 4
NUM_PREEMPTIONS = 5
NUM_PREFIX_QUERY_TOKENS = 6
NUM_PREFIX_HIT_TOKENS = 7
NUM_ADDED = 8
NUM_ENDED = 9
NUM_ENDED_TOKENS = 10
NUM_SWAPPED = 11
NUM_BLOCKS_TO_HOST = 12
NUM_BLOCKS_FROM_HOST = 13
NUM_HOST_HIT_TOKENS = 14

# places in Plan.counts
PLAN_SIZE = 0
PLAN_TOKENS = 1
PLAN_FINISHED = 2
PLAN_PREEMPTED = 3
PLAN_ADMITTED = 4
PLAN_COPIES = 5
PLAN_FILLS = 6  # adapters put into slots


_WITHOUT_SIGN = (1 << 62) - 1

# Blocks that are named together where only their own request looks for them: fewer names to look up than of each block.
_OWN_SPAN_BLOCKS = 32


class State(NamedTuple):
    """All live requests of one replica, one slot each; slots are used again after a request ends.

    limits                 (15,) int64   what the spec allows, in the places named above
    counts                 (15,) int64  running totals, in the places named above
    request_id             (slots,) int64  the caller's name for the request
    priority               (slots,) int64  lower goes first; 0 for all where the spec schedules "fcfs"
    arrival                (slots,) int64  requests that came before it
    num_prompt_tokens      (slots,) int64
    num_tokens             (slots,) int64  prompt + generated so far
    num_draft_tokens       (slots,) int64  tokens proposed behind these, for the next plan to verify: the caller writes
                                           them before `schedule`, for requests that lack their last token alone
    num_computed_tokens    (slots,) int64  tokens whose KV is cached or on its way, 0 to num_tokens; with proposals in a
                                           plan in flight, these besides. While it waits: those whose KV lies on the
                                           host, or came from a prefill pool and finds its blocks at admission
    max_num_tokens         (slots,) int64  num_tokens at which the request ends
    num_cached_tokens      (slots,) int64  tokens found in the prefix cache at the last admission
    num_own_blocks         (slots,) int64  blocks, from its start, that were named when it was preempted (OWN_CONTENT)
    num_swapped_blocks     (slots,) int64  blocks that it holds on the host while it waits
    first_swapped          (slots,) int64  the first of these
    num_blocks             (slots,) int64  blocks held
    in_flight              (slots,) int64  plans not yet committed that compute tokens of it
    aborted                (slots,) bool   ends at its next commit
    lane                   (slots,) int64  its row of block_table while running, else -1
    hash_start, num_hashes (slots,) int64  its block hashes: hashes[hash_start : hash_start + num_hashes]
    adapter                (slots,) int64  number of its adapter, or NO_ADAPTER
    adapter_slot           (slots,) int64  where its adapter lies while it runs, else -1
    free_slots             (slots,) int64  stack
    waiting                (slots,) int64  ring of slots: counts[NUM_WAITING] of them from counts[WAITING_HEAD]
    running                (max_num_seqs,) int64  slots in order of admission
    free_lanes             (max_num_seqs,) int64  stack
    block_table            (max_num_seqs, max_blocks) int32  block ids by lane, in order of the context
    hashes                 (m,) int64   chained content hashes, each of BLOCKS_PER_HASH whole blocks
    blocks                 BlockPool
    host_blocks            BlockPool    second tier (host_blocks.py)
    next_swapped           (host blocks,) int64  the host block that follows in the same request
    ends                   (max_blocks + 1, 2) int64  scratch of admission.estimated_peak, zeros between its calls
    adapter_slots          AdapterSlots
    """

    limits: NDArray[np.int64]
    counts: NDArray[np.int64]
    request_id: NDArray[np.int64]
    priority: NDArray[np.int64]
    arrival: NDArray[np.int64]
    num_prompt_tokens: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_draft_tokens: NDArray[np.int64]
    num_computed_tokens: NDArray[np.int64]
    max_num_tokens: NDArray[np.int64]
    num_cached_tokens: NDArray[np.int64]
    num_own_blocks: NDArray[np.int64]
    num_swapped_blocks: NDArray[np.int64]
    first_swapped: NDArray[np.int64]
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
    host_blocks: BlockPool
    next_swapped: NDArray[np.int64]
    ends: NDArray[np.int64]
    adapter_slots: AdapterSlots


class Plan(NamedTuple):
    """One step: row i computes `num_tokens[i]` tokens of request `slot[i]`, after `start[i]` that are computed already.

    slot        (max_num_seqs,) int64
    start       (max_num_seqs,) int64
    num_tokens  (max_num_seqs,) int64
    num_drafts  (max_num_seqs,) int64  of these, the last ones: proposals to verify
    samples     (max_num_seqs,) bool   the row reaches the request's last token, so a new one is sampled, and one more
                                       for each proposal
    accepted    (max_num_seqs,) int64  filled by the caller before commit: tokens kept, 1 or (speculation) more
    stopped     (max_num_seqs,) bool   filled by the caller before commit: the request ends with these tokens
    finished    (max_num_seqs,) int64  slots that ended at commit; readable until the next add_request
    preempted   (max_num_seqs,) int64  slots that gave their blocks back in this schedule
    copies      (n, 2) int32           blocks to copy before the step, from and to, in order (host_blocks.py)
    counts      (7,) int64             in the places named above
    """

    slot: NDArray[np.int64]
    start: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_drafts: NDArray[np.int64]
    samples: NDArray[np.bool_]
    accepted: NDArray[np.int64]
    stopped: NDArray[np.bool_]
    finished: NDArray[np.int64]
    preempted: NDArray[np.int64]
    copies: NDArray[np.int32]
    counts: NDArray[np.int64]


def new_state(
    pool: Pool,
    *,
    policy: str = "paretune",
    hashes: NDArray[np.int64] | None = None,
    blocks_per_hash: int = 1,
    own_content: bool = False,
    slots: int = 0,
) -> State:
    """An empty replica with the limits of `pool`.

    Args:
        pool: batch limits, block size and count, chunked prefill and prefix caching.
        policy: `Deployment.scheduler_policy`, one of POLICIES.
        hashes: content hashes that requests point into; none means that nothing is found in the prefix cache.
        blocks_per_hash: KV blocks that one hash covers (a trace's block may be larger than the engine's).
        own_content: blocks beyond the hashes of a request are like no other's. A request that was preempted finds its
            own again, as in an engine, where all blocks have hashes.
        slots: live requests to make room for; `grow` adds more. At least 2 x max_num_seqs.
    """
    seqs = pool.max_num_seqs
    slots = max(slots, 2 * seqs)
    if own_content and (hashes is None or len(hashes) == 0):
        blocks_per_hash = _OWN_SPAN_BLOCKS
    max_blocks = -(-pool.max_model_len // pool.block_size)
    limits = [
        seqs,
        pool.max_num_batched_tokens,
        pool.block_size,
        int(pool.enable_chunked_prefill),
        int(pool.enable_prefix_caching),
        blocks_per_hash,
        POLICIES.index(policy),
        pool.long_prefill_token_threshold,
        int(pool.scheduling == "priority"),
        ADMISSIONS.index(pool.admission),
        int(pool.watermark * pool.num_kv_blocks),
        int(pool.preemption == "swap"),
        int(own_content),
        pool.pipeline_parallel_size,
        int(pool.role == "decode"),
    ]
    counts = np.zeros(15, np.int64)
    counts[NUM_FREE_SLOTS] = slots
    counts[NUM_FREE_LANES] = seqs
    return State(
        limits=np.array(limits, np.int64),
        counts=counts,
        request_id=np.zeros(slots, np.int64),
        priority=np.zeros(slots, np.int64),
        arrival=np.zeros(slots, np.int64),
        num_prompt_tokens=np.zeros(slots, np.int64),
        num_tokens=np.zeros(slots, np.int64),
        num_draft_tokens=np.zeros(slots, np.int64),
        num_computed_tokens=np.zeros(slots, np.int64),
        max_num_tokens=np.zeros(slots, np.int64),
        num_cached_tokens=np.zeros(slots, np.int64),
        num_own_blocks=np.zeros(slots, np.int64),
        num_swapped_blocks=np.zeros(slots, np.int64),
        first_swapped=np.zeros(slots, np.int64),
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
        blocks=new_block_pool(pool.num_kv_blocks, blocks_per_hash),
        host_blocks=new_block_pool(pool.host_kv_blocks, blocks_per_hash),
        next_swapped=np.zeros(pool.host_kv_blocks, np.int64),
        ends=np.zeros((max_blocks + 1, 2), np.int64),
        adapter_slots=new_adapter_slots(pool.max_loras),
    )


def new_plan(pool: Pool) -> Plan:
    """An empty plan for a replica with the limits of `pool`."""
    seqs = pool.max_num_seqs
    copies = 2 * pool.num_kv_blocks + pool.host_kv_blocks if pool.host_kv_blocks else 0
    return Plan(
        slot=np.zeros(seqs, np.int64),
        start=np.zeros(seqs, np.int64),
        num_tokens=np.zeros(seqs, np.int64),
        num_drafts=np.zeros(seqs, np.int64),
        samples=np.zeros(seqs, np.bool_),
        accepted=np.ones(seqs, np.int64),
        stopped=np.zeros(seqs, np.bool_),
        finished=np.zeros(seqs, np.int64),
        preempted=np.zeros(seqs, np.int64),
        copies=np.zeros((copies, 2), np.int32),
        counts=np.zeros(7, np.int64),
    )


def change_limits(state: State, pool: Pool) -> None:
    """Schedule within the limits of `pool` from the next step on: its batch limits, at most those of `new_state`.

    Requests beyond a smaller max_num_seqs run to their end, and nobody is admitted before there is a seat.
    """
    assert pool.max_num_seqs <= state.running.shape[0], "the arrays hold no more"
    state.limits[MAX_NUM_SEQS] = pool.max_num_seqs
    state.limits[MAX_NUM_BATCHED_TOKENS] = pool.max_num_batched_tokens
    state.limits[LONG_PREFILL_TOKEN_THRESHOLD] = pool.long_prefill_token_threshold


@njit
def slot_at(slots: NDArray[np.int64], place: int) -> int:
    """The slot at a place of a list of slots. Without the sign, which none has, Numba need not ask at each of a
    request's fields whether it counts from the end."""
    return int(slots[place] & _WITHOUT_SIGN)


# the fields of State that say something of one request; the other fields by slot are queues of slots
_OF_A_REQUEST = (
    "request_id",
    "priority",
    "arrival",
    "num_prompt_tokens",
    "num_tokens",
    "num_draft_tokens",
    "num_computed_tokens",
    "max_num_tokens",
    "num_cached_tokens",
    "num_own_blocks",
    "num_swapped_blocks",
    "first_swapped",
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
