"""Where the time of a metric goes that a prefill and a decode pool share: parts of either, and the way between them.

Each pool is simulated with recording on, as for one pool (explain.py); what a request waits for between them is known
from its transfer. So every second between its scheduled arrival and its last token stands in one part here, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..runtime.model_shape import ModelShape
from ..runtime.spec import Deployment, KvTransfer, Pool
from ..traces.metrics import BadTarget, Metric, RequestTimes
from ..traces.trace import Trace
from .disaggregated import DisaggregatedResult, prefill_trace, simulate_disaggregated
from .explain import WORDS, Explained, Explanation, Part, StepLog, near_percentile
from .kv_transfer import TransferLink
from .simulator import SimulationResult
from .step_limits import HOST, LINKS, RESOURCES, LimitTables
from .step_parts import PARTS, TO_CLIENT, Record
from .step_record import Recorder
from .step_time import ModeledStep

Floats = NDArray[np.float64]

_BETWEEN = ("to_decode_pool", "link_queue", "transfer")
NAMES = (*(f"prefill/{name}" for name in PARTS), *_BETWEEN, *(f"decode/{name}" for name in PARTS))
POOL_WORDS = {
    **{f"{role}/{name}": f"{role} pool: {words}" for role in ("prefill", "decode") for name, words in WORDS.items()},
    "to_decode_pool": "to the decode pool (HTTP, text)",
    "link_queue": "waiting for a link",
    "transfer": "KV on its way",
}
ASKABLE = ("ttft", "ttf", "tpot", "e2e")


@dataclass(frozen=True)
class PoolStep:
    """Step times of a pool, and what bounds them (step_limits.limit_tables, draft_limit_tables)."""

    modeled: ModeledStep
    limits: LimitTables
    draft_limits: LimitTables | None = None


@dataclass(frozen=True)
class PoolsExplained:
    """A run of both pools, explained.

    pools, steps  of the prefill and of the decode pool: steps by label and occupancy, without metrics; every step
    """

    metrics: tuple[Explained, ...]
    pools: tuple[Explanation, Explanation]
    steps: tuple[StepLog, StepLog]
    run: DisaggregatedResult


def check_asked(asked: Sequence[tuple[Metric, float]]) -> None:
    """Raises: BadTarget: a metric of single gaps, which are not taken apart over two pools."""
    for metric, p in asked:
        if metric.name not in ASKABLE:
            todo = "ask for tpot, or explain one pool alone"
            raise BadTarget("--metric", f"{metric}:p{p:g}", f"{', '.join(ASKABLE)} of two pools", todo)


def explain_pools(
    trace: Trace,
    deployment: Deployment,
    shape: ModelShape,
    link: TransferLink,
    prefill: PoolStep,
    decode: PoolStep,
    asked: Sequence[tuple[Metric, float]],
    *,
    k: int = 30,
    rate: float = 1.0,
) -> PoolsExplained:
    """Simulate a run of both pools step by step and take percentiles of it apart.

    Args:
        asked: metrics and percentiles; TTF-k of this k alone, and no ITL.
    Raises: BadTarget: ITL. Others as `simulate_disaggregated`.
    """
    check_asked(asked)
    prompts, answers = (Recorder(each.limits, each.draft_limits) for each in (prefill, decode))
    prefilled = prefill_trace(trace, deployment, prefill.modeled.tables, rate=rate)
    again = prefill_trace(trace, deployment, prefill.modeled.tables, rate=rate, recorder=prompts)
    assert again.computed_s.tobytes() == prefilled.computed_s.tobytes(), "recording changes no time"
    run = simulate_disaggregated(
        trace, deployment, shape, link, prefill.modeled.tables, decode.modeled.tables, k=k, rate=rate,
        prefilled=prefilled, recorder=answers,
    )  # fmt: skip
    assert prompts.record is not None, "the run began"
    assert answers.record is not None, "the run began"
    times = run.result.times
    seconds = _Seconds(run, deployment, prompts.record, answers.record, prefill, decode)
    found = tuple(_of_requests(metric, p, times, seconds.of(metric)) for metric, p in asked)
    steps = StepLog.of(prompts.record), StepLog.of(answers.record)
    ended_s = times.end_s[times.finished]
    span_s = float(ended_s.max() - times.scheduled_s[0]) if len(ended_s) else 0.0
    first, second = deployment.phases
    before = run.prefilled.result
    after = replace(run.result, preemptions=run.result.preemptions - before.preemptions, busy_s=run.decode_busy_s)
    pools = _explanation(before, first, steps[0], span_s), _explanation(after, second, steps[1], span_s)
    return PoolsExplained(found, pools, steps, run)


def _explanation(result: SimulationResult, pool: Pool, log: StepLog, span_s: float) -> Explanation:
    """Of a pool without metrics."""
    share = result.busy_s / (pool.replicas * span_s) if span_s else 0.0
    return Explanation((), log.kinds(), log.occupancy(pool), share, result)


class _Seconds:
    """(n, len(NAMES), 4) seconds of a metric of every request; NaN where it is undefined."""

    def __init__(
        self, run: DisaggregatedResult, deployment: Deployment, prompts: Record, answers: Record, prefill: PoolStep,
        decode: PoolStep,
    ) -> None:  # fmt: skip
        self._times = run.result.times
        self._early = (deployment.kv_transfer or KvTransfer()).first_token == "prefill"
        n = len(self._times)
        rows = np.flatnonzero(run.prefilled.replica >= 0)  # those that the prefill pool's run had
        self._prompt = np.full((n, len(NAMES), len(RESOURCES)), np.nan)
        self._prompt[rows] = 0.0
        self._prompt[rows, : len(PARTS)] = prompts.at_first
        self._between = np.zeros_like(self._prompt)
        for i, name in enumerate(_BETWEEN, start=len(PARTS)):
            self._between[:, i, HOST if name == "to_decode_pool" else LINKS] = run.parts[name]
        self._answers = answers
        self._client_s = [float(each.modeled.tables.request_s[1]) for each in (prefill, decode)]

    def of(self, metric: Metric) -> Floats:
        times, answers = self._times, self._answers
        first = self._sent() if self._early else self._later(answers.at_first)
        if metric.name == "ttft" or (metric.name == "ttf" and metric.k == 1):
            found = first
        elif metric.name == "ttf":
            long = (times.output_tokens >= times.k)[:, None, None]
            found = np.where(long, self._later(answers.at_kth), self._end(first))
        else:
            found = self._end(first)
        if metric.name == "tpot":
            found = (found - first) / np.maximum(1, times.output_tokens - 1)[:, None, None]
        found = found.copy()
        found[np.isnan(times.values(metric))] = np.nan
        return np.asarray(found, np.float64)

    def _sent(self) -> Floats:
        """Until the prefill pool's own token is with the client."""
        found = self._prompt.copy()
        found[:, TO_CLIENT, HOST] += self._client_s[0]
        return found

    def _later(self, parts: Floats) -> Floats:
        """Until a token of the decode pool, whose parts so far are given, is with the client."""
        found = self._prompt + self._between
        found[:, -len(PARTS) :] += parts
        found[:, TO_CLIENT - len(PARTS), HOST] += self._client_s[1]
        return found

    def _end(self, first: Floats) -> Floats:
        """Until the last token; of an answer that the prefill pool gave alone that is the first one."""
        alone = (self._times.output_tokens == 1)[:, None, None] & self._early
        return np.where(alone, first, self._later(self._answers.parts))


def _of_requests(metric: Metric, p: float, times: RequestTimes, seconds: Floats) -> Explained:
    """As explain.py takes one pool's percentile apart, by the requests around it."""
    values = times.values(metric)
    value, rows = near_percentile(values, p)
    if not len(rows):
        return Explained(str(metric), p, math.nan, (), 0, math.nan)
    mean_s = float(values[rows].mean())
    scale = value / mean_s if mean_s > 0 else 1.0
    found = [
        Part(name, float(row.sum()) * scale, {r: float(s) * scale for r, s in zip(RESOURCES, row)})
        for name, row in zip(NAMES, seconds[rows].mean(axis=0))
        if abs(row).max() > 0
    ]
    return Explained(str(metric), p, value, tuple(sorted(found, key=lambda part: -part.seconds)), len(rows), scale)
