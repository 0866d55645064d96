"""The simulator: jumps equal steps, and the same input gives the same bytes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.profiler.simulator import SimulationResult, simulate
from paretune.profiler.step_time import IDLE_S, WORK_GRID, StepTables, composed_time_s, interpolate
from paretune.runtime.spec import Pool
from paretune.traces.metrics import E2E, TPOT, TTFT, Metric, Target
from paretune.traces.trace import PrefixHashes, Trace


def pool(**changes: Any) -> Pool:
    return Pool.model_validate(
        {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 128, "num_kv_blocks": 64, **changes}
    )


def tables(limits: Pool, scale: float = 1.0, request_s: tuple[float, float] = (0.0, 0.0)) -> StepTables:
    """A made-up machine: 5 ms a step, 50 us a token, 10 us a row and a sample, attention by work."""
    rows = np.arange(limits.max_num_seqs + 1) * 1e-5
    return StepTables(
        tokens_s=scale * (5e-3 + 5e-5 * np.arange(limits.max_num_batched_tokens + 1)),
        rows_s=scale * rows,
        samples_s=scale * rows,
        decode_attention_s=scale * WORK_GRID * 1e-7,
        prefill_attention_s=scale * WORK_GRID * 1e-8,
        request_s=np.array(request_s),
    )


def trace(n: int, rate: float, seed: int, longest: int = 256) -> Trace:
    rng = np.random.default_rng(seed)
    return Trace(
        np.cumsum(rng.exponential(1 / rate, n)),
        rng.integers(1, longest, n),
        rng.integers(1, longest, n),
    )


def metrics(result: SimulationResult) -> np.ndarray[Any, np.dtype[np.float64]]:
    kinds = (TTFT, Metric("ttf", 30), TPOT, E2E)
    return np.array([np.nanpercentile(result.times.values(kind), [50, 90, 95, 99]) for kind in kinds])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.sampled_from([0.5, 3.0, 20.0]),
    blocks=st.sampled_from([32, 40, 200]),
    seqs=st.sampled_from([1, 3, 8]),
    chunked=st.booleans(),
    wake_s=st.sampled_from([0.0, 0.05]),
)
def test_jumping_over_decode_steps_changes_nothing(
    seed: int, rate: float, blocks: int, seqs: int, chunked: bool, wake_s: float
) -> None:
    limits = pool(
        num_kv_blocks=blocks,
        max_num_seqs=seqs,
        enable_chunked_prefill=chunked,
        max_num_batched_tokens=128 if chunked else 512,
    )
    requests = trace(60, rate, seed)
    step = tables(limits)._replace(wake_s=wake_s)
    fast = simulate(requests, limits, step)
    slow = simulate(requests, limits, step, jump=False)
    assert fast.steps == slow.steps
    assert fast.preemptions == slow.preemptions
    np.testing.assert_allclose(metrics(fast), metrics(slow), rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"replicas": 2}, {"pipeline_parallel_size": 2}])
def test_who_finds_a_replica_idle_waits_until_it_is_awake(changes: dict[str, Any]) -> None:
    limits = pool(**changes)
    step = tables(limits)._replace(wake_s=0.5)
    # two come together; one while these run; one a little after its end, and one much later
    log = Trace([1.0, 1.0, 1.51, 1.535, 9.0], [20] * 5, [3] * 5)
    asleep, awake = (simulate(log, limits, each).times for each in (step, step._replace(wake_s=0.0)))
    late_s = asleep.first_token_s - awake.first_token_s
    assert late_s[[0, 1, 4]] == pytest.approx(0.5)
    if limits.replicas == 1:
        assert asleep.end_s[1] > 1.51
        assert late_s[2] < 0.02
        assert asleep.end_s[2] < 1.535 < asleep.end_s[2] + IDLE_S
        assert late_s[3] == pytest.approx(0.0), "it has been idle for too short a time"


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    replicas=st.integers(1, 3),
    stages=st.sampled_from([1, 1, 3]),
    blocks=st.sampled_from([32, 100]),
)
def test_every_request_that_fits_is_finished_with_all_its_tokens(
    seed: int, replicas: int, stages: int, blocks: int
) -> None:
    limits = pool(replicas=replicas, pipeline_parallel_size=stages, num_kv_blocks=blocks, max_model_len=300)
    requests = trace(80, 10.0, seed)
    result = simulate(requests, limits, tables(limits))
    fits = requests.input_tokens + requests.output_tokens <= 300
    assert result.times.finished.tolist() == fits.tolist()
    assert result.rejected == int((~fits).sum())
    assert (result.times.output_tokens == np.where(fits, requests.output_tokens, 0)).all()
    times = result.times
    assert (times.first_token_s[fits] > times.scheduled_s[fits]).all()
    assert (times.end_s[fits] >= times.first_token_s[fits]).all()
    several = fits & (requests.output_tokens >= 30)
    assert (times.kth_token_s[several] <= times.end_s[several]).all()
    assert result.busy_s <= replicas * np.nanmax(times.end_s)


def test_one_request_takes_the_sum_of_its_steps() -> None:
    limits = pool()
    step = tables(limits, request_s=(0.25, 0.5))
    result = simulate(Trace([1.0], [200], [3]), limits, step)
    first = composed_time_s(step, 128, 1, 0, 0.0, 128 * 129 / 2)
    second = composed_time_s(step, 72, 1, 1, 0.0, 72 * 128 + 72 * 73 / 2)
    third = composed_time_s(step, 1, 1, 1, 201.0, 0.0)
    fourth = composed_time_s(step, 1, 1, 1, 202.0, 0.0)
    assert result.times.first_token_s[0] == pytest.approx(1.0 + 0.25 + first + second + 0.5)
    assert result.times.end_s[0] == pytest.approx(1.0 + 0.25 + first + second + third + fourth + 0.5)
    assert result.steps == 4


def fixed_steps(limits: Pool, step_s: float) -> StepTables:
    """Every step takes as long, whatever is in it."""
    usual = tables(limits)
    flat = {name: np.zeros_like(table) for name, table in usual._asdict().items() if name.endswith("_s")}
    return usual._replace(**{**flat, "tokens_s": np.full(limits.max_num_batched_tokens + 1, step_s)})


@pytest.mark.parametrize("stages", [2, 3])
def test_the_chunks_of_a_prompt_follow_each_other_through_a_pipeline(stages: int) -> None:
    limits = pool(pipeline_parallel_size=stages, max_num_batched_tokens=50)
    times = simulate(Trace([1.0], [400], [4]), limits, fixed_steps(limits, 0.6)).times
    # eight chunks, one behind the other; then each token waits for the one before
    first_s = 1.0 + 0.6 + 7 * 0.6 / stages
    assert times.first_token_s[0] == pytest.approx(first_s)
    assert times.end_s[0] == pytest.approx(first_s + 3 * 0.6)


def test_the_stages_of_a_pipeline_work_on_other_requests() -> None:
    limits = pool(pipeline_parallel_size=2)
    result = simulate(Trace([0.0, 0.0], [10, 10], [6, 6]), limits, fixed_steps(limits, 0.6))
    # both prompts in one step; then one token of each request every 0.6 s, half a step apart: 1 + 2 * 5 steps
    assert result.steps == 11
    assert sorted(result.times.end_s) == pytest.approx([0.6 + 5 * 0.6, 0.6 + 5 * 0.6 + 0.3])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_slower_machine_never_serves_a_lone_queue_sooner(seed: int) -> None:
    limits = pool(max_num_seqs=1)
    requests = trace(40, 1.0, seed)
    fast = simulate(requests, limits, tables(limits))
    slow = simulate(requests, limits, tables(limits, scale=1.3))
    assert (slow.times.end_s >= fast.times.end_s).all()


def test_repeated_prefixes_are_computed_once() -> None:
    limits = pool(num_kv_blocks=128, max_num_batched_tokens=512)
    n = 20
    same = PrefixHashes.of([[5, 6, 7]] * n, 64)
    arrival_s = np.arange(n, dtype=np.float64) * 10
    lengths = np.full(n, 200)
    cached = simulate(Trace(arrival_s, lengths, lengths // 50, prefix=same), limits, tables(limits))
    plain = simulate(Trace(arrival_s, lengths, lengths // 50), limits, tables(limits))
    assert cached.prefix_hit_tokens == (n - 1) * 192
    assert plain.prefix_hit_tokens == 0
    assert np.median(cached.times.values(TTFT)) < np.median(plain.times.values(TTFT))


def test_replicas_serve_in_turn() -> None:
    limits = pool(replicas=2, max_num_seqs=1)
    arrival_s = np.zeros(4)
    result = simulate(Trace(arrival_s, [10] * 4, [5] * 4), limits, tables(limits))
    ends = result.times.end_s
    assert ends[0] == ends[1] < ends[2] == ends[3]


def test_a_run_that_cannot_meet_its_target_is_given_up_and_one_that_can_is_not() -> None:
    limits = pool()
    requests = trace(400, 40.0, 3)
    full = simulate(requests, limits, tables(limits))
    p95 = float(np.percentile(full.times.values(TTFT), 95))
    strict = simulate(requests, limits, tables(limits), give_up=[Target(TTFT, 95, 0.9 * p95)])
    loose = simulate(requests, limits, tables(limits), give_up=[Target(TTFT, 95, 1.1 * p95)])
    assert strict.gave_up
    assert strict.steps < full.steps
    assert not loose.gave_up
    assert loose.times.end_s.tobytes() == full.times.end_s.tobytes()


@given(work=st.floats(0, 1e12), more=st.floats(0, 1e6))
def test_attention_never_takes_less_time_for_more_work(work: float, more: float) -> None:
    table = np.sqrt(WORK_GRID)
    assert interpolate(table, work) <= interpolate(table, work + more) + 1e-12


_DIGEST = """
import hashlib, sys
sys.path.insert(0, {tests!r})
from test_simulator import pool, simulate, tables, trace
limits = pool(num_kv_blocks=34, max_num_seqs=4)
result = simulate(trace(40, 5.0, 11), limits, tables(limits))
data = result.times.first_token_s.tobytes() + result.times.end_s.tobytes()
print(hashlib.sha256(data).hexdigest(), result.steps, result.preemptions)
"""


@pytest.mark.parametrize("disable_jit", ["0", "1"])
def test_compiled_and_plain_python_give_the_same_bytes(disable_jit: str) -> None:
    limits = pool(num_kv_blocks=34, max_num_seqs=4)
    here = simulate(trace(40, 5.0, 11), limits, tables(limits))
    data = here.times.first_token_s.tobytes() + here.times.end_s.tobytes()
    environment = {**os.environ, "NUMBA_DISABLE_JIT": disable_jit}
    code = _DIGEST.format(tests=os.path.dirname(__file__))
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert here.preemptions > 0
    assert out.stdout.split() == [hashlib.sha256(data).hexdigest(), str(here.steps), str(here.preemptions)]


def test_compiled_code_runs_where_nothing_can_be_cached(tmp_path: Any) -> None:
    nowhere = tmp_path / "file"
    nowhere.write_text("no folder")
    environment = {**os.environ, "PARETUNE_CACHE_DIR": str(nowhere)}
    code = (
        "from paretune.kernels import jit\n"
        "from paretune.runtime import kv_cache\n"
        "assert jit.cache_dir() is None\n"
        "pool = kv_cache.new_block_pool(3)\n"
        "print([kv_cache.take(pool) for _ in range(4)])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout == "[0, 1, 2, -1]\n"


def bent_tables(limits: Pool) -> StepTables:
    """Attention that costs nothing up to a knee and much beyond it, as caches that overflow do."""
    knee = 400.0
    return tables(limits)._replace(
        decode_attention_s=np.maximum(0.0, WORK_GRID - knee) * 2e-5,
        prefill_attention_s=np.maximum(0.0, WORK_GRID - 1000.0) * 1e-7,
    )


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), rate=st.sampled_from([0.5, 3.0]))
def test_jumping_is_exact_where_attention_bends(seed: int, rate: float) -> None:
    limits = pool(num_kv_blocks=200)
    requests = trace(40, rate, seed)
    fast = simulate(requests, limits, bent_tables(limits))
    slow = simulate(requests, limits, bent_tables(limits), jump=False)
    np.testing.assert_allclose(fast.times.end_s, slow.times.end_s, rtol=1e-9)
    np.testing.assert_allclose(fast.times.kth_token_s, slow.times.kth_token_s, rtol=1e-9)


def test_requests_that_are_too_long_take_no_turn() -> None:
    limits = pool(replicas=2, max_num_seqs=1, max_model_len=300)
    inputs = np.array([10, 400, 10, 400, 10, 400, 10, 400])
    result = simulate(Trace(np.zeros(8), inputs, np.full(8, 5)), limits, tables(limits))
    ends = result.times.end_s[::2]
    assert ends[0] == ends[1] < ends[2] == ends[3]
    assert result.rejected == 4


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    limits = pool()
    with pytest.raises(ValueError, match="rate"):
        simulate(trace(3, 1.0, 0), limits, tables(limits), rate=rate)
