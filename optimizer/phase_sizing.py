"""The fewest replicas of a prefill and of a decode pool, together, that hold the targets at least cost."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product

from ..profiler.disaggregated import DisaggregatedResult, Prefilled, prefill_trace, simulate_disaggregated
from ..profiler.kv_transfer import transfer_link
from ..profiler.step_time import ModeledStep
from ..runtime.model_shape import ModelShape
from ..runtime.spec import BadSpec, Deployment, Pool
from ..traces.metrics import Target
from ..traces.trace import Trace
from .capacity import broken, longest_answer_s

MOST_REPLICAS = 256  # of one pool
NEAR = 2


@dataclass(frozen=True)
class PhaseSizing:
    """What sizing found.

    prefill, decode  replicas; 0 of both: none that were tried hold
    usd_per_hour     of both pools
    reason           what the most that was tried still breaks; empty where some hold
    fewer            what breaks with one prefill replica less, and with one decode replica less; empty where there is
                     none to lose
    simulations      runs that it took
    tried            where none hold, which were tried, in words; else empty
    """

    prefill: int
    decode: int
    usd_per_hour: float
    reason: str
    fewer: tuple[str, str]
    simulations: int
    tried: str = ""

    @property
    def words(self) -> str:
        if not self.prefill:
            return f"{self.tried} hold the targets: {self.reason}"
        lost = [f"one {name} replica less {why}" for name, why in zip(("prefill", "decode"), self.fewer) if why]
        counts = f"{self.prefill} prefill and {self.decode} decode replicas"
        found = f"least cost that holds the targets: {counts}, ${self.usd_per_hour:,.2f} an hour"
        return "; ".join([found, *lost])


@dataclass
class _Tried:
    """Runs of one question, each of them made once."""

    trace: Trace
    deployment: Deployment
    shape: ModelShape
    step_model: Callable[[Pool], ModeledStep]
    targets: Sequence[Target]
    k: int
    rate: float
    reasons: dict[tuple[int, int], str] = field(default_factory=dict)
    prefilled: dict[int, Prefilled] = field(default_factory=dict)

    def why_not(self, prefill: int, decode: int) -> str:
        """What so many replicas break; empty: they hold."""
        found = self.reasons.get((prefill, decode))
        if found is None:
            found = self.reasons[prefill, decode] = self._run(prefill, decode)
        return found

    def _run(self, prefill: int, decode: int) -> str:
        deployment = self.deployment.with_replicas(prefill, decode)
        link = transfer_link(deployment)
        first, second = deployment.phases
        tables, answers = self.step_model(first).tables, self.step_model(second).tables
        if prefill not in self.prefilled:
            self.prefilled[prefill] = prefill_trace(self.trace, deployment, tables, rate=self.rate)
        run: DisaggregatedResult = simulate_disaggregated(
            self.trace, deployment, self.shape, link, tables, answers, k=self.k, rate=self.rate,
            prefilled=self.prefilled[prefill],
        )  # fmt: skip
        return broken(run.result, self.trace, self.targets, longest_answer_s(self.trace, answers, second))


def size_phases(
    trace: Trace,
    deployment: Deployment,
    shape: ModelShape,
    step_model: Callable[[Pool], ModeledStep],
    usd_per_replica: tuple[float, float],
    targets: Sequence[Target],
    *,
    k: int = 30,
    rate: float = 1.0,
    most: int = MOST_REPLICAS,
) -> PhaseSizing:
    """Fewest whole replicas of both pools, at least cost (`cheapest_counts`). What is returned was seen to hold.

    Args:
        deployment: pools whose own replicas are not looked at. A link that it names bounds the counts to the devices
            that the link joins; without a name the nearest link is taken that joins so many.
        usd_per_replica: an hour, of the prefill and of the decode pool.
        most: replicas of one pool that may be had.
    Raises: BadSpec: not even one replica of each is within the link's reach.
    """
    transfer_link(deployment.with_replicas(1, 1))
    within = _reach(deployment, most)
    tried = _Tried(trace, deployment, shape, step_model, targets, k, rate)
    found = cheapest_counts(lambda *counts: not tried.why_not(*counts), usd_per_replica, most, within)
    if found is None:
        words = f"no equal numbers of replicas, doubled up to {most},"
        if within(most) < most:
            link = transfer_link(deployment.with_replicas(1, 1)).name
            words = f"no numbers of replicas up to {most} that {link} joins"
        reason = list(tried.reasons.values())[-1]
        return PhaseSizing(0, 0, math.nan, reason, ("", ""), len(tried.reasons), words)
    prefill, decode = found
    fewer = (
        tried.why_not(prefill - 1, decode) if prefill > 1 else "",
        tried.why_not(prefill, decode - 1) if decode > 1 else "",
    )
    return PhaseSizing(prefill, decode, _usd(found, usd_per_replica), "", fewer, len(tried.reasons))


def _reach(deployment: Deployment, most: int) -> Callable[[int], int]:
    """Decode replicas -> the most prefill replicas, up to the limit, that the deployment's link joins with them."""

    def joined(prefill: int, decode: int) -> bool:
        try:
            transfer_link(deployment.with_replicas(prefill, decode))
        except BadSpec:
            return False
        return True

    @cache
    def within(decode: int) -> int:
        return bisect_left(range(1, most + 1), True, key=lambda prefill: not joined(prefill, decode))

    return within


def cheapest_counts(
    holds: Callable[[int, int], bool],
    usd_per_replica: tuple[float, float],
    most: int,
    within: Callable[[int], int] | None = None,
) -> tuple[int, int] | None:
    """The cheapest numbers of prefill and decode replicas that hold; None: none that were tried do.

    First both are doubled until they hold; where they do not up to the limit, every pair is tried to which no replica
    can be added. Then for every number of decode replicas that could still be cheaper the most prefill replicas are
    tried that would be, and where these hold the fewest that do, by bisection. So nothing cheaper holds, provided that
    more replicas of a pool never do worse than fewer. Percentiles of a finite log need not obey, so all counts with up
    to NEAR fewer replicas of either pool are tried besides.

    Args:
        most: of either pool.
        within: decode replicas -> the most prefill replicas beside them, never more with more; left out: `most`.
    """
    prefill_usd, decode_usd = usd_per_replica
    reach = within or (lambda decode: most)
    best = _first(holds, most, reach)
    if best is None:
        return None
    first = best[1]
    for decode in [*range(first, 0, -1), *range(first + 1, most + 1)]:
        left_usd = _usd(best, usd_per_replica) - decode * decode_usd
        cheaper = min(reach(decode), math.ceil(left_usd / prefill_usd - 1e-9) - 1)
        if cheaper < 1 and decode > first:
            break
        if cheaper >= 1 and holds(cheaper, decode):
            best = _fewest(holds, cheaper, decode), decode
    while (near := _near(holds, best, usd_per_replica)) != best:
        best = near
    return best


def _first(holds: Callable[[int, int], bool], most: int, reach: Callable[[int], int]) -> tuple[int, int] | None:
    """Counts that hold: equal ones, doubled, else the first of those to which none can be added."""
    both = 1
    while both <= most and both <= reach(both):
        if holds(both, both):
            return both, both
        both *= 2
    for decode in range(1, most + 1):
        prefill = reach(decode)
        full = decode == most or reach(decode + 1) < prefill
        if prefill and full and holds(prefill, decode):
            return prefill, decode
    return None


def _usd(counts: tuple[int, int], usd_per_replica: tuple[float, float]) -> float:
    return counts[0] * usd_per_replica[0] + counts[1] * usd_per_replica[1]


def _fewest(holds: Callable[[int, int], bool], prefill: int, decode: int) -> int:
    """Of the prefill replicas, where so many hold."""
    fails = 0
    while prefill - fails > 1:
        middle = (fails + prefill) // 2
        fails, prefill = (fails, middle) if holds(middle, decode) else (middle, prefill)
    return prefill


def _near(
    holds: Callable[[int, int], bool], best: tuple[int, int], usd_per_replica: tuple[float, float]
) -> tuple[int, int]:
    """The cheapest that holds of `best` and the counts with up to NEAR fewer replicas."""
    fewer = product(range(best[0], max(0, best[0] - NEAR - 1), -1), range(best[1], max(0, best[1] - NEAR - 1), -1))
    ordered = sorted(fewer, key=lambda counts: _usd(counts, usd_per_replica))
    return next(counts for counts in ordered if holds(*counts))
