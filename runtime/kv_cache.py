"""Blocks of the paged KV cache: who holds them, which are free, and which hold a prefix that may be used again.

Pure bookkeeping over NumPy arrays, compiled by Numba; the tensors live elsewhere. A block is held, free (on the stack),
or cached: free to be taken, but its content has a name and a later request may claim it. Cached blocks are taken in
order of last use (LRU), and only when the stack is empty. Only a block with a name can have several holders.

The loops over many blocks index by numbers without a sign: one with a sign may count from the end, and to find that out
takes Numba as long as all the rest.

A name is a hash and a place under it. One hash covers a span of blocks (in a log often 512 tokens, 32 blocks), so that
what a request with thousands of blocks finds is looked up span by span, and of a whole span its counts alone.

Most spans are named, held and let go as one, and evicted from their end. The blocks of such a span are kept together:
they have one number of holders and one place in the order of last use, in the span, instead of one each, scattered in
memory. As soon as somebody holds some of them and not all, they go their own ways (`_part`). Callers see no difference.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit

# places in BlockPool.counts
FREE = 0
CACHED = 1
QUEUE_HEAD = 2
QUEUE_TAIL = 3
USED_SPANS = 4
FREE_SPANS = 5
SPAN_BITS = 6
SECOND_BLOCKS = 7
SPAN_BLOCKS = 8

_APART = -(1 << 31)  # `span_use` of a span whose blocks are not kept together


class BlockPool(NamedTuple):
    """All blocks of one KV cache.

    use          (num_blocks,) int32  of a cached block its place in `queue`; of one with a name that is held, less the
                                      number of its holders; of others, and of those kept together, -1
    content      (num_blocks,) int64  1 + its place in `span_block`; 0 = its content has no name
    next_same    (num_blocks,) int32  1 + the block of equal content that was named next; 0 = none
    free_stack   (num_blocks,) int32  free blocks without content, counts[FREE] of them
    queue        (2 * num_blocks,) int32  cached blocks, unused for longest first, from counts[QUEUE_HEAD] to
                                      counts[QUEUE_TAIL]; an entry counts where `use` of its block names it. An entry
                                      below 0 is a span, ~entry: its blocks, the last one first, that name the entry
                                      (all, where `span_use` does)
    table_hash, table_span  (2**k,) int64, int32  hash -> span, open addressing; hash 0 = empty place
    span_hash    (num_blocks,) int64
    span_named   (num_blocks,) int32  places of a span of whose content there is a block
    span_idle    (num_blocks,) int32  of these, places whose (first) block nobody holds
    span_use     (num_blocks,) int32  of a span kept together what `use` would be of each of its blocks: those of its
                                      first span_named places, the only ones of their content; of others -2**31
    span_block   (num_blocks << counts[SPAN_BITS],) int32  1 + the (first) block of each place of each span; 0 = none
    free_spans   (num_blocks,) int32  spans that are used again, counts[FREE_SPANS] of them
    counts       (9,) int64           blocks on the stack; cached blocks; the ends of the queue; spans that were ever
                                      used; those on the stack of spans; bits of a place; blocks that are not the first
                                      of their content; blocks of a span
    """

    use: NDArray[np.int32]
    content: NDArray[np.int64]
    next_same: NDArray[np.int32]
    free_stack: NDArray[np.int32]
    queue: NDArray[np.int32]
    table_hash: NDArray[np.int64]
    table_span: NDArray[np.int32]
    span_hash: NDArray[np.int64]
    span_named: NDArray[np.int32]
    span_idle: NDArray[np.int32]
    span_use: NDArray[np.int32]
    span_block: NDArray[np.int32]
    free_spans: NDArray[np.int32]
    counts: NDArray[np.int64]


def new_block_pool(num_blocks: int, span_blocks: int = 1) -> BlockPool:
    """A pool of `num_blocks` free blocks, of which one hash names `span_blocks`; the first to be taken is block 0."""
    places = 1 << max(4, max(0, 2 * num_blocks - 1).bit_length())
    span_bits = (span_blocks - 1).bit_length()
    return BlockPool(
        use=np.full(num_blocks, -1, np.int32),
        content=np.zeros(num_blocks, np.int64),
        next_same=np.zeros(num_blocks, np.int32),
        free_stack=np.arange(num_blocks - 1, -1, -1, dtype=np.int32),
        queue=np.zeros(2 * num_blocks, np.int32),
        table_hash=np.zeros(places, np.int64),
        table_span=np.zeros(places, np.int32),
        span_hash=np.zeros(num_blocks, np.int64),
        span_named=np.zeros(num_blocks, np.int32),
        span_idle=np.zeros(num_blocks, np.int32),
        span_use=np.full(num_blocks, _APART, np.int32),
        span_block=np.zeros(num_blocks << span_bits, np.int32),
        free_spans=np.zeros(num_blocks, np.int32),
        counts=np.array([num_blocks, 0, 0, 0, 0, 0, span_bits, 0, span_blocks], np.int64),
    )


@njit
def num_available(pool: BlockPool) -> int:
    """Blocks that can be taken now: free ones and cached ones."""
    return int(pool.counts[FREE] + pool.counts[CACHED])


@njit
def num_blocks(pool: BlockPool) -> int:
    """Blocks of the pool; 0: there is no such tier."""
    return int(pool.use.shape[0])


@njit
def is_cached(pool: BlockPool, block: int) -> bool:
    """Whether a block has a name and nobody holds it."""
    at = pool.content[block] - 1
    return bool(pool.use[block] >= 0 or (at >= 0 and pool.span_use[at >> pool.counts[SPAN_BITS]] >= 0))


@njit
def _home(pool: BlockPool, content_hash: int) -> int:
    return int(content_hash & (pool.table_hash.shape[0] - 1))


@njit
def find_span(pool: BlockPool, content_hash: int) -> int:
    """The span that a hash covers, of which there is a block; -1: there is none of it."""
    mask = pool.table_hash.shape[0] - 1
    place = _home(pool, content_hash)
    while pool.table_hash[place] != 0:
        if pool.table_hash[place] == content_hash:
            return int(pool.table_span[place])
        place = (place + 1) & mask
    return -1


@njit
def block_at(pool: BlockPool, span: int, place: int) -> int:
    """The block with the content of a place of a span (-1: of none), the first of several; -1 if there is none."""
    if span < 0:
        return -1
    return int(pool.span_block[(span << pool.counts[SPAN_BITS]) + place]) - 1


@njit
def find(pool: BlockPool, content_hash: int, place: int) -> int:
    """The block with this content, held or cached, the first of several; -1 if there is none."""
    return block_at(pool, find_span(pool, content_hash), place)


@njit
def name_of(pool: BlockPool, block: int) -> tuple[int, int]:
    """Hash and place of a block that has a name."""
    bits = pool.counts[SPAN_BITS]
    at = pool.content[block] - 1
    return int(pool.span_hash[at >> bits]), int(at & ((1 << bits) - 1))


@njit
def add_span(pool: BlockPool, content_hash: int) -> int:
    """A span for a hash, well mixed and not 0, that has none; a block of it is named next."""
    counts = pool.counts
    if counts[FREE_SPANS] > 0:
        counts[FREE_SPANS] -= 1
        span = int(pool.free_spans[counts[FREE_SPANS]])
    else:
        span = int(counts[USED_SPANS])
        counts[USED_SPANS] += 1
    mask = pool.table_hash.shape[0] - 1
    place = _home(pool, content_hash)
    while pool.table_hash[place] != 0:
        place = (place + 1) & mask
    pool.table_hash[place] = content_hash
    pool.table_span[place] = span
    pool.span_hash[span] = content_hash
    return span


@njit
def _drop_span(pool: BlockPool, span: int) -> None:
    mask = pool.table_hash.shape[0] - 1
    place = _home(pool, pool.span_hash[span])
    while pool.table_hash[place] != pool.span_hash[span]:
        place = (place + 1) & mask
    # backward-shift deletion keeps every chain unbroken without tombstones (Knuth, TAOCP 3, 6.4, algorithm R)
    hole = place
    while True:
        place = (place + 1) & mask
        if pool.table_hash[place] == 0:
            break
        home = _home(pool, pool.table_hash[place])
        if ((place - home) & mask) >= ((place - hole) & mask):
            pool.table_hash[hole] = pool.table_hash[place]
            pool.table_span[hole] = pool.table_span[place]
            hole = place
    pool.table_hash[hole] = 0
    pool.free_spans[pool.counts[FREE_SPANS]] = span
    pool.counts[FREE_SPANS] += 1


@njit
def _forget(pool: BlockPool, block: int) -> None:
    at = pool.content[block] - 1
    span = at >> pool.counts[SPAN_BITS]
    pool.content[block] = 0
    following = pool.next_same[block]
    pool.next_same[block] = 0
    if pool.span_block[at] != block + 1:
        before = pool.span_block[at] - 1
        while pool.next_same[before] != block + 1:
            before = pool.next_same[before] - 1
        pool.next_same[before] = following
        pool.counts[SECOND_BLOCKS] -= 1
        return
    pool.span_block[at] = following
    if following > 0:
        pool.counts[SECOND_BLOCKS] -= 1
        pool.span_idle[span] += is_cached(pool, following - 1)
        return
    pool.span_named[span] -= 1
    if pool.span_named[span] == 0:
        _drop_span(pool, span)


@njit
def name_all(pool: BlockPool, row: NDArray[np.int32], begin: int, end: int, span: int, first: int, also: bool) -> None:
    """Say of held, full blocks row[begin:end] what they contain: row[first + i] place i of a span. Who has a name keeps
    it. A second block of some content gets the name only if `also`; `block_at` gives the first of them all the same."""
    base, before, use = (span << pool.counts[SPAN_BITS]) - first, pool.span_named[span], pool.span_use[span]
    if use != _APART and not also and end - first <= before:
        return  # others have these names
    # whoever alone holds all that there is of a span, and goes on behind it, keeps it together
    behind = begin - first == before
    together = behind and (before == 0 or (use == -1 and pool.span_block[base + first] == row[first] + 1))
    if use != _APART and not together:
        _part(pool, span)
    named = 0
    for i in range(begin, end):
        block, at = row[np.uint64(i)], base + i
        if pool.content[np.uint64(block)] != 0:
            continue
        if pool.span_block[np.uint64(at)] == 0:
            pool.span_block[np.uint64(at)] = block + 1
            pool.content[np.uint64(block)] = at + 1
            named += 1
        elif also:
            last = pool.span_block[at] - 1
            while pool.next_same[last] > 0:
                last = pool.next_same[last] - 1
            pool.next_same[last] = block + 1
            pool.content[block] = at + 1
            pool.counts[SECOND_BLOCKS] += 1
    pool.span_named[span] += named
    pool.span_use[span] = -1 if together and named == end - begin else _APART


@njit
def _part(pool: BlockPool, span: int) -> None:
    """Let each block of a span that is kept together go its own way."""
    use, base = pool.span_use[span], span << pool.counts[SPAN_BITS]
    for at in range(base, base + pool.span_named[span]):
        pool.use[pool.span_block[at] - 1] = use
    pool.span_use[span] = _APART


@njit
def _part_from(pool: BlockPool, block: int) -> None:
    """Let a block go its own way, and with it those that it may be kept together with."""
    if pool.content[block] != 0:
        span = (pool.content[block] - 1) >> pool.counts[SPAN_BITS]
        if pool.span_use[span] != _APART:
            _part(pool, span)


@njit
def remember(pool: BlockPool, block: int, content_hash: int, place: int) -> None:
    """Name a held, full block by its content, unless it has a name or another block has this one."""
    if pool.content[block] == 0:
        span = find_span(pool, content_hash)
        if span < 0:
            span = add_span(pool, content_hash)
        elif pool.span_use[span] != _APART:
            _part(pool, span)
        at = (span << pool.counts[SPAN_BITS]) + place
        if pool.span_block[at] == 0:
            pool.span_block[at] = block + 1
            pool.content[block] = at + 1
            pool.span_named[span] += 1


@njit
def _unlink(pool: BlockPool, block: int) -> None:
    pool.use[block] = -1
    pool.counts[CACHED] -= 1
    at = pool.content[block] - 1
    if pool.span_block[at] == block + 1:
        pool.span_idle[at >> pool.counts[SPAN_BITS]] -= 1


@njit
def oldest(pool: BlockPool) -> int:
    """The cached block unused for longest; there is one."""
    head = pool.counts[QUEUE_HEAD]
    while True:
        entry = pool.queue[head]
        block = entry if entry >= 0 else _last_of_entry(pool, head)
        if block >= 0 and pool.use[block] == head:
            pool.counts[QUEUE_HEAD] = head
            return int(block)
        head += 1


@njit
def _last_of_entry(pool: BlockPool, place: int) -> int:
    """The last block that is meant by an entry of the queue that is a span, which is parted; -1 if none is."""
    span = ~pool.queue[place]
    base = span << pool.counts[SPAN_BITS]
    if pool.span_use[span] == place:
        _part(pool, span)
    for at in range(base + pool.counts[SPAN_BLOCKS] - 1, base - 1, -1):
        block = pool.span_block[at] - 1
        if block >= 0 and pool.use[block] == place:
            return int(block)
    return -1


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
    return block


@njit
def take_free(pool: BlockPool, row: NDArray[np.int32], held: int, needed: int) -> None:
    """Put free blocks, of which there are enough, into row[held:needed]: what `take` does with each."""
    free = pool.counts[FREE]
    for i in range(needed - held):
        row[np.uint64(held + i)] = pool.free_stack[np.uint64(free - 1 - i)]
    pool.counts[FREE] = free - (needed - held)


@njit
def take_cached(pool: BlockPool, row: NDArray[np.int32], held: int, needed: int) -> None:
    """Put cached blocks, of which there are enough while none is free, into row[held:needed]: what `take` does."""
    bits, head, alone = pool.counts[SPAN_BITS], pool.counts[QUEUE_HEAD], pool.counts[SECOND_BLOCKS] == 0
    span, gone = 0, 0  # of this span so many blocks are gone that its counts do not know of yet
    i = held
    while i < needed:
        block = pool.queue[np.uint64(head)]
        if block < 0:
            i = _take_of_span(pool, row, i, needed, head)
            head += i < needed
            continue
        if pool.use[np.uint64(block)] != head:
            head += 1
            continue
        head += 1
        pool.use[np.uint64(block)] = -1
        at = pool.content[np.uint64(block)] - 1
        if alone or (pool.span_block[at] == block + 1 and pool.next_same[block] == 0):
            pool.span_block[np.uint64(at)] = 0
            pool.content[np.uint64(block)] = 0
            if at >> bits != span:
                _count_gone(pool, span, gone)
                span, gone = at >> bits, 0
            gone += 1
        else:
            _count_gone(pool, span, gone)
            gone = 0
            pool.span_idle[at >> bits] -= pool.span_block[at] == block + 1
            _forget(pool, block)
        row[np.uint64(i)] = block
        i += 1
    _count_gone(pool, span, gone)
    pool.counts[QUEUE_HEAD] = head
    pool.counts[CACHED] -= needed - held


@njit
def _take_of_span(pool: BlockPool, row: NDArray[np.int32], begin: int, end: int, place: int) -> int:
    """Put the blocks that are meant by an entry of the queue that is a span, the last one first, into row[begin:end];
    returns behind the last one."""
    span = ~pool.queue[place]
    base = span << pool.counts[SPAN_BITS]
    if pool.span_use[span] == place:
        behind = base + pool.span_named[span]
        count = min(end - begin, behind - base)
        for i in range(count):
            at = behind - 1 - i
            block = pool.span_block[np.uint64(at)] - 1
            row[np.uint64(begin + i)] = block
            pool.content[np.uint64(block)] = 0
        for at in range(behind - count, behind):
            pool.span_block[np.uint64(at)] = 0
        _count_gone(pool, span, count)
        return int(begin + count)
    i, gone = begin, 0
    for at in range(base + pool.counts[SPAN_BLOCKS] - 1, base - 1, -1):
        block = pool.span_block[np.uint64(at)] - 1
        if block < 0 or pool.use[np.uint64(block)] != place:
            continue
        if i == end:
            break
        pool.use[np.uint64(block)] = -1
        if pool.next_same[np.uint64(block)] == 0:
            pool.span_block[np.uint64(at)] = 0
            pool.content[np.uint64(block)] = 0
            gone += 1
        else:
            pool.span_idle[span] -= 1
            _forget(pool, block)
        row[np.uint64(i)] = block
        i += 1
    _count_gone(pool, span, gone)
    return i


@njit
def _count_gone(pool: BlockPool, span: int, gone: int) -> None:
    if gone > 0:
        pool.span_idle[span] -= gone
        pool.span_named[span] -= gone
        if pool.span_named[span] == 0:
            pool.span_use[span] = _APART
            _drop_span(pool, span)


@njit
def claim(pool: BlockPool, block: int) -> None:
    """Hold a block for its content, together with whoever holds it already."""
    _part_from(pool, block)
    if is_cached(pool, block):
        _unlink(pool, block)
    else:
        pool.use[block] -= 1


@njit
def claim_span(pool: BlockPool, span: int, places: int, row: NDArray[np.int32], begin: int) -> bool:
    """Hold the blocks of the first places of a span and put them into row[begin:]: what `claim` does with each. False,
    and nothing done, unless these are all blocks of a span that are kept together."""
    if span < 0 or pool.span_use[span] == _APART or places != pool.span_named[span]:
        return False
    base = span << pool.counts[SPAN_BITS]
    for i in range(places):
        row[np.uint64(begin + i)] = pool.span_block[np.uint64(base + i)] - 1
    if pool.span_use[span] >= 0:
        pool.span_use[span] = -1
        pool.span_idle[span] = 0
        pool.counts[CACHED] -= places
    else:
        pool.span_use[span] -= 1
    return True


@njit
def release(pool: BlockPool, block: int) -> None:
    """Let go of a held block. The last holder leaves it cached if its content has a name, else free."""
    if pool.content[block] == 0:
        pool.free_stack[pool.counts[FREE]] = block
        pool.counts[FREE] += 1
        return
    _part_from(pool, block)
    if pool.use[block] == -1:
        _link(pool, block)
    else:
        pool.use[block] += 1


@njit
def release_all(pool: BlockPool, row: NDArray[np.int32], held: int, named: int) -> None:
    """Let go of row[:held], the last ones first: what `release` does with each. Those from `named` on have no name."""
    counts, free, plain = pool.counts, pool.counts[FREE], max(0, held - named)
    for i in range(plain):
        pool.free_stack[np.uint64(free + i)] = row[np.uint64(held - 1 - i)]
    free += plain
    if counts[QUEUE_TAIL] + held - plain > pool.queue.shape[0]:
        _close_ranks(pool)
    tail, bits, alone = counts[QUEUE_TAIL], counts[SPAN_BITS], counts[SECOND_BLOCKS] == 0
    cached = counts[CACHED]
    span, idle = 0, 0  # of this span so many blocks are idle that its count does not know of yet
    i = held - plain - 1
    while i >= 0:
        block = row[np.uint64(i)]
        at = pool.content[np.uint64(block)] - 1
        if at < 0:
            pool.free_stack[np.uint64(free)] = block
            free += 1
            i -= 1
            continue
        if pool.span_use[np.uint64(at >> bits)] != _APART:
            # who holds one of its blocks holds all
            together = at >> bits
            size = pool.span_named[together]
            if pool.span_use[together] < -1:
                pool.span_use[together] += 1
            else:
                pool.queue[np.uint64(tail)] = ~together
                pool.span_use[together] = tail
                tail += 1
                pool.span_idle[together] = size
                cached += size
            i -= size
            continue
        i -= 1
        if pool.use[np.uint64(block)] < -1:
            pool.use[np.uint64(block)] += 1
            continue
        pool.queue[np.uint64(tail)] = block
        pool.use[np.uint64(block)] = tail
        tail += 1
        cached += 1
        if alone or pool.span_block[at] == block + 1:
            if at >> bits != span:
                pool.span_idle[span] += idle
                span, idle = at >> bits, 0
            idle += 1
    if idle > 0:
        pool.span_idle[span] += idle
    counts[FREE] = free
    counts[CACHED] = cached
    counts[QUEUE_TAIL] = tail


@njit
def _link(pool: BlockPool, block: int) -> None:
    if pool.counts[QUEUE_TAIL] == pool.queue.shape[0]:
        _close_ranks(pool)
    tail = pool.counts[QUEUE_TAIL]
    pool.queue[tail] = block
    pool.use[block] = tail
    pool.counts[QUEUE_TAIL] = tail + 1
    pool.counts[CACHED] += 1
    at = pool.content[block] - 1
    if pool.span_block[at] == block + 1:
        pool.span_idle[at >> pool.counts[SPAN_BITS]] += 1


@njit
def _close_ranks(pool: BlockPool) -> None:
    """Move the entries that count to the front of the queue: at most half of its places, so that this comes seldom."""
    kept = 0
    for place in range(pool.counts[QUEUE_HEAD], pool.counts[QUEUE_TAIL]):
        entry = pool.queue[place]
        if entry >= 0:
            counts = pool.use[entry] == place
            if counts:
                pool.use[entry] = kept
        elif pool.span_use[~entry] == place:
            counts = True
            pool.span_use[~entry] = kept
        else:
            counts = False
            base = ~entry << pool.counts[SPAN_BITS]
            for at in range(base, base + pool.counts[SPAN_BLOCKS]):
                block = pool.span_block[at] - 1
                if block >= 0 and pool.use[block] == place:
                    pool.use[block] = kept
                    counts = True
        if counts:
            pool.queue[kept] = entry
            kept += 1
    pool.counts[QUEUE_HEAD] = 0
    pool.counts[QUEUE_TAIL] = kept
