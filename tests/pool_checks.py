"""What must be true of the blocks of a KV cache, whatever was done with them."""

from __future__ import annotations

import numpy as np

from paretune.runtime import kv_cache


def uses(blocks: kv_cache.BlockPool) -> np.ndarray:
    """`BlockPool.use` as if no span were kept together."""
    found = blocks.use.copy()
    for block in np.flatnonzero(blocks.content).tolist():
        span = (int(blocks.content[block]) - 1) >> int(blocks.counts[kv_cache.SPAN_BITS])
        if blocks.span_use[span] != kv_cache._APART:
            assert found[block] == -1
            assert blocks.next_same[block] == 0
            found[block] = blocks.span_use[span]
    return found


def cached_blocks(blocks: kv_cache.BlockPool) -> list[int]:
    """The one unused for longest first."""
    use, found = uses(blocks), []
    for place in range(int(blocks.counts[kv_cache.QUEUE_HEAD]), int(blocks.counts[kv_cache.QUEUE_TAIL])):
        entry = int(blocks.queue[place])
        meant = [entry]
        if entry < 0:
            base, size = ~entry << int(blocks.counts[kv_cache.SPAN_BITS]), int(blocks.counts[kv_cache.SPAN_BLOCKS])
            meant = [block - 1 for block in blocks.span_block[base : base + size].tolist()[::-1] if block > 0]
        found += [block for block in meant if use[block] == place]
    return found


def check_pool(blocks: kv_cache.BlockPool, held: np.ndarray, unique: bool = True) -> None:
    """Every block is held as often as it should be, free or cached; the table knows each content, once if `unique`."""
    use = uses(blocks)
    assert np.where(blocks.content != 0, held, 1)[use < 0].tolist() == (-use[use < 0]).tolist()
    assert not held[use >= 0].any()
    assert (held[blocks.content == 0] <= 1).all()
    free = blocks.free_stack[: blocks.counts[kv_cache.FREE]].tolist()
    cached = cached_blocks(blocks)
    assert len(cached) == blocks.counts[kv_cache.CACHED]
    assert sorted(free + cached + np.flatnonzero(held).tolist()) == list(range(len(held)))
    assert all(blocks.content[block] != 0 for block in cached)
    named = [(kv_cache.name_of(blocks, block), block) for block in np.flatnonzero(blocks.content).tolist()]
    assert len({content for content, _ in named}) == len(named) or not unique
    first = {content: kv_cache.find(blocks, *content) for content, _ in named}
    assert all(kv_cache.name_of(blocks, block) == content for content, block in first.items())
    spans = {content_hash for content_hash, _ in first}
    assert sorted(blocks.table_hash[blocks.table_hash != 0].tolist()) == sorted(spans)
    live = [kv_cache.find_span(blocks, content_hash) for content_hash in spans]
    assert (np.delete(blocks.span_use, live) == kv_cache._APART).all(), "a span that is used again would be together"
    for content_hash in spans:
        span = kv_cache.find_span(blocks, content_hash)
        inside = [block for (each, _), block in first.items() if each == content_hash]
        assert blocks.span_named[span] == len(inside)
        if blocks.span_use[span] != kv_cache._APART:
            assert sorted(kv_cache.name_of(blocks, block)[1] for block in inside) == list(range(len(inside)))
        assert blocks.span_idle[span] == sum(block in cached for block in inside)
