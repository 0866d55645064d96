"""The bill of a choice in plain sentences, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Callable

from ..optimizer.bill import Bill, Energy, RunCost, TokenComparison
from ..optimizer.front import Evaluation
from ..optimizer.price_sheets import SheetComparison, SheetWinner
from .words import dollars, percent

Name = Callable[[Evaluation], str]


def bill_words(bill: Bill, name: Name) -> tuple[str, ...]:
    """Price sheets, energy and token prices, one sentence each. `name`: of a candidate, in words."""
    return (*sheet_words(bill.sheets, name), *_energy_words(bill), *_token_words(bill))


def sheet_words(found: SheetComparison, name: Name) -> tuple[str, ...]:
    """Whether the winner is the same under every price sheet; nothing where there is one sheet only."""
    if len(found.winners) < 2:
        return ()
    won = [each for each in found.winners if each.winner is not None]
    if not won:
        return ("price sheets: no candidate does what was asked under any of them",)
    if found.flips:
        head = "PRICE SHEETS DISAGREE on the winner: choose the sheet that you pay by"
    else:
        head = f"price sheets: the same candidate wins under each of {len(won)} that price its devices"
    return (head, *(_winner_words(each, found, name) for each in found.winners))


def _winner_words(each: SheetWinner, found: SheetComparison, name: Name) -> str:
    prices = ", ".join(f"{device} {dollars(usd)}" for device, usd in each.usd_per_device_hour.items())
    missing = f"; no price for {', '.join(each.unpriced)}" if each.unpriced else ""
    if not prices:
        return f"  {each.sheet}{missing}"
    head = f"  {each.sheet}, as of {each.as_of} ({prices} an hour{missing})"
    if each.winner is None or each.cost_usd is None:
        return f"{head}: nothing does what was asked"
    unit = "per million tokens" if found.cost == "capacity" else "an hour"
    who = f", study {each.study}, trial {each.winner.trial}: {name(each.winner)}" if found.flips else ""
    return f"{head}: {dollars(each.cost_usd)} {unit}{who}"


def run_words(found: RunCost) -> tuple[str, ...]:
    """What one simulated run costs, one sentence each."""
    words = [f"the devices compute {percent(found.utilization)} of the time"]
    if found.price is None or found.usd_per_hour is None or found.usd_per_million_tokens is None:
        words.append(f"not priced: {found.unpriced}")
    else:
        words.append(
            f"{dollars(found.usd_per_hour)} an hour, {dollars(found.usd_per_million_tokens)} per million output tokens "
            f"at this load; prices: {found.price.source}, as of {found.price.as_of}"
        )
    if found.energy is not None:
        words.append(_inferred(found.energy))
    return tuple(words)


def _energy_words(bill: Bill) -> tuple[str, ...]:
    return (f"energy: not inferred, {bill.not_inferred}" if bill.energy is None else _inferred(bill.energy),)


def _inferred(found: Energy) -> str:
    return (
        f"energy, inferred: {found.joules_per_token:.3g} J an output token ({found.kwh_per_million_tokens:.3g} kWh a "
        f"million), at {percent(found.utilization)} modeled utilization of devices of at most {found.power_w:g} W "
        f"({found.source}, {found.as_of}); without idle draw, hosts and the building"
    )


def _token_words(bill: Bill) -> tuple[str, ...]:
    if not bill.tokens:
        return (f"token prices: not compared, {bill.not_compared}",)
    first = bill.tokens[0]
    ours = f"{dollars(first.ours_usd)} ({dollars(first.ours_low)} to {dollars(first.ours_high)}), modeled"
    head = (
        "token prices for this traffic, per million output tokens with the input that they come with "
        f"({percent(first.cached_share)} of it cached); ours: {ours}"
    )
    return (head, *(_comparison_words(each) for each in bill.tokens))


def _comparison_words(each: TokenComparison) -> str:
    text = f"  {each.price.provider}: {dollars(each.usd_per_million_tokens)}, as of {each.price.as_of}"
    if not each.possibly_subsidized:
        return text
    error = ", though within the model's error" if each.within_interval else ""
    return f"{text}: below our modeled cost, so possibly subsidized{error}"
