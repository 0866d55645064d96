"""Logits with adapters are those of Hugging Face transformers with each adapter merged into its weights (fp32)."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from paretune.runtime.engine import Engine, Output, Request
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.random_adapter import ALL_LINEAR, write_random_adapter
from paretune.runtime.sampler import SamplingParams
from paretune.runtime.spec import Deployment, Pool

SIZES = {
    "vocab_size": 199, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.25, "eos_token_id": None,
    "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, head_dim=16, attention_bias=True, mlp_bias=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}
# name -> what write_random_adapter takes, and the scale that merging uses, worked out by hand
ADAPTERS = {
    "everything": ({"rank": 8, "alpha": 4, "target_modules": ALL_LINEAR}, 0.5),
    "q_and_v": ({"rank": 5, "alpha": 10, "target_modules": ("q_proj", "v_proj")}, 2.0),
    "rslora": ({"rank": 16, "alpha": 4, "target_modules": ("o_proj", "down_proj"), "use_rslora": True}, 1.0),
    "bf16_k_up": ({"rank": 1, "alpha": 1, "target_modules": ("k_proj", "up_proj"), "dtype": torch.bfloat16}, 1.0),
}
POOL = Pool(
    weight_dtype="fp32", kv_cache_dtype="fp32", max_model_len=128, max_num_seqs=4, max_num_batched_tokens=128,
    block_size=8, num_kv_blocks=64, max_loras=4, max_lora_rank=16,
)  # fmt: skip
CASES = {
    "plain": {},
    "chunked_prefill": {"max_num_batched_tokens": 11},
    "preemption": {"num_kv_blocks": 16},
    "swap": {"num_kv_blocks": 16, "preemption": "swap", "host_kv_blocks": 32},
    "one_slot": {"max_loras": 1},
    "two_slots": {"max_loras": 2, "max_cpu_loras": 2},
    "tensor_parallel": {"tensor_parallel_size": 2, "max_loras": 2},
}
Models = dict[str, tuple[Path, dict[str | None, torch.nn.Module]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Of each family: the base's folder, and transformers' models of the base (None) and of each adapter merged in."""
    made: Models = {}
    for family, config in CONFIGS.items():
        torch.manual_seed(1)
        config._attn_implementation = "eager"
        base = AutoModelForCausalLM.from_config(config).float().eval()
        folder = tmp_path_factory.mktemp(family)
        base.save_pretrained(folder)
        merged: dict[str | None, torch.nn.Module] = {None: base}
        for seed, (name, (asked, scale)) in enumerate(ADAPTERS.items()):
            path = write_random_adapter(folder / name, ModelShape.load(folder), std=0.2, seed=seed, **asked)
            tensors = load_file(path / "adapter_model.safetensors")
            merged[name] = copy.deepcopy(base)
            for key in [key for key in tensors if ".lora_A." in key]:
                module = merged[name].get_submodule(
                    key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                )
                delta = scale * tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
                module.weight.data += delta.float()
        made[family] = folder, merged
    return made


def deployment(folder: Path, **changes: object) -> Deployment:
    adapters = [{"name": name, "path": str(folder / name)} for name in ADAPTERS]
    pool = Pool.model_validate({**POOL.model_dump(), **changes})
    return Deployment.model_validate({"pools": [pool.model_dump()], "adapters": adapters})


def run(engine: Engine, asked: list[tuple[np.ndarray, str | None]], max_tokens: int) -> dict[int, list[Output]]:
    outputs: dict[int, list[Output]] = {}
    for request_id, (prompt, adapter) in enumerate(asked):
        engine.add(Request(request_id, prompt, SamplingParams(max_tokens=max_tokens, temperature=0), adapter=adapter))
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def check(
    engine: Engine,
    merged: dict[str | None, torch.nn.Module],
    asked: list[tuple[np.ndarray, str | None]],
    outputs: dict[int, list[Output]],
) -> None:
    for request_id, (prompt, adapter) in enumerate(asked):
        answer = [token for output in outputs[request_id] for token in output.token_ids]
        with torch.no_grad():
            expected = merged[adapter](torch.tensor([prompt.tolist() + answer])).logits[0]
        kept = [kept for kept in engine.kept_logits if kept.request_id == request_id]
        assert kept
        for start, logits in ((each.start, each.logits) for each in kept):
            error = (logits - expected[start : start + len(logits)]).abs().max() / expected.abs().max()
            assert error < 1e-4, (adapter, start)
        assert answer == expected[len(prompt) - 1 : -1].argmax(dim=1).tolist()


def mixed_requests() -> list[tuple[np.ndarray, str | None]]:
    rng = np.random.default_rng(5)
    named = ["everything", None, "q_and_v", "rslora", "bf16_k_up", "q_and_v", None, "everything"]
    lengths = (37, 5, 41, 16, 9, 30, 17, 3)
    return [(rng.integers(0, 199, n).astype(np.int32), name) for n, name in zip(lengths, named)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_mixed_batch_has_the_logits_of_merged_weights(models: Models, family: str, case: str) -> None:
    folder, merged = models[family]
    asked = mixed_requests()
    with Engine(deployment(folder, **CASES[case]), folder, keep_logits=True) as engine:
        outputs = run(engine, asked, max_tokens=20)
        assert (engine.stats().preemptions > 0) == (case in ("preemption", "swap"))
        check(engine, merged, asked, outputs)


@pytest.mark.parametrize("case", ["chunked_prefill", "tensor_parallel"])
def test_greedy_tokens_are_those_of_merged_weights(models: Models, case: str) -> None:
    """Without kept logits the last layer sees the sampling rows alone, each with its own adapter."""
    folder, merged = models["llama"]
    asked = mixed_requests()
    with Engine(deployment(folder, **CASES[case]), folder) as engine:
        outputs = run(engine, asked, max_tokens=12)
    for request_id, (prompt, adapter) in enumerate(asked):
        answer = [token for output in outputs[request_id] for token in output.token_ids]
        with torch.no_grad():
            expected = merged[adapter](torch.tensor([prompt.tolist() + answer])).logits[0]
        assert answer == expected[len(prompt) - 1 : -1].argmax(dim=1).tolist()


@pytest.mark.parametrize(
    "sizes", [{"context_parallel_size": 2}, {"context_parallel_size": 2, "tensor_parallel_size": 2}]
)
def test_each_part_of_a_long_prompt_has_its_own_adapter(models: Models, sizes: dict[str, int]) -> None:
    folder, merged = models["llama"]
    rng = np.random.default_rng(8)
    named = [(90, "everything"), (30, None), (70, "q_and_v"), (3, "rslora")]
    asked = [(rng.integers(0, 199, n).astype(np.int32), name) for n, name in named]
    changes = {"max_num_batched_tokens": 256, "num_kv_blocks": 128, **sizes}
    with Engine(deployment(folder, **changes), folder, keep_logits=True) as engine:
        check(engine, merged, asked, run(engine, asked, max_tokens=4))
    with Engine(deployment(folder, **changes), folder) as engine:
        outputs = run(engine, asked, max_tokens=4)
    for request_id, (prompt, adapter) in enumerate(asked):
        answer = [token for output in outputs[request_id] for token in output.token_ids]
        with torch.no_grad():
            expected = merged[adapter](torch.tensor([prompt.tolist() + answer])).logits[0]
        assert answer == expected[len(prompt) - 1 : -1].argmax(dim=1).tolist()


def test_adapters_change_the_answers_they_are_tested_on(models: Models) -> None:
    """The claims above could not fail if an adapter said what the base says."""
    _, merged = models["llama"]
    prompt = torch.arange(20)[None]
    with torch.no_grad():
        base = merged[None](prompt).logits
        for name in ADAPTERS:
            assert (merged[name](prompt).logits - base).abs().max() > 1e-2 * base.abs().max()


def test_a_prefix_is_found_again_under_the_same_adapter_only(models: Models) -> None:
    folder, merged = models["llama"]
    prompt = np.random.default_rng(6).integers(0, 199, 40).astype(np.int32)
    asked = [(prompt, name) for name in ("everything", None, "q_and_v")]
    with Engine(deployment(folder), folder, keep_logits=True) as engine:
        first = run(engine, asked, max_tokens=10)
        assert [first[i][0].num_cached_tokens for i in range(3)] == [0, 0, 0]
        engine.kept_logits.clear()
        asked = [asked[2], asked[0], asked[1], (prompt, "rslora")]
        second = run(engine, asked, max_tokens=10)
        assert [second[i][0].num_cached_tokens for i in range(4)] == [32, 32, 32, 0]
        check(engine, merged, asked, second)


def test_an_adapter_loaded_anew_under_its_old_name_finds_nothing_of_the_old_one(models: Models, tmp_path: Path) -> None:
    folder, merged = models["llama"]
    prompt = np.random.default_rng(7).integers(0, 199, 40).astype(np.int32)
    with Engine(deployment(folder), folder, keep_logits=True) as engine:
        run(engine, [(prompt, "everything")], max_tokens=4)
        assert engine.unload_adapter("everything")
        engine.load_adapter("everything", folder / "q_and_v")
        engine.kept_logits.clear()
        outputs = run(engine, [(prompt, "everything")], max_tokens=4)
        assert outputs[0][0].num_cached_tokens == 0
        check(engine, {"everything": merged["q_and_v"]}, [(prompt, "everything")], outputs)


def test_without_a_compiler_the_logits_are_the_same(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, merged = models["llama"]
    monkeypatch.setattr("paretune.kernels.lora.load", lambda: None)
    asked = mixed_requests()
    with Engine(deployment(folder), folder, keep_logits=True) as engine:
        check(engine, merged, asked, run(engine, asked, max_tokens=5))
