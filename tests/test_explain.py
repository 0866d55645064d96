"""Explain: the parts of every request add up to its metrics, and they say what the tables and the queue say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.profiler.explain import StepLog, default_asked, explain, request_parts
from paretune.profiler.hardware import accelerator
from paretune.profiler.simulator import simulate
from paretune.profiler.step_limits import BANDWIDTH, COMPUTE, HOST, LINKS, LimitTables, limit_tables
from paretune.profiler.step_parts import PARTS
from paretune.profiler.step_record import Gaps, Recorder
from paretune.profiler.step_time import ModeledStep, PromptPairs, StepTables, composed_time_s
from paretune.profiler.tables import step_tables
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import Pool
from paretune.traces.metrics import E2E, ITL, TPOT, TTFT, Metric, Target
from paretune.traces.trace import Trace

from .profiler_examples import SMALL, profile
from .test_profiler_operators import LLAMA_8B, LLAMA_8B_CONFIG
from .test_simulator import pool, tables, trace

METRICS = (TTFT, Metric("ttf", 30), TPOT, E2E)
REQUEST_S = (0.01, 0.002)


def limits_of(whole: StepTables) -> LimitTables:
    """A made-up division: 5 ms of a step are the host's, prompts compute, decodes read."""
    count = len(whole.tokens_s)
    tokens_s = np.zeros((4, count))
    tokens_s[HOST] = np.minimum(5e-3, whole.tokens_s)
    computing = np.arange(count) / count
    tokens_s[COMPUTE] = (whole.tokens_s - tokens_s[HOST]) * computing
    tokens_s[BANDWIDTH] = (whole.tokens_s - tokens_s[HOST]) * (1 - computing)

    def divided(table: np.ndarray[Any, Any], *shares: float) -> np.ndarray[Any, Any]:
        return np.array(shares)[:, None] * table

    return LimitTables(
        tokens_s,
        divided(whole.rows_s, 0, 0, 0, 1),
        divided(whole.samples_s, 0.2, 0.7, 0.1, 0),
        divided(whole.decode_attention_s, 0, 1, 0, 0),
        divided(whole.prefill_attention_s, 1, 0, 0, 0),
        whole.prompt_pairs,
    )


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.sampled_from([0.5, 4.0, 20.0]),
    blocks=st.sampled_from([32, 40, 200]),
    replicas=st.sampled_from([1, 2]),
    chunked=st.booleans(),
    router=st.sampled_from(["round_robin", "least_outstanding_tokens"]),
)
def test_the_parts_of_every_request_add_up_to_its_metrics(
    seed: int, rate: float, blocks: int, replicas: int, chunked: bool, router: str
) -> None:
    limits = pool(
        num_kv_blocks=blocks, replicas=replicas, router=router, enable_chunked_prefill=chunked,
        max_num_batched_tokens=128 if chunked else 512,
    )  # fmt: skip
    check_parts(trace(60, rate * replicas, seed), limits)


def test_the_parts_add_up_where_steps_of_a_pipeline_overlap() -> None:
    limits = pool(pipeline_parallel_size=3, num_kv_blocks=48)
    for seed in range(5):
        check_parts(trace(80, 6.0, seed), limits)


def test_the_parts_add_up_where_steps_wait_for_blocks_from_the_host() -> None:
    limits = pool(num_kv_blocks=40, host_kv_blocks=200, preemption="swap")
    for seed in range(3):
        check_parts(trace(60, 20.0, seed), limits, block_copy_s=2e-3)
    whole = tables(limits, request_s=REQUEST_S)._replace(block_copy_s=2e-3)
    recorder = Recorder(limits_of(whole))
    result = simulate(trace(60, 20.0, 0), limits, whole, recorder=recorder)
    assert recorder.record is not None
    copies_s = recorder.record.parts[:, PARTS.index("copies")]
    # every copy is waited for by at least one request, on the link to the host
    assert copies_s[:, LINKS].sum() >= 2e-3 * (result.blocks_to_host + result.blocks_from_host) > 0
    assert copies_s.sum() == copies_s[:, LINKS].sum()


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_every_block_that_is_copied_takes_its_time_in_a_pipeline_too(stages: int) -> None:
    """All requests are there from the beginning, so that time decides nothing, and only adds up."""
    limits = pool(
        num_kv_blocks=40, host_kv_blocks=200, preemption="swap", max_num_seqs=3, pipeline_parallel_size=stages
    )  # fmt: skip
    for seed in range(8):
        at_once = replace(trace(40, 20.0, seed), arrival_s=np.zeros(40))
        seconds = []
        for block_copy_s in (0.0, 2e-3):
            priced = tables(limits)._replace(block_copy_s=block_copy_s)
            recorder = Recorder(limits_of(priced))
            seen = simulate(at_once, limits, priced, recorder=recorder)
            plain = simulate(at_once, limits, priced, jump=False)
            np.testing.assert_allclose(seen.times.end_s, plain.times.end_s, rtol=1e-12)
            assert recorder.record is not None
            seconds.append(StepLog.of(recorder.record).seconds.sum())
        copied = plain.blocks_to_host + plain.blocks_from_host
        assert seconds[1] - seconds[0] == pytest.approx(2e-3 * copied, rel=1e-9)
        assert copied > 0


def check_parts(requests: Trace, limits: Pool, block_copy_s: float = 0.0) -> None:
    whole = tables(limits, request_s=REQUEST_S)._replace(block_copy_s=block_copy_s, wake_s=0.03)
    recorder = Recorder(limits_of(whole), gaps=Gaps(0.0, np.inf))
    seen = simulate(requests, limits, whole, recorder=recorder)
    plain = simulate(requests, limits, whole, jump=False)
    record = recorder.record
    assert record is not None
    assert seen.steps == plain.steps == len(StepLog.of(record))
    for metric in METRICS:
        # the fast loop knows nothing of parts
        values = plain.times.values(metric)
        parts = request_parts(metric, seen.times, record, REQUEST_S[1])
        np.testing.assert_allclose(parts.sum(axis=(1, 2)), values, rtol=1e-9, atol=1e-12)
        assert np.nanmin(parts) > -1e-9
    gaps = record.gaps[: record.counts[1]]
    assert len(gaps) == int(np.maximum(0, plain.times.output_tokens - 1).sum())
    several = np.where(plain.times.output_tokens > 1, plain.times.end_s - plain.times.first_token_s, 0.0)
    assert gaps.sum() == pytest.approx(several.sum())
    assert record.band_parts.sum() == pytest.approx(gaps.sum())


def explained(requests: Trace, limits: Pool, *asked: tuple[Metric, float], **options: Any) -> Any:
    whole = tables(limits, request_s=REQUEST_S)
    modeled = ModeledStep(whole, True, 0.1, ())
    return explain(requests, limits, modeled, limits_of(whole), asked, **options)[0]


def test_one_request_alone_is_its_way_its_prompt_and_its_decodes() -> None:
    limits = pool()
    whole = tables(limits, request_s=REQUEST_S)
    found = explained(Trace([1.0], [200], [3]), limits, (TTFT, 50.0), (E2E, 50.0), (TPOT, 50.0))
    first = composed_time_s(whole, 128, 1, 0, 0.0, 128 * 129 / 2)
    rest = composed_time_s(whole, 72, 1, 1, 0.0, 72 * 128 + 72 * 73 / 2)
    decodes = [composed_time_s(whole, 1, 1, 1, context, 0.0) for context in (201.0, 202.0)]
    ttft, e2e, tpot = ({part.name: part.seconds for part in each.parts} for each in found.metrics)
    assert ttft == pytest.approx({"to_scheduler": 0.01, "prefill": first + rest, "to_client": 0.002})
    assert e2e == pytest.approx({**ttft, "decode": sum(decodes)})
    assert tpot == pytest.approx({"decode": sum(decodes) / 2})


@pytest.mark.parametrize("counts", [PromptPairs(per_key=70.0), PromptPairs(per_cached=3.0, in_latent=5.0)])
def test_one_request_alone_waits_for_no_others_however_its_pairs_count(counts: PromptPairs) -> None:
    limits = pool()
    whole = tables(limits, request_s=REQUEST_S)._replace(prompt_pairs=counts)
    modeled = ModeledStep(whole, True, 0.1, ())
    found = explain(Trace([1.0], [200], [3]), limits, modeled, limits_of(whole), [(TTFT, 50.0)])[0]
    assert {part.name for part in found.metrics[0].parts} == {"to_scheduler", "prefill", "to_client"}


def test_two_at_once_pay_for_each_other_what_their_steps_take_longer() -> None:
    limits = pool(max_num_batched_tokens=64)
    whole = tables(limits, request_s=REQUEST_S)
    found = explained(Trace([0.0, 0.0], [20, 30], [1, 1]), limits, (TTFT, 1.0))
    both = composed_time_s(whole, 50, 2, 2, 0.0, 20 * 21 / 2 + 30 * 31 / 2)
    alone = (composed_time_s(whole, 20, 1, 1, 0.0, 210.0) + composed_time_s(whole, 30, 1, 1, 0.0, 465.0)) / 2
    parts = {part.name: part.seconds for part in found.metrics[0].parts}
    assert parts["prefill"] == pytest.approx(alone)
    assert parts["others_prefill"] == pytest.approx(both - alone)


def test_a_prompt_that_arrives_holds_up_those_that_decode() -> None:
    limits = pool(max_num_batched_tokens=512)
    whole = tables(limits)
    found = explained(Trace([0.0, 0.05], [4, 500], [40, 1]), limits, (ITL, 99.9))
    parts = {part.name: part.seconds for part in found.metrics[0].parts}
    assert max(parts, key=lambda name: parts[name]) == "others_prefill"
    assert found.metrics[0].value == pytest.approx(sum(parts.values()))
    assert parts["others_prefill"] > 0.5 * composed_time_s(whole, 500, 1, 1, 0.0, 500 * 501 / 2) / 3


@pytest.mark.parametrize(
    ("changes", "rate", "reason"),
    [
        ({"max_num_seqs": 2, "num_kv_blocks": 500}, 20.0, "queue_seats"),
        ({"max_num_seqs": 32, "num_kv_blocks": 34}, 20.0, "queue_blocks"),
        ({"max_num_seqs": 64, "num_kv_blocks": 5000, "max_num_batched_tokens": 64}, 500.0, "queue_tokens"),
    ],
)
def test_a_saturated_server_is_bound_by_its_queue_and_the_queue_by_what_is_short(
    changes: dict[str, Any], rate: float, reason: str
) -> None:
    limits = pool(**changes)
    answers = 2 if reason == "queue_tokens" else 100
    n = 60 if reason == "queue_tokens" else 200
    rng = np.random.default_rng(3)
    requests = Trace(np.cumsum(rng.exponential(1 / rate, n)), rng.integers(100, 250, n), np.full(n, answers))
    found = explained(requests, limits, (TTFT, 95.0)).metrics[0]
    assert found.parts[0].name == reason
    assert found.seconds(*(name for name in PARTS if name.startswith("queue"))) > 0.5 * found.value


def test_an_idle_server_has_no_queue() -> None:
    limits = pool()
    requests = Trace(np.arange(20) * 10.0, np.full(20, 50), np.full(20, 5))
    found = explained(requests, limits, (TTFT, 95.0)).metrics[0]
    assert {part.name for part in found.parts} == {"to_scheduler", "prefill", "to_client"}


def test_waking_up_counts_as_the_host_s_before_the_scheduler_sees_a_request() -> None:
    limits = pool(replicas=2)
    whole = tables(limits, request_s=REQUEST_S)._replace(wake_s=0.3)
    requests = Trace(np.arange(20) * 2.0, np.full(20, 50), np.full(20, 5))
    found = explain(requests, limits, ModeledStep(whole, True, 0.1, ()), limits_of(whole), [(TTFT, 50.0)])[0]
    assert found.metrics[0].seconds("to_scheduler") == pytest.approx(0.01 + 0.3)
    assert found.metrics[0].seconds("queue_step") == 0.0


def test_preemption_is_seen_as_waiting_and_as_computing_again() -> None:
    limits = pool(num_kv_blocks=34, enable_prefix_caching=False)
    found = explained(trace(60, 20.0, 1), limits, (E2E, 95.0))
    assert found.result.preemptions > 0
    assert found.metrics[0].seconds("preempted") > 0
    assert found.metrics[0].seconds("recompute") > 0


def test_a_percentile_is_explained_to_the_last_bit_by_those_around_it() -> None:
    limits = pool(num_kv_blocks=64)
    asked = [(metric, p) for metric in METRICS for p in (50.0, 90.0, 95.0, 99.0)]
    found = explained(trace(200, 10.0, 5), limits, *asked)
    assert len(found.metrics) == len(asked)
    for (metric, p), each in zip(asked, found.metrics):
        assert each.value == pytest.approx(float(np.nanpercentile(found.result.times.values(metric), p)))
        assert sum(part.seconds for part in each.parts) == pytest.approx(each.value)
        assert sum(each.by_resource.values()) == pytest.approx(each.value)
        assert 0.5 < each.scale < 2.0


def test_occupancy_is_weighted_by_time() -> None:
    limits = pool()
    found = explained(Trace([0.0, 0.0], [10, 10], [50, 50]), limits, (E2E, 50.0))
    occupancy = {each.name: each for each in found.occupancy}
    assert occupancy["requests in a step"].mean == pytest.approx(2.0)
    assert occupancy["KV blocks in use"].limit == 64
    assert 2 <= occupancy["KV blocks in use"].mean <= 8
    assert found.busy_share == pytest.approx(1.0, rel=0.05)


def test_the_resources_of_a_table_add_up_to_it_measured_or_not() -> None:
    on_gpu = Pool(accelerator="H100", tensor_parallel_size=2, num_kv_blocks=1000, max_num_batched_tokens=4096)
    on_cpu = Pool(max_num_seqs=16, max_num_batched_tokens=512)
    for source, shape, limits in ((accelerator("H100"), LLAMA_8B, on_gpu), (profile(), SMALL, on_cpu)):
        modeled = step_tables(source, shape, limits)
        divided = limit_tables(source, shape, limits, modeled)
        for name in LimitTables._fields[:-1]:
            table = getattr(divided, name)
            assert table.min() >= 0.0
            np.testing.assert_allclose(table.sum(axis=0), getattr(modeled.tables, name), rtol=1e-12)
    modeled = step_tables(accelerator("H100"), LLAMA_8B, on_gpu)
    tokens_s = limit_tables(accelerator("H100"), LLAMA_8B, on_gpu, modeled).tokens_s
    # one token reads all weights; 4,096 tokens are far beyond the ridge (about 295 tokens on an H100 in bf16)
    assert np.argmax(tokens_s[:, 1]) == BANDWIDTH
    assert np.argmax(tokens_s[:, 4096]) == COMPUTE
    assert (tokens_s[LINKS, 1:] > 0).all()


def test_a_matrix_that_a_checkpoint_leaves_unquantized_is_labeled_by_its_own_bytes() -> None:
    """One token reads the vocabulary projection, which fp8 checkpoints keep in bf16: memory binds it."""
    config = {**LLAMA_8B_CONFIG, "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
    shape = ModelShape.from_config(config)
    limits = Pool(accelerator="H100", weight_dtype="fp8", num_kv_blocks=1000)
    modeled = step_tables(accelerator("H100"), shape, limits)
    samples_s = limit_tables(accelerator("H100"), shape, limits, modeled).samples_s
    assert samples_s[BANDWIDTH, 1] == pytest.approx(modeled.tables.samples_s[1])


def test_windows_that_every_row_reads_are_the_device_s_and_not_the_host_s() -> None:
    shape = replace(LLAMA_8B, sliding_window=1024)
    limits = Pool(accelerator="H100", max_model_len=16384, num_kv_blocks=1024)
    modeled = step_tables(accelerator("H100"), shape, limits)
    rows_s = limit_tables(accelerator("H100"), shape, limits, modeled).rows_s
    assert modeled.tables.rows_s[8] > 0
    assert rows_s[BANDWIDTH, 8] == modeled.tables.rows_s[8]
    assert rows_s[HOST, 8] == 0.0


def test_the_metrics_of_the_targets_are_explained_by_default_where_they_can_be() -> None:
    texts = ("itl:p99<=50ms", "voice/ttft:p90<=1s", "ttft:p90<=2s", "ttf7:p50<=1s")
    requests = Trace([0.0], [1], [1], targets=tuple(map(Target.parse, texts)))
    assert default_asked(requests, 7) == ((ITL, 99.0), (TTFT, 90.0), (Metric("ttf", 7), 50.0))
    assert default_asked(requests, 7, ("ttft", "e2e")) == ((TTFT, 90.0),)
    usual = ((TTFT, 95.0), (TPOT, 95.0), (E2E, 95.0))
    assert default_asked(requests, 7, ("tpot",)) == default_asked(Trace([0.0], [1], [1]), 30) == usual
