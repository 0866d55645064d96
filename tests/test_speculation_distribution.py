"""What speculation keeps has the model's distribution, over whole answers; rules that look right and are not do not.

A model that is a table: the next token's logits by the last token. Many answers of three tokens each are made by the
engine's own sampler and rule, step by step with proposals, and counted: chi-square against the products of the table's
probabilities (test of Pearson; 0.1 % of right rules would fail it, and the seeds are fixed).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from paretune.kernels import sampling
from paretune.runtime.sampler import Sampler, SamplingParams
from paretune.runtime.scheduler import add_request, commit, schedule
from paretune.runtime.scheduler_state import NUM_RUNNING, PLAN_SIZE, State, new_plan, new_state
from paretune.runtime.spec import Pool
from paretune.runtime.speculation import keep_agreed, propose_ngrams, room_for_drafts, sampled_places

VOCAB, ANSWER, REQUESTS, DRAFTS = 4, 3, 6000, 2
POOL = Pool.model_validate(
    {
        "max_model_len": 16,
        "block_size": 16,
        "max_num_seqs": REQUESTS,
        "max_num_batched_tokens": 16 * REQUESTS,
        "num_kv_blocks": REQUESTS,
        "enable_prefix_caching": False,
    }
)
PROMPT = [0, 1, 2, 3, 0, 1]
CHI_SQUARE_63 = 103.4  # 63 degrees of freedom at 0.1 %: tables of the distribution
Propose = Callable[[State, NDArray[np.int32], Sampler], None]
Rule = Callable[..., None]


def table(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


MODEL, DRAFT = table(1), table(1) + 0.7 * table(2)
PARAMS: dict[str, dict[str, Any]] = {"plain": {}, "cut": {"temperature": 0.8, "top_k": 3}}


def by_ngram(state: State, tokens: NDArray[np.int32], sampler: Sampler) -> None:
    propose_ngrams(state, tokens, DRAFTS, 3, 1)


def by_draft(state: State, tokens: NDArray[np.int32], sampler: Sampler) -> None:
    """As DraftModel does: the same bits, the draft's own logits, one token after the other."""
    slots = state.running[: state.counts[NUM_RUNNING]].copy()
    room = np.array([room_for_drafts(state, slot, DRAFTS) for slot in slots])
    state.num_draft_tokens[slots] = room
    for done in range(DRAFTS):
        rows = slots[room > done]
        if len(rows):
            places = state.hash_start[rows] * 16 + state.num_tokens[rows] + done
            generated = state.num_tokens[rows] - state.num_prompt_tokens[rows] + done
            tokens[places] = sampler.draw(DRAFT[torch.from_numpy(tokens[places - 1]).long()], rows, generated)


def answers(params: dict[str, Any], propose: Propose, rule: Rule, races: bool) -> tuple[NDArray[np.int64], float]:
    """(REQUESTS, ANSWER) tokens, and the share of proposals that was accepted."""
    state, plan = new_state(POOL), new_plan(POOL)
    tokens = np.zeros(REQUESTS * 16, np.int32)
    sampler = Sampler(len(state.request_id), VOCAB, (), races=races)
    for number in range(REQUESTS):
        tokens[number * 16 : number * 16 + len(PROMPT)] = PROMPT
        slot = add_request(state, number, len(PROMPT), len(PROMPT) + ANSWER, number, 0)
        sampler.put(slot, SamplingParams(seed=number, max_tokens=ANSWER, ignore_eos=True, **params))
    speculated, by_position = np.zeros((len(state.request_id), 3), np.int64), np.zeros(DRAFTS, np.int64)
    while True:
        propose(state, tokens, sampler)
        schedule(state, plan)
        if plan.counts[PLAN_SIZE] == 0:
            break
        each, slots, generated = sampled_places(state, plan)
        places = state.hash_start[slots] * 16 + state.num_prompt_tokens[slots] + generated
        logits = MODEL[torch.from_numpy(tokens[places - 1]).long()]  # of the token before, proposed or not
        sampled = sampler.draw(logits, slots, generated)
        rule(state, plan, tokens, speculated, by_position, sampled, np.zeros(len(slots), np.bool_))
        first = np.cumsum(each) - each
        for row in range(int(plan.counts[PLAN_SIZE])):
            begin = int(state.hash_start[plan.slot[row]] * 16 + state.num_tokens[plan.slot[row]])
            kept = int(plan.accepted[row])
            tokens[begin : begin + kept] = sampled[first[row] : first[row] + kept]
        commit(state, plan)
    found = tokens.reshape(REQUESTS, 16)[:, len(PROMPT) : len(PROMPT) + ANSWER].astype(np.int64)
    return found, float(speculated[:, 2].sum() / max(1, speculated[:, 1].sum()))


def statistic(found: NDArray[np.int64], params: dict[str, Any]) -> float:
    """Pearson's, over all answers that the model may give."""
    rows = [
        sampling.reference(MODEL[last] / params.get("temperature", 1.0), params.get("top_k", 0), 1.0)
        for last in range(VOCAB)
    ]
    p = np.array(rows)
    expected = np.einsum("a,ab,bc->abc", p[PROMPT[-1]], p, p).ravel() * len(found)
    counts = np.bincount(found @ [16, 4, 1], minlength=64)
    assert (counts[expected == 0] == 0).all()
    likely = expected > 0
    return float(((counts - expected)[likely] ** 2 / expected[likely]).sum())


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize(
    ("propose", "races"), [(by_ngram, False), (by_ngram, True), (by_draft, True), (by_draft, False)]
)
def test_answers_have_the_models_distribution(params: dict[str, Any], propose: Propose, races: bool) -> None:
    found, accepted = answers(params, propose, keep_agreed, races)
    assert statistic(found, params) < CHI_SQUARE_63
    assert 0.1 < accepted < 0.95


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_answers_are_those_without_proposals_seed_by_seed(params: dict[str, Any]) -> None:
    for races, proposers in ((False, [by_ngram]), (True, [by_ngram, by_draft])):
        without, _ = answers(params, lambda *_: None, keep_agreed, races)
        for propose in proposers:
            assert (answers(params, propose, keep_agreed, races)[0] == without).all()


def keeps_every_third_anyway(state: State, plan: Any, tokens: Any, *rest: Any) -> None:
    """Wrong: a proposal now and then stays, though the model said another token."""
    _overrule(state, plan, tokens, rest[2], lambda number, place: (number + place) % 3 == 0)
    keep_agreed(state, plan, tokens, *rest)


def keeps_what_is_likely(state: State, plan: Any, tokens: Any, *rest: Any) -> None:
    """Wrong: a proposal stays where the model gives it a probability of 0.3 or more."""
    probability = torch.softmax(MODEL, 1).numpy()

    def likely(number: int, place: int) -> bool:
        return bool(probability[tokens[place - 1], tokens[place]] >= 0.3)

    _overrule(state, plan, tokens, rest[2], likely)
    keep_agreed(state, plan, tokens, *rest)


def _overrule(state: State, plan: Any, tokens: Any, sampled: Any, stays: Callable[[int, int], bool]) -> None:
    at = 0
    for row in range(int(plan.counts[PLAN_SIZE])):
        if plan.samples[row]:
            first = int(state.hash_start[plan.slot[row]] * 16 + state.num_tokens[plan.slot[row]])
            for i in range(int(plan.num_drafts[row])):
                if stays(int(state.request_id[plan.slot[row]]), first + i):
                    sampled[at + i] = tokens[first + i]
            at += 1 + int(plan.num_drafts[row])


@pytest.mark.parametrize("rule", [keeps_every_third_anyway, keeps_what_is_likely])
@pytest.mark.parametrize("propose", [by_ngram, by_draft])
def test_the_test_would_notice_a_wrong_rule(rule: Rule, propose: Propose) -> None:
    found, _ = answers({}, propose, rule, propose is by_draft)
    assert statistic(found, {}) > 2 * CHI_SQUARE_63


def test_drawing_again_where_a_proposal_was_rejected_would_be_noticed() -> None:
    """Wrong: where the proposal was not said, another draw from the whole distribution in the place of what was."""

    def again(state: State, plan: Any, tokens: Any, *rest: Any) -> None:
        sampled = rest[2]
        kept = sampled.copy()
        at = 0
        rng = np.random.default_rng(0)
        probability = torch.softmax(MODEL, 1).double().numpy()
        for row in range(int(plan.counts[PLAN_SIZE])):
            if plan.samples[row]:
                first = int(state.hash_start[plan.slot[row]] * 16 + state.num_tokens[plan.slot[row]])
                for i in range(int(plan.num_drafts[row])):
                    if kept[at + i] != tokens[first + i]:
                        of = probability[tokens[first + i - 1]]
                        sampled[at + i] = rng.choice(VOCAB, p=of / of.sum())
                at += 1 + int(plan.num_drafts[row])
        keep_agreed(state, plan, tokens, *rest)

    found, _ = answers({}, by_ngram, again, False)
    assert statistic(found, {}) > 2 * CHI_SQUARE_63
