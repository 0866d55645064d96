"""traces/metrics.py: one definition of every latency and cost, against examples worked by hand."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.traces.metrics import (
    E2E,
    HOURS_PER_MONTH,
    ITL,
    TPOT,
    TTFT,
    BadTarget,
    Metric,
    RequestTimes,
    Summary,
    Target,
    goodput,
    meets,
    percentile,
    sizing_cost_usd_per_hour,
    summarize,
    usd_per_million_tokens,
    usd_per_month,
    violations,
)
from paretune.traces.trace import Labels, Trace

NAN = math.nan


def by_hand() -> RequestTimes:
    """Four requests, k = 3. Tokens at: 1.5 2 3 5 | 2 4 (short of k) | 3.25 (one token) | 4 5 6, then cut off."""
    return RequestTimes(
        scheduled_s=np.array([1.0, 1.0, 3.0, 3.0]),
        sent_s=np.array([1.25, 1.0, 3.0, 3.5]),
        first_token_s=np.array([1.5, 2.0, 3.25, 4.0]),
        kth_token_s=np.array([3.0, NAN, NAN, 6.0]),
        end_s=np.array([5.0, 4.0, 3.25, NAN]),
        output_tokens=np.array([4, 2, 1, 3]),
        finished=np.array([True, True, True, False]),
        k=3,
        token_gap_s=np.array([0.5, 1.0, 2.0, 2.0, 1.0, 1.0]),
        gap_offsets=np.array([0, 3, 4, 4, 6]),
    )


def answers(token_times: list[list[float]], scheduled_s: list[float], k: int) -> RequestTimes:
    """Finished answers whose tokens came at the given times after their schedule."""
    tokens = [np.cumsum(times) + at for times, at in zip(token_times, scheduled_s)]
    return RequestTimes(
        scheduled_s=np.array(scheduled_s),
        sent_s=np.array(scheduled_s),
        first_token_s=np.array([t[0] for t in tokens]),
        kth_token_s=np.array([t[k - 1] if len(t) >= k else NAN for t in tokens]),
        end_s=np.array([t[-1] for t in tokens]),
        output_tokens=np.array([len(t) for t in tokens]),
        finished=np.ones(len(tokens), dtype=bool),
        k=k,
    )


gaps = st.lists(st.floats(1e-3, 10), min_size=1, max_size=12)
runs = st.lists(st.tuples(gaps, st.floats(0, 100)), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (TTFT, [0.5, 1.0, 0.25, 1.0]),
        (Metric("ttf", 1), [0.5, 1.0, 0.25, 1.0]),
        (Metric("ttf", 3), [2.0, 3.0, 0.25, 3.0]),
        (TPOT, [3.5 / 3, 2.0, NAN, NAN]),
        (E2E, [4.0, 3.0, 0.25, NAN]),
        (ITL, [2.0, 2.0, NAN, 1.0]),
    ],
)
def test_metrics_of_four_requests_worked_by_hand(metric, expected):
    np.testing.assert_allclose(by_hand().values(metric), expected)


def test_ttft_counts_from_the_schedule_and_from_the_send_stands_beside_it():
    times = by_hand()
    np.testing.assert_allclose(times.values(TTFT) - times.ttft_from_send(), times.sent_s - times.scheduled_s)
    np.testing.assert_allclose(times.ttft_from_send(), [0.25, 1.0, 0.25, 0.5])


def test_itl_percentiles_pool_the_gaps_of_all_requests():
    np.testing.assert_allclose(by_hand().sample(ITL), [0.5, 1.0, 2.0, 2.0, 1.0, 1.0])
    np.testing.assert_allclose(by_hand().sample(ITL, np.array([False, True, True, True])), [2.0, 1.0, 1.0])


@given(runs)
def test_ttf_1_is_ttft_and_ttf_k_never_falls_with_k_nor_passes_completion(run):
    token_times, scheduled_s = [each[0] for each in run], [each[1] for each in run]
    before = answers(token_times, scheduled_s, 1).values(Metric("ttf", 1))
    np.testing.assert_array_equal(before, answers(token_times, scheduled_s, 5).values(TTFT))
    for k in range(2, 14):
        times = answers(token_times, scheduled_s, k)
        now = times.values(Metric("ttf", k))
        assert (now >= before).all()
        assert (now <= times.values(E2E)).all()
        before = now
    np.testing.assert_array_equal(before, times.values(E2E))


@given(runs)
def test_ttft_and_the_tokens_after_it_add_up_to_e2e(run):
    times = answers([each[0] for each in run], [each[1] for each in run], 2)
    several = times.output_tokens > 1
    rebuilt = times.values(TTFT) + np.nan_to_num(times.values(TPOT)) * (times.output_tokens - 1)
    np.testing.assert_allclose(rebuilt, times.values(E2E), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(np.isnan(times.values(TPOT)), ~several)


def test_a_k_that_was_not_recorded_is_refused():
    with pytest.raises(ValueError, match="ttf30 was not recorded"):
        by_hand().values(Metric("ttf", 30))
    with pytest.raises(ValueError, match="itl was not recorded"):
        answers([[1.0]], [0.0], 1).sample(ITL)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_agree_with_numpy(values, p):
    assert percentile(values, p) == pytest.approx(np.percentile(values, p), rel=1e-9, abs=1e-9)
    assert percentile([*values, NAN], p) == percentile(values, p)


def test_percentiles_take_infinity_as_a_value_and_nothing_as_nan():
    assert percentile([1.0, 2.0, math.inf], 50) == 2.0
    assert percentile([1.0, 2.0, math.inf], 51) == math.inf
    assert percentile([math.inf, math.inf], 95) == math.inf
    assert math.isnan(percentile([NAN], 50))


def test_a_summary_counts_what_its_percentiles_leave_out():
    summary = summarize(by_hand())
    assert (summary.requests, summary.finished, summary.tpot_undefined) == (4, 3, 1)
    assert summary.short_of_k_share == pytest.approx(2 / 3)
    assert summary.duration_s == 4.0
    assert summary.output_tokens_per_s == 10 / 4
    assert summary.value("e2e", 50) == 3.0
    assert summary.value("e2e", "mean") == pytest.approx(7.25 / 3)
    assert summary.value(TPOT, 50) == pytest.approx((3.5 / 3 + 2) / 2)
    assert summary.value("ttft_from_send", 50) == pytest.approx(0.375)
    assert summary.value("itl", 50) == 1.0


def test_a_summary_of_some_rows_looks_at_those_alone():
    summary = summarize(by_hand(), np.array([False, True, True, False]))
    assert (summary.requests, summary.finished, summary.duration_s) == (2, 2, 3.0)
    assert summary.value("e2e", "mean") == pytest.approx(3.25 / 2)
    assert summary.value("itl", "mean") == 2.0


def test_a_summary_of_nothing_finished_has_no_percentiles_and_survives_json():
    times = by_hand()
    nothing = RequestTimes(*(np.full(4, NAN) for _ in range(5)), np.zeros(4, np.int64), np.zeros(4, bool), k=30)
    for summary in (summarize(times), summarize(nothing)):
        text = json.dumps(summary.to_dict(), allow_nan=False)
        back = Summary.from_dict(json.loads(text))
        assert json.dumps(back.to_dict()) == text
        assert list(back.values) == list(summary.values)
    assert math.isnan(summarize(nothing).value("ttf30", 95))
    assert summarize(nothing).output_tokens_per_s == 0


def test_an_unfinished_request_is_infinitely_late():
    times = by_hand()
    assert meets(times, Target(TTFT, 60, 1.0))
    assert not meets(times, Target(TTFT, 95, 1000.0))
    assert not meets(times, Target(ITL, 99, 1000.0))
    assert meets(times, Target(TTFT, 95, 1.0), rows=np.array([True, True, True, False]))


def test_a_target_over_nothing_holds():
    assert meets(by_hand(), Target(E2E, 95, 0.001), rows=np.zeros(4, dtype=bool))
    assert meets(by_hand(), Target(TPOT, 95, 0.001), rows=np.array([False, False, True, False]))


def voiced(targets: tuple[Target, ...], target: list[int] | None = None) -> Trace:
    return Trace(
        arrival_s=np.array([1.0, 1.0, 3.0, 3.0]),
        input_tokens=np.array([9, 9, 9, 9], dtype=np.int32),
        output_tokens=np.array([4, 2, 1, 3], dtype=np.int32),
        app=Labels.of(["voice", "chat", "voice", "chat"]),
        targets=targets,
        target=None if target is None else np.array(target, dtype=np.int32),
    )


def test_violations_are_measured_over_the_rows_that_each_target_governs():
    voice, everyone = Target.parse("voice/e2e:p50<=2s"), Target.parse("ttft:p60<=1s")
    assert violations(by_hand(), voiced((voice, everyone))) == [(voice, pytest.approx(2.125))]
    strict = Target.parse("chat/ttft:p50<=1s")
    assert violations(by_hand(), voiced((strict,))) == [(strict, math.inf)]


def test_goodput_holds_each_request_to_the_limits_that_govern_it():
    times = by_hand()
    assert goodput(times, voiced(())) == 3 / 4
    assert goodput(times, voiced((Target.parse("e2e:p95<=3s"),))) == 2 / 4
    assert goodput(times, voiced((Target.parse("voice/e2e:p95<=3s"),))) == 2 / 4
    assert goodput(times, voiced((Target.parse("chat/e2e:p95<=1s"),))) == 2 / 4
    assert goodput(times, voiced((Target.parse("e2e:p95<=0.1s"),), target=[0, -1, -1, -1])) == 2 / 4


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("ttf30:p95<=600ms", "ttf30:p95<=600ms"),
        ("voice/ttf30:p95<=0.6s", "voice/ttf30:p95<=600ms"),
        ("voice: ttf30 p95 600 ms", "voice/ttf30:p95<=600ms"),
        ("  TTFT p99.9 <= 1.50 s ", "ttft:p99.9<=1.5s"),
        ("org/model-8B/tpot:p50<=250us", "org/model-8B/tpot:p50<=0.25ms"),
        ("call center: e2e p90 ≤ 20s", "call center/e2e:p90<=20s"),
        ("itl p99 50ms", "itl:p99<=50ms"),
    ],
)
def test_targets_are_read_as_people_write_them_and_have_one_canonical_form(text, canonical):
    assert str(Target.parse(text)) == canonical
    assert Target.parse(canonical) == Target.parse(text)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "target"),
        ("ttf:p95<=600ms", "target"),
        ("ttf0:p95<=600ms", "metric"),
        ("latency:p95<=600ms", "target"),
        ("ttft:p95<=600", "target"),
        ("ttft:p95<=-1s", "target"),
        ("ttft:p95<=nans", "target"),
        ("ttft:p95<=1e999s", "target"),
        ("ttft:p0<=1s", "target: percentile"),
        ("ttft:p100<=1s", "target"),
        ("ttft:p95<=0s", "target: limit"),
        ("ttft:p٩٥<=1s", "target"),
        ("/ttft:p95<=1s", "target"),
    ],
)
def test_a_target_that_cannot_be_is_refused(text, where):
    with pytest.raises(BadTarget) as refused:
        Target.parse(text)
    assert refused.value.where == where
    assert refused.value.exit_code == 2
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)


@given(
    st.one_of(st.sampled_from([TTFT, TPOT, ITL, E2E]), st.integers(1, 10**6).map(lambda k: Metric("ttf", k))),
    st.floats(0.001, 99.999),
    st.floats(1e-9, 1e9),
    st.none() | st.text(min_size=1).map(str.strip).filter(bool),
)
def test_the_canonical_form_of_a_target_reads_back_as_the_same(metric, p, limit_s, app):
    target = Target(metric, p, limit_s, app)
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize("text", ["ttf", "ttf0", "ttf-1", "p95", "", "ttf٣", "ttft30"])
def test_a_metric_that_does_not_exist_is_refused(text):
    with pytest.raises(BadTarget):
        Metric.parse(text)


def test_cost_is_what_the_devices_cost_idle_or_not():
    usd_per_hour = sizing_cost_usd_per_hour(devices_per_replica=2, replicas=3, usd_per_device_hour=1.25)
    assert usd_per_hour == 7.5
    assert HOURS_PER_MONTH == 8760 / 12
    assert usd_per_month(usd_per_hour) == 5475
    assert usd_per_million_tokens(3.6, tokens_per_s=1000) == pytest.approx(1.0)
    assert usd_per_million_tokens(3.6, tokens_per_s=0) == math.inf
