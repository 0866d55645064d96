"""Who of those that wait may start, and what of its tokens lies in the prefix cache already."""

from __future__ import annotations

from ..kernels.jit import njit
from . import kv_cache
from .request_blocks import block_hash
from .scheduler_state import BLOCK_SIZE, BLOCKS_PER_HASH, PREFIX_CACHING, State


@njit
def count_prefix_hits(state: State, slot: int) -> int:
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
def admissible_prefix(state: State, slot: int) -> int:
    """Blocks of a waiting request that the prefix cache holds; -1 if too few are left for its other tokens so far."""
    limits = state.limits
    # every hit saves a block, so a request that lacks blocks although all its hashed ones hit cannot be admitted
    total_blocks = (state.num_tokens[slot] + limits[BLOCK_SIZE] - 1) // limits[BLOCK_SIZE]
    available = kv_cache.num_available(state.blocks)
    hashed = state.num_hashes[slot] * limits[BLOCKS_PER_HASH] * limits[PREFIX_CACHING]
    if total_blocks - hashed > available:
        return -1
    hits = count_prefix_hits(state, slot)
    cached_hits = 0
    for i in range(hits):
        if state.blocks.ref_count[kv_cache.find(state.blocks, block_hash(state, slot, i))] == 0:
            cached_hits += 1
    return -1 if total_blocks - hits > available - cached_hits else hits
