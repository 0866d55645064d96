"""Layers of one rank: parameters and cache of published models, and what sharding divides."""

from __future__ import annotations

from typing import Any

import pytest

from paretune.profiler.decoder_layout import Fusion, decoder_layout
from paretune.profiler.operator_tables import BadTable

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip
QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768,
}  # fmt: skip
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "intermediate_size": 18432, "vocab_size": 129280, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "first_k_dense_replace": 3, "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
}  # fmt: skip


# parameters as the models' cards give them: 8.03 and 30.5 billion; DeepSeek-V3's 671 (arXiv:2412.19437)
@pytest.mark.parametrize(("config", "billions"), [(LLAMA_8B, 8.03), (QWEN3_30B, 30.5), (DEEPSEEK_V3, 671.0)])
def test_weights_are_the_models_parameters(config: dict[str, Any], billions: float) -> None:
    assert decoder_layout(config, 1, 1, "bfloat16").weight_bytes / 2e9 == pytest.approx(billions, rel=2e-3)


def test_a_cached_token_is_that_of_grouped_or_latent_attention() -> None:
    assert 2 * decoder_layout(LLAMA_8B, 1, 1, "bfloat16").cached_numbers_per_token == 131_072
    assert decoder_layout(DEEPSEEK_V3, 1, 1, "bfloat16").cached_numbers_per_token == (512 + 64) * 61
    # tensor parallelism divides KV heads until there is one on each rank; what is latent stays whole
    assert [decoder_layout(LLAMA_8B, t, 1, "fp8").attention.kv_heads for t in (2, 8, 16)] == [4, 1, 1]
    assert decoder_layout(DEEPSEEK_V3, 8, 8, "fp8_block").cached_numbers_per_token == (512 + 64) * 61


@pytest.mark.parametrize("config", [LLAMA_8B, QWEN3_30B, DEEPSEEK_V3])
def test_ranks_divide_the_weights(config: dict[str, Any]) -> None:
    whole, eighth = (decoder_layout(config, t, 1, "fp8") for t in (1, 4))
    assert 4 * eighth.weight_bytes == pytest.approx(whole.weight_bytes, rel=0.01)
    assert (whole.all_reduces, eighth.all_reduces) == (0, 2 * config["num_hidden_layers"])


def test_what_runs_inside_the_all_reduce_has_no_kernel_of_its_own_but_moves_its_bytes() -> None:
    apart, inside = (decoder_layout(LLAMA_8B, 8, 1, "bfloat16", Fusion(norms)) for norms in (False, True))
    assert sum(n for _, n in apart.elementwise) - sum(n for _, n in inside.elementwise) == 2 * 32
    assert apart.fused == ()
    assert inside.fused == ((8.0 * 4096, 2 * 32),)
    assert decoder_layout(LLAMA_8B, 1, 1, "bfloat16", Fusion(norms=True)).fused == ()  # nothing is reduced


def test_each_matrix_whose_activation_is_quantized_apart_has_a_kernel_for_it() -> None:
    def kernels(dtype: str, *inside: str) -> int:
        layout = decoder_layout(LLAMA_8B, 2, 1, dtype, Fusion(quantization=frozenset(inside)))
        return sum(n for _, n in layout.elementwise)

    assert kernels("fp8") - kernels("bfloat16") == 4 * 32
    assert kernels("fp8", "qkv", "gate_up", "output") - kernels("bfloat16") == 32
    assert kernels("nvfp4") == kernels("bfloat16")  # the tables of their matrices have it


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(BadTable, match="gpt_oss"):
        decoder_layout({**LLAMA_8B, "model_type": "gpt_oss"}, 1, 1, "bfloat16")
