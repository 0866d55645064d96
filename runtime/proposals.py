"""What is proposed for an engine's requests, by n-grams or a draft model, and what became of it, request by request."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .draft_model import DraftModel
from .rank import Rank
from .sampler import Sampler
from .scheduler_state import Plan, State
from .spec import Pool
from .speculated import NOTHING, Speculated
from .speculation import ask_for_drafts, propose_ngrams

Tokens = NDArray[np.int32]  # the arena, as in write_wire


class Proposals:
    """Who proposes, if anybody, and what became of it, as keep_agreed counts it.

    counts       (slots, 3) int64 by scheduler slot; `grow` replaces it
    by_position  (num_speculative_tokens,) int64
    """

    def __init__(self, pool: Pool, rank: Rank, slots: int) -> None:
        self._pool = pool
        self._draft = DraftModel(pool, rank, slots) if pool.draft_model else None
        self.counts = np.zeros((slots, 3), np.int64)
        self._ended = np.zeros(3, np.int64)  # of requests that have
        self.by_position = np.zeros(pool.num_speculative_tokens, np.int64)

    def grow(self, slots: int) -> None:
        """Room for so many requests."""
        more = np.zeros((slots - len(self.counts), 3), np.int64)
        self.counts = np.concatenate([self.counts, more])
        if self._draft is not None:
            self._draft.grow(slots)

    def ask(self, state: State, tokens: Tokens) -> None:
        """Before `schedule`: how many tokens each running request wants to verify; n-grams are proposed here."""
        pool = self._pool
        if pool.speculation == "draft_model":
            ask_for_drafts(state, pool.num_speculative_tokens)
        elif pool.speculation == "ngram":
            longest, shortest = pool.prompt_lookup_max, pool.prompt_lookup_min
            propose_ngrams(state, tokens, pool.num_speculative_tokens, longest, shortest)

    def draft(self, state: State, plan: Plan, tokens: Tokens, sampler: Sampler) -> None:
        """Between `schedule` and the model's own step: a draft model computes the plan, and proposes."""
        if self._draft is not None:
            self._draft.propose(state, plan, tokens, sampler)

    def of(self, slot: int) -> Speculated:
        """Of a request so far."""
        return NOTHING if self._pool.speculation == "none" else Speculated(*self.counts[slot].tolist())

    def end(self, slot: int) -> None:
        """The request has ended: its counts are kept in the total only."""
        self._ended += self.counts[slot]
        self.counts[slot] = 0

    def total(self) -> Speculated:
        """Of all requests since the engine began."""
        return Speculated(*(self._ended + self.counts.sum(axis=0)).tolist())

    def accepted_by_position(self) -> tuple[int, ...]:
        """Drafts whose first, second, ... proposal was accepted."""
        return tuple(self.by_position.tolist())
