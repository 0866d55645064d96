"""What is known of each candidate, and which of them nobody beats: the front of cost against latency."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..runtime.spec import Deployment, parse_deployment
from ..traces.metrics import Metric, Summary, Target

if TYPE_CHECKING:
    import pandas as pd

Fidelity = Literal["screened", "simulated", "measured"]
Cost = Literal["capacity", "sizing"]
FIDELITIES: tuple[Fidelity, ...] = ("screened", "simulated", "measured")
COSTS: tuple[Cost, ...] = ("capacity", "sizing")


def key_of(metric: Metric, percentile: float) -> str:
    """How an interval is named, and (after the colon) a percentile of a Summary.

    >>> key_of(Metric.parse("ttf30"), 95)
    'ttf30:p95'
    """
    return _without_limit(str(Target(metric, percentile, 1.0)))


@dataclass(frozen=True)
class Evaluation:
    """What is known of one candidate at one load.

    deployment              what would run, its replicas included
    fidelity                "screened" (analytic), "simulated" (virtual clock), "measured" (on the live runtime)
    feasible                every target holds at the recorded rate (without targets: it keeps up with `load`)
    reason                  why it is not feasible; else empty
    summary                 of the simulated run at the recorded rate (without targets: at `load`); None if screened
    usd_per_hour            of every device of `deployment`
    usd_per_million_tokens  at capacity (without targets: at `load`); infinite where nothing is served in time
    capacity_rate           highest multiple of the recorded rate at which ONE replica holds the targets; 0 = none
    capacity_tolerance      a rate this share above capacity_rate was seen to fail; infinite: none was, or capacity_rate
                            is of the busiest part of the trace alone, as for candidates that cannot win
    replicas_needed         fewest that hold the targets at the recorded rate; 0 = none up to the limit, or not asked
    load                    multiple of the recorded rate that one replica carries in `summary`
    utilization             share of the time that the devices compute in `summary`, modeled; NaN: not known
    busy_device_s_per_token seconds of computing, summed over devices, per output token in `summary`; NaN: not known
    intervals               of the prediction, 90 %: key_of(...), target or cost field -> (low, high); may be empty
    values                  target -> its percentile over the requests it governs, seconds; measured if it was
    correction              metric -> measured over simulated, geometric mean of the (other) finalists; empty = none
    measured                of the live run at the recorded rate; only where fidelity is "measured"
    measured_intervals      as `intervals`, of what was measured
    trial                   number in its study; 0 is the plain default
    seed                    of the study
    candidate               digest of the candidate as the space proposed it (sizing changes the replicas afterwards)
    """

    deployment: Deployment
    fidelity: Fidelity
    feasible: bool
    reason: str
    summary: Summary | None
    usd_per_hour: float
    usd_per_million_tokens: float = math.inf
    capacity_rate: float = 0.0
    capacity_tolerance: float = math.inf
    replicas_needed: int = 0
    load: float = 1.0
    utilization: float = math.nan
    busy_device_s_per_token: float = math.nan
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    correction: Mapping[str, float] = field(default_factory=dict)
    measured: Summary | None = None
    measured_intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    trial: int = 0
    seed: int = 0
    candidate: str = ""

    def value(self, metric: Metric, percentile: float) -> float:
        """Seconds over all requests: measured where it was measured, else predicted; NaN where it is not known."""
        if self.measured is None:
            return self.predicted(metric, percentile)
        return _of(self.measured, metric, percentile)

    def interval(self, metric: Metric, percentile: float) -> tuple[float, float]:
        """(low, high) of `value` in seconds, 90 %; both the value itself where no interval was worked out."""
        value = self.value(metric, percentile)
        known = self.intervals if self.measured is None else self.measured_intervals
        return known.get(key_of(metric, percentile), (value, value))

    def predicted(self, metric: Metric, percentile: float) -> float:
        """Seconds as simulated and corrected, whether it was measured or not; its interval is in `intervals`."""
        if self.summary is None:
            return math.nan
        return self.correction.get(str(metric), 1.0) * _of(self.summary, metric, percentile)

    def of_target(self, target: Target) -> tuple[float, float, float]:
        """The target's percentile, and its interval (low, high), seconds, over the requests that the target governs.

        A target of the study is known for its own requests; any other, if it names no application, for all requests.
        NaN: it is not known.
        """
        same = [text for text in self.values if _without_limit(text) == _without_limit(str(target))]
        text = str(target) if str(target) in self.values else (same[0] if len(same) == 1 else None)
        if text is None:
            if target.app is not None:
                return math.nan, math.nan, math.nan
            return self.value(target.metric, target.percentile), *self.interval(target.metric, target.percentile)
        value = self.values[text]
        known = self.intervals if self.measured is None else self.measured_intervals
        if self.measured is None:
            value *= self.correction.get(str(target.metric), 1.0)
        return value, *known.get(text, (value, value))

    def cost(self, kind: Cost) -> float:
        """$ per million tokens at capacity, or $ per hour of the sized deployment; see `traces.metrics`."""
        return self.usd_per_million_tokens if kind == "capacity" else self.usd_per_hour

    def cost_interval(self, kind: Cost) -> tuple[float, float]:
        value = self.cost(kind)
        return self.intervals.get("usd_per_million_tokens" if kind == "capacity" else "usd_per_hour", (value, value))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; infinite costs become None."""
        return {
            "deployment": self.deployment.model_dump(mode="json"),
            "fidelity": self.fidelity,
            "feasible": self.feasible,
            "reason": self.reason,
            "summary": None if self.summary is None else self.summary.to_dict(),
            "usd_per_hour": self.usd_per_hour,
            "usd_per_million_tokens": _finite_or_none(self.usd_per_million_tokens),
            "capacity_rate": self.capacity_rate,
            "capacity_tolerance": _finite_or_none(self.capacity_tolerance),
            "replicas_needed": self.replicas_needed,
            "load": self.load,
            "utilization": _finite_or_none(self.utilization),
            "busy_device_s_per_token": _finite_or_none(self.busy_device_s_per_token),
            "intervals": {key: [_finite_or_none(end) for end in ends] for key, ends in self.intervals.items()},
            "values": {key: _finite_or_none(value) for key, value in self.values.items()},
            "correction": dict(self.correction),
            "measured": None if self.measured is None else self.measured.to_dict(),
            "measured_intervals": {
                key: [_finite_or_none(end) for end in ends] for key, ends in self.measured_intervals.items()
            },
            "trial": self.trial,
            "seed": self.seed,
            "candidate": self.candidate,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """What `to_dict` made. Raises: BadSpec: its deployment cannot be read by this version."""
        summary, measured = data["summary"], data["measured"]
        # ledgers of before these were kept do not have them
        busy = {name: data.get(name) for name in ("utilization", "busy_device_s_per_token")}
        return cls(
            **{
                **data,
                "deployment": parse_deployment(data["deployment"], "evaluation"),
                "summary": None if summary is None else Summary.from_dict(summary),
                "measured": None if measured is None else Summary.from_dict(measured),
                "usd_per_million_tokens": _or_infinite(data["usd_per_million_tokens"]),
                **{name: math.nan if value is None else float(value) for name, value in busy.items()},
                "capacity_tolerance": _or_infinite(data["capacity_tolerance"]),
                "intervals": _bands(data["intervals"]),
                "measured_intervals": _bands(data["measured_intervals"]),
                "values": {key: _or_infinite(value) for key, value in data["values"].items()},
            }
        )


def _of(summary: Summary, metric: Metric, percentile: float) -> float:
    return summary.values.get(str(metric), {}).get(key_of(metric, percentile).partition(":")[2], math.nan)


def _without_limit(target: str) -> str:
    return target.rpartition("<=")[0]


def _bands(data: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    return {key: (_or_infinite(low), _or_infinite(high)) for key, (low, high) in data.items()}


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else float(value)


@dataclass(frozen=True)
class Front:
    """The candidates that nobody beats in both latency and cost.

    points       ascending cost, so falling latency
    metric, percentile, cost  the two axes
    evaluations  all that was known, the points among them
    """

    points: tuple[Evaluation, ...]
    metric: Metric
    percentile: float
    cost: Cost
    evaluations: tuple[Evaluation, ...]

    def latency_s(self, evaluation: Evaluation) -> float:
        return evaluation.value(self.metric, self.percentile)

    def to_pandas(self) -> pd.DataFrame:
        """One row an evaluation: flat columns for people, and `record` (JSON) from which `from_pandas` reads.

        Axes stand in `attrs["paretune"]`.
        """
        import pandas as pd

        on_front = {id(point) for point in self.points}
        frame = pd.DataFrame([_row(each, id(each) in on_front) for each in self.evaluations])
        frame.attrs["paretune"] = {"metric": str(self.metric), "percentile": self.percentile, "cost": self.cost}
        return frame

    @classmethod
    def from_pandas(cls, frame: pd.DataFrame) -> Front:
        """The front of the rows that are left in a frame made by `to_pandas`."""
        about = frame.attrs["paretune"]
        evaluations = [Evaluation.from_dict(json.loads(text)) for text in frame.get("record", ())]
        return pareto(evaluations, Metric.parse(about["metric"]), about["percentile"], about["cost"])


def _row(each: Evaluation, on_front: bool) -> dict[str, Any]:
    summary = each.measured or each.summary
    latencies = {
        f"{metric}_{name}_s": value
        for metric, by in (summary.values if summary else {}).items()
        for name, value in by.items()
    }
    intervals = {**each.intervals, **each.measured_intervals}
    bands = {f"{key} {end}": ends[i] for key, ends in intervals.items() for i, end in enumerate(("low", "high"))}
    pool = each.deployment.pools[0].model_dump(mode="json", exclude={"tiles"})
    return {
        "trial": each.trial,
        "digest": each.deployment.digest(),
        "fidelity": each.fidelity,
        "on_front": on_front,
        "feasible": each.feasible,
        "reason": each.reason,
        **pool,
        "usd_per_hour": each.usd_per_hour,
        "usd_per_million_tokens": each.usd_per_million_tokens,
        "capacity_rate": each.capacity_rate,
        "replicas_needed": each.replicas_needed,
        "load": each.load,
        **latencies,
        **bands,
        "record": json.dumps(each.to_dict(), sort_keys=True, allow_nan=False),
    }


def pareto(evaluations: Iterable[Evaluation], metric: Metric, percentile: float, cost: Cost) -> Front:
    """The front over feasible candidates: no other is at least as good in both latency and cost and better in one.

    Of a candidate known at several fidelities the highest counts; of equal points the earliest trial stays. Candidates
    whose latency or cost is not a finite number cannot be on the front.
    """
    known = tuple(evaluations)
    best: dict[tuple[str, float], Evaluation] = {}
    for each in known:
        name = (each.candidate or each.deployment.digest(), each.load)
        if name not in best or FIDELITIES.index(each.fidelity) >= FIDELITIES.index(best[name].fidelity):
            best[name] = each
    rows = [
        (each.cost(cost), each.value(metric, percentile), each.trial, each) for each in best.values() if each.feasible
    ]
    rows = [row for row in rows if math.isfinite(row[0]) and math.isfinite(row[1])]
    rows.sort(key=lambda row: row[:3])
    points: list[Evaluation] = []
    fastest_s = math.inf
    for _, latency_s, _, each in rows:
        if latency_s < fastest_s:
            points.append(each)
            fastest_s = latency_s
    return Front(tuple(points), metric, percentile, cost, known)
