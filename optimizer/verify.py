"""Predicted against measured: what a spec promised and what the running server did."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..profiler.simulator import governed_rows
from ..runtime.spec import BadSpec, Deployment, Prediction
from ..traces.confidence import Estimate, estimates
from ..traces.metrics import Metric, RequestTimes, Summary, Target, goodput, meets, percentile, summarize
from ..traces.trace import Trace
from ..traces.whole_file import write_whole
from ..traces.worst_window import WorstWindow, worst_windows
from .capacity import Owed, check_governed, k_of

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Row:
    """One metric at one percentile, seconds; `inside`: the measured value lies in the predicted interval."""

    metric: str
    percentile: float
    predicted: float
    low: float
    high: float
    measured: float

    @property
    def inside(self) -> bool:
        return self.low <= self.measured <= self.high

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return (self.predicted - self.measured) / self.measured if self.measured else math.nan


@dataclass(frozen=True)
class Verification:
    """What verify found.

    deployment  digest of what ran
    trace       digest of what was replayed
    same_trace  whether that is the trace that the spec was tuned on; None where the spec does not say
    rows        predictions of the spec that the replay measured
    met         target -> whether the replay met it
    summary     of the replay
    goodput_per_s     requests per second that met every target of theirs; NaN where there is none
    schedule_error_s  how late requests were sent: "p50", "p95", "max"
    samples     intervals of the measured percentiles, and whether the run was long enough for them
    worst       five minutes of the replay
    """

    deployment: str
    trace: str
    same_trace: bool | None
    rows: tuple[Row, ...]
    met: dict[str, bool]
    summary: Summary
    goodput_per_s: float
    schedule_error_s: Mapping[str, float]
    samples: tuple[Estimate, ...] = ()
    worst: tuple[WorstWindow, ...] = ()

    @property
    def passed(self) -> bool:
        """Every target was met; without targets, every request was finished."""
        return all(self.met.values()) if self.met else self.summary.finished == self.summary.requests

    def save(self, path: str | os.PathLike[str]) -> None:
        """What `paretune report --verification` reads; whole or not at all."""
        plain = {
            "schema_version": SCHEMA_VERSION,
            "deployment": self.deployment,
            "trace": self.trace,
            "passed": self.passed,
            "met": self.met,
            "rows": [{**vars(row), "inside": row.inside} for row in self.rows],
            "summary": self.summary.to_dict(),
            "schedule_error_s": dict(self.schedule_error_s),
        }
        write_whole(path, json.dumps(plain, indent=1) + "\n")


def measured_summary(path: str | os.PathLike[str], deployment: Deployment) -> Summary:
    """The replay's figures from a file that `Verification.save` wrote.

    Raises: BadSpec (exit code 2): it is none, or of another deployment; OSError.
    """
    name, again = Path(path).name, "run `paretune verify` again"
    try:
        plain: dict[str, Any] = json.loads(Path(path).read_bytes())
        version, digest, summary = plain["schema_version"], plain["deployment"], Summary.from_dict(plain["summary"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadSpec(name, error, "a file that `paretune verify` wrote", again) from None
    if version != SCHEMA_VERSION or digest != deployment.digest():
        raise BadSpec(f"{name}: deployment", digest, f"{deployment.digest()}, the spec that was picked", again)
    return summary


def asked_of(deployment: Deployment, trace: Trace, targets: Sequence[Target] = ()) -> tuple[int, float]:
    """What a replay must record and how fast it must be, to be held against a spec: k of TTF-k, multiple of the rate.

    Raises: BadQuestion: targets and predictions ask for two different k, or a target governs no request of the trace.
    """
    asked = list(targets) or [Target.parse(text) for text in deployment.targets] or list(trace.targets)
    check_governed(trace, asked)
    predicted = [Metric.parse(each.metric) for each in deployment.predicted if each.percentile is not None]
    rate = 1.0 if deployment.provenance is None else deployment.provenance.rate
    return k_of([*(target.metric for target in asked), *predicted]), rate


def verify(
    deployment: Deployment,
    trace: Trace,
    times: RequestTimes,
    *,
    targets: Sequence[Target] = (),
    schedule_error_s: Mapping[str, float],
) -> Verification:
    """Hold a spec's predictions and targets against a replay of `trace` on its server.

    Args:
        targets: left out: those of the spec, else the trace's own.
        schedule_error_s: of the replay.
    """
    asked = list(targets) or [Target.parse(text) for text in deployment.targets] or list(trace.targets)
    rows = [_row(each, times) for each in deployment.predicted if each.percentile is not None]
    met = {str(target): meets(times, target, governed_rows(trace, target)) for target in asked}
    tuned_on = None if deployment.provenance is None else deployment.provenance.trace_digest
    return Verification(
        deployment=deployment.digest(),
        trace=trace.digest(),
        same_trace=None if tuned_on is None else tuned_on == trace.digest(),
        rows=tuple(row for row in rows if row is not None),
        met=met,
        summary=summarize(times),
        goodput_per_s=goodput(times, Owed(trace, tuple(asked))) if asked else math.nan,
        schedule_error_s=dict(schedule_error_s),
        samples=estimates(times),
        worst=worst_windows(times),
    )


def _row(prediction: Prediction, times: RequestTimes) -> Row | None:
    metric = Metric.parse(prediction.metric)
    if prediction.percentile is None or (metric.k > 1 and metric.k != times.k) or metric.name == "itl":
        return None
    if prediction.low is None or prediction.high is None:
        return None
    measured = percentile(times.values(metric), prediction.percentile)
    return Row(prediction.metric, prediction.percentile, prediction.value, prediction.low, prediction.high, measured)
