"""A mixture of experts answers as Hugging Face transformers does (fp32, eager attention), however a step is composed,
and however its experts are shared among ranks."""

from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.auto import AutoModelForCausalLM

from paretune.runtime.engine import Engine

from .moe_reference import forward
from .test_model_logits import SIZES, check_logits, deployment, prompts, run

CONFIGS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**SIZES, head_dim=16, num_local_experts=5, num_experts_per_tok=2),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES, moe_intermediate_size=22, shared_expert_intermediate_size=38, num_experts=7, num_experts_per_tok=3,
        decoder_sparse_step=2,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, head_dim=32, moe_intermediate_size=18, num_experts=9, num_experts_per_tok=4, norm_topk_prob=True,
        mlp_only_layers=[1], attention_bias=True, tie_word_embeddings=True,
    ),
}  # fmt: skip
EP = {"enable_expert_parallel": True}
CASES: list[tuple[str, dict[str, object]]] = [
    *((name, case) for name in CONFIGS for case in ({}, {"max_num_batched_tokens": 11}, {"num_kv_blocks": 16})),
    ("mixtral", {"num_threads": 2}),
    ("mixtral", {"tensor_parallel_size": 2}),
    ("qwen2_moe", {"tensor_parallel_size": 2, **EP}),
    ("qwen2_moe", {"pipeline_parallel_size": 2}),
    ("qwen3_moe", {"context_parallel_size": 2}),
]
SLOW_CASES: list[tuple[str, dict[str, object]]] = [
    ("mixtral", {"tensor_parallel_size": 2, **EP}),
    ("qwen2_moe", {"tensor_parallel_size": 2}),
    ("qwen2_moe", {"tensor_parallel_size": 4, **EP}),
    ("qwen3_moe", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, **EP}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.nn.Module]]:
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        config._attn_implementation = config._experts_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "bias" in parameter_name or "norm" in parameter_name:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        made[name] = folder, model
    return made


@pytest.mark.parametrize(
    ("name", "case"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)], ids=str
)
def test_logits_are_those_of_transformers(models, name: str, case: dict[str, object]) -> None:
    folder, model = models[name]
    with Engine(deployment(**case), folder, keep_logits=True) as engine:
        outputs = run(engine, prompts(), max_tokens=30 if "num_kv_blocks" in case else 10)
        assert (engine.stats().preemptions > 0) == ("num_kv_blocks" in case)
        check_logits(engine, model, prompts(), outputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_plain_reference_of_the_other_tests_is_transformers_too(models, name: str) -> None:
    folder, model = models[name]
    tokens = torch.from_numpy(prompts()[0]).long()
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    found = forward(folder, tokens)
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5
