"""Blocks of the KV cache: the order of their last use, their names, and that spans kept together change nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.runtime import kv_cache
from paretune.runtime.scheduler import add_request, commit, schedule
from paretune.runtime.scheduler_state import (
    NUM_PREEMPTIONS,
    NUM_PREFIX_HIT_TOKENS,
    NUM_RUNNING,
    NUM_WAITING,
    POLICIES,
    State,
    new_plan,
    new_state,
)
from paretune.runtime.spec import Pool

from .pool_checks import cached_blocks


def test_of_cached_blocks_the_one_unused_for_longest_is_taken_first() -> None:
    blocks = kv_cache.new_block_pool(3)
    held = [kv_cache.take(blocks) for _ in range(3)]
    for block in held:
        kv_cache.remember(blocks, block, 100 + block, 0)
    for block in (1, 0, 2):
        kv_cache.release(blocks, block)
    kv_cache.claim(blocks, 1)
    kv_cache.release(blocks, 1)
    assert [kv_cache.take(blocks) for _ in range(4)] == [0, 2, 1, -1]
    assert all(kv_cache.find(blocks, 100 + block, 0) == -1 for block in held)


def test_free_blocks_are_taken_before_cached_ones() -> None:
    blocks = kv_cache.new_block_pool(2)
    named = kv_cache.take(blocks)
    kv_cache.remember(blocks, named, 5, 0)
    kv_cache.release(blocks, named)
    assert kv_cache.take(blocks) != named
    assert kv_cache.find(blocks, 5, 0) == named


@given(
    contents=st.lists(st.tuples(st.integers(1, 2**62), st.integers(0, 4)), min_size=1, max_size=60),
    drops=st.lists(st.integers(0, 59), max_size=60),
)
def test_the_hash_table_finds_what_was_remembered_and_not_evicted(
    contents: list[tuple[int, int]], drops: list[int]
) -> None:
    blocks = kv_cache.new_block_pool(64, 5)
    known: dict[tuple[int, int], int] = {}
    for content in contents:
        block = kv_cache.take(blocks)
        kv_cache.remember(blocks, block, *content)
        known.setdefault(content, block)
    for place in drops:
        if place < len(contents) and contents[place] in known:
            kv_cache._forget(blocks, known.pop(contents[place]))
    for content in contents:
        assert kv_cache.find(blocks, *content) == known.get(content, -1)


@given(contents=st.lists(st.integers(1, 6), min_size=1, max_size=80))
def test_cached_blocks_stay_in_the_order_of_their_last_use_however_often_they_are_claimed(contents: list[int]) -> None:
    blocks = kv_cache.new_block_pool(4)
    order: list[int] = []
    for content in contents:
        block = kv_cache.find(blocks, content, 0)
        if block >= 0:
            kv_cache.claim(blocks, block)
            order.remove(block)
        else:
            block = kv_cache.take(blocks)
            assert len(order) < 4 or block == order.pop(0)
            kv_cache.remember(blocks, block, content, 0)
        kv_cache.release(blocks, block)
        order.append(block)
        assert cached_blocks(blocks) == order


def part_all(state: State) -> int:
    """Let every block of every span go its own way; the number of spans that were kept together."""
    spans = np.flatnonzero(state.blocks.span_use != kv_cache._APART)
    for span in spans.tolist():
        kv_cache._part(state.blocks, span)
    return len(spans)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("span_blocks", [1, 3, 8])
@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("own_content", [False, True])
def test_a_scheduler_whose_spans_are_parted_all_the_time_takes_the_same_blocks(
    policy: str, span_blocks: int, host: bool, own_content: bool
) -> None:
    seen = np.sum([serve_twice(seed, policy, span_blocks, host, own_content) for seed in range(8)], axis=0)
    assert (seen > 0).all(), "tokens found, preemptions, evictions, spans parted, queues moved"


def serve_twice(seed: int, policy: str, span_blocks: int, host: bool, own_content: bool) -> tuple[int, ...]:
    """Serve prompts that begin alike, and leave each other in the midst of a span, by two schedulers.

    Returns: tokens found, preemptions, steps with cached blocks after which none was free, spans that were parted,
        and times that the queue was moved to the front.
    """
    rng = np.random.default_rng(seed)
    limits = Pool(
        max_model_len=64,
        max_num_seqs=5,
        max_num_batched_tokens=int(rng.integers(8, 64)),
        block_size=4,
        num_kv_blocks=int(rng.integers(18, 60)),
        host_kv_blocks=20 * host,
        preemption="swap" if host and seed % 2 else "recompute",
    )
    per_hash = span_blocks * 4
    families = rng.integers(0, 3, (3, 64 // per_hash + 1))
    hashes: list[int] = []
    coming = []
    for number in range(60):
        prompt = int(rng.integers(1, 60))
        spans = families[rng.integers(0, 3), : prompt // per_hash].tolist()
        own = int(rng.integers(0, 8))
        spans[own:] = [1000 + number] * len(spans[own:])
        coming.append((number, prompt, prompt + int(rng.integers(1, 64 - prompt + 1)), len(hashes), len(spans)))
        hashes += [hash(tuple(spans[: i + 1])) >> 1 for i in range(len(spans))]  # of all that went before, too
    caching = {"hashes": np.array(hashes, np.int64), "blocks_per_hash": span_blocks, "own_content": own_content}
    states = [new_state(limits, policy=policy, slots=64, **caching) for _ in range(2)]
    plans = [new_plan(limits) for _ in range(2)]
    kept, parted = states
    evicted = together = closed = head = 0
    while coming or kept.counts[NUM_RUNNING] + kept.counts[NUM_WAITING] > 0:
        together += part_all(parted)
        arrivals = [coming.pop(0) for _ in range(min(len(coming), int(rng.integers(0, 3))))]
        before = cached_blocks(kept.blocks)
        for state, plan in zip(states, plans):
            for request in arrivals:
                add_request(state, *request)
            schedule(state, plan)
            if state is parted:
                together += part_all(state)
            commit(state, plan)
        closed += kept.blocks.counts[kv_cache.QUEUE_HEAD] < head
        head = kept.blocks.counts[kv_cache.QUEUE_HEAD]
        np.testing.assert_array_equal(kept.counts, parted.counts)
        for one, other in ((kept.blocks, parted.blocks), (kept.host_blocks, parted.host_blocks)):
            assert cached_blocks(one) == cached_blocks(other)
            assert one.free_stack[: one.counts[kv_cache.FREE]].tolist() == (
                other.free_stack[: other.counts[kv_cache.FREE]].tolist()
            )
        np.testing.assert_array_equal(kept.num_blocks, parted.num_blocks)
        for slot in kept.running[: kept.counts[NUM_RUNNING]].tolist():
            one, other = (state.block_table[state.lane[slot], : state.num_blocks[slot]] for state in states)
            assert one.tolist() == other.tolist()
        evicted += bool(before) and kept.counts[NUM_RUNNING] > 0 and kept.blocks.counts[kv_cache.FREE] == 0
    return int(kept.counts[NUM_PREFIX_HIT_TOKENS]), int(kept.counts[NUM_PREEMPTIONS]), evicted, together, closed
