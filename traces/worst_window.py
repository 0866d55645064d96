"""The worst five minutes of a run: what a percentile over hours hides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .metrics import E2E, TPOT, TTFT, Mask, Metric, RequestTimes, percentile

WINDOW_S = 300.0
# a window begins at every tenth of its length
_STARTS_PER_WINDOW = 10
# with fewer requests a p95 is the largest but one
LEAST_REQUESTS = 20


@dataclass(frozen=True)
class WorstWindow:
    """The window of a run in which a percentile was largest.

    started_s  when it began, seconds after the first arrival
    seconds    its length; that of the run where the run is no longer
    requests   that arrived in it
    value      the percentile over these, seconds
    whole      the percentile over the whole run, seconds
    """

    metric: str
    percentile: float
    started_s: float
    seconds: float
    requests: int
    value: float
    whole: float


def worst_window(
    times: RequestTimes, metric: Metric, p: float, rows: Mask | None = None, seconds: float = WINDOW_S
) -> WorstWindow:
    """The window of `seconds`, by arrival, with the largest percentile; windows of a few requests are left out.

    The last window ends with the last arrival, which it holds. Requests without a value are left out, as in
    `summarize`.
    """
    values = times.values(metric)
    if rows is not None:
        values = np.where(rows, values, np.nan)
    # where requests wait for others, the order of the log is not that of time
    order = np.argsort(times.scheduled_s, kind="stable")
    values, scheduled_s = values[order], times.scheduled_s[order]
    known = np.flatnonzero(~np.isnan(values))
    whole = percentile(values, p)
    if not len(known):
        return WorstWindow(str(metric), p, 0.0, 0.0, 0, whole, whole)
    since_s = scheduled_s[known] - scheduled_s[0]
    duration_s = float(scheduled_s[-1] - scheduled_s[0])
    worst = WorstWindow(str(metric), p, 0.0, duration_s, len(known), whole, whole)
    if duration_s <= seconds:
        return worst
    starts = int((duration_s - seconds) / seconds * _STARTS_PER_WINDOW) + 1
    starts_s = [start * seconds / _STARTS_PER_WINDOW for start in range(starts)]
    spans_s = [*((at_s, at_s + seconds) for at_s in starts_s), (duration_s - seconds, math.inf)]
    found = []
    for started_s, behind_s in spans_s:
        first, behind = np.searchsorted(since_s, (started_s, behind_s))
        if behind - first >= LEAST_REQUESTS:
            value = percentile(values[known[first:behind]], p)
            found.append(WorstWindow(str(metric), p, started_s, seconds, int(behind - first), value, whole))
    return max(found, key=lambda each: each.value, default=worst)


def worst_windows(times: RequestTimes, p: float = 95.0, rows: Mask | None = None) -> tuple[WorstWindow, ...]:
    """The worst five minutes of TTFT, TTF-k, TPOT and E2E, each by itself."""
    return tuple(worst_window(times, metric, p, rows) for metric in (TTFT, Metric("ttf", times.k), TPOT, E2E))
