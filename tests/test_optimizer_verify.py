"""Predicted against measured: what counts as kept, and what a verification file may be used for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from paretune.optimizer.capacity import BadQuestion, k_of
from paretune.optimizer.verify import asked_of, measured_summary, verify
from paretune.runtime.spec import BadSpec, Deployment, Pool, Prediction, Provenance
from paretune.traces.metrics import TTFT, Metric, RequestTimes, Target
from paretune.traces.trace import Trace

LATE_S = {"p50": 0.001, "p95": 0.002, "max": 0.003}


def trace(n: int = 20) -> Trace:
    return Trace(np.arange(n, dtype=np.float64), np.full(n, 8), np.full(n, 40))


def times(log: Trace, ttft_s: float, *, finished: bool = True) -> RequestTimes:
    n = len(log)
    arrival_s = log.arrival_s
    return RequestTimes(
        scheduled_s=arrival_s,
        sent_s=arrival_s,
        first_token_s=arrival_s + ttft_s,
        kth_token_s=arrival_s + 2 * ttft_s,
        end_s=arrival_s + 3 * ttft_s,
        output_tokens=np.full(n, 40),
        finished=np.full(n, finished),
        k=30,
    )


def spec(low: float, high: float, log: Trace | None = None, rate: float = 1.0) -> Deployment:
    provenance = None
    if log is not None:
        provenance = Provenance(
            paretune_version="0", created_at="2026-11-23", trace_source="memory", trace_digest=log.digest(),
            trace_fingerprint={}, profile="p", profile_digest="d", measured=True, prices="b", prices_as_of="2026-01-01",
            study="s", seed=0, rate=rate,
        )  # fmt: skip
    predicted = (Prediction(metric="ttft", percentile=95, value=(low + high) / 2, low=low, high=high),)
    return Deployment(pools=(Pool(),), predicted=predicted, provenance=provenance)


def test_a_measured_value_lies_inside_its_interval_or_not() -> None:
    log = trace()
    close = verify(spec(0.1, 0.3), log, times(log, 0.2), schedule_error_s=LATE_S)
    far = verify(spec(0.1, 0.3), log, times(log, 0.5), schedule_error_s=LATE_S)
    assert [row.inside for row in (*close.rows, *far.rows)] == [True, False]
    assert far.rows[0].error == pytest.approx(0.2 / 0.5 - 1)


def test_a_missed_target_fails_and_a_met_one_passes() -> None:
    log = trace()
    asked = [Target(TTFT, 95, 0.3)]
    assert verify(spec(0, 1), log, times(log, 0.2), targets=asked, schedule_error_s=LATE_S).passed
    assert not verify(spec(0, 1), log, times(log, 0.4), targets=asked, schedule_error_s=LATE_S).passed


def test_without_targets_every_request_must_finish() -> None:
    log = trace()
    assert verify(spec(0, 1), log, times(log, 0.2), schedule_error_s=LATE_S).passed
    assert not verify(spec(0, 1), log, times(log, 0.2, finished=False), schedule_error_s=LATE_S).passed


def test_another_log_than_the_one_that_was_tuned_on_is_noticed() -> None:
    log, other = trace(), trace(21)
    assert verify(spec(0, 1, log), log, times(log, 0.2), schedule_error_s=LATE_S).same_trace is True
    assert verify(spec(0, 1, log), other, times(other, 0.2), schedule_error_s=LATE_S).same_trace is False
    assert verify(spec(0, 1), log, times(log, 0.2), schedule_error_s=LATE_S).same_trace is None


def test_a_verification_file_speaks_of_its_own_deployment_only(tmp_path: Path) -> None:
    log, path = trace(), tmp_path / "verification.json"
    found = verify(spec(0, 1), log, times(log, 0.2), schedule_error_s=LATE_S)
    found.save(path)
    assert measured_summary(path, spec(0, 1)).value("ttft", 95) == pytest.approx(0.2)
    assert json.loads(path.read_text())["rows"][0]["inside"] is True
    with pytest.raises(BadSpec):
        measured_summary(path, Deployment(pools=(Pool(max_num_seqs=7),)))
    path.write_text("{}")
    with pytest.raises(BadSpec):
        measured_summary(path, spec(0, 1))


def test_a_replay_runs_at_the_rate_and_k_that_the_spec_speaks_of() -> None:
    log = trace()
    assert asked_of(spec(0, 1, log, rate=2.5), log) == (30, 2.5)
    assert asked_of(spec(0, 1), log, [Target(Metric("ttf", 10), 95, 1.0)]) == (10, 1.0)


def test_two_different_k_in_one_run_are_refused() -> None:
    assert k_of([TTFT, Metric("ttf", 1)]) == 30
    with pytest.raises(BadQuestion):
        k_of([Metric("ttf", 10), Metric("ttf", 30)])


@pytest.mark.parametrize("of_the_spec", [False, True])
def test_a_target_that_governs_no_request_is_refused_before_the_replay(of_the_spec: bool) -> None:
    log, promised, mistyped = trace(), spec(0, 1), "vioce/ttft:p95<=300ms"
    if of_the_spec:
        promised = promised.model_copy(update={"targets": (mistyped,)})
    with pytest.raises(BadQuestion) as refusal:
        asked_of(promised, log, [] if of_the_spec else [Target.parse(mistyped)])
    assert (refusal.value.where, refusal.value.exit_code) == (f"target {mistyped}", 2)


def test_goodput_is_unknown_without_targets() -> None:
    log = trace()
    assert math.isnan(verify(spec(0, 1), log, times(log, 0.2), schedule_error_s=LATE_S).goodput_per_s)
