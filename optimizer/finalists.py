"""The few that are measured on the live runtime, and what their measurements say about all the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..profiler.simulator import governed_rows
from ..runtime.spec import Deployment
from ..traces.metrics import E2E, TPOT, TTFT, Metric, RequestTimes, Target, meets, summarize
from ..traces.trace import Trace
from .front import Evaluation, Front, pareto
from .intervals import joined, sampled
from .pick import knee

# Serve a deployment for real and replay the trace at this multiple of the recorded rate.
Measure = Callable[[Deployment, float], RequestTimes]

# With fewer measured candidates a ratio is an anecdote.
LEAST_FOR_CORRECTION = 3

# 90 % of a normal distribution lie within so many standard deviations.
_Z90 = 1.6449


@dataclass(frozen=True)
class Correction:
    """How the measured runs differ from the simulated ones in one metric, over p50 and p95 of all finalists.

    ratio     geometric mean of measured / simulated
    spread    standard deviation of its logarithm between finalists
    number    of finalists
    """

    metric: str
    ratio: float
    spread: float
    number: int


def choose(front: Front, default: Evaluation, most: int) -> list[Evaluation]:
    """Who is measured: the default, the cheapest, the knee, the fastest, then the rest of the front spread evenly, then
    the fronts behind it; at most `most`, each candidate once.
    """
    chosen = [default]
    left = list(front.evaluations)
    while len(chosen) < most:
        layer = pareto(left, front.metric, front.percentile, front.cost)
        if not layer.points:
            break
        middle = [layer.points[i] for i in _spread(len(layer.points))]
        for each in (layer.points[0], knee(layer), layer.points[-1], *middle):
            if all(each.candidate != other.candidate or each.load != other.load for other in chosen):
                chosen.append(each)
        taken = {(each.candidate, each.load) for each in layer.points}
        left = [each for each in left if (each.candidate, each.load) not in taken]
    return chosen[:most]


def _spread(count: int) -> list[int]:
    """0 .. count - 1, such that any first few of them lie far apart (binary van der Corput order)."""
    bits = max(1, (count - 1).bit_length())
    return [i for i in (int(format(j, f"0{bits}b")[::-1], 2) for j in range(1 << bits)) if i < count]


def rate_of(evaluation: Evaluation, targets: Sequence[Target]) -> float:
    """Multiple of the recorded rate at which a finalist is replayed: 1, or without targets what its load label says."""
    return 1.0 if targets else evaluation.load * evaluation.deployment.pool.replicas


def measured(evaluation: Evaluation, times: RequestTimes, trace: Trace, targets: Sequence[Target]) -> Evaluation:
    """The evaluation of a finalist with what was measured: values, intervals by bootstrap, whether the targets hold."""
    rng = np.random.default_rng(int(evaluation.deployment.digest()[:12], 16) + evaluation.seed + 1)
    found = sampled(times, trace, targets, rng)
    reason = ""
    for target in targets:
        if not meets(times, target, governed_rows(trace, target)):
            reason = f"measured: breaks {target}"
    return replace(
        evaluation,
        fidelity="measured",
        feasible=not reason,
        reason=reason,
        measured=summarize(times),
        values={str(target): found[str(target)][0] for target in targets},
        measured_intervals={key: joined(value, band) for key, (value, band) in found.items() if not math.isnan(value)},
    )


def corrections(finalists: Sequence[Evaluation]) -> tuple[Correction, ...]:
    """Per metric, measured over simulated; nothing where too few were measured."""
    done = [each for each in finalists if each.measured is not None and each.summary is not None]
    if len(done) < LEAST_FOR_CORRECTION:
        return ()
    found = []
    for metric in _metrics(done[0]):
        logs = [log for log in (_log_ratio(each, metric) for each in done) if not math.isnan(log)]
        if len(logs) >= LEAST_FOR_CORRECTION:
            found.append(Correction(str(metric), math.exp(np.mean(logs)), float(np.std(logs, ddof=1)), len(logs)))
    return tuple(found)


def _metrics(evaluation: Evaluation) -> list[Metric]:
    assert evaluation.summary is not None
    names = [name for name in evaluation.summary.values if name[3:].isdigit()]
    return [TTFT, *(Metric.parse(name) for name in names), TPOT, E2E]


def _log_ratio(each: Evaluation, metric: Metric) -> float:
    """log(measured / simulated), the mean of p50 and p95."""
    logs = []
    for p in (50.0, 95.0):
        real, simulated = each.value(metric, p), replace(each, correction={}).predicted(metric, p)
        if real > 0 and simulated > 0:
            logs.append(math.log(real / simulated))
    return float(np.mean(logs)) if logs else math.nan


def corrected(evaluation: Evaluation, found: Sequence[Correction], targets: Sequence[Target]) -> Evaluation:
    """A prediction moved by what the finalists showed, its intervals widened by how much they differ, and judged anew.

    Costs stay as simulated: capacity was not measured.
    """
    if not found:
        return evaluation
    by_metric = {each.metric: each for each in found}
    values = {str(target): target for target in targets}
    bands = dict(evaluation.intervals)
    for key, (low, high) in evaluation.intervals.items():
        metric = str(values[key].metric) if key in values else key.partition(":")[0]
        each = by_metric.get(metric)
        if each is not None:
            half = _Z90 * each.spread * math.sqrt(1 + 1 / each.number)
            middle = math.sqrt(low * high) * each.ratio
            own = (low * each.ratio, high * each.ratio)
            bands[key] = joined(middle, own, (middle * math.exp(-half), middle * math.exp(half)))
    moved = replace(evaluation, correction={each.metric: each.ratio for each in found}, intervals=bands)
    if moved.measured is not None or (evaluation.reason and not evaluation.reason.startswith("breaks ")):
        return moved
    for target in targets:
        if moved.of_target(target)[0] > target.limit_s:
            return replace(moved, feasible=False, reason=f"breaks {target}, corrected by the measured finalists")
    return replace(moved, feasible=True, reason="")


def corrected_by_others(finalists: Sequence[Evaluation], targets: Sequence[Target]) -> list[Evaluation]:
    """Each measured finalist with its *prediction* corrected by the other ones, never by its own measurement."""
    return [
        corrected(each, corrections([*finalists[:i], *finalists[i + 1 :]]), targets)
        if each.measured is not None
        else each
        for i, each in enumerate(finalists)
    ]


def ratios(found: Sequence[Correction]) -> Mapping[str, float]:
    return {each.metric: each.ratio for each in found}
