"""Confidence in percentiles: coverage on a process whose truth is known, and runs that are too short say so."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from paretune.traces.confidence import LEAST_BEYOND, alike_neighbors, block_bootstrap, estimate, estimates, plain
from paretune.traces.metrics import E2E, TTFT, RequestTimes, percentile
from paretune.traces.run_protocol import RunProtocol, counted_part
from paretune.traces.trace import PrefixHashes, Trace
from paretune.traces.worst_window import LEAST_REQUESTS, worst_window


def times_of(ttft_s: NDArray[np.float64], every_s: float = 1.0) -> RequestTimes:
    """Requests that arrive every so often, with these TTFTs and two tokens 10 ms apart."""
    n = len(ttft_s)
    scheduled_s = np.arange(n) * every_s
    first_s = scheduled_s + ttft_s
    finished = ~np.isnan(ttft_s)
    return RequestTimes(
        scheduled_s, scheduled_s, first_s, first_s, first_s + 0.01, np.where(finished, 2, 0), finished, k=30
    )


def log_ar1(n: int, phi: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """exp of a stationary AR(1) process of variance 1: its p-th percentile is exp(z_p), whatever phi."""
    noise = rng.normal(size=n) * math.sqrt(1 - phi**2)
    found = np.empty(n)
    found[0] = rng.normal()
    for i in range(1, n):
        found[i] = phi * found[i - 1] + noise[i]
    return np.exp(found)


# with a dozen independent values beyond the percentile an interval is a little short: its upper end rests on few
@pytest.mark.parametrize(
    ("phi", "p", "least"), [(0.0, 95.0, 0.83), (0.8, 50.0, 0.83), (0.8, 90.0, 0.83), (0.9, 95.0, 0.76)]
)
def test_intervals_cover_the_truth_about_as_often_as_they_say(phi: float, p: float, least: float) -> None:
    truth = math.exp(NormalDist().inv_cdf(p / 100))
    rng = np.random.default_rng(7)
    runs = 150
    covered = 0
    for _ in range(runs):
        found = estimate(times_of(log_ar1(2000, phi, rng)), TTFT, p)
        covered += found.low <= truth <= found.high
    # of 150 runs 90 % has a standard deviation of 2.4 %
    assert least <= covered / runs <= 0.97


def test_intervals_that_take_neighbors_for_independent_cover_too_little() -> None:
    # what the blocks are for: each request a block of its own is the plain bootstrap
    truth = math.exp(NormalDist().inv_cdf(0.9))
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(60):
        values = log_ar1(1000, 0.9, rng)
        low, high = block_bootstrap(values, np.arange(1000), (90.0,), rng)[0]
        covered += low <= truth <= high
    assert covered < 45


def test_how_many_neighbors_are_alike_is_that_of_theory() -> None:
    # of a two-state Markov chain with correlation r the integrated autocorrelation time is (1 + r) / (1 - r)
    rng = np.random.default_rng(0)
    r, n = 0.8, 200_000
    state = np.empty(n, np.bool_)
    state[0] = False
    stay, draw = rng.random(n) < r, rng.random(n) < 0.3
    for i in range(1, n):
        state[i] = state[i - 1] if stay[i] else draw[i]
    assert alike_neighbors(state) == pytest.approx((1 + r) / (1 - r), rel=0.1)
    assert alike_neighbors(draw) == pytest.approx(1.0, abs=0.1)
    assert alike_neighbors(np.zeros(100, np.bool_)) == 1.0


def test_a_run_too_short_for_its_percentile_says_so_and_how_long_would_do() -> None:
    rng = np.random.default_rng(1)
    whole = np.exp(0.1 * rng.normal(size=4000))
    short = estimate(times_of(whole[:200]), TTFT, 99.0)
    assert not short.enough
    # 2 of 200 lie beyond p99, and LEAST_BEYOND are asked for
    assert short.needed_s >= LEAST_BEYOND / 2 * short.duration_s * 0.99
    assert "beyond" in short.why
    assert estimate(times_of(whole[:200]), TTFT, 50.0).enough
    assert estimate(times_of(whole), TTFT, 99.0).enough
    assert plain([short])["ttft:p99"]["enough"] is False


def test_runs_of_neighbors_alike_must_be_longer() -> None:
    rng = np.random.default_rng(2)
    plain_run, alike_run = (estimate(times_of(log_ar1(1500, phi, rng) ** 0.05), TTFT, 95.0) for phi in (0.0, 0.97))
    assert alike_run.independent < 0.25 * plain_run.independent
    assert alike_run.needed_s > plain_run.needed_s
    assert alike_run.high - alike_run.low > plain_run.high - plain_run.low


def test_no_request_and_one_request_have_no_interval_and_are_never_enough() -> None:
    nothing = estimate(times_of(np.full(3, np.nan)), TTFT, 95.0)
    assert nothing.requests == 0
    assert not nothing.enough
    one = estimate(times_of(np.ones(1)), TTFT, 95.0)
    assert not one.enough
    assert math.isnan(one.low)
    assert all(not each.enough for each in estimates(times_of(np.zeros(0))))


def test_the_worst_five_minutes_are_found_where_they_are() -> None:
    ttft_s = np.full(3600, 0.1)
    ttft_s[1200:1500] = 2.0
    found = worst_window(times_of(ttft_s), TTFT, 95.0)
    assert found.value == pytest.approx(2.0)
    assert abs(found.started_s - 1200.0) <= 300.0
    assert found.requests == 300
    assert found.whole == pytest.approx(percentile(ttft_s, 95.0)) == pytest.approx(2.0)
    assert worst_window(times_of(ttft_s), TTFT, 50.0).whole == pytest.approx(0.1)
    assert worst_window(times_of(ttft_s), TTFT, 50.0).value == pytest.approx(2.0)


def test_the_last_five_minutes_are_a_window_and_hold_the_last_arrival() -> None:
    ttft_s = np.full(620, 0.1)
    ttft_s[600:] = 2.0  # from second 600 to 619, its last
    found = worst_window(times_of(ttft_s), TTFT, 95.0)
    assert (found.started_s, found.requests) == (319.0, 301)
    assert found.value == pytest.approx(2.0)


def test_the_worst_window_of_a_short_run_is_the_run_and_few_requests_make_none() -> None:
    short = worst_window(times_of(np.linspace(0.1, 0.2, 100)), TTFT, 95.0)
    assert (short.started_s, short.seconds, short.requests, short.value) == (0.0, 99.0, 100, short.whole)
    sparse = np.full(200, 0.1)
    sparse[150] = 9.0
    found = worst_window(times_of(sparse, every_s=60.0), TTFT, 95.0)
    assert LEAST_REQUESTS > 300.0 / 60.0
    assert found.value == found.whole


def test_the_warm_up_is_served_and_not_counted() -> None:
    requests = Trace(np.arange(100.0), np.full(100, 10), np.full(100, 2))
    slow_start = np.where(np.arange(100) < 30, 5.0, 0.1)
    protocol = RunProtocol(warm_up_s=30.0)
    trace, times = counted_part(protocol, requests, times_of(slow_start))
    assert len(trace) == len(times) == 70
    assert percentile(times.values(TTFT), 99.0) == pytest.approx(0.1)
    assert protocol.words(times_of(slow_start)).startswith("warm-up 30 s (30 requests not counted), ramp none")
    assert RunProtocol().words(times_of(slow_start)) == "warm-up none, ramp none, length jitter none"
    assert percentile(times_of(slow_start).values(E2E), 99.0) > 5.0


def test_a_ramp_raises_the_rate_evenly_and_loses_nobody() -> None:
    requests = Trace(np.arange(0.0, 100.0, 0.01), np.full(10_000, 10), np.full(10_000, 2))
    moved = RunProtocol(ramp_s=20.0).applied(requests)
    assert len(moved) == 10_000
    counts, _ = np.histogram(moved.arrival_s, np.arange(0.0, 40.0, 2.0))
    expected = [200 * min(1.0, (t + 1) / 20) for t in np.arange(0.0, 38.0, 2.0)]
    np.testing.assert_allclose(counts, expected, atol=3)
    assert moved.arrival_s[-1] == pytest.approx(requests.arrival_s[-1] + 10.0)


def test_length_jitter_is_as_wide_as_asked_and_the_same_for_the_same_seed() -> None:
    prefix = PrefixHashes(np.zeros(0, np.int64), np.zeros(5001, np.int64), 16)
    requests = Trace(np.arange(5000.0), np.full(5000, 1000), np.full(5000, 500), prefix=prefix)
    moved = RunProtocol(length_jitter=0.1).applied(requests)
    assert float(np.std(np.log(moved.input_tokens))) == pytest.approx(0.1, rel=0.1)
    assert moved.prefix is None
    assert RunProtocol(length_jitter=0.1).applied(requests).digest() == moved.digest()
    assert RunProtocol(length_jitter=0.1, seed=1).applied(requests).digest() != moved.digest()
