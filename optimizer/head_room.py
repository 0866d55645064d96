"""How far a deployment is from missing its targets: with more traffic, and with replicas lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..profiler.profile import BadProfile
from ..profiler.simulator import governed_rows, simulate
from ..profiler.step_time import ModeledStep, scaled
from ..runtime.spec import BadSpec, Deployment
from ..traces.metrics import TTFT, Target, meets
from ..traces.trace import Trace
from .capacity import StepModel, broken, check_question, highest_rate, longest_answer_s
from .intervals import target_values
from .screen import estimate, means_of

# Both ends of the interval need no finer bracket: the step-time error that they show is several times as wide.
_BAND_TOLERANCE = 0.05

_SURVIVING_LEAVES_OUT = (
    "losing a replica: the steady state after it, with its traffic on the others, from the first request on; not the "
    "moment itself, whose open requests begin again"
)


@dataclass(frozen=True)
class HeadRoom:
    """The largest traffic multiple at which the targets hold.

    rate       multiple of the recorded rate that was seen to hold, 0 where none was
    low, high  the same with step times at both ends of their error
    tolerance  a rate this share above was seen to fail; infinite: none did
    """

    rate: float
    low: float
    high: float
    tolerance: float


def head_room(
    trace: Trace, deployment: Deployment, modeled: ModeledStep, targets: Sequence[Target], *, k: int = 30
) -> HeadRoom:
    """Bisect the rate at which the whole deployment, its replicas and router as they are, still holds the targets.

    Raises: BadQuestion: arrivals without a rate.
    """
    check_question(trace, (), TTFT)  # the rate alone: targets on ITL, which no study takes, can be asked here
    pool = deployment.pool
    means = means_of(trace, targets, pool.enable_prefix_caching)
    one = estimate(means, pool, modeled.tables, k).saturation_per_s / trace.rate_per_s
    saturation = one * pool.replicas
    found = highest_rate(
        trace, pool, modeled.tables, targets, saturation=saturation, policy=deployment.scheduler_policy, k=k
    )
    ends = [found.rate]
    error = min(0.9, modeled.relative_error)
    for factor in (1 - error, 1 + error):
        other = highest_rate(
            trace,
            pool,
            scaled(modeled.tables, factor),
            targets,
            saturation=saturation / factor,
            policy=deployment.scheduler_policy,
            k=k,
            guess=(found.rate or saturation) / factor,
            tolerance=_BAND_TOLERANCE,
        )
        ends.append(other.rate)
    return HeadRoom(found.rate, min(ends), max(ends), found.tolerance)


@dataclass(frozen=True)
class Survivors:
    """What is left of the targets when replicas are lost.

    replicas    that are left
    met         target -> whether the survivors hold it
    values      target -> its percentile, seconds
    reason      why they do not hold; empty where they do
    """

    lost: int
    replicas: int
    met: dict[str, bool]
    values: dict[str, float]
    reason: str
    not_modeled: tuple[str, ...]

    @property
    def words(self) -> str:
        head = f"with {self.lost} replica(s) lost, {self.replicas} left: "
        if not self.met:
            return head + self.reason
        each = [
            f"{target} {'holds' if met else 'MISSED'} ({self.values[target] * 1e3:,.1f} ms)"
            for target, met in self.met.items()
        ]
        return head + ", ".join(each) + (f"; {self.reason}" if self.reason and all(self.met.values()) else "")


def survivors(
    trace: Trace,
    deployment: Deployment,
    step_model: StepModel,
    targets: Sequence[Target],
    *,
    lost: int,
    k: int = 30,
    rate: float = 1.0,
) -> Survivors:
    """The whole traffic on the replicas that are left; where none is, or so few were not measured, it says so."""
    left = deployment.pool.replicas - lost
    if left < 1:
        return Survivors(lost, max(0, left), {}, {}, "nobody is left to serve", ())
    pool = deployment.pool.model_copy(update={"replicas": left})
    try:
        tables = step_model(pool).tables
    except (BadProfile, BadSpec) as unmeasured:
        return Survivors(lost, left, {}, {}, str(unmeasured), ())
    result = simulate(trace, pool, tables, policy=deployment.scheduler_policy, k=k, rate=rate)
    met = {str(target): meets(result.times, target, governed_rows(trace, target)) for target in targets}
    values = target_values(result.times, trace, targets)
    reason = broken(result, trace, targets, longest_answer_s(trace, tables, pool))
    return Survivors(lost, left, met, values, reason, (_SURVIVING_LEAVES_OUT,))
