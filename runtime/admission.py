"""Who of those that wait may start now, and what of its tokens need not be computed.

A request takes blocks as its tokens are computed. Who is admitted too early preempts others later; who is admitted too
late leaves blocks idle. Between the two stand the admission policies:

    on_demand       when the blocks of all its tokens so far are there
    first_chunk     when those of its first step are there (vLLM's --no-scheduler-reserve-full-isl)
    watermark       on demand, and a share of all blocks stays free, unless nobody runs (vLLM's --watermark)
    estimated_peak  on demand, and the blocks that all who run and this one hold at the worst moment to come are there;
                    how long answers get is estimated by those that ended (after LightLLM's "past-future" scheduler,
                    Gong et al., ASPLOS 2025, arXiv:2507.10150)
"""

from __future__ import annotations

from ..kernels.jit import njit
from . import kv_cache
from .request_blocks import blocks_of, num_named_blocks, span_hash
from .scheduler_state import (
    ADMISSION,
    BLOCK_SIZE,
    BLOCKS_PER_HASH,
    CHUNKED_PREFILL,
    ESTIMATED_PEAK,
    FIRST_CHUNK,
    NUM_ENDED,
    NUM_ENDED_TOKENS,
    NUM_RUNNING,
    PREFIX_CACHING,
    WATERMARK_BLOCKS,
    State,
)


@njit
def first_tokens(state: State, slot: int, budget: int, most: int) -> tuple[int, int]:
    """What a waiting request would begin with.

    Args:
        budget: tokens left in the step.
        most: tokens that one request may have of a step.
    Returns: tokens that need not be computed, and tokens that this step computes; 0: it has to wait.
    """
    limits = state.limits
    tokens = state.num_tokens[slot]
    total = blocks_of(state, tokens)
    available = kv_cache.num_available(state.blocks)
    found = idle = 0
    computed = state.num_computed_tokens[slot]  # whose KV is on the host, or came with the request
    if computed == 0:
        # every hit saves a block, so a request that lacks blocks although all its named ones hit cannot be admitted
        named = num_named_blocks(state, slot) * limits[PREFIX_CACHING]
        if total - named > available and limits[ADMISSION] != FIRST_CHUNK:
            return 0, 0
        hits, found, idle = _prefix_hits(state, slot)
        computed = hits * limits[BLOCK_SIZE]
    num_tokens = min(tokens - computed, most)
    if num_tokens > budget:
        if limits[CHUNKED_PREFILL] == 0:
            return 0, 0
        num_tokens = budget
    needed = blocks_of(state, computed + num_tokens) if limits[ADMISSION] == FIRST_CHUNK else total
    kept_free = limits[WATERMARK_BLOCKS] if state.counts[NUM_RUNNING] > 0 else 0
    if needed - found + kept_free > available - idle:
        return 0, 0
    estimating = limits[ADMISSION] == ESTIMATED_PEAK and state.counts[NUM_RUNNING] > 0
    if estimating and estimated_peak(state, slot) > kv_cache.num_blocks(state.blocks):
        return 0, 0
    return int(computed), int(num_tokens)


@njit
def _prefix_hits(state: State, slot: int) -> tuple[int, int, int]:
    """Whole blocks of the request, from its start, that are cached. Its last token is always computed.

    Returns: on device or host; of them on the device; of these held by nobody.
    """
    hits = found = idle = 0
    if state.limits[PREFIX_CACHING] == 0:
        return hits, found, idle
    blocks, per_hash = state.blocks, state.limits[BLOCKS_PER_HASH]
    limit = min(num_named_blocks(state, slot), (state.num_tokens[slot] - 1) // state.limits[BLOCK_SIZE])
    while hits < limit:
        content_hash = span_hash(state, slot, hits // per_hash)
        span = kv_cache.find_span(blocks, content_hash)
        if span < 0 and kv_cache.num_blocks(state.host_blocks) == 0:
            break
        wanted = min(limit - hits, per_hash)
        if span >= 0 and wanted == per_hash == blocks.span_named[span]:
            found += per_hash
            idle += blocks.span_idle[span]
            hits += per_hash
            continue
        for place in range(wanted):
            block = kv_cache.block_at(blocks, span, place)
            if block >= 0:
                found += 1
                idle += kv_cache.is_cached(blocks, block)
            elif kv_cache.find(state.host_blocks, content_hash, place) < 0:
                return hits, found, idle
            hits += 1
    return hits, found, idle


@njit
def estimated_peak(state: State, slot: int) -> int:
    """Blocks held at the worst moment to come if a waiting request joins those that run and nobody else does.

    Everybody grows by a block in the time of a block's tokens, and gives all back at the end of its answer. Blocks that
    several hold count for each of them.
    """
    ends = state.ends
    longest = 0
    for i in range(state.counts[NUM_RUNNING] + 1):
        other = slot if i == state.counts[NUM_RUNNING] else state.running[i]
        now = blocks_of(state, state.num_tokens[other])
        more = blocks_of(state, _expected_tokens(state, other)) - now
        ends[more, 0] += 1
        ends[more, 1] += now
        longest = max(longest, more)
    peak = requests = blocks = 0
    for more in range(longest, -1, -1):
        requests += ends[more, 0]
        blocks += ends[more, 1]
        ends[more] = 0
        peak = max(peak, blocks + requests * more)
    return int(peak)


@njit
def _expected_tokens(state: State, slot: int) -> int:
    """Tokens of prompt and answer: the answer as long as the mean of those that ended, or a block more than it is now.

    Before any has ended, as long as it may get.
    """
    ended = state.counts[NUM_ENDED]
    if ended == 0:
        return int(state.max_num_tokens[slot])
    mean = (state.counts[NUM_ENDED_TOKENS] + ended - 1) // ended
    expected = max(state.num_prompt_tokens[slot] + mean, state.num_tokens[slot] + state.limits[BLOCK_SIZE])
    return int(min(expected, state.max_num_tokens[slot]))
