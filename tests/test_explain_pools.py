"""Explain over two pools: parts of both and of the way between them add up to every metric."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.profiler.explain_pools import NAMES, POOL_WORDS, PoolsExplained, PoolStep, explain_pools
from paretune.profiler.step_time import ModeledStep, StepTables
from paretune.runtime.spec import Deployment
from paretune.traces.metrics import E2E, ITL, TPOT, TTFT, BadTarget, Metric, summarize
from paretune.traces.trace import Trace

from .optimizer_examples import ALL_KEPT, NGRAM
from .test_disaggregated import (
    BYTES,
    LLAMA_8B,
    REQUEST_S,
    answer_step_s,
    link,
    one,
    prompt_step_s,
    run,
    step_tables,
    two_pools,
)
from .test_explain import limits_of
from .test_simulator import trace

ASKED = tuple((metric, p) for metric in (TTFT, Metric("ttf", 30), TPOT, E2E) for p in (5.0, 50.0, 95.0))


def pool_step(tables: StepTables) -> PoolStep:
    return PoolStep(ModeledStep(tables, True, 0.1, ()), limits_of(tables))


def explained(requests: Trace, deployment: Deployment, bytes_per_s: float, asked: Any = ASKED) -> PoolsExplained:
    first, second = step_tables(deployment)
    return explain_pools(
        requests, deployment, LLAMA_8B, link(bytes_per_s, 1e-3), pool_step(first), pool_step(second), asked
    )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.sampled_from([0.5, 5.0, 30.0]),
    blocks=st.sampled_from([32, 40, 200]),
    first_token=st.sampled_from(["prefill", "decode"]),
    overlap=st.sampled_from(["none", "layers"]),
    router=st.sampled_from(["round_robin", "least_outstanding_tokens"]),
)
def test_the_parts_of_every_metric_add_up_to_it_and_recording_changes_no_time(
    seed: int, rate: float, blocks: int, first_token: str, overlap: str, router: str
) -> None:
    deployment = two_pools(
        {"replicas": 2, "num_kv_blocks": blocks},
        {"replicas": 2, "num_kv_blocks": blocks, "router": router},
        first_token=first_token,
        overlap=overlap,
    )
    requests = trace(40, rate, seed, longest=300)  # some are longer than max_model_len
    found = explained(requests, deployment, 5e8)
    for each in found.metrics:
        assert sum(part.seconds for part in each.parts) == pytest.approx(each.value, rel=1e-9)
        for part in each.parts:
            assert part.name in NAMES
            assert part.name in POOL_WORDS
            assert sum(part.by_resource.values()) == pytest.approx(part.seconds, rel=1e-9)
    plain = run(requests, deployment, link(5e8, 1e-3)).result
    np.testing.assert_allclose(found.run.result.times.end_s, plain.times.end_s, rtol=1e-9)
    assert len(found.steps[0]) + len(found.steps[1]) == plain.steps
    assert found.pools[0].result.preemptions + found.pools[1].result.preemptions == plain.preemptions


def test_of_one_request_every_part_is_known() -> None:
    deployment = two_pools()
    first, second = step_tables(deployment)
    (ttft,) = explained(one(100, 5), deployment, 1e9, [(TTFT, 50.0)]).metrics
    parts = {part.name: part.seconds for part in ttft.parts}
    expected = {
        "prefill/to_scheduler": REQUEST_S[0][0],
        "prefill/prefill": prompt_step_s(first, 100),
        "to_decode_pool": REQUEST_S[0][1] + REQUEST_S[1][0],
        "transfer": 1e-3 + 112 * BYTES / 1e9,
        "decode/prefill": answer_step_s(second, 100),
        "decode/to_client": REQUEST_S[1][1],
    }
    assert parts == pytest.approx(expected)
    links = next(part for part in ttft.parts if part.name == "transfer")
    assert links.bound == "links"


def test_a_slow_link_is_named() -> None:
    requests, wide = trace(60, 10.0, 4), two_pools({}, {"num_kv_blocks": 2000, "max_num_seqs": 64})
    slow = explained(requests, wide, 1e8, [(TTFT, 95.0)]).metrics[0]
    assert slow.parts[0].name == "link_queue"
    fast = explained(requests, wide, 50e9, [(TTFT, 95.0)]).metrics[0]
    assert slow.seconds("link_queue", "transfer") > 10 * fast.seconds("link_queue", "transfer")


def test_where_the_prefill_pool_sends_the_first_token_the_way_of_kv_is_in_tpot() -> None:
    deployment = two_pools(first_token="prefill")
    ttft, tpot = explained(one(100, 5), deployment, 1e9, [(TTFT, 50.0), (TPOT, 50.0)]).metrics
    assert "transfer" not in {part.name for part in ttft.parts}
    assert tpot.seconds("transfer") == pytest.approx((1e-3 + 112 * BYTES / 1e9) / 4)


def test_single_gaps_are_refused_by_the_metrics_name() -> None:
    with pytest.raises(BadTarget) as caught:
        explained(one(10, 5), two_pools(), 1e9, [(ITL, 99.0)])
    assert caught.value.exit_code == 2
    assert "itl" in str(caught.value)


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_a_run_that_was_recorded_tells_no_gaps(first_token: str) -> None:
    times = explained(trace(20, 5.0, 2), two_pools(first_token=first_token), 1e9).run.result.times
    assert times.gaps is None
    assert "itl" not in summarize(times).values


def test_speculation_and_preemption_stand_in_the_decode_pool() -> None:
    plain = trace(40, 10.0, 6)
    requests = Trace(plain.arrival_s, plain.input_tokens, plain.output_tokens, acceptance=ALL_KEPT)
    found = explained(requests, two_pools({}, {**NGRAM, "num_kv_blocks": 32}), 50e9)
    for each in found.metrics:
        assert sum(part.seconds for part in each.parts) == pytest.approx(each.value, rel=1e-9)
    assert found.pools[1].result.preemptions > 0
    assert found.pools[0].result.preemptions == 0
    assert any(part.name == "decode/preempted" for part in found.metrics[-1].parts)
