"""How sure a percentile of a run is: block bootstrap over time, and whether the run is long enough for it.

Latencies of neighbors are alike (they stood in the same queue), so n requests say less than n independent ones would.
Whole blocks of equal time are drawn with replacement (Künsch, Annals of Statistics 17(3), 1989); a block is at least
a few times as long as neighbors stay alike in this run. One definition for simulated and measured runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metrics import E2E, PERCENTILES, TPOT, TTFT, Mask, Metric, RequestTimes, percentile, percentiles

Band = tuple[float, float]

CONFIDENCE = 0.9
RESAMPLES = 200

# Blocks of equal time that are drawn whole, so that bursts and queues stay in one piece; the requests of a block at
# least, and how many times as long as neighbors stay alike.
BLOCKS = 40
LEAST_PER_BLOCK = 10
BLOCK_PER_CORRELATION = 6

# With fewer blocks a bootstrap sees too few different draws for an interval of CONFIDENCE.
LEAST_BLOCKS = 8
# So many independent values must lie beyond a percentile: with fewer the few largest decide where it lies.
LEAST_BEYOND = 10
# An interval that reaches further than this share of its value does not tell two deployments apart.
WIDEST = 0.25

_SEED = 20260701


@dataclass(frozen=True)
class Estimate:
    """One percentile of a run and how sure it is; seconds.

    low, high    90 % interval by block bootstrap over time; NaN where the run is a single block
    requests     that it was taken of
    independent  how many independent requests would say as much (requests / how many neighbors are alike)
    needed_s     about how long a run of this traffic must be for this percentile
    duration_s   how long this one was, from the first to the last arrival
    why          what the run is too short for; empty where it is long enough
    """

    metric: str
    percentile: float
    value: float
    low: float
    high: float
    requests: int
    independent: float
    needed_s: float
    duration_s: float
    why: str

    @property
    def enough(self) -> bool:
        return not self.why


def alike_neighbors(beyond: Mask) -> float:
    """How many requests in a row say as much as one: the integrated autocorrelation time of a sequence, at least 1.

    1 + 2 * the sum of the autocorrelations, summed in pairs until a pair is no longer positive (Geyer, Statistical
    Science 7(4), 1992, the initial positive sequence).

    Args:
        beyond: (n,) whether each request, in order of time, lies beyond the percentile that is asked for.
    """
    n = len(beyond)
    centered = beyond - beyond.mean() if n else np.zeros(0)
    variance = float(np.dot(centered, centered))
    if n < 4 or variance == 0.0:
        return 1.0
    spectrum = np.fft.rfft(centered, 1 << (2 * n - 1).bit_length())
    correlation = np.fft.irfft(spectrum * spectrum.conj())[: n // 2] / variance
    pairs = correlation[: len(correlation) // 2 * 2].reshape(-1, 2).sum(axis=1)
    positive = len(pairs) if (pairs > 0).all() else int(np.argmax(pairs <= 0))
    return max(1.0, 2.0 * float(pairs[:positive].sum()) - 1.0)


def time_blocks(times: RequestTimes, alike: float = 1.0) -> NDArray[np.int64]:
    """The block of each request: at most BLOCKS spans of equal time, fewer for short runs.

    Args:
        alike: neighbors that are alike (`alike_neighbors`).
    """
    blocks = max(1, min(BLOCKS, int(len(times) / _per_block(alike))))
    if not len(times):
        return np.zeros(0, np.int64)
    since_s = times.scheduled_s - times.scheduled_s.min()
    span_s = max(float(since_s.max()), 1e-9)
    block: NDArray[np.int64] = np.minimum((since_s / span_s * blocks).astype(np.int64), blocks - 1)
    return block


def _per_block(alike: float) -> float:
    return max(LEAST_PER_BLOCK, BLOCK_PER_CORRELATION * alike)


def block_bootstrap(
    values: NDArray[np.float64],
    block: NDArray[np.int64],
    ps: Sequence[float],
    rng: np.random.Generator,
    alike: float = 1.0,
) -> list[Band]:
    """90 % interval of each percentile when whole blocks of requests are drawn with replacement.

    With few blocks their spread is itself uncertain, and neighbors on both sides of a cut count as independent; the
    interval is stretched by what theory says of both (`_stretch`).

    Args:
        values: (n,) seconds; NaN is left out, infinity is a value.
        block: (n,) block of each request, 0 <= block.
        ps: percentiles.
        alike: neighbors that are alike (`alike_neighbors`).
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
    found = []
    for value, column in zip(percentiles(values, ps), drawn.T):
        low, high = percentiles(column, (tail, 100 - tail))
        if math.isfinite(low) and math.isfinite(high) and len(present) > 1:
            stretch = _stretch(len(present), len(values) / len(present), alike)
            low, high = max(min(values[0], low), value - stretch * (value - low)), value + stretch * (high - value)
        found.append((float(low), float(high)))
    return found


def _stretch(blocks: int, length: float, alike: float) -> float:
    """How much wider an interval is than the spread of draws of so many blocks of so many requests.

    Student's t over the normal quantile (Abramowitz and Stegun, 26.7.5); sqrt(m / (m - 1)) of m blocks; and what the
    cuts lose: blocks of length l have 1 - (a - 1 / a) / (2 l) of the variance where correlation falls geometrically
    and sums up to a, `alike` (the sum of (1 - k / l) times the correlation at lag k).
    """
    z, freedom = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2), blocks - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    lost = min(0.5, (alike - 1 / alike) / (2 * length))
    return t / z * math.sqrt(blocks / freedom / (1 - lost))


def estimate(times: RequestTimes, metric: Metric, p: float, rows: Mask | None = None) -> Estimate:
    """A percentile of a run with its interval, and how long a run it takes.

    Requests without a value (unfinished ones, TPOT of one token) are left out, as in `summarize`. Of ITL each request
    counts with its longest gap, which the percentile over all gaps is not: `values` of RequestTimes.
    """
    values = times.values(metric)
    if rows is not None:
        values = np.where(rows, values, np.nan)
    # where requests wait for others, the order of the log is not that of time
    order = np.argsort(times.scheduled_s, kind="stable")
    values = values[order]
    known = ~np.isnan(values)
    n = int(known.sum())
    duration_s = float(np.ptp(times.scheduled_s)) if len(times) else 0.0
    value = percentile(values, p)
    if n == 0:
        return Estimate(str(metric), p, value, math.nan, math.nan, 0, 0.0, math.inf, duration_s, "no request has one")
    alike = alike_neighbors(values[known] > value)
    block = time_blocks(times, alike)[order]
    low = high = math.nan  # a single block says nothing of how blocks differ
    if len(np.unique(block[known])) > 1:
        low, high = block_bootstrap(values, block, (p,), np.random.default_rng(_SEED), alike)[0]
    independent = n / alike
    reach = max(high / value - 1, 1 - low / value) if 0 < value < math.inf and low == low else 0.0
    beyond = independent * (1 - p / 100)
    factors = {
        f"{beyond:.1f} independent requests beyond it; {LEAST_BEYOND} are enough": LEAST_BEYOND / beyond,
        f"{n / _per_block(alike):.1f} independent stretches; {LEAST_BLOCKS} are enough": (
            LEAST_BLOCKS * _per_block(alike) / n
        ),
        f"its interval reaches {reach:.0%} from it; {WIDEST:.0%} is narrow enough": (reach / WIDEST) ** 2,
    }
    why = max(factors, key=lambda each: factors[each])
    needed_s = duration_s * factors[why]
    return Estimate(
        str(metric), p, value, low, high, n, independent, needed_s, duration_s, why if factors[why] > 1 else ""
    )


def estimates(times: RequestTimes, ps: Sequence[float] = PERCENTILES, rows: Mask | None = None) -> tuple[Estimate, ...]:
    """Every percentile of TTFT, TTF-k, TPOT and E2E."""
    return tuple(estimate(times, metric, p, rows) for metric in (TTFT, Metric("ttf", times.k), TPOT, E2E) for p in ps)


def plain(found: Sequence[Estimate]) -> Mapping[str, Any]:
    """As JSON: metric:pNN -> interval, whether the run is long enough, and how long would be."""
    return {
        f"{each.metric}:p{each.percentile:g}": {
            "value": each.value,
            "low": each.low,
            "high": each.high,
            "requests": each.requests,
            "independent": each.independent,
            "enough": each.enough,
            "needed_s": each.needed_s,
            "why": each.why,
        }
        for each in found
    }
