"""`simulate` and `replay` with requests that wait for others, and `simulate --autoscale`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from paretune.runtime.spec import Deployment, Pool, save_deployment

from .cli_examples import Ended, in_folder, paretune, write_inputs
from .test_replay import fake, steady

SIMULATE = ("simulate", "log.csv", "--spec", "spec.yaml")
TURNS = ("simulate", "turns.jsonl", "--spec", "spec.yaml")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """100 requests of the sample, sessions with and without delays, and a spec of two H100s."""
    folder = tmp_path_factory.mktemp("arrivals")
    write_inputs(folder, 100)
    pool = Pool(
        accelerator="H100", max_num_seqs=6, max_num_batched_tokens=512, max_model_len=8192, num_kv_blocks=2000,
        replicas=2, router="least_outstanding_tokens",
    )  # fmt: skip
    turns = [
        {"timestamp": 100 * i, "session_id": str(i % 3), "input_length": 50 + i, "output_length": 20, "delay": 500}
        for i in range(12)
    ]
    plain = [{name: value for name, value in turn.items() if name != "delay"} for turn in turns]
    with in_folder(folder):
        save_deployment(Deployment(model="model", pools=(pool,)), "spec.yaml")
        for name, rows in (("turns", turns), ("plain", plain)):
            Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield folder


def data(ended: Ended) -> dict[str, object]:
    assert ended.exit_code == 0, ended.stderr
    found: dict[str, object] = ended.json["data"]
    return found


def test_each_way_to_send_is_named_in_the_result(here: Path) -> None:
    for options, words in (
        ((), "open loop: every request at its recorded arrival"),
        (("--clients", "4", "--think-time", "2"), "closed loop: 4 clients, 2 s from an end"),
        (("--max-concurrency", "3"), "at most 3 requests open at once"),
    ):
        assert words in paretune(*SIMULATE, *options).stdout
        assert any(words in each for each in data(paretune(*SIMULATE, *options, "--json"))["arrivals"])
    shown = paretune(*TURNS, "--sessions", "--rate", "2")
    assert "9 of 12 requests wait for the turn before them; 3 begin at their recorded arrivals" in shown.stdout
    assert "pauses stay as they are" in shown.stdout


def test_a_slower_client_is_served_later(here: Path) -> None:
    ends = [
        data(paretune(*TURNS, "--sessions", "--pause", pause, "--json"))["summary"]["duration_s"]  # type: ignore[index]
        for pause in ("1", "10")
    ]
    assert ends[1] == pytest.approx(ends[0] + 3 * 9, rel=0.01)  # four turns each, three pauses


def test_pauses_that_nobody_knows_are_refused_by_name(here: Path) -> None:
    refused = paretune("simulate", "plain.jsonl", "--spec", "spec.yaml", "--sessions")
    assert refused.exit_code == 2
    assert "pauses between turns" in refused.stderr
    assert "--recorded-ttft" in refused.stderr
    assumed = ("--recorded-ttft", "0.1", "--recorded-tpot", "0.005")
    shown = paretune("simulate", "plain.jsonl", "--spec", "spec.yaml", "--sessions", *assumed)
    assert "assumed for 9 of 9" in shown.stdout
    none = paretune(*SIMULATE, "--sessions")
    assert none.exit_code == 2
    assert "log.csv: session" in none.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--pause", "1"), "--sessions"),
        (("--think-time", "1"), "--clients"),
        (("--sessions", "--recorded-ttft", "1"), "--recorded-tpot"),
        (("--clients", "2", "--max-concurrency", "2"), "--max-concurrency"),
        (("--clients", "2", "--rate", "2"), "--rate"),
        (("--clients", "2", "--survive", "1", "--slo", "ttft:p95<=1s"), "--survive"),
        (("--clients", "0"), "--clients"),
        (("--cold-start", "5"), "--autoscale"),
        (("--autoscale", "4"), "--autoscale"),
        (("--autoscale", "1:4"), "--cold-start"),
        (("--autoscale", "0:4", "--cold-start", "5"), "min_replicas"),
        (("--autoscale", "4:1", "--cold-start", "5"), "max_replicas"),
        (("--autoscale", "1:4", "--cold-start", "5", "--load-rate", "1"), "--load-rate"),
        (("--autoscale", "1:4", "--cold-start", "5", "--autoscale-metric", "outstanding_tokens"), "target"),
        (("--autoscale", "1:4", "--cold-start", "5", "--head-room", "--slo", "ttft:p95<=1s"), "--head-room"),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(
    here: Path, options: tuple[str, ...], named: str
) -> None:
    refused = paretune(*SIMULATE, *options)
    assert refused.exit_code == 2
    assert named in refused.stderr


@pytest.mark.parametrize(
    ("options", "begins", "silent_of"),
    [
        (("--pause", "1"), "--pause: ", "--recorded"),
        (("--recorded-tpot", "1"), "--recorded-tpot: ", "--pause"),
        (("--sessions", "--recorded-ttft", "1"), "--recorded-ttft: ", "--pause"),
        (("--autoscale", "1:4"), "--autoscale: ", "--start-time"),
    ],
)
def test_an_error_begins_with_the_option_that_was_typed(
    here: Path, options: tuple[str, ...], begins: str, silent_of: str
) -> None:
    said = paretune(*SIMULATE, *options).stderr
    assert f"\nError: {begins}" in said
    assert silent_of not in said


def test_a_recorded_servers_speed_that_no_pause_needs_is_said_not_to_be_used(here: Path) -> None:
    assumed = ("--recorded-ttft", "0.1", "--recorded-tpot", "0.005")
    words = "the recorded server's TTFT and TPOT are not used"
    assert words in paretune(*TURNS, "--sessions", *assumed).stdout
    assert words not in paretune("simulate", "plain.jsonl", "--spec", "spec.yaml", "--sessions", *assumed).stdout


def test_an_autoscaled_fleet_is_put_beside_the_fixed_one(here: Path) -> None:
    options = ("--autoscale", "1:4", "--autoscale-target", "2", "--cold-start", "5", "--sync-period", "5")
    found = data(paretune(*SIMULATE, *options, "--json"))
    elastic = found["elastic"]
    assert isinstance(elastic, dict)
    assert elastic["elastic"]["replica_hours"] < elastic["fixed"]["replica_hours"]
    for run in ("elastic", "fixed"):
        hours, usd = elastic[run]["replica_hours"], elastic[run]["usd"]
        assert usd == pytest.approx(hours * elastic["price"]["usd_per_hour"])
        assert elastic[run]["summary"]["finished"] == 100
    assert max(ready for _, _, ready in elastic["over_time"]) > 1
    assert elastic["cold_start_inferred"] is False
    assert found["autoscaler"]["target"] == 2.0  # type: ignore[index]
    shown = paretune(*SIMULATE, *options).stdout
    for words in ("autoscaling: 1 to 4 replicas", "replica-hours", "replicas over time", "not modeled: autoscaling"):
        assert words in shown


def test_a_cold_start_may_be_inferred_from_the_weights_and_is_labeled(here: Path) -> None:
    found = data(paretune(*SIMULATE, "--autoscale", "1:2", "--load-rate", "1", "--start-time", "7", "--json"))
    elastic = found["elastic"]
    assert isinstance(elastic, dict)
    # Llama 3 8B in bf16: 8,030,261,248 parameters (its model card says 8B), two bytes each, at 1 GB/s
    assert elastic["cold_start_s"] == pytest.approx(7 + 2 * 8.030261248, rel=1e-3)
    assert elastic["cold_start_inferred"] is True
    assert "inferred from the weights" in paretune(*SIMULATE, "--autoscale", "1:2", "--load-rate", "1").stdout


def test_replay_sends_in_the_same_ways(here: Path) -> None:
    with fake(steady(0.0, 0.0)) as server:
        asked = ("replay", "turns.jsonl", "--url", server.url, "--model", "model")
        shown = paretune(*asked, "--sessions", "--pause", "0.05", "--json")
        found = data(shown)
        assert found["summary"]["finished"] == 12  # type: ignore[index]
        assert any("9 of 12 requests wait" in each for each in found["arrivals"])
        closed = data(paretune(*asked, "--clients", "2", "--json"))
        assert any("closed loop: 2 clients" in each for each in closed["arrivals"])
        refused = paretune(*asked, "--clients", "2", "--record", "kept")
        assert refused.exit_code == 2
        assert "--record" in refused.stderr
