"""What a run is held to: targets of the command line, of the spec and of the log, over the requests that count; and
what reading a log left out, in every command that reads one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paretune.optimizer.capacity import Owed
from paretune.runtime.spec import Deployment, Pool, save_deployment
from paretune.traces.metrics import RequestTimes, Target, goodput, violations
from paretune.traces.trace import Labels, Trace

from .cli_examples import TUNE, in_folder, paretune, write_inputs
from .test_replay import fake, steady

LIMITS = {"accelerator": "H100", "max_model_len": 8192, "num_kv_blocks": 20000}
STRICT, LOOSE = "ttft:p95<=1ms", "ttft:p95<=1000s"
ONE = (Pool.model_validate({**LIMITS, "replicas": 2}),)
TWO = tuple(Pool.model_validate({**LIMITS, "role": role}) for role in ("prefill", "decode"))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """noted.csv is log.csv with a column that nobody reads."""
    folder = tmp_path_factory.mktemp("targets")
    write_inputs(folder, 60)
    with in_folder(folder):
        for name, pools in (("one", ONE), ("two", TWO)):
            save_deployment(Deployment(model="model", pools=pools), f"{name}.yaml")
            save_deployment(Deployment(model="model", pools=pools, targets=(STRICT,)), f"{name}-strict.yaml")
        head, *rows = Path("log.csv").read_text().splitlines()
        Path("noted.csv").write_text("\n".join([f"{head},color", *(f"{row},red" for row in rows)]) + "\n")
        yield folder


def simulated(spec: str, *arguments: str, log: str = "log.csv") -> tuple[str, dict[str, Any]]:
    asked = ("simulate", log, "--spec", spec, *arguments)
    shown = paretune(*asked)
    assert shown.exit_code == 0, shown.stderr
    data: dict[str, Any] = paretune(*asked, "--json").json["data"]
    return shown.stdout, data


@pytest.mark.parametrize("pools", ["one", "two"])
def test_a_run_is_held_to_the_targets_of_the_command_line_else_of_the_spec(here: Path, pools: str) -> None:
    for spec, arguments in ((f"{pools}.yaml", ("--slo", STRICT)), (f"{pools}-strict.yaml", ())):
        shown, data = simulated(spec, *arguments)
        assert f"missed: {STRICT} (simulated " in shown
        assert "goodput 0.00 requests/s within their targets" in shown
        assert data["goodput_per_s"] == 0.0
        assert data["targets"] == [STRICT]
        assert data["missed"] == {STRICT: data["summary"]["values"]["ttft"]["p95"]}
    shown, data = simulated(f"{pools}-strict.yaml", "--slo", LOOSE)
    assert "missed:" not in shown
    assert data["missed"] == {}
    assert data["goodput_per_s"] == pytest.approx(data["summary"]["finished"] / data["summary"]["duration_s"])


def test_the_logs_own_targets_hold_where_nobody_gives_others(here: Path) -> None:
    assert paretune("trace", "convert", "log.csv", "-o", "own.parquet", "--target", STRICT).exit_code == 0
    shown, data = simulated("one.yaml", log="own.parquet")
    assert f"missed: {STRICT}" in shown
    assert data["missed"].keys() == {STRICT}
    shown, data = simulated("one.yaml", "--slo", LOOSE, log="own.parquet")
    assert "missed:" not in shown


def test_a_k_that_the_targets_do_not_ask_for_is_refused_by_the_options_name(here: Path) -> None:
    done = paretune("simulate", "log.csv", "--spec", "one.yaml", "-k", "10", "--slo", "ttf30:p95<=1s")
    assert done.exit_code == 2
    assert "\nError: -k: found 10" in done.stderr


def times(ttft_s: list[float]) -> RequestTimes:
    """One request every second."""
    at_s, n = np.arange(float(len(ttft_s))), len(ttft_s)
    first_s = at_s + np.array(ttft_s)
    return RequestTimes(at_s, at_s, first_s, first_s, first_s + 1, np.full(n, 2), np.ones(n, np.bool_), k=30)


def trace(n: int, **more: Any) -> Trace:
    return Trace(np.arange(float(n)), np.full(n, 9), np.full(n, 2), **more)


def test_requests_of_the_warm_up_neither_break_a_target_nor_count_as_good() -> None:
    slow, target = times([9.0, 9.0, 0.1, 0.1]), Target.parse("ttft:p95<=1s")
    counted = np.array([False, False, True, True])
    assert violations(slow, Owed(trace(4), (target,))) == [(target, 9.0)]
    owed = Owed(trace(4), (target,), counted)
    assert violations(slow, owed) == []
    # two good requests between the first that counts, at second 2, and the last token, at second 4.1
    assert goodput(slow, owed, counted) == pytest.approx(2 / 2.1)
    fast = times([0.1, 0.1, 9.0, 9.0])
    assert goodput(fast, owed, counted) == 0.0


def test_a_target_that_requests_have_as_their_own_governs_those_alone_whoever_names_it() -> None:
    own, other = Target.parse("ttft:p95<=1s"), Target.parse("ttft:p95<=2s")
    log = trace(3, targets=(own,), target=np.array([0, -1, -1]), app=Labels.of(["a", "a", "b"]))
    run = times([0.5, 9.0, 9.0])
    assert violations(run, Owed(log, (own,))) == []
    assert violations(run, Owed(log, (other,))) == [(other, 9.0)]
    only_a = Target.parse("a/ttft:p95<=5s")
    assert Owed(log, (only_a,)).rows(only_a).tolist() == [True, True, False]


def test_both_fleets_of_an_autoscaler_leave_the_warm_up_out(here: Path) -> None:
    autoscale = ("--autoscale", "1:2", "--cold-start", "5", "--autoscale-target", "2")
    _, data = simulated("one.yaml", *autoscale, "--warm-up", "15")
    assert data["summary"]["requests"] < 60
    assert data["elastic"]["elastic"]["summary"] == data["summary"]
    assert data["elastic"]["fixed"]["summary"]["requests"] == data["summary"]["requests"]


def test_a_warm_up_that_sizing_would_not_leave_out_is_refused_or_said(here: Path) -> None:
    asked = ("simulate", "log.csv", "--slo", LOOSE, "--warm-up", "5")
    refused = paretune(*asked, "--spec", "two.yaml", "--size")
    assert refused.exit_code == 2
    assert "\nError: --size: " in refused.stderr
    assert "--warm-up" in refused.stderr
    said = paretune(*asked, "--spec", "one.yaml", "--survive", "1")
    assert said.exit_code == 0
    assert "warning: --survive and --head-room count every request" in said.stderr


def test_what_reading_the_log_left_out_is_said_by_every_command(here: Path) -> None:
    note = "columns not read: color"
    commands: list[tuple[str, ...]] = [
        (command, *words)
        for spec in ("one.yaml", "two.yaml")
        for command, words in (("simulate", ("noted.csv", "--spec", spec)), ("explain", (spec, "noted.csv")))
    ]
    commands.append((*TUNE[:1], "noted.csv", *TUNE[2:], "--trials", "2", "--study", "noted"))
    for command in commands:
        done = paretune(*command, "--metric", "ttft:p50") if command[0] == "explain" else paretune(*command)
        assert f"note: {note}" in done.stdout, command
    for command in commands[:-1]:
        assert paretune(*command, "--json").json["data"]["notes"] == [note]
    assert paretune(*commands[-1], "--fresh", "--json").json["data"]["notes"] == [note]
    with fake(steady(0.0, 0.0)) as server:
        replayed = ("replay", "noted.csv", "--url", server.url, "--model", "model", "--rate", "100")
        assert f"note: {note}" in paretune(*replayed).stdout
        assert paretune(*replayed, "--json").json["data"]["notes"] == [note]


def test_two_pools_say_how_requests_were_sent(here: Path) -> None:
    shown, data = simulated("two.yaml")
    assert "open loop: every request at its recorded arrival" in shown
    assert data["arrivals"] == ["open loop: every request at its recorded arrival"]
