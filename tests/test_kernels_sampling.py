"""Sampling operators: the probabilities are those of float64, and C++ and torch pick the same tokens."""

import numpy as np
import pytest
import torch

from paretune.kernels import sampling
from paretune.kernels.cpu.build import load

BACKENDS = ["torch", pytest.param(None, marks=pytest.mark.skipif(load() is None, reason="no C++ compiler"))]
CUTS = [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.6), (12, 0.8), (0, 1e-9), (300, 0.999)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
@pytest.mark.parametrize("vocab", [1, 17, 127, 300])
def test_evenly_spread_numbers_give_every_token_its_share(backend, top_k, top_p, vocab):
    torch.manual_seed(vocab)
    logits, draws = 2 * torch.randn(vocab), 4000
    top_k = min(top_k, vocab)
    uniform = (np.arange(draws) + 0.5) / draws
    tokens = sampling.draw(
        logits.expand(draws, vocab), uniform, np.full(draws, top_k), np.full(draws, top_p), backend=backend
    )
    expected = sampling.reference(logits, top_k, top_p)
    counts = np.bincount(tokens, minlength=vocab)
    assert (counts[expected == 0] == 0).all()
    assert np.abs(counts - draws * expected).max() <= 1.01  # a share begins and ends between two numbers


@pytest.mark.skipif(load() is None, reason="no C++ compiler")
@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
def test_both_backends_pick_the_same_tokens(top_k, top_p):
    torch.manual_seed(1)
    logits, uniform = torch.randn(200, 1000), np.random.default_rng(0).random(200)
    cuts = np.full(200, top_k), np.full(200, top_p)
    ours, theirs = (sampling.draw(logits, uniform, *cuts, backend=backend) for backend in (None, "torch"))
    assert (ours == theirs).mean() >= 0.99  # a number that falls on the border of two tokens may go either way


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_best_token_is_the_first_of_the_best(backend):
    logits = torch.randn(5, 300)
    logits[0, 7] = logits[0, 200] = 99.0
    logits[1] = 0.0
    logits[2] = -torch.inf
    logits[3, 299] = 99.0
    assert sampling.argmax(logits, backend=backend)[:4].tolist() == [7, 0, 0, 299]
    logits[4, 150] = float("nan")
    assert sampling.argmax(logits, backend=backend)[4] == 150
    assert sampling.argmax(logits[:, 100:250], backend=backend).tolist() == logits[:, 100:250].argmax(dim=1).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_banned_tokens_are_never_drawn(backend):
    logits = torch.full((50, 64), -torch.inf)
    logits[:, [3, 40]] = 0.0
    uniform = np.linspace(0, 1, 50, endpoint=False)
    for top_k, top_p in ((0, 1.0), (10, 1.0), (0, 0.9), (10, 0.9)):
        tokens = sampling.draw(logits, uniform, np.full(50, top_k), np.full(50, top_p), backend=backend)
        assert set(tokens.tolist()) == {3, 40}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
@pytest.mark.parametrize("vocab", [1, 17, 300])
def test_races_are_won_with_the_probabilities_of_the_tokens(backend, top_k, top_p, vocab):
    torch.manual_seed(vocab)
    logits, draws = 2 * torch.randn(vocab), 20_000
    top_k = min(top_k, vocab)
    seeds = np.random.default_rng(5).integers(0, 2**64, draws, np.uint64)
    tokens = sampling.race(
        logits.expand(draws, vocab), seeds, np.full(draws, top_k), np.full(draws, top_p), backend=backend
    )
    expected = sampling.reference(logits, top_k, top_p)
    counts = np.bincount(tokens, minlength=vocab)
    assert (counts[expected == 0] == 0).all()
    likely = draws * expected >= 5
    statistic = ((counts - draws * expected)[likely] ** 2 / (draws * expected)[likely]).sum()
    degrees = max(1, int(likely.sum()) - 1)
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)  # five standard deviations of chi-square
    assert counts[~likely].sum() <= 5 + 3 * draws * expected[~likely].sum()


@pytest.mark.skipif(load() is None, reason="no C++ compiler")
@pytest.mark.parametrize(("top_k", "top_p"), CUTS)
def test_both_backends_name_the_same_winners(top_k, top_p):
    torch.manual_seed(1)
    logits, seeds = torch.randn(200, 1000), np.random.default_rng(0).integers(0, 2**64, 200, np.uint64)
    cuts = np.full(200, top_k), np.full(200, top_p)
    ours, theirs = (sampling.race(logits, seeds, *cuts, backend=backend) for backend in (None, "torch"))
    assert (ours == theirs).mean() >= 0.99  # the cut, and a photo finish, may go either way


def test_two_that_are_nearly_alike_mostly_have_the_same_winner_and_more_often_than_one_number_picks_it():
    """At least (1 - t) / (1 + t) of the time, for distributions at total variation t (arXiv:2408.07978)."""
    torch.manual_seed(3)
    model = 2 * torch.randn(500)
    draft, draws = model + 0.4 * torch.randn(500), 20_000
    p, q = (sampling.reference(logits, 0, 1.0) for logits in (model, draft))
    distance = np.abs(p - q).sum() / 2
    cuts = np.zeros(draws, np.int64), np.ones(draws)
    seeds = np.random.default_rng(6).integers(0, 2**64, draws, np.uint64)
    uniform = np.random.default_rng(7).random(draws)
    raced, picked = (
        [operator(logits.expand(draws, 500), random, *cuts) for logits in (model, draft)]
        for operator, random in ((sampling.race, seeds), (sampling.draw, uniform))
    )
    same = (raced[0] == raced[1]).mean()
    assert (1 - distance) / (1 + distance) - 0.015 < same < 1 - distance + 0.015
    assert same > (picked[0] == picked[1]).mean() + 0.1
