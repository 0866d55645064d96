"""Geometry of the latency-cost curve: which points it shows, the front's staircase and band, axes and their ticks.

x is the front's latency in seconds, y its cost in dollars (a month for sizing, per million tokens for capacity). The
page draws it as SVG, plots.py with matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..optimizer.front import FIDELITIES, Evaluation, Front
from ..traces.metrics import usd_per_month
from .comparison import value_of
from .report_data import Measured, ReportData
from .summary import limit_on_axis

Place = tuple[float, float]
Kind = Literal["simulated", "measured", "infeasible"]

# A factor within an axis beyond which equal steps hide the cheap and fast end.
LOG_FROM = 4.0
# Room left at both ends of an axis, as a share of its length.
MARGIN = 0.06
# Trials this far beyond what the front, the default and the limit span are left out of the picture and counted.
REACH = 4.0


@dataclass(frozen=True)
class Axis:
    """From low to high, both included; logarithmic or linear."""

    low: float
    high: float
    log: bool

    def share(self, value: float) -> float:
        """Where a value lies: 0 at low, 1 at high; held to that range."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> tuple[float, ...]:
        """Round values within the axis, three to nine of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
                values = tuple(step * 10.0**decade for decade in decades for step in steps)
                inside = tuple(value for value in values if self.low <= value <= self.high)
                if len(inside) >= 4:
                    return inside
            return inside
        rough = (self.high - self.low) / 5
        decade = 10.0 ** math.floor(math.log10(rough))
        step = next(decade * size for size in (1, 2, 2.5, 5, 10) if decade * size >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return tuple(i * step for i in range(first, last + 1))


@dataclass(frozen=True)
class Mark:
    """A trial that is not on the front."""

    x: float
    y: float
    kind: Kind


@dataclass(frozen=True)
class Chart:
    """What the picture shows, in seconds and dollars.

    front            one place a point of Front.points, in their order
    line             the staircase of the front: what can be had for a given wait
    band             closed outline around it, of the ends of intervals where they are known; empty without any
    others, left_out the other trials, and how many lie outside the picture
    chosen, default  places; the default's is None where its cost or wait is not finite
    chosen_measured, default_measured   where the live run came out; None without one
    limit_s          of the target on this axis, or None
    """

    x: Axis
    y: Axis
    front: tuple[Place, ...]
    line: tuple[Place, ...]
    band: tuple[Place, ...]
    others: tuple[Mark, ...]
    left_out: int
    chosen: Place
    default: Place | None
    chosen_measured: Place | None
    default_measured: Place | None
    limit_s: float | None


def chart(data: ReportData) -> Chart:
    """The picture of a report."""
    front = data.front
    target = limit_on_axis(data)
    limit_s = None if target is None else target.limit_s
    places = tuple(_place(front, point) for point in front.points)
    chosen, default = _place(front, data.chosen), _finite(_place(front, data.default))
    chosen_measured = _measured_place(front, data.chosen, data.chosen_measured)
    default_measured = _measured_place(front, data.default, data.default_measured)
    ends = [_ends(front, point) for point in front.points]
    ends = [(low, high) for low, high in ends if low != high]

    shown = [*places, chosen, *(place for place in (default, chosen_measured, default_measured) if place is not None)]
    shown += [end for pair in ends for end in pair if _finite(end)]
    others = _others(front, data)
    near = [mark for mark in others if _near(mark, shown)]
    x = axis([place[0] for place in shown] + [mark.x for mark in near] + ([] if limit_s is None else [limit_s]))
    y = axis([place[1] for place in shown] + [mark.y for mark in near])
    return Chart(
        x=x,
        y=y,
        front=places,
        line=staircase(places, x.high),
        band=_outline([low for low, _ in ends], [high for _, high in ends], x.high),
        others=tuple(near),
        left_out=len(others) - len(near),
        chosen=chosen,
        default=default,
        chosen_measured=chosen_measured,
        default_measured=default_measured,
        limit_s=limit_s,
    )


def axis(values: Iterable[float]) -> Axis:
    """An axis that shows all values, with some room; logarithmic where they span LOG_FROM or more."""
    known = sorted(values)
    low, high = known[0], known[-1]
    if low > 0 and high / low >= LOG_FROM:
        room = (high / low) ** MARGIN
        return Axis(low / room, high * room, True)
    room = MARGIN * (high - low) or MARGIN * abs(high) or 1.0
    return Axis(max(0.0, low - room) if low >= 0 else low - room, high + room, False)


def staircase(places: Sequence[Place], x_high: float) -> tuple[Place, ...]:
    """The least cost at which a wait can be had: steps from the fastest place to the cheapest, then on to x_high."""
    steps: list[Place] = []
    for x, y in _unbeaten(places):
        if steps:
            steps.append((x, steps[-1][1]))
        steps.append((x, y))
    if steps and steps[-1][0] < x_high:
        steps.append((x_high, steps[-1][1]))
    return tuple(steps)


def _unbeaten(places: Sequence[Place]) -> list[Place]:
    """By falling cost: each costs less than all that are faster."""
    kept: list[Place] = []
    for place in sorted(places):
        if not kept or place[1] < kept[-1][1]:
            kept.append(place)
    return kept


def _outline(low: Sequence[Place], high: Sequence[Place], x_high: float) -> tuple[Place, ...]:
    optimistic = staircase([place for place in low if _finite(place)], x_high)
    pessimistic = staircase([place for place in high if _finite(place)], x_high)
    corner = ((optimistic[0][0], pessimistic[0][1]),) if optimistic and pessimistic else ()
    return (*optimistic, *reversed(pessimistic), *corner)


def _place(front: Front, evaluation: Evaluation) -> Place:
    return front.latency_s(evaluation), _axis_usd(front, evaluation.cost(front.cost))


def _ends(front: Front, evaluation: Evaluation) -> tuple[Place, Place]:
    wait_s, cost = evaluation.interval(front.metric, front.percentile), evaluation.cost_interval(front.cost)
    return (wait_s[0], _axis_usd(front, cost[0])), (wait_s[1], _axis_usd(front, cost[1]))


def _measured_place(front: Front, evaluation: Evaluation, measured: Measured | None) -> Place | None:
    """At the measured wait; at the measured cost where capacity was measured, else at the predicted one."""
    if measured is None:
        return None
    usd = measured.usd_per_million_tokens if front.cost == "capacity" else math.nan
    usd = evaluation.cost(front.cost) if math.isnan(usd) else usd
    return _finite((value_of(measured.summary, front.metric, front.percentile), _axis_usd(front, usd)))


def _others(front: Front, data: ReportData) -> list[Mark]:
    """Every other candidate with finite axes, once, at its highest fidelity."""
    drawn = {_name(each) for each in (*front.points, data.chosen, data.default)}
    best: dict[tuple[str, float], Evaluation] = {}
    for each in front.evaluations:
        known = best.get(_name(each))
        if known is None or FIDELITIES.index(each.fidelity) >= FIDELITIES.index(known.fidelity):
            best[_name(each)] = each
    marks = []
    for name, each in best.items():
        place = _finite(_place(front, each))
        if name not in drawn and place is not None:
            kind: Kind = "infeasible" if not each.feasible else "measured" if each.measured is not None else "simulated"
            marks.append(Mark(*place, kind))
    return marks


def _name(each: Evaluation) -> tuple[str, float]:
    """One candidate under one load; its deployment's digest changes where sizing changes the replicas."""
    return each.candidate or each.deployment.digest(), each.load


def _near(mark: Mark, shown: Sequence[Place]) -> bool:
    xs, ys = [place[0] for place in shown], [place[1] for place in shown]
    return min(xs) / REACH <= mark.x <= max(xs) * REACH and min(ys) / REACH <= mark.y <= max(ys) * REACH


def _axis_usd(front: Front, usd: float) -> float:
    return usd_per_month(usd) if front.cost == "sizing" else usd


def _finite(place: Place) -> Place | None:
    return place if all(math.isfinite(value) for value in place) else None
