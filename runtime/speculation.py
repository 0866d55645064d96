"""Speculative decoding: tokens are proposed for a request, one step computes them all, and those it agrees with stay.

At each place of a proposal, and at the one behind, a step samples the token that it would have sampled there without
any: by the request's own parameters, from the logits of the model, with the random bits that belong to the place
(sampler.py). Proposals are kept as far as they are these tokens; the first that is not is replaced by what was
sampled, and what stands behind it is dropped. So what is proposed changes no answer, greedy or sampled: seeds keep
their meaning, whatever else runs and is preempted, and the distribution is the model's by construction.

A proposal d that does not depend on these bits is kept with the model's probability p(d), as by the rejection rule of
Leviathan et al. (arXiv:2211.17192) and Chen et al. (arXiv:2302.01318) where the proposal's distribution is that point.
A draft model draws with the same bits as the model will, and both by races (kernels/sampling.py), so that they mostly
draw the same: with probability at least (1 - t) / (1 + t) where theirs, the best there is, keeps 1 - t, for
distributions at total variation t (Daliri et al., arXiv:2408.07978). Theirs would let a seed's answer depend on the
draft model, and on where its drafts begin.

So a seed's answer is the same under any draft model and number of tokens, and another than without one, where tokens
are drawn by one uniform number, as they are with n-grams; a greedy answer is the same in all cases. All this as far as
rounding goes: a step that verifies adds in another order than one that decodes, and where two tokens are equally good
to the last bits of fp32, either may come.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit
from .scheduler_state import BLOCK_SIZE, NUM_RUNNING, PLAN_SIZE, Plan, State


@njit
def room_for_drafts(state: State, slot: int, most: int) -> int:
    """Tokens that may be proposed: none but for a request that lacks its last token alone, and none beyond its end."""
    if state.in_flight[slot] > 0 or state.num_computed_tokens[slot] + 1 != state.num_tokens[slot]:
        return 0
    return int(min(most, state.max_num_tokens[slot] - state.num_tokens[slot] - 1))


@njit
def ask_for_drafts(state: State, most: int) -> None:
    """Before `schedule`: every running request asks for as many proposals as it may have."""
    for index in range(state.counts[NUM_RUNNING]):
        slot = state.running[index]
        state.num_draft_tokens[slot] = room_for_drafts(state, slot, most)


@njit
def propose_ngrams(state: State, tokens: NDArray[np.int32], most: int, longest: int, shortest: int) -> None:
    """Before `schedule`: propose for each running request what followed its last tokens when they came before.

    Of the places before where its last `longest` tokens stand, or as many of them as stand anywhere, at least
    `shortest`, the latest is taken (prompt lookup: Saxena 2023; vLLM's method "ngram" takes the earliest). Where that
    is so late that too few tokens follow, the text is taken to go on in the same period.

    Args:
        tokens: the arena, as in write_wire; proposals are written behind each request's tokens.
    """
    block_size = state.limits[BLOCK_SIZE]
    for index in range(state.counts[NUM_RUNNING]):
        slot = state.running[index]
        room = room_for_drafts(state, slot, most)
        state.num_draft_tokens[slot] = 0
        if room == 0:
            continue
        first = state.hash_start[slot] * block_size
        count = state.num_tokens[slot]
        end, best = 0, shortest - 1
        last = tokens[first + count - 1]
        for place in range(count - 1, shortest - 1, -1):
            if tokens[first + place - 1] != last:
                continue
            same = 1
            while (
                same < longest and same < place and tokens[first + place - 1 - same] == tokens[first + count - 1 - same]
            ):
                same += 1
            if same > best:
                end, best = place, same
                if best == longest:
                    break
        if end > 0:
            for i in range(room):
                tokens[first + count + i] = tokens[first + end + i]
            state.num_draft_tokens[slot] = room


@njit
def keep_agreed(
    state: State,
    plan: Plan,
    tokens: NDArray[np.int32],
    speculated: NDArray[np.int64],
    by_position: NDArray[np.int64],
    sampled: NDArray[np.int64],
    ends: NDArray[np.bool_],
) -> None:
    """Between sampling and `commit`: fill in `plan.accepted` and `plan.stopped`, and count what was agreed with.

    Args:
        tokens: the arena, with the proposals behind each request's tokens.
        speculated: (slots, 3) by request, as in Speculated.
        by_position: (num_speculative_tokens,) drafts whose proposal at this place was accepted.
        sampled: (places,) in the order of the plan, one of each sampling row and one for each of its proposals.
        ends: (places,) whether this token would end its request.
    """
    block_size = state.limits[BLOCK_SIZE]
    place = 0
    for row in range(plan.counts[PLAN_SIZE]):
        plan.stopped[row] = False
        plan.accepted[row] = 1
        if not plan.samples[row]:
            continue
        slot, drafts = plan.slot[row], plan.num_drafts[row]
        first = state.hash_start[slot] * block_size + state.num_tokens[slot]
        agreed = 0
        while agreed < drafts and sampled[place + agreed] == tokens[first + agreed]:
            by_position[agreed] += 1
            agreed += 1
        kept = 1
        while kept <= agreed and not ends[place + kept - 1]:
            kept += 1
        plan.accepted[row] = kept
        plan.stopped[row] = ends[place + kept - 1]
        if drafts > 0:
            speculated[slot, 0] += 1
            speculated[slot, 1] += drafts
            speculated[slot, 2] += agreed
        place += 1 + drafts


def sampled_places(state: State, plan: Plan) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of the tokens that a plan samples: how many each sampling row does, (rows,); and of each of them its request's
    slot and how many tokens of the answer stand before it, (places,)."""
    rows = np.flatnonzero(plan.samples[: plan.counts[PLAN_SIZE]])
    slots = plan.slot[rows]
    generated = state.num_tokens[slots] - state.num_prompt_tokens[slots]
    drafts = plan.num_drafts[rows]
    if not drafts.any():
        return np.ones_like(slots), slots, generated
    each = 1 + drafts
    first = np.cumsum(each) - each
    offset = np.arange(each.sum()) - np.repeat(first, each)
    return each, np.repeat(slots, each), np.repeat(generated, each) + offset
