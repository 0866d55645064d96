"""The real engine and the real server: measured into a profile, replayed, calibrated, and gone afterwards."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from paretune.kernels.tiles import Tile, TileTable
from paretune.profiler import measure as measure_module
from paretune.profiler.calibration import calibrate_serving, calibration_trace, read_step_log
from paretune.profiler.http_stream import Stream
from paretune.profiler.live import ServerFailed, live_server, measure_live
from paretune.profiler.machine import profile_machine
from paretune.profiler.measure import MeasureFailed, measure, possible_configurations
from paretune.profiler.measure_worker import Driver
from paretune.profiler.measured_step import bound_tables
from paretune.profiler.profile import Key, Profile
from paretune.profiler.replay import ReplayResult, replay, request_times
from paretune.profiler.step_time import composed_time_s, scaled
from paretune.profiler.tables import step_tables
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.random_model import write_random_model
from paretune.runtime.small_model import MODEL_DIR
from paretune.runtime.spec import Deployment, Pool
from paretune.traces import read
from paretune.traces.trace import Trace

KEY = Key(1, 1, 1, "bf16", "bf16")
TILES = TileTable(((("linear", "bf16", 16), Tile("linear", "torch")),))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(
        tmp_path_factory.mktemp("models") / "tiny", vocab_size=512, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip


@pytest.fixture(scope="module")
def profile(model_dir: Path) -> Profile:
    told: list[float] = []
    found = measure(
        str(model_dir), [KEY], seconds_per_configuration=1.0, tiles=lambda key: TILES, max_num_seqs=16,
        max_num_batched_tokens=256, max_model_len=512, progress=lambda what, share: told.append(share),
        command="a test",
    )  # fmt: skip
    assert told == sorted(told)
    return found


def deployment(model_dir: Path, **changes: object) -> Deployment:
    plain = {"max_num_seqs": 16, "max_num_batched_tokens": 256, "max_model_len": 512, "num_kv_blocks": 256}
    return Deployment(model=str(model_dir), pools=(Pool(**{**plain, **changes}),))


def test_a_profile_holds_whole_steps_operators_and_peaks(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    configuration = profile.configurations[0]
    assert configuration.key == KEY
    assert configuration.tiles == TILES
    steps = configuration.steps
    assert any(s.prefill_pairs == 0 and s.num_rows == 16 for s in steps)  # a full decode batch
    assert any(s.num_rows == 1 and s.num_tokens >= 128 for s in steps)  # a prompt
    assert any(s.decode_context > 0 and s.prefill_pairs > 0 for s in steps)  # both in one
    assert {point.backend for point in configuration.operators if point.operator == "linear"} >= {"torch"}
    assert {point.operator for point in configuration.operators} == {"linear", "decode_attention", "prefill_attention"}
    assert set(profile.peaks[0].flops_per_s) >= {"fp32", "bf16", "int8"}
    assert profile.versions.keys() >= {"python", "torch", "numba", "paretune"}


@pytest.mark.parametrize("max_model_len", [32, 64])
def test_short_contexts_are_measured_with_what_fits_into_them(model_dir: Path, max_model_len: int) -> None:
    driver = Driver(deployment(model_dir, max_model_len=max_model_len), model_dir)
    records = [record for _, run in driver.scenarios() for _, record in run()]
    assert max(record.num_tokens for record in records) > 16
    assert not driver.engine.has_work


def test_tables_of_a_real_profile_never_beat_its_peaks(profile: Profile, model_dir: Path) -> None:
    shape = ModelShape.load(model_dir)
    pool = deployment(model_dir).pool
    tables = step_tables(profile, shape, pool).tables
    bound = bound_tables(shape, pool, profile.peaks_of(1))
    for step in profile.configurations[0].steps:
        composition = (step.num_tokens, step.num_rows, step.num_samples, step.decode_context, step.prefill_pairs)
        assert composed_time_s(tables, *composition) >= composed_time_s(bound, *composition) * (1 - 1e-9)


def test_every_split_of_the_cores_is_a_configuration() -> None:
    found = {key[:3] for key in possible_configurations(2, weight_dtypes=("bf16",))}
    assert found == {(1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 2)}
    shape = replace(ModelShape.load(MODEL_DIR), num_heads=6, num_kv_heads=1)
    assert {key.tensor_parallel_size for key in possible_configurations(4, shape=shape)} == {1, 2}
    assert len(possible_configurations(2)) == 3 * 4
    # where the cores are no power of two, replicas on all of them are measured too
    six = {key[:3] for key in possible_configurations(6, weight_dtypes=("bf16",))}
    assert {(1, 1, 6), (1, 2, 3), (2, 1, 3), (2, 2, 1)} <= six
    assert all(tp * threads * replicas <= 6 for tp, threads, replicas in six)
    staged = possible_configurations(2, weight_dtypes=("bf16",), pipeline_parallel_sizes=(1, 2))
    assert set(staged) - set(possible_configurations(2)) == {Key(1, 1, 1, "bf16", "bf16", 2)}


def test_a_trace_is_replayed_against_the_real_server_to_the_token(model_dir: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    log = Trace(np.sort(rng.uniform(0, 1.5, 12)), rng.integers(4, 60, 12), rng.integers(1, 40, 12))
    result = measure_live(
        deployment(model_dir), log, k=5, step_log=tmp_path / "steps.jsonl", request_log=tmp_path / "requests.jsonl"
    )
    assert result.errors == ()
    assert result.times.finished.all()
    assert (result.times.output_tokens == log.output_tokens).all()
    assert result.server["tokens_per_event"] == 1.0
    steps = read_step_log(tmp_path / "steps.jsonl", result.started_s)
    # every token of every request was computed once: the prompt's, and all that came but the last
    assert sum(s.num_tokens for s in steps) == int((log.input_tokens + log.output_tokens - 1).sum())
    # the clocks agree: all steps lie between the first request and the last token
    end_s = result.started_s + np.nanmax(result.times.end_s)
    assert all(result.started_s <= s.started_s <= end_s for s in steps)
    recorded = read(tmp_path / "requests.jsonl")
    assert sorted(recorded.input_tokens.tolist()[-12:]) == sorted(log.input_tokens.tolist())


def test_serving_is_calibrated_on_the_real_server(profile: Profile, model_dir: Path) -> None:
    found = calibrate_serving(profile, deployment(model_dir), seconds=2.0)
    serving = found.serving[0]
    assert (serving.cores, serving.ranks) == (1, 1)
    for found_s in (serving.to_scheduler_s, serving.to_client_s):
        assert 0 < found_s < math.inf
    assert sum(point.count for point in serving.points) == serving.steps
    modeled = step_tables(found, ModelShape.load(model_dir), deployment(model_dir).pool)
    assert modeled.tables.request_s.tolist() == [serving.to_scheduler_s, serving.to_client_s]


def test_the_load_lasts_as_long_as_it_was_told_however_fast_the_server_is(profile: Profile, model_dir: Path) -> None:
    modeled = step_tables(profile, ModelShape.load(model_dir), deployment(model_dir).pool)
    for factor in (1.0, 0.01):
        tables, counts = scaled(modeled.tables, factor), []
        for seconds in (10.0, 40.0):
            log = calibration_trace(tables, deployment(model_dir), seconds=seconds, seed=0)
            loaded_s = log.arrival_s[20:] - log.arrival_s[20]
            assert 0.8 * seconds < loaded_s[-1] <= seconds
            counts.append(len(loaded_s))
        # as many a second, whatever the seconds are
        assert counts[1] == pytest.approx(4 * counts[0], rel=0.3)


def test_a_server_that_ends_while_it_is_measured_is_no_measurement(model_dir: Path) -> None:
    def killed(asked_again: bool) -> None:
        with live_server(deployment(model_dir)) as server:
            os.kill(server.pid, signal.SIGKILL)
            while alive(psutil.Process(server.pid)):
                time.sleep(0.01)
            if asked_again:
                log = Trace(np.zeros(2), np.full(2, 8), np.full(2, 2))
                replay(log, server.url, model=server.model, token_ids=np.arange(9, 99, dtype=np.int32))

    for asked_again in (False, True):
        with pytest.raises(ServerFailed, match=r"ended with exit code -9: .*on http://"):
            killed(asked_again)


def test_a_calibration_whose_requests_fail_says_so_and_gives_none(
    profile: Profile, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = ReplayResult(
        request_times([Stream(b"")], np.zeros(1), 0.0, 30)[0], {}, ("request 0: HTTP 500: why?",), {}, 0.0, 0.0
    )
    monkeypatch.setattr("paretune.profiler.calibration.measure_live", lambda *_, **__: failed)
    with pytest.raises(ServerFailed, match="1 of 1 requests failed, the first one: request 0: HTTP 500: why"):
        calibrate_serving(profile, deployment(model_dir), seconds=2.0)


def test_steps_beside_a_neighbor_that_has_ended_are_no_measurement(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = measure_module._run

    def kill_the_neighbor_first(task: dict[str, Any], environment: dict[str, str]) -> Any:
        if task["kind"] == "steps":
            neighbor = next(each for each in psutil.Process().children() if "measure_worker" in str(each.cmdline()))
            neighbor.kill()
        return real(task, environment)

    monkeypatch.setattr(measure_module, "_run", kill_the_neighbor_first)
    with pytest.raises(MeasureFailed, match="exit code -9"):
        measure(
            str(model_dir), [KEY._replace(replicas=2)], seconds_per_configuration=0.5, max_num_seqs=4,
            max_num_batched_tokens=64, max_model_len=512, command="a test",
        )  # fmt: skip


def test_a_machine_s_profile_has_a_live_server_for_each_of_its_precisions(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paretune.profiler.machine._LEAST_LOAD_S", 2.0)
    told: list[tuple[float, str]] = []
    found = profile_machine(
        str(model_dir), weight_dtypes=("bf16", "int8"), seconds_per_configuration=0.5, max_model_len=512, cores=1,
        progress=lambda share, what: told.append((share, what)),
    )  # fmt: skip
    assert [found.served_by(live).served_as for live in found.serving] == [(1, 1, "bf16"), (1, 1, "int8")]
    assert [what for _, what in told][-2:] == [
        "live server 1 of 2, TP 1 x 1 threads bf16/bf16",
        "live server 2 of 2, TP 1 x 1 threads int8/bf16",
    ]
    assert told == sorted(told, key=lambda each: each[0])
    for weight_dtype in ("bf16", "int8"):
        pool = deployment(model_dir, weight_dtype=weight_dtype).pool
        assert not any("HTTP" in note for note in step_tables(found, ModelShape.load(model_dir), pool).not_modeled)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_no_process_is_left_when_the_block_ends(model_dir: Path) -> None:
    with live_server(deployment(model_dir)) as server:
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        assert len(family) >= 2
    assert [process for process in family if alive(process)] == []


def test_no_process_is_left_when_the_measuring_process_is_killed(model_dir: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from paretune.profiler.live import live_server\n"
        "from paretune.runtime.spec import load_deployment\n"
        "with live_server(load_deployment(sys.argv[1])) as server:\n"
        "    Path(sys.argv[2]).write_text(str(server.pid))\n"
        "    time.sleep(100)\n"
    )
    from paretune.runtime.spec import save_deployment

    save_deployment(deployment(model_dir), tmp_path / "spec.yaml")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "spec.yaml"), str(tmp_path / "pid")])
    deadline = time.monotonic() + 120
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    server = psutil.Process(int((tmp_path / "pid").read_text()))
    family = [server, *server.children(recursive=True)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=60)
    assert [each for each in family if alive(each)] == []


def test_a_server_that_cannot_start_says_why(model_dir: Path) -> None:
    with pytest.raises(ServerFailed) as raised, live_server(deployment(model_dir, accelerator="H100")):
        pass
    assert "accelerator" in str(raised.value)
