"""Who wins under which prices: the same choice, made again for every sheet of every price book."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..profiler.prices import PriceSheet
from .front import Cost, Evaluation, Front, pareto
from .pick import BadPick, NothingFeasible

# Costs that are proportional to what devices cost, among the intervals of an evaluation.
_COSTS = ("usd_per_hour", "usd_per_million_tokens")

Choose = Callable[[Front], Evaluation]


@dataclass(frozen=True)
class SheetWinner:
    """What one sheet makes of a choice.

    sheet                its name: the kind of price, and the book
    as_of                date of its oldest price among the devices that it has to price, ISO; empty: it has none
    usd_per_device_hour  of those devices, by accelerator
    study, winner        None: no candidate whose devices it prices does what was asked
    cost_usd             of the winner, in the study's unit of cost
    unpriced             accelerators of candidates that the sheet does not price: these were left out
    """

    sheet: str
    as_of: str
    usd_per_device_hour: Mapping[str, float]
    study: str | None
    winner: Evaluation | None
    cost_usd: float | None
    unpriced: tuple[str, ...]


@dataclass(frozen=True)
class SheetComparison:
    """The winners by sheet, in the order of the sheets."""

    cost: Cost
    winners: tuple[SheetWinner, ...]

    @property
    def flips(self) -> bool:
        """Whether two sheets have different winners."""
        return len({_name(each.winner) for each in self.winners if each.winner is not None}) > 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, winners by study, trial and digest."""
        winners = [
            {
                "sheet": each.sheet,
                "as_of": each.as_of,
                "usd_per_device_hour": dict(each.usd_per_device_hour),
                "unpriced": list(each.unpriced),
                "study": each.study,
                "trial": None if each.winner is None else each.winner.trial,
                "digest": None if each.winner is None else each.winner.deployment.digest(),
                "usd": each.cost_usd,
            }
            for each in self.winners
        ]
        return {"flips": self.flips, "cost": self.cost, "winners": winners}


def compare(fronts: Mapping[str, Front], sheets: Sequence[PriceSheet], choose: Choose) -> SheetComparison:
    """Choose among the candidates of one study or several, once for each sheet; latencies stay, costs move.

    Args:
        fronts: by name of their study; of one cost and one latency axis.
        choose: `pick.cheapest` with targets, say.
    Raises: BadPick: studies with different axes.
    """
    axes = {(front.cost, str(front.metric), front.percentile) for front in fronts.values()}
    if len(axes) > 1:
        found = "; ".join(f"{name}: {f.cost}, {f.metric} p{f.percentile:g}" for name, f in fronts.items())
        raise BadPick("prices compare", found, "studies with one kind of cost and one latency axis", "tune them alike")
    return SheetComparison(next(iter(axes))[0], tuple(_winner(fronts, sheet, choose) for sheet in sheets))


def repriced(evaluation: Evaluation, usd_per_device_hour: Mapping[str, float]) -> Evaluation:
    """The same candidate with its devices at other prices (by accelerator; all of its accelerators are priced)."""
    pools = evaluation.deployment.pools
    usd_per_hour = sum(
        pool.replicas * pool.devices_per_replica * usd_per_device_hour[pool.accelerator] for pool in pools
    )
    ratio = usd_per_hour / evaluation.usd_per_hour
    intervals = {
        key: (low * ratio, high * ratio) if key in _COSTS else (low, high)
        for key, (low, high) in evaluation.intervals.items()
    }
    return replace(
        evaluation,
        usd_per_hour=usd_per_hour,
        usd_per_million_tokens=evaluation.usd_per_million_tokens * ratio,
        intervals=intervals,
    )


def _winner(fronts: Mapping[str, Front], sheet: PriceSheet, choose: Choose) -> SheetWinner:
    names = {p.accelerator for front in fronts.values() for each in front.evaluations for p in each.deployment.pools}
    found = {name: sheet.usd_per_device_hour(name) for name in sorted(names)}
    prices = {name: price for name, price in found.items() if price is not None}
    of_study: dict[int, str] = {}
    candidates = []
    for study, front in fronts.items():
        for each in front.evaluations:
            if all(pool.accelerator in prices for pool in each.deployment.pools):
                candidates.append(repriced(each, prices))
                of_study[id(candidates[-1])] = study
    as_of = min((sheet.as_of(name) for name in prices), default="")
    unpriced = tuple(name for name in found if name not in prices)
    nobody = SheetWinner(sheet.name, as_of, prices, None, None, None, unpriced)
    if not candidates:
        return nobody
    first = next(iter(fronts.values()))
    try:
        winner = choose(pareto(candidates, first.metric, first.percentile, first.cost))
    except NothingFeasible:
        return nobody
    return replace(nobody, study=of_study[id(winner)], winner=winner, cost_usd=winner.cost(first.cost))


def _name(evaluation: Evaluation) -> tuple[str, float]:
    return evaluation.deployment.digest(), evaluation.load
