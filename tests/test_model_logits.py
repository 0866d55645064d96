"""The engine's logits are those of Hugging Face transformers (fp32, eager attention), however a step is composed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from paretune.runtime.engine import Engine, Output, Request
from paretune.runtime.sampler import SamplingParams
from paretune.runtime.spec import Deployment, Pool

SIZES = {
    "vocab_size": 199,  # odd: the ranks' parts of the vocabulary differ
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,  # far from uniform answers: greedy tokens do not hang on the last bit
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, head_dim=16, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
    "llama_linear": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}, tie_word_embeddings=True
    ),
    "mistral": MistralConfig(**SIZES, head_dim=32, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}
POOL = Pool(
    weight_dtype="fp32", kv_cache_dtype="fp32", max_model_len=128, max_num_seqs=4, max_num_batched_tokens=128,
    block_size=8, num_kv_blocks=64,
)  # fmt: skip
CASES = {
    "plain": {},
    "chunked_prefill": {"max_num_batched_tokens": 11},
    "preemption": {"num_kv_blocks": 16},
    "tensor_parallel": {"tensor_parallel_size": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.nn.Module]]:
    """A folder and transformers' own model of each family; two of them in several shards."""
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "bias" in parameter_name or "norm" in parameter_name:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder, max_shard_size="100KB" if name in ("qwen2", "mistral") else "50GB")
        made[name] = folder, model
    return made


def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, SIZES["vocab_size"], length).astype(np.int32) for length in (37, 5, 61, 16)]


def run(engine: Engine, prompts: list[np.ndarray], max_tokens: int, first_id: int = 0) -> dict[int, list[Output]]:
    outputs: dict[int, list[Output]] = {}
    for request_id, prompt in enumerate(prompts, start=first_id):
        engine.add(Request(request_id, prompt, SamplingParams(max_tokens=max_tokens, temperature=0)))
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def check_logits(
    engine: Engine, model: torch.nn.Module, prompts: list[np.ndarray], outputs: dict[int, list[Output]]
) -> None:
    for request_id, prompt in enumerate(prompts):
        answer = [token for output in outputs[request_id] for token in output.token_ids]
        tokens = torch.tensor([prompt.tolist() + answer])
        with torch.no_grad():
            expected = model(tokens).logits[0]
        cached = outputs[request_id][0].num_cached_tokens
        seen = np.zeros(tokens.shape[1], bool)
        seen[:cached] = True
        for kept in engine.kept_logits:
            if kept.request_id == request_id:
                end = kept.start + len(kept.logits)
                seen[kept.start : end] = True
                error = (kept.logits - expected[kept.start : end]).abs().max() / expected.abs().max()
                assert error < 1e-4
        assert seen[:-1].all()  # the last token was never computed
        assert answer == expected[len(prompt) - 1 : -1].argmax(dim=1).tolist()


def deployment(**changes: object) -> Deployment:
    return Deployment(pools=(Pool.model_validate({**POOL.model_dump(), **changes}),))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(models, name: str, case: str) -> None:
    folder, model = models[name]
    with Engine(deployment(**CASES[case]), folder, keep_logits=True) as engine:
        outputs = run(engine, prompts(), max_tokens=40)
        assert (engine.stats().preemptions > 0) == (case == "preemption")
        check_logits(engine, model, prompts(), outputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_behind_a_prefix_hit_are_those_of_transformers(models, name: str) -> None:
    folder, model = models[name]
    asked = prompts()
    with Engine(deployment(), folder, keep_logits=True) as engine:
        run(engine, asked[:3], max_tokens=30, first_id=100)
        asked[1] = np.concatenate([asked[0][:24], asked[1]])
        outputs = run(engine, asked[:3], max_tokens=10)
        assert [outputs[i][0].num_cached_tokens for i in range(3)] == [32, 24, 56]
        check_logits(engine, model, asked[:3], outputs)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_greedy_tokens_are_those_of_transformers_generate(models, name: str) -> None:
    folder, model = models[name]
    with Engine(deployment(max_num_batched_tokens=20), folder) as engine:
        outputs = run(engine, prompts(), max_tokens=25)
    for request_id, prompt in enumerate(prompts()):
        generated = model.generate(
            torch.tensor(prompt.tolist())[None], max_new_tokens=25, do_sample=False, use_cache=True
        )
        answer = [token for output in outputs[request_id] for token in output.token_ids]
        assert answer == generated[0, len(prompt) :].tolist()
