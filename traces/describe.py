"""What a request log contains: rates, burstiness, lengths, prefix reuse, per application; and a fingerprint to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .acceptance import Acceptance, total
from .metrics import percentiles
from .trace import Trace

# About as long as an answer takes: a burst that outlives its requests becomes a queue, a shorter one is averaged out.
DISPERSION_WINDOW_S = 10.0

# Fewer windows than this make an index of dispersion worth nothing, so a short trace gets shorter windows.
LEAST_WINDOWS = 30

FINGERPRINT_VERSION = 1
FINGERPRINT_PERCENTILES = (10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0)
# Stretches into which a trace is cut to see how much it moves by itself.
BLOCKS = 20


@dataclass(frozen=True)
class Lengths:
    """Of a column of token counts; tokens."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: int


@dataclass(frozen=True)
class AppStatistics:
    """One application, or all of them together.

    app                 its name; None for requests without one, and for all together
    requests, share     count, and part of all requests
    rate_per_s          share of the trace's mean rate; the rates of all applications add up to it
    interarrival_cv     standard deviation over mean of the times between its arrivals; 1 for a Poisson process, NaN for
                        fewer than three requests
    dispersion          index of dispersion: variance over mean of its arrivals per window; 1 for a Poisson process, NaN
                        where the trace has no duration. A trend in the rate raises it too
    input, output       Lengths
    input_output_ratio  input tokens over output tokens
    prefix_reuse        share of its input tokens that repeat an earlier request's prefix (of any application): what a
                        prefix cache without limits would save; None where the trace has no prefix hashes
    sessions            distinct ones
    adapters            (name, requests), most used first
    acceptance          of speculative decoding; None where it was not used
    """

    app: str | None
    requests: int
    share: float
    rate_per_s: float
    interarrival_cv: float
    dispersion: float
    input: Lengths
    output: Lengths
    input_output_ratio: float
    prefix_reuse: float | None
    sessions: int
    adapters: tuple[tuple[str, int], ...]
    acceptance: Acceptance | None


@dataclass(frozen=True)
class Statistics:
    """A trace in figures: all requests, then each application, largest first."""

    source: str
    notes: tuple[str, ...]
    duration_s: float
    dispersion_window_s: float
    targets: tuple[str, ...]
    total: AppStatistics
    apps: tuple[AppStatistics, ...]


def statistics(trace: Trace) -> Statistics:
    """Describe a trace. `apps` is empty where the trace names no application."""
    window_s = dispersion_window_s(trace)
    reused = reused_tokens(trace)
    everything = np.ones(len(trace), dtype=np.bool_)
    apps = []
    if trace.app is not None:
        counts = np.bincount(trace.app.codes + 1, minlength=len(trace.app.names) + 1)
        for code in np.argsort(-counts, kind="stable"):
            if counts[code]:
                name = trace.app.names[code - 1] if code else None
                apps.append(_of(trace, name, trace.app.codes == code - 1, window_s, reused))
    return Statistics(
        source=trace.source,
        notes=trace.notes,
        duration_s=trace.duration_s,
        dispersion_window_s=window_s,
        targets=tuple(str(target) for target in dict.fromkeys(trace.targets)),
        total=_of(trace, None, everything, window_s, reused),
        apps=tuple(apps),
    )


def dispersion_window_s(trace: Trace) -> float:
    """DISPERSION_WINDOW_S, or less where the trace would not hold LEAST_WINDOWS of them."""
    return min(DISPERSION_WINDOW_S, trace.duration_s / LEAST_WINDOWS)


@dataclass(frozen=True)
class WindowCounts:
    """Arrivals in the whole windows of a trace, from its first arrival on.

    windows  how many there are, empty ones included; they may be very many
    counts   (w,) int64, of those that are not empty
    """

    windows: int
    counts: npt.NDArray[np.int64]

    @property
    def dispersion(self) -> float:
        """Index of dispersion: variance over mean; NaN for fewer than two windows or no arrivals."""
        return self._variance() / self._mean() if self.windows > 1 and len(self.counts) else math.nan

    @property
    def dispersion_relative_error(self) -> float:
        """Standard error of the index of dispersion over itself; NaN without spread.

        From the fourth moment of the counts, and no less than normal counts would give (few windows hide their own
        tail): Var(s^2) = (m4 - s^4 (w - 3)/(w - 1)) / w for w independent windows (Mood, Graybill and Boes,
        Introduction to the Theory of Statistics, VI.2).
        """
        windows, variance = self.windows, self._variance() if self.windows > 3 else 0.0
        if variance == 0:
            return math.nan
        excess = max(self._moment(4) - variance**2 * (windows - 3) / (windows - 1), 0.0)
        return max(math.sqrt(excess / windows) / variance, math.sqrt(2 / (windows - 1)))

    def _mean(self) -> float:
        return float(self.counts.sum()) / self.windows

    def _variance(self) -> float:
        return self._moment(2) * self.windows / (self.windows - 1)

    def _moment(self, power: int) -> float:
        """Central moment over all windows."""
        mean = self._mean()
        empty = self.windows - len(self.counts)
        return (float(((self.counts - mean) ** power).sum()) + empty * mean**power) / self.windows


def window_counts(trace: Trace, rows: npt.NDArray[np.bool_], window_s: float) -> WindowCounts:
    """Arrivals of `rows` in windows of window_s; none where it is 0 or no part that floating point can tell.

    A window that the trace ends in is left out: it would look like a lull.
    """
    if not 0 < window_s <= trace.duration_s or trace.duration_s / window_s > 2**53:
        return WindowCounts(0, np.empty(0, np.int64))
    windows = int(trace.duration_s / window_s + 1e-9)
    index = ((trace.arrival_s[rows] - trace.arrival_s[0]) / window_s).astype(np.int64)
    return WindowCounts(windows, np.unique(index[index < windows], return_counts=True)[1].astype(np.int64))


def reused_tokens(trace: Trace) -> npt.NDArray[np.int64] | None:
    """Input tokens of each request, (n,) int64, in blocks whose hash an earlier request had; None without hashes.

    As hashes are chained these blocks are the start of the prompt.
    """
    prefix = trace.prefix
    if prefix is None:
        return None
    counts = prefix.counts
    request = np.repeat(np.arange(len(trace)), counts)
    position = np.arange(len(prefix.hashes)) - np.repeat(prefix.offsets[:-1], counts)
    _, first, inverse = np.unique(prefix.hashes, return_index=True, return_inverse=True)
    seen = request[first][inverse] < request
    rest = trace.input_tokens.astype(np.int64)[request] - position * prefix.block_size
    covered = np.minimum(rest, prefix.block_size)
    reused: npt.NDArray[np.int64] = np.bincount(request[seen], covered[seen], minlength=len(trace)).astype(np.int64)
    return reused


def fingerprint(trace: Trace) -> dict[str, Any]:
    """What to keep of a trace to see later whether the workload moved (drift.py): plain JSON, and no chance in it.

    Beside each figure stands how much it varies: counts and lengths come in bursts, so the noise of a mean over n
    requests is that of n / design_effect independent ones. It is estimated from BLOCKS stretches of the trace, so what
    moves within a trace (a trend, a daily peak) widens what counts as noise.
    """
    everything = np.ones(len(trace), dtype=np.bool_)
    window_s = dispersion_window_s(trace)
    counts = window_counts(trace, everything, window_s)
    return {
        "version": FINGERPRINT_VERSION,
        "requests": len(trace),
        "duration_s": trace.duration_s,
        "rate_per_s": trace.rate_per_s,
        "count_design_effect": _count_design_effect(trace, everything),
        "interarrival_cv": _or_none(_interarrival_cv(trace.arrival_s)),
        "dispersion": _or_none(counts.dispersion),
        "dispersion_window_s": window_s,
        "dispersion_relative_error": _or_none(counts.dispersion_relative_error),
        "input_tokens": _length_print(trace.input_tokens),
        "output_tokens": _length_print(trace.output_tokens),
        "prefix_reuse": reuse_curve(trace),
        "apps": app_shares(trace),
    }


def reuse_curve(trace: Trace) -> list[list[float]] | None:
    """[requests, share of their input tokens reused, standard error] of the first 64, 128, ... requests, then of all.

    A longer trace reuses more because it has seen more, so two traces are compared at the same number of requests.
    """
    reused = reused_tokens(trace)
    if reused is None:
        return None
    heads = [2**i for i in range(6, 40) if 2**i < len(trace)]
    curve = []
    for head in [*heads, len(trace)]:
        tokens, hits = trace.input_tokens[:head].astype(np.float64), reused[:head].astype(np.float64)
        share = hits.sum() / tokens.sum()
        # error of a ratio from the residuals of stretches of requests (Cochran, Sampling Techniques, 1977, ch. 6)
        starts = np.unique(np.linspace(0, head, BLOCKS + 1).astype(np.int64)[:-1])
        residuals = np.add.reduceat(hits - share * tokens, starts)
        curve.append([head, float(share), float(np.sqrt((residuals**2).sum()) / tokens.sum())])
    return curve


def app_shares(trace: Trace) -> dict[str, dict[str, float]]:
    """Application -> its share of the requests and the design effect of its counts; {} where none is named."""
    if trace.app is None:
        return {}
    shares = {}
    for code, name in sorted(enumerate(trace.app.names), key=lambda pair: pair[1]):
        rows = trace.app.codes == code
        shares[name] = {"share": float(rows.mean()), "design_effect": _count_design_effect(trace, rows)}
    return shares


def _of(
    trace: Trace,
    app: str | None,
    rows: npt.NDArray[np.bool_],
    window_s: float,
    reused: npt.NDArray[np.int64] | None,
) -> AppStatistics:
    share = float(rows.mean())
    input_tokens, output_tokens = trace.input_tokens[rows], trace.output_tokens[rows]
    adapters: tuple[tuple[str, int], ...] = ()
    if trace.adapter is not None:
        uses = np.bincount(trace.adapter.codes[rows] + 1, minlength=len(trace.adapter.names) + 1)[1:]
        named = ((trace.adapter.names[code], int(uses[code])) for code in np.argsort(-uses, kind="stable"))
        adapters = tuple((name, count) for name, count in named if count)
    return AppStatistics(
        app=app,
        requests=int(rows.sum()),
        share=share,
        rate_per_s=trace.rate_per_s * share,
        interarrival_cv=_interarrival_cv(trace.arrival_s[rows]),
        dispersion=window_counts(trace, rows, window_s).dispersion,
        input=_lengths(input_tokens),
        output=_lengths(output_tokens),
        input_output_ratio=float(input_tokens.sum(dtype=np.int64) / output_tokens.sum(dtype=np.int64)),
        prefix_reuse=None if reused is None else float(reused[rows].sum() / input_tokens.sum(dtype=np.int64)),
        sessions=0 if trace.session is None else len(np.setdiff1d(trace.session.codes[rows], [-1])),
        adapters=adapters,
        acceptance=_acceptance(trace, app, bool(rows.all())),
    )


def _acceptance(trace: Trace, app: str | None, everybody: bool) -> Acceptance | None:
    if not trace.acceptance:
        return None
    if app is None and everybody:
        return total(trace.acceptance)
    return next((each for each in trace.acceptance if each.app == app), None)


def _lengths(tokens: npt.NDArray[np.int32]) -> Lengths:
    p50, p90, p95, p99 = percentiles(tokens, (50, 90, 95, 99))
    return Lengths(mean=float(tokens.mean()), p50=p50, p90=p90, p95=p95, p99=p99, max=int(tokens.max()))


def _interarrival_cv(arrival_s: npt.NDArray[np.float64]) -> float:
    gaps_s = np.diff(arrival_s)
    return float(gaps_s.std() / gaps_s.mean()) if len(gaps_s) > 1 and gaps_s.any() else math.nan


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _length_print(tokens: npt.NDArray[np.int32]) -> dict[str, Any]:
    return {
        "mean": float(tokens.mean()),
        "percentiles": dict(
            zip((f"p{p:g}" for p in FINGERPRINT_PERCENTILES), percentiles(tokens, FINGERPRINT_PERCENTILES))
        ),
        "design_effect": length_design_effect(tokens),
    }


def length_design_effect(tokens: npt.NDArray[np.int32]) -> float:
    """Variance of the means of BLOCKS stretches over what independent requests would give, at least 1 (Kish, 1965).

    Of ranks instead of tokens, so that one enormous request does not decide it.
    """
    if len(tokens) < 2 * BLOCKS:
        return 1.0
    ordered = np.sort(tokens)
    ranks = (np.searchsorted(ordered, tokens, "left") + np.searchsorted(ordered, tokens, "right")) / 2.0
    if not (spread := float(ranks.var())):
        return 1.0
    means = np.array([stretch.mean() for stretch in np.array_split(ranks, BLOCKS)])
    return max(1.0, float(means.var(ddof=1)) / (spread / (len(tokens) / BLOCKS)))


def _count_design_effect(trace: Trace, rows: npt.NDArray[np.bool_]) -> float:
    """Index of dispersion of the counts, at least 1, over windows and over BLOCKS long ones, whichever is larger."""
    measured = [
        window_counts(trace, rows, window_s).dispersion
        for window_s in (dispersion_window_s(trace), trace.duration_s / BLOCKS)
    ]
    return max([1.0, *(value for value in measured if not math.isnan(value))])
