"""What a scheduler's state says to people: its counts by name."""

from __future__ import annotations

from . import kv_cache
from .engine_stats import EngineStats
from .scheduler_state import (
    NUM_BLOCKS_FROM_HOST,
    NUM_BLOCKS_TO_HOST,
    NUM_HOST_HIT_TOKENS,
    NUM_PREEMPTIONS,
    NUM_PREFIX_HIT_TOKENS,
    NUM_PREFIX_QUERY_TOKENS,
    NUM_RUNNING,
    NUM_SWAPPED,
    NUM_WAITING,
    State,
)
from .speculated import Speculated


def stats_of(state: State, steps: int, speculated: Speculated, accepted_by_position: tuple[int, ...]) -> EngineStats:
    """How a scheduler stands after so many steps, and what was speculated in them.

    Cached blocks that nobody holds are not in use.
    """
    counts, blocks, host_blocks = state.counts, state.blocks, state.host_blocks
    total, host_total = len(blocks.use), len(host_blocks.use)
    return EngineStats(
        running=int(counts[NUM_RUNNING]),
        waiting=int(counts[NUM_WAITING]),
        kv_blocks_used=total - kv_cache.num_available(blocks),
        kv_blocks_total=total,
        preemptions=int(counts[NUM_PREEMPTIONS]),
        prefix_query_tokens=int(counts[NUM_PREFIX_QUERY_TOKENS]),
        prefix_hit_tokens=int(counts[NUM_PREFIX_HIT_TOKENS]),
        steps=steps,
        swaps=int(counts[NUM_SWAPPED]),
        host_hit_tokens=int(counts[NUM_HOST_HIT_TOKENS]),
        host_blocks_used=host_total - int(host_blocks.counts[kv_cache.FREE]),
        host_blocks_total=host_total,
        blocks_to_host=int(counts[NUM_BLOCKS_TO_HOST]),
        blocks_from_host=int(counts[NUM_BLOCKS_FROM_HOST]),
        **speculated._asdict(),
        accepted_by_position=accepted_by_position,
    )
