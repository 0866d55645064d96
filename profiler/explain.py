"""Where the time of a metric goes: what EXPLAIN is to a query.

A simulated run with recording on (step_record.py) gives the parts of every request. A percentile is explained by the
requests around it: the mean of their parts, scaled so that it adds up to the percentile itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.spec import Pool
from ..traces.metrics import METRIC_NAMES, BadTarget, Metric, RequestTimes, percentile
from ..traces.trace import Trace
from .simulator import SimulationResult, simulate
from .step_limits import RESOURCES, LimitTables
from .step_parts import PARTS, STEP_FLOATS, STEP_INTS, TO_CLIENT, Record
from .step_record import Gaps, Recorder
from .step_time import ModeledStep, StepTables

Floats = NDArray[np.float64]

WORDS = {
    "to_scheduler": "before the scheduler (HTTP, tokenizer, waking up)",
    "queue_seats": "queue: max_num_seqs reached",
    "queue_tokens": "queue: max_num_batched_tokens spent",
    "queue_blocks": "queue: no KV blocks",
    "queue_adapters": "queue: no adapter slot",
    "queue_step": "queue: step under way",
    "prefill": "own prefill",
    "decode": "own decode",
    "others_prefill": "behind others' prefills",
    "others_decode": "others' decodes in the batch",
    "recompute": "recompute after preemption",
    "preempted": "preempted, waiting for blocks",
    "draft": "draft model",
    "copies": "KV blocks to and from the host",
    "adapters": "LoRA adapters",
    "pipeline": "pipeline stages busy",
    "to_client": "to the client (HTTP, text)",
}

# Requests around a percentile that explain it: a hundredth of all to either side, and two at least.
_NEIGHBORS_SHARE = 0.01
_LEAST_NEIGHBORS = 2


@dataclass(frozen=True)
class Part:
    """Seconds of a metric that one cause takes, and what bound the steps meanwhile (RESOURCES -> seconds)."""

    name: str
    seconds: float
    by_resource: dict[str, float]

    @property
    def bound(self) -> str:
        """The resource with the most of it."""
        return max(self.by_resource, key=lambda name: self.by_resource[name])


@dataclass(frozen=True)
class Explained:
    """One percentile of a metric, taken apart.

    value      of the percentile, seconds; the parts add up to it
    parts      those that take time, the largest first
    neighbors  requests around the percentile whose parts were averaged (of ITL: gaps)
    scale      value / their mean
    """

    metric: str
    percentile: float
    value: float
    parts: tuple[Part, ...]
    neighbors: int
    scale: float

    @property
    def by_resource(self) -> dict[str, float]:
        return {name: sum(part.by_resource[name] for part in self.parts) for name in RESOURCES}

    def seconds(self, *names: str) -> float:
        """Of some parts together."""
        return sum(part.seconds for part in self.parts if part.name in names)


@dataclass(frozen=True)
class StepKind:
    """Steps with one label: bound by one resource more than by any other."""

    label: str
    steps: int
    seconds: float
    share: float


@dataclass(frozen=True)
class Occupancy:
    """How full something was while steps ran: mean and 95th percentile over time, and what there is of it."""

    name: str
    mean: float
    p95: float
    limit: int


@dataclass(frozen=True)
class Explanation:
    """A run, explained.

    steps      by label, the most seconds first
    occupancy  requests in a step, tokens of a step, KV blocks, and requests that wait (without a limit: 0)
    busy_share of the time from the first arrival to the last token, all replicas together
    """

    metrics: tuple[Explained, ...]
    steps: tuple[StepKind, ...]
    occupancy: tuple[Occupancy, ...]
    busy_share: float
    result: SimulationResult


def explain(
    trace: Trace,
    pool: Pool,
    modeled: ModeledStep,
    limits: LimitTables,
    asked: Sequence[tuple[Metric, float]],
    *,
    draft_limits: LimitTables | None = None,
    policy: str = "paretune",
    k: int = 30,
    rate: float = 1.0,
) -> tuple[Explanation, StepLog]:
    """Simulate a run step by step and take percentiles of it apart.

    Args:
        limits, draft_limits: of the tables of `modeled` (step_limits.py).
        asked: metrics and percentiles; TTF-k of this k alone. ITL takes a run more for each.
    Returns: what was found, and every step.
    """

    def run(gaps: Gaps | None) -> tuple[SimulationResult, Record]:
        recorder = Recorder(limits, draft_limits, gaps)
        result = simulate(trace, pool, modeled.tables, policy=policy, k=k, rate=rate, recorder=recorder)
        assert recorder.record is not None
        return result, recorder.record

    gaps_asked = any(metric.name == "itl" for metric, _ in asked)
    result, record = run(Gaps(0.0, -1.0) if gaps_asked else None)
    client_s = float(modeled.tables.request_s[1])
    found = []
    for metric, p in asked:
        if metric.name == "itl":
            gaps = record.gaps[: record.counts[1]]
            found.append(_of_gaps(p, gaps, run(_around(gaps, p))[1]))
        else:
            found.append(_of_requests(metric, p, result.times, record, client_s))
    steps = StepLog.of(record)
    span_s = float(np.nanmax(result.times.end_s) - result.times.scheduled_s[0]) if result.times.finished.any() else 0.0
    busy = result.busy_s / (pool.replicas * span_s) if span_s else 0.0
    return Explanation(tuple(found), steps.kinds(), steps.occupancy(pool), busy, result), steps


def _no_limits(tables: StepTables) -> LimitTables:
    """Of as many points as the tables, all zeros: for who does not ask what bounds a step."""
    parts = {name: np.zeros((len(RESOURCES), len(getattr(tables, name)))) for name in LimitTables._fields[:-1]}
    return LimitTables(**parts, prompt_pairs=tables.prompt_pairs)


def token_gaps(
    trace: Trace, pool: Pool, tables: StepTables, *, policy: str = "paretune", k: int = 30, rate: float = 1.0
) -> Floats:
    """Time between two tokens, of all requests together, simulated step by step; seconds."""
    nothing = _no_limits(tables)
    drafts = None if tables.draft is None else _no_limits(tables.draft)
    recorder = Recorder(nothing, drafts, Gaps(0.0, -1.0))
    simulate(trace, pool, tables, policy=policy, k=k, rate=rate, recorder=recorder)
    assert recorder.record is not None
    return recorder.record.gaps[: recorder.record.counts[1]]


def request_parts(metric: Metric, times: RequestTimes, record: Record, client_s: float) -> Floats:
    """(n, len(PARTS), 4) seconds of a metric of every request; NaN where the metric is undefined."""
    end, first = record.parts, record.at_first
    if metric.name == "tpot":
        gaps = np.maximum(1, times.output_tokens - 1)[:, None, None]
        found = (end - first) / gaps
    else:
        at_kth = np.where((times.output_tokens >= times.k)[:, None, None], record.at_kth, end)
        whole = {"ttft": first, "ttf": first if metric.k == 1 else at_kth, "e2e": end}[metric.name]
        found = whole.copy()
        found[:, TO_CLIENT, RESOURCES.index("host")] += client_s
    found[np.isnan(times.values(metric))] = np.nan
    return np.asarray(found, np.float64)


def _of_requests(metric: Metric, p: float, times: RequestTimes, record: Record, client_s: float) -> Explained:
    values = times.values(metric)
    value, rows = near_percentile(values, p)
    if not len(rows):
        return Explained(str(metric), p, math.nan, (), 0, math.nan)
    parts = request_parts(metric, times, record, client_s)[rows].mean(axis=0)
    return _explained(metric, p, value, parts, float(values[rows].mean()), len(rows))


def near_percentile(values: Floats, p: float) -> tuple[float, NDArray[np.int64]]:
    """A percentile of (n,) values, and the rows around it in order of value; NaN is left out."""
    known = np.flatnonzero(~np.isnan(values))
    ordered = known[np.argsort(values[known], kind="stable")]
    return percentile(values, p), ordered[_near(len(ordered), p)] if len(ordered) else ordered


def _near(n: int, p: float) -> slice:
    """Ranks around a percentile of n values."""
    rank = p / 100 * (n - 1)
    reach = max(_LEAST_NEIGHBORS, math.ceil(_NEIGHBORS_SHARE * n))
    return slice(max(0, math.floor(rank) - reach + 1), min(n, math.ceil(rank) + reach))


def _around(gaps: Floats, p: float) -> Gaps:
    ordered = np.sort(gaps)
    near = ordered[_near(len(gaps), p)]
    return Gaps(float(near[0]), float(near[-1])) if len(near) else Gaps(0.0, -1.0)


def _of_gaps(p: float, gaps: Floats, record: Record) -> Explained:
    count, seconds = record.band_sum
    if not count:
        return Explained("itl", p, math.nan, (), 0, math.nan)
    return _explained(Metric("itl"), p, percentile(gaps, p), record.band_parts / count, seconds / count, int(count))


def _explained(metric: Metric, p: float, value: float, parts: Floats, mean_s: float, neighbors: int) -> Explained:
    scale = value / mean_s if mean_s > 0 else 1.0
    found = [
        Part(name, float(row.sum()) * scale, {r: float(s) * scale for r, s in zip(RESOURCES, row)})
        for name, row in zip(PARTS, parts)
        if abs(row).max() > 0
    ]
    ordered = tuple(sorted(found, key=lambda part: -part.seconds))
    return Explained(str(metric), p, value, ordered, neighbors, scale)


@dataclass(frozen=True)
class StepLog:
    """Every step of a simulated run, in order of time: columns by name, as in STEP_FLOATS and STEP_INTS."""

    columns: dict[str, NDArray[Any]]

    @classmethod
    def of(cls, record: Record) -> StepLog:
        count = int(record.counts[0])
        columns: dict[str, NDArray[Any]] = {name: record.floats[:count, i] for i, name in enumerate(STEP_FLOATS)}
        columns |= {name: record.ints[:count, i] for i, name in enumerate(STEP_INTS)}
        order = np.lexsort((columns["replica"], columns["started_s"]))
        return cls({name: column[order] for name, column in columns.items()})

    def __len__(self) -> int:
        return len(self.columns["started_s"])

    @property
    def labels(self) -> NDArray[np.int64]:
        """(n,) the place in RESOURCES of what each step is bound by most."""
        return np.asarray(np.argmax([self.columns[name] for name in RESOURCES], axis=0), np.int64)

    @property
    def seconds(self) -> Floats:
        """(n,) what each step computes, waiting for pipeline stages left out."""
        return np.asarray(sum(self.columns[name] for name in RESOURCES), np.float64)

    def kinds(self) -> tuple[StepKind, ...]:
        labels, seconds = self.labels, self.seconds
        total = float(seconds.sum())
        found = []
        for i, name in enumerate(RESOURCES):
            own = float(seconds[labels == i].sum())
            found.append(StepKind(name, int((labels == i).sum()), own, own / total if total else 0.0))
        return tuple(sorted((each for each in found if each.steps), key=lambda each: -each.seconds))

    def occupancy(self, pool: Pool) -> tuple[Occupancy, ...]:
        limits = {
            "num_rows": ("requests in a step", pool.max_num_seqs),
            "num_tokens": ("tokens in a step", pool.max_num_batched_tokens),
            "kv_blocks_used": ("KV blocks in use", pool.num_kv_blocks),
            "waiting": ("requests waiting", 0),
        }
        return tuple(
            Occupancy(words, *_over_time(self.columns[name], self.seconds), limit)
            for name, (words, limit) in limits.items()
        )

    def rows(self) -> list[dict[str, Any]]:
        """One object a step: the fields of a server's step log, and what the simulator knows besides."""
        names = list(self.columns)
        lists = [self.columns[name].tolist() for name in names]
        found = []
        for label, seconds, values in zip(self.labels.tolist(), self.seconds.tolist(), zip(*lists)):
            found.append({**dict(zip(names, values)), "seconds": seconds, "bound": RESOURCES[label]})
        return found


def _over_time(values: NDArray[np.int64], seconds: Floats) -> tuple[float, float]:
    """Mean and 95th percentile, each value weighted by its seconds."""
    if not len(values) or not seconds.sum():
        return math.nan, math.nan
    order = np.argsort(values, kind="stable")
    upto = np.cumsum(seconds[order])
    return float(np.average(values, weights=seconds)), float(values[order][np.searchsorted(upto, 0.95 * upto[-1])])


def default_asked(trace: Trace, k: int, names: Sequence[str] = METRIC_NAMES) -> tuple[tuple[Metric, float], ...]:
    """What is explained where nobody says what: metrics and percentiles of the trace's targets, whomever these govern.

    Where it has none, p95 of TTFT, TPOT and E2E.

    Args:
        names: of the metrics that can be explained.
    """
    asked = [(target.metric, target.percentile) for target in trace.targets]
    known = [(metric, p) for metric, p in asked if metric.name in names and metric.k in (0, 1, k)]
    return tuple(dict.fromkeys(known)) or tuple((Metric(name), 95.0) for name in ("ttft", "tpot", "e2e"))


def parse_asked(text: str) -> tuple[Metric, float]:
    """ "ttft:p95" -> (Metric("ttft"), 95.0). Raises: BadTarget: it is no metric with a percentile."""
    name, _, p = text.partition(":")
    number = p.strip().lower().removeprefix("p")
    try:
        found = float(number)
    except ValueError:
        found = math.nan
    if not 0 < found < 100:
        raise BadTarget("--metric", text, "METRIC:pNN, more than p0 and less than p100", "write ttft:p95, say")
    return Metric.parse(name), found
