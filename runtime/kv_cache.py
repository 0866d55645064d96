"""Blocks of the paged KV cache: who holds them, which are free, and which hold a prefix that may be used again.

Pure bookkeeping over NumPy arrays, compiled by Numba; the tensors live elsewhere. A block is held (`ref_count > 0`),
free (on the stack), or cached: free to be taken, but its content has a hash and a later request may claim it. Cached
blocks are taken in order of last use (LRU), and only when the stack is empty.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit

# places in BlockPool.counts
FREE = 0
CACHED = 1


class BlockPool(NamedTuple):
    """All blocks of one KV cache.

    ref_count   (num_blocks,) int32  requests that hold the block
    block_hash  (num_blocks,) int64  hash of its content and all before it; 0 = none
    free_stack  (num_blocks,) int32  free blocks without content, counts[FREE] of them
    lru_next, lru_prev  (num_blocks + 1,) int32  ring of cached blocks, oldest first; the last place is the anchor
    table_hash, table_block  (2**k,) int64, int32  hash -> block, open addressing; hash 0 = empty place
    counts      (2,) int64           blocks on the stack; cached blocks
    """

    ref_count: NDArray[np.int32]
    block_hash: NDArray[np.int64]
    free_stack: NDArray[np.int32]
    lru_next: NDArray[np.int32]
    lru_prev: NDArray[np.int32]
    table_hash: NDArray[np.int64]
    table_block: NDArray[np.int32]
    counts: NDArray[np.int64]


def new_block_pool(num_blocks: int) -> BlockPool:
    """A pool of `num_blocks` free blocks; the first to be taken is block 0."""
    places = 1 << max(4, max(0, 2 * num_blocks - 1).bit_length())
    return BlockPool(
        ref_count=np.zeros(num_blocks, np.int32),
        block_hash=np.zeros(num_blocks, np.int64),
        free_stack=np.arange(num_blocks - 1, -1, -1, dtype=np.int32),
        lru_next=np.full(num_blocks + 1, num_blocks, np.int32),
        lru_prev=np.full(num_blocks + 1, num_blocks, np.int32),
        table_hash=np.zeros(places, np.int64),
        table_block=np.zeros(places, np.int32),
        counts=np.array([num_blocks, 0], np.int64),
    )


@njit
def num_available(pool: BlockPool) -> int:
    """Blocks that can be taken now: free ones and cached ones."""
    return int(pool.counts[FREE] + pool.counts[CACHED])


@njit
def _home(pool: BlockPool, content_hash: int) -> int:
    return int(content_hash & (pool.table_hash.shape[0] - 1))


@njit
def find(pool: BlockPool, content_hash: int) -> int:
    """The block whose content has this hash, held or cached, the first of several; -1 if there is none."""
    mask = pool.table_hash.shape[0] - 1
    place = _home(pool, content_hash)
    while pool.table_hash[place] != 0:
        if pool.table_hash[place] == content_hash:
            return int(pool.table_block[place])
        place = (place + 1) & mask
    return -1


@njit
def _forget(pool: BlockPool, block: int) -> None:
    content_hash = pool.block_hash[block]
    pool.block_hash[block] = 0
    mask = pool.table_hash.shape[0] - 1
    place = _home(pool, content_hash)
    while pool.table_hash[place] != content_hash or pool.table_block[place] != block:
        place = (place + 1) & mask
    # backward-shift deletion keeps every chain unbroken, and blocks of equal content in
    # the order they came, without tombstones (Knuth, TAOCP 3, 6.4, algorithm R)
    hole = place
    while True:
        place = (place + 1) & mask
        if pool.table_hash[place] == 0:
            break
        home = _home(pool, pool.table_hash[place])
        if ((place - home) & mask) >= ((place - hole) & mask):
            pool.table_hash[hole] = pool.table_hash[place]
            pool.table_block[hole] = pool.table_block[place]
            hole = place
    pool.table_hash[hole] = 0


@njit
def remember(pool: BlockPool, block: int, content_hash: int) -> None:
    """Say what a held, full block contains; the hash is well mixed, not 0. A second block of that content gets none."""
    if pool.block_hash[block] == 0 and find(pool, content_hash) < 0:
        remember_also(pool, block, content_hash)


@njit
def remember_also(pool: BlockPool, block: int, content_hash: int) -> None:
    """Say what a held, full block contains, even if others contain the same; `find` gives the first of them."""
    if pool.block_hash[block] != 0:
        return
    mask = pool.table_hash.shape[0] - 1
    place = _home(pool, content_hash)
    while pool.table_hash[place] != 0:
        place = (place + 1) & mask
    pool.table_hash[place] = content_hash
    pool.table_block[place] = block
    pool.block_hash[block] = content_hash


@njit
def _unlink(pool: BlockPool, block: int) -> None:
    before, after = pool.lru_prev[block], pool.lru_next[block]
    pool.lru_next[before] = after
    pool.lru_prev[after] = before
    pool.counts[CACHED] -= 1


@njit
def oldest(pool: BlockPool) -> int:
    """The cached block unused for longest; there is one."""
    return int(pool.lru_next[pool.ref_count.shape[0]])


@njit
def take(pool: BlockPool) -> int:
    """Take one block to write into: a free one, else the cached one unused for longest; -1 if there is none."""
    if pool.counts[FREE] > 0:
        pool.counts[FREE] -= 1
        block = int(pool.free_stack[pool.counts[FREE]])
    elif pool.counts[CACHED] > 0:
        block = oldest(pool)
        _unlink(pool, block)
        _forget(pool, block)
    else:
        return -1
    pool.ref_count[block] = 1
    return block


@njit
def take_free(pool: BlockPool, row: NDArray[np.int32], held: int, needed: int) -> None:
    """Put free blocks, of which there are enough, into row[held:needed]: what `take` does with each, in one loop."""
    free = pool.counts[FREE]
    for i in range(held, needed):
        free -= 1
        block = pool.free_stack[free]
        row[i] = block
        pool.ref_count[block] = 1
    pool.counts[FREE] = free


@njit
def claim(pool: BlockPool, block: int) -> None:
    """Hold a block for its content, together with whoever holds it already."""
    if pool.ref_count[block] == 0:
        _unlink(pool, block)
    pool.ref_count[block] += 1


@njit
def release(pool: BlockPool, block: int) -> None:
    """Let go of a held block. The last holder leaves it cached if its content has a hash, else free."""
    pool.ref_count[block] -= 1
    if pool.ref_count[block] > 0:
        return
    if pool.block_hash[block] == 0:
        pool.free_stack[pool.counts[FREE]] = block
        pool.counts[FREE] += 1
        return
    _link(pool, block)


@njit
def release_all(pool: BlockPool, row: NDArray[np.int32], held: int) -> None:
    """Let go of row[:held], the last ones first: what `release` does with each, in one loop."""
    free = pool.counts[FREE]
    for i in range(held - 1, -1, -1):
        block = row[i]
        others = pool.ref_count[block] - 1
        pool.ref_count[block] = others
        if others == 0:
            if pool.block_hash[block] == 0:
                pool.free_stack[free] = block
                free += 1
            else:
                _link(pool, block)
    pool.counts[FREE] = free


@njit
def _link(pool: BlockPool, block: int) -> None:
    anchor = pool.ref_count.shape[0]
    newest = pool.lru_prev[anchor]
    pool.lru_next[newest] = block
    pool.lru_prev[block] = newest
    pool.lru_next[block] = anchor
    pool.lru_prev[anchor] = block
    pool.counts[CACHED] += 1
