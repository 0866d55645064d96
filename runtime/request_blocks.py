"""The blocks of a request: it holds as many as its computed tokens need, and names the full ones by their content."""

from __future__ import annotations

import numpy as np

from ..kernels.jit import njit
from . import kv_cache
from .adapter_slots import release_slot
from .host_blocks import fetch_block, take_block
from .kv_cache import FREE
from .scheduler_state import (
    BLOCK_SIZE,
    BLOCKS_PER_HASH,
    NUM_FREE_LANES,
    NUM_HOST_HIT_TOKENS,
    NUM_PREFIX_HIT_TOKENS,
    NUM_PREFIX_QUERY_TOKENS,
    POLICY,
    VLLM_V1,
    Plan,
    State,
)


@njit
def blocks_of(state: State, num_tokens: int) -> int:
    """Blocks that so many tokens fill, the last one perhaps in part."""
    return int((num_tokens + state.limits[BLOCK_SIZE] - 1) // state.limits[BLOCK_SIZE])


@njit
def num_named_blocks(state: State, slot: int) -> int:
    """Blocks of a request, from its start, whose content has a hash."""
    hashed = state.num_hashes[slot] * state.limits[BLOCKS_PER_HASH]
    return int(max(hashed, state.num_own_blocks[slot]))


@njit
def block_hash(state: State, slot: int, index: int) -> int:
    """Content hash of block `index` of a request: the hash that covers it, mixed with its place under that hash and
    with the request's adapter: equal tokens give other keys and values under another adapter.

    Beyond the hashes it is the request's own: its id, mixed with the place.
    """
    per_hash = state.limits[BLOCKS_PER_HASH]
    # SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), so that a trace's ids 0, 1, 2 spread; 0 is no hash
    if index < state.num_hashes[slot] * per_hash:
        covering = state.hashes[state.hash_start[slot] + index // per_hash]
        mixed = np.uint64(covering) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(index % per_hash + 1)
        mixed += np.uint64(state.adapter[slot]) * np.uint64(0xD6E8FEB86659FD93)
    else:
        own = np.uint64(state.request_id[slot] + 1) * np.uint64(0xD1342543DE82EF95)
        mixed = own ^ (np.uint64(index + 1) * np.uint64(0x2545F4914F6CDD1D))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return int(max(np.int64(1), np.int64(mixed >> np.uint64(1))))


@njit
def hold_blocks(state: State, plan: Plan, slot: int, num_tokens: int) -> bool:
    """Hold blocks for its first `num_tokens` tokens; False, and nothing changed, if too few are left."""
    if num_tokens <= state.num_blocks[slot] * state.limits[BLOCK_SIZE]:
        return True  # mostly, and then what follows shall not be called: it takes all these arrays
    return _hold_more_blocks(state, plan, slot, blocks_of(state, num_tokens))


@njit
def _hold_more_blocks(state: State, plan: Plan, slot: int, needed: int) -> bool:
    held = state.num_blocks[slot]
    if needed - held > kv_cache.num_available(state.blocks):
        return False
    row = state.block_table[state.lane[slot]]
    if needed - held <= state.blocks.counts[FREE]:
        kv_cache.take_free(state.blocks, row, held, needed)
    else:
        for i in range(held, needed):
            row[i] = take_block(state, plan)
    state.num_blocks[slot] = needed
    return True


@njit
def hold_prefix(state: State, plan: Plan, slot: int, hits: int) -> None:
    """Hold a request's first blocks, which are cached; those that only the host has come to the device."""
    counts, row = state.counts, state.block_table[state.lane[slot]]
    from_host = 0
    for i in range(hits):
        content_hash = block_hash(state, slot, i)
        row[i] = kv_cache.find(state.blocks, content_hash)
        if row[i] >= 0:
            kv_cache.claim(state.blocks, row[i])
        else:
            kv_cache.claim(state.host_blocks, kv_cache.find(state.host_blocks, content_hash))
            from_host += 1
    # all are held by now: what the fetched ones push out is none of them
    for i in range(hits if from_host > 0 else 0):
        if row[i] < 0:
            content_hash = block_hash(state, slot, i)
            row[i] = fetch_block(state, plan, kv_cache.find(state.host_blocks, content_hash), content_hash)
    block_size = state.limits[BLOCK_SIZE]
    state.num_blocks[slot] = hits
    state.num_computed_tokens[slot] = hits * block_size
    state.num_cached_tokens[slot] = hits * block_size
    counts[NUM_PREFIX_QUERY_TOKENS] += state.num_tokens[slot]
    counts[NUM_PREFIX_HIT_TOKENS] += (hits - from_host) * block_size
    counts[NUM_HOST_HIT_TOKENS] += from_host * block_size


@njit
def name_own_blocks(state: State, slot: int) -> None:
    """Name the full blocks of a running request that have no hash, so that it finds them when it comes back."""
    full = state.num_computed_tokens[slot] // state.limits[BLOCK_SIZE]
    hashed = state.num_hashes[slot] * state.limits[BLOCKS_PER_HASH]
    row = state.block_table[state.lane[slot]]
    for i in range(hashed, full):
        kv_cache.remember(state.blocks, row[i], block_hash(state, slot, i))
    state.num_own_blocks[slot] = max(state.num_own_blocks[slot], full)


@njit
def release_blocks(state: State, slot: int) -> None:
    """Give back every block, the lane and the adapter's slot of a running request.

    Last blocks first: they are the first to be evicted.
    """
    kv_cache.release_all(state.blocks, state.block_table[state.lane[slot]], state.num_blocks[slot])
    state.num_blocks[slot] = 0
    release_slot(state.adapter_slots, state.adapter_slot[slot])
    state.adapter_slot[slot] = -1
    state.free_lanes[state.counts[NUM_FREE_LANES]] = state.lane[slot]
    state.counts[NUM_FREE_LANES] += 1
    state.lane[slot] = -1


@njit
def first_unnamed_block(state: State, slot: int, index: int) -> int:
    """The first of the blocks before `index`, of those that have a hash, behind which none is named; policy vllm_v1."""
    row = state.block_table[state.lane[slot]]
    first = min(index, state.num_hashes[slot] * state.limits[BLOCKS_PER_HASH])
    while first > 0 and state.blocks.block_hash[row[first - 1]] == 0:
        first -= 1
    return int(first)


@njit
def remember_full_blocks(state: State, slot: int, before: int, after: int) -> None:
    """Name the blocks that became full as computed tokens went from `before` to `after`: others may claim them."""
    block_size = state.limits[BLOCK_SIZE]
    hashed = state.num_hashes[slot] * state.limits[BLOCKS_PER_HASH]
    row = state.block_table[state.lane[slot]]
    for i in range(before // block_size, min(after // block_size, hashed)):
        if state.limits[POLICY] == VLLM_V1:
            kv_cache.remember_also(state.blocks, row[i], block_hash(state, slot, i))
        else:
            kv_cache.remember(state.blocks, row[i], block_hash(state, slot, i))
