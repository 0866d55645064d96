"""Accelerators and what an hour of them costs: facts from files, each row with its source and date."""

from __future__ import annotations

import csv
import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import ClassVar

from ..runtime.spec import CPU, Deployment

DATA_FOLDER = Path(__file__).absolute().parent / "data"
ON_DEMAND = "on-demand"


class BadHardware(Exception):
    """An accelerator we know too little of, or a catalog or price file that will not be used."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:80]}; allowed: {self.allowed}; {self.todo}"


@dataclass(frozen=True)
class Accelerator:
    """One device, as its data sheet has it; dense rates, without structured sparsity.

    peak_flops_per_s   by precision of the arithmetic ("fp32", "bf16", "fp8", "int8"); only what a source gives
    peak_bytes_per_s   device memory; 0 for "cpu", whose rates are measured into a profile and stand in no catalog
    memory_bytes       device memory; for "cpu" the memory of this machine
    link_bytes_per_s   to the other devices of its node, one direction; 0 for "cpu"
    link_latency_s     of one message between two devices
    power_w            at most, or None
    """

    name: str
    peak_flops_per_s: dict[str, float]
    peak_bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    link_latency_s: float
    power_w: float | None
    source: str
    as_of: str

    def __hash__(self) -> int:
        return hash((self.name, self.as_of))

    def flops_per_s(self, precision: str) -> float:
        """Peak rate of arithmetic in `precision`. Raises: BadHardware: no source gives one; none takes its place."""
        rate = self.peak_flops_per_s.get(precision)
        if rate is None:
            known = ", ".join(self.peak_flops_per_s) or "none: no source gives one for this accelerator"
            todo = "run `paretune profile`" if self.name == CPU else f"choose another precision, or of {_with_rates()}"
            raise BadHardware(f"{self.name}: peak rate", precision, known, todo)
        return rate


@dataclass(frozen=True)
class Price:
    """What one device costs an hour.

    usd_per_hour  the median of the on-demand offers in the file
    low, high     the least and the largest price in the file, spot included
    as_of         date of the oldest offer that the median is of (ISO)
    """

    usd_per_hour: float
    low: float
    high: float
    source: str
    as_of: str


@dataclass(frozen=True)
class Offer:
    """One published price: a row of the price book."""

    accelerator: str
    provider: str
    offer: str
    usd_per_device_hour: float
    kind: str
    source: str
    as_of: str


@dataclass(frozen=True)
class PriceBook:
    """Published prices per device-hour; for "cpu" a device is one core."""

    offers: tuple[Offer, ...]
    source: str

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> PriceBook:
        """The book that ships with the package, or your own CSV with the same columns.

        Raises: BadHardware: a row without a date, a price that is no positive number, a missing column; OSError.
        """
        file = DATA_FOLDER / "prices.csv" if path is None else Path(path)
        columns = ("accelerator", "provider", "offer", "usd_per_device_hour", "kind", "source", "as_of")
        offers = []
        for where, row in _rows(file, columns):
            price = _number(where, row, "usd_per_device_hour")
            if price <= 0:
                raise BadHardware(f"{where}: usd_per_device_hour", price, "more than 0", "correct the row")
            accelerator, provider, offer = (row[column] for column in ("accelerator", "provider", "offer"))
            day = _day(where, row["as_of"])
            offers.append(Offer(accelerator, provider, offer, price, row["kind"], row["source"], day))
        if not offers:
            raise BadHardware(str(file), "no offers", "at least one row", "add prices")
        return cls(tuple(offers), "paretune's prices.csv" if path is None else str(file))

    def usd_per_device_hour(self, accelerator_name: str) -> Price:
        """The median of the on-demand offers for a device. Raises: BadHardware: the book has none."""
        rows = [offer for offer in self.offers if _same(offer.accelerator, accelerator_name)]
        on_demand = [offer for offer in rows if offer.kind == ON_DEMAND]
        if not on_demand:
            known = ", ".join(dict.fromkeys(offer.accelerator for offer in self.offers if offer.kind == ON_DEMAND))
            raise BadHardware(f"{self.source}: {ON_DEMAND} offers", accelerator_name, known, "add a dated row")
        prices = [offer.usd_per_device_hour for offer in rows]
        return Price(
            usd_per_hour=statistics.median(offer.usd_per_device_hour for offer in on_demand),
            low=min(prices),
            high=max(prices),
            source=f"median of {len(on_demand)} on-demand in {self.source}: "
            + "; ".join(f"{offer.provider} {offer.offer}" for offer in on_demand),
            as_of=min(offer.as_of for offer in on_demand),
        )


@cache
def accelerators() -> dict[str, Accelerator]:
    """The catalog by name, and "cpu": this machine."""
    columns = ("name", "memory_gb", "memory_gbps", "link_gbps", "link_latency_us", "power_w", "source", "as_of")
    known = {CPU: _this_machine()}
    for where, row in _rows(DATA_FOLDER / "accelerators.csv", columns):
        rates = {"fp32": "fp32_tflops", "bf16": "bf16_tflops", "fp8": "fp8_tflops", "int8": "int8_tops"}
        known[row["name"]] = Accelerator(
            name=row["name"],
            peak_flops_per_s={p: 1e12 * _number(where, row, column) for p, column in rates.items() if row[column]},
            peak_bytes_per_s=1e9 * _number(where, row, "memory_gbps"),
            memory_bytes=1e9 * _number(where, row, "memory_gb"),
            link_bytes_per_s=1e9 * _number(where, row, "link_gbps"),
            link_latency_s=1e-6 * _number(where, row, "link_latency_us"),
            power_w=_number(where, row, "power_w") if row["power_w"] else None,
            source=row["source"],
            as_of=_day(where, row["as_of"]),
        )
    return known


def accelerator(name: str) -> Accelerator:
    """One accelerator; upper and lower case, blanks, hyphens and underscores do not matter. Raises: BadHardware."""
    for known in accelerators().values():
        if _same(known.name, name):
            return known
    raise BadHardware("accelerator", name, f"{CPU}, {_with_rates()}", "correct the name")


def _with_rates() -> str:
    """The accelerators that step times can be estimated for."""
    return ", ".join(name for name, known in accelerators().items() if known.peak_flops_per_s)


def as_cataloged(deployment: Deployment) -> Deployment:
    """The deployment with each accelerator called as the catalog calls it. Raises: BadHardware: it knows none such."""
    pools = (pool.model_copy(update={"accelerator": accelerator(pool.accelerator).name}) for pool in deployment.pools)
    return deployment.model_copy(update={"pools": tuple(pools)})


def _this_machine() -> Accelerator:
    memory = float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")
    return Accelerator(
        CPU,
        {},
        0.0,
        memory,
        0.0,
        0.0,
        None,
        "this machine; rates are measured into a profile",
        date.today().isoformat(),
    )


def _same(left: str, right: str) -> bool:
    def key(name: str) -> str:
        return "".join(letter for letter in name.casefold() if letter not in " -_")

    return key(left) == key(right)


def _rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a CSV with where each stands; lines that begin with # are remarks."""
    with open(file, encoding="utf-8", newline="") as stream:
        lines = [(number, line) for number, line in enumerate(stream, start=1) if line.strip() and line[0] != "#"]
    reader = csv.DictReader(line for _, line in lines)
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise BadHardware(f"{file.name}: header", reader.fieldnames, ", ".join(columns), "add the missing columns")
    for (number, _), row in zip(lines[1:], reader):
        where = f"{file.name}:{number}"
        if None in row or None in row.values():
            raise BadHardware(
                where, "another number of fields than the header", "one field a column", "correct the row"
            )
        yield where, row


def _number(where: str, row: dict[str, str], column: str) -> float:
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise BadHardware(f"{where}: {column}", row[column], "a number >= 0", "correct the row")
    return value


def _day(where: str, text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise BadHardware(f"{where}: as_of", text, "a date such as 2026-02-26", "say when the source gave it") from None
