"""`paretune prices`, and what tune, pick and simulate say of prices, energy and tokens."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cli_examples import in_folder, paretune, tuned_folder

OWNED = (
    "accelerator,provider,offer,usd_per_device_hour,kind,source,as_of,"
    "purchase_usd,years,power_w,pue,usd_per_kwh,people_usd_per_month\n"
    "H100,us,our rack,,owned,invoice,2026-11-01,35040,4,1000,1.5,0.1,73\n"
)
TOKENS = (
    "model,provider,usd_per_million_input,usd_per_million_cached,usd_per_million_output,source,as_of\n"
    "ours,giveaway,0,0,0.000001,s,2026-01-01\nours,dear,100,,100,s,2026-01-01\n"
)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned_folder(tmp_path_factory.mktemp("tuned"))


@pytest.fixture
def here(tuned: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(tuned, tmp_path / "copy")
    with in_folder(tmp_path / "copy") as folder:
        (folder / "owned.csv").write_text(OWNED)
        (folder / "tokens.csv").write_text(TOKENS)
        yield folder


def test_pick_prints_the_winner_by_sheet_the_energy_and_token_prices(here: Path) -> None:
    arguments = ("pick", "--compare-prices", "owned.csv", "--token-prices", "tokens.csv", "--token-model", "ours")
    shown = paretune(*arguments).stdout
    assert "price sheets: the same candidate wins under each of 5 that price its devices" in shown
    assert "owned in owned.csv, as of 2026-11-01 (H100 $1.25 an hour)" in shown
    assert "energy, inferred: " in shown
    assert "giveaway: " in shown
    assert "below our modeled cost, so possibly subsidized" in shown
    data = paretune(*arguments, "--json").json["data"]
    assert data["price_sheets"]["flips"] is False
    winners = {each["sheet"]: each for each in data["price_sheets"]["winners"]}
    rented = winners["on-demand in paretune's prices.csv"]
    owned = winners["owned in owned.csv"]
    # one candidate, so that costs are as the prices of its device
    ratio = owned["usd_per_device_hour"]["H100"] / rented["usd_per_device_hour"]["H100"]
    assert owned["usd"] / rented["usd"] == pytest.approx(ratio)
    assert owned["digest"] == rented["digest"]
    assert data["energy"]["inferred"] is True
    assert 0 < data["energy"]["utilization"] <= 1
    assert [each["possibly_subsidized"] for each in data["token_prices"]] == [True, False]


def test_a_model_without_token_prices_is_said_to_have_none(here: Path) -> None:
    assert "token prices: not compared, paretune's token_prices.csv has none of" in paretune("pick").stdout


def test_simulate_says_what_the_run_costs(here: Path) -> None:
    done = paretune("simulate", "log.csv", "--spec", "out/spec.yaml", "--prices", "owned.csv", "--json")
    cost = done.json["data"]["cost"]
    summary = done.json["data"]["summary"]
    assert cost["usd_per_hour"] % 1.25 == pytest.approx(0.0)
    per_million = cost["usd_per_hour"] / 3600 / summary["output_tokens_per_s"] * 1e6
    assert cost["usd_per_million_tokens"] == pytest.approx(per_million)
    assert cost["price"]["as_of"] == "2026-11-01"
    assert cost["energy"]["power_w"] == 700


def test_simulate_runs_without_a_price_and_says_so(here: Path) -> None:
    (here / "other.csv").write_text(OWNED.replace("H100", "L4"))
    shown = paretune("simulate", "log.csv", "--spec", "out/spec.yaml", "--prices", "other.csv")
    assert shown.exit_code == 0
    assert "not priced: other.csv" in shown.stdout


def test_compare_asks_again_under_every_sheet(here: Path) -> None:
    data = paretune("prices", "compare", "default", "--compare-prices", "owned.csv", "--json").json["data"]
    kinds = ["on-demand", "spot", "ownership-estimate", "rental-estimate", "owned"]
    assert [each["sheet"].split()[0] for each in data["winners"]] == kinds
    assert all(each["study"] == "default" and each["as_of"] for each in data["winners"])


def test_show_lists_offers_with_their_dates(here: Path) -> None:
    offers = paretune("prices", "show", "--accelerator", "h100", "--json").json["data"]
    assert {each["offer"]["accelerator"] for each in offers} == {"H100"}
    assert all(each["offer"]["as_of"] for each in offers)
    shown = paretune("prices", "show", "--prices", "owned.csv").stdout.splitlines()
    assert shown[1].split() == ["H100", "1.25", "owned", "2026-11-01", "us", "our", "rack"]


def test_accelerators_are_listed_and_one_is_shown_with_its_sources(here: Path) -> None:
    assert "GB200" in paretune("prices", "accelerators").stdout
    shown = paretune("prices", "accelerators", "gaudi-2").stdout
    assert "bf16_tflops: stas00/ml-engineering" in shown
    assert "Ethernet 3 x 100 Gb/s: 37.5 GB/s" in shown


def test_token_prices_are_listed(here: Path) -> None:
    found = paretune("prices", "tokens", "--model", "gpt-oss-20b", "--json").json["data"]
    assert {each["provider"] for each in found} >= {"DeepInfra", "Groq"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("prices", "show", "--prices", "log.csv"),
        ("prices", "show", "--accelerator", "H1000"),
        ("prices", "compare", "no such study"),
        ("prices", "compare", "default", "--slo", "ttft:p95<=1s", "--budget", "3"),
        ("pick", "--compare-prices", "tokens.csv"),
    ],
)
def test_what_cannot_be_read_is_refused(here: Path, arguments: tuple[str, ...]) -> None:
    assert paretune(*arguments).exit_code == 2
