"""A prefill and a decode pool under one clock: closed forms, transfers in order, laws, and steps taken by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.profiler.disaggregated import PARTS, DisaggregatedResult, prefill_trace, simulate_disaggregated
from paretune.profiler.kv_transfer import TransferLink, transfer_time
from paretune.profiler.simulator import simulate
from paretune.profiler.step_time import StepTables, composed_time_s
from paretune.runtime.spec import BadSpec, Deployment, KvTransfer
from paretune.traces.metrics import ITL, PERCENTILES, TPOT, TTFT, Metric, percentiles, summarize
from paretune.traces.trace import BadTrace, PrefixHashes, Trace

from .optimizer_examples import ALL_KEPT, NGRAM
from .test_profiler_operators import LLAMA_8B
from .test_simulator import pool, tables, trace
from .test_simulator_gaps import token_times

BYTES = LLAMA_8B.kv_bytes_per_token("bf16")
REQUEST_S = ((0.01, 0.002), (0.003, 0.02))  # before and after the steps, of both pools


def two_pools(
    prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None, **transfer: Any
) -> Deployment:
    return Deployment(
        pools=(pool(role="prefill", **(prefill or {})), pool(role="decode", **(decode or {}))),
        kv_transfer=KvTransfer.model_validate(transfer),
    )


def link(bytes_per_s: float, latency_s: float = 0.0) -> TransferLink:
    return TransferLink("a wire", bytes_per_s, bytes_per_s, latency_s, True, "a test, 2026-11-27")


def run(
    requests: Trace, deployment: Deployment, wire: TransferLink, scale: tuple[float, float] = (1.0, 1.0), **options: Any
) -> DisaggregatedResult:
    first, second = step_tables(deployment, scale)
    return simulate_disaggregated(requests, deployment, LLAMA_8B, wire, first, second, **options)


def step_tables(deployment: Deployment, scale: tuple[float, float] = (1.0, 1.0)) -> tuple[StepTables, StepTables]:
    prefill, decode = deployment.phases
    answers = tables(decode, scale[1], REQUEST_S[1])
    samples_s = scale[1] * np.arange(decode.max_num_samples + 1) * 1e-5
    return tables(prefill, scale[0], REQUEST_S[0]), answers._replace(samples_s=samples_s)


def one(input_tokens: int, output_tokens: int, arrival_s: float = 0.0) -> Trace:
    return Trace(np.array([arrival_s]), np.array([input_tokens]), np.array([output_tokens]))


def prompt_step_s(step: StepTables, tokens: int) -> float:
    return composed_time_s(step, tokens, 1, 1, 0.0, tokens * (tokens + 1) / 2)


def answer_step_s(step: StepTables, context: int) -> float:
    return composed_time_s(step, 1, 1, 1, float(context), 0.0)


@pytest.mark.parametrize(("input_tokens", "output_tokens"), [(100, 1), (100, 40), (1, 2), (97, 31)])
def test_one_request_waits_for_its_prompt_its_transfer_and_one_step_of_the_decode_pool(
    input_tokens: int, output_tokens: int
) -> None:
    deployment = two_pools()
    first, second = step_tables(deployment, (1.0, 2.0))
    found = run(one(input_tokens, output_tokens, 5.0), deployment, link(1e9, 4e-3), (1.0, 2.0))
    prompt = REQUEST_S[0][0] + (
        prompt_step_s(first, input_tokens) if input_tokens > 1 else answer_step_s(first, 1)
    ) + REQUEST_S[0][1]  # fmt: skip
    blocks = -(-input_tokens // 16)
    transfer = 4e-3 + blocks * 16 * BYTES / 1e9
    steps = [answer_step_s(second, input_tokens + i) for i in range(output_tokens)]
    ttft = prompt + REQUEST_S[1][0] + transfer + steps[0] + REQUEST_S[1][1]
    times = found.result.times
    assert times.values(TTFT)[0] == pytest.approx(ttft, rel=1e-12)
    assert times.end_s[0] - 5.0 == pytest.approx(ttft + sum(steps[1:]), rel=1e-12)
    if output_tokens > 30:
        assert times.values(Metric("ttf", 30))[0] == pytest.approx(ttft + sum(steps[1:30]), rel=1e-12)
    assert found.transfers.sent_bytes[0] == blocks * 16 * BYTES
    assert found.result.steps == 1 + output_tokens
    assert found.prefill_busy_s + found.decode_busy_s == found.result.busy_s
    assert sum(found.parts[name][0] for name in PARTS) == pytest.approx(ttft, rel=1e-12)
    assert found.parts["transfer"][0] == pytest.approx(transfer, rel=1e-12)


def test_where_the_prefill_pool_sends_the_first_token_the_transfer_is_in_the_gap_to_the_second() -> None:
    deployment = two_pools(first_token="prefill")
    first, second = step_tables(deployment)
    found = run(one(100, 40), deployment, link(1e9, 4e-3))
    times = found.result.times
    prompt_s = REQUEST_S[0][0] + prompt_step_s(first, 100)
    assert times.values(TTFT)[0] == pytest.approx(prompt_s + REQUEST_S[0][1], rel=1e-12)
    steps = [answer_step_s(second, 101 + i) for i in range(39)]
    transfer = 4e-3 + 112 * BYTES / 1e9
    second_s = prompt_s + transfer + steps[0] + REQUEST_S[1][1]
    assert times.values(ITL)[0] == pytest.approx(second_s - prompt_s - REQUEST_S[0][1], rel=1e-12)
    assert times.end_s[0] == pytest.approx(second_s + sum(steps[1:]), rel=1e-12)
    assert times.values(Metric("ttf", 30))[0] == pytest.approx(second_s + sum(steps[1:29]), rel=1e-12)
    assert len(times.sample(ITL)) == 39
    # an answer of one token ends there, and nothing is transferred
    alone = run(one(100, 1), deployment, link(1e9, 4e-3))
    assert alone.result.times.end_s[0] == alone.result.times.first_token_s[0]
    assert np.isnan(alone.transfers.here_s[0])
    assert alone.result.times.finished.all()


def test_kv_that_leaves_layer_by_layer_is_late_by_one_layer_where_the_link_keeps_up() -> None:
    deployment = two_pools(overlap="layers", first_token="prefill")
    first, _ = step_tables(deployment)
    step_s, layers = prompt_step_s(first, 100), LLAMA_8B.num_layers
    computed_s = REQUEST_S[0][0] + step_s
    for link_s in (step_s / 4, step_s, 3 * step_s):
        found = run(one(100, 5), deployment, link(112 * BYTES / link_s))
        begin_s = computed_s - step_s * (1 - 1 / layers)
        expected = max(begin_s + link_s, computed_s + link_s / layers)
        assert found.transfers.here_s[0] == pytest.approx(expected, rel=1e-12)
        assert found.transfers.here_s[0] - found.transfers.began_s[0] >= link_s * (1 - 1e-12)
        plain = run(one(100, 5), two_pools(first_token="prefill"), link(112 * BYTES / link_s))
        assert found.transfers.here_s[0] <= plain.transfers.here_s[0]


def test_two_prompts_of_one_step_leave_one_after_the_other() -> None:
    requests = Trace(np.zeros(2), np.array([32, 16]), np.array([4, 4]))
    found = run(requests, two_pools(), link(BYTES * 100.0, 0.5)).transfers  # 10 ms a token
    handed_s = found.handed_s
    assert handed_s[0] == handed_s[1]
    np.testing.assert_allclose(found.began_s - handed_s, [0.0, 0.32])
    np.testing.assert_allclose(found.here_s - handed_s, [0.82, 0.98])


def in_order(found: DisaggregatedResult, requests: Trace, deployment: Deployment, wire: TransferLink) -> np.ndarray:
    """When each request's KV is there, written down once more: in order of hand-over, both links free."""
    prefill, decode = deployment.phases
    time = transfer_time(LLAMA_8B, prefill, decode, wire)
    handed_s, sender = found.transfers.handed_s, found.prefilled.replica
    sends, receives = dict.fromkeys(range(prefill.replicas), 0.0), dict.fromkeys(range(decode.replicas), 0.0)
    here_s = np.full(len(requests), np.nan)
    order = sorted((s, i) for i, s in enumerate(handed_s) if not np.isnan(s))
    for turn, (at_s, i) in enumerate(order):
        receiver = turn % decode.replicas
        begin_s = max(at_s, sends[sender[i]], receives[receiver])
        end_s = begin_s + -(-int(requests.input_tokens[i]) // 16) * 16 * time.s_per_token
        sends[sender[i]] = receives[receiver] = end_s
        here_s[i] = end_s + wire.latency_s
    return here_s


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.sampled_from([1.0, 10.0, 60.0]),
    replicas=st.sampled_from([(1, 1), (2, 1), (3, 2), (1, 3)]),
    ms_per_token=st.sampled_from([1e-3, 0.05, 1.0]),
    early=st.booleans(),
)
def test_transfers_wait_for_both_links_in_the_order_of_their_prompts(
    seed: int, rate: float, replicas: tuple[int, int], ms_per_token: float, early: bool
) -> None:
    deployment = two_pools(
        {"replicas": replicas[0]}, {"replicas": replicas[1]}, first_token="prefill" if early else "decode"
    )
    requests, wire = trace(60, rate, seed), link(BYTES / ms_per_token * 1e3, 0.003)
    found = run(requests, deployment, wire)
    np.testing.assert_allclose(found.transfers.here_s, in_order(found, requests, deployment, wire), rtol=1e-12)
    moved = found.transfers.here_s - found.transfers.began_s
    sent = ~np.isnan(moved)
    assert (moved[sent] >= found.transfers.sent_bytes[sent] / wire.send_bytes_per_s).all()
    assert (sent == (requests.output_tokens > 1 if early else True)).all()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.sampled_from([0.5, 5.0, 30.0]),
    blocks=st.sampled_from([32, 40, 200]),
    router=st.sampled_from(["round_robin", "least_outstanding_tokens"]),
    first_token=st.sampled_from(["prefill", "decode"]),
    overlap=st.sampled_from(["none", "layers"]),
)
def test_every_request_is_finished_or_rejected_tokens_add_up_and_time_goes_forward(
    seed: int, rate: float, blocks: int, router: str, first_token: str, overlap: str
) -> None:
    deployment = two_pools(
        {"replicas": 2, "num_kv_blocks": blocks},
        {"replicas": 3, "num_kv_blocks": blocks, "router": router},
        first_token=first_token,
        overlap=overlap,
    )
    requests = trace(50, rate, seed, longest=300)
    fits = requests.input_tokens + requests.output_tokens <= 512
    found = run(requests, deployment, link(2e9, 1e-3))
    times = found.result.times
    assert found.result.rejected == (~fits).sum()
    assert (times.finished == fits).all()
    assert (times.output_tokens == np.where(fits, requests.output_tokens, 0)).all()
    rows = np.flatnonzero(fits)
    assert (times.first_token_s[rows] <= times.end_s[rows]).all()
    assert (times.first_token_s[rows] > times.scheduled_s[rows]).all()
    for name in PARTS:
        assert (found.parts[name][~np.isnan(found.parts[name])] >= 0).all(), name
    gap_s = times.sample(ITL)
    assert len(gap_s) == (requests.output_tokens[rows] - 1).sum()
    assert gap_s.sum() == pytest.approx((times.end_s - times.first_token_s)[rows].sum(), rel=1e-9)
    again = run(requests, deployment, link(2e9, 1e-3))
    assert again.result.times.end_s.tobytes() == times.end_s.tobytes()
    stepped = run(requests, deployment, link(2e9, 1e-3), jump=False).result.times
    np.testing.assert_allclose(stepped.end_s, times.end_s, rtol=1e-9)
    assert summarize(times).values["itl"]["p99"] == pytest.approx(np.percentile(gap_s, 99), rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), rate=st.sampled_from([2.0, 20.0]), blocks=st.sampled_from([32, 40, 200]))
def test_the_decode_pool_is_the_scheduler_stepped_by_hand(seed: int, rate: float, blocks: int) -> None:
    deployment = two_pools({"replicas": 2}, {"num_kv_blocks": blocks})
    requests = trace(40, rate, seed)
    found = run(requests, deployment, link(2e9, 1e-3))
    here_s = found.transfers.here_s
    order = np.argsort(here_s, kind="stable")
    _, decode = deployment.phases
    _, second = step_tables(deployment)
    # request_s[0] lies before the transfer, so that it stands in the arrivals already
    arrived = Trace(here_s[order], requests.input_tokens[order], requests.output_tokens[order])
    by_hand = token_times(arrived, decode, second._replace(request_s=np.array([0.0, REQUEST_S[1][1]])))
    np.testing.assert_allclose(found.result.times.first_token_s[order], [times[0] for times in by_hand], rtol=1e-12)
    np.testing.assert_allclose(found.result.times.end_s[order], [times[-1] for times in by_hand], rtol=1e-9)
    gaps = np.sort(np.concatenate([np.diff(times) for times in by_hand]))
    np.testing.assert_allclose(np.sort(found.result.times.sample(ITL)), gaps, rtol=1e-9, atol=1e-12)


def test_itl_of_some_requests_is_that_of_their_own_gaps_the_one_between_the_pools_included() -> None:
    deployment, requests = two_pools(first_token="prefill"), trace(40, 4.0, 3)
    found = run(requests, deployment, link(2e9, 1e-3))
    times, here_s = found.result.times, found.transfers.here_s
    _, decode = deployment.phases
    _, second = step_tables(deployment)
    rows = np.flatnonzero(requests.output_tokens > 1)
    rows = rows[np.argsort(here_s[rows], kind="stable")]
    arrived = Trace(here_s[rows], requests.input_tokens[rows] + 1, requests.output_tokens[rows] - 1)
    later = token_times(arrived, decode, second._replace(request_s=np.array([0.0, REQUEST_S[1][1]])))
    some = np.arange(40) % 3 == 0
    by_hand = [np.diff([times.first_token_s[row], *at_s]) for row, at_s in zip(rows, later) if some[row]]
    gap_s = np.concatenate(by_hand)
    np.testing.assert_allclose(np.sort(times.sample(ITL, some)), np.sort(gap_s), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(times.percentiles(ITL, PERCENTILES, some), percentiles(gap_s, PERCENTILES), rtol=1e-9)
    assert summarize(times, some).values["itl"]["mean"] == pytest.approx(gap_s.mean())


def test_the_prefill_pool_is_a_pool_that_is_asked_for_one_token() -> None:
    deployment = two_pools({"replicas": 2})
    prefill, _ = deployment.phases
    first, _ = step_tables(deployment)
    requests = trace(60, 8.0, 1)
    asked = Trace(requests.arrival_s, requests.input_tokens, np.ones(60, np.int32))
    alone = simulate(asked, prefill, first)
    found = prefill_trace(requests, deployment, first)
    np.testing.assert_array_equal(found.computed_s, alone.times.first_token_s - first.request_s[1])
    assert set(found.replica.tolist()) == {0, 1}
    steps = found.last_step_s
    assert (steps >= first.tokens_s[1]).all()
    # and what was computed once may be used for other decode pools
    wire = link(1e9)
    again = run(requests, deployment, wire, prefilled=found)
    assert again.result.times.end_s.tobytes() == run(requests, deployment, wire).result.times.end_s.tobytes()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_one_after_the_other_with_a_link_that_takes_no_time_they_are_served_as_in_a_mixed_pool(seed: int) -> None:
    deployment = two_pools(first_token="prefill")
    prefill, decode = deployment.phases
    plain = trace(20, 1.0, seed)
    requests = Trace(np.arange(20) * 60.0, plain.input_tokens, plain.output_tokens)
    found = simulate_disaggregated(requests, deployment, LLAMA_8B, link(1e30), tables(prefill), tables(decode))
    mixed = simulate(requests, pool(), tables(pool()))
    times = found.result.times
    np.testing.assert_allclose(times.first_token_s, mixed.times.first_token_s, rtol=1e-12)
    np.testing.assert_allclose(times.end_s, mixed.times.end_s, rtol=1e-12)
    long = requests.output_tokens >= 30
    np.testing.assert_allclose(times.kth_token_s[long], mixed.times.kth_token_s[long], rtol=1e-12)
    np.testing.assert_allclose(np.sort(times.sample(ITL)), np.sort(mixed.times.sample(ITL)), rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), rate=st.sampled_from([1.0, 5.0, 40.0]), replicas=st.sampled_from([1, 3]))
def test_with_one_seat_each_no_first_token_is_later_than_in_a_mixed_pool_of_as_many_prefill_replicas(
    seed: int, rate: float, replicas: int
) -> None:
    # one queue each, served in order: who leaves earlier (after the prompt, not the answer) makes nobody wait longer
    limits = {"max_num_seqs": 1, "replicas": replicas}
    deployment = two_pools(limits, {"replicas": 4}, first_token="prefill")
    first, _ = step_tables(deployment)
    requests = trace(40, rate, seed)
    mixed = simulate(requests, pool(**limits), first)
    found = run(requests, deployment, link(1e30))
    assert (found.result.times.first_token_s <= mixed.times.first_token_s + 1e-9).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), rate=st.sampled_from([1.0, 20.0]), faster=st.sampled_from([1.1, 2.0, 100.0]))
def test_a_faster_link_brings_no_kv_later_and_with_one_seat_no_token(seed: int, rate: float, faster: float) -> None:
    deployment = two_pools({"replicas": 2}, {"replicas": 2, "max_num_seqs": 1})
    requests = trace(40, rate, seed, longest=100)
    slow, fast = (run(requests, deployment, link(1e8 * factor, 1e-3)) for factor in (1.0, faster))
    assert (fast.transfers.here_s <= slow.transfers.here_s + 1e-12).all()
    assert (fast.result.times.first_token_s <= slow.result.times.first_token_s + 1e-9).all()
    assert (fast.result.times.end_s <= slow.result.times.end_s + 1e-9).all()


def test_answers_are_no_longer_interrupted_by_prompts() -> None:
    requests = trace(200, 12.0, 3, longest=120)
    deployment = two_pools()
    _, second = step_tables(deployment)
    mixed = simulate(requests, pool(), second)
    found = run(requests, deployment, link(50e9, 5e-6))
    assert np.nanpercentile(found.result.times.values(TPOT), 95) < np.nanpercentile(mixed.times.values(TPOT), 95)
    # steps of the decode pool have one token of each request
    longest_s = found.result.times.sample(ITL).max()
    assert longest_s <= composed_time_s(second, 8, 8, 8, 8 * 512.0, 0.0)


def test_prefixes_are_found_in_the_prefill_pool() -> None:
    n, block = 30, 16
    hashes = PrefixHashes.of([[1, 2, 3, 100 + i] for i in range(n)], block)
    requests = Trace(np.arange(n) * 0.2, np.full(n, 80), np.full(n, 3), prefix=hashes)
    found = run(requests, two_pools(), link(1e9))
    assert found.result.prefix_hit_tokens == 48 * (n - 1)
    cold = run(requests, two_pools({"enable_prefix_caching": False}), link(1e9))
    assert cold.result.prefix_hit_tokens == 0
    assert found.result.times.values(TTFT).mean() < cold.result.times.values(TTFT).mean()
    # all of a prompt's KV travels, whoever computed it
    assert (found.transfers.sent_bytes == 80 * BYTES).all()


def test_a_decode_pool_may_speculate_as_the_log_recorded() -> None:
    requests = trace(30, 2.0, 5)
    deployment = two_pools({}, NGRAM)
    with pytest.raises(BadTrace, match="speculation"):
        run(requests, deployment, link(1e9))
    kept = Trace(requests.arrival_s, requests.input_tokens, requests.output_tokens, acceptance=ALL_KEPT)
    found, plain = run(kept, deployment, link(1e9)), run(kept, two_pools(), link(1e9))
    assert found.result.accepted_tokens > 0
    assert found.result.times.end_s.sum() < plain.result.times.end_s.sum()


def test_what_is_not_simulated_is_refused_by_the_fields_name() -> None:
    with pytest.raises(BadSpec) as caught:
        run(one(10, 5), two_pools({"pipeline_parallel_size": 2}, overlap="layers"), link(1e9))
    assert caught.value.where == "kv_transfer.overlap"
    with pytest.raises(BadSpec) as caught:
        run(one(400, 200), two_pools(), link(1e9))
    assert caught.value.where == "max_model_len"


def test_pipelines_serve_in_both_pools() -> None:
    requests = trace(40, 10.0, 2)
    deployment = two_pools({"pipeline_parallel_size": 2}, {"pipeline_parallel_size": 2})
    found = run(requests, deployment, link(1e9))
    assert found.result.times.finished.all()
    assert len(found.result.times.sample(ITL)) == (requests.output_tokens - 1).sum()
