"""Inter-token latencies of simulated requests: those of steps taken one by one, with a time for each token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.kernels.jit import bind
from paretune.profiler.simulator import simulate
from paretune.profiler.step_time import StepTables, composed_time_s, composition
from paretune.profiler.token_gaps import Runs, StepGaps
from paretune.runtime.scheduler import add_request, commit, schedule
from paretune.runtime.scheduler_state import PLAN_FINISHED, PLAN_PREEMPTED, PLAN_SIZE, PLAN_TOKENS, new_plan, new_state
from paretune.runtime.spec import Pool
from paretune.traces.metrics import ITL, PERCENTILES, RequestTimes, percentiles, summarize
from paretune.traces.trace import Trace

from .test_simulator import pool, tables, trace
from .test_simulator_speculation import NGRAM, kept
from .test_simulator_speculation import tables as sampled_tables


def token_times(requests: Trace, limits: Pool, step: StepTables) -> list[list[float]]:
    """The reference: the scheduler driven from Python, a time for each token of each request."""
    state, plan = new_state(limits, own_content=True, slots=len(requests) + 1), new_plan(limits)
    totals = requests.input_tokens + requests.output_tokens
    schedule_next, commit_plan = bind(schedule, state, plan), bind(commit, state, plan)
    times: list[list[float]] = [[] for _ in range(len(requests))]
    now_s, come, gone = 0.0, 0, 0
    while gone < len(requests):
        while come < len(requests) and requests.arrival_s[come] + step.request_s[0] <= now_s:
            add_request(state, come, int(requests.input_tokens[come]), int(totals[come]), 0, 0)
            come += 1
        schedule_next()
        size = int(plan.counts[PLAN_SIZE])
        if size == 0:
            if plan.counts[PLAN_PREEMPTED] == 0:
                now_s = float(requests.arrival_s[come] + step.request_s[0])
            continue
        now_s += composed_time_s(step, int(plan.counts[PLAN_TOKENS]), size, *composition(plan, step.prompt_pairs))
        for row in range(size):
            if plan.samples[row]:
                times[state.request_id[plan.slot[row]]].append(now_s + step.request_s[1])
        commit_plan()
        gone += int(plan.counts[PLAN_FINISHED])
    return times


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.sampled_from([0.5, 3.0, 20.0]),
    blocks=st.sampled_from([32, 40, 200]),
    batched=st.sampled_from([8, 128]),
    jump=st.booleans(),
)
def test_gaps_are_those_of_single_tokens(seed: int, rate: float, blocks: int, batched: int, jump: bool) -> None:
    limits = pool(num_kv_blocks=blocks, max_num_batched_tokens=batched)
    requests, step = trace(30, rate, seed), tables(limits, request_s=(0.01, 0.02))
    result = simulate(requests, limits, step, jump=jump).times
    gaps = [np.diff(times) for times in token_times(requests, limits, step)]
    pooled = np.concatenate(gaps)
    np.testing.assert_allclose(np.sort(result.sample(ITL)), np.sort(pooled), rtol=1e-9, atol=1e-12)
    longest = [gap.max() if len(gap) else np.nan for gap in gaps]
    np.testing.assert_allclose(result.values(ITL), longest, rtol=1e-9)
    some = np.arange(len(requests)) % 3 == 0
    for rows, expected in ((None, pooled), (some, np.concatenate([g for g, chosen in zip(gaps, some) if chosen]))):
        found = result.percentiles(ITL, PERCENTILES, rows)
        np.testing.assert_allclose(found, percentiles(expected, PERCENTILES), rtol=1e-9)
        assert result.gaps is not None
        assert result.gaps.mean(rows) == pytest.approx(expected.mean())


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.sampled_from([0.5, 3.0, 20.0]),
    blocks=st.sampled_from([32, 40, 200]),
    batched=st.sampled_from([8, 128]),
    jump=st.booleans(),
)
def test_as_many_had_a_steps_gap_as_had_tokens_before_and_after_it(
    seed: int, rate: float, blocks: int, batched: int, jump: bool
) -> None:
    limits = pool(num_kv_blocks=blocks, max_num_batched_tokens=batched)
    gaps = simulate(trace(40, rate, seed), limits, tables(limits, request_s=(0.01, 0.02)), jump=jump).times.gaps
    assert isinstance(gaps, StepGaps)
    noted = gaps.replicas[0]
    counted, _ = gaps._weights(replace(noted, all_ended=False), None)  # request by request
    assert noted.all_ended
    np.testing.assert_array_equal(noted.run_weight, counted)


@given(seed=st.integers(0, 10_000))
def test_order_statistics_are_those_of_the_values_in_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    runs = Runs(
        rng.lognormal(-4, 1, 30), rng.choice([0.0, 1e-6, 1e-2], 30), rng.integers(1, 9, 30), rng.integers(0, 3, 30)
    )
    parts = zip(runs.first_s, runs.growth_s, runs.steps.tolist(), runs.weight.tolist())
    values = np.sort(np.concatenate([np.repeat(first + np.arange(n) * more, w) for first, more, n, w in parts]))
    assert runs.order_statistics(range(len(values))) == dict(enumerate(values.tolist()))


def test_order_statistics_are_found_among_many_equal_values() -> None:
    """More than are sorted at once, so that parts are divided again, down to single values."""
    rng = np.random.default_rng(4)
    first_s = rng.choice([0.0, 0.01, np.nextafter(0.01, 1), 0.5], 40)
    runs = Runs(first_s, np.where(first_s == 0.01, 1e-12, 0.0), np.full(40, 60_000), rng.integers(0, 4, 40))
    values = np.repeat(runs.first_s, runs.steps) + np.tile(np.arange(60_000), 40) * np.repeat(runs.growth_s, runs.steps)
    values = np.sort(np.repeat(values, np.repeat(runs.weight, runs.steps)))
    ranks = sorted({0, len(values) - 1, *rng.integers(0, len(values), 30).tolist()})
    assert runs.order_statistics(ranks) == {rank: values[rank] for rank in ranks}


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.sampled_from([0.5, 3.0, 20.0]),
    blocks=st.sampled_from([32, 40, 200]),
    changes=st.sampled_from(
        [{}, {"max_num_seqs": 3}, {"admission": "first_chunk"}, {"replicas": 2}, {"router": "least_outstanding_tokens"}]
    ),
    policy=st.sampled_from(["paretune", "vllm_v1"]),
)
def test_every_percentile_of_every_metric_is_that_of_single_steps(
    seed: int, rate: float, blocks: int, changes: dict[str, Any], policy: str
) -> None:
    limits = pool(num_kv_blocks=blocks, **changes)
    requests = trace(60, rate, seed)
    fast, slow = (simulate(requests, limits, tables(limits), policy=policy, jump=jump) for jump in (True, False))
    assert (fast.steps, fast.preemptions) == (slow.steps, slow.preemptions)
    fast_values, slow_values = summarize(fast.times).values, summarize(slow.times).values
    assert set(fast_values) == {"ttft", "ttf30", "tpot", "e2e", "itl", "ttft_from_send"}
    for metric, values in fast_values.items():
        np.testing.assert_allclose(list(values.values()), list(slow_values[metric].values()), rtol=1e-3)


@pytest.mark.parametrize("late", [0, 3, 1000])
def test_percentiles_with_requests_that_never_end_beside_the_gaps(late: int) -> None:
    limits = pool()
    times = simulate(trace(30, 3.0, 1), limits, tables(limits)).times
    expected = percentiles(np.append(times.sample(ITL), np.full(late, np.inf)), PERCENTILES)
    np.testing.assert_allclose(times.percentiles(ITL, PERCENTILES, late=late), expected, rtol=1e-12)


def a_gap_for_every_token(times: RequestTimes, requests: Trace) -> None:
    gap_s = times.sample(ITL)
    assert len(gap_s) == (requests.output_tokens - 1).sum()
    assert gap_s.sum() == pytest.approx((times.end_s - times.first_token_s).sum())
    assert (times.values(ITL)[requests.output_tokens > 1] > 0).all()


def test_in_a_pipeline_every_token_but_the_first_has_a_gap() -> None:
    limits = pool(pipeline_parallel_size=2)
    requests = trace(40, 3.0, 5)
    a_gap_for_every_token(simulate(requests, limits, tables(limits)).times, requests)


def test_under_speculation_every_token_but_the_first_has_a_gap() -> None:
    limits = pool(**NGRAM)
    plain = trace(40, 3.0, 5)
    recorded = kept(None, 100, 100, 300, 150)
    requests = Trace(plain.arrival_s, plain.input_tokens, plain.output_tokens, acceptance=recorded)
    times = simulate(requests, limits, sampled_tables(limits)).times
    a_gap_for_every_token(times, requests)
    assert (times.sample(ITL) == 0).any()  # tokens that come together
