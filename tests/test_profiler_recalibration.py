"""A step-time model fitted anew to a server's own records: known factors come back, errors are told, physics holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from paretune.cli import cli
from paretune.optimizer.sources import Sources
from paretune.profiler.calibration import LoggedStep
from paretune.profiler.hardware import accelerator
from paretune.profiler.profile import BadProfile
from paretune.profiler.recalibration import PARTS, Calibration, RecordedRun, calibrate, read_recorded
from paretune.profiler.simulator import simulate
from paretune.profiler.step_time import AdapterTimes, ModeledStep, composed_time_s
from paretune.profiler.tables import step_bounds, step_tables
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import Deployment, Pool, save_deployment
from paretune.traces import Trace
from paretune.traces.metrics import TPOT, TTFT

from .profiler_examples import SMALL, compositions, profile

POOL = Pool(max_model_len=2048, max_num_seqs=64, max_num_batched_tokens=1100, num_kv_blocks=4096)
DEPLOYMENT = Deployment(model="paretune/small", pools=(POOL,))
TRUE = {
    "tokens_s": 1.5,
    "rows_s": 1.5,
    "samples_s": 1.5,
    "decode_attention_s": 3.0,
    "prefill_attention_s": 2.0,
}
CONSTANT_S = 4e-4


def modeled() -> ModeledStep:
    return step_tables(profile(), SMALL, POOL)


def logged(noise: float = 0.0) -> list[LoggedStep]:
    """Steps of a server that is slower than modeled by TRUE, in random order."""
    tables = modeled().tables
    slower = tables._replace(**{part: getattr(tables, part) * TRUE[part] for part in PARTS})
    rng = np.random.default_rng(0)
    steps = [step for step in compositions() if step.num_rows <= 64] * 4
    rng.shuffle(steps)
    return [
        LoggedStep(
            0, *step, (composed_time_s(slower, *step) + CONSTANT_S) * np.exp(noise * rng.standard_normal()), float(i)
        )
        for i, step in enumerate(steps)
    ]


def taken(recorded: object) -> Calibration:
    return calibrate(recorded, modeled(), DEPLOYMENT, recorded_in="test", source="abc", source_name="made up")


def test_factors_of_the_parts_come_back() -> None:
    found = taken(logged())
    for part in ("tokens_s", "decode_attention_s", "prefill_attention_s"):
        assert found.factors[part] == pytest.approx(TRUE[part], rel=0.1)
    assert found.before["step"].median > 0.3
    assert found.after["step"].p90 < 0.02


def test_noise_shows_in_the_error_and_not_in_the_factors() -> None:
    found = taken(logged(noise=0.1))
    assert found.factors["tokens_s"] == pytest.approx(TRUE["tokens_s"], rel=0.1)
    # 90 % of a normal distribution lie within 1.645 standard deviations
    assert found.after["step"].p90 == pytest.approx(0.165, rel=0.35)


def test_the_pause_after_a_step_is_a_part_of_it() -> None:
    """Steps that follow each other at once, a pause of a millisecond between them; a long silence is none of theirs."""
    pause_s, now_s, steps = 1e-3, 0.0, []
    for i, step in enumerate(logged()):
        steps.append(replace(step, started_s=now_s))
        now_s += step.seconds + (pause_s if i % 10 else 5.0)
    with_pause, without = taken(steps), taken(logged())
    assert with_pause.step_s == pytest.approx(without.step_s + pause_s, abs=1e-4)
    for part in ("tokens_s", "decode_attention_s", "prefill_attention_s"):
        assert with_pause.factors[part] == pytest.approx(without.factors[part], rel=0.02)


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"draft": modeled().tables}, "a draft model's passes"),
        ({"adapters": AdapterTimes(token_s=1e-6)}, "LoRA adapters"),
        ({"block_copy_s": 1e-5}, "KV blocks on their way"),
    ],
)
def test_steps_with_time_that_their_composition_does_not_tell_are_refused(beside: dict[str, Any], said: str) -> None:
    found = modeled()
    found = replace(found, tables=found.tables._replace(**beside))
    with pytest.raises(BadProfile, match=said):
        calibrate(logged(), found, DEPLOYMENT, recorded_in="test", source="abc", source_name="made up")


def test_of_what_the_log_does_not_show_the_common_factor_is_taken() -> None:
    decode_only = [step for step in logged() if step.prefill_pairs == 0]
    found = taken(decode_only)
    assert 1.3 < found.factors["prefill_attention_s"] < 3.0


def recorded_run(factor: float, later_s: float) -> RecordedRun:
    rng = np.random.default_rng(1)
    trace = Trace(np.cumsum(rng.exponential(0.2, 200)), rng.integers(20, 400, 200), rng.integers(1, 60, 200))
    tables = modeled().tables
    parts = {part: getattr(tables, part) * factor for part in PARTS}
    times = simulate(trace, POOL, tables._replace(**parts)).times
    ttft_s = times.values(TTFT) + later_s
    return RecordedRun(trace, ttft_s, times.end_s - times.scheduled_s + later_s)


def test_a_run_gives_one_factor_and_the_time_before_the_scheduler() -> None:
    found = taken(recorded_run(1.7, 0.02))
    assert found.kind == "run"
    assert found.factors == dict.fromkeys(PARTS, pytest.approx(1.7, rel=0.01))
    assert found.before_scheduler_s == pytest.approx(0.02, rel=0.1)
    assert found.before[str(TPOT)].median > 0.3
    assert found.after[str(TPOT)].p90 < 0.02
    assert found.after[str(TTFT)].p90 < 0.05


def test_a_run_of_something_else_is_refused() -> None:
    with pytest.raises(BadProfile, match="times as long as modeled"):
        taken(recorded_run(30.0, 0.0))


def test_a_run_of_answers_of_one_token_is_refused() -> None:
    run = recorded_run(1.7, 0.02)
    one = Trace(run.trace.arrival_s, run.trace.input_tokens, np.ones(len(run.trace), np.int64))
    with pytest.raises(BadProfile, match="0 answers of more than one token"):
        taken(RecordedRun(one, run.ttft_s, run.ttft_s))


def test_too_little_is_refused() -> None:
    with pytest.raises(BadProfile, match="at least 40"):
        taken(logged()[:30])


def test_no_calibrated_step_is_faster_than_physics() -> None:
    found = taken(logged()).model_copy(update={"factors": dict.fromkeys(PARTS, 1e-9), "step_s": 0.0})
    bounds = step_bounds(profile(), SMALL, POOL)
    applied = found.applied(modeled(), bounds, POOL, "abc")
    for part in PARTS:
        assert (getattr(applied.tables, part) >= getattr(bounds, part)).all()


def test_another_source_is_refused_and_another_sharding_named() -> None:
    found, bounds = taken(logged()), step_bounds(profile(), SMALL, POOL)
    with pytest.raises(BadProfile, match="made up"):
        found.applied(modeled(), bounds, POOL, "xyz")
    other = POOL.model_copy(update={"weight_dtype": "int8"})
    applied = found.applied(modeled(), bounds, other, "abc")
    assert any("taken with" in note for note in applied.not_modeled)
    assert applied.relative_error >= modeled().relative_error


def test_the_command_tells_both_errors_and_simulate_takes_what_it_wrote(tmp_path) -> None:
    profile_path, spec_path, out = tmp_path / "profile.json", tmp_path / "spec.yaml", tmp_path / "calibration.json"
    profile().save(profile_path)
    save_deployment(DEPLOYMENT, spec_path)
    sources = Sources.of("paretune/small", profile_path=profile_path)
    steps = tmp_path / "steps.jsonl"
    steps.write_text("".join(json.dumps(vars(step)) + "\n" for step in logged()))
    common = ["--spec", str(spec_path), "--profile", str(profile_path)]
    done = CliRunner().invoke(cli, ["calibrate", "--from", str(steps), *common, "-o", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "before: median" in done.output
    assert Calibration.load(out).source == sources.digest
    log = tmp_path / "log.jsonl"
    lines = [{"timestamp": 1000 * i, "input_length": 100, "output_length": 20, "hash_ids": [i]} for i in range(30)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain = ["simulate", str(log), *common, "--json"]
    usual = json.loads(CliRunner().invoke(cli, plain, catch_exceptions=False).stdout)
    slower = json.loads(CliRunner().invoke(cli, [*plain, "--calibration", str(out)], catch_exceptions=False).stdout)
    ratio = slower["data"]["summary"]["values"]["tpot"]["p50"] / usual["data"]["summary"]["values"]["tpot"]["p50"]
    assert 1.3 < ratio < 3.0


def test_a_request_log_is_read_in_the_order_of_its_times(tmp_path) -> None:
    lines = [
        {
            "created": 100.0 + i,
            "model": "m",
            "usage": {"prompt_tokens": 10 + i, "completion_tokens": 5},
            "timings": {"ttft_s": 0.1 * (i + 1), "e2e_s": 1.0 + i},
        }
        for i in (2, 0, 1)
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_recorded(path)
    assert isinstance(found, RecordedRun)
    assert found.trace.input_tokens.tolist() == [10, 11, 12]
    assert found.ttft_s.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert found.tpot_s.tolist() == pytest.approx([(1 + i - 0.1 * (i + 1)) / 4 for i in range(3)])


@pytest.mark.parametrize("content", [b"", b"{}\n", b"nonsense\n", b"[1]\n", b'{"created": 1, "timings": null}\n'])
def test_what_is_neither_kind_is_refused(tmp_path, content: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadProfile) as raised:
        read_recorded(path)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("damaged", [b'{"replica": 0, "num_tok', b"[1]", b'{"replica": 0}', b"\xff\xfe"])
def test_a_damaged_step_is_refused_by_its_line(tmp_path, damaged: bytes) -> None:
    path = tmp_path / "steps.jsonl"
    lines = [json.dumps(vars(step)).encode() for step in logged()[:3]]
    path.write_bytes(b"\n".join([*lines, damaged, *lines]))
    with pytest.raises(BadProfile) as raised:
        read_recorded(path)
    assert raised.value.where == f"{path}:4"


def test_a_damaged_calibration_is_refused(tmp_path) -> None:
    path = tmp_path / "calibration.json"
    taken(logged()).save(path)
    assert Calibration.load(path) == taken(logged()).model_copy(
        update={"created_at": Calibration.load(path).created_at}
    )
    for content in ("{", "[]", "{}", path.read_text().replace('"step_s": ', '"step_s": -1, "x": ')):
        path.write_text(content)
        with pytest.raises(BadProfile):
            Calibration.load(path)


@pytest.mark.parametrize("eager", [False, True])
def test_recorded_steps_of_a_gpu_are_nearer_to_the_data_sheet_after_calibrating(eager: bool) -> None:
    results = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
    recorded = json.loads((results / "gpu_steps.json").read_text())
    rows = [dict(zip(recorded["columns"], row, strict=True)) for row in recorded["steps"]]
    steps = [
        LoggedStep(replica=0, started_s=float(i), **{k: v for k, v in row.items() if k != "eager"})
        for i, row in enumerate(rows)
        if bool(row["eager"]) == eager
    ]
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, **recorded["model"]}
    pool = Pool(
        accelerator="H200", max_model_len=4096, max_num_seqs=128, max_num_batched_tokens=4096, num_kv_blocks=16640,
        enforce_eager=eager, enable_prefix_caching=False,
    )  # fmt: skip
    sheet = step_tables(accelerator("H200"), ModelShape.from_config(config), pool)
    deployed = Deployment(model="random", pools=(pool,))
    found = calibrate(steps, sheet, deployed, recorded_in="gpu_steps.json", source="x", source_name="data sheet")
    before, after = found.before["step"], found.after["step"]
    assert after.median < before.median / 2
    assert after.p90 < before.p90
