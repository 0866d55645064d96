"""How well predictions rank configurations at equal load, and how well any could.

Two measured points make a pair where they were measured under the same load (clients, prompt and answer lengths) on
different configurations (GPU, engine, model, precision, ranks, parts of the experts: what a row says and a prediction
is given). Two measurements of one configuration are no pair: nothing is chosen between them. Kendall's tau-b over all
pairs: agreeing less disagreeing ones, over the geometric mean of pairs not tied in either; a tie in the predictions
alone costs as half a disagreement. The same within one model is printed beside it, which is what a person chooses.

What limits it: points closer than their own noise, and what rows leave out (version, flags, speculation), which a
prediction that is given a row cannot know.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from silicon_points import Point

Floats = NDArray[np.float64]
Places = NDArray[np.intp]


class Pairs(NamedTuple):
    """Places of both points of each pair."""

    left: Places
    right: Places

    def only(self, which: NDArray[np.bool_]) -> Pairs:
        return Pairs(self.left[which], self.right[which])


def configuration(point: Point) -> tuple[object, ...]:
    return (*point.group, point.deployed.expert_parallel)


def load(point: Point) -> tuple[int, int, int]:
    return point.load.clients, point.load.input_tokens, point.load.output_tokens


def pairs_at_equal_load(points: Sequence[Point]) -> Pairs:
    alike = defaultdict(list)
    for place, point in enumerate(points):
        alike[load(point)].append(place)
    left, right = [], []
    for places in alike.values():
        for order, one in enumerate(places):
            for other in places[order + 1 :]:
                if configuration(points[one]) != configuration(points[other]):
                    left.append(one)
                    right.append(other)
    return Pairs(np.array(left, np.intp), np.array(right, np.intp))


def of_one_model(points: Sequence[Point], pairs: Pairs) -> NDArray[np.bool_]:
    return np.array([points[i].model == points[j].model for i, j in zip(*pairs, strict=True)], np.bool_)


def tau(pairs: Pairs, measured: Floats, predicted: Floats, weights: Floats | None = None) -> float:
    """Kendall's tau-b ("The treatment of ties in ranking problems", Biometrika 33(3), 1945); nan without a pair."""
    by_measured = np.sign(measured[pairs.left] - measured[pairs.right])
    by_predicted = np.sign(predicted[pairs.left] - predicted[pairs.right])
    of = np.ones(len(by_measured)) if weights is None else weights
    untied = (of * by_measured**2).sum() * (of * by_predicted**2).sum()
    return float((of * by_measured * by_predicted).sum() / np.sqrt(untied)) if untied > 0 else float("nan")


def noise(points: Sequence[Point], measured: Floats) -> tuple[float, int]:
    """Standard deviation of the logarithm of one measurement, and of how many differences it is the estimate.

    From third differences along curves over doubling clients, whose variance is 20 times that of a value (1, 3, 3, 1
    squared); the median, so that a start-up wave is no noise. What is curved beyond a parabola counts as noise.
    """
    curves: dict[tuple[object, ...], dict[int, int]] = defaultdict(dict)
    for place, point in enumerate(points):
        curves[point.curve].setdefault(point.load.clients, place)
    found: list[float] = []
    for curve in curves.values():
        for clients in curve:
            four = [curve[clients * 2**k] for k in range(4) if clients * 2**k in curve]
            if len(four) == 4:
                a, b, c, d = np.log(measured[four])
                found.append(float(abs(d - 3 * c + 3 * b - a) / np.sqrt(20.0)))
    return (float(np.median(found)) / 0.6745 if found else float("nan")), len(found)


def ceiling(
    pairs: Pairs, measured: Floats, deviation: float, known: Floats | None = None, draws: int = 100, seed: int = 0
) -> float:
    """Mean tau of measurements with those measured once more, or with what is known of them, blurred as much: what
    noise leaves to a perfect prediction."""
    rng = np.random.default_rng(seed)
    of = measured if known is None else known
    again = (of * np.exp(deviation * rng.standard_normal(len(of))) for _ in range(draws))
    return float(np.mean([tau(pairs, measured, each) for each in again]))


def best_of_rows(points: Sequence[Point], measured: Floats) -> Floats:
    """Of each point the geometric mean over all measurements of its configuration at its load: the best that a
    prediction can say which is given a row and nothing else."""
    alike = defaultdict(list)
    for place, point in enumerate(points):
        alike[configuration(point), load(point)].append(place)
    best = np.empty(len(points))
    for places in alike.values():
        best[places] = np.exp(np.log(measured[places]).mean())
    return best


def unbiased(points: Sequence[Point], measured: Floats, predicted: Floats) -> Floats:
    """Predictions without what each curve over the clients is off by: what ranking loses beside that."""
    found = predicted.copy()
    for curve in {point.curve for point in points}:
        at = np.array([point.curve == curve for point in points])
        found[at] *= np.exp(np.median(np.log(measured[at] / predicted[at])))
    return found


def print_ranking(points: Sequence[Point], measured: Floats, predicted: Floats, show_pairs: bool) -> tuple[float, int]:
    """Prints tau, what it is made of and its ceilings; returns the tau of the bar and the number of its pairs."""
    pairs = pairs_at_equal_load(points)
    if not len(pairs.left):
        return float("nan"), 0
    deviation, differences = noise(points, measured)
    same_model = of_one_model(points, pairs)
    apart = np.abs(np.log(measured[pairs.left] / measured[pairs.right]))
    found = tau(pairs, measured, predicted)
    print(f"\npairs of configurations at equal load: {len(pairs.left)}; tau {found:.3f}")
    for name, which in (("of one model", same_model), ("of different models", ~same_model)):
        part = pairs.only(which)
        print(f"  {name}: {which.sum()} pairs, tau {tau(part, measured, predicted):.3f}")
    print(f"  noise of a TPOT, from {differences} third differences along curves: {deviation:.1%}")
    best = best_of_rows(points, measured)
    print(f"  ceilings: measured once more tau {ceiling(pairs, measured, deviation):.3f}", end="; ")
    print(f"knowing rows only tau {tau(pairs, measured, best):.3f}", end=", ")
    print(f"both {ceiling(pairs, measured, deviation, best):.3f}")
    of_curves = tau(pairs, measured, unbiased(points, measured, predicted))
    print(f"  with the median error of each curve taken off: tau {of_curves:.3f}")
    for kind in sorted({(point.system, point.model) for point in points}):
        other = np.array([(point.system, point.model) != kind for point in points])
        rest = pairs.only(other[pairs.left] & other[pairs.right])
        if len(rest.left):
            print(f"  without {' '.join(kind)}: {len(rest.left)} pairs, tau {tau(rest, measured, predicted):.3f}")
    print(f"  {'measured apart by':>20}{'pairs':>7}{'share':>7}{'tau':>8}{'of all that is lost':>21}")
    wrong = np.sign(measured[pairs.left] - measured[pairs.right]) != np.sign(
        predicted[pairs.left] - predicted[pairs.right]
    )
    edges = (0.0, 0.02, 0.05, 0.10, 0.20, 0.50, np.inf)
    for low, high in pairwise(edges):
        which = (apart >= np.log1p(low)) & (apart < np.log1p(high))
        if which.any():
            label = f"{low:.0%} to {high:.0%}" if np.isfinite(high) else f"{low:.0%} or more"
            share = (wrong & which).sum() / max(1, wrong.sum())
            part = tau(pairs.only(which), measured, predicted)
            print(f"  {label:>20}{which.sum():7d}{which.mean():7.0%}{part:8.3f}{share:21.0%}")

    def name(place: int) -> str:
        point = points[place]
        return f"{point.system} {point.engine} {point.model.split('/')[-1]} {point.precision}"

    by_kind: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, (i, j) in enumerate(zip(*pairs, strict=True)):
        one, other = sorted((name(i), name(j)))
        by_kind[one, other].append(place)
    print(f"  {'most lost between':100}{'pairs':>6}{'tau':>8}{'lost':>6}{'apart':>7}")
    ranked = sorted(by_kind.items(), key=lambda item: -int(wrong[item[1]].sum()))
    for (one, other), places in ranked if show_pairs else ranked[:12]:
        at = np.array(places)
        part = tau(Pairs(pairs.left[at], pairs.right[at]), measured, predicted)
        line = f"{one} | {other}" if one != other else one
        lost = at[wrong[at]]
        typical = float(np.expm1(np.median(apart[lost]))) if len(lost) else 0.0
        print(f"  {line:100}{len(at):6d}{part:8.3f}{len(lost):6d}{typical:7.0%}")
    if show_pairs:
        print_lost(points, pairs, measured, predicted, deviation)
    return found, len(pairs.left)


def print_lost(points: Sequence[Point], pairs: Pairs, measured: Floats, predicted: Floats, deviation: float) -> None:
    """The pairs in wrong order that noise does not explain (further apart than twice its deviation of a difference)."""

    def name(place: int) -> str:
        p = points[place]
        ep = f" ep{p.deployed.expert_parallel}" if p.deployed.expert_parallel > 1 else ""
        return f"{p.system} {p.engine} {p.version} {p.model.split('/')[-1]} {p.precision} tp{p.deployed.ranks}{ep}"

    print("pairs of one model in wrong order, measured further apart than twice the noise of a difference:")
    for i, j in zip(*pairs, strict=True):
        if points[i].model != points[j].model or (measured[i] - measured[j]) * (predicted[i] - predicted[j]) > 0:
            continue
        if abs(np.log(measured[i] / measured[j])) > 2 * np.sqrt(2) * deviation:
            clients, prompt, answer = load(points[i])
            figures = " | ".join(
                f"{name(k)}: {1e3 * measured[k]:.2f}, predicted {1e3 * predicted[k]:.2f} ms" for k in (i, j)
            )
            print(f"  {clients} clients, {prompt}/{answer}: {figures}")
