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
