"""`paretune prices ...`: the facts that costs and estimates rest on, each with its date."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..output import Speaker, speaks, table
from .numbers import POSITIVE
from .source_options import EXISTING
from .studies import compare_prices_option, deployment_words, dollars, storage_option

if TYPE_CHECKING:
    from ..profiler.hardware import Accelerator, Link

books_option = click.option("--prices", "books", multiple=True, type=EXISTING, help="Your price book (CSV), not ours.")


@click.group()
def prices() -> None:
    """What devices cost and can do, each figure with its date; and who wins under which prices."""


@prices.command("show")
@click.option("--accelerator", "names", multiple=True, help="Only this one.")
@books_option
@speaks
def prices_show(speaker: Speaker, names: tuple[str, ...], books: tuple[str, ...]) -> None:
    """Show what an hour of each device costs, offer by offer, with dates and sources.

    \b
    Example: paretune prices show --accelerator H100
    """
    from ..profiler.facts import same_name
    from ..profiler.hardware import accelerator
    from ..profiler.prices import PriceBook

    wanted = [accelerator(name).name for name in names]  # an unknown name is an error, not an empty table
    offers = [
        (book.source, offer)
        for book in [PriceBook.load(path) for path in books or (None,)]
        for offer in book.offers
        if not wanted or any(same_name(offer.accelerator, name) for name in wanted)
    ]
    rows = [
        [
            each.accelerator,
            dollars(each.usd_per_device_hour),
            each.kind,
            each.as_of,
            f"{each.provider} {each.offer}",
        ]
        for _, each in offers
    ]
    data = [{"book": source, "offer": offer} for source, offer in offers]
    speaker.result(data, table(["device", "$/hour", "kind", "as of", "offer"], rows))


@prices.command("compare")
@click.argument("studies", nargs=-1, required=True)
@storage_option
@click.option("--slo", "slos", multiple=True, help="What must hold; default: the targets of the first study.")
@click.option("--budget", type=POSITIVE, help="Instead: the fastest within so many dollars.")
@compare_prices_option
@speaks
def prices_compare(
    speaker: Speaker,
    studies: tuple[str, ...],
    storage: str,
    slos: tuple[str, ...],
    budget: float | None,
    compare_prices: tuple[str, ...],
) -> None:
    """Ask who wins among the candidates of one study or several, once for every price sheet.

    Studies of several accelerators: the winner may flip with the prices of their devices, and is then said to.

    \b
    Example: paretune prices compare default --budget 100
    """
    from ..optimizer.bill import compared_studies
    from ..reports.bill import sheet_words

    if slos and budget is not None:
        raise click.UsageError("--slo, --budget: these are several ways to choose; give one")
    found = compared_studies(studies, storage, slos=slos, budget_usd=budget, compare_prices=compare_prices)
    speaker.result(found.to_dict(), "\n".join(sheet_words(found, deployment_words)))


@prices.command("tokens")
@click.option("--model", help="Only this model.")
@click.option("--token-prices", "path", type=EXISTING, help="Your token prices (CSV) in place of ours.")
@speaks
def prices_tokens(speaker: Speaker, model: str | None, path: str | None) -> None:
    """Show what others ask for tokens, USD per million, with dates and sources.

    \b
    Example: paretune prices tokens --model Llama-3.3-70B-Instruct
    """
    from ..profiler.prices import TokenPrices

    known = TokenPrices.load(path)
    found = known.prices if model is None else known.of(model)
    rows = [
        [
            each.model,
            dollars(each.usd_per_million_input),
            "-" if each.usd_per_million_cached is None else dollars(each.usd_per_million_cached),
            dollars(each.usd_per_million_output),
            each.as_of,
            each.provider,
        ]
        for each in found
    ]
    speaker.result(found, table(["model", "input", "cached", "output", "as of", "provider"], rows))


@prices.command("accelerators")
@click.argument("name", required=False)
@speaks
def prices_accelerators(speaker: Speaker, name: str | None) -> None:
    """List the accelerators of the catalog, or show one with the source and date of each figure.

    \b
    Example: paretune prices accelerators H100
    """
    from ..profiler.hardware import accelerator, accelerators

    if name is not None:
        found = accelerator(name)
        facts = [[figure, source, as_of] for figure, (source, as_of) in found.sources.items()]
        levels = [*found.levels, *([found.host_link] if found.host_link else [])]
        links = [[_link_words(each), each.source, each.as_of] for each in levels]
        text = "\n".join([_table([_row(found)]), *(f"  {a}: {b}, {c}" for a, b, c in [*facts, *links])])
        speaker.result(found, text)
        return
    known = list(accelerators().values())
    speaker.result(known, _table([_row(each) for each in known]))


_RATES = ("fp32", "bf16", "fp8", "int8", "fp4")


def _row(device: Accelerator) -> list[str]:
    """Rates in 10^12 a second; a dash where no source gives one."""
    rates = [device.peak_flops_per_s.get(precision) for precision in _RATES]
    return [
        device.name,
        *("-" if rate is None else f"{rate / 1e12:,.{0 if rate >= 1e15 else 1}f}" for rate in rates),
        f"{device.memory_bytes / 1e9:,.4g}",
        f"{device.peak_bytes_per_s / 1e12:,.4g}" if device.peak_bytes_per_s else "-",
        "-" if device.power_w is None else f"{device.power_w:g}",
        ", ".join(_link_words(link) for link in device.levels) or "-",
    ]


def _table(rows: list[list[str]]) -> str:
    return table(["accelerator", *_RATES, "GB", "TB/s", "W", "links"], rows)


def _link_words(link: Link) -> str:
    size = "" if link.devices is None else f" of {link.devices}"
    return f"{link.name}{size}: {link.bytes_per_s / 1e9:g} GB/s"


COMMANDS = (prices,)
