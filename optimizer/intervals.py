"""How sure a prediction is: the trace's own noise (traces/confidence.py) and step-time error carried through the queue.

All intervals hold 90 %. The two sources are independent, so their half widths add in quadrature on a log scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..profiler.simulator import governed_rows
from ..traces.confidence import CONFIDENCE, Band, alike_neighbors, block_bootstrap, time_blocks
from ..traces.metrics import (
    E2E,
    PERCENTILES,
    TPOT,
    TTFT,
    Metric,
    RequestTimes,
    Target,
    judged_s,
    percentile,
    percentiles,
)
from ..traces.trace import Trace
from .front import key_of

__all__ = ["CONFIDENCE", "Band", "joined", "predicted", "sampled", "target_values"]


def sampled(
    times: RequestTimes, trace: Trace, targets: Sequence[Target], rng: np.random.Generator
) -> dict[str, tuple[float, Band]]:
    """Every percentile of TTFT, TTF-k, TPOT and E2E, and of every target: key -> (value, interval by bootstrap)."""
    found: dict[str, tuple[float, Band]] = {}
    for metric in (TTFT, Metric("ttf", times.k), TPOT, E2E):
        values = times.values(metric)
        alike = _alike(values, 95.0)
        bands = block_bootstrap(values, time_blocks(times, alike), PERCENTILES, rng, alike)
        for p, value, band in zip(PERCENTILES, percentiles(values, PERCENTILES), bands):
            found[key_of(metric, p)] = value, band
    for target in targets:
        rows = governed_rows(trace, target)
        values = np.where(times.finished, times.values(target.metric), np.inf)
        alike = _alike(values[rows], target.percentile)
        block = time_blocks(times, alike)[rows]
        values = values[rows]
        band = block_bootstrap(values, block, (target.percentile,), rng, alike)[0]
        found[str(target)] = percentiles(values, (target.percentile,))[0], band
    return found


def _alike(values: NDArray[np.float64], p: float) -> float:
    """How many neighbors are alike in what lies beyond a percentile."""
    known = values[~np.isnan(values)]
    return alike_neighbors(known > percentile(known, p))


def target_values(times: RequestTimes, trace: Trace, targets: Sequence[Target]) -> dict[str, float]:
    """The percentile of every target over the requests it governs, as `metrics.meets` judges it."""
    return {str(target): judged_s(times, target, governed_rows(trace, target)) for target in targets}


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
