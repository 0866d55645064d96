"""The command line with a prefill and a decode pool: simulate, size, export, and who refuses such a spec."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from paretune.optimizer.export.vllm_phases import export_phases
from paretune.profiler.kv_transfer import transfer_link
from paretune.runtime.spec import Deployment, KvTransfer, Pool, parse_deployment, save_deployment
from paretune.traces import Target, read, with_targets, write

from .cli_examples import in_folder, paretune, write_inputs

POOL = {"accelerator": "H100", "max_model_len": 8192, "num_kv_blocks": 20000, "max_num_batched_tokens": 2048}


def spec(**transfer: Any) -> Deployment:
    pools = (
        Pool.model_validate({**POOL, "role": "prefill", "max_num_seqs": 8}),
        Pool.model_validate({**POOL, "role": "decode", "replicas": 2, "max_num_seqs": 64}),
    )
    return Deployment(
        model="model", pools=pools, kv_transfer=KvTransfer.model_validate(transfer), targets=("ttft:p95<=600ms",)
    )


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("pools")
    write_inputs(folder, 200)
    with in_folder(folder):
        save_deployment(spec(), "spec.yaml")
        save_deployment(spec(link="InfiniBand 400 Gb/s", first_token="prefill"), "early.yaml")
        yield folder


def test_the_example_of_the_page_is_a_spec_that_can_be_simulated_and_exported() -> None:
    page = (Path(__file__).parents[1] / "docs" / "disaggregation.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    deployment = parse_deployment(yaml.safe_load(example))
    assert transfer_link(deployment).receive_bytes_per_s == 25e9
    assert export_phases(deployment).servers == {"prefill": 2, "decode": 3}


def test_simulate_prints_what_the_transfer_takes(here: Path) -> None:
    shown = paretune("simulate", "log.csv", "--spec", "spec.yaml")
    assert shown.exit_code == 0
    for words in ("KV on its way", "waiting for a link", "NVLink 4", "both pools", "prefill pool:", "not modeled:"):
        assert words in shown.stdout
    data = paretune("simulate", "log.csv", "--spec", "spec.yaml", "--json").json["data"]
    assert data["transfer"]["bytes_per_token"] == 131072
    assert data["transfer"]["transfers"] == 200
    parts = data["parts"]
    ttft = data["summary"]["values"]["ttft"]["mean"]
    assert sum(part["mean"] for part in parts.values()) == pytest.approx(ttft)
    assert {"prefill", "decode"} == set(data["cost"])
    assert any("prefix" in each for each in data["not_modeled"])
    assert any("peak rate of NVLink 4" in each for each in data["not_modeled"])


def test_what_a_warm_up_leaves_out_is_left_out_of_the_parts(here: Path) -> None:
    data = paretune("simulate", "log.csv", "--spec", "spec.yaml", "--warm-up", "20", "--json").json["data"]
    assert sum(part["mean"] for part in data["parts"].values()) == pytest.approx(
        data["summary"]["values"]["ttft"]["mean"]
    )


def test_a_slower_link_and_an_earlier_first_token(here: Path) -> None:
    late = paretune("simulate", "log.csv", "--spec", "spec.yaml", "--json").json["data"]
    early = paretune("simulate", "log.csv", "--spec", "early.yaml", "--json").json["data"]
    assert early["transfer"]["link"]["name"] == "InfiniBand 400 Gb/s"
    assert early["transfer"]["seconds"]["mean"] > late["transfer"]["seconds"]["mean"]
    values = [each["summary"]["values"] for each in (early, late)]
    assert values[0]["ttft"]["p95"] < values[1]["ttft"]["p95"]
    assert values[0]["itl"]["p99"] > values[1]["itl"]["p99"]


def test_size_says_how_many_of_each(here: Path) -> None:
    shown = paretune("simulate", "log.csv", "--spec", "spec.yaml", "--size", "--slo", "ttf30:p95<=600ms", "--json")
    assert shown.exit_code == 0
    size = shown.json["data"]["size"]
    assert size["prefill"] >= 1
    assert size["decode"] >= 1
    assert size["usd_per_hour"] > 0
    said = paretune("simulate", "log.csv", "--spec", "spec.yaml", "--size", "--slo", "ttf30:p95<=600ms").stdout
    assert f"{size['prefill']} prefill and {size['decode']} decode replicas" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("--survive", "1"), ("--head-room",), ("--layer-times", "."), ("--tables-engine", "vllm"),
        ("--calibration", "spec.yaml"), ("--sessions",), ("--clients", "2"), ("--pause", "0"),
        ("--autoscale", "1:2"), ("--cold-start", "0"),
    ],
)  # fmt: skip
def test_what_is_asked_of_one_pool_is_refused_by_the_options_name(here: Path, arguments: tuple[str, ...]) -> None:
    done = paretune("simulate", "log.csv", "--spec", "spec.yaml", *arguments)
    assert done.exit_code == 2
    assert arguments[0] in done.stderr


def test_size_is_for_two_pools(here: Path) -> None:
    save_deployment(Deployment(model="model", pools=(Pool.model_validate(POOL),)), "one.yaml")
    done = paretune("simulate", "log.csv", "--spec", "one.yaml", "--size", "--slo", "ttft:p95<=600ms")
    assert done.exit_code == 2
    assert "--size" in done.stderr


def test_explain_says_what_part_is_transfer(here: Path) -> None:
    shown = paretune("explain", "early.yaml", "log.csv", "--metric", "e2e:p50", "--step-log", "steps.jsonl")
    assert shown.exit_code == 0
    for words in ("prefill pool: own prefill", "decode pool: own decode", "not modeled:", "one pool alone"):
        assert words in shown.stdout
    data = paretune("explain", "early.yaml", "log.csv", "--metric", "e2e:p50", "--json").json["data"]
    parts = data["metrics"]["e2e:p50"]["parts"]
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(data["metrics"]["e2e:p50"]["value"])
    assert parts["transfer"]["by_resource"]["links"] == parts["transfer"]["seconds"]
    assert set(data["pools"]) == {"prefill", "decode"}
    steps = [json.loads(line) for line in Path("steps.jsonl").read_text().splitlines()]
    assert {step["pool"] for step in steps} == {"prefill", "decode"}
    told = (
        (("--metric", "itl:p99"), "itl"),
        (("--analyze", "."), "--analyze"),
        (("--operator-tables", "somewhere"), "--operator-tables"),
        (("--tables-version", "1.0"), "--tables-version"),
        (("--calibration", "spec.yaml"), "--calibration"),
    )
    for arguments, words in told:
        refused = paretune("explain", "spec.yaml", "log.csv", *arguments)
        assert refused.exit_code == 2
        assert words in refused.stderr


def test_explain_passes_over_targets_of_the_log_on_single_gaps_and_says_so(here: Path) -> None:
    targets = [Target.parse(text) for text in ("itl:p99<=50ms", "ttft:p90<=1s")]
    write(with_targets(read("log.csv"), targets), "owed.parquet")
    data = paretune("explain", "spec.yaml", "owed.parquet", "--json").json["data"]
    assert set(data["metrics"]) == {"ttft:p90"}
    assert any(each.startswith("ITL") for each in data["not_modeled"])


@pytest.mark.parametrize(
    "command",
    [
        ("serve", "spec.yaml"),
        ("verify", "spec.yaml", "log.csv"),
        (
            "tune",
            "log.csv",
            "--model",
            "model",
            "--accelerator",
            "H100",
            "--space",
            "space.yaml",
            "--baseline",
            "spec.yaml",
        ),
    ],
    ids=lambda command: command[0],
)
def test_commands_of_one_pool_refuse_it_by_the_fields_name(here: Path, command: tuple[str, ...]) -> None:
    done = paretune(*command)
    assert done.exit_code == 2
    assert "pools" in done.stderr


def test_export_writes_both_servers(here: Path) -> None:
    done = paretune("export", "spec.yaml", "-o", "vllm.yaml")
    assert done.exit_code == 0
    assert done.stdout.count("vllm") == 2
    assert "# decode server, 2 of them" in done.stdout
    assert "proxy" in done.stderr
    assert "wrote vllm.prefill.yaml" in done.stderr
    assert "wrote vllm.decode.yaml" in done.stderr
    for role, kv_role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
        config = yaml.safe_load(Path(f"vllm.{role}.yaml").read_text())
        assert json.loads(config["kv-transfer-config"])["kv_role"] == kv_role
    told = paretune("export", "spec.yaml", "--json").json["data"]
    assert told["servers"] == {"prefill": 1, "decode": 2}
    assert told["written"] == []
    told = paretune("export", "spec.yaml", "-o", "out/two.yaml", "--json").json["data"]
    assert told["written"] == ["out/two.prefill.yaml", "out/two.decode.yaml"]
    assert all(Path(path).is_file() for path in told["written"])
    refused = paretune("export", "early.yaml")
    assert refused.exit_code == 2
    assert "kv_transfer.first_token" in refused.stderr
