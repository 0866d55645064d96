"""What an engine says of itself: counts since it began, and one record a step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple


class EngineStats(NamedTuple):
    """Counts since the engine began, and what it holds now.

    preemptions        times that a request gave its blocks back; `swaps` of these keep them on the host
    prefix_hit_tokens  found on the device; `host_hit_tokens` on the host only
    host_blocks_used   held or cached
    drafts, draft_tokens, accepted_tokens  of all requests, as in Speculated
    accepted_by_position  drafts whose first, second, ... proposal was accepted
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    steps: int = 0
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

    def plus(self, other: EngineStats) -> EngineStats:
        """Both added up, position by position."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in self._fields[:-1]}
        positions = itertools.zip_longest(self.accepted_by_position, other.accepted_by_position, fillvalue=0)
        return EngineStats(**sums, accepted_by_position=tuple(map(sum, positions)))


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
