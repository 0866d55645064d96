"""The analytic screen: which candidates cannot win, from trace means and step tables alone, in microseconds a point.

A mean-field model: in a steady state every step holds b decoding rows and the share of prompts that keeps them coming.
It knows no queue but that of the mean, so it only drops what is hopeless by a margin, and says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit
from ..profiler.simulator import governed_rows
from ..profiler.step_time import StepTables, composed_time_s
from ..runtime.spec import Pool
from ..traces.describe import reused_tokens
from ..traces.metrics import Metric, Target, percentile
from ..traces.trace import Trace

# Requests that stand for the trace where each is looked at; spread evenly over it.
SAMPLE = 256

_LIMITS = attrgetter(
    "max_num_batched_tokens", "num_kv_blocks", "block_size", "max_num_seqs", "pipeline_parallel_size", "replicas"
)

# How far the mean field may be off before a candidate is dropped (tests/test_optimizer_screen.py holds it to that).
MARGIN = 1.5


@dataclass(frozen=True)
class Means:
    """A trace as the mean field sees it.

    input_tokens, output_tokens  means a request; inputs without what an endless prefix cache would hold
    prefill_pairs                mean query-key pairs of a prompt
    sample_input, sample_output, sample_cached  (s,) int64  SAMPLE requests of the trace
    rows                         (t, s) bool: which of them each target governs
    rate_per_s                   recorded arrival rate
    """

    input_tokens: float
    output_tokens: float
    prefill_pairs: float
    sample_input: NDArray[np.int64]
    sample_output: NDArray[np.int64]
    sample_cached: NDArray[np.int64]
    rows: NDArray[np.bool_]
    rate_per_s: float


def means_of(trace: Trace, targets: Sequence[Target], prefix_caching: bool) -> Means:
    """The means of a trace, with or without its prefixes being found in a cache that forgets nothing."""
    reused = reused_tokens(trace) if prefix_caching else None
    inputs = trace.input_tokens.astype(np.float64)
    cached = np.zeros(len(trace)) if reused is None else np.minimum(reused, trace.input_tokens - 1)
    some = np.unique(np.linspace(0, len(trace) - 1, SAMPLE).round().astype(np.int64))
    rows = [governed_rows(trace, target)[some] for target in targets]
    return Means(
        input_tokens=float((inputs - cached).mean()),
        output_tokens=float(trace.output_tokens.mean()),
        prefill_pairs=float(((inputs * (inputs + 1) - cached * (cached + 1)) / 2).mean()),
        sample_input=trace.input_tokens[some].astype(np.int64),
        sample_output=trace.output_tokens[some].astype(np.int64),
        sample_cached=cached[some].astype(np.int64),
        rows=np.array(rows, np.bool_).reshape(len(targets), len(some)),
        rate_per_s=trace.rate_per_s,
    )


@njit
def _steady_step_s(tables: StepTables, b: int, tokens: float, context: float, pairs: float, prompts: float) -> float:
    """A step of b decoding rows and, for each, so many prompt tokens, query-key pairs and prompts on the way."""
    num_tokens = min(int(b * (1.0 + tokens) + 0.5), tables.tokens_s.shape[0] - 1)
    rows = min(b + int(b * prompts + 0.5), tables.rows_s.shape[0] - 1)
    samples = min(b, tables.samples_s.shape[0] - 1)
    return composed_time_s(tables, num_tokens, rows, samples, b * context, b * pairs)


@njit
def _mean_field(
    tables: StepTables,
    input_tokens: float,
    output_tokens: float,
    prefill_pairs: float,
    most_rows: NDArray[np.int64],
    rate_per_s: NDArray[np.float64],
    steps_s: NDArray[np.float64],
    saturation_per_s: NDArray[np.float64],
    step_s: NDArray[np.float64],
) -> None:
    """Of each candidate with these tables, (c,) all: most requests per second that one replica carries; the mean step
    at its rate, infinite beyond. most_rows: decoding rows at most; steps_s: scratch, longer than any of these.
    """
    tokens = input_tokens / output_tokens
    pairs = prefill_pairs / output_tokens
    context = input_tokens + 0.5 * output_tokens
    prompts = 1.0 / output_tokens
    known = 1  # steps of fewer rows than this are in steps_s, as far as anybody asked for them
    for i in range(most_rows.shape[0]):
        most = most_rows[i]
        saturation_per_s[i] = 0.0
        step_s[i] = np.inf
        b = 1
        while b < most:
            if b >= known:
                steps_s[b] = _steady_step_s(tables, b, tokens, context, pairs, prompts)
                known = b + 1
            carried = b / (steps_s[b] * output_tokens)
            saturation_per_s[i] = max(saturation_per_s[i], carried)
            if carried >= rate_per_s[i]:
                step_s[i] = min(step_s[i], steps_s[b])
            b += 1 + b // 8
        last_s = _steady_step_s(tables, most, tokens, context, pairs, prompts)
        carried = most / (last_s * output_tokens)
        saturation_per_s[i] = max(saturation_per_s[i], carried)
        if carried >= rate_per_s[i]:
            step_s[i] = min(step_s[i], last_s)


@njit
def _alone(
    tables: StepTables,
    inputs: NDArray[np.int64],
    outputs: NDArray[np.int64],
    cached: NDArray[np.int64],
    most_tokens: int,
    stages: int,
    k: int,
    first_s: NDArray[np.float64],
    kth_s: NDArray[np.float64],
    end_s: NDArray[np.float64],
) -> None:
    """When the first, k-th and last token of each request would come if it had the replica to itself.

    In a pipeline the chunks of a prompt follow each other from stage to stage.
    """
    outside_s = tables.request_s[0] + tables.request_s[1]
    for i in range(inputs.shape[0]):
        done = cached[i]
        now_s = left_s = outside_s  # the next chunk begins; the last one leaves the last stage
        while done < inputs[i]:
            part = min(most_tokens, inputs[i] - done)
            samples = 1 if done + part == inputs[i] else 0
            if part == 1:
                step_s = composed_time_s(tables, 1, 1, samples, done + 1.0, 0.0)
            else:
                step_s = composed_time_s(tables, part, 1, samples, 0.0, part * (done + 0.5 * (part + 1)))
            left_s = max(now_s + step_s, left_s + step_s / stages)
            now_s += step_s / stages
            done += part
        now_s = left_s
        first_s[i] = now_s
        step_s = composed_time_s(tables, 1, 1, 1, inputs[i] + 1.0, 0.0)
        last_s = composed_time_s(tables, 1, 1, 1, float(inputs[i] + outputs[i]), 0.0)
        kth_s[i] = now_s + (min(k, outputs[i]) - 1) * step_s
        end_s[i] = now_s + (outputs[i] - 1) * 0.5 * (step_s + last_s)


class Alone(NamedTuple):
    """(s,) seconds of the sampled requests, each alone on an idle replica: first, k-th and last token."""

    first_s: NDArray[np.float64]
    kth_s: NDArray[np.float64]
    end_s: NDArray[np.float64]


class Estimate(NamedTuple):
    """What the mean field says of one candidate.

    saturation_per_s  most requests per second that one replica can carry
    step_s            mean step at the recorded rate over all replicas; infinite beyond saturation
    alone             one object for all candidates that agree in what it depends on
    """

    saturation_per_s: float
    step_s: float
    alone: Alone


def estimate(means: Means, pool: Pool, tables: StepTables, k: int) -> Estimate:
    """The mean field of one candidate; `estimate_all` for many."""
    return estimate_all([means], [pool], [tables], k)[0]


def estimate_all(means: Sequence[Means], pools: Sequence[Pool], tables: Sequence[StepTables], k: int) -> list[Estimate]:
    """The mean field of each candidate: a few microseconds, once compiled.

    Candidates mostly share their tables (the same object), and what a request takes alone depends, beyond these, on the
    largest chunk of a prompt and on the stages only: all that is computed once.
    """
    limits = np.array(list(map(_LIMITS, pools)), np.int64).reshape(-1, 6)
    most_tokens, blocks, block_size, most_seqs, own, replicas = limits.T
    most_cached = blocks * block_size
    traffic, which_traffic = _told_apart(means)
    steps, which_steps = _told_apart(tables)
    inputs, outputs, rate_per_s = (
        np.array([getattr(mean, name) for mean in traffic])[which_traffic]
        for name in ("input_tokens", "output_tokens", "rate_per_s")
    )
    by_cache = most_cached / (inputs + outputs)
    by_tokens = most_tokens / (1 + inputs / outputs)
    most_seqs = np.maximum(1, np.minimum(most_seqs, by_cache).astype(np.int64))
    # at steps of their own, each with its share of the requests
    stages = np.minimum(own, most_seqs)
    most_rows = np.maximum(1, np.minimum(most_seqs / stages, by_tokens).astype(np.int64))
    rate_per_s = rate_per_s / replicas / stages
    same = which_steps * len(traffic) + which_traffic
    saturation_per_s, step_s = np.empty(len(pools)), np.empty(len(pools))
    for each in np.unique(same).tolist():
        members = np.flatnonzero(same == each)
        mean, rows = traffic[each % len(traffic)], most_rows[members]
        found = np.empty(len(members)), np.empty(len(members))
        taken = (mean.input_tokens, mean.output_tokens, mean.prefill_pairs)
        table = steps[each // len(traffic)]
        _mean_field(table, *taken, rows, rate_per_s[members], np.empty(rows.max() + 1), *found)
        saturation_per_s[members], step_s[members] = found
    key = (same * (most_tokens.max(initial=0) + 1) + most_tokens) * (own.max(initial=0) + 1) + own
    _, first, which = np.unique(key, return_index=True, return_inverse=True)
    alone = [_alone_of(means[i], pools[i], tables[i], k) for i in first.tolist()]
    chosen = [alone[i] for i in which.tolist()]
    return list(map(Estimate, (saturation_per_s * stages).tolist(), step_s.tolist(), chosen))


def _told_apart(objects: Sequence[Any]) -> tuple[list[Any], NDArray[np.int64]]:
    """The objects, each once, and which of them stands at each place."""
    ids = np.fromiter(map(id, objects), np.int64, len(objects))
    _, first, which = np.unique(ids, return_index=True, return_inverse=True)
    return [objects[i] for i in first.tolist()], which


def _alone_of(means: Means, pool: Pool, tables: StepTables, k: int) -> Alone:
    times = Alone(*(np.empty(len(means.sample_input)) for _ in range(3)))
    requests = (means.sample_input, means.sample_output, means.sample_cached)
    _alone(tables, *requests, pool.max_num_batched_tokens, pool.pipeline_parallel_size, k, *times)
    return times


def alone_s(metric: Metric, found: Alone, means: Means) -> NDArray[np.float64]:
    """A metric of the sampled requests, each alone: a lower bound of it under load; NaN where it is undefined."""
    if metric.name == "ttft" or metric == Metric("ttf", 1):
        return found.first_s
    if metric.name == "ttf":
        return found.kth_s
    if metric.name == "tpot":
        several = means.sample_output > 1
        per_token = (found.end_s - found.first_s) / np.maximum(1, means.sample_output - 1)
        return np.where(several, per_token, np.nan)
    return found.end_s


def loaded_s(
    metric: Metric, p: float, found: Sequence[Estimate], means: Sequence[Means], replicas: Sequence[int]
) -> NDArray[np.float64]:
    """A rough percentile at the recorded rate: alone, stretched by mean step and mean queue; infinite in overload."""
    step_s = np.array([each.step_s for each in found])
    saturation_per_s = np.array([each.saturation_per_s for each in found])
    busy = np.array([mean.rate_per_s for mean in means]) / np.asarray(replicas) / saturation_per_s
    stretch = 1 / np.maximum(0.05, 1 - busy)
    if metric.name == "tpot":
        return np.asarray(np.maximum(step_s, _least(metric, p, found, means)), np.float64)
    if metric.name == "ttft":
        finite = np.isfinite(step_s)
        return np.asarray(np.where(finite, stretch * _least(metric, p, found, means), np.inf), np.float64)
    latency = np.full(len(found), np.inf)
    most_tokens = {"ttf": metric.k}.get(metric.name, np.iinfo(np.int64).max)
    for i in np.flatnonzero(np.isfinite(step_s)).tolist():
        later_s = (np.minimum(most_tokens, means[i].sample_output) - 1) * step_s[i]
        latency[i] = percentile(found[i].alone.first_s * stretch[i] + later_s, p)
    return latency


def _least(metric: Metric, p: float, found: Sequence[Estimate], means: Sequence[Means]) -> NDArray[np.float64]:
    """A percentile of `alone_s` of each candidate, worked out once for those that share it."""
    first, which = _sharing(found, means)
    return np.array([percentile(alone_s(metric, found[i].alone, means[i]), p) for i in first])[which]


def _sharing(found: Sequence[Estimate], means: Sequence[Means]) -> tuple[list[int], NDArray[np.int64]]:
    """Which candidates agree in what a request takes alone and in the traffic: of each such group the first one, and
    of each candidate its group."""
    alone, which_alone = _told_apart([each.alone for each in found])
    _, which_means = _told_apart(means)
    _, first, which = np.unique(which_means * len(alone) + which_alone, return_index=True, return_inverse=True)
    return first.tolist(), which


@dataclass(frozen=True)
class Screening:
    """What the screen left.

    kept      indices of the candidates worth simulating, ascending
    dropped   index -> why
    counts    kind of reason -> how many
    """

    kept: tuple[int, ...]
    dropped: Mapping[int, str]
    counts: Mapping[str, int]


def screen(
    estimates: Sequence[Estimate],
    pools: Sequence[Pool],
    means: Sequence[Means],
    usd_per_replica_hour: Sequence[float],
    *,
    targets: Sequence[Target],
    metric: Metric,
    p: float,
    most_replicas: Sequence[int],
) -> Screening:
    """Drop what cannot carry the rate, cannot meet a target even idle, or is beaten in latency and cost by MARGIN.

    The mean field proposes nothing. So a candidate that speculates is dropped only where it would be with every
    proposal kept, which brings one token and num_speculative_tokens a step. It drops others as if it did not speculate.

    Args:
        estimates, pools, means, usd_per_replica_hour, most_replicas: of each candidate, in one order.
        targets: what must hold; without any the rate is not asked for either, since the load is swept.
        metric, p: the latency axis.
        most_replicas: of the candidate that a deployment may have: its own number, or (sizing) what the devices allow.
    """
    margins = MARGIN * (1 + np.array([pool.num_speculative_tokens for pool in pools]))
    dropped = _hopeless(estimates, means, targets, np.asarray(most_replicas), margins)
    counts = Counter(kind for kind, _ in dropped.values())
    reasons = {i: reason for i, (_, reason) in dropped.items()}
    left = [i for i in range(len(estimates)) if i not in dropped]
    which = ([estimates[i] for i in left], [means[i] for i in left])
    if targets and all(pool.replicas == most for pool, most in zip(pools, most_replicas)):
        latency = loaded_s(metric, p, *which, [most_replicas[i] for i in left])
    else:
        # the load of a replica is still open: what can be compared is a request alone
        latency = _least(metric, p, *which)
    saturation_per_s = np.array([found.saturation_per_s for found in which[0]])
    cost = np.asarray(usd_per_replica_hour, np.float64)[left] / np.maximum(1e-12, saturation_per_s)
    margin = margins.tolist()
    words = {each: f"another is {each:g} times better in both {metric}:p{p:g} and cost" for each in set(margin)}
    for i in (left[at] for at in _beaten(latency, cost, margins[left])):
        reasons[i] = words[margin[i]]
        counts["beaten in both latency and cost"] += 1
    kept = tuple(i for i in left if i not in reasons)
    return Screening(kept, reasons, dict(sorted(counts.items())))


def _hopeless(
    estimates: Sequence[Estimate],
    means: Sequence[Means],
    targets: Sequence[Target],
    most_replicas: NDArray[np.int64],
    margins: NDArray[np.float64],
) -> dict[int, tuple[str, str]]:
    """Candidates that cannot carry the rate, or miss a target even idle: kind and reason."""
    if not targets:
        return {}
    saturation_per_s = np.array([found.saturation_per_s for found in estimates])
    share = saturation_per_s * most_replicas / np.array([mean.rate_per_s for mean in means])
    first, which = _sharing(estimates, means)
    least_s = np.array(
        [
            [
                percentile(alone_s(target.metric, estimates[i].alone, means[i])[rows], target.percentile)
                for target, rows in zip(targets, means[i].rows)
            ]
            for i in first
        ]
    ).reshape(-1, len(targets))[which]
    late = least_s > np.array([target.limit_s for target in targets]) * margins[:, None]
    slow = share * margins < 1
    found: dict[int, tuple[str, str]] = {}
    for i in np.flatnonzero(slow | late.any(axis=1)).tolist():
        if slow[i]:
            found[i] = "cannot carry the recorded rate", f"carries at most {share[i]:.2f} of the recorded rate"
        else:
            at = int(late[i].argmax())
            reason = f"{targets[at]}: {least_s[i, at]:.3g} s even with one request at a time"
            found[i] = "misses a target even when idle", reason
    return found


def _beaten(latency: NDArray[np.float64], cost: NDArray[np.float64], margins: NDArray[np.float64]) -> list[int]:
    """Points that another one beats by their margin on both axes: a sweep by cost keeping the best latency."""
    order = np.argsort(cost, kind="stable")
    best_s = np.minimum.accumulate(latency[order])
    cheaper = np.searchsorted(cost[order], cost / margins, side="right") - 1
    rival_s = best_s[np.maximum(cheaper, 0)]
    beaten = (cheaper >= 0) & np.isfinite(rival_s) & (rival_s * margins <= latency)
    found: list[int] = np.flatnonzero(beaten).tolist()
    return found
