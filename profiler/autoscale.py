"""Replicas that come and go with the load: the rule of Kubernetes' Horizontal Pod Autoscaler, on the virtual clock.

Every sync period a metric is added up over the replicas; were it `target` for each, how many would that take? So many
there shall be, within limits. A new one takes requests after its cold start; one that leaves finishes what it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..runtime.spec import Pool
from .event_order import Fleet, Held
from .replica import Replica, Run

# What is added up over the replicas; the first two as vLLM's /metrics has them (vllm:num_requests_running + _waiting,
# vllm:num_requests_waiting), the last as our router counts.
METRICS = ("num_requests", "num_requests_waiting", "outstanding_tokens")

# Knative's autoscaler aims at so much of the requests that a replica takes at once
# (container-concurrency-target-percentage, https://knative.dev/docs/serving/autoscaling/concurrency/, 2026-11).
TARGET_UTILIZATION = 0.7
# vLLM production-stack, docs/source/use_cases/autoscaling-keda.rst (2026-11): threshold of vllm:num_requests_waiting
TARGET_WAITING = 5.0


class BadAutoscaler(Exception):
    """An autoscaler that cannot be: where, what was found, what is allowed, what to do."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {self.found}; allowed: {self.allowed}; {self.todo}"


@dataclass(frozen=True)
class Autoscaler:
    """A Horizontal Pod Autoscaler with one external metric of type AverageValue, which is what KEDA sets up.

    Defaults from kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale (autoscaling/v2, 2026-11).

    min_replicas, max_replicas   at least 1 (to zero and back is another mechanism: an activator holds requests)
    target                       of `metric` per replica
    metric                       one of METRICS
    cold_start_s                 from asking for a replica until it takes requests
    sync_period_s                --horizontal-pod-autoscaler-sync-period
    tolerance                    --horizontal-pod-autoscaler-tolerance: the metric may differ by this share
    scale_down_stabilization_s   behavior.scaleDown.stabilizationWindowSeconds: of the recommendations in it the largest
    scale_up_replicas, scale_up_percent, scale_up_period_s   behavior.scaleUp.policies: in a period at most so many
                                 more, or so many percent more, whichever allows more
    """

    min_replicas: int
    max_replicas: int
    target: float
    metric: str = "num_requests"
    cold_start_s: float = 0.0
    sync_period_s: float = 15.0
    tolerance: float = 0.1
    scale_down_stabilization_s: float = 300.0
    scale_up_replicas: int = 4
    scale_up_percent: float = 100.0
    scale_up_period_s: float = 15.0

    def __post_init__(self) -> None:
        def refuse(name: str, allowed: str) -> BadAutoscaler:
            return BadAutoscaler(f"autoscaler: {name}", getattr(self, name), allowed, "correct it")

        if self.min_replicas < 1:
            raise refuse("min_replicas", "at least 1: scaling to zero is not modeled")
        if self.max_replicas < self.min_replicas:
            raise refuse("max_replicas", f"at least min_replicas, {self.min_replicas}")
        if self.metric not in METRICS:
            raise refuse("metric", ", ".join(METRICS))
        for name in ("target", "sync_period_s", "scale_up_period_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise refuse(name, "a number > 0")
        for name in (
            "cold_start_s",
            "tolerance",
            "scale_down_stabilization_s",
            "scale_up_replicas",
            "scale_up_percent",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise refuse(name, "a number >= 0")


def default_target(metric: str, pool: Pool) -> float:
    """Of a metric per replica. Raises: BadAutoscaler: nobody gives one for it."""
    if metric == "num_requests":
        return TARGET_UTILIZATION * pool.max_num_seqs
    if metric == "num_requests_waiting":
        return TARGET_WAITING
    raise BadAutoscaler("autoscaler: target", None, f"a number of {metric} per replica", "give --autoscale-target")


@dataclass(frozen=True)
class Past:
    """What an autoscaler remembers: (second, number) of its recommendations, and of the replicas that it added."""

    recommendations: tuple[tuple[float, int], ...] = ()
    added: tuple[tuple[float, int], ...] = ()


def desired_replicas(autoscaler: Autoscaler, now_s: float, replicas: int, total: float, past: Past) -> tuple[int, Past]:
    """How many replicas there shall be, and what is remembered for the next time.

    Args:
        replicas: that there are: ready ones and those that start, but none that leaves.
        total: the metric, added up over those that are ready.
    """
    recommended = replicas
    if abs(total / (autoscaler.target * replicas) - 1.0) > autoscaler.tolerance:
        recommended = math.ceil(total / autoscaler.target)
    recommended = min(max(recommended, autoscaler.min_replicas), autoscaler.max_replicas)
    since_s = now_s - autoscaler.scale_down_stabilization_s
    kept = tuple(each for each in past.recommendations if each[0] > since_s)
    # the window only holds back who would go: who is wanted comes at once
    shall = max(recommended, min(replicas, max((count for _, count in kept), default=0)))
    added = tuple(each for each in past.added if each[0] > now_s - autoscaler.scale_up_period_s)
    if shall > replicas:
        before = replicas - sum(count for _, count in added)
        by_percent = math.ceil(before * (1.0 + autoscaler.scale_up_percent / 100.0))
        most = max(before + autoscaler.scale_up_replicas, by_percent)
        shall = max(replicas, min(shall, most))
        added = (*added, (now_s, shall - replicas))
    return shall, Past((*kept, (now_s, recommended)), added)


class ElasticFleet(Fleet):
    """A fleet that an autoscaler changes: it begins with min_replicas, which are ready.

    Who starts is let go first, then who came last, as Kubernetes' ReplicaSet does.
    """

    def __init__(self, pool: Pool, run: Run, prefix_block: int, autoscaler: Autoscaler, started_s: float) -> None:
        """started_s: when the first replicas are ready, and the first sync period begins."""
        super().__init__(pool.model_copy(update={"replicas": autoscaler.min_replicas}), run, prefix_block)
        self._pool = pool
        self._autoscaler = autoscaler
        self._sync_s = started_s + autoscaler.sync_period_s
        self._held = [Held(started_s, started_s, math.inf, math.inf) for _ in self.replicas]
        self._past = Past(((started_s, autoscaler.min_replicas),))

    @property
    def held(self) -> tuple[Held, ...]:
        return tuple(self._as_it_went(replica, each) for replica, each in zip(self.replicas, self._held))

    @property
    def next_change_s(self) -> float:
        return self._sync_s

    def takes_requests(self, now_s: float) -> NDArray[np.bool_]:
        return np.array([each.ready_s <= now_s and math.isinf(each.leaves_s) for each in self._held])

    def change(self, now_s: float) -> None:
        """One sync: look at the metric, ask for replicas or let some go."""
        stays = [i for i, each in enumerate(self._held) if math.isinf(each.leaves_s)]
        measure: Callable[[Replica], float] = {
            "num_requests": lambda replica: replica.num_requests_at(now_s),
            "num_requests_waiting": lambda replica: replica.num_waiting,
            "outstanding_tokens": lambda replica: replica.outstanding_tokens(now_s),
        }[self._autoscaler.metric]
        total = float(sum(measure(self.replicas[i]) for i in stays))
        shall, self._past = desired_replicas(self._autoscaler, now_s, len(stays), total, self._past)
        for _ in range(shall - len(stays)):
            self.replicas.append(Replica(self._pool, self.run))
            ready_s = now_s + self._autoscaler.cold_start_s
            self._held.append(Held(now_s, ready_s, math.inf, math.inf))
        last = sorted(stays, key=lambda i: (self._held[i].ready_s, i))
        for i in last[shall:]:
            self._held[i] = replace(self._held[i], leaves_s=now_s)
        self._sync_s = now_s + self._autoscaler.sync_period_s

    def _as_it_went(self, replica: Replica, held: Held) -> Held:
        """With the end of its last request, and without a readiness that it did not live to see."""
        if math.isinf(held.leaves_s):
            return held
        ready_s = held.ready_s if held.ready_s <= held.leaves_s else math.inf
        return replace(held, ready_s=ready_s, gone_s=max(held.leaves_s, replica.now_s))


def replica_hours(held: tuple[Held, ...], end_s: float) -> float:
    """Hours that replicas were held until end_s, loading and draining included."""
    return sum(max(0.0, min(each.gone_s, end_s) - min(each.asked_s, end_s)) for each in held) / 3600.0


def replicas_over_time(held: tuple[Held, ...], end_s: float) -> list[tuple[float, int, int]]:
    """(second, replicas held, replicas that take requests) at every change until end_s."""
    changes = [(each.asked_s, 1, 0) for each in held]
    changes += [(each.ready_s, 0, 1) for each in held]
    changes += [(each.leaves_s, 0, -1) for each in held if each.ready_s <= each.leaves_s]
    changes += [(each.gone_s, -1, 0) for each in held]
    found: list[tuple[float, int, int]] = []
    for at_s, more_held, more_ready in sorted(changes):
        if at_s > end_s:
            break
        before = found[-1] if found else (at_s, 0, 0)
        now = (at_s, before[1] + more_held, before[2] + more_ready)
        if found and before[0] == at_s:
            found[-1] = now
        else:
            found.append(now)
    return found
