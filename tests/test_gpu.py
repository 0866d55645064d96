"""The engine on a real NVIDIA GPU against the engine on the CPU: one command for whoever has one.

    python -m pytest tests/test_gpu.py

Run on an NVIDIA H200 (torch 2.11, triton 3.6); without a GPU tests/test_gpu_engine.py drives the same path on the CPU.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from paretune.kernels.linear import linear, pack, reference
from paretune.kernels.stored_weight import store
from paretune.runtime.device import gpus
from paretune.runtime.engine import Engine, Request
from paretune.runtime.random_model import write_random_model
from paretune.runtime.sampler import SamplingParams
from paretune.runtime.spec import Deployment, Pool

HERE = gpus()
NEEDED = os.environ.get("PARETUNE_NEED_GPU") == "1"  # benchmarks/gpu.py: there a skipped check is none
pytestmark = pytest.mark.skipif(not HERE and not NEEDED, reason="no NVIDIA GPU that torch sees")

LIMITS = {
    "weight_dtype": "fp32", "kv_cache_dtype": "fp32", "max_model_len": 256, "max_num_seqs": 12,
    "max_num_batched_tokens": 224, "block_size": 16, "num_kv_blocks": 64,
}  # fmt: skip
# how far logits may lie from those of the CPU, over the largest: the arithmetic differs where docs/serving.md says so
TOLERANCE = {
    "fp32": 1e-4,
    "bf16": 0.05,
    "fp16": 0.02,
    "fp8": 0.12,
    "int8": 0.08,
    "int4": 0.08,
    "nvfp4": 0.05,
    "mxfp4": 0.05,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(
        tmp_path_factory.mktemp("model") / "small",
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=256,
        dtype="float32",
    )


@pytest.fixture(scope="module")
def mixture_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(
        tmp_path_factory.mktemp("model") / "mixture",
        family="qwen2_moe",
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        dtype="float32",
        experts={
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 256,
        },
    )


@pytest.fixture(autouse=True)
def empty_gpu() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def on_gpu(**changes: object) -> Deployment:
    name = HERE[0].name.removeprefix("NVIDIA ")
    return Deployment(pools=(Pool.model_validate({**LIMITS, "accelerator": name, **changes}),))


def on_cpu(**changes: object) -> Deployment:
    return Deployment(pools=(Pool.model_validate({**LIMITS, **changes}),))


def answers(engine: Engine, count: int = 12) -> dict[int, list[int]]:
    rng = np.random.default_rng(2)
    for number in range(count):
        sampling = SamplingParams(
            max_tokens=5 + 3 * number, temperature=float(number % 3 == 1), seed=number, top_p=0.9, ignore_eos=True
        )
        engine.add(Request(number, rng.integers(0, 512, 3 + 11 * number).astype(np.int32), sampling))
    found: dict[int, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


def logits(deployment: Deployment, model_dir: Path) -> torch.Tensor:
    """Of every token of a prompt, and of an answer to it that is the same for everybody: it is part of the prompt."""
    prompt = np.random.default_rng(1).integers(0, 512, 200).astype(np.int32)
    with Engine(deployment, model_dir, keep_logits=True) as engine:
        engine.add(Request(0, prompt, SamplingParams(max_tokens=1, temperature=0)))
        while engine.has_work:
            engine.step()
        return torch.cat([kept.logits for kept in sorted(engine.kept_logits, key=lambda kept: kept.start)])


CASES = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "few_graphs": {"cuda_graph_sizes": [3, 8]},
    "chunked": {"max_num_batched_tokens": 13},
    "preemption": {"num_kv_blocks": 18},
    "swap": {"num_kv_blocks": 18, "preemption": "swap", "host_kv_blocks": 40},
}


@pytest.mark.parametrize("case", CASES)
def test_the_gpu_answers_token_by_token_as_the_cpu_does(model_dir: Path, case: str) -> None:
    with Engine(on_cpu(), model_dir) as engine:
        expected = answers(engine)
    with Engine(on_gpu(**CASES[case]), model_dir) as engine:
        assert answers(engine) == expected


# every precision of the weights, and of the cache; each kernel compiles for each, so not each with each
PRECISIONS = [("model_dir", weights, "fp32" if weights == "fp32" else "bf16") for weights in TOLERANCE]
PRECISIONS += [("model_dir", "bf16", cache) for cache in ("fp32", "fp8", "int8")]
PRECISIONS += [("mixture_dir", "fp32", "fp32"), ("mixture_dir", "bf16", "bf16"), ("mixture_dir", "fp16", "bf16")]
STEPS = {"one_prefill": {}, "token_by_token": {"max_num_seqs": 1, "max_num_batched_tokens": 1}}


@pytest.mark.parametrize(("model", "weight_dtype", "kv_cache_dtype"), PRECISIONS)
def test_logits_of_every_precision_are_near_the_cpus(
    model: str, weight_dtype: str, kv_cache_dtype: str, request: pytest.FixtureRequest
) -> None:
    model_dir = request.getfixturevalue(model)
    precision = {"weight_dtype": weight_dtype, "kv_cache_dtype": kv_cache_dtype}
    theirs = logits(on_cpu(**precision), model_dir)
    apart = {how: logits(on_gpu(**precision, **steps), model_dir) - theirs for how, steps in STEPS.items()}
    allowed = (TOLERANCE[weight_dtype] + (0.0 if kv_cache_dtype == "fp32" else 0.02)) * theirs.abs().max()
    assert {how: float(error.abs().max()) for how, error in apart.items() if error.abs().max() >= allowed} == {}


@pytest.mark.parametrize("precision", ["int4", "nvfp4", "mxfp4", "fp8", "int8"])
@pytest.mark.parametrize("rows", [1, 17, 65, 300])
def test_a_weight_beyond_what_is_expanded_at_once_multiplies_as_on_the_cpu(precision: str, rows: int) -> None:
    weight, x = torch.randn(17000, 2112), torch.randn(rows, 2112)
    oracle = reference(x, store(weight, precision).expanded())
    found = linear(x.cuda().bfloat16(), pack(weight, precision, device=torch.device("cuda"))).cpu().double()
    assert (found - oracle).abs().max() < 0.03 * oracle.abs().max()


@pytest.mark.skipif(len(HERE) < 2, reason="fewer than two GPUs")
def test_two_gpus_answer_as_one_does(model_dir: Path) -> None:
    with Engine(on_gpu(), model_dir) as engine:
        expected = answers(engine)
    with Engine(on_gpu(tensor_parallel_size=2), model_dir) as engine:
        assert answers(engine) == expected
