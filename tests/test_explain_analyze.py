"""Predicted beside measured: a recorded run and its step log, taken apart by the same definitions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paretune.profiler.analyze import STEPS_FILE, BadRun, RecordedRun, analyze, save_run
from paretune.profiler.calibration import LoggedStep
from paretune.profiler.explain import Explained, Explanation
from paretune.profiler.live import measure_live
from paretune.profiler.profile import BadProfile
from paretune.profiler.replay import ReplayResult
from paretune.profiler.simulator import simulate
from paretune.profiler.step_time import StepTables, composed_time_s
from paretune.runtime.random_model import write_random_model
from paretune.runtime.spec import Deployment, Pool
from paretune.traces.metrics import RequestTimes
from paretune.traces.trace import Trace

from .test_simulator import pool, tables

LIMITS = pool()
TABLES = tables(LIMITS)


def predicted(*asked: tuple[str, float]) -> Explanation:
    """Of nothing: only what is asked counts here."""
    result = simulate(Trace([0.0], [4], [2]), LIMITS, TABLES)
    return Explanation(tuple(Explained(name, p, 1.0, (), 0, 1.0) for name, p in asked), (), (), 0.0, result)


def step(started_s: float, seconds: float, rows: list[tuple[int, int, int]], samples: int) -> LoggedStep:
    """rows: request, start, tokens."""
    tokens = [own for _, _, own in rows]
    context = sum(start + 1.0 for _, start, own in rows if own == 1)
    pairs = sum(own * (start + 0.5 * (own + 1)) for _, start, own in rows if own > 1)
    requests, starts = [r for r, _, _ in rows], [s for _, s, _ in rows]
    return LoggedStep(0, sum(tokens), len(rows), samples, context, pairs, seconds, started_s, requests, starts, tokens)


def two_requests() -> tuple[Trace, RecordedRun]:
    """A comes first and decodes while B's prompt is computed; the server numbers them 7 and 8."""
    steps = (
        step(100.10, 0.02, [(7, 0, 20)], 1),  # A's prompt
        step(100.20, 0.04, [(7, 20, 1), (8, 0, 30)], 2),  # A's second token beside B's prompt
        step(100.24, 0.01, [(8, 30, 1)], 1),  # B's second
    )
    first_s, end_s = np.array([0.13, 0.25]), np.array([0.25, 0.26])
    times = RequestTimes(
        np.array([0.0, 0.15]), np.array([0.0, 0.15]), first_s, np.full(2, np.nan), end_s, np.array([2, 2]),
        np.ones(2, np.bool_), 30,
    )  # fmt: skip
    return Trace([0.0, 0.15], [20, 30], [2, 2]), RecordedRun(times, 100.0, 1.0, steps)


def causes(found: Any, name: str) -> dict[str, float]:
    return {each.name.split(" (")[0]: each.measured_s for each in found.parts[name]}


def test_a_measured_run_is_waiting_steps_and_the_way_back() -> None:
    requests, run = two_requests()
    found = analyze(run, requests, TABLES, predicted(("e2e", 1.0), ("ttft", 99.0)))
    # the percentiles lie between the two requests: their mean, scaled
    both = composed_time_s(TABLES, 31, 2, 2, 21.0, 30 * 31 / 2)
    a_alone = composed_time_s(TABLES, 1, 1, 1, 21.0, 0.0)
    b_alone = composed_time_s(TABLES, 30, 1, 1, 0.0, 465.0)
    a = {
        "before its first step": 0.10,
        "own prefill": 0.02,
        "between its steps": 0.08,
        "own decode": 0.04 * a_alone / both,
        "behind others' prefills": 0.04 * (both - a_alone) / both,
        "to the client": 0.01,
    }
    b = {
        "before its first step": 0.05,
        "own prefill": 0.04 * b_alone / both,
        "own decode": 0.01,
        "others' decodes in the batch": 0.04 * (both - b_alone) / both,
        "to the client": 0.01,
    }
    assert sum(a.values()) == pytest.approx(0.25)
    assert sum(b.values()) == pytest.approx(0.11)
    mean = {name: (a.get(name, 0.0) + b.get(name, 0.0)) / 2 for name in {**a, **b}}
    value = found.values["e2e:p1"]
    scaled = {name: seconds * value / sum(mean.values()) for name, seconds in mean.items()}
    assert causes(found, "e2e:p1") == pytest.approx(scaled)
    assert sum(causes(found, "ttft:p99").values()) == pytest.approx(found.values["ttft:p99"])


def test_steps_are_compared_by_what_the_model_says_of_their_compositions() -> None:
    requests, run = two_requests()
    steps = {each.name: each for each in analyze(run, requests, TABLES, predicted()).steps}
    assert (steps["with prompts"].steps, steps["decoding alone"].steps) == (2, 1)
    assert steps["decoding alone"].predicted_s == pytest.approx(composed_time_s(TABLES, 1, 1, 1, 31.0, 0.0))
    assert steps["all"].measured_s == pytest.approx(0.07)


def test_steps_of_another_replay_are_refused() -> None:
    requests, run = two_requests()
    longer = Trace(requests.arrival_s, requests.input_tokens + 5, requests.output_tokens)
    with pytest.raises(BadRun, match="0 of 2 requests"):
        analyze(run, longer, TABLES, predicted())


@pytest.mark.parametrize(
    ("rows", "samples", "name", "limit"),
    [
        ([(9, 0, 129)], 1, "num_tokens", "128, max_num_batched_tokens"),
        ([(9 + i, 5, 1) for i in range(9)], 8, "num_rows", "8, max_num_seqs"),
        ([(9, 5, 9)], 9, "num_samples", "num_speculative_tokens"),
    ],
)
def test_steps_that_are_larger_than_the_spec_allows_are_refused_by_the_limit(
    rows: list[tuple[int, int, int]], samples: int, name: str, limit: str
) -> None:
    requests, run = two_requests()
    larger = replace(run, steps=(*run.steps, step(100.3, 0.1, rows, samples)))
    with pytest.raises(BadRun) as raised:
        analyze(larger, requests, TABLES, predicted())
    assert raised.value.where == f"{STEPS_FILE}: {name}"
    assert limit in raised.value.allowed


def test_a_step_log_that_was_cut_off_is_refused_by_its_line(tmp_path: Path) -> None:
    requests, run = two_requests()
    save_run(tmp_path, requests, ReplayResult(run.times, {}, (), {}, run.started_s, 0.0), 1.0)
    log = tmp_path / STEPS_FILE
    log.write_text("".join(json.dumps(vars(each)) + "\n" for each in run.steps)[:-20])
    with pytest.raises(BadProfile) as raised:
        RecordedRun.load(tmp_path, requests)
    assert raised.value.where == f"{log}:3"


def test_a_recorded_run_comes_back_whole_and_only_for_its_trace(tmp_path: Path) -> None:
    requests, run = two_requests()
    result = ReplayResult(run.times, {}, (), {}, run.started_s, 0.0)
    save_run(tmp_path, requests, result, 2.0)
    back = RecordedRun.load(tmp_path, requests)
    assert (back.rate, back.started_s, back.steps) == (2.0, 100.0, ())
    np.testing.assert_array_equal(back.times.end_s, run.times.end_s)
    assert np.isnan(back.times.kth_token_s).all()
    found = analyze(back, requests, TABLES, predicted(("ttft", 50.0)))
    assert found.parts == {}
    assert "not known" in found.notes[0]
    with pytest.raises(BadRun, match="the trace that was given"):
        RecordedRun.load(tmp_path, Trace([0.0], [1], [1]))
    with pytest.raises(BadRun, match="no such file"):
        RecordedRun.load(tmp_path / "nowhere", requests)
    (tmp_path / "replay.json").write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(BadRun, match="a file that paretune wrote"):
        RecordedRun.load(tmp_path, requests)


def test_a_real_server_says_who_was_in_its_steps_and_the_parts_add_up(tmp_path: Path) -> None:
    model = write_random_model(
        tmp_path / "tiny", vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    limits = Pool(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=512, num_kv_blocks=256)
    rng = np.random.default_rng(0)
    n = 40
    requests = Trace(np.sort(rng.uniform(0.0, 1.5, n)), rng.integers(5, 150, n), rng.integers(1, 20, n))
    result = measure_live(Deployment(model=str(model), pools=(limits,)), requests, step_log=tmp_path / STEPS_FILE)
    save_run(tmp_path, requests, result, 1.0)
    run = RecordedRun.load(tmp_path, requests)
    whole: StepTables = tables(limits)
    asked = (("ttft", 50.0), ("ttft", 95.0), ("e2e", 95.0), ("tpot", 50.0))
    found = analyze(run, requests, whole, predicted(*asked))
    assert set(found.parts) == {f"{name}:p{p:g}" for name, p in asked}
    for name, parts in found.parts.items():
        assert sum(each.measured_s for each in parts) == pytest.approx(found.values[name])
        # a step's pause is counted to it, and its last token does not wait for that
        assert min(each.measured_s for each in parts) > -3e-3
    assert causes(found, "ttft:p95")["own prefill"] > 0
