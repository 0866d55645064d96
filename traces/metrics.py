"""What is measured of served requests, and what it costs: one definition each, for all floors above.

Pure functions of times on one clock. TTFT, TTF-k and E2E count from the *scheduled* arrival, so a client that falls
behind its schedule cannot hide the wait (coordinated omission); TTFT from the send, as load generators print it, stands
beside it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
METRIC_NAMES = ("ttft", "ttf", "tpot", "itl", "e2e")

# 8,760 hours of a year over twelve months: how clouds turn an hourly price into a monthly one.
HOURS_PER_MONTH = 730

_METRIC = re.compile(r"ttft|ttf(?P<k>[0-9]{1,9})|tpot|itl|e2e", re.ASCII | re.IGNORECASE)
_TARGET = re.compile(
    r"(?:(?P<app>.+)\s*[/:]\s*)?(?P<metric>ttft|ttf[0-9]{1,9}|tpot|itl|e2e)\s*[:\s]\s*"
    r"p\s?(?P<percentile>[0-9]{1,2}(?:\.[0-9]{1,330})?)\s*(?:<=|≤|\s)\s*"
    r"(?P<limit>[0-9]{1,300}(?:\.[0-9]{1,330})?)\s*(?P<unit>us|ms|s)",
    re.IGNORECASE | re.DOTALL,
)
_UNIT_EXPONENT = {"us": -6, "ms": -3, "s": 0}


class BadTarget(ValueError):
    """A metric or a latency target that cannot be understood."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {self.found!r:.80}; allowed: {self.allowed}; {self.todo}"


@dataclass(frozen=True)
class Metric:
    """One latency of a request: "ttft", "ttf" (with k: time to the first k tokens), "tpot", "itl" or "e2e"."""

    name: str
    k: int = 0

    def __post_init__(self) -> None:
        if self.name not in METRIC_NAMES or (self.k >= 1) != (self.name == "ttf"):
            raise BadTarget(
                "metric", f"{self.name}{self.k or ''}", "ttft, ttf1, ttf30, ..., tpot, itl, e2e", "name one"
            )

    @classmethod
    def parse(cls, text: str) -> Metric:
        """
        >>> Metric.parse("ttf30")
        Metric(name='ttf', k=30)
        """
        match = _METRIC.fullmatch(text.strip())
        if match is None:
            raise BadTarget("metric", text, "ttft, ttf1, ttf30, ..., tpot, itl, e2e", "name one")
        return cls("ttf", int(match["k"])) if match["k"] else cls(match[0].lower())

    def __str__(self) -> str:
        return f"ttf{self.k}" if self.name == "ttf" else self.name


TTFT, TPOT, ITL, E2E = Metric("ttft"), Metric("tpot"), Metric("itl"), Metric("e2e")


def _plain(value: float, exponent: int = 0) -> str:
    """The shortest decimal that reads back as the same float, times 10**exponent, without an exponent of its own."""
    text = format(Decimal(repr(value)).scaleb(exponent), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True)
class Target:
    """A service-level objective: `percentile` percent of the requests it governs have `metric` <= `limit_s`.

    app: the application it governs; None governs every application. (Requests with a target of their own answer to
    that one alone, see Trace.rows.)

    >>> str(Target.parse("voice: ttf30 p95 600 ms"))
    'voice/ttf30:p95<=600ms'
    """

    metric: Metric
    percentile: float
    limit_s: float
    app: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.percentile < 100:
            raise BadTarget("target: percentile", self.percentile, "more than 0 and less than 100", "write p95, say")
        if not (0 < self.limit_s < math.inf):
            raise BadTarget("target: limit", self.limit_s, "a positive number of seconds", "write 600ms, say")
        if self.app is not None and (not self.app or self.app != self.app.strip()):
            raise BadTarget("target: app", self.app, "a name without blanks at its ends", "correct the name")

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read "ttf30:p95<=600ms", "voice/ttf30:p95<=0.6s" or "voice: ttf30 p95 600 ms".

        Raises: BadTarget: it is none of these.
        """
        match = _TARGET.fullmatch(text.strip())
        if match is None:
            raise BadTarget("target", text, "[APP/]METRIC:pNN<=LIMIT(us|ms|s)", "write voice/ttf30:p95<=600ms, say")
        return cls(
            metric=Metric.parse(match["metric"]),
            percentile=float(match["percentile"]),
            limit_s=float(Decimal(match["limit"]).scaleb(_UNIT_EXPONENT[match["unit"].lower()])),
            app=match["app"].strip() if match["app"] is not None else None,
        )

    def __str__(self) -> str:
        limit = f"{_plain(self.limit_s)}s" if self.limit_s >= 1 else f"{_plain(self.limit_s, 3)}ms"
        app = "" if self.app is None else f"{self.app}/"
        return f"{app}{self.metric}:p{_plain(self.percentile)}<={limit}"


class Governed(Protocol):
    """What the functions below need of a Trace (traces/trace.py): its targets, and the rows each governs."""

    @property
    def targets(self) -> tuple[Target, ...]: ...

    def rows(self, target: Target) -> Mask: ...


class TokenGaps(Protocol):
    """Inter-token latencies of n requests, in whatever form they were recorded; rows as in `RequestTimes.sample`."""

    def sample(self, rows: Mask | None = None) -> Floats:
        """Every gap, seconds."""
        ...

    def longest_s(self) -> Floats:
        """The longest gap of each request, (n,) seconds; NaN where it has none."""
        ...

    def mean(self, rows: Mask | None = None) -> float:
        """Mean of every gap; NaN without any."""
        ...

    def percentiles(self, ps: Sequence[float], rows: Mask | None = None, infinite: int = 0) -> list[float]:
        """`percentiles` of every gap and of so many infinite values."""
        ...


@dataclass(frozen=True)
class RequestTimes:
    """When the tokens of every request of a trace came; one row each, in trace order, n rows.

    scheduled_s    (n,) float64  when the trace says it arrives; seconds, all five on one clock
    sent_s         (n,) float64  when it was really sent
    first_token_s  (n,) float64  first output token; NaN = it never came (here and below)
    kth_token_s    (n,) float64  k-th output token; not read for answers shorter than k
    end_s          (n,) float64  last output token
    output_tokens  (n,) int64    tokens that came
    finished       (n,) bool     False: rejected, failed, or still open when the run ended
    k              int >= 1      of kth_token_s
    token_gap_s    (g,) float64  inter-token latencies, request after request; None = not recorded
    gap_offsets    (n + 1,) int64  request i has the gaps gap_offsets[i]:gap_offsets[i + 1]
    """

    scheduled_s: Floats
    sent_s: Floats
    first_token_s: Floats
    kth_token_s: Floats
    end_s: Floats
    output_tokens: Ints
    finished: Mask
    k: int
    token_gap_s: Floats | None = None
    gap_offsets: Ints | None = None
    gaps: TokenGaps | None = None

    def __len__(self) -> int:
        return len(self.scheduled_s)

    def values(self, metric: Metric) -> Floats:
        """The metric of every request, (n,) seconds; NaN where it is undefined.

        ttft   first_token_s - scheduled_s
        ttf k  kth_token_s - scheduled_s; an answer shorter than k tokens counts as complete at end_s, so that
               TTF-1 = TTFT and TTF-k never falls with k
        tpot   (e2e - ttft) / (output_tokens - 1); undefined for one token
        itl    the longest gap of the request; undefined for one token (percentiles pool all gaps, see `sample`)
        e2e    end_s - scheduled_s

        Raises: ValueError: a k other than 1 and this record's, or gaps that were not recorded.
        """
        if metric.name == "ttft" or (metric.name == "ttf" and metric.k == 1):
            return self.first_token_s - self.scheduled_s
        if metric.name == "ttf":
            if metric.k != self.k:
                raise ValueError(f"{metric} was not recorded: these times have k = 1 and k = {self.k}")
            complete_s = np.where(self.finished, self.end_s, np.nan)
            return np.where(self.output_tokens >= self.k, self.kth_token_s, complete_s) - self.scheduled_s
        if metric.name == "itl":
            return self._longest_gap_s()
        end_s = np.where(self.finished, self.end_s, np.nan)
        if metric.name == "e2e":
            return end_s - self.scheduled_s
        several = self.output_tokens > 1
        return np.where(several, (end_s - self.first_token_s) / np.where(several, self.output_tokens - 1, 1), np.nan)

    def sample(self, metric: Metric, rows: Mask | None = None) -> Floats:
        """What a percentile of the metric is taken over: a value a request, and for ITL every gap of every request."""
        if metric.name != "itl":
            values = self.values(metric)
            return values if rows is None else values[rows]
        if self.gaps is not None:
            return self.gaps.sample(rows)
        gap_s, offsets = self._gaps()
        return gap_s if rows is None else gap_s[np.repeat(rows, np.diff(offsets))]

    def percentiles(self, metric: Metric, ps: Sequence[float], rows: Mask | None = None, late: int = 0) -> list[float]:
        """Percentiles of `sample`, with so many infinite values beside it."""
        if metric.name == "itl" and self.gaps is not None:
            return self.gaps.percentiles(ps, rows, late)
        return percentiles(np.append(self.sample(metric, rows), np.full(late, np.inf)), ps)

    def ttft_from_send(self) -> Floats:
        """first_token_s - sent_s, (n,) seconds: what load generators call TTFT; it leaves out a late send."""
        return self.first_token_s - self.sent_s

    def _gaps(self) -> tuple[Floats, Ints]:
        if self.token_gap_s is None or self.gap_offsets is None:
            raise ValueError("itl was not recorded: these times have no token gaps")
        return self.token_gap_s, self.gap_offsets

    def _longest_gap_s(self) -> Floats:
        if self.gaps is not None:
            return self.gaps.longest_s()
        gap_s, offsets = self._gaps()
        longest_s = np.full(len(self), np.nan)
        some = np.diff(offsets) > 0
        if some.any():
            longest_s[some] = np.maximum.reduceat(gap_s, offsets[:-1][some])
        return longest_s


def percentiles(values: npt.ArrayLike, ps: Sequence[float]) -> list[float]:
    """Percentiles with linear interpolation between order statistics (NumPy's default, Hyndman and Fan's type 7).

    NaN is left out, infinity is a value (NumPy gives NaN beside it); NaN where nothing is left.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=None)
    count = len(ordered) - int(np.count_nonzero(np.isnan(ordered)))  # which stand at the end
    if not count:
        return [math.nan] * len(ps)
    out = []
    for p in ps:
        rank = p / 100 * (count - 1)
        low = int(rank)
        below, above = float(ordered[low]), float(ordered[min(low + 1, count - 1)])
        share = rank - low
        out.append(below if share == 0 or below == above else below + share * (above - below))
    return out


def percentile(values: npt.ArrayLike, p: float) -> float:
    """One percentile, 0 <= p <= 100; see `percentiles`."""
    return percentiles(values, (p,))[0]


@dataclass(frozen=True)
class Summary:
    """A run in figures.

    requests, finished   counts; percentiles of E2E and TPOT are over the finished ones only, so read them beside these
    short_of_k_share     share of finished answers with fewer than k tokens, whose TTF-k is their completion
    tpot_undefined       finished answers of one token, which TPOT leaves out
    duration_s           from the first scheduled arrival to the last token
    output_tokens_per_s  all tokens that came, over duration_s
    values               metric ("ttft", "ttft_from_send", "ttf30", "tpot", "e2e", and "itl" where gaps were recorded)
                         -> {"mean", "p50", "p90", "p95", "p99"} in seconds, NaN where there is nothing to take them of
    """

    requests: int
    finished: int
    short_of_k_share: float
    tpot_undefined: int
    duration_s: float
    output_tokens_per_s: float
    values: Mapping[str, Mapping[str, float]]

    def value(self, metric: Metric | str, p: float | str) -> float:
        """
        Raises: KeyError: a metric or percentile that the summary does not hold.
        """
        return self.values[str(metric)][p if isinstance(p, str) else f"p{_plain(float(p))}"]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data: NaN becomes None."""
        return {
            "requests": self.requests,
            "finished": self.finished,
            "short_of_k_share": _or_none(self.short_of_k_share),
            "tpot_undefined": self.tpot_undefined,
            "duration_s": self.duration_s,
            "output_tokens_per_s": self.output_tokens_per_s,
            "values": {m: {p: _or_none(value) for p, value in by.items()} for m, by in self.values.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Summary:
        values = {m: {p: _or_nan(value) for p, value in by.items()} for m, by in data["values"].items()}
        return cls(**{**data, "short_of_k_share": _or_nan(data["short_of_k_share"]), "values": values})


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _distribution(values: Floats) -> dict[str, float]:
    undefined = np.isnan(values)
    if undefined.any():
        values = values[~undefined]
    mean = float(np.mean(values)) if len(values) else math.nan
    return {"mean": mean} | {f"p{p:g}": x for p, x in zip(PERCENTILES, percentiles(values, PERCENTILES))}


def summarize(times: RequestTimes, rows: Mask | None = None) -> Summary:
    """The figures of a run, or of the requests in `rows` ((n,) bool; say, one application's)."""
    inside = np.ones(len(times), dtype=np.bool_) if rows is None else rows
    finished = times.finished & inside
    metrics = [TTFT, Metric("ttf", times.k), TPOT, E2E] + ([ITL] if times.token_gap_s is not None else [])
    values = {str(metric): _distribution(times.sample(metric, rows)) for metric in metrics}
    if times.gaps is not None:
        values["itl"] = {"mean": times.gaps.mean(rows)}
        values["itl"] |= {f"p{p:g}": x for p, x in zip(PERCENTILES, times.gaps.percentiles(PERCENTILES, rows))}
    if times.sent_s is times.scheduled_s:
        values["ttft_from_send"] = dict(values["ttft"])
    else:
        values["ttft_from_send"] = _distribution(times.ttft_from_send()[inside])
    duration_s = _duration_s(times, inside)
    tokens = int(times.output_tokens[inside].sum())
    count = int(finished.sum())
    return Summary(
        requests=int(inside.sum()),
        finished=count,
        short_of_k_share=float((times.output_tokens[finished] < times.k).mean()) if count else math.nan,
        tpot_undefined=int((times.output_tokens[finished] <= 1).sum()),
        duration_s=duration_s,
        output_tokens_per_s=tokens / duration_s if duration_s > 0 else 0.0,
        values=values,
    )


def _duration_s(times: RequestTimes, rows: Mask) -> float:
    """First scheduled arrival to last token; 0 where no token came."""
    ends = times.end_s[rows]
    ends = ends[~np.isnan(ends)]
    return float(ends.max() - times.scheduled_s[rows].min()) if len(ends) else 0.0


def judged_s(times: RequestTimes, target: Target, rows: Mask | None) -> float:
    """The target's percentile over `rows`, which `meets` holds against its limit, seconds; NaN where nothing has it.

    An unfinished request counts as one infinite value.
    """
    finished = times.finished if rows is None else times.finished & rows
    unfinished = ~times.finished if rows is None else ~times.finished & rows
    return times.percentiles(target.metric, (target.percentile,), finished, int(unfinished.sum()))[0]


def meets(times: RequestTimes, target: Target, rows: Mask | None = None) -> bool:
    """Whether the target holds over `rows` ((n,) bool; None = all). The target's `app` is not looked at here.

    A request that did not finish counts as infinitely late. Where the metric is defined for no request (no rows, or
    TPOT of one-token answers) there is nothing to break the target, and it holds.
    """
    measured_s = judged_s(times, target, rows)
    return math.isnan(measured_s) or measured_s <= target.limit_s


def violations(times: RequestTimes, trace: Governed) -> list[tuple[Target, float]]:
    """The trace's own targets that do not hold, each over the rows it governs, and the percentile measured, seconds."""
    broken = []
    for target in dict.fromkeys(trace.targets):
        rows = trace.rows(target)
        if not meets(times, target, rows):
            broken.append((target, judged_s(times, target, rows)))
    return broken


def goodput(times: RequestTimes, trace: Governed, rows: Mask | None = None) -> float:
    """Finished requests per second whose own value is within the limit of every target that governs them.

    Per request, as DistServe defines it (Zhong et al., OSDI 2024): the target's percentile plays no part. A value that
    is undefined (TPOT of one token) is within. Without targets: finished requests per second.

    Args:
        rows: (n,) bool, which requests count, and over whose time; None: all.
    """
    inside = np.ones(len(times), dtype=np.bool_) if rows is None else rows
    good = times.finished & inside
    for target in dict.fromkeys(trace.targets):
        good &= ~(trace.rows(target) & (times.values(target.metric) > target.limit_s))
    duration_s = _duration_s(times, inside)
    return float(good.sum()) / duration_s if duration_s > 0 else 0.0


def sizing_cost_usd_per_hour(devices_per_replica: int, replicas: int, usd_per_device_hour: float) -> float:
    """Cost of a deployment: the hourly price of every device that it holds, idle or not."""
    return devices_per_replica * replicas * usd_per_device_hour


def usd_per_month(usd_per_hour: float) -> float:
    """The same deployment held for a month of HOURS_PER_MONTH."""
    return usd_per_hour * HOURS_PER_MONTH


def usd_per_million_tokens(usd_per_hour: float, tokens_per_s: float) -> float:
    """Cost of capacity: what a million output tokens cost at a rate of tokens_per_s; infinite at 0."""
    return usd_per_hour / (tokens_per_s * 3600) * 1e6 if tokens_per_s > 0 else math.inf
