"""The fewest replicas of a prefill and of a decode pool, together, that hold the targets at least cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..profiler.disaggregated import DisaggregatedResult, Prefilled, prefill_trace, simulate_disaggregated
from ..profiler.kv_transfer import transfer_link
from ..profiler.tables import ModeledStep
from ..runtime.model_shape import ModelShape
from ..runtime.spec import BadSpec, Deployment, Pool
from ..traces.metrics import Target
from ..traces.trace import Trace
from .capacity import broken, longest_answer_s

MOST_REPLICAS = 256  # of one pool


@dataclass(frozen=True)
class PhaseSizing:
    """What sizing found.

    prefill, decode  replicas; 0 of both: no number up to the limit holds
    usd_per_hour     of both pools
    reason           what the most that was tried still breaks; empty where some hold
    fewer            what breaks with one prefill replica less, and with one decode replica less; empty where there is
                     none to lose
    simulations      runs that it took
    """

    prefill: int
    decode: int
    usd_per_hour: float
    reason: str
    fewer: tuple[str, str]
    simulations: int

    @property
    def words(self) -> str:
        if not self.prefill:
            return f"no number of replicas holds the targets: {self.reason}"
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
        try:
            link = transfer_link(deployment)
        except BadSpec as out_of_reach:
            return str(out_of_reach)
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
    """Fewest whole replicas of both pools, at least cost.

    First both counts are doubled until they hold. Then for every number of decode replicas that could still be cheaper
    the most prefill replicas are tried that would be, and where these hold the fewest that do. So nothing cheaper
    holds, provided that more replicas of a pool never do worse than fewer. What is returned was seen to hold.

    Args:
        deployment: pools whose own replicas are not looked at. A link that it names bounds the counts to the devices
            that the link joins; without a name the nearest link is taken that joins so many.
        usd_per_replica: an hour, of the prefill and of the decode pool.
        most: replicas of one pool that may be had.
    """
    tried = _Tried(trace, deployment, shape, step_model, targets, k, rate)
    prefill_usd, decode_usd = usd_per_replica
    both = 1
    while tried.why_not(both, both) and 2 * both <= most:
        both *= 2
    if reason := tried.why_not(both, both):
        return PhaseSizing(0, 0, math.nan, reason, ("", ""), len(tried.reasons))
    best = (both * (prefill_usd + decode_usd), both, both)
    for decode in [*range(both, 0, -1), *range(both + 1, most + 1)]:
        cheaper = min(most, math.ceil((best[0] - decode * decode_usd) / prefill_usd - 1e-9) - 1)
        if cheaper < 1 and decode > both:
            break
        if cheaper < 1 or tried.why_not(cheaper, decode):
            continue
        fails, holds = 0, cheaper
        while holds - fails > 1:
            middle = (fails + holds) // 2
            fails, holds = (middle, holds) if tried.why_not(middle, decode) else (fails, middle)
        best = (holds * prefill_usd + decode * decode_usd, holds, decode)
    usd, prefill, decode = best
    fewer = (
        tried.why_not(prefill - 1, decode) if prefill > 1 else "",
        tried.why_not(prefill, decode - 1) if decode > 1 else "",
    )
    return PhaseSizing(prefill, decode, usd, "", fewer, len(tried.reasons))
