"""How sure a figure is: block bootstrap over time for the trace's own noise, step-time error carried through the queue.

All intervals hold 90 %. The two sources are independent, so their half widths add in quadrature on a log scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..profiler.simulator import governed_rows
from ..traces.metrics import E2E, PERCENTILES, TPOT, TTFT, Metric, RequestTimes, Target, percentiles
from ..traces.trace import Trace
from .front import key_of

CONFIDENCE = 0.9
RESAMPLES = 200

# Blocks of equal time that are drawn whole, so that bursts and queues stay in one piece.
BLOCKS = 40

Band = tuple[float, float]


def block_bootstrap(
    values: NDArray[np.float64], block: NDArray[np.int64], ps: Sequence[float], rng: np.random.Generator
) -> list[Band]:
    """90 % interval of each percentile when whole blocks of requests are drawn with replacement (Künsch 1989).

    Args:
        values: (n,) seconds; NaN is left out, infinity is a value.
        block: (n,) block of each request, 0 <= block < BLOCKS.
        ps: percentiles.
    Returns: (low, high) for each of ps; NaN where no value is left.
    """
    known = ~np.isnan(values)
    values, block = values[known], block[known]
    if not len(values):
        return [(math.nan, math.nan)] * len(ps)
    order = np.argsort(values, kind="stable")
    values, block = values[order], block[order]
    present = np.unique(block)
    drawn = np.empty((RESAMPLES, len(ps)))
    for i in range(RESAMPLES):
        weight = np.bincount(rng.choice(present, len(present)), minlength=int(present[-1]) + 1)
        upto = np.cumsum(weight[block])
        ranks = np.asarray(ps) / 100 * (upto[-1] - 1)
        # the order statistics on both sides of each rank, requests counted as often as their block was drawn
        below = values[np.searchsorted(upto, np.floor(ranks), side="right")]
        above = values[np.searchsorted(upto, np.ceil(ranks), side="right")]
        share = ranks - np.floor(ranks)
        with np.errstate(invalid="ignore"):  # infinity minus infinity, where both neighbors are
            drawn[i] = np.where(below == above, below, below + share * (above - below))
    tail = 50 * (1 - CONFIDENCE)
    return [(low, high) for low, high in (percentiles(column, (tail, 100 - tail)) for column in drawn.T)]


def time_blocks(times: RequestTimes) -> NDArray[np.int64]:
    """The block of each request: BLOCKS spans of equal time, fewer for short runs (10 requests a block or more)."""
    blocks = max(1, min(BLOCKS, len(times) // 10))
    since_s = times.scheduled_s - times.scheduled_s[0]
    span_s = max(float(since_s[-1]), 1e-9)
    block: NDArray[np.int64] = np.minimum((since_s / span_s * blocks).astype(np.int64), blocks - 1)
    return block


def sampled(
    times: RequestTimes, trace: Trace, targets: Sequence[Target], rng: np.random.Generator
) -> dict[str, tuple[float, Band]]:
    """Every percentile of TTFT, TTF-k, TPOT and E2E, and of every target: key -> (value, interval by bootstrap)."""
    block = time_blocks(times)
    found: dict[str, tuple[float, Band]] = {}
    for metric in (TTFT, Metric("ttf", times.k), TPOT, E2E):
        values = times.values(metric)
        bands = block_bootstrap(values, block, PERCENTILES, rng)
        for p, value, band in zip(PERCENTILES, percentiles(values, PERCENTILES), bands):
            found[key_of(metric, p)] = value, band
    for target in targets:
        rows = governed_rows(trace, target)
        values = np.where(times.finished, times.values(target.metric), np.inf)[rows]
        band = block_bootstrap(values, block[rows], (target.percentile,), rng)[0]
        found[str(target)] = percentiles(values, (target.percentile,))[0], band
    return found


def target_values(times: RequestTimes, trace: Trace, targets: Sequence[Target]) -> dict[str, float]:
    """The percentile of every target over the requests it governs; unfinished ones count as infinitely late."""
    found = {}
    for target in targets:
        rows = governed_rows(trace, target)
        values = np.where(times.finished, times.values(target.metric), np.inf)[rows]
        found[str(target)] = percentiles(values, (target.percentile,))[0]
    return found


def joined(value: float, *bands: Band) -> Band:
    """One interval around a value from independent ones: half widths in quadrature, on a log scale.

    >>> low, high = joined(1.0, (0.5, 2.0), (1.0, 1.0))
    >>> round(low, 6), round(high, 6)
    (0.5, 2.0)
    """
    if not (0 < value < math.inf):
        return value, value
    down = math.hypot(*(max(0.0, math.log(value / low)) if low > 0 else math.inf for low, _ in bands))
    up = math.hypot(*(max(0.0, math.log(high / value)) if high < math.inf else math.inf for _, high in bands))
    return value * math.exp(-down), value * math.exp(up)


def predicted(
    central: Mapping[str, tuple[float, Band]], fast: Mapping[str, float], slow: Mapping[str, float]
) -> dict[str, Band]:
    """Intervals of a simulated run from its bootstrap and from two runs with step times at both ends of their error."""
    found = {}
    for key, (value, band) in central.items():
        if math.isnan(value):
            continue
        ends = sorted(x for x in (fast[key], value, slow[key]) if not math.isnan(x))
        found[key] = joined(value, band, (ends[0], ends[-1]))
    return found
