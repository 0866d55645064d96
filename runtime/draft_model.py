"""Proposals of a smaller model, which computes the same requests in a KV cache of its own under the same block numbers.

Before the model computes a plan, the draft model computes the same tokens but the proposals, which it makes: one for
every request a pass, greedy or sampled as the request is, with the random bits that the model will take at that
place. Whatever the scheduler does with a block (share, evict, swap, find again), it does with the block of both caches.

Of proposals that were all accepted the draft model has not computed the last; it catches up in its next first pass. The
last block of a request that ends so, or is preempted, is one token short in the draft's cache, and whoever finds it
later, that request or another, gets worse proposals there: that costs acceptance, and changes no answer.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ..kernels.jit import njit
from .batch import ARGMAX, DRAFT, LOGITS, write_wire
from .rank import Rank
from .sampler import Sampler
from .scheduler_state import BLOCK_SIZE, PLAN_ADMITTED, PLAN_COPIES, PLAN_SIZE, PLAN_TOKENS, Plan, State, new_plan
from .spec import Pool


class DraftModel:
    """What the engine's process knows of it: how far it has computed each request."""

    def __init__(self, pool: Pool, rank: Rank, slots: int) -> None:
        self._rank = rank
        self._plan = new_plan(pool)
        self._computed = np.zeros(slots, np.int64)

    def grow(self, slots: int) -> None:
        """Room for so many requests."""
        self._computed = np.concatenate([self._computed, np.zeros(slots - len(self._computed), np.int64)])

    def propose(self, state: State, plan: Plan, tokens: NDArray[np.int32], sampler: Sampler) -> None:
        """Between `schedule` and the model's own step: catch up, and write the plan's proposals into the arena."""
        own = self._plan._replace(copies=plan.copies)  # blocks are copied in both caches
        _catch_up(state, plan, self._computed, own)
        proposed = 0
        while own.counts[PLAN_SIZE] > 0:
            slots = own.slot[: own.counts[PLAN_SIZE]][own.samples[: own.counts[PLAN_SIZE]]]
            generated = state.num_tokens[slots] - state.num_prompt_tokens[slots] + proposed
            head = ARGMAX if sampler.argmax_will_do(slots, generated) else LOGITS
            batch = self._rank.batches[0]
            self._rank.begin(0, write_wire(state, own, tokens, batch.wire, head, DRAFT))
            result = self._rank.result(0)
            with torch.inference_mode():
                drawn = result.numpy() if head == ARGMAX else sampler.draw(result, slots, generated)
            _take_drafts(state, plan, tokens, drawn, proposed, own)
            proposed += 1


@njit
def _catch_up(state: State, plan: Plan, computed: NDArray[np.int64], own: Plan) -> None:
    """The first pass: every row's tokens up to its request's last one that is known, from where the draft has got."""
    rows = plan.counts[PLAN_SIZE]
    own.counts[:] = 0
    own.counts[PLAN_SIZE] = rows
    own.counts[PLAN_COPIES] = plan.counts[PLAN_COPIES]
    for row in range(rows):
        slot = plan.slot[row]
        newcomer = row >= rows - plan.counts[PLAN_ADMITTED]
        start = plan.start[row] if newcomer else min(plan.start[row], computed[slot])
        end = plan.start[row] + plan.num_tokens[row] - plan.num_drafts[row]
        own.slot[row] = slot
        own.start[row] = start
        own.num_tokens[row] = end - start
        own.samples[row] = plan.num_drafts[row] > 0
        own.counts[PLAN_TOKENS] += end - start
        # with proposals, each but the last will be computed, too
        computed[slot] = end + max(0, plan.num_drafts[row] - 1)


@njit
def _take_drafts(
    state: State, plan: Plan, tokens: NDArray[np.int32], drawn: NDArray[np.int64], proposed: int, own: Plan
) -> None:
    """Write down what a pass drew, and compose the next pass of the rows that lack proposals."""
    block_size = state.limits[BLOCK_SIZE]
    own.counts[:] = 0
    place = 0
    for row in range(plan.counts[PLAN_SIZE]):
        if plan.num_drafts[row] <= proposed:
            continue
        slot = plan.slot[row]
        next_place = state.num_tokens[slot] + proposed
        tokens[state.hash_start[slot] * block_size + next_place] = drawn[place]
        place += 1
        if plan.num_drafts[row] > proposed + 1:
            to = own.counts[PLAN_SIZE]
            own.slot[to] = slot
            own.start[to] = next_place
            own.num_tokens[to] = 1
            own.samples[to] = True
            own.counts[PLAN_SIZE] += 1
            own.counts[PLAN_TOKENS] += 1
