"""The catalog and the price book: facts with a source and a date, and nothing else."""

import csv
import statistics
from datetime import date

import pytest

from paretune.profiler.hardware import DATA_FOLDER, BadHardware, PriceBook, accelerator, accelerators

HEADER = "accelerator,provider,offer,usd_per_device_hour,kind,source,as_of\n"
NEEDED = ("A100", "H100", "H200", "B200", "L40S", "L4", "A10G", "RTX PRO 6000", "MI300X", "cpu")


def test_the_catalog_has_what_people_rent() -> None:
    assert set(NEEDED) <= set(accelerators())


def test_peaks_are_those_of_the_data_sheets() -> None:
    # NVIDIA H100 SXM5 data sheet: 989.4 TFLOP/s bf16 and 1978.9 fp8, dense; 3.35 TB/s; 80 GB
    h100 = accelerator("H100")
    assert h100.flops_per_s("bf16") == pytest.approx(989.4e12, rel=1e-3)
    assert h100.flops_per_s("fp8") == pytest.approx(1978.9e12, rel=1e-3)
    assert (h100.peak_bytes_per_s, h100.memory_bytes) == (3.35e12, 80e9)


@pytest.mark.parametrize("name", [name for name in NEEDED if name != "cpu"])
def test_every_accelerator_has_a_source_a_date_and_rates_that_make_sense(name: str) -> None:
    found = accelerator(name)
    assert found.source
    assert date.fromisoformat(found.as_of) <= date.today()
    assert 1e11 < found.peak_bytes_per_s < 1e13
    assert all(1e13 < rate < 1e16 for rate in found.peak_flops_per_s.values())
    assert found.peak_flops_per_s.get("fp8", 1e16) >= found.peak_flops_per_s.get("bf16", 0)


def test_this_machine_has_no_invented_rates() -> None:
    cpu = accelerator("cpu")
    assert cpu.peak_flops_per_s == {}
    with pytest.raises(BadHardware) as raised:
        cpu.flops_per_s("bf16")
    assert "paretune profile" in raised.value.todo
    assert raised.value.exit_code == 2


def test_a_missing_rate_is_refused_not_replaced() -> None:
    with pytest.raises(BadHardware):
        accelerator("A100").flops_per_s("fp8")
    with pytest.raises(BadHardware):
        accelerator("A10G").flops_per_s("bf16")


@pytest.mark.parametrize("spelled", ["rtx-pro-6000", "RTX_PRO_6000", "rtxpro6000"])
def test_names_are_found_however_they_are_spelled(spelled: str) -> None:
    assert accelerator(spelled).name == "RTX PRO 6000"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(BadHardware) as raised:
        accelerator("H1000")
    assert "H100" in raised.value.allowed


@pytest.mark.parametrize("name", NEEDED)
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
