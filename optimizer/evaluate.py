"""One candidate, simulated: does it hold, what does it cost, and how sure is that."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..profiler.prices import Price
from ..profiler.profile import BadProfile
from ..profiler.simulator import SimulationResult, simulate
from ..profiler.step_time import ModeledStep, StepTables, scaled
from ..runtime.spec import Deployment, Pool
from ..traces.metrics import (
    Metric,
    RequestTimes,
    Target,
    sizing_cost_usd_per_hour,
    summarize,
    usd_per_million_tokens,
)
from ..traces.trace import Trace
from .capacity import (
    COARSE_TOLERANCE,
    TOLERANCE,
    StepModel,
    broken,
    capacity,
    longest_answer_s,
    sizing,
    tokens_per_s,
)
from .front import Cost, Evaluation
from .intervals import Band, predicted, sampled, target_values
from .screen import estimate, means_of

# Where no target is given: loads of one replica, as shares of what the mean field says it can carry.
LOADS = (0.3, 0.6, 0.85)

# The band of a capacity needs no finer bracket than this: the step-time error it shows is several times as wide.
BAND_TOLERANCE = 0.05

# Replicas that sizing may ask for where the space sets no limit on devices.
MOST_REPLICAS = 1024


@dataclass(frozen=True)
class Question:
    """What a study asks of every candidate.

    targets      what must hold; may be none
    k            of TTF-k in every run
    max_devices  most devices of a deployment, or None
    part         of the trace, for the capacities of candidates that may not win; None: the whole
    survive      replicas that may be lost: sizing adds them to the fewest that hold the targets
    """

    trace: Trace
    targets: tuple[Target, ...]
    metric: Metric
    percentile: float
    cost: Cost
    k: int
    max_devices: int | None
    step_model: StepModel
    price: Callable[[Pool], Price]
    part: Trace | None = None
    survive: int = 0

    def usd_per_hour(self, pool: Pool) -> float:
        return sizing_cost_usd_per_hour(pool.devices_per_replica, pool.replicas, self.price(pool).usd_per_hour)

    def most_replicas(self, pool: Pool) -> int:
        if self.max_devices is None:
            return MOST_REPLICAS
        return max(1, self.max_devices // pool.devices_per_replica)


def evaluate(
    question: Question, deployment: Deployment, *, saturation: float, guess: float | None = None
) -> tuple[Evaluation, ...]:
    """Simulate a candidate on the whole trace: one evaluation; without targets, one for each load.

    Args:
        saturation: multiple of the recorded rate that the mean field lets one replica carry.
        guess: of its capacity, as a multiple of the recorded rate.
    """
    if not question.targets:
        return _swept(question, deployment, saturation)
    if question.cost == "sizing":
        return (_sized(question, deployment, saturation if guess is None else guess),)
    pool = deployment.pool
    tables = question.step_model(pool).tables
    result = simulate(question.trace, pool, tables, policy=deployment.scheduler_policy, k=question.k)
    reason = broken(result, question.trace, question.targets, longest_answer_s(question.trace, tables, pool))
    found = _of(question, deployment, result, reason)
    if question.part is None:
        return (_with_capacity(question, found, tables, saturation, guess, COARSE_TOLERANCE),)
    rough = _with_capacity(replace(question, trace=question.part), found, tables, saturation, guess, COARSE_TOLERANCE)
    tokens = float(question.trace.output_tokens.sum()) / question.trace.duration_s * rough.capacity_rate
    cost = usd_per_million_tokens(found.usd_per_hour / pool.replicas, tokens)
    return (replace(rough, usd_per_million_tokens=cost, capacity_tolerance=math.inf),)


def _without_gaps(times: RequestTimes) -> RequestTimes:
    """No study asks for ITL, and its percentiles take a sixth of the simulation's time."""
    return replace(times, gaps=None)


def _of(
    question: Question, deployment: Deployment, result: SimulationResult, reason: str, replicas: int | None = None
) -> Evaluation:
    """replicas: in the run, where these are not the deployment's."""
    summary = summarize(_without_gaps(result.times))
    pool = deployment.pool
    tokens = int(result.times.output_tokens.sum())
    duration_s = tokens / summary.output_tokens_per_s if tokens else math.nan
    return Evaluation(
        deployment=deployment,
        fidelity="simulated",
        feasible=not reason,
        reason=reason,
        summary=summary,
        usd_per_hour=question.usd_per_hour(pool),
        utilization=result.busy_s / ((replicas or pool.replicas) * duration_s),
        busy_device_s_per_token=result.busy_s * pool.devices_per_replica / tokens if tokens else math.nan,
        values=target_values(result.times, question.trace, question.targets),
    )


def _with_capacity(
    question: Question,
    evaluation: Evaluation,
    tables: StepTables,
    saturation: float,
    guess: float | None,
    tolerance: float,
) -> Evaluation:
    pool = evaluation.deployment.pool
    found = capacity(
        question.trace,
        pool,
        tables,
        question.targets,
        saturation=saturation,
        policy=evaluation.deployment.scheduler_policy,
        k=question.k,
        guess=guess,
        tolerance=tolerance,
    )
    per_replica = question.usd_per_hour(pool) / pool.replicas
    return replace(
        evaluation,
        capacity_rate=found.rate,
        capacity_tolerance=found.tolerance,
        usd_per_million_tokens=usd_per_million_tokens(per_replica, found.tokens_per_s),
    )


def _sized(question: Question, deployment: Deployment, guess: float) -> Evaluation:
    pool = deployment.pool
    spare = question.survive
    most = question.most_replicas(pool)
    if most <= spare:
        reason = f"of {most} replicas at most none is left when {spare} are lost"
        return _unknown(question, deployment.with_pool(replicas=most), reason)
    found = sizing(
        question.trace,
        pool,
        question.step_model,
        question.targets,
        most=most - spare,
        guess=math.ceil(1 / max(guess, 1e-9)),
        policy=deployment.scheduler_policy,
        k=question.k,
    )
    if found.result is None:
        left = f" that are left of {most}" if spare else ""
        reason = f"no number of replicas up to {most - spare}{left}: {found.reason}"
        return _unknown(question, deployment.with_pool(replicas=most), reason)
    chosen = deployment.with_pool(replicas=found.replicas + spare)
    result = found.result
    if spare:
        try:
            tables = question.step_model(chosen.pool).tables
        except BadProfile as unmeasured:
            return _unknown(question, chosen, str(unmeasured))
        result = simulate(question.trace, chosen.pool, tables, policy=chosen.scheduler_policy, k=question.k)
    return replace(_of(question, chosen, result, ""), replicas_needed=chosen.pool.replicas)


def _unknown(question: Question, deployment: Deployment, reason: str) -> Evaluation:
    """Of a deployment without a run: it costs what it costs, and nothing else is known."""
    return Evaluation(
        deployment=deployment,
        fidelity="simulated",
        feasible=False,
        reason=reason,
        summary=None,
        usd_per_hour=question.usd_per_hour(deployment.pool),
    )


def _swept(question: Question, deployment: Deployment, saturation: float) -> tuple[Evaluation, ...]:
    if question.cost == "sizing":
        return _swept_sizes(question, deployment, saturation)
    pool = deployment.pool
    single = pool.model_copy(update={"replicas": 1})
    tables = question.step_model(pool).tables
    slack_s = longest_answer_s(question.trace, tables, pool)
    found = []
    for share in LOADS:
        load = share * saturation
        result = simulate(question.trace, single, tables, policy=deployment.scheduler_policy, k=question.k, rate=load)
        reason = broken(result, question.trace, (), slack_s)
        cost = usd_per_million_tokens(question.usd_per_hour(single), tokens_per_s(result))
        each = _of(question, deployment, result, reason, replicas=1)
        found.append(replace(each, load=load, usd_per_million_tokens=cost))
    return tuple(found)


def _swept_sizes(question: Question, deployment: Deployment, saturation: float) -> tuple[Evaluation, ...]:
    most = question.most_replicas(deployment.pool)
    found = []
    for replicas in sorted({min(most, math.ceil(1 / (share * saturation))) for share in LOADS}):
        chosen = deployment.with_pool(replicas=replicas)
        try:
            tables = question.step_model(chosen.pool).tables
        except BadProfile as unmeasured:
            found.append(_unknown(question, chosen, str(unmeasured)))
            continue
        result = simulate(question.trace, chosen.pool, tables, policy=chosen.scheduler_policy, k=question.k)
        reason = broken(result, question.trace, (), longest_answer_s(question.trace, tables, chosen.pool))
        each = _of(question, chosen, result, reason)
        found.append(replace(each, load=1 / replicas, replicas_needed=0 if reason else replicas))
    return tuple(found)


def assess(question: Question, deployment: Deployment) -> Evaluation:
    """One deployment as it runs, its replicas fixed, at the recorded rate: both costs, and intervals on everything.

    What a spec in use is compared by; it needs no study. Without targets `load` says what each replica carries.
    """
    question = replace(question, cost="capacity")
    pool = deployment.pool
    tables = question.step_model(pool).tables
    means = means_of(question.trace, question.targets, pool.enable_prefix_caching)
    saturation = estimate(means, pool, tables, question.k).saturation_per_s / question.trace.rate_per_s
    if question.targets:
        found = evaluate(question, deployment, saturation=saturation)[0]
        return refine(question, sharpen(question, found, saturation=saturation), saturation=saturation)
    result = simulate(question.trace, pool, tables, policy=deployment.scheduler_policy, k=question.k)
    reason = broken(result, question.trace, (), longest_answer_s(question.trace, tables, pool))
    found = _of(question, deployment, result, reason)
    cost = usd_per_million_tokens(found.usd_per_hour, tokens_per_s(result))
    found = replace(found, load=1 / pool.replicas, usd_per_million_tokens=cost)
    return refine(replace(question, cost="sizing"), found, saturation=saturation)


def sharpen(question: Question, evaluation: Evaluation, *, saturation: float) -> Evaluation:
    """The same evaluation with its capacity bisected to TOLERANCE, from where the search left it."""
    tables = question.step_model(evaluation.deployment.pool).tables
    return _with_capacity(question, evaluation, tables, saturation, evaluation.capacity_rate, TOLERANCE)


def refine(question: Question, evaluation: Evaluation, *, saturation: float) -> Evaluation:
    """The same evaluation with intervals, and with the kind of cost that the search did not ask for.

    Intervals: the run again with step times at both ends of their error, and a block bootstrap over time of each
    percentile. The band of a cost holds the step-time error only.
    """
    deployment = evaluation.deployment
    pool = deployment.pool
    model = question.step_model(pool)
    if evaluation.summary is None:
        return evaluation
    one_replica = not question.targets and question.cost == "capacity"
    run_pool = pool.model_copy(update={"replicas": 1}) if one_replica else pool
    rate = evaluation.load if one_replica else 1.0
    rng = np.random.default_rng(int(deployment.digest()[:12], 16) + evaluation.seed)

    def run(factor: float) -> SimulationResult:
        tables = scaled(model.tables, factor)
        return simulate(question.trace, run_pool, tables, policy=deployment.scheduler_policy, k=question.k, rate=rate)

    error = min(0.9, model.relative_error)
    central = sampled(run(1.0).times, question.trace, question.targets, rng)
    ends, costs = [], [evaluation.usd_per_million_tokens]
    for factor in (1 - error, 1 + error):
        result = run(factor)
        times, summary = result.times, summarize(_without_gaps(result.times))
        costs.append(usd_per_million_tokens(question.usd_per_hour(run_pool), tokens_per_s(result)))
        flat = {f"{metric}:{p}": value for metric, by in summary.values.items() for p, value in by.items()}
        ends.append({**flat, **target_values(times, question.trace, question.targets)})
    bands = predicted(central, ends[0], ends[1])
    if not question.targets:
        return replace(evaluation, intervals={**bands, "usd_per_million_tokens": (min(costs), max(costs))})
    if question.cost == "sizing":
        evaluation = _with_capacity(question, evaluation, model.tables, saturation, None, TOLERANCE)
    if evaluation.replicas_needed == 0:
        evaluation = replace(evaluation, replicas_needed=_sized(question, deployment, saturation).replicas_needed)
    return replace(evaluation, intervals={**bands, **_cost_bands(question, evaluation, saturation, error)})


def _cost_bands(question: Question, evaluation: Evaluation, saturation: float, error: float) -> dict[str, Band]:
    pool = evaluation.deployment.pool
    tables = question.step_model(pool).tables
    per_replica = question.usd_per_hour(pool) / pool.replicas
    rates, costs = [evaluation.capacity_rate], [evaluation.usd_per_million_tokens]
    for factor in (1 - error, 1 + error):
        found = capacity(
            question.trace,
            pool,
            scaled(tables, factor),
            question.targets,
            saturation=saturation / factor,
            policy=evaluation.deployment.scheduler_policy,
            k=question.k,
            guess=(evaluation.capacity_rate or saturation) / factor,
            tolerance=BAND_TOLERANCE,
        )
        rates.append(found.rate)
        costs.append(usd_per_million_tokens(per_replica, found.tokens_per_s))
    bands = {"capacity_rate": (min(rates), max(rates)), "usd_per_million_tokens": (min(costs), max(costs))}
    if question.cost == "sizing":
        bands["usd_per_hour"] = _size_band(question, evaluation, error)
    return bands


def _size_band(question: Question, evaluation: Evaluation, error: float) -> Band:
    """$ per hour of the fewest replicas with step times at both ends of their error; infinite where no number does."""
    ends = []
    for factor in (1 - error, 1 + error):

        def model(pool: Pool, factor: float = factor) -> ModeledStep:
            found = question.step_model(pool)
            return replace(found, tables=scaled(found.tables, factor))

        pool = evaluation.deployment.pool
        found = sizing(
            question.trace,
            pool,
            model,
            question.targets,
            most=max(1, question.most_replicas(pool) - question.survive),
            guess=round((pool.replicas - question.survive) * factor),
            policy=evaluation.deployment.scheduler_policy,
            k=question.k,
        )
        per_replica = question.usd_per_hour(pool) / pool.replicas
        ends.append((found.replicas + question.survive) * per_replica if found.replicas else math.inf)
    return min(*ends, evaluation.usd_per_hour), max(*ends, evaluation.usd_per_hour)
