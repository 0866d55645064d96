"""What an engine says of itself: counts since it began, and one record a step."""

from __future__ import annotations

from dataclasses import dataclass

from . import kv_cache
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


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine began, and what it holds now.

    preemptions        times that a request gave its blocks back; `swaps` of these keep them on the host
    prefix_hit_tokens  found on the device; `host_hit_tokens` on the host only
    host_blocks_used   held or cached
    drafts, draft_tokens, accepted_tokens  of all requests, as in Speculated
    accepted_by_position  drafts whose first, second, ... proposal was accepted
    """

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    preemptions: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    steps: int
    swaps: int = 0
    host_hit_tokens: int = 0
    host_blocks_used: int = 0
    host_blocks_total: int = 0
    blocks_to_host: int = 0
    blocks_from_host: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_position: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepRecord:
    """One step as the step-time model sees it (profiler/step_time.py).

    decode_context  tokens whose KV the one-token rows read, their own included, summed over these rows
    prefill_pairs   query-key pairs of the other rows
    seconds         of the whole step: planning, computing, sampling, committing
    started_s       on the clock of time.perf_counter
    requests, starts, tokens  of each row: the request's number, tokens of it that were computed before, and tokens that
                    this step computed; empty where nobody asked (Engine.log_rows)
    """

    num_tokens: int
    num_rows: int
    num_samples: int
    decode_context: float
    prefill_pairs: float
    seconds: float
    started_s: float
    requests: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()


def stats_of(state: State, steps: int, speculated: Speculated, accepted_by_position: tuple[int, ...]) -> EngineStats:
    """How a scheduler stands after so many steps, and what was speculated in them.

    Cached blocks that nobody holds are not in use.
    """
    counts, blocks, host_blocks = state.counts, state.blocks, state.host_blocks
    total, host_total = len(blocks.ref_count), len(host_blocks.ref_count)
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
