"""Scheduling and cache knobs on the real engine: whatever they decide, every token's logits stay what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paretune.runtime.engine import Engine, EngineStats, Request
from paretune.runtime.memory import memory_need
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.random_model import write_random_model
from paretune.runtime.sampler import SamplingParams
from paretune.runtime.spec import Deployment, Pool

VOCAB = 64
PLENTY = {
    "weight_dtype": "fp32",
    "kv_cache_dtype": "fp32",
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 48,
    "block_size": 4,
    "num_kv_blocks": 400,
}
TIGHT = {**PLENTY, "num_kv_blocks": 26}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(
        tmp_path_factory.mktemp("model") / "tiny",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        dtype="float32",
    )


def conversations() -> list[Request]:
    """Prompts that begin alike in pairs, come back later, and together need more blocks than TIGHT has."""
    rng = np.random.default_rng(3)
    prefixes = rng.integers(0, VOCAB, (4, 32)).astype(np.int32)
    requests = []
    for number in range(16):
        tail = rng.integers(0, VOCAB, 3 + number % 5).astype(np.int32)
        sampling = SamplingParams(max_tokens=18 + number % 7, temperature=0.0, ignore_eos=True)
        requests.append(Request(number, np.concatenate([prefixes[number % 4], tail]), sampling, priority=number % 3))
    return requests


def serve(model_dir: Path, pool: dict[str, object], policy: str = "paretune") -> tuple[dict, dict, EngineStats]:
    """Answers; the logits of every computed place; statistics."""
    spec = Deployment(pools=(Pool.model_validate(pool),), scheduler_policy=policy)
    answers: dict[int, list[int]] = {}
    logits: dict[tuple[int, int], np.ndarray] = {}
    with Engine(spec, model_dir, keep_logits=pool.get("tensor_parallel_size", 1) == 1) as engine:
        for request in conversations():
            engine.add(request)
        for _ in range(5000):
            if not engine.has_work:
                break
            for output in engine.step():
                answers.setdefault(output.request_id, []).extend(output.token_ids)
            for kept in engine.kept_logits:
                for i, row in enumerate(kept.logits.numpy()):
                    logits[kept.request_id, kept.start + i] = row.copy()
            engine.kept_logits.clear()
        assert not engine.has_work, "somebody waits for ever"
        stats = engine.stats()
    assert stats.kv_blocks_used == 0
    return answers, logits, stats


@pytest.fixture(scope="module")
def undisturbed(model_dir: Path) -> tuple[dict, dict]:
    answers, logits, stats = serve(model_dir, {**PLENTY, "enable_prefix_caching": False})
    assert stats.preemptions == stats.prefix_hit_tokens == 0
    return answers, logits


def check_same(found: tuple[dict, dict], undisturbed: tuple[dict, dict]) -> None:
    assert found[0] == undisturbed[0]
    assert set(found[1]) <= set(undisturbed[1])
    for place, row in found[1].items():
        np.testing.assert_allclose(row, undisturbed[1][place], atol=1e-4)


def test_swapped_requests_go_on_with_the_same_logits(model_dir: Path, undisturbed: tuple[dict, dict]) -> None:
    answers, logits, stats = serve(
        model_dir, {**TIGHT, "preemption": "swap", "host_kv_blocks": 60, "enable_prefix_caching": False}
    )
    assert stats.swaps == stats.preemptions > 0
    assert stats.blocks_from_host == stats.blocks_to_host > 0
    assert len(logits) == len(undisturbed[1])
    check_same((answers, logits), undisturbed)


def test_blocks_that_the_device_gave_away_are_found_on_the_host(
    model_dir: Path, undisturbed: tuple[dict, dict]
) -> None:
    answers, logits, stats = serve(model_dir, {**TIGHT, "host_kv_blocks": 100})
    _, _, alone = serve(model_dir, TIGHT)
    assert stats.host_hit_tokens > 0
    assert alone.host_hit_tokens == 0
    assert stats.prefix_hit_tokens + stats.host_hit_tokens > alone.prefix_hit_tokens
    check_same((answers, logits), undisturbed)


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ("vllm_v1", {}),
        ("vllm_v1", {"admission": "first_chunk", "scheduling": "priority", "max_num_batched_tokens": 11}),
        ("paretune", {"scheduling": "priority", "preemption": "swap", "host_kv_blocks": 7}),
        ("paretune", {"admission": "estimated_peak", "long_prefill_token_threshold": 5}),
        ("paretune", {"admission": "watermark", "watermark": 0.2, "preemption": "swap", "host_kv_blocks": 200}),
    ],
)
def test_no_scheduling_knob_changes_what_is_said(
    policy: str, changes: dict[str, object], model_dir: Path, undisturbed: tuple[dict, dict]
) -> None:
    answers, logits, _ = serve(model_dir, {**TIGHT, **changes}, policy)
    check_same((answers, logits), undisturbed)


def test_ranks_copy_the_same_blocks(model_dir: Path, undisturbed: tuple[dict, dict]) -> None:
    changes = {"preemption": "swap", "host_kv_blocks": 40, "tensor_parallel_size": 2}
    answers, _, stats = serve(model_dir, {**TIGHT, **changes})
    assert stats.swaps > 0
    assert answers == undisturbed[0]


def test_the_most_urgent_request_answers_first(model_dir: Path) -> None:
    spec = Deployment(pools=(Pool.model_validate({**PLENTY, "scheduling": "priority", "max_num_seqs": 1}),))
    engine = Engine(spec, model_dir)
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    for number, priority in enumerate([5, -1, 0]):
        engine.add(Request(number, np.arange(9, dtype=np.int32), sampling, priority))
    ended = [output.request_id for _ in range(6) for output in engine.step() if output.finish_reason]
    assert ended == [1, 2, 0]


def test_memory_counts_the_host_blocks(model_dir: Path) -> None:
    shape = ModelShape.load(model_dir)
    without, with_host = (Pool.model_validate({**PLENTY, "host_kv_blocks": n}) for n in (0, 100))
    more = memory_need(shape, with_host).kv_cache_bytes - memory_need(shape, without).kv_cache_bytes
    assert more == 100 * 4 * shape.kv_bytes_per_token("fp32")
