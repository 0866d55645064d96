"""traces/describe.py: figures of a trace, against examples worked by hand and processes of known burstiness."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from paretune.traces import Target, Trace, fingerprint, read, sample_path, scale, statistics
from paretune.traces.columns import Labels, PrefixHashes
from paretune.traces.describe import WindowCounts, length_design_effect, reused_tokens


def by_hand() -> Trace:
    return Trace(
        arrival_s=np.array([0.0, 1.0, 1.0, 4.0, 30.0]),
        input_tokens=np.array([100, 200, 300, 400, 1000]),
        output_tokens=np.array([10, 20, 30, 40, 400]),
        app=Labels.of(["chat", "voice", "chat", "chat", None]),
        adapter=Labels.of(["a", None, "b", "b", None]),
        session=Labels.of(["s", "s", "t", None, None]),
        targets=(Target.parse("voice/ttf30:p95<=600ms"),),
    )


def poisson(n: int, rate_per_s: float, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    return Trace(np.cumsum(rng.exponential(1 / rate_per_s, n)), np.full(n, 100), np.full(n, 10))


def test_statistics_of_five_requests_worked_by_hand():
    found = statistics(by_hand())
    total = found.total
    assert (total.requests, found.duration_s, total.rate_per_s) == (5, 30.0, 4 / 30)
    assert (total.input.mean, total.input.p50, total.input.max) == (400.0, 300.0, 1000)
    assert total.input.p90 == pytest.approx(400 + 0.6 * 600)
    assert total.input_output_ratio == 4.0
    assert total.interarrival_cv == pytest.approx(np.std([1, 0, 3, 26]) / 7.5)
    assert (total.sessions, total.adapters) == (2, (("b", 2), ("a", 1)))
    assert found.targets == ("voice/ttf30:p95<=600ms",)
    assert total.prefix_reuse is None


def test_applications_come_largest_first_and_add_up_to_the_whole():
    found = statistics(by_hand())
    assert [(app.app, app.requests) for app in found.apps] == [("chat", 3), (None, 1), ("voice", 1)]
    assert sum(app.rate_per_s for app in found.apps) == pytest.approx(found.total.rate_per_s)
    assert sum(app.share for app in found.apps) == 1
    chat = found.apps[0]
    assert (chat.input.mean, chat.output.mean, chat.sessions) == (800 / 3, 80 / 3, 2)
    assert math.isnan(found.apps[1].interarrival_cv)


def test_the_index_of_dispersion_counts_whole_windows_from_the_first_arrival():
    # 1 s windows (30 of them in 30 s) hold 1, 2, 0, 0, 1, 0, ... requests; the one at 30 s ends the last window
    found = statistics(by_hand())
    assert found.dispersion_window_s == 1.0
    counts = np.array([1, 2, 0, 0, 1] + [0] * 25)
    assert found.total.dispersion == pytest.approx(counts.var(ddof=1) / counts.mean())


def test_a_poisson_process_has_cv_and_dispersion_of_one():
    found = statistics(poisson(20_000, 5.0))
    assert found.dispersion_window_s == 10.0
    assert found.total.interarrival_cv == pytest.approx(1, abs=0.03)
    assert found.total.dispersion == pytest.approx(1, abs=0.2)
    assert found.total.rate_per_s == pytest.approx(5, rel=0.03)


def test_batches_of_eight_have_eight_times_the_dispersion_of_a_poisson_process():
    base = poisson(5_000, 1.0)
    batched = Trace(np.repeat(base.arrival_s, 8), np.full(40_000, 100), np.full(40_000, 10))
    assert statistics(batched).total.dispersion == pytest.approx(8 * statistics(base).total.dispersion)


def test_a_clock_has_no_burstiness():
    found = statistics(Trace(np.arange(3001.0), np.full(3001, 1), np.full(3001, 1)))
    assert found.total.interarrival_cv == 0
    assert found.total.dispersion == 0


def test_windows_without_arrivals_count_and_cost_no_memory():
    dense = np.array([0, 3, 0, 0, 5, 1, 0, 2])
    sparse = WindowCounts(8, dense[dense > 0])
    assert sparse.dispersion == pytest.approx(dense.var(ddof=1) / dense.mean())
    assert WindowCounts(8, dense).dispersion_relative_error == pytest.approx(sparse.dispersion_relative_error)
    ages = Trace(np.array([0.0, 1.0, 9e11]), np.ones(3), np.ones(3))
    # 9e10 windows of 10 s: two arrivals in the first, and the third ends the last
    assert statistics(ages).total.dispersion == pytest.approx(2)


def test_requests_that_all_come_at_once_have_no_rate_and_no_dispersion():
    found = statistics(Trace(np.zeros(3), np.ones(3), np.ones(3)))
    assert found.total.rate_per_s == 0
    assert math.isnan(found.total.dispersion)
    json.dumps(fingerprint(Trace(np.zeros(3), np.ones(3), np.ones(3))), allow_nan=False)
    json.dumps(fingerprint(Trace(np.zeros(1), np.ones(1), np.ones(1))), allow_nan=False)


def test_reuse_counts_the_tokens_that_an_earlier_request_had():
    trace = Trace(
        arrival_s=np.arange(5.0),
        input_tokens=np.array([40, 40, 33, 8, 64]),
        output_tokens=np.ones(5),
        app=Labels.of(["a", "b", "b", "a", "a"]),
        # blocks of 16: 40 tokens are 16 + 16 + 8, and the partial block counts its 8
        prefix=PrefixHashes.of([[1, 2, 3], [1, 2, 3], [1, 5], [], [1, 5, 6, 7]], 16),
    )
    assert reused_tokens(trace).tolist() == [0, 40, 16, 0, 32]
    found = statistics(trace)
    assert found.total.prefix_reuse == pytest.approx(88 / 185)
    assert {app.app: app.prefix_reuse for app in found.apps} == {"a": 32 / 112, "b": 56 / 73}


def test_a_fingerprint_is_plain_json_and_the_same_for_the_same_trace():
    trace = read(sample_path())
    first = fingerprint(trace)
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    assert fingerprint(read(sample_path())) == first
    assert fingerprint(scale(trace, output_length=2)) != first
    assert len(json.dumps(first)) < 5_000


def test_the_design_effect_of_independent_lengths_is_about_one_and_of_runs_about_their_length():
    rng = np.random.default_rng(1)
    independent = rng.integers(1, 10_000, 40_000)
    effects = [length_design_effect(rng.permutation(independent)) for _ in range(20)]
    assert np.mean(effects) == pytest.approx(1, abs=0.35)
    runs = [length_design_effect(np.repeat(rng.integers(1, 10_000, 4_000), 10)) for _ in range(20)]
    assert np.mean(runs) == pytest.approx(10, rel=0.35)
    assert length_design_effect(np.full(1000, 7)) == 1


def test_the_error_of_a_dispersion_is_that_of_repeated_draws():
    rng = np.random.default_rng(2)
    draws = rng.poisson(20, size=(2000, 100))
    dispersions = draws.var(axis=1, ddof=1) / draws.mean(axis=1)
    errors = [WindowCounts(100, counts).dispersion_relative_error for counts in draws[:200]]
    assert np.mean(errors) == pytest.approx(dispersions.std() / dispersions.mean(), rel=0.15)
