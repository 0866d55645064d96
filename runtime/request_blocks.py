"""The blocks of a request: it holds as many as its computed tokens need, and names the full ones by their content."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
    PREFIX_CACHING,
    VLLM_V1,
    Plan,
    State,
)


@njit
def blocks_of(state: State, num_tokens: int) -> int:
    """Blocks that so many tokens fill, the last one perhaps in part."""
    size = np.uint64(state.limits[BLOCK_SIZE])
    return int((np.uint64(num_tokens) + size - np.uint64(1)) // size)  # with signs it takes twice as long


@njit
def num_named_blocks(state: State, slot: int) -> int:
    """Blocks of a request, from its start, whose content has a hash."""
    hashed = state.num_hashes[slot] * state.limits[BLOCKS_PER_HASH]
    return int(max(hashed, state.num_own_blocks[slot]))


@njit
def span_hash(state: State, slot: int, span: int) -> int:
    """Content hash of a span of a request, the blocks that one hash covers: that hash mixed with the request's adapter:
    equal tokens give other keys and values under another adapter.

    Beyond the hashes it is the request's own: its id, mixed with the number of the span.
    """
    # SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), so that a trace's ids 0, 1, 2 spread; 0 is no hash
    if span < state.num_hashes[slot]:
        covering = state.hashes[state.hash_start[slot] + span]
        mixed = np.uint64(covering) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)
        mixed += np.uint64(state.adapter[slot]) * np.uint64(0xD6E8FEB86659FD93)
    else:
        own = np.uint64(state.request_id[slot] + 1) * np.uint64(0xD1342543DE82EF95)
        mixed = own ^ (np.uint64(span + 1) * np.uint64(0x2545F4914F6CDD1D))
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
    hold_in(state, plan, row, held, needed)
    state.num_blocks[slot] = needed
    return True


@njit
def hold_in(state: State, plan: Plan, row: NDArray[np.int32], held: int, needed: int) -> None:
    """Put blocks, of which there are enough, into row[held:needed]: free ones, then cached ones."""
    free = min(needed, held + state.blocks.counts[FREE])
    kv_cache.take_free(state.blocks, row, held, free)
    if kv_cache.num_blocks(state.host_blocks) == 0:
        if free < needed:
            kv_cache.take_cached(state.blocks, row, free, needed)
        return
    for i in range(free, needed):
        row[i] = take_block(state, plan)


@njit
def hold_prefix(state: State, plan: Plan, slot: int, hits: int) -> None:
    """Hold a request's first blocks, which are cached; those that only the host has come to the device."""
    counts, row = state.counts, state.block_table[state.lane[slot]]
    from_host, per_hash = 0, state.limits[BLOCKS_PER_HASH]
    for first in range(0, hits, per_hash):
        content_hash = span_hash(state, slot, first // per_hash)
        span = kv_cache.find_span(state.blocks, content_hash)
        if kv_cache.claim_span(state.blocks, span, min(hits, first + per_hash) - first, row, first):
            continue
        for i in range(first, min(hits, first + per_hash)):
            block = kv_cache.block_at(state.blocks, span, i - first)
            row[i] = block
            if block >= 0:
                kv_cache.claim(state.blocks, block)
            else:
                kv_cache.claim(state.host_blocks, kv_cache.find(state.host_blocks, content_hash, i - first))
                from_host += 1
    # all are held by now: what the fetched ones push out is none of them
    for i in range(hits if from_host > 0 else 0):
        if row[i] < 0:
            content_hash = span_hash(state, slot, i // per_hash)
            row[i] = fetch_block(state, plan, content_hash, i % per_hash)
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
    _name_blocks(state, slot, state.num_hashes[slot] * state.limits[BLOCKS_PER_HASH], full, False)
    state.num_own_blocks[slot] = max(state.num_own_blocks[slot], full)


@njit
def _name_blocks(state: State, slot: int, begin: int, end: int, also: bool) -> None:
    """Name those of a request's blocks begin ... end - 1 that have no name; `name_all` as in kv_cache.name."""
    per_hash, row = state.limits[BLOCKS_PER_HASH], state.block_table[state.lane[slot]]
    begin = _without_name(state, row, begin, end)
    while begin < end:
        number = begin // per_hash
        stop = min(end, (number + 1) * per_hash)
        content_hash = span_hash(state, slot, number)
        span = kv_cache.find_span(state.blocks, content_hash)
        if span < 0:
            span = kv_cache.add_span(state.blocks, content_hash)
        kv_cache.name_all(state.blocks, row, begin, stop, span, number * per_hash, also)
        begin = _without_name(state, row, stop, end)


@njit
def _without_name(state: State, row: NDArray[np.int32], begin: int, end: int) -> int:
    """The first of the blocks begin ... end - 1 that has no name, or end."""
    while begin < end and state.blocks.content[np.uint64(row[np.uint64(begin)])] != 0:
        begin += 1
    return begin


@njit
def release_blocks(state: State, slot: int) -> None:
    """Give back every block, the lane and the adapter's slot of a running request.

    Last blocks first: they are the first to be evicted.
    """
    named = num_named_blocks(state, slot) * state.limits[PREFIX_CACHING]
    kv_cache.release_all(state.blocks, state.block_table[state.lane[slot]], state.num_blocks[slot], named)
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
    while first > 0 and state.blocks.content[row[first - 1]] == 0:
        first -= 1
    return int(first)


@njit
def remember_full_blocks(state: State, slot: int, before: int, after: int) -> None:
    """Name the blocks that became full as computed tokens went from `before` to `after`: others may claim them."""
    block_size = state.limits[BLOCK_SIZE]
    hashed = state.num_hashes[slot] * state.limits[BLOCKS_PER_HASH]
    full = min(after // block_size, hashed)
    _name_blocks(state, slot, before // block_size, full, state.limits[POLICY] == VLLM_V1)
