"""How far a bar's figure depends on which groups of points happen to have been published.

Points of one group (GPU, engine, model) share who measured, the engine's version and its flags, so a set of other
points is like another draw of groups, not of points: the bootstrap draws whole groups with replacement (Davison and
Hinkley, Bootstrap Methods and their Application, 1997, section 3.8), and the jackknife leaves one out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from silicon_points import Point

Floats = NDArray[np.float64]
Figure = Callable[[Floats], float]
"""Of weights of the points, a bar's figure; nan where no weighted point has one."""


def weighted_median(values: Floats, weights: Floats) -> float:
    known = np.isfinite(values) & (weights > 0)
    if not known.any():
        return float("nan")
    order = np.argsort(values[known])
    total = np.cumsum(weights[known][order])
    return float(values[known][order][np.searchsorted(total, 0.5 * total[-1])])


def weighted_share(inside: Floats, weights: Floats) -> float:
    known = np.isfinite(inside) & (weights > 0)
    return float(np.average(inside[known], weights=weights[known])) if known.any() else float("nan")


def group_of(point: Point) -> tuple[str, str, str]:
    return point.system, point.engine, point.model


def print_spread(
    points: Sequence[Point], figures: Mapping[str, tuple[Figure, float, bool]], draws: int = 400, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Prints, and returns by name, the 5th and 95th percentile of each figure over draws of groups.

    Args:
        figures: name -> (figure, bar, True if at least the bar is asked)
    """
    groups = sorted({group_of(point) for point in points})
    place = np.array([groups.index(group_of(point)) for point in points])
    rng = np.random.default_rng(seed)
    drawn = [np.bincount(rng.integers(0, len(groups), len(groups)), minlength=len(groups)) for _ in range(draws)]
    print(
        f"\nspread over groups (GPU, engine, model): {draws} draws of {len(groups)} with replacement, and one left out"
    )
    print(f"  {'figure':38}{'all':>8}{'5 %':>8}{'median':>8}{'95 %':>8}{'bar':>7}{'met':>6}  worst without")
    found: dict[str, tuple[float, float]] = {}
    for name, (figure, bar, at_least) in figures.items():
        values = np.array([figure(counts[place].astype(np.float64)) for counts in drawn])
        values = values[np.isfinite(values)]
        if not len(values):
            continue
        met = values >= bar if at_least else values <= bar
        without = [(figure((place != k).astype(np.float64)), groups[k]) for k in range(len(groups))]
        without = [each for each in without if np.isfinite(each[0])]
        worst = (min if at_least else max)(without, key=lambda each: each[0]) if without else (float("nan"), ("",))
        low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
        found[name] = float(low), float(high)
        values_at = "".join(f"{v:8.3f}" for v in (figure(np.ones(len(points))), low, middle, high))
        print(f"  {name:38}{values_at}{bar:7.2f}{met.mean():6.0%}  {worst[0]:.3f} {' '.join(worst[1])}")
    return found
