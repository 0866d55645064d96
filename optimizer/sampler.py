"""Which candidates to simulate next: all of them where that is affordable, else TPE in turn with the front's neighbors.

TPE is multivariate, over categories; every other proposal is an untried neighbor of the front so far. Of the samplers
compared on a synthetic serving space it found most of the front within 200 and 500 trials (research.md, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .space import SearchSpace

ENUMERATION = "enumeration: every candidate that the screen left"
TPE = "Optuna TPESampler(multivariate, categorical), every other trial a neighbor of the front"

# Proposals that TPE may repeat, or spend on points that the screen dropped, before an untried one is drawn at random.
PATIENCE = 8

# What stands for a cost or latency that is infinite: Optuna would take inf for a finished trial's value.
WORST = 1e12


@dataclass(frozen=True)
class Outcome:
    """What a sampler learns of a candidate. violation: above 0 where it is not feasible, the larger the further off."""

    latency_s: float
    cost: float
    violation: float

    @property
    def values(self) -> list[float]:
        return [value if math.isfinite(value) else WORST for value in (self.latency_s, self.cost)]


class Sampler(Protocol):
    """Proposes candidates by index. `ask` gives untried ones, fewer than asked for where none are left."""

    name: str

    def ask(self, count: int) -> list[int]: ...
    def tell(self, index: int, outcome: Outcome) -> None: ...


class Enumeration:
    """Every candidate once, in the order of the space."""

    def __init__(self, count: int) -> None:
        self.name = ENUMERATION
        self._left = list(range(count))

    def ask(self, count: int) -> list[int]:
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def tell(self, index: int, outcome: Outcome) -> None:
        pass


class TpeAndNeighbors:
    """TPE and neighbors of the front in turn; the same seed and outcomes give the same proposals."""

    def __init__(self, space: SearchSpace, points: Sequence[tuple[int, ...]], seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.name = TPE
        self._optuna = optuna
        self._points = list(points)
        self._index = {point: i for i, point in enumerate(points)}
        self._untried = dict.fromkeys(range(len(points)))
        self._outcomes: dict[int, Outcome] = {}
        self._pending: dict[int, Any] = {}
        self._neighbor_is_next = False
        self._rng = np.random.default_rng(seed)
        sampler = optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed)
        self._study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        self._distributions: dict[str, Any] = {
            name: optuna.distributions.CategoricalDistribution(range(len(values))) for name, values in space.fields
        }

    def ask(self, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count and self._untried:
            index = self._neighbor() if self._neighbor_is_next else self._suggestion()
            self._neighbor_is_next = not self._neighbor_is_next
            if index is None:
                index = list(self._untried)[self._rng.integers(len(self._untried))]
            del self._untried[index]
            taken.append(index)
        return taken

    def tell(self, index: int, outcome: Outcome) -> None:
        self._untried.pop(index, None)
        self._outcomes[index] = outcome
        trial = self._pending.pop(index, None)
        if trial is not None:
            self._finish(trial, outcome)
            return
        self._study.add_trial(
            self._optuna.trial.create_trial(
                params=dict(zip(self._distributions, self._points[index])),
                distributions=self._distributions,
                values=outcome.values,
                constraints={"targets": outcome.violation},
            )
        )

    def _suggestion(self) -> int | None:
        # the fewer are left, the more of them TPE repeats
        for _ in range(math.ceil(PATIENCE * len(self._untried) / len(self._points))):
            trial = self._study.ask(self._distributions)
            index = self._index.get(tuple(trial.params[name] for name in self._distributions))
            if index in self._untried:
                self._pending[index] = trial
                return index
            known = None if index is None else self._outcomes.get(index)
            if known is None:
                # not a deployment, screened out, or under way in this very batch
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            else:
                self._finish(trial, known)
        return None

    def _finish(self, trial: Any, outcome: Outcome) -> None:
        trial.set_constraint("targets", outcome.violation)
        self._study.tell(trial, outcome.values)

    def _neighbor(self) -> int | None:
        """An untried point that differs from one on the front in one field, adjacent values first."""
        front = self._front()
        for place in self._rng.permutation(len(front)):
            around = self._around(front[place])
            if around:
                nearest = min(distance for distance, _ in around)
                closest = [index for distance, index in around if distance == nearest]
                return closest[self._rng.integers(len(closest))]
        return None

    def _around(self, index: int) -> list[tuple[int, int]]:
        point = self._points[index]
        found = []
        for axis, distribution in enumerate(self._distributions.values()):
            for value in range(len(distribution.choices)):
                other = self._index.get((*point[:axis], value, *point[axis + 1 :]))
                if other in self._untried:
                    found.append((abs(value - point[axis]), other))
        return found

    def _front(self) -> list[int]:
        rows = [
            (outcome.cost, outcome.latency_s, index)
            for index, outcome in sorted(self._outcomes.items())
            if outcome.violation <= 0
        ]
        front, fastest_s = [], math.inf
        for _, latency_s, index in sorted(rows):
            if latency_s < fastest_s:
                front.append(index)
                fastest_s = latency_s
        return front
