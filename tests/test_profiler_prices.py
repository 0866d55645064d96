"""The price book: offers, owned hardware and token prices, each with its date; no default without one."""

import csv
import statistics
from datetime import date

import pytest

from paretune.profiler.facts import DATA_FOLDER
from paretune.profiler.hardware import BadHardware
from paretune.profiler.prices import PriceBook

HEADER = "accelerator,provider,offer,usd_per_device_hour,kind,source,as_of\n"
PRICED = ("A100", "H100", "H200", "B200", "L40S", "L4", "A10G", "RTX PRO 6000", "MI300X", "cpu")


@pytest.mark.parametrize("name", PRICED)
def test_every_accelerator_has_a_price_in_the_shipped_book(name: str) -> None:
    price = PriceBook.load().usd_per_device_hour(name)
    assert 0 < price.low <= price.usd_per_hour <= price.high
    assert date.fromisoformat(price.as_of) <= date.today()


def test_the_default_price_is_the_median_of_the_on_demand_rows() -> None:
    with open(DATA_FOLDER / "prices.csv", newline="") as stream:
        rows = list(csv.DictReader(line for line in stream if not line.startswith("#")))
    h200 = [row for row in rows if row["accelerator"] == "H200" and row["kind"] == "on-demand"]
    assert len(h200) == 3
    price = PriceBook.load().usd_per_device_hour("h200")
    assert price.usd_per_hour == statistics.median(float(row["usd_per_device_hour"]) for row in h200)
    assert price.as_of == min(row["as_of"] for row in h200)


def test_spot_prices_widen_the_range_but_never_are_the_default(tmp_path) -> None:
    book = tmp_path / "prices.csv"
    book.write_text(HEADER + "H100,A,x,2,on-demand,s,2026-01-01\nH100,A,x,0.5,spot,s,2026-01-02\n")
    price = PriceBook.load(book).usd_per_device_hour("H100")
    assert (price.usd_per_hour, price.low, price.high, price.as_of) == (2, 0.5, 2, "2026-01-01")
    assert str(book) in price.source


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (HEADER + "H100,A,x,2,on-demand,s,\n", "prices.csv:2: as_of"),
        (HEADER + "H100,A,x,2,on-demand,s,last spring\n", "prices.csv:2: as_of"),
        (HEADER + "# remark\nH100,A,x,nan,on-demand,s,2026-01-01\n", "prices.csv:3: usd_per_device_hour"),
        (HEADER + "H100,A,x,-1,on-demand,s,2026-01-01\n", "prices.csv:2: usd_per_device_hour"),
        (HEADER + "H100,A,x,0,on-demand,s,2026-01-01\n", "prices.csv:2: usd_per_device_hour"),
        (HEADER + "H100,A,x,2,on-demand,s\n", "prices.csv:2"),
        (HEADER + "H100,A,x,2,on-demand,s,2026-01-01,more\n", "prices.csv:2"),
        ("accelerator,usd_per_device_hour\nH100,2\n", "prices.csv: header"),
        ("", "prices.csv: header"),
    ],
)
def test_a_price_without_a_date_or_a_number_is_refused_by_line(tmp_path, text: str, where: str) -> None:
    book = tmp_path / "prices.csv"
    book.write_text(text)
    with pytest.raises(BadHardware) as raised:
        PriceBook.load(book)
    assert raised.value.where == where


def test_a_device_that_the_book_lacks_is_refused(tmp_path) -> None:
    book = tmp_path / "prices.csv"
    book.write_text(HEADER + "H100,A,x,2,spot,s,2026-01-01\nL4,A,x,2,on-demand,s,2026-01-01\n")
    with pytest.raises(BadHardware) as raised:
        PriceBook.load(book).usd_per_device_hour("H100")
    assert raised.value.allowed == "L4"
