"""The blocks of a request: it holds as many as its computed tokens need, and names the full ones by their content."""

from __future__ import annotations

import numpy as np

from ..kernels.jit import njit
from . import kv_cache
from .scheduler_state import BLOCK_SIZE, BLOCKS_PER_HASH, NUM_FREE_LANES, State


@njit
def block_hash(state: State, slot: int, index: int) -> int:
    """Content hash of block `index` of a request: the hash that covers it, mixed with its place under that hash."""
    per_hash = state.limits[BLOCKS_PER_HASH]
    covering = state.hashes[state.hash_start[slot] + index // per_hash]
    # SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), so that a trace's ids 0, 1, 2 spread; 0 is no hash
    mixed = np.uint64(covering) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(index % per_hash + 1)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return int(max(np.int64(1), np.int64(mixed >> np.uint64(1))))


@njit
def hold_blocks(state: State, slot: int, num_tokens: int) -> bool:
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
def release_blocks(state: State, slot: int) -> None:
    """Give back every block and the lane of a running request. Last blocks first: they are the first to be evicted."""
    row = state.block_table[state.lane[slot]]
    for i in range(state.num_blocks[slot] - 1, -1, -1):
        kv_cache.release(state.blocks, row[i])
    state.num_blocks[slot] = 0
    state.free_lanes[state.counts[NUM_FREE_LANES]] = state.lane[slot]
    state.counts[NUM_FREE_LANES] += 1
    state.lane[slot] = -1


@njit
def remember_full_blocks(state: State, slot: int, before: int, after: int) -> None:
    """Name the blocks that became full as computed tokens went from `before` to `after`: others may claim them."""
    block_size = state.limits[BLOCK_SIZE]
    hashed = state.num_hashes[slot] * state.limits[BLOCKS_PER_HASH]
    row = state.block_table[state.lane[slot]]
    for i in range(before // block_size, min(after // block_size, hashed)):
        kv_cache.remember(state.blocks, row[i], block_hash(state, slot, i))
