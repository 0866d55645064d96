"""Predicted against measured: what a spec promised and what the running server did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..profiler.simulator import governed_rows
from ..runtime.spec import Deployment, Prediction
from ..traces.metrics import Metric, RequestTimes, Target, meets, percentile
from ..traces.trace import Trace


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

    rows        predictions of the spec that the replay measured
    met         target -> whether the replay met it
    finished, requests   of the replay
    """

    rows: tuple[Row, ...]
    met: dict[str, bool]
    finished: int
    requests: int

    @property
    def passed(self) -> bool:
        """Every target was met; without targets, every request was finished."""
        return all(self.met.values()) if self.met else self.finished == self.requests


def verify(deployment: Deployment, trace: Trace, times: RequestTimes, targets: Sequence[Target] = ()) -> Verification:
    """Hold a spec's predictions and targets against a replay of `trace` on its server.

    Args:
        targets: left out: those of the spec, else the trace's own.
    """
    asked = list(targets) or [Target.parse(text) for text in deployment.targets] or list(trace.targets)
    rows = [_row(each, times) for each in deployment.predicted if each.percentile is not None]
    met = {str(target): meets(times, target, governed_rows(trace, target)) for target in asked}
    return Verification(
        rows=tuple(row for row in rows if row is not None),
        met=met,
        finished=int(times.finished.sum()),
        requests=len(times),
    )


def _row(prediction: Prediction, times: RequestTimes) -> Row | None:
    metric = Metric.parse(prediction.metric)
    if prediction.percentile is None or (metric.k > 1 and metric.k != times.k) or metric.name == "itl":
        return None
    measured = percentile(times.values(metric), prediction.percentile)
    return Row(prediction.metric, prediction.percentile, prediction.value, prediction.low, prediction.high, measured)
