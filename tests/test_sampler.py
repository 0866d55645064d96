"""Sampling: the distribution is the one asked for, and a row's token depends on nothing but the row."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from paretune.runtime.sampler import BadRequest, Sampler, SamplingParams, draw, uniforms

VOCAB = 50
EOS = 7


def sampler_with(*params: SamplingParams, vocab: int = VOCAB) -> Sampler:
    sampler = Sampler(len(params), vocab, (EOS,))
    for slot, of_slot in enumerate(params):
        sampler.put(slot, of_slot)
    return sampler


def expected_probabilities(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """By transformers' own warpers, in float64."""
    scores = logits.double()[None] / temperature
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return torch.softmax(scores, dim=1)[0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.6), (0.9, 12, 0.8), (1.0, 1, 1.0)]
)
def test_tokens_come_with_the_probabilities_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(VOCAB) * 2
    expected = expected_probabilities(logits, temperature, top_k, top_p).numpy()
    draws = 40_000
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=3, max_tokens=draws)
    sampler = sampler_with(params)
    counts = np.zeros(VOCAB)
    for first in range(0, draws, 4000):
        generated = np.arange(first, first + 4000)
        tokens, _ = sampler.sample(logits.repeat(4000, 1), np.zeros(4000, np.int64), generated)
        counts += np.bincount(tokens, minlength=VOCAB)
    assert (counts[expected == 0] == 0).all()
    # total variation of 40,000 draws from 50 outcomes is about 0.013; a wrong cut or temperature gives far more
    assert np.abs(counts / draws - expected).sum() / 2 < 0.02


def test_a_nucleus_wider_than_the_first_candidates_is_whole() -> None:
    vocab = 5000  # all alike: 90 % of the mass takes 4500 tokens
    uniform = (np.arange(1000) + 0.5) / 1000
    logits = torch.linspace(0, 1e-3, vocab).repeat(1000, 1)
    tokens = draw(logits, uniform, np.zeros(1000, np.int64), np.full(1000, 0.9))
    assert tokens.min() < vocab - 4400
    assert tokens.min() >= vocab - 4501


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_token_does_not_depend_on_the_rest_of_the_batch(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    params = [
        SamplingParams(
            temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
            top_k=data.draw(st.sampled_from([0, 3, 40])),
            top_p=data.draw(st.sampled_from([1.0, 0.5])),
            seed=data.draw(st.integers(0, 5)),
            min_tokens=data.draw(st.sampled_from([0, 9])),
            logprobs=data.draw(st.sampled_from([None, 0, 3])),
        )
        for _ in range(data.draw(st.integers(1, 6)))
    ]
    sampler = sampler_with(*params)
    logits = torch.from_numpy(rng.normal(0, 2, (len(params), VOCAB)).astype(np.float32))
    generated = rng.integers(0, 12, len(params))
    together, told = sampler.sample(logits.clone(), np.arange(len(params)), generated)
    for row in range(len(params)):
        alone, told_alone = sampler.sample(logits[row : row + 1].clone(), np.array([row]), generated[row : row + 1])
        assert alone[0] == together[row]
        assert told_alone[0] == told[row]


def test_greedy_takes_the_best_token_whatever_the_other_parameters_say() -> None:
    sampler = sampler_with(SamplingParams(temperature=0, top_k=3, top_p=0.1, seed=1))
    logits = torch.randn(1, VOCAB)
    tokens, _ = sampler.sample(logits, np.array([0]), np.array([0]))
    assert tokens[0] == logits[0].argmax()
    assert sampler.argmax_will_do(np.array([0]), np.array([0]))


def test_stop_tokens_are_banned_until_min_tokens_and_end_the_answer_after() -> None:
    sampler = sampler_with(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(11,)))
    slots = np.array([0])
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 11], logits[0, 20] = 9, 8, 7
    assert [int(sampler.sample(logits.clone(), slots, np.array([n]))[0][0]) for n in range(3)] == [20, 20, EOS]
    assert not sampler.argmax_will_do(slots, np.array([1]))
    assert sampler.argmax_will_do(slots, np.array([2]))
    assert [bool(sampler.ends(slots, np.array([token]))[0]) for token in (EOS, 11, 20)] == [True, True, False]


def test_ignore_eos_makes_it_a_token_like_others() -> None:
    sampler = sampler_with(SamplingParams(temperature=0, min_tokens=2, ignore_eos=True))
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS] = 1
    assert sampler.sample(logits, np.array([0]), np.array([0]))[0][0] == EOS
    assert not sampler.ends(np.array([0]), np.array([EOS]))[0]


def test_logprobs_are_the_models_own_whatever_the_temperature() -> None:
    torch.manual_seed(2)
    logits = torch.randn(1, VOCAB)
    expected = torch.log_softmax(logits[0].double(), dim=0)
    sampler = sampler_with(SamplingParams(temperature=0.3, top_k=2, seed=5, logprobs=4))
    tokens, told = sampler.sample(logits.clone(), np.array([0]), np.array([0]))
    assert told[0] is not None
    assert told[0].token_id == tokens[0]
    assert told[0].logprob == pytest.approx(float(expected[tokens[0]]), abs=1e-5)
    best = expected.topk(4)
    assert [token for token, _ in told[0].top] == best.indices.tolist()
    assert [value for _, value in told[0].top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_uniform_numbers_are_uniform_and_streams_of_neighbors_are_unrelated() -> None:
    index = np.arange(20_000)
    streams = [uniforms(np.full(20_000, seed, np.uint64), index) for seed in (0, 1, 2**64 - 1)]
    for stream in streams:
        assert stream.min() >= 0
        assert stream.max() < 1
        largest_gap = np.abs(np.sort(stream) - (index + 0.5) / 20_000).max()
        assert largest_gap < 1.95 / math.sqrt(20_000)  # Kolmogorov-Smirnov at 0.1 %
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(streams[one], streams[other])[0, 1]) < 0.03
    assert abs(np.corrcoef(streams[0][1:], streams[0][:-1])[0, 1]) < 0.03


def test_no_seed_is_another_seed_each_time() -> None:
    sampler = sampler_with(*[SamplingParams(max_tokens=9)] * 40)
    tokens, _ = sampler.sample(torch.zeros(40, VOCAB), np.arange(40), np.zeros(40, np.int64))
    assert len(set(tokens.tolist())) > 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("logprobs", 21),
        ("seed", 1 << 64),
    ],
)
def test_parameters_that_make_no_sense_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(BadRequest, match=field):
        SamplingParams(**{field: value})
