"""What the screen leaves of a search space, and what the mean field and the first trials say of each candidate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..profiler.step_time import StepTables
from ..runtime.spec import Deployment, Pool
from .evaluate import Question
from .screen import Estimate, estimate, estimate_all, means_of, screen
from .space import SearchSpace
from .store import Record
from .study import Screened

DEFAULT = -1  # the number of the space's default, which is a candidate besides


class Shortlist:
    """The candidates that the screen left, by number from 0 on.

    deployments, points  of each: what it deploys, and the values of the space's knobs
    screened             what became of the rest
    twin                 the candidate that is the default, None: the screen dropped it
    """

    def __init__(self, question: Question, space: SearchSpace) -> None:
        self._question, self._space = question, space
        self._used: dict[int, float] = {}
        found = space.candidates()
        means = {caching: means_of(question.trace, question.targets, caching) for caching in (True, False)}
        self._default_estimate = self._estimate(space.default.pool, means)
        known: list[int] = []
        tables: list[StepTables] = []
        refused: dict[str, int] = {}
        for i, deployment in enumerate(found.deployments):
            try:
                tables.append(question.step_model(deployment.pool).tables)
                known.append(i)
            except Exception as error:
                kind = f"no step times: {refusal(error)}"
                refused[kind] = refused.get(kind, 0) + 1
        pools = [found.deployments[i].pool for i in known]
        each_means = [means[pool.enable_prefix_caching] for pool in pools]
        estimates = estimate_all(each_means, pools, tables, question.k)
        most = [question.most_replicas(pool) if question.cost == "sizing" else pool.replicas for pool in pools]
        screening = screen(
            estimates,
            pools,
            each_means,
            [question.usd_per_hour(pool) / pool.replicas for pool in pools],
            targets=question.targets,
            metric=question.metric,
            p=question.percentile,
            most_replicas=most,
        )
        # sizing decides the replicas itself: candidates that differ in nothing else are one
        one_of = {self._name(pools[i]): i for i in reversed(screening.kept)}
        kept = sorted(one_of.values())
        merged = {"same but for replicas, which sizing decides": len(screening.kept) - len(kept)}
        self.deployments = [found.deployments[known[i]] for i in kept]
        self.points = [found.points[known[i]] for i in kept]
        self._estimates = [estimates[i] for i in kept]
        self._indices = {self.deployment(i).digest(): i for i in range(DEFAULT, len(kept))}
        dropped = {**screening.counts, **refused, **{kind: count for kind, count in merged.items() if count}}
        self.screened = Screened(space.size, found.left_out, dropped)
        first = self._name(space.default.pool)
        self.twin = next((i for i, each in enumerate(self.deployments) if self._name(each.pool) == first), None)

    def __len__(self) -> int:
        return len(self.deployments)

    def _estimate(self, pool: Pool, means: Mapping[bool, Any]) -> Estimate:
        tables = self._question.step_model(pool).tables
        return estimate(means[pool.enable_prefix_caching], pool, tables, self._question.k)

    def _name(self, pool: Pool) -> Pool:
        return pool.model_copy(update={"replicas": 1}) if self._question.cost == "sizing" else pool

    def deployment(self, index: int) -> Deployment:
        """What a candidate, or DEFAULT, deploys."""
        if index == DEFAULT:
            return self._space.with_pool(self._space.default.pool)
        return self.deployments[index]

    def index(self, digest: str) -> int:
        """The number of the candidate whose deployment has this digest."""
        return self._indices[digest]

    def saturation(self, index: int) -> float:
        """The multiple of the trace's rate that it could carry if nobody waited, by the mean field."""
        found = self._default_estimate if index == DEFAULT else self._estimates[index]
        return found.saturation_per_s / self._question.trace.rate_per_s

    def learn(self, index: int, record: Record) -> None:
        """Remember how much of its saturation a candidate could use: where its neighbors' brackets begin."""
        if index != DEFAULT and record.evaluations and self._question.targets:
            first = record.evaluations[0]
            carried = first.capacity_rate if self._question.cost == "capacity" else 1 / max(1, first.replicas_needed)
            if carried > 0:
                self._used[index] = carried / self.saturation(index)

    def guess(self, index: int) -> float | None:
        """Its capacity, by the nearest candidate that was learned of; None: there is none yet."""
        if not self._used or index == DEFAULT:
            return None
        point = self.points[index]

        def distance(other: int) -> tuple[int, int]:
            return sum(a != b for a, b in zip(point, self.points[other])), other

        return self._used[min(self._used, key=distance)] * self.saturation(index)


def refusal(error: Exception) -> str:
    """What one of our own errors says, on one line. Any other error is a bug and goes on."""
    if not isinstance(getattr(error, "exit_code", None), int):
        raise error
    return " ".join(str(error).split())
