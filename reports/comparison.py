"""Predicted beside measured, number by number, and the table that the demo ends with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..optimizer.front import Evaluation, key_of
from ..traces.metrics import E2E, TPOT, TTFT, Metric, Summary, usd_per_month
from .report_data import Measured, ReportData
from .tables import Table
from .words import UNKNOWN, dollars, metric_label, seconds

SHOWN_PERCENTILES = (50.0, 95.0)

_PARTS = ("predicted", "90 % interval", "measured", "inside")


@dataclass(frozen=True)
class Comparison:
    """One number predicted and measured; NaN = not known.

    who        "pick" or "default"
    name       "TTFT p50", "TTF-30 p95", "$ per million tokens", ...
    unit       "s" or "usd"
    low, high  the predicted interval, 90 %
    """

    who: str
    name: str
    unit: str
    predicted: float
    low: float
    high: float
    measured: float

    @property
    def inside(self) -> bool | None:
        """Whether the measured value lies in the interval; None where there is no interval or no measurement."""
        if math.isnan(self.measured) or math.isnan(self.low) or math.isnan(self.high):
            return None
        return self.low <= self.measured <= self.high

    def text(self, value: float) -> str:
        return seconds(value, 3) if self.unit == "s" else dollars(value)


def as_predicted(evaluation: Evaluation) -> Evaluation:
    """The evaluation without its live run: what was predicted of it."""
    return replace(evaluation, measured=None)


def comparisons(who: str, evaluation: Evaluation, measured: Measured | None) -> tuple[Comparison, ...]:
    """TTFT, TTF-k, TPOT and E2E at SHOWN_PERCENTILES, and both costs, predicted beside measured.

    A month of a deployment costs its devices whether or not they are busy: it is known, not predicted.
    """
    guess = as_predicted(evaluation)
    rows = []
    for metric in _latencies(evaluation):
        for p in SHOWN_PERCENTILES:
            low, high = guess.intervals.get(key_of(metric, p), (math.nan, math.nan))
            rows.append(
                Comparison(
                    who=who,
                    name=f"{metric_label(metric)} p{p:g}",
                    unit="s",
                    predicted=guess.value(metric, p),
                    low=low,
                    high=high,
                    measured=math.nan if measured is None else value_of(measured.summary, metric, p),
                )
            )
    low, high = guess.intervals.get("usd_per_million_tokens", (math.nan, math.nan))
    capacity = math.nan if measured is None else measured.usd_per_million_tokens
    tokens = Comparison(who, "$ per million tokens", "usd", guess.usd_per_million_tokens, low, high, capacity)
    month_usd = usd_per_month(guess.usd_per_hour)
    month = Comparison(who, "$ a month", "usd", month_usd, math.nan, math.nan, math.nan)
    return (*rows, tokens, month)


def compared(data: ReportData) -> tuple[Comparison, ...]:
    """Of the pick and of the default, in this order."""
    return (
        *comparisons("pick", data.chosen, data.chosen_measured),
        *comparisons("default", data.default, data.default_measured),
    )


def final_table(rows: Sequence[Comparison]) -> Table:
    """The table that the demo ends with: a line for each metric of the pick, then of the default."""
    lines = [(f"{row.who}: {row.name}", *_cells(row)) for row in rows]
    return Table("Predicted and measured", ("", *_PARTS), tuple(lines))


def side_by_side(rows: Sequence[Comparison]) -> Table:
    """The same for wide paper: a line a metric, and four columns for each of pick and default."""
    whos = tuple(dict.fromkeys(row.who for row in rows))
    by_place = {(row.who, row.name): row for row in rows}
    names = tuple(dict.fromkeys(row.name for row in rows))
    header = ("", *(f"{who}: {part}" for who in whos for part in _PARTS))
    lines = [(name, *(cell for who in whos for cell in _cells(by_place.get((who, name))))) for name in names]
    return Table("Predicted and measured", header, tuple(lines))


def _cells(row: Comparison | None) -> tuple[str, str, str, str]:
    if row is None:
        return (UNKNOWN,) * 4
    interval = UNKNOWN if math.isnan(row.low) else between(row.text(row.low), row.text(row.high))
    verdict = {True: "yes", False: "no", None: UNKNOWN}[row.inside]
    return row.text(row.predicted), interval, row.text(row.measured), verdict


def between(low: str, high: str) -> str:
    """
    >>> between("410 ms", "520 ms"), between("410 ms", "1.2 s"), between("$3", "$3")
    ('410 to 520 ms', '410 ms to 1.2 s', '$3')
    """
    if low == high:
        return low
    number, _, unit = low.partition(" ")
    return f"{number if unit and unit == high.partition(' ')[2] else low} to {high}"


def _latencies(evaluation: Evaluation) -> Iterable[Metric]:
    """TTFT, TTF-k for the k of the run, TPOT, E2E."""
    names = () if evaluation.summary is None else evaluation.summary.values
    return (TTFT, *(Metric.parse(name) for name in names if name.startswith("ttf") and name[3:].isdigit()), TPOT, E2E)


def value_of(summary: Summary, metric: Metric, percentile: float) -> float:
    """NaN where the summary does not hold it."""
    return summary.values.get(str(metric), {}).get(key_of(metric, percentile).partition(":")[2], math.nan)
