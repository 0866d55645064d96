"""The price book: offers, owned hardware and token prices, each with its date; no default without one."""

import csv
import statistics
from datetime import date

import pytest

from paretune.profiler.facts import DATA_FOLDER
from paretune.profiler.hardware import BadHardware
from paretune.profiler.prices import PriceBook, TokenPrice, TokenPrices

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


OWNED = HEADER.strip() + ",purchase_usd,years,power_w,pue,usd_per_kwh,people_usd_per_month\n"


def owned_row(**changes: str) -> str:
    row = {
        "accelerator": "H100",
        "provider": "us",
        "offer": "rack",
        "usd_per_device_hour": "",
        "kind": "owned",
        "source": "invoice",
        "as_of": "2026-11-01",
        "purchase_usd": "35040",
        "years": "4",
        "power_w": "1000",
        "pue": "1.5",
        "usd_per_kwh": "0.1",
        "people_usd_per_month": "73",
        **changes,
    }
    return OWNED + ",".join(row[column] for column in OWNED.strip().split(",")) + "\n"


def test_owned_hardware_costs_its_purchase_over_its_hours_its_power_and_its_people(tmp_path) -> None:
    book = tmp_path / "prices.csv"
    book.write_text(owned_row())
    # 35040 USD over 4 x 8760 hours, 1 kW x 1.5 x 0.1 USD, 73 USD over 730 hours
    price = PriceBook.load(book).usd_per_device_hour("H100")
    assert price.usd_per_hour == pytest.approx(1.0 + 0.15 + 0.1)
    assert price.as_of == "2026-11-01"
    assert "1 owned" in price.source


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"as_of": ""}, "prices.csv:2: as_of"),
        ({"years": "0"}, "prices.csv:2: years"),
        ({"pue": "0.9"}, "prices.csv:2: pue"),
        ({"power_w": ""}, "prices.csv:2: power_w"),
        ({"usd_per_device_hour": "2"}, "prices.csv:2: usd_per_device_hour"),
        ({"kind": "spot", "usd_per_device_hour": "2"}, "prices.csv:2: purchase_usd"),
        ({"kind": "borrowed"}, "prices.csv:2: kind"),
    ],
)
def test_an_owned_row_that_is_not_whole_is_refused_by_column(tmp_path, changes: dict[str, str], where: str) -> None:
    book = tmp_path / "prices.csv"
    book.write_text(owned_row(**changes))
    with pytest.raises(BadHardware) as raised:
        PriceBook.load(book)
    assert raised.value.where == where


def test_a_book_has_a_sheet_for_each_kind_and_a_rented_price_goes_before_an_owned_one(tmp_path) -> None:
    book = tmp_path / "prices.csv"
    rented = "H100,A,x,2,on-demand,s,2026-01-01,,,,,,\nH100,A,x,1,spot,s,2026-01-02,,,,,,\n"
    book.write_text(owned_row() + rented)
    found = PriceBook.load(book)
    assert [sheet.kind for sheet in found.sheets()] == ["on-demand", "owned", "spot"]
    assert [sheet.usd_per_device_hour("h-100") for sheet in found.sheets()] == pytest.approx([2.0, 1.25, 1.0])
    assert found.usd_per_device_hour("H100").usd_per_hour == 2.0
    assert found.sheets()[2].usd_per_device_hour("A100") is None


def test_an_estimate_of_somebodys_is_never_a_default() -> None:
    with pytest.raises(BadHardware) as raised:
        PriceBook.load().usd_per_device_hour("GB200")
    assert "H100" in raised.value.allowed
    sheets = {sheet.kind: sheet for sheet in PriceBook.load().sheets()}
    assert sheets["ownership-estimate"].usd_per_device_hour("GB200") == 2.21
    assert sheets["rental-estimate"].usd_per_device_hour("GB200") == 3.30


def test_tokens_cost_by_input_cached_input_and_output() -> None:
    price = TokenPrice("m", "p", 1.0, 0.1, 4.0, "s", "2026-01-01")
    assert price.usd(3e6, 1e6, 1e6) == pytest.approx(2 * 1.0 + 0.1 + 4.0)
    # without a price of their own, cached tokens cost what others cost
    assert TokenPrice("m", "p", 1.0, None, 4.0, "s", "2026-01-01").usd(3e6, 1e6, 1e6) == pytest.approx(7.0)


def test_the_token_prices_that_ship_are_dated_and_found_by_the_last_part_of_a_name() -> None:
    prices = TokenPrices.load()
    assert all(date.fromisoformat(each.as_of) <= date.today() and each.source for each in prices.prices)
    assert all(0 < each.usd_per_million_input <= each.usd_per_million_output for each in prices.prices)
    assert {each.provider for each in prices.of("/models/Llama-3.1-8B-Instruct/")} == {
        "DeepInfra",
        "Together AI (Turbo)",
    }
    assert prices.of("no such model") == ()


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ("m,p,1,,2,s,", "tokens.csv:2: as_of"),
        ("m,p,-1,,2,s,2026-01-01", "tokens.csv:2: usd_per_million_input"),
        ("m,p,1,x,2,s,2026-01-01", "tokens.csv:2: usd_per_million_cached"),
    ],
)
def test_a_token_price_without_a_date_or_a_number_is_refused(tmp_path, row: str, where: str) -> None:
    header = "model,provider,usd_per_million_input,usd_per_million_cached,usd_per_million_output,source,as_of\n"
    (tmp_path / "tokens.csv").write_text(header + row + "\n")
    with pytest.raises(BadHardware) as raised:
        TokenPrices.load(tmp_path / "tokens.csv")
    assert raised.value.where == where
