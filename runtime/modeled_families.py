"""Families of models that are modeled but not served: what their config.json says of layers unlike a Llama's.

DeepSeek-V2, V3 and Kimi-K2 (latent attention), GLM-5 (latent attention with an indexer), gpt-oss and Gemma 4 (every
other layer, or five of six, with a sliding window), Llama 4 (chunks), Qwen3.5-MoE (linear attention in three layers of
four), MiniMax-M2 and Phi-MoE. Sizes as transformers (version 5.23) reads them. Encoders of images and sound, and the
layers that only propose tokens (multi-token prediction), are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .attention_shape import Attention, Indexer, LatentAttention, LinearAttention
from .config_fields import BadModel, size
from .model_parts import Experts

LATENT_FAMILIES = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm_moe_dsa")
MODELED_FAMILIES = (
    *LATENT_FAMILIES,
    "gpt_oss",
    "gemma4_text",
    "llama4_text",
    "qwen3_5_moe_text",
    "minimax_m2",
    "phimoe",
)

_LLAMA4_CHUNK = 8192  # transformers' Llama4TextConfig: attention_chunk_size
_LLAMA4_FULL_EVERY = 4  # its no_rope_layer_interval: these layers see the whole context


def parts_of(config: Mapping[str, Any], family: str, name: str) -> dict[str, Any]:
    """Fields of ModelShape that a family has beside those that all have. Raises: BadModel, naming the field."""
    layers = size(config, "num_hidden_layers", name)
    if family in LATENT_FAMILIES:
        return _latent(config, layers, name)
    build = {
        "gpt_oss": _gpt_oss,
        "gemma4_text": _gemma4,
        "llama4_text": _llama4,
        "qwen3_5_moe_text": _qwen3_5,
        "minimax_m2": _minimax,
        "phimoe": _phimoe,
    }[family]
    return build(config, layers, name)


def _experts(
    config: Mapping[str, Any], name: str, field: str, width: str, layers: tuple[int, ...], **more: Any
) -> Experts:
    count = size(config, field, name)
    chosen = size(config, "top_k_experts" if "top_k_experts" in config else "num_experts_per_tok", name)
    if chosen > count:
        raise BadModel(f"{name}: num_experts_per_tok", chosen, f"at most {count} experts", "correct the config")
    plain = {"renormalize": True, "shared_intermediate_size": 0, **more}
    return Experts(count, count, chosen, size(config, width, name), layers=layers, **plain)


def _latent(config: Mapping[str, Any], layers: int, name: str) -> dict[str, Any]:
    indexer = None
    if config.get("index_topk"):
        sizes = (size(config, field, name) for field in ("index_n_heads", "index_head_dim", "index_topk"))
        indexer = Indexer(*sizes)
    latent = LatentAttention(
        q_lora_rank=None if config.get("q_lora_rank") is None else size(config, "q_lora_rank", name),
        kv_lora_rank=size(config, "kv_lora_rank", name),
        qk_nope_head_dim=size(config, "qk_nope_head_dim", name),
        qk_rope_head_dim=size(config, "qk_rope_head_dim", name),
        v_head_dim=size(config, "v_head_dim", name),
        indexer=indexer,
    )
    first, every = int(config.get("first_k_dense_replace", 0)), size(config, "moe_layer_freq", name, 1)
    sparse = tuple(layer for layer in range(layers) if layer >= first and layer % every == 0)
    shared = size(config, "moe_intermediate_size", name) * int(config.get("n_shared_experts") or 0)
    experts = _experts(
        config,
        name,
        "n_routed_experts",
        "moe_intermediate_size",
        sparse,
        renormalize=bool(config.get("norm_topk_prob", False)),
        shared_intermediate_size=shared,
        shared_gated=False,
        router_bias=config.get("topk_method") == "noaux_tc",
    )
    return {"latent": latent, "experts": experts, "head_dim": latent.qk_head_dim}


def _kinds(config: Mapping[str, Any], layers: int, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers with a sliding window (or, of Qwen3.5, without attention), and layers with full attention."""
    types = config.get("layer_types")
    if not isinstance(types, list) or len(types) != layers:
        raise BadModel(f"{name}: layer_types", types, f"a list of {layers} kinds", "correct the config")
    full = tuple(layer for layer, kind in enumerate(types) if kind == "full_attention")
    return tuple(layer for layer in range(layers) if layer not in full), full


def _gpt_oss(config: Mapping[str, Any], layers: int, name: str) -> dict[str, Any]:
    windowed, full = _kinds(config, layers, name)
    heads = (size(config, "num_attention_heads", name), size(config, "num_key_value_heads", name))
    head_dim, window = size(config, "head_dim", name), size(config, "sliding_window", name)
    experts = _experts(
        config,
        name,
        "num_local_experts",
        "intermediate_size",
        tuple(range(layers)),
        router_bias=True,
        expert_bias=True,
    )
    return {
        "attention": (Attention(full, *heads, head_dim), Attention(windowed, *heads, head_dim, window)),
        "experts": experts,
        "qkv_bias": True,
        "o_bias": True,
        "sinks": True,
    }


def _gemma4(config: Mapping[str, Any], layers: int, name: str) -> dict[str, Any]:
    windowed, full = _kinds(config, layers, name)
    heads = size(config, "num_attention_heads", name)
    kv_heads, window = size(config, "num_key_value_heads", name), size(config, "sliding_window", name)
    shared_keys = bool(config.get("attention_k_eq_v", False))
    if config.get("hidden_size_per_layer_input") or config.get("num_kv_shared_layers"):
        allowed = "0: layers with inputs of their own, or with another layer's keys, are not known here"
        field = "hidden_size_per_layer_input, num_kv_shared_layers"
        raise BadModel(f"{name}: {field}", "more than 0", allowed, "take another model")
    sparse = {}
    if config.get("enable_moe_block"):
        # the layer's own MLP stands beside the experts, as a shared expert without a gate does
        sparse["experts"] = _experts(
            config,
            name,
            "num_experts",
            "moe_intermediate_size",
            tuple(range(layers)),
            shared_intermediate_size=size(config, "intermediate_size", name),
            shared_gated=False,
            router_scales=True,
        )
    return {
        "attention": (
            Attention(windowed, heads, kv_heads, size(config, "head_dim", name), window),
            Attention(
                full,
                heads,
                size(config, "num_global_key_value_heads", name, kv_heads) if shared_keys else kv_heads,
                size(config, "global_head_dim", name),
                keys_are_values=shared_keys,
            ),
        ),
        "qk_norm": True,
        "norms_per_layer": 7 if sparse else 4,
        "layer_scalar": True,
        **sparse,
    }


def _llama4(config: Mapping[str, Any], layers: int, name: str) -> dict[str, Any]:
    roped = config.get("no_rope_layers") or [int((i + 1) % _LLAMA4_FULL_EVERY != 0) for i in range(layers)]
    chunk = size(config, "attention_chunk_size", name, _LLAMA4_CHUNK)
    heads = (size(config, "num_attention_heads", name), size(config, "num_key_value_heads", name))
    chunked = tuple(layer for layer in range(layers) if roped[layer])
    full = tuple(layer for layer in range(layers) if not roped[layer])
    step = size(config, "interleave_moe_layer_step", name, 1)
    sparse = tuple(range(step - 1, layers, step))
    width, head_dim = size(config, "intermediate_size", name), size(config, "head_dim", name)
    experts = _experts(
        config,
        name,
        "num_local_experts",
        "intermediate_size",
        sparse,
        shared_intermediate_size=width,
        shared_gated=False,
    )
    return {
        "attention": (Attention(full, *heads, head_dim), Attention(chunked, *heads, head_dim, chunk=chunk)),
        "experts": experts,
        "intermediate_size": size(config, "intermediate_size_mlp", name),
    }


def _qwen3_5(config: Mapping[str, Any], layers: int, name: str) -> dict[str, Any]:
    linear, full = _kinds(config, layers, name)
    heads = (size(config, "num_attention_heads", name), size(config, "num_key_value_heads", name))
    gated = bool(config.get("attn_output_gate", True))
    return {
        "attention": (Attention(full, *heads, size(config, "head_dim", name), output_gate=gated),),
        "linear_attention": LinearAttention(
            linear,
            num_key_heads=size(config, "linear_num_key_heads", name),
            num_value_heads=size(config, "linear_num_value_heads", name),
            key_head_dim=size(config, "linear_key_head_dim", name),
            value_head_dim=size(config, "linear_value_head_dim", name),
            conv_kernel_size=size(config, "linear_conv_kernel_dim", name),
        ),
        "experts": _experts(
            config,
            name,
            "num_experts",
            "moe_intermediate_size",
            tuple(range(layers)),
            shared_intermediate_size=size(config, "shared_expert_intermediate_size", name),
        ),
        "qk_norm": True,
        "intermediate_size": size(config, "moe_intermediate_size", name),
    }


def _minimax(config: Mapping[str, Any], layers: int, name: str) -> dict[str, Any]:
    biased = bool(config.get("use_routing_bias", True))
    experts = _experts(config, name, "num_local_experts", "intermediate_size", tuple(range(layers)), router_bias=biased)
    return {"experts": experts, "qk_norm": True, "qk_norm_of_all_heads": True}


def _phimoe(config: Mapping[str, Any], layers: int, name: str) -> dict[str, Any]:
    heads = (size(config, "num_attention_heads", name), size(config, "num_key_value_heads", name))
    window, every = config.get("sliding_window"), tuple(range(layers))
    head_dim = size(config, "head_dim", name, size(config, "hidden_size", name) // heads[0])
    biased = bool(config.get("attention_bias", False))
    return {
        "attention": (Attention(every, *heads, head_dim, window),),
        "experts": _experts(config, name, "num_local_experts", "intermediate_size", every),
        "qkv_bias": biased,
        "o_bias": biased,
        "norm_bias": True,
        "head_bias": bool(config.get("lm_head_bias", False)),
    }
