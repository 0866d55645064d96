"""How much traffic a candidate carries inside its targets, and how many replicas the recorded traffic needs.

Both are searches over simulations of the whole trace: capacity bisects the arrival rate of one replica, sizing the
number of replicas at the recorded rate. A run that can no longer hold is given up early, so failures are cheap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from ..profiler.profile import BadProfile
from ..profiler.simulator import SimulationResult, governed_rows, simulate
from ..profiler.step_time import ModeledStep, StepTables, composed_time_s
from ..runtime.spec import Pool
from ..traces.metrics import PERCENTILES, Mask, Metric, Target, meets
from ..traces.trace import Trace

# The capacity that is returned was seen to hold, and this much more was seen to fail: for what may win, and for all
# others. Two runs instead of four where the guess is good.
TOLERANCE = 0.02
COARSE_TOLERANCE = 0.08

# Long traces: candidates are compared on their busiest quarter first. Over four quarters of the Azure conversation
# trace, three targets and four candidates its capacity was 0.90 to 1.15 of the whole's; no other quarter came closer.
PARTS = 4
LEAST_FOR_PARTS = 4000
PART_SLACK = 0.25

# A third of a minute of speech is about so many tokens: what a voice service must have before it begins to play.
DEFAULT_K = 30

# A run keeps up if its queue drains, after the last arrival, within this share of the run and one longest answer:
# targets on TPOT alone would otherwise hold at any rate, with requests waiting for ever.
DRAIN_SHARE = 0.05

# The mean field's saturation is an average: a finite trace may be served a little above it, never far.
CEILING = 1.25

# Below this share of saturation a candidate that still fails is not worth a replica.
FLOOR = 1e-3


class BadQuestion(Exception):
    """A trace and targets without an answer: where, what was found, what is allowed, what to do."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:80]}; allowed: {self.allowed}; {self.todo}"


# Step times of a pool; profiler.tables.step_tables with its source and shape filled in, or anything like it.
StepModel = Callable[[Pool], ModeledStep]


def check_question(trace: Trace, targets: Sequence[Target], metric: Metric, percentile: float = 95.0) -> int:
    """k of the TTF-k that targets and metric ask for (30 where none does).

    Raises: BadQuestion: arrivals without a rate, a metric or a percentile of the axis that is not simulated, two
        different k, or a target that governs no request.
    """
    if percentile not in PERCENTILES:
        allowed = ", ".join(f"p{each:g}" for each in PERCENTILES)
        raise BadQuestion(f"metric {metric}", f"p{percentile:g}", allowed, "ask for one of these; targets take any")
    if trace.rate_per_s == 0:
        raise BadQuestion(
            f"{trace.source}: arrival_s",
            f"{len(trace)} request(s) at one instant",
            "arrivals with a rate",
            "take a longer log",
        )
    metrics = [metric, *(target.metric for target in targets)]
    if any(each.name == "itl" for each in metrics):
        raise BadQuestion(
            "metric", "itl", "ttft, ttf30, tpot, e2e", "ask for tpot: the search has no interval for single gaps"
        )
    k = k_of(metrics)
    check_governed(trace, targets)
    return k


def check_governed(trace: Trace, targets: Sequence[Target]) -> None:
    """Raises: BadQuestion: a target that governs no request, so that whatever happens would count as met."""
    for target in targets:
        if not governed_rows(trace, target).any():
            apps = "no applications" if trace.app is None else ", ".join(trace.app.names)
            raise BadQuestion(f"target {target}", "no request that it governs", apps, "correct the application's name")


@dataclass(frozen=True)
class Owed:
    """What a run is held to: targets from wherever they come, as `metrics.violations` and `goodput` take them.

    A target that the trace has governs the rows that the trace says; any other those of its application.

    targets  of the log, or of the spec or the command line in their place
    counted  (n,) bool, which requests count (see RunProtocol); None: all
    """

    trace: Trace
    targets: tuple[Target, ...]
    counted: Mask | None = None

    def rows(self, target: Target) -> Mask:
        """The requests that count and that a target governs, (n,) bool."""
        rows = governed_rows(self.trace, target)
        return rows if self.counted is None else rows & self.counted


def k_of(metrics: Iterable[Metric]) -> int:
    """The k of TTF-k that these metrics ask of a run; 30 where none does. Raises: BadQuestion: two different k."""
    ks = {each.k for each in metrics if each.name == "ttf" and each.k > 1}
    if len(ks) > 1:
        names = ", ".join(f"ttf{k}" for k in sorted(ks))
        raise BadQuestion("metric", names, "one k in a run", "ask once for each")
    return ks.pop() if ks else DEFAULT_K


def busiest_part(trace: Trace) -> Trace | None:
    """The quarter of the requests with the most tokens per second; None for traces too short to be cut."""
    if len(trace) < LEAST_FOR_PARTS:
        return None
    bounds = np.linspace(0, len(trace), PARTS + 1).astype(int)
    parts = [trace.select(slice(first, last)) for first, last in pairwise(bounds)]
    timed = [part for part in parts if part.duration_s > 0]
    # a prompt's token costs about a tenth of an answer's, which is computed in a step of its own
    return max(timed, key=lambda part: float((part.input_tokens / 10 + part.output_tokens).sum()) / part.duration_s)


def longest_answer_s(trace: Trace, tables: StepTables, pool: Pool) -> float:
    """Seconds of the longest request in a full batch: what may be left to do after the last arrival of any run."""
    tokens = int(min(trace.output_tokens.max(), pool.max_model_len))
    context = float(trace.input_tokens.mean()) + tokens
    rows = min(pool.max_num_seqs, pool.num_kv_blocks * pool.block_size // max(1, int(context)) + 1)
    step_s = composed_time_s(tables, min(rows, pool.max_num_batched_tokens), rows, rows, rows * context, 0.0)
    return tokens * step_s


def broken(result: SimulationResult, trace: Trace, targets: Sequence[Target], slack_s: float) -> str:
    """Why a run does not hold: the target it breaks, or that it does not keep up; empty where it holds.

    Args:
        slack_s: of the queue after the last arrival, see DRAIN_SHARE and `longest_answer_s`.
    """
    for target in targets:
        if not meets(result.times, target, governed_rows(trace, target)):
            return f"breaks {target}"
    if result.gave_up:
        return "breaks a target"
    scheduled_s = result.times.scheduled_s
    if np.isnan(result.times.end_s).all():
        return "no request fits into max_model_len"
    drain_s = float(np.nanmax(result.times.end_s) - scheduled_s[-1])
    if drain_s > DRAIN_SHARE * float(scheduled_s[-1] - scheduled_s[0]) + slack_s:
        return f"does not keep up: {drain_s:.3g} s of queue are left after the last arrival"
    return ""


@dataclass(frozen=True)
class Capacity:
    """The most that one replica carries inside the targets.

    rate         multiple of the recorded rate that was seen to hold; 0 = none did
    tokens_per_s output tokens at it
    tolerance    a rate this share above was seen to fail; infinite: none up to the ceiling, the trace is too short
    result       the run at `rate`; None where none held
    simulations  runs that it took
    """

    rate: float
    tokens_per_s: float
    tolerance: float
    result: SimulationResult | None
    simulations: int


def tokens_per_s(result: SimulationResult) -> float:
    """Output tokens over the time from the first arrival to the last token."""
    span_s = float(np.nanmax(result.times.end_s) - result.times.scheduled_s[0])
    return float(result.times.output_tokens.sum()) / span_s


def capacity(
    trace: Trace,
    pool: Pool,
    tables: StepTables,
    targets: Sequence[Target],
    *,
    saturation: float,
    policy: str = "paretune",
    k: int = 30,
    guess: float | None = None,
    tolerance: float = TOLERANCE,
) -> Capacity:
    """The highest multiple of the recorded rate at which one replica of a pool holds the targets.

    Args:
        pool: its replicas are not looked at.
        Others as in `highest_rate`.
    """
    single = pool.model_copy(update={"replicas": 1})
    return highest_rate(
        trace, single, tables, targets, saturation=saturation, policy=policy, k=k, guess=guess, tolerance=tolerance
    )


def highest_rate(
    trace: Trace,
    pool: Pool,
    tables: StepTables,
    targets: Sequence[Target],
    *,
    saturation: float,
    policy: str = "paretune",
    k: int = 30,
    guess: float | None = None,
    tolerance: float = TOLERANCE,
) -> Capacity:
    """The highest multiple of the recorded rate at which a pool, all its replicas together, holds the targets.

    From a guess the rate is raised, or lowered, in growing steps until one run holds and one fails; then their ratio is
    bisected to `tolerance`. Percentiles need not be monotone in the rate: what is returned was seen to hold, and what
    is `tolerance` above it was seen to fail.

    Args:
        saturation: multiple of the recorded rate at which the mean field says that the pool is full (screen.estimate).
        guess: where to begin; within the tolerance of the answer two runs are enough.
    """
    slack_s = longest_answer_s(trace, tables, pool)
    # the mean field proposes nothing; where all proposals are kept, a step brings so many times the tokens
    ceiling = CEILING * saturation * (1 + pool.num_speculative_tokens)
    low, high = 0.0, math.inf
    best: SimulationResult | None = None
    runs = 0
    rate = min(ceiling, guess or 0.6 * saturation)
    # a guess comes from a neighbor and is mostly within the tolerance; without one the answer may lie far away
    stride = 1 + tolerance if guess else 1.25
    while high > low * (1 + tolerance) * (1 + 1e-9):
        result = simulate(trace, pool, tables, policy=policy, k=k, rate=rate, give_up=targets)
        runs += 1
        if broken(result, trace, targets, slack_s):
            high = rate
        else:
            low, best = rate, result
        if low >= ceiling or high <= FLOOR * saturation:
            break
        if low == 0.0:
            rate, stride = max(high / stride, FLOOR * saturation), stride**1.7
        elif math.isinf(high):
            rate, stride = min(low * stride, ceiling), stride**1.7
        else:
            rate = math.sqrt(low * high)
    above = high / low - 1 if low > 0 else 0.0
    return Capacity(low, tokens_per_s(best) if best is not None else 0.0, above, best, runs)


@dataclass(frozen=True)
class Sizing:
    """The fewest replicas that hold the targets at the recorded rate.

    replicas  0 = no number up to the limit, or to the largest whose step times are known, does
    result    the run with them; None where there is none
    reason    what the largest number that was tried still breaks, or why no more could be tried; empty where one holds
    """

    replicas: int
    result: SimulationResult | None
    reason: str


def sizing(
    trace: Trace,
    pool: Pool,
    step_model: StepModel,
    targets: Sequence[Target],
    *,
    most: int,
    guess: int,
    policy: str = "paretune",
    k: int = 30,
) -> Sizing:
    """Fewest whole replicas at the recorded rate, requests routed as the pool says; bisected: about log2 of them runs.

    Args:
        most: replicas that may be had (>= 1).
        guess: where to begin.
    """
    found: dict[int, SimulationResult] = {}
    low, high = 0, most + 1
    reason = unknown = ""
    replicas = max(1, min(most, guess))
    stride = 1
    while high - low > 1:
        sized = pool.model_copy(update={"replicas": replicas})
        try:
            tables = step_model(sized).tables
        except BadProfile as unmeasured:
            # so many side by side disturb each other in a way that nobody measured
            most, high, unknown = replicas - 1, replicas, str(unmeasured)
            replicas = (low + high) // 2
            continue
        result = simulate(trace, sized, tables, policy=policy, k=k, give_up=targets)
        reason_here = broken(result, trace, targets, longest_answer_s(trace, tables, sized))
        if reason_here:
            low, reason = replicas, reason_here
        else:
            high, found[replicas] = replicas, result
        if high > most:
            replicas, stride = min(most, low + stride), stride * 2
        elif low == 0:
            replicas, stride = max(1, high - stride), stride * 2
        else:
            replicas = (low + high) // 2
    if high > most:
        return Sizing(0, None, "; ".join(filter(None, (reason, unknown))))
    return Sizing(high, found[high], "")
