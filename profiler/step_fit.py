"""Fits the parts of a step's time to measured whole steps: monotone, non-negative, robust relative least squares.

What physics allows at least is no part of the fit but stands below it: a fit alone cannot tell reading the weights from
reading the first cached token, and raising each of its parts to its bound afterwards would count the weights twice.

Each part (tokens, rows, samples, context decoded, pairs prefilled) is a broken line that never falls, with knots at
powers of two: linear layers read their weights once whatever the rows, and grow with them later; caches end
somewhere. Every fourth point is held out of the fit, and only these say how wrong it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .profile import BadProfile, StepPoint

HELD_OUT_EVERY = 4
CONFIDENCE = 0.9
LEAST_POINTS = 12
_ENOUGH = 5
_APIECE = 2
# Huber's weights (1964): residuals beyond this share of a step's time count by their size, not its square
_DISTURBED = 0.05
_REWEIGHTINGS = 6
_ALIKE = 5  # held-out points whose mean error counts
_PARTS = ("num_tokens", "num_rows", "num_samples", "decode_context", "prefill_pairs")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BrokenLine:
    """seconds(x): 0 at 0, linear between knots, on with the steepest slope behind the last knot.

    knots (m,) ascending, first 0; seconds (m,) never falling, first 0
    """

    knots: Floats
    seconds: Floats

    def __call__(self, x: Floats) -> Floats:
        inside = np.interp(x, self.knots, self.seconds)
        if len(self.knots) < 2:
            return np.asarray(inside, np.float64)
        slope = float(np.max(np.diff(self.seconds[-3:]) / np.diff(self.knots[-3:])))
        return np.asarray(inside + np.maximum(0.0, x - self.knots[-1]) * slope, np.float64)


@dataclass(frozen=True)
class StepFit:
    """Seconds of a step beyond what was given as least = step_s + the five parts.

    relative_error  90 % quantile, over groups of held-out points that are alike, of how far their mean is off: any
                    percentile of a run's latencies is a sum of many steps, and single steps' errors cancel in it
    errors          of each held-out point, predicted / measured - 1
    largest         largest value measured, by part
    """

    step_s: float
    tokens: BrokenLine
    rows: BrokenLine
    samples: BrokenLine
    decode: BrokenLine
    prefill: BrokenLine
    relative_error: float
    errors: tuple[float, ...]
    largest: dict[str, float]

    def seconds(self, values: Floats) -> Floats:
        """(n,) seconds of (n, 5) compositions."""
        lines = (self.tokens, self.rows, self.samples, self.decode, self.prefill)
        parts = [line(values[:, i]) for i, line in enumerate(lines)]
        return np.asarray(self.step_s + sum(parts, np.zeros(len(values))), np.float64)


def fit_steps(points: Sequence[StepPoint], least_s: Sequence[float] | None = None) -> StepFit:
    """The parts that explain best what measured steps take beyond the least that is possible.

    Args:
        least_s: of each point; left out: 0.
    Raises: BadProfile: fewer than LEAST_POINTS points.
    """
    known = _ordered(points, least_s)
    held_out = np.arange(len(points)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    fit, errors = _fitted(known, ~held_out)
    largest = {part: float(known.values[:, i].max()) for i, part in enumerate(_PARTS)}
    error = _error_of_means(errors[held_out], known.values[held_out])
    return replace(fit, relative_error=error, errors=tuple(errors[held_out].tolist()), largest=largest)


def fit_all_steps(points: Sequence[StepPoint], least_s: Sequence[float] | None = None) -> StepFit:
    """The same where there are few points: fitted to all of them, with a knot for every _APIECE different values.

    Its errors are those of each point, predicted without its quarter, in the order of _ordered; relative_error their
    90 % quantile: where each composition was measured once, the errors of those that are alike do not cancel.

    Raises: BadProfile: fewer than LEAST_POINTS points.
    """
    known = _ordered(points, least_s)
    fold, errors = np.arange(len(points)) % HELD_OUT_EVERY, np.empty(len(points))
    for each in range(HELD_OUT_EVERY):
        _, wrong = _fitted(known, fold != each, _APIECE)
        errors[fold == each] = wrong[fold == each]
    fit, _ = _fitted(known, np.ones(len(points), np.bool_), _APIECE)
    return replace(fit, relative_error=float(np.quantile(abs(errors), CONFIDENCE)), errors=tuple(errors.tolist()))


class _Ordered(NamedTuple):
    """Points from small to large: compositions (n, 5); seconds, how certain each is, and its least seconds, (n,)."""

    values: Floats
    measured_s: Floats
    certain: Floats
    least_s: Floats


def _ordered(points: Sequence[StepPoint], least_s: Sequence[float] | None) -> _Ordered:
    if len(points) < LEAST_POINTS:
        todo = "measure for longer: `paretune profile`"
        raise BadProfile("profile: steps", f"{len(points)} points", f"at least {LEAST_POINTS}", todo)
    least = np.zeros(len(points)) if least_s is None else np.asarray(least_s, np.float64)
    order = sorted(range(len(points)), key=lambda i: tuple(getattr(points[i], part) for part in reversed(_PARTS)))
    ordered = [points[i] for i in order]
    values = np.array([[getattr(p, part) for part in _PARTS] for p in ordered], np.float64)
    # a median of many steps counts more than a single one
    certain = np.sqrt(np.minimum(np.array([p.count for p in ordered]), _ENOUGH))
    return _Ordered(values, np.array([p.median_s for p in ordered]), certain, least[order])


def _fitted(known: _Ordered, of: NDArray[np.bool_], apiece: float = 0.0) -> tuple[StepFit, Floats]:
    """The fit to some of the points, without its error, and how far off it is at all of them.

    Args:
        apiece: different values of a part that there are for each of its inner knots, at least.
    """
    values, measured_s = known.values[of], known.measured_s[of]
    knots = [_thinned(_knots(values[:, i]), values[:, i], apiece) for i in range(len(_PARTS))]
    design = np.hstack([np.ones((len(values), 1)), *(_rises(values[:, i], knots[i]) for i in range(len(_PARTS)))])
    relative = design / measured_s[:, None]
    beyond = 1 - known.least_s[of] / measured_s
    certain = known.certain[of]
    weights = certain
    for _ in range(_REWEIGHTINGS):
        rises = non_negative_least_squares(relative * weights[:, None], beyond * weights)
        residuals = np.abs(relative @ rises - beyond)
        # a step that something disturbed counts less
        weights = certain * np.sqrt(np.minimum(1.0, _DISTURBED / np.maximum(residuals, 1e-12)))
    lines, start = [], 1
    for part in knots:
        taken = rises[start : start + len(part) - 1]
        lines.append(BrokenLine(part, np.concatenate([[0.0], np.cumsum(taken)])))
        start += len(part) - 1
    tokens, rows, samples, decode, prefill = lines
    largest = {part: float(values[:, i].max()) for i, part in enumerate(_PARTS)}
    fit = StepFit(float(rises[0]), tokens, rows, samples, decode, prefill, 0.0, (), largest)
    return fit, (known.least_s + fit.seconds(known.values)) / known.measured_s - 1


def _error_of_means(errors: Floats, values: Floats) -> float:
    """Points are alike that decode, or have prompts, of about as many tokens."""
    tokens, pairs = values[:, 0], values[:, 4]
    order = np.lexsort((tokens, pairs > 0))
    groups = np.array_split(errors[order], max(1, len(errors) // _ALIKE))
    return float(np.quantile([abs(group.mean()) for group in groups], CONFIDENCE))


def _knots(values: Floats) -> Floats:
    """0, and the powers of two that have points behind and before them, and the largest value."""
    largest = float(values.max())
    if largest <= 0:
        return np.zeros(1)
    octaves = 2.0 ** np.unique(np.round(np.log2(np.maximum(values[values > 0], 1.0))))
    inner = octaves[octaves < 0.75 * largest]
    return np.concatenate([[0.0], inner, [largest]])


def _thinned(knots: Floats, values: Floats, apiece: float) -> Floats:
    """Fewer knots between the ends where there are few values, evenly; a knot of a single point only repeats it."""
    inner = knots[1:-1]
    most = int(len(np.unique(values[values > 0])) // apiece) if apiece else len(inner)
    if len(inner) <= most:
        return knots
    kept = np.unique(np.round(np.linspace(0, len(inner) - 1, most + 2)[1:-1])).astype(np.int64)
    return np.concatenate([knots[:1], inner[kept], knots[-1:]])


def _rises(x: Floats, knots: Floats) -> Floats:
    """(n, m - 1): how far x has come between each two knots, 0 to 1; beyond the last knot it goes on."""
    if len(knots) < 2:
        return np.zeros((len(x), 0))
    share = (x[:, None] - knots[None, :-1]) / np.diff(knots)[None, :]
    clipped = np.clip(share, 0.0, 1.0)
    clipped[:, -1] = np.maximum(share[:, -1], 0.0)
    return clipped


def non_negative_least_squares(matrix: Floats, target: Floats) -> Floats:
    """x >= 0 with the least |matrix @ x - target|: the active-set method of Lawson and Hanson (1974), chapter 23.

    Columns are scaled to equal length first; a column of zeros gets 0.
    """
    length = np.linalg.norm(matrix, axis=0)
    scaled = matrix / np.where(length > 0, length, 1.0)
    columns = scaled.shape[1]
    x = np.zeros(columns)
    passive = np.zeros(columns, np.bool_)
    tolerance = 1e-10 * float(np.linalg.norm(target))
    for _ in range(3 * columns):
        gradient = scaled.T @ (target - scaled @ x)
        gradient[passive | (length == 0)] = -np.inf
        if gradient.max(initial=-np.inf) <= tolerance:
            break
        passive[int(np.argmax(gradient))] = True
        while True:
            trial = np.zeros(columns)
            trial[passive] = np.linalg.lstsq(scaled[:, passive], target, rcond=None)[0]
            low = passive & (trial <= 0)
            if not low.any():
                break
            step = float(np.min(x[low] / np.maximum(x[low] - trial[low], 1e-300)))
            x = x + step * (trial - x)
            passive &= x > 1e-14
            x[~passive] = 0.0
        x = trial
    return np.asarray(x / np.where(length > 0, length, 1.0), np.float64)
