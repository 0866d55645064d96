"""Every command, on inputs that take a second: what it prints, what it writes, how it exits."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from paretune.cli import cli
from paretune.optimizer.store import Ledger, Record
from paretune.runtime.spec import load_deployment
from paretune.traces import Target, read, with_targets

from .cli_examples import TARGET, TUNE, Ended, ended, files, in_folder, paretune, start, tuned_folder

ROOT = Path(__file__).resolve().parent.parent


def leaves(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, *path, name)
        else:
            yield (*path, name)


COMMANDS = list(leaves(cli))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a log, a finished study of it, and the spec that was picked. Read only."""
    return tuned_folder(tmp_path_factory.mktemp("tuned"))


@pytest.fixture
def here(tuned: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of that folder to work in."""
    shutil.copytree(tuned, tmp_path / "copy")
    with in_folder(tmp_path / "copy") as folder:
        yield folder


def data_of(ended: Ended, command: str, exit_code: int = 0) -> Any:
    """What --json printed, after a look at the envelope."""
    body = ended.json
    assert {key: body[key] for key in ("schema_version", "command", "exit_code")} == {
        "schema_version": 1,
        "command": command,
        "exit_code": exit_code,
    }
    assert ended.exit_code == exit_code
    assert isinstance(body["warnings"], list)
    assert ended.stdout.count("\n") == 1
    return body["data"]


# help and documentation


def test_the_commands_are_the_ones_that_were_promised() -> None:
    promised = (
        "calibrate demo doctor explain export front init kernels pick prices profile replay report retune serve "
        "simulate trace tune"
    )
    assert sorted(cli.commands) == [*promised.split(), "verify"]
    assert {path[1] for path in COMMANDS if path[0] == "trace"} == {"describe", "check", "convert", "sample", "scale"}
    assert {path[1] for path in COMMANDS if path[0] == "kernels"} == {"tune", "show"}
    assert {path[1] for path in COMMANDS if path[0] == "prices"} == {"accelerators", "compare", "show", "tokens"}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_commands_help_has_an_example_that_it_would_accept(path: tuple[str, ...]) -> None:
    shown = paretune(*path, "--help")
    assert shown.exit_code == 0
    example = re.search(rf"Example: paretune {' '.join(path)}(.*)", shown.stdout)
    assert example is not None
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    known = {option for each in command.params if isinstance(each, click.Option) for option in each.opts}
    assert {word for word in example[1].split() if word.startswith("-")} <= known


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_is_documented(path: tuple[str, ...]) -> None:
    assert f"\n## paretune {' '.join(path)}\n" in (ROOT / "docs" / "cli.md").read_text()


@pytest.mark.parametrize("columns", ["80", "200"])
def test_the_generated_documentation_is_what_the_code_says_whatever_the_terminal(columns: str) -> None:
    environment = {**os.environ, "COLUMNS": columns}
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['paretune', '--help']\nfrom paretune.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'numba', 'optuna', 'pandas', 'matplotlib', 'pydantic', 'sqlalchemy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Commands:" in done.stdout


def test_version_is_that_of_the_package() -> None:
    from paretune import __version__

    assert paretune("--version").stdout == f"paretune, version {__version__}\n"


# request logs


def test_describe_counts_what_the_log_holds(here: Path) -> None:
    shown = paretune("trace", "describe", "log.csv")
    assert shown.exit_code == 0
    assert shown.stdout.startswith("log.csv: 60 requests in 14.6 s")
    assert shown.stderr == ""
    rows = list(csv.DictReader((here / "log.csv").open()))
    mean = sum(int(row["ContextTokens"]) for row in rows) / len(rows)
    data = data_of(paretune("trace", "describe", "log.csv", "--json"), "trace describe")
    assert data["total"]["requests"] == 60
    assert data["total"]["input"]["mean"] == pytest.approx(mean)
    assert data["total"]["prefix_reuse"] is None


def test_check_says_that_a_log_is_valid(here: Path) -> None:
    assert paretune("trace", "check", "log.csv").stdout == "log.csv: valid, 60 requests over 14.6 s\n"
    data = data_of(paretune("trace", "check", "log.csv", "--json"), "trace check")
    assert data["digest"] == read("log.csv").digest()


def test_a_converted_log_is_the_same_log_and_carries_targets(here: Path) -> None:
    done = paretune("trace", "convert", "log.csv", "-o", "log.parquet", "--target", "ttf30 p95 600 ms", "--json")
    assert data_of(done, "trace convert") == {"written": "log.parquet", "requests": 60}
    assert [str(target) for target in read("log.parquet").targets] == [TARGET]
    assert (read("log.parquet").arrival_s == read("log.csv").arrival_s).all()
    assert "targets: ttf30:p95<=600ms" in paretune("trace", "describe", "log.parquet").stdout


def test_a_sample_is_a_window_or_a_random_part(here: Path) -> None:
    window = ("trace", "sample", "log.csv", "-o", "window.parquet", "--start", "5", "--duration", "5")
    assert paretune(*window).exit_code == 0
    arrival_s = read("log.csv").arrival_s
    assert len(read("window.parquet")) == ((arrival_s >= 5) & (arrival_s < 10)).sum() > 0
    assert paretune("trace", "sample", "log.csv", "-o", "part.parquet", "-n", "20").exit_code == 0
    assert len(read("part.parquet")) == 20


def test_scaling_changes_rate_and_lengths_and_says_so(here: Path) -> None:
    done = paretune(
        "trace", "scale", "log.csv", "-o", "double.parquet", "--rate", "2", "--output-length", "0.5", "--json"
    )
    assert data_of(done, "trace scale")["requests"] == 60
    assert done.json["warnings"] == ["arrival rate times 2", "output lengths times 0.5"]
    assert [f"warning: {text}" for text in done.json["warnings"]] == done.stderr.splitlines()
    before, after = read("log.csv"), read("double.parquet")
    assert after.duration_s == pytest.approx(before.duration_s / 2)
    assert abs(after.output_tokens - before.output_tokens / 2).max() <= 0.5


# this machine


def test_doctor_finds_what_this_machine_has() -> None:
    findings = data_of(paretune("doctor", "--json"), "doctor")
    assert {"processor", "CPU operators", "compile cache", "GPU"} <= {each["name"] for each in findings}
    assert {each["state"] for each in findings} <= {"ok", "limited", "missing"}
    assert all(each["todo"] for each in findings if each["state"] == "missing")
    shown = paretune("doctor").stdout
    assert all(each["name"] in shown for each in findings)


def test_searched_tiles_are_shown_with_what_each_brought(tmp_path: Path) -> None:
    from paretune.runtime.random_model import write_random_model

    write_random_model(
        tmp_path / "model", family="llama", vocab_size=300, hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    with in_folder(tmp_path):
        options = ("--model", "model", "--weight-dtype", "fp32", "--threads", "1", "--seconds", "10")
        done = paretune("kernels", "tune", *options, "-o", "tiles.json", "--json")
        gains = data_of(done, "kernels tune")["gains"]
        assert gains
        assert all(each["best_s"] <= each["default_s"] for each in gains)
        shown = paretune("kernels", "show", "tiles.json").stdout.splitlines()
        assert len(shown) == 1 + len(gains)
        assert shown[0].split() == ["operator", "threads", "rows", "default", "tuned", "gain", "tile"]
        data = data_of(paretune("kernels", "show", "tiles.json", "--json"), "kernels show")
        assert [gain for each in data["of_threads"] for gain in each["gains"]] == gains


# from a log to a spec


def test_tune_prints_the_curve_and_says_that_nothing_was_measured(here: Path) -> None:
    done = paretune(*TUNE, "--trials", "20", "--study", "another", "--json", "--quiet")
    data = data_of(done, "tune")
    assert data["complete"]
    assert data["screened"]["simulated"] <= 20
    assert {each["fidelity"] for each in data["points"]} == {"simulated"}
    assert any("not measured" in text for text in data["not_modeled"])
    assert done.stderr == ""
    # the study of the fixture had the same settings
    assert data["points"] == data_of(paretune("front", "--json"), "front")["points"]


def test_values_of_a_space_that_the_profile_lacks_are_counted_with_the_reason(tmp_path: Path) -> None:
    from .profiler_examples import profile

    with in_folder(tmp_path):
        assert paretune("init", "--quiet").exit_code == 0
        Path("paretune.yaml").unlink()
        profile().save("profile.json")
        pool = {"num_threads": 1, "max_model_len": 1024}
        fields = {"tensor_parallel_size": [1, 2], "weight_dtype": ["bf16", "fp16"], "max_num_seqs": [4, 16]}
        space = {"fields": fields, "default": {"pools": [pool]}}
        Path("space.yaml").write_text(yaml.safe_dump(space))
        command = ("tune", "trace.parquet", "--profile", "profile.json", "--space", "space.yaml", "--max-devices", "2")
        shown = paretune(*command, "--slo", "ttf30:p95<=2s").stdout
    assert "8 points" in shown
    for what in ("TP 2 x 1 threads bf16/bf16", "TP 1 x 1 threads fp16/bf16", "TP 2 x 1 threads fp16/bf16"):
        assert f"left out: 2 points: no step times: profile: found no {what}" in shown


def test_tune_says_that_it_cannot_measure_what_is_not_here(here: Path) -> None:
    done = paretune(*TUNE, "--trials", "3", "--study", "another", "--measure", "2")
    assert done.exit_code == 2
    assert "H100 is not this machine" in done.stderr


def test_the_curve_gets_faster_as_it_gets_dearer(here: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(paretune("front", "default", "--csv").stdout)))
    data = data_of(paretune("front", "default", "--json"), "front")
    costs = [each["usd_per_million_tokens"] for each in data["points"]]
    latencies_s = [each["summary"]["values"]["ttf30"]["p95"] for each in data["points"]]
    assert len(costs) > 1
    assert costs == sorted(costs)
    assert latencies_s == sorted(latencies_s, reverse=True)
    assert sum(row["on_front"] == "True" for row in rows) == len(costs)
    assert len(rows) >= data["screened"]["simulated"]
    shown = paretune("front").stdout.splitlines()
    assert [line.split()[0] for line in shown[1 : 1 + len(costs)]] == [str(1 + i) for i in range(len(costs))]
    assert shown[1 + len(costs)].startswith("prices: median of ")
    assert shown[2 + len(costs)].startswith("NOT MEASURED")
    assert all(line.startswith("not modeled: ") for line in shown[3 + len(costs) :])


def test_dollars_come_with_their_source_and_date_and_sizes_with_a_month(here: Path) -> None:
    words = re.compile(
        r"prices: median of .* in paretune's prices\.csv: .*, as of 20\d\d-\d\d-\d\d; a month is 730 hours"
    )
    assert words.search(paretune("front").stdout)
    picked = paretune("pick").stdout
    assert words.search(picked)
    assert re.search(r"\$ per million tokens: [0-9.]+ \([0-9.]+ to [0-9.]+\)", picked)
    price = data_of(paretune("front", "--json"), "front")["price"]
    assert price["source"] in picked
    assert price["as_of"] in picked
    sized = paretune(*TUNE, "--cost", "sizing", "--study", "sized", "--trials", "5").stdout
    assert words.search(sized)
    assert sized.splitlines()[0].split()[1:3] == ["$/hour", "$/month"]
    points = data_of(paretune("front", "sized", "--json"), "front")["points"]
    hour = points[0]["usd_per_hour"]
    assert f" {hour:,.4g}  {730 * hour:,.4g} " in re.sub("  +", "  ", sized.splitlines()[1])
    assert words.search(paretune("pick", "sized").stdout)


def test_without_targets_each_point_is_labeled_with_its_load(here: Path) -> None:
    free = [*TUNE[: TUNE.index("--slo")], "--study", "swept", "--trials", "5"]
    shown = paretune(*free).stdout
    points = data_of(paretune("front", "swept", "--json"), "front")["points"]
    assert len({each["load"] for each in points}) > 1
    rows = shown.splitlines()[1 : 1 + len(points)]
    assert all(f" {each['load']:.2f}x " in row for each, row in zip(points, rows, strict=True))
    assert "load: traffic that one replica carries" in shown
    picked = paretune("pick", "swept", "--point", "1").stdout
    assert f"{points[0]['load']:.3g} x for each replica" in picked


def test_pick_writes_the_cheapest_that_holds_the_target(here: Path) -> None:
    done = paretune("pick", "default", "--slo", TARGET, "-o", "spec.yaml", "--json")
    written = data_of(done, "pick")
    deployment = load_deployment("spec.yaml")
    assert written["deployment"] == deployment.model_dump(mode="json")
    assert deployment.targets == (TARGET,)
    promised = deployment.prediction("ttf30", 95.0)
    assert promised is not None
    assert promised.high <= 0.6
    assert deployment.provenance is not None
    assert deployment.provenance.trace_digest == with_targets(read("log.csv"), [Target.parse(TARGET)]).digest()
    assert not deployment.provenance.measured


def test_pick_takes_a_budget_the_knee_or_a_number(here: Path) -> None:
    points = data_of(paretune("front", "--json"), "front")["points"]
    pools = [each["deployment"]["pools"] for each in points]
    least = points[0]["usd_per_million_tokens"]
    by_budget = data_of(paretune("pick", "--budget", str(least * 1.0001), "--json"), "pick")
    assert by_budget["deployment"]["pools"] == pools[0]
    last = data_of(paretune("pick", "--point", str(len(points)), "--json"), "pick")
    assert last["deployment"]["pools"] == pools[-1]
    assert data_of(paretune("pick", "--knee", "--json"), "pick")["deployment"]["pools"] in pools


def test_two_ways_to_pick_are_refused_and_the_spec_stays(here: Path) -> None:
    before = files(here)
    done = paretune("pick", "--slo", TARGET, "--knee")
    assert done.exit_code == 2
    assert "--slo, --knee" in done.stderr
    assert files(here) == before


def test_nothing_holds_an_impossible_target(here: Path) -> None:
    before = files(here)
    done = paretune("pick", "--slo", "ttf30:p95<=1ms", "--json")
    assert data_of(done, "pick", exit_code=3) is None
    assert done.stderr == f"error: {done.json['error']}\n"
    assert "ttf30:p95<=1ms" in done.stderr
    assert files(here) == before
    assert paretune("pick", "--budget", "0.000001").exit_code == 3
    impossible = paretune(*TUNE, "--slo", "ttf30:p95<=1ms", "--study", "impossible", "--trials", "3", "--json")
    assert data_of(impossible, "tune", exit_code=3)["points"] == []


def test_a_study_that_ran_out_of_time_exits_with_75_and_goes_on(here: Path) -> None:
    command = (*TUNE, "--trials", "20", "--study", "short")
    early = paretune(*command, "--time-budget", "0", "--json")
    assert data_of(early, "tune", exit_code=75)["complete"] is False
    whole = data_of(paretune(*command, "--json"), "tune")
    assert whole["points"] == data_of(paretune("front", "default", "--json"), "front")["points"]


def test_tune_mirrors_its_trials_into_a_study_that_optuna_opens(here: Path) -> None:
    import optuna

    url = "sqlite:///out/optuna.db"
    command = (*TUNE, "--trials", "20", "--study", "night", "--optuna-storage", url, "--json")
    for _ in range(2):
        simulated = data_of(paretune(*command), "tune")["screened"]["simulated"]
        mirrored = optuna.load_study(study_name="night", storage=url)
        assert len(mirrored.trials) == simulated > 1
    assert mirrored.user_attrs["paretune"]["metric"] == "ttf30"
    fields = set(yaml.safe_load(Path("space.yaml").read_text())["fields"])
    assert all(set(trial.params) == fields for trial in mirrored.trials)
    assert mirrored.best_trials
    nowhere = paretune(*TUNE, "--study", "another", "--optuna-storage", "sqlite:////proc/nowhere/optuna.db")
    assert nowhere.exit_code == 1
    assert "--optuna-storage" in nowhere.stderr
    # it was refused before the study began
    assert paretune("front", "another").exit_code == 2


def test_simulate_is_what_was_predicted_and_says_not_measured(here: Path) -> None:
    data = data_of(paretune("simulate", "log.csv", "--spec", "out/spec.yaml", "--json"), "simulate")
    promised = load_deployment("out/spec.yaml").prediction("ttf30", 95.0)
    assert promised is not None
    assert data["summary"]["values"]["ttf30"]["p95"] == pytest.approx(promised.value)
    assert data["measured_step_times"] is False
    shown = paretune("simulate", "log.csv", "--spec", "out/spec.yaml").stdout
    assert "60 of 60 requests finished" in shown
    assert "NOT MEASURED" in shown
    faster = paretune("simulate", "log.csv", "--spec", "out/spec.yaml", "--rate", "20", "--json")
    busier = data_of(faster, "simulate")["summary"]["values"]["ttf30"]["p95"]
    assert busier > data["summary"]["values"]["ttf30"]["p95"]


def test_an_accelerator_may_be_spelled_otherwise_and_another_engine_is_said_not_to_be_simulated(here: Path) -> None:
    plain = data_of(paretune("simulate", "log.csv", "--spec", "out/spec.yaml", "--json"), "simulate")
    spec = yaml.safe_load(Path("out/spec.yaml").read_text())
    spec["pools"][0]["accelerator"] = "h100"
    Path("spelled.yaml").write_text(yaml.safe_dump(spec))
    assert data_of(paretune("simulate", "log.csv", "--spec", "spelled.yaml", "--json"), "simulate") == plain
    Path("other.yaml").write_text(yaml.safe_dump({**spec, "engine": "vllm"}))
    label = "the scheduler of vllm: paretune's own ran in its place"
    assert f"not modeled: {label}" in paretune("simulate", "log.csv", "--spec", "other.yaml").stdout
    other = data_of(paretune("simulate", "log.csv", "--spec", "other.yaml", "--json"), "simulate")
    assert other["not_modeled"] == [label, *plain["not_modeled"]]
    assert other["summary"] == plain["summary"]


def test_simulate_runs_the_scheduler_policy_of_the_spec(here: Path) -> None:
    """Of two requests that begin alike and come together, vLLM's rules let one find what the other computes."""
    spec = yaml.safe_load(Path("out/spec.yaml").read_text())
    spec["pools"][0] |= {"enable_prefix_caching": True, "max_num_seqs": 8, "max_num_batched_tokens": 2048}
    usage = {"prompt_tokens": 100, "completion_tokens": 5}
    prefix = {"prefix_hashes": [1, 2, 3], "prefix_block_size": spec["pools"][0]["block_size"]}
    row = {"object": "chat.completion", "created": 1, "model": "m", "usage": usage, **prefix}
    Path("twins.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    found = {}
    for policy in ("paretune", "vllm_v1"):
        Path("spec.yaml").write_text(yaml.safe_dump({**spec, "scheduler_policy": policy}))
        data = data_of(paretune("simulate", "twins.jsonl", "--spec", "spec.yaml", "--json"), "simulate")
        found[policy] = data["prefix_hit_tokens"]
    assert found == {"paretune": 0, "vllm_v1": 3 * spec["pools"][0]["block_size"]}
    Path("spec.yaml").write_text(yaml.safe_dump({**spec, "scheduler_policy": "vllm_v1", "engine": "vllm"}))
    shown = paretune("simulate", "twins.jsonl", "--spec", "spec.yaml").stdout
    assert "not modeled: the scheduler of vllm: paretune's, by the rules of vLLM's V1, ran in its place" in shown


def test_export_prints_a_command_and_writes_a_file_that_says_the_same(here: Path) -> None:
    import shlex

    done = paretune("export", "out/spec.yaml", "--target", "vllm", "-o", "vllm.yaml")
    pool = load_deployment("out/spec.yaml").pool
    words = shlex.split(done.stdout.replace("\\\n", " "))
    assert words[:3] == ["vllm", "serve", "model"]
    assert words[words.index("--max-num-seqs") + 1] == str(pool.max_num_seqs)
    assert yaml.safe_load((here / "vllm.yaml").read_text())["max-num-seqs"] == pool.max_num_seqs
    assert any(line.startswith("warning: ") for line in done.stderr.splitlines())
    data = data_of(paretune("export", "out/spec.yaml", "--json"), "export")
    assert data["argv"] == words
    assert paretune("export", "out/spec.yaml", "--engine-version", "0.1").exit_code == 2


def test_the_report_is_written_with_plots_beside_it(here: Path) -> None:
    done = paretune("report", "default", "--spec", "out/spec.yaml", "-o", "out/page.html", "--plots", "--json")
    assert data_of(done, "report") == {"written": ["out/page.html", "out/page.png", "out/page.svg"]}
    assert (here / "out/page.html").read_text().startswith("<!")
    assert (here / "out/page.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (here / "out/page.svg").read_text()


# a project and its nightly job


def test_init_writes_a_project_whose_settings_the_commands_take(tmp_path: Path) -> None:
    with in_folder(tmp_path):
        done = paretune("init", "service", "--json")
        assert data_of(done, "init")["written"] == ["service/paretune.yaml", "service/trace.parquet"]
        assert paretune("trace", "check", "service/trace.parquet").exit_code == 0
        assert paretune("init", "service").exit_code == 2
    with in_folder(tmp_path / "service"):
        settings = yaml.safe_load(Path("paretune.yaml").read_text())
        # there is no profile yet, and the message names the one of the settings
        assert settings["profile"] in paretune("tune", settings["log"]).stderr
        Path("paretune.yaml").write_text("model: nowhere\n")
        assert "'nowhere'" in paretune("tune", settings["log"]).stderr
        assert "'elsewhere'" in paretune("tune", settings["log"], "--model", "elsewhere").stderr


def test_the_log_that_init_writes_can_be_tuned_for_with_its_settings(tmp_path: Path) -> None:
    with in_folder(tmp_path):
        done = paretune("init")
        log = read("trace.parquet")
        assert f"{len(log):,} requests" in done.stdout
        assert "lengths x 0.2, at most 1,024 tokens" in done.stdout
        # every request fits the model that ships
        assert (log.input_tokens + log.output_tokens).max() <= 1024
        tuned = paretune("tune", "trace.parquet", "--accelerator", "H100", "--trials", "4", "--json")
        assert data_of(tuned, "tune")["points"]
        assert paretune("pick").exit_code == 0
        assert load_deployment("out/spec.yaml").targets == (str(Target.parse("ttf30:p95<=1500ms")),)


def test_an_environment_variable_goes_before_the_settings(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("paretune.yaml").write_text("model: of-the-settings\n")
    assert "of-the-settings" in paretune("tune", "log.csv").stderr
    monkeypatch.setenv("PARETUNE_TUNE_MODEL", "of-the-environment")
    assert "of-the-environment" in paretune("tune", "log.csv").stderr
    assert "of-the-flag" in paretune("tune", "log.csv", "--model", "of-the-flag").stderr


@pytest.fixture
def project(here: Path) -> Path:
    """A spec that holds its target on its log, and a project that searches beyond it."""
    space = yaml.safe_load(Path("space.yaml").read_text())
    space["fields"] |= {"tensor_parallel_size": [1], "weight_dtype": ["bf16"], "max_num_seqs": [4]}
    Path("narrow.yaml").write_text(yaml.safe_dump(space))
    narrow = [word if word != "space.yaml" else "narrow.yaml" for word in TUNE]
    assert paretune(*narrow, "--study", "narrow", "--trials", "3").exit_code == 0
    assert paretune("pick", "narrow", "--point", "1").exit_code == 0
    assert paretune("trace", "scale", "log.csv", "-o", "busy.parquet", "--rate", "8").exit_code == 0
    settings = {"log": "log.csv", "model": "model", "slo": [TARGET], "accelerator": "H100", "space": "space.yaml"}
    Path("paretune.yaml").write_text(yaml.safe_dump({**settings, "trials": 20}))
    return here


def test_retune_leaves_everything_as_it_is_where_nothing_moved(project: Path) -> None:
    spec = Path("out/spec.yaml").read_bytes()
    data = data_of(paretune("retune", "--json"), "retune")
    assert (data["action"], data["changed"]) == ("unchanged", False)
    assert Path("out/spec.yaml").read_bytes() == spec


def test_retune_replaces_a_spec_that_would_break_and_keeps_one_that_would_not(project: Path) -> None:
    spec = Path("out/spec.yaml").read_bytes()
    trial = data_of(paretune("retune", "--log", "busy.parquet", "--dry-run", "--json"), "retune")
    assert (trial["action"], trial["dry_run"]) == ("replaced", True)
    assert Path("out/spec.yaml").read_bytes() == spec
    done = paretune("retune", "--log", "busy.parquet")
    assert done.exit_code == 0
    assert done.stdout.startswith("replaced out/spec.yaml\n- rate ")
    better = load_deployment("out/spec.yaml")
    assert better.digest() == trial["new"] != trial["old"]
    # back to the quiet log: what runs is still good enough
    kept = data_of(paretune("retune", "--json"), "retune", exit_code=5)
    assert kept["action"] == "kept"
    assert load_deployment("out/spec.yaml") == better
    decisions = [json.loads(path.read_text()) for path in sorted(Path("out/decisions").iterdir())]
    assert {each["action"] for each in decisions} == {"kept", "replaced"}


def test_retune_from_elsewhere_reads_and_writes_beside_its_settings(project: Path, tmp_path: Path) -> None:
    with in_folder(tmp_path):
        done = paretune("retune", "-c", "copy/paretune.yaml", "--log", "copy/busy.parquet", "--json")
        data = data_of(done, "retune")
        assert (data["action"], data["spec"]) == ("replaced", "copy/out/spec.yaml")
        assert os.listdir() == ["copy"]
    assert len(list(Path("out/decisions").iterdir())) == 1
    assert load_deployment("out/spec.yaml").digest() == data["new"]


def test_an_interrupted_retune_goes_on_and_one_that_ended_begins_anew(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, written = Ledger.record, list[str]()

    def interrupted(self: Ledger, study: str, trial: Record) -> None:
        record(self, study, trial)
        written.append(trial.digest)
        if len(written) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "record", interrupted)
    command = ("retune", "--log", "busy.parquet", "--dry-run")
    first = paretune(*command)
    assert first.exit_code == 75
    assert "type the same command again to go on" in first.stderr
    assert "paretune tune" not in first.stderr
    begun = len(written)
    assert paretune(*command).exit_code == 0
    assert len(set(written)) == len(written) > begun
    trials = sorted(written)
    assert paretune(*command).exit_code == 0
    assert sorted(written) == sorted(2 * trials)


def test_only_one_retune_works_on_a_spec(project: Path) -> None:
    with open("out/.spec.yaml.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = paretune("retune", "--json")
    assert data_of(done, "retune", exit_code=6) is None
    assert "one retune at a time" in done.stderr


# what the shell sees


def test_a_reader_that_leaves_gets_no_message(tuned: Path) -> None:
    for arguments in (["trace", "describe", "log.csv"], ["trace", "describe", "log.csv", "--json"], ["--help"]):
        reading, writing = os.pipe()
        os.close(reading)
        process = start(*arguments, cwd=tuned, stdout=writing)
        os.close(writing)
        done = ended(process)
        assert (done.exit_code, done.stderr) == (1, "")


def test_an_unknown_option_is_a_usage_error(tuned: Path) -> None:
    done = ended(start("tune", "log.csv", "--no-such-option", cwd=tuned))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "No such option" in done.stderr
