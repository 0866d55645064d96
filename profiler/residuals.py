"""What a model of times gets wrong, learned from measured points: corrections with their uncertainty.

The logarithm of measured over predicted is a Gaussian process whose points are alike in groups within groups (the same
engine; on the same GPU; with the same model; sharded alike; of the same lengths), and smooth in the logarithms of load.
Rasmussen and Williams, Gaussian Processes for Machine Learning (MIT Press 2006), section 2.2. The bands around it are
made to cover by residuals of points left out of the fit (conformal: Vovk, Gammerman and Shafer, Algorithmic Learning in
a Random World, 2005; scaled by the process' own deviation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.object_]


@dataclass(frozen=True)
class Features:
    """Points as the process sees them.

    groups  (levels, n) labels, from the widest group to the narrowest
    load    (n, k) logarithms (to base 2) of what varies inside a group
    """

    groups: Labels
    load: Floats

    def take(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> Features:
        return Features(self.groups[:, which], self.load[which])


@dataclass(frozen=True)
class Alike:
    """How much points have in common.

    deviation  (levels,) standard deviation of what a group of each level has in common
    length     octaves of load over which the narrowest group's residual changes
    noise      standard deviation of one measurement
    """

    deviation: tuple[float, ...]
    length: float
    noise: float


def _covariance(left: Features, right: Features, alike: Alike) -> Floats:
    distance = ((left.load[:, None, :] - right.load[None, :, :]) ** 2).sum(axis=2)
    smooth = np.exp(-0.5 * distance / alike.length**2)
    total = np.zeros(smooth.shape)
    for level, deviation in enumerate(alike.deviation):
        number = {
            label: place for place, label in enumerate(dict.fromkeys((*left.groups[level], *right.groups[level])))
        }
        mine, other = (np.array([number[label] for label in each.groups[level]]) for each in (left, right))
        same = mine[:, None] == other[None, :]
        # half of what a group has in common depends on the load
        total += deviation**2 * same * (0.5 + 0.5 * smooth)
    return total


@dataclass(frozen=True)
class Correction:
    """Residuals learned from points.

    inverse  of their covariance, noise included; weights are its product with the residuals
    noise    variance of each point's measurement, as it was taken, with what its group is off by where that was raised
    """

    points: Features
    weights: Floats
    inverse: Floats
    noise: Floats
    alike: Alike

    def at(self, features: Features) -> tuple[Floats, Floats]:
        """(mean, standard deviation) of the logarithm of measured over predicted; a new measurement's noise counts."""
        cross = _covariance(features, self.points, self.alike)
        own = sum(d**2 for d in self.alike.deviation) + self.alike.noise**2
        spread = own - np.einsum("ij,jk,ik->i", cross, self.inverse, cross)
        return cross @ self.weights, np.sqrt(np.maximum(spread, 1e-12))


def learn(
    points: Features,
    log_residual: Floats,
    alike: Alike,
    robust: float = 2.5,
    groups: Sequence[object] = (),
) -> Correction:
    """Fits residuals of measured points.

    Points further than `robust` standard deviations from what the others say get their noise raised to it, thrice
    over: a start-up wave is no property of an engine. Of a group that lies off as a whole no point is far from the
    others; where groups are given, one whose median is so far from what the other groups say gets a shift of its own.

    Args:
        groups: (n,) labels of points that may be off together, where the correction is asked for other groups (of its
            own a group's shift is not told); none: only single points may be off.
    """
    covariance = _covariance(points, points, alike)
    noise = np.full(len(log_residual), alike.noise**2)
    shifted = np.zeros(len(log_residual))
    blocks = _blocks(groups) if groups else []
    for _ in range(3):
        taken = noise + shifted
        inverse: Floats = np.asarray(np.linalg.inv(covariance + np.diag(noise)), np.float64)
        weights = inverse @ log_residual
        for out in blocks:
            error, variance = _left_out(inverse, weights, out)
            far = float(np.median(np.abs(error) / np.sqrt(variance))) / robust
            if far > 1.0:
                shift = (min(far**2, 100.0) - 1.0) * float(variance.mean())
                shifted[out] += shift
                covariance[np.ix_(out, out)] += shift
        left_out = weights / np.diag(inverse)  # residual of each point predicted by the others
        deviation = 1.0 / np.sqrt(np.diag(inverse))
        excess = np.abs(left_out) / (robust * deviation)
        noise = np.where(excess > 1.0, noise * np.minimum(excess**2, 100.0), noise)
    return Correction(points, weights, inverse, np.asarray(taken, np.float64), alike)


def left_out_scores(correction: Correction, folds: Sequence[object]) -> Floats:
    """(n,) |error| over deviation of each learned point, predicted without the points of its fold.

    In closed form from the fit to all: the error of a block of points left out is the inverse of their block of the
    inverse covariance times their weights (Rasmussen and Williams, section 5.4.2, there for single points).
    """
    scores = np.zeros(len(folds))
    for out in _blocks(folds):
        error, variance = _left_out(correction.inverse, correction.weights, out)
        # one new measurement's noise, not what an outlier's was raised to
        variance = variance - correction.noise[out] + correction.alike.noise**2
        scores[out] = np.abs(error) / np.sqrt(np.maximum(variance, 1e-12))
    return scores


def _blocks(labels: Sequence[object]) -> list[NDArray[np.intp]]:
    """Places of the points of each label."""
    _, number = np.unique(np.array([str(label) for label in labels]), return_inverse=True)
    return [np.flatnonzero(number == each) for each in range(number.max() + 1)]


def _left_out(inverse: Floats, weights: Floats, out: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Errors of points predicted without any of them, and the variance of those, noise included."""
    covariance = np.linalg.inv(inverse[np.ix_(out, out)])
    return covariance @ weights[out], np.diag(covariance)


def conformal_quantile(scores: Floats, coverage: float) -> float:
    """The score below which a new one lies with at least this probability, if it is exchangeable with these; infinite
    where there are too few to say so."""
    rank = int(np.ceil((len(scores) + 1) * coverage))
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else math.inf
