"""Which point of the front to deploy: by targets, by budget, the knee, or by number; and the spec that comes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from statistics import NormalDist
from typing import ClassVar

from .. import __version__
from ..runtime.spec import Deployment, Prediction, Provenance
from ..traces.describe import fingerprint
from ..traces.metrics import E2E, PERCENTILES, TPOT, TTFT, Metric, Target
from ..traces.trace import Trace
from .front import Evaluation, Front, key_of
from .intervals import CONFIDENCE, Band


class NothingFeasible(Exception):
    """It ran well, and no candidate does what was asked; the message says what would have to give."""

    exit_code: ClassVar[int] = 3

    def __init__(self, asked: str, best: str, todo: str) -> None:
        super().__init__(asked, best, todo)
        self.asked, self.best, self.todo = asked, best, todo

    def __str__(self) -> str:
        return f"nothing holds {self.asked}: {self.best}; {self.todo}"


class BadPick(Exception):
    """A choice that cannot be made from this front: where, what was found, what is allowed, what to do."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {self.found}; allowed: {self.allowed}; {self.todo}"


def cheapest(front: Front, targets: Sequence[Target], confidence: float = CONFIDENCE) -> Evaluation:
    """The cheapest candidate that holds the targets with confidence: each interval's upper end is within its limit.

    Looks at every feasible candidate that has intervals, not only at the front's points, since the targets may speak of
    another metric than its axis.

    Args:
        confidence: of the intervals, 0 < confidence < 1; stored at 90 %, widened or narrowed on a log scale.
    Raises: NothingFeasible: none does; BadPick: no targets, or one that the study knows nothing about.
    """
    if not targets:
        raise BadPick("pick", "no targets", "at least one, such as ttf30:p95<=600ms", "give --slo, --budget or --knee")
    if not 0 < confidence < 1:
        raise BadPick("pick: confidence", confidence, "more than 0 and less than 1", "give 0.9, say")
    known = [each for each in _ranked(front) if each.intervals or each.measured is not None]
    for target in targets:
        if known and all(math.isnan(each.of_target(target)[0]) for each in known):
            asked = sorted({text for each in known for text in each.values})
            raise BadPick(
                f"pick: {target}",
                "a metric, percentile or application that the study has no figures for",
                ", ".join(asked) or "ttft, ttf-k, tpot, e2e at p50, p90, p95, p99",
                "tune again with this target",
            )
    for each in known:
        if each.feasible and all(_upper_s(each, target, confidence) <= target.limit_s for target in targets):
            return each
    raise _nothing(known, targets, confidence)


def fastest(front: Front, budget_usd: float) -> Evaluation:
    """The lowest latency among the front's points that cost at most a budget, in the front's kind of cost.

    Raises: NothingFeasible: every point costs more.
    """
    affordable = [point for point in front.points if point.cost(front.cost) <= budget_usd]
    if affordable:
        return affordable[-1]
    unit = "per million tokens" if front.cost == "capacity" else "per hour"
    if not front.points:
        raise NothingFeasible(f"${budget_usd:g} {unit}", "no candidate is feasible", "see the study's reasons")
    least = front.points[0].cost(front.cost)
    raise NothingFeasible(
        f"${budget_usd:g} {unit}", f"the cheapest point costs ${least:.4g}", f"allow ${least:.4g} {unit}"
    )


def knee(front: Front) -> Evaluation:
    """The point furthest below the straight line from the cheapest to the fastest, both axes in logarithms.

    There, paying more stops buying much speed. (Satopaa et al., "Finding a Kneedle in a Haystack", 2011, with logs.)

    Raises: NothingFeasible: the front is empty.
    """
    points = front.points
    if not points:
        raise NothingFeasible("any front", "no candidate is feasible", "see the study's reasons")
    first, last = points[0], points[-1]
    cost_span = math.log(last.cost(front.cost) / first.cost(front.cost)) if len(points) > 1 else 0.0
    latency_span = math.log(front.latency_s(first) / front.latency_s(last)) if len(points) > 1 else 0.0
    if cost_span <= 0 or latency_span <= 0:
        return first

    def below(point: Evaluation) -> float:
        dearer = math.log(point.cost(front.cost) / first.cost(front.cost)) / cost_span
        slower = math.log(front.latency_s(point) / front.latency_s(last)) / latency_span
        return 1 - dearer - slower

    return max(points, key=below)


def numbered(front: Front, number: int) -> Evaluation:
    """The front's point of that number, counted from 1 at the cheapest. Raises: BadPick: there is none."""
    if not 1 <= number <= len(front.points):
        raise BadPick("pick: point", number, f"1 to {len(front.points)}", "look at `paretune front`")
    return front.points[number - 1]


def pick(
    front: Front,
    *,
    slo: Sequence[Target] | None = None,
    budget_usd: float | None = None,
    point: int | None = None,
    confidence: float = CONFIDENCE,
) -> Evaluation:
    """One of the above: by targets, by budget, by number; the knee where none of them is given.

    Raises: BadPick, NothingFeasible.
    """
    if sum(given is not None for given in (slo, budget_usd, point)) > 1:
        raise BadPick("pick", "several ways to choose", "one of targets, budget, point", "leave the others out")
    if slo is not None:
        return cheapest(front, slo, confidence)
    if budget_usd is not None:
        return fastest(front, budget_usd)
    return numbered(front, point) if point is not None else knee(front)


def _ranked(front: Front) -> list[Evaluation]:
    """Every candidate once, at its highest fidelity, cheapest first."""
    best: dict[tuple[str, float], Evaluation] = {}
    for each in front.evaluations:
        name = (each.candidate or each.deployment.digest(), each.load)
        if name not in best or each.fidelity == "measured":
            best[name] = each
    return sorted(best.values(), key=lambda each: (each.cost(front.cost), front.latency_s(each), each.trial, each.load))


def _upper_s(each: Evaluation, target: Target, confidence: float) -> float:
    value, _, high = each.of_target(target)
    if math.isnan(value) or value <= 0:
        return 0.0 if value == 0 else math.inf
    stretch = NormalDist().inv_cdf(0.5 + confidence / 2) / NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    return float(value * (high / value) ** stretch)


def _nothing(known: Sequence[Evaluation], targets: Sequence[Target], confidence: float) -> NothingFeasible:
    asked = ", ".join(str(target) for target in targets)

    def excess(each: Evaluation) -> float:
        return max(_upper_s(each, target, confidence) / target.limit_s for target in targets)

    if not known:
        return NothingFeasible(asked, "no candidate was simulated to the end", "see the study's reasons")
    nearest = min(known, key=excess)
    worst = max(targets, key=lambda target: _upper_s(nearest, target, confidence) / target.limit_s)
    value, _, _ = nearest.of_target(worst)
    upper = _upper_s(nearest, worst, confidence)
    if not math.isfinite(upper):
        best = f"the nearest (trial {nearest.trial}) fails: {nearest.reason or 'it has no bounded latency'}"
        return NothingFeasible(asked, best, "give more devices, less traffic or shorter requests, and tune again")
    best = (
        f"the nearest (trial {nearest.trial}) has {value:.3g} s, with {confidence:.0%} confidence at most {upper:.3g} s"
    )
    if value <= worst.limit_s:
        todo = f"allow {upper * 1000:.0f} ms, or accept less confidence, or measure more finalists"
    else:
        todo = f"allow {upper * 1000:.0f} ms, or give more devices or less traffic"
    return NothingFeasible(asked, best, todo)


def make_spec(
    evaluation: Evaluation,
    *,
    trace: Trace,
    targets: Sequence[Target],
    study: str,
    profile: str,
    profile_digest: str,
    measured_steps: bool,
    prices: str,
    prices_as_of: str,
    rate: float = 1.0,
    created_at: str | None = None,
) -> Deployment:
    """The candidate with the targets it was picked for, what is predicted of it, and where it came from.

    Predictions are those of the simulator, corrected by what the *other* finalists measured: `verify` compares them
    with a new measurement.

    Args:
        profile, profile_digest, measured_steps: what step times came from; False: bounds of a data sheet.
        prices, prices_as_of: source and date of the price book.
        rate: multiple of the recorded rate that the evaluation's latencies speak of, all replicas together.
        created_at: ISO 8601 UTC; now, if left out.
    """
    predictions = []
    k = next((name for name in (evaluation.summary.values if evaluation.summary else {}) if name[3:].isdigit()), None)
    for metric in (TTFT, *([Metric.parse(k)] if k else []), TPOT, E2E):
        for p in PERCENTILES:
            value = evaluation.predicted(metric, p)
            band = evaluation.intervals.get(key_of(metric, p))
            predictions.append(_prediction(str(metric), p, value, band))
    carried_per_s = evaluation.capacity_rate * trace.rate_per_s
    for name, usd in (
        ("usd_per_hour", evaluation.usd_per_hour),
        ("usd_per_million_tokens", evaluation.usd_per_million_tokens),
    ):
        predictions.append(_prediction(name, None, usd, evaluation.intervals.get(name)))
    if carried_per_s > 0:
        replicas = evaluation.deployment.pool.replicas
        rates = evaluation.intervals.get("capacity_rate")
        per_s = trace.rate_per_s * replicas
        band = None if rates is None else (rates[0] * per_s, rates[1] * per_s)
        predictions.append(_prediction("requests_per_s", None, carried_per_s * replicas, band))
    provenance = Provenance(
        paretune_version=__version__,
        created_at=created_at or datetime.now(UTC).isoformat(timespec="seconds"),
        trace_source=trace.source,
        trace_digest=trace.digest(),
        trace_fingerprint=fingerprint(trace),
        profile=profile,
        profile_digest=profile_digest,
        measured=measured_steps,
        prices=prices,
        prices_as_of=prices_as_of,
        study=study,
        seed=evaluation.seed,
        rate=rate,
    )
    update = {
        "targets": tuple(str(target) for target in targets),
        "predicted": tuple(each for each in predictions if each is not None),
        "provenance": provenance,
    }
    return evaluation.deployment.model_copy(update=update)


def _prediction(metric: str, percentile: float | None, value: float, band: Band | None) -> Prediction | None:
    """None: not bounded. Without a band: no interval was worked out, or what devices cost, which needs none."""
    if not all(math.isfinite(number) for number in (value, *(band or ()))):
        return None
    low, high = band or (None, None)
    confidence = None if band is None else CONFIDENCE
    return Prediction(metric=metric, percentile=percentile, value=value, low=low, high=high, confidence=confidence)
