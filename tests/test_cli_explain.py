"""`paretune explain` and what `simulate` says of confidence, the worst five minutes, head-room and lost replicas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from paretune.runtime.spec import Deployment, Pool, save_deployment

from .cli_examples import in_folder, paretune, write_inputs


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """300 requests of the sample, and a spec of two H100s with too few seats."""
    folder = tmp_path_factory.mktemp("explain")
    write_inputs(folder, 300)
    pool = Pool(
        accelerator="H100", max_num_seqs=6, max_num_batched_tokens=512, max_model_len=8192, num_kv_blocks=2000,
        replicas=2,
    )  # fmt: skip
    with in_folder(folder):
        save_deployment(Deployment(model="model", pools=(pool,), targets=("ttft:p95<=600ms",)), "spec.yaml")
        yield folder


def test_explain_takes_each_metric_apart_and_tries_knobs(here: Path) -> None:
    shown = paretune(
        "explain", "spec.yaml", "log.csv", "--metric", "ttft:p95", "--metric", "itl:p99", "--step-log", "steps.jsonl",
        "--json",
    )  # fmt: skip
    assert shown.exit_code == 0
    data = shown.json["data"]
    assert set(data["metrics"]) == {"ttft:p95", "itl:p99"}
    for each in data["metrics"].values():
        assert sum(part["seconds"] for part in each["parts"].values()) == pytest.approx(each["value"])
        for part in each["parts"].values():
            assert sum(part["by_resource"].values()) == pytest.approx(part["seconds"])
    assert {"max_num_seqs": 12} in [knob["change"] for knob in data["metrics"]["ttft:p95"]["knobs"]]
    assert all(knob["after"] is not None for knob in data["metrics"]["itl:p99"]["knobs"])
    steps = [json.loads(line) for line in Path("steps.jsonl").read_text().splitlines()]
    assert len(steps) == sum(kind["steps"] for kind in data["steps"])
    assert {"replica", "num_tokens", "seconds", "bound", "kv_blocks_used"} <= set(steps[0])
    assert any("inferred" in each for each in data["not_modeled"])


def test_explain_prints_parts_bounds_and_occupancy(here: Path) -> None:
    shown = paretune("explain", "spec.yaml", "log.csv", "--metric", "ttft:p95", "--no-knobs")
    assert shown.exit_code == 0
    for words in ("queue: max_num_seqs reached", "own prefill", "steps bound by", "KV blocks in use", "NOT MEASURED"):
        assert words in shown.stdout
    assert "ms over all requests (by the " in shown.stdout


@pytest.mark.parametrize("metric", ["ttft", "ttft:p0", "ttft:95x", "nothing:p95", "ttft:pinf"])
def test_a_metric_without_a_percentile_is_refused(here: Path, metric: str) -> None:
    shown = paretune("explain", "spec.yaml", "log.csv", "--metric", metric)
    assert shown.exit_code == 2
    assert shown.stderr.startswith("error: ")


def test_a_folder_without_a_recorded_run_is_refused(here: Path) -> None:
    shown = paretune("explain", "spec.yaml", "log.csv", "--analyze", "model")
    assert shown.exit_code == 2
    assert "verify --record" in shown.stderr


def test_simulate_says_how_sure_how_bad_and_how_far(here: Path) -> None:
    shown = paretune("simulate", "log.csv", "--spec", "spec.yaml", "--survive", "1", "--head-room", "--warm-up", "10")
    assert shown.exit_code == 0
    assert "too short for p99" in shown.stdout
    assert "worst five minutes: the run has" in shown.stdout
    assert "warm-up 10 s (" in shown.stdout
    assert "ramp none, length jitter none" in shown.stdout
    assert "with 1 replica(s) lost, 1 left: ttft:p95<=600ms" in shown.stdout
    assert "x the recorded rate (" in shown.stdout
    data = paretune("simulate", "log.csv", "--spec", "spec.yaml", "--survive", "1", "--head-room", "--json").json[
        "data"
    ]
    assert data["head_room"]["low"] <= data["head_room"]["rate"] <= data["head_room"]["high"]
    assert data["survive"]["replicas"] == 1
    assert data["samples"]["ttft:p99"]["enough"] is False
    assert data["samples"]["ttft:p99"]["needed_s"] > data["worst_window"][0]["seconds"]


def test_head_room_without_a_target_is_no_question(here: Path) -> None:
    spec = Path("plain.yaml")
    save_deployment(Deployment(model="model", pools=(Pool(accelerator="H100", num_kv_blocks=1000),)), spec)
    shown = paretune("simulate", "log.csv", "--spec", spec, "--head-room")
    assert shown.exit_code == 2
    assert "give --slo" in shown.stderr


def test_head_room_of_a_single_request_is_refused_before_anything_is_printed(here: Path) -> None:
    single = Path("log.csv").read_text().splitlines(keepends=True)[:2]
    Path("single.csv").write_text("".join(single))
    shown = paretune("simulate", "single.csv", "--spec", "spec.yaml", "--head-room")
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert "at one instant" in shown.stderr
