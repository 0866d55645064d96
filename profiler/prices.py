"""Prices: what an hour of a device costs, rented or owned, and what others take for tokens; each with its date."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from pathlib import Path

from ..traces.metrics import HOURS_PER_MONTH
from .facts import DATA_FOLDER, BadHardware, choice, day, number, positive, rows, same_name

ON_DEMAND, RESERVED, OWNED, SPOT = "on-demand", "reserved", "owned", "spot"
KINDS = (ON_DEMAND, RESERVED, OWNED, SPOT, "ownership-estimate", "rental-estimate")

# What a device costs where nobody names a kind: the first of these that the book has for it. What may be taken away at
# any time, and what is an estimate of somebody's, never is a default.
DEFAULT_KINDS = (ON_DEMAND, RESERVED, OWNED)

_OFFER = ("accelerator", "provider", "offer", "usd_per_device_hour", "kind", "source", "as_of")
_OWNED = ("purchase_usd", "years", "power_w", "pue", "usd_per_kwh", "people_usd_per_month")
_TOKENS = ("model", "provider", "usd_per_million_input", "usd_per_million_cached", "usd_per_million_output", "source",
           "as_of")  # fmt: skip


@dataclass(frozen=True)
class Owned:
    """What a device of one's own costs; each figure is of one device with its share of server, network and room.

    purchase_usd          paid once, written off evenly over `years`, without interest and with nothing left at the end
    power_w               drawn at the wall of the server, taken as drawn all the time
    pue                   power of the building over power of its servers (Green Grid's power usage effectiveness), >= 1
    people_usd_per_month  who looks after it
    """

    purchase_usd: float
    years: float
    power_w: float
    pue: float
    usd_per_kwh: float
    people_usd_per_month: float

    def usd_per_hour(self) -> float:
        """Purchase over its years, electricity, and people.

        >>> h100 = Owned(30_000, 4, 1_275, 1.3, 0.10, 50)
        >>> f"{30_000 / 35_040:.3f} + {1.275 * 1.3 * 0.10:.3f} + {50 / 730:.3f} = {h100.usd_per_hour():.3f}"
        '0.856 + 0.166 + 0.068 = 1.090'
        """
        return (
            self.purchase_usd / (self.years * 12 * HOURS_PER_MONTH)
            + self.power_w / 1000 * self.pue * self.usd_per_kwh
            + self.people_usd_per_month / HOURS_PER_MONTH
        )


@dataclass(frozen=True)
class Price:
    """What one device costs an hour.

    usd_per_hour  the median of the offers of one kind
    low, high     the least and the largest price in the file, spot and estimates included
    as_of         date of the oldest offer that the median is of (ISO)
    """

    usd_per_hour: float
    low: float
    high: float
    source: str
    as_of: str


@dataclass(frozen=True)
class Offer:
    """One price: a row of the price book. `owned`: what usd_per_device_hour is worked out from."""

    accelerator: str
    provider: str
    offer: str
    usd_per_device_hour: float
    kind: str
    source: str
    as_of: str
    owned: Owned | None = None


@dataclass(frozen=True)
class PriceSheet:
    """The offers of one kind in one book: one way to pay, by which a winner can be worked out."""

    kind: str
    book: str
    offers: tuple[Offer, ...]

    @property
    def name(self) -> str:
        return f"{self.kind} in {self.book}"

    def usd_per_device_hour(self, accelerator_name: str) -> float | None:
        """The median for a device; None: the sheet has none."""
        found = [each.usd_per_device_hour for each in self._of(accelerator_name)]
        return statistics.median(found) if found else None

    def as_of(self, accelerator_name: str) -> str:
        """Date of the oldest offer for a device."""
        return min(each.as_of for each in self._of(accelerator_name))

    def _of(self, accelerator_name: str) -> list[Offer]:
        return [each for each in self.offers if same_name(each.accelerator, accelerator_name)]


@dataclass(frozen=True)
class PriceBook:
    """Prices per device-hour; for "cpu" a device is one core."""

    offers: tuple[Offer, ...]
    source: str

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> PriceBook:
        """The book that ships with the package, or your own CSV with the same columns.

        A row of the kind "owned" leaves usd_per_device_hour empty and fills purchase_usd, years, power_w, pue,
        usd_per_kwh and people_usd_per_month (see `Owned`), columns that a book without such rows need not have.

        Raises: BadHardware: a row without a date, a price that is no positive number, a missing column; OSError.
        """
        file = DATA_FOLDER / "prices.csv" if path is None else Path(path)
        offers = tuple(_offer(where, row) for where, row in rows(file, _OFFER))
        if not offers:
            raise BadHardware(str(file), "no offers", "at least one row", "add prices")
        return cls(offers, "paretune's prices.csv" if path is None else str(file))

    def sheets(self) -> tuple[PriceSheet, ...]:
        """One for each kind of price in the book."""
        found = []
        for kind in KINDS:
            of_kind = tuple(offer for offer in self.offers if offer.kind == kind)
            if of_kind:
                found.append(PriceSheet(kind, self.source, of_kind))
        return tuple(found)

    def usd_per_device_hour(self, accelerator_name: str) -> Price:
        """The median of the offers for a device of the first of DEFAULT_KINDS that has any.

        Raises: BadHardware: none of them has.
        """
        offers = [offer for offer in self.offers if same_name(offer.accelerator, accelerator_name)]
        for kind in DEFAULT_KINDS:
            of_kind = [offer for offer in offers if offer.kind == kind]
            if of_kind:
                break
        else:
            known = ", ".join(dict.fromkeys(each.accelerator for each in self.offers if each.kind in DEFAULT_KINDS))
            where = f"{self.source}: {', '.join(DEFAULT_KINDS[:-1])} or {DEFAULT_KINDS[-1]} offers"
            raise BadHardware(where, accelerator_name, known, "add a dated row, in a file for --prices")
        prices = [offer.usd_per_device_hour for offer in offers]
        return Price(
            usd_per_hour=statistics.median(offer.usd_per_device_hour for offer in of_kind),
            low=min(prices),
            high=max(prices),
            source=f"median of {len(of_kind)} {kind} in {self.source}: "
            + "; ".join(f"{offer.provider} {offer.offer}" for offer in of_kind),
            as_of=min(offer.as_of for offer in of_kind),
        )


def _offer(where: str, row: dict[str, str]) -> Offer:
    kind = choice(where, row, "kind", KINDS)
    filled = [column for column in _OWNED if row.get(column)]
    owned = None
    if kind == OWNED:
        owned = _owned(where, row)
        if row["usd_per_device_hour"]:
            found = row["usd_per_device_hour"]
            raise BadHardware(f"{where}: usd_per_device_hour", found, "empty where kind is owned", "it is worked out")
    elif filled:
        raise BadHardware(f"{where}: {filled[0]}", row[filled[0]], f"empty where kind is {kind}", "correct the row")
    price = positive(where, row, "usd_per_device_hour") if owned is None else owned.usd_per_hour()
    accelerator, provider, offer = (row[column] for column in ("accelerator", "provider", "offer"))
    return Offer(accelerator, provider, offer, price, kind, row["source"], day(where, row), owned)


def _owned(where: str, row: dict[str, str]) -> Owned:
    missing = [column for column in _OWNED if not row.get(column)]
    if missing:
        raise BadHardware(f"{where}: {missing[0]}", "nothing", f"{', '.join(_OWNED)} where kind is owned", "fill it")
    if number(where, row, "pue") < 1:
        raise BadHardware(f"{where}: pue", row["pue"], "at least 1", "the building draws what its servers draw")
    return Owned(
        purchase_usd=number(where, row, "purchase_usd"),
        years=positive(where, row, "years"),
        power_w=positive(where, row, "power_w"),
        pue=number(where, row, "pue"),
        usd_per_kwh=number(where, row, "usd_per_kwh"),
        people_usd_per_month=number(where, row, "people_usd_per_month"),
    )


@dataclass(frozen=True)
class TokenPrice:
    """What somebody takes for a model's tokens, USD per million.

    usd_per_million_cached  of input found in the provider's cache; None: it takes the price of any other input
    """

    model: str
    provider: str
    usd_per_million_input: float
    usd_per_million_cached: float | None
    usd_per_million_output: float
    source: str
    as_of: str

    def usd(self, input_tokens: float, cached_tokens: float, output_tokens: float) -> float:
        """For so many tokens; cached_tokens are among input_tokens."""
        cached = self.usd_per_million_input if self.usd_per_million_cached is None else self.usd_per_million_cached
        fresh = (input_tokens - cached_tokens) * self.usd_per_million_input
        return (fresh + cached_tokens * cached + output_tokens * self.usd_per_million_output) / 1e6


@dataclass(frozen=True)
class TokenPrices:
    """Published prices of tokens."""

    prices: tuple[TokenPrice, ...]
    source: str

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> TokenPrices:
        """The list that ships with the package, or your own CSV with the same columns. Raises: BadHardware; OSError."""
        file = DATA_FOLDER / "token_prices.csv" if path is None else Path(path)
        found = []
        for where, row in rows(file, _TOKENS):
            price, output = number(where, row, "usd_per_million_input"), number(where, row, "usd_per_million_output")
            cached = number(where, row, "usd_per_million_cached") if row["usd_per_million_cached"] else None
            found.append(
                TokenPrice(row["model"], row["provider"], price, cached, output, row["source"], day(where, row))
            )
        if not found:
            raise BadHardware(str(file), "no prices", "at least one row", "add prices")
        return cls(tuple(found), "paretune's token_prices.csv" if path is None else str(file))

    def of(self, model: str) -> tuple[TokenPrice, ...]:
        """The prices for a model, by the last part of its name or path; none where the list does not have it."""
        return tuple(each for each in self.prices if same_name(_last(each.model), _last(model)))


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]
