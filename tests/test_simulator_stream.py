"""A trace in chunks: the figures of the whole, in memory that does not grow with it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.profiler.simulator import simulate
from paretune.profiler.stream import RELATIVE_ERROR, Histogram, simulate_stream
from paretune.runtime.spec import BadSpec
from paretune.traces.metrics import PERCENTILES, Metric, summarize
from paretune.traces.trace import BadTrace, Trace

from .test_profiler_batch_time import batch
from .test_simulator import pool, tables, trace


def in_chunks(whole: Trace, size: int) -> Iterator[Trace]:
    for begin in range(0, len(whole), size):
        yield whole.select(slice(begin, begin + size))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.sampled_from([0.5, 3.0, 20.0]),
    blocks=st.sampled_from([32, 200]),
    batched=st.sampled_from([8, 128]),
    replicas=st.sampled_from([1, 3]),
    size=st.sampled_from([1, 7, 64]),
)
def test_a_streamed_trace_has_the_figures_of_the_whole(
    seed: int, rate: float, blocks: int, batched: int, replicas: int, size: int
) -> None:
    limits = pool(num_kv_blocks=blocks, max_num_batched_tokens=batched, replicas=replicas, max_model_len=400)
    requests, step = trace(70, rate, seed), tables(limits, request_s=(0.01, 0.02))
    whole = simulate(requests, limits, step)
    streamed = simulate_stream(in_chunks(requests, size), limits, step)
    assert (streamed.steps, streamed.preemptions, streamed.rejected) == (whole.steps, whole.preemptions, whole.rejected)
    assert streamed.busy_s == pytest.approx(whole.busy_s)
    found, expected = streamed.summary, summarize(whole.times)
    assert (found.requests, found.finished, found.tpot_undefined) == (
        expected.requests,
        expected.finished,
        expected.tpot_undefined,
    )
    assert found.output_tokens_per_s == pytest.approx(expected.output_tokens_per_s)
    for metric in ("ttft", "ttf30", "tpot", "e2e", "itl"):
        assert found.value(metric, "mean") == pytest.approx(expected.value(metric, "mean"))
        values = np.sort(whole.times.sample(Metric.parse(metric)))
        for p in PERCENTILES:
            place = int(p / 100 * (np.isfinite(values).sum() - 1))
            assert found.value(metric, p) == pytest.approx(values[place], rel=1.01 * RELATIVE_ERROR)


def test_a_percentile_is_the_order_statistic_within_its_error() -> None:
    values = np.random.default_rng(1).lognormal(-3, 2, 5000)
    histogram = Histogram()
    histogram.add(values[:2000])
    histogram.add(values[2000:])
    found = histogram.distribution()
    assert found["mean"] == pytest.approx(values.mean())
    for p in PERCENTILES:
        exact = np.sort(values)[int(p / 100 * (len(values) - 1))]
        assert abs(found[f"p{p:g}"] / exact - 1) <= RELATIVE_ERROR


def test_memory_does_not_grow_with_the_trace() -> None:
    limits = pool()
    step = tables(limits)

    def peak_bytes(chunks: int) -> int:
        def made() -> Iterator[Trace]:
            for i in range(chunks):
                one = trace(500, 1.0, i, longest=20)
                yield Trace(i * 1000.0 + one.arrival_s, one.input_tokens, one.output_tokens)

        tracemalloc.start()
        simulate_stream(made(), limits, step)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(2)
    assert peak_bytes(40) < 1.2 * peak_bytes(4)


def test_what_cannot_be_streamed_is_refused() -> None:
    limits = pool()
    backwards = [trace(5, 1.0, 1), trace(5, 1.0, 1)]
    with pytest.raises(BadTrace, match="arrival"):
        simulate_stream(backwards, limits, tables(limits))
    routed = pool(replicas=2, router="least_outstanding_tokens")
    with pytest.raises(BadSpec, match="router"):
        simulate_stream(backwards, routed, tables(routed))
    with pytest.raises(BadSpec, match="step times"):
        simulate_stream(backwards, limits, tables(limits)._replace(batch=batch()))
