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
from .speculation import ask_for_drafts, keep_agreed, propose_ngrams

Tokens = NDArray[np.int32]  # the arena, as in write_wire


class Proposals:
    """Who proposes, if anybody, and counts of what was proposed and accepted, by scheduler slot."""

    def __init__(self, pool: Pool, rank: Rank, slots: int) -> None:
        self._pool = pool
        self._draft = DraftModel(pool, rank, slots) if pool.draft_model else None
        self._counts = np.zeros((slots, 3), np.int64)
        self._ended = np.zeros(3, np.int64)  # of requests that have
        self._by_position = np.zeros(pool.num_speculative_tokens, np.int64)

    def grow(self, slots: int) -> None:
        """Room for so many requests."""
        more = np.zeros((slots - len(self._counts), 3), np.int64)
        self._counts = np.concatenate([self._counts, more])
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

    def keep(
        self, state: State, plan: Plan, tokens: Tokens, sampled: NDArray[np.int64], ends: NDArray[np.bool_]
    ) -> None:
        """Between sampling and `commit`: say in the plan which tokens are kept, and count (see keep_agreed)."""
        keep_agreed(state, plan, tokens, sampled, ends, self._counts, self._by_position)

    def of(self, slot: int) -> Speculated:
        """Of a request so far."""
        return NOTHING if self._pool.speculation == "none" else Speculated(*self._counts[slot].tolist())

    def end(self, slot: int) -> None:
        """The request has ended: its counts are kept in the total only."""
        self._ended += self._counts[slot]
        self._counts[slot] = 0

    def total(self) -> Speculated:
        """Of all requests since the engine began."""
        return Speculated(*(self._ended + self._counts.sum(axis=0)).tolist())

    def accepted_by_position(self) -> tuple[int, ...]:
        """Drafts whose first, second, ... proposal was accepted."""
        return tuple(self._by_position.tolist())
