"""The simulator under every scheduling knob: jumps equal steps, all is served, and it sees what the engine does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paretune.profiler.simulator import simulate
from paretune.runtime.engine import Engine, Request
from paretune.runtime.random_model import write_random_model
from paretune.runtime.sampler import SamplingParams
from paretune.runtime.spec import Deployment
from paretune.traces.metrics import TTFT
from paretune.traces.trace import PrefixHashes, Trace

from .test_simulator import pool, tables, trace


@st.composite
def knobs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    policy = draw(st.sampled_from(["paretune", "vllm_v1"]))
    ours = policy == "paretune"
    admissions = ["on_demand", "first_chunk", "watermark", *(["estimated_peak"] if ours else [])]
    admission = draw(st.sampled_from(admissions))
    host = draw(st.sampled_from([0, 12, 200])) if ours else 0
    return policy, {
        "admission": admission,
        "watermark": 0.1 if admission == "watermark" else 0.0,
        "scheduling": draw(st.sampled_from(["fcfs", "priority"])),
        "long_prefill_token_threshold": draw(st.sampled_from([0, 48])),
        "host_kv_blocks": host,
        "preemption": draw(st.sampled_from(["recompute", "swap"])) if host else "recompute",
    }


def repeated_prefixes(requests: Trace, seed: int, tokens: int = 16, alike: bool = False) -> Trace:
    """The same requests with prefixes out of five families, a hash for so many tokens; the last hash of each is its
    own, and covers the first tokens of its answer, too.

    alike: the prompts of a family are one prompt, and share the last hash as well.
    """
    rng = np.random.default_rng(seed)
    family = rng.integers(0, 5, len(requests))
    prompts = rng.integers(1, 130, 5)[family] if alike else requests.input_tokens.astype(np.int64)
    whole, rest = np.divmod(prompts, tokens)
    each = [
        [*(1000 * f + np.arange(n)), *([1_000_000 + (f if alike else i)] if r else [])]
        for i, (f, n, r) in enumerate(zip(family, whole, rest))
    ]
    offsets = np.cumsum([0, *map(len, each)])
    hashes = np.array([hash for one in each for hash in one], np.int64)
    prefix = PrefixHashes(hashes=hashes, offsets=offsets, block_size=tokens)
    return Trace(requests.arrival_s, prompts, requests.output_tokens, prefix=prefix)


# who waits may begin with less, once its prefix has left the host: while blocks are evicted nothing may be jumped over
FIRST_CHUNK = {
    "admission": "first_chunk", "watermark": 0.0, "scheduling": "fcfs", "long_prefill_token_threshold": 48,
    "host_kv_blocks": 12, "preemption": "swap",
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@example(seed=0, rate=20.0, chosen=("paretune", FIRST_CHUNK), hashed=16, alike=False, block_size=16, block_copy_s=0.0)
@example(seed=7, rate=20.0, chosen=("paretune", FIRST_CHUNK), hashed=16, alike=False, block_size=16, block_copy_s=2e-3)
@given(
    seed=st.integers(0, 10_000), rate=st.sampled_from([3.0, 20.0]), chosen=knobs(), hashed=st.sampled_from([0, 16, 64]),
    alike=st.booleans(), block_size=st.sampled_from([1, 4, 16]), block_copy_s=st.sampled_from([0.0, 2e-3]),
)  # fmt: skip
def test_jumping_over_decode_steps_changes_nothing_under_any_knob(
    seed: int,
    rate: float,
    chosen: tuple[str, dict[str, Any]],
    hashed: int,
    alike: bool,
    block_size: int,
    block_copy_s: float,
) -> None:
    policy, changes = chosen
    limits = pool(num_kv_blocks=640 // block_size, block_size=block_size, **changes)
    requests = trace(50, rate, seed)
    if hashed:
        requests = repeated_prefixes(requests, seed, hashed, alike)
    priority = np.random.default_rng(seed).integers(0, 3, len(requests)).tolist()
    times = tables(limits)._replace(block_copy_s=block_copy_s)
    fast = simulate(requests, limits, times, policy=policy, priority=priority)
    slow = simulate(requests, limits, times, policy=policy, priority=priority, jump=False)
    assert slow.times.finished.all()
    for name in ("steps", "preemptions", "swaps", "prefix_hit_tokens", "host_hit_tokens", "blocks_to_host"):
        assert getattr(fast, name) == getattr(slow, name), name
    np.testing.assert_allclose(fast.times.end_s, slow.times.end_s, rtol=1e-9)
    again = simulate(requests, limits, times, policy=policy, priority=priority)
    assert again.times.end_s.tobytes() == fast.times.end_s.tobytes()


def test_of_identical_prompts_the_block_that_is_full_first_has_the_name() -> None:
    """Three of them, whose answers begin in one block with their prompt: one is preempted, and finds what is named."""
    prefix = PrefixHashes(hashes=np.array([100, 525] * 3), offsets=np.array([0, 2, 4, 6]), block_size=16)
    requests = Trace([0.0, 0.03, 0.03], [25, 25, 25], [6, 10, 9], prefix=prefix)
    limits = pool(max_model_len=40, max_num_seqs=3, max_num_batched_tokens=40, block_size=4, num_kv_blocks=10)
    for jump in (False, True):
        result = simulate(requests, limits, tables(limits), jump=jump)
        assert (result.steps, result.preemptions, result.prefix_hit_tokens) == (17, 1, 72)


@pytest.mark.parametrize("shared", [False, True])
def test_every_block_that_is_copied_takes_its_time(shared: bool) -> None:
    """All requests are there from the beginning, so that time decides nothing, and only adds up."""
    limits = pool(num_kv_blocks=40, host_kv_blocks=200, preemption="swap")
    requests = trace(50, 20.0, 7)
    requests = repeated_prefixes(requests, 7, 16) if shared else requests
    at_once = dataclasses.replace(requests, arrival_s=np.zeros(len(requests)))
    free, priced = (simulate(at_once, limits, tables(limits)._replace(block_copy_s=seconds)) for seconds in (0.0, 2e-3))
    copied = free.blocks_to_host + free.blocks_from_host
    assert copied > 0
    assert (priced.blocks_to_host, priced.blocks_from_host) == (free.blocks_to_host, free.blocks_from_host)
    assert priced.busy_s - free.busy_s == pytest.approx(2e-3 * copied, rel=1e-9)


def test_urgent_requests_wait_less() -> None:
    limits = pool(scheduling="priority", max_num_seqs=2)
    requests = trace(200, 4.0, 5)
    priority = np.arange(200) % 2
    result = simulate(requests, limits, tables(limits), priority=priority.tolist())
    waits = result.times.values(TTFT)
    assert np.mean(waits[priority == 0]) < 0.2 * np.mean(waits[priority == 1])


@pytest.mark.parametrize("admission", ["watermark", "estimated_peak"])
def test_admitting_less_preempts_less(admission: str) -> None:
    requests = trace(300, 50.0, 1)
    limits = pool(num_kv_blocks=60)
    careful = pool(num_kv_blocks=60, admission=admission, watermark=0.15 if admission == "watermark" else 0.0)
    assert (
        simulate(requests, careful, tables(limits)).preemptions < simulate(requests, limits, tables(limits)).preemptions
    )


def test_a_priority_for_each_request_or_none() -> None:
    limits = pool()
    with pytest.raises(ValueError, match="priority"):
        simulate(trace(3, 1.0, 0), limits, tables(limits), priority=[1, 2])


def test_a_preempted_request_finds_its_own_blocks_as_in_the_engine(tmp_path: Path) -> None:
    """All at once and greedy, so that engine and simulator take the same steps: the same hits, and the same steps."""
    limits = pool(
        max_model_len=96, max_num_seqs=4, max_num_batched_tokens=48, block_size=4, num_kv_blocks=26, weight_dtype="fp32"
    )
    inputs, outputs = np.array([20, 25, 30, 18, 22, 27]), np.array([30, 24, 28, 35, 20, 25])
    model = write_random_model(
        tmp_path / "tiny", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    engine = Engine(Deployment(pools=(limits,)), model)
    rng = np.random.default_rng(0)
    for number, (prompt, answer) in enumerate(zip(inputs.tolist(), outputs.tolist())):
        sampling = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        engine.add(Request(number, rng.integers(0, 64, prompt).astype(np.int32), sampling))
    for _ in range(2000):
        if engine.has_work:
            engine.step()
    measured = engine.stats()
    simulated = simulate(Trace(np.zeros(6), inputs, outputs), limits, tables(limits))
    assert measured.preemptions == simulated.preemptions > 0
    assert measured.prefix_hit_tokens == simulated.prefix_hit_tokens > 0
    assert measured.steps == simulated.steps
