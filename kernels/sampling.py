"""From logits to tokens: the best one, or one drawn from what top-k and top-p leave. What is random comes in.

`draw` inverts the cumulative distribution at a uniform number: of all tokens in their order, or, where they are cut, of
those left, best first. `race` lets every token arrive after an exponential time of its own and takes the first, which
is the same distribution (the Gumbel-max trick: Maddison et al., arXiv:1411.0030): where another distribution that is
nearly the same is raced with the same seed, mostly the same token wins, more often than one number picks it in both.
C++ does either in a pass over a row and the cut on a heap; torch, where there is no compiler, sorts, as it does for
logits on a GPU, where they lie (a race goes on with the order on the host).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import placement
from .cpu.build import load
from .cpu.workspace import WORKSPACE

TORCH_ROWS = 64  # sampled at a time by torch, which takes three float64 copies of them
_TOP_P_CANDIDATES = 1024  # enough for nearly every nucleus; rows that need more are sorted whole


def reference(logits: Tensor, top_k: int, top_p: float) -> NDArray[np.float64]:
    """(vocab_size,) float64: the probability of each token of a row (vocab_size,), of equal logits the first kept."""
    order = torch.argsort(logits.double(), descending=True, stable=True)
    order = order[: top_k or None]
    probability = torch.softmax(logits.double()[order], dim=0)
    before = probability.cumsum(dim=0) - probability
    kept = before < top_p
    kept[0] = True
    found = torch.zeros(logits.shape, dtype=torch.float64)
    found[order[kept]] = probability[kept] / probability[kept].sum()
    return found.numpy()


def argmax(logits: Tensor, *, backend: str | None = None) -> NDArray[np.int64]:
    """The best token of each row of (rows, vocab_size) fp32; of equal ones the first."""
    library = None if backend == "torch" or placement.on_gpu(logits) else load()
    if library is None or logits.stride(1) != 1:
        return logits.argmax(dim=1).cpu().numpy()
    tokens = np.empty(len(logits), np.int64)
    library.argmax(logits.data_ptr(), logits.stride(0), *logits.shape, tokens.ctypes.data, torch.get_num_threads())
    return tokens


def draw(
    logits: Tensor,
    uniform: NDArray[np.float64],
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float64],
    *,
    backend: str | None = None,
) -> NDArray[np.int64]:
    """One token per row of softmax(logits), cut to the top_k best (0 = all) and then to the top_p nucleus.

    Args:
        logits: (rows, vocab_size) fp32, divided by the temperature already.
        uniform: (rows,) in [0, 1).
        top_k, top_p: (rows,); the nucleus is of the fewest tokens that have at least this probability (Holtzman et
            al., arXiv:1904.09751).
        backend: "torch", or left out: C++ where there is a compiler.
    """
    library = None if backend == "torch" or placement.on_gpu(logits) else load()
    if library is None or logits.stride(1) != 1:
        return _by_parts(_torch_draw, logits, uniform, top_k, top_p)
    return _chosen(library.draw, logits, np.ascontiguousarray(uniform, np.float64), top_k, top_p)


def race(
    logits: Tensor,
    seeds: NDArray[np.uint64],
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float64],
    *,
    backend: str | None = None,
) -> NDArray[np.int64]:
    """`draw` by a race: of equal seeds (rows,) each token has the same number in every row, whatever the logits."""
    library = None if backend == "torch" or placement.on_gpu(logits) else load()
    if library is None or logits.stride(1) != 1:
        return _by_parts(_torch_race, logits, seeds, top_k, top_p)
    return _chosen(library.race, logits, np.ascontiguousarray(seeds, np.uint64), top_k, top_p)


def _by_parts(
    operator: Callable[..., NDArray[np.int64]],
    logits: Tensor,
    random: NDArray[np.float64] | NDArray[np.uint64],
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float64],
) -> NDArray[np.int64]:
    tokens = np.empty(len(random), np.int64)
    for at in range(0, len(tokens), TORCH_ROWS):
        part = slice(at, at + TORCH_ROWS)
        tokens[part] = operator(logits[part], random[part], top_k[part], top_p[part])
    return tokens


def _chosen(
    operator: Callable[..., int],
    logits: Tensor,
    random: NDArray[np.float64] | NDArray[np.uint64],
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float64],
) -> NDArray[np.int64]:
    top_k, top_p = np.ascontiguousarray(top_k, np.int64), np.ascontiguousarray(top_p, np.float64)
    tokens = np.empty(len(random), np.int64)
    arguments = (
        logits.data_ptr(), logits.stride(0), *logits.shape, random.ctypes.data, top_k.ctypes.data, top_p.ctypes.data,
        tokens.ctypes.data,
    )  # fmt: skip
    threads = torch.get_num_threads()
    needed = operator(*arguments, WORKSPACE.address, WORKSPACE.nbytes, threads)
    if needed > 0:
        WORKSPACE.grow(needed)
        operator(*arguments, WORKSPACE.address, WORKSPACE.nbytes, threads)
    return tokens


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's mixing of 64 bits (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _torch_race(
    logits: Tensor, seeds: NDArray[np.uint64], top_k: NDArray[np.int64], top_p: NDArray[np.float64]
) -> NDArray[np.int64]:
    # the numbers of the tokens are made on the host, so the rest is done there, too
    best, order = (each.cpu() for each in torch.sort(logits.double(), dim=1, descending=True, stable=True))
    limit = torch.from_numpy(np.where(top_k > 0, top_k, logits.shape[1]))[:, None]
    probability = torch.softmax(best.masked_fill(torch.arange(logits.shape[1]) >= limit, -math.inf), dim=1)
    before = probability.cumsum(dim=1) - probability
    probability = probability.masked_fill((before >= torch.from_numpy(top_p)[:, None]) & (before > 0), 0)
    places = (order.numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    numbers = ((mix(seeds[:, None] + places) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    first = (probability.numpy() / -np.log(numbers)).argmax(axis=1)
    return order.gather(1, torch.from_numpy(first)[:, None])[:, 0].numpy()


def _torch_draw(
    logits: Tensor, uniform: NDArray[np.float64], top_k: NDArray[np.int64], top_p: NDArray[np.float64]
) -> NDArray[np.int64]:
    tokens = np.empty(len(uniform), np.int64)
    cut = (top_k > 0) | (top_p < 1)
    whole = np.flatnonzero(~cut)
    if len(whole):
        mass = torch.softmax(logits[torch.from_numpy(whole)].double(), dim=1).cumsum(dim=1)
        tokens[whole] = _pick(mass, uniform[whole]).cpu().numpy()
    rows = np.flatnonzero(cut)
    candidates = min(logits.shape[1], max(int(top_k.max()), _TOP_P_CANDIDATES))
    while len(rows):
        done, found = _draw_cut(logits[torch.from_numpy(rows)], uniform[rows], top_k[rows], top_p[rows], candidates)
        tokens[rows[done]] = found[done]
        rows = rows[~done]
        candidates = logits.shape[1]
    return tokens


def _draw_cut(
    logits: Tensor, uniform: NDArray[np.float64], top_k: NDArray[np.int64], top_p: NDArray[np.float64], candidates: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Draw among the `candidates` best tokens; False where they hold less than the nucleus: look at more."""
    best, order = torch.topk(logits.double(), candidates, dim=1)
    device = logits.device
    limit = torch.from_numpy(np.where(top_k > 0, top_k, candidates)).to(device)[:, None]
    best = best.masked_fill(torch.arange(candidates, device=device) >= limit, -math.inf)
    total = torch.where(torch.from_numpy(top_k > 0).to(device), best.logsumexp(dim=1), logits.double().logsumexp(dim=1))
    probability = (best - total[:, None]).exp()
    before = probability.cumsum(dim=1) - probability
    nucleus = torch.from_numpy(top_p).to(device)[:, None]
    done = (
        (top_k > 0)
        | (before[:, -1] + probability[:, -1] >= nucleus[:, 0]).cpu().numpy()
        | (candidates == logits.shape[1])
    )
    mass = probability.masked_fill((before >= nucleus) & (before > 0), 0).cumsum(dim=1)
    place = _pick(mass, uniform)
    return done, order.gather(1, place[:, None])[:, 0].cpu().numpy()


def _pick(mass: Tensor, uniform: NDArray[np.float64]) -> Tensor:
    """The first place of each row whose cumulative mass exceeds uniform * the row's total."""
    target = torch.from_numpy(uniform).to(mass.device)[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, target, right=True)[:, 0].clamp(max=mass.shape[1] - 1)
