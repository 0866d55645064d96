"""The operators of one step of a decoder on one rank, in the shapes that operator tables are keyed by.

Cut as Megatron-LM cuts it (Shoeybi et al., arXiv:1909.08053): see operators.py, which counts the work of the same
layers for models that the bundled engine runs. Here are also DeepSeek-V3's (arXiv:2412.19437), with latent attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .operator_tables import BadTable


@dataclass(frozen=True)
class Gemm:
    """`count` multiplications a step of (rows, k) by (k, n) on one rank.

    rows  "tokens" of the step, its "samples" only, or only those of "prefill" rows
    """

    n: int
    k: int
    count: int
    dtype: str
    rows: str = "tokens"


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention of one rank, or (latent) multi-head latent attention, whose `kv_heads` are its heads."""

    count: int
    kv_heads: int
    heads_per_kv_head: int
    head_dim: int
    latent: bool = False


@dataclass(frozen=True)
class Sparse:
    """`count` layers of routed experts."""

    count: int
    dtype: str
    hidden: int
    inter: int
    topk: int
    experts: int
    tensor_parallel: int
    expert_parallel: int


@dataclass(frozen=True)
class Fusion:
    """What an engine runs inside other kernels instead of by a kernel of its own.

    norms         of the residual, inside the all-reduce before them
    quantization  of activations to fp8 with a scale a tensor, by the matrix that reads them: "qkv", "output",
                  "gate_up", "down"
    """

    norms: bool = False
    quantization: frozenset[str] = frozenset({"qkv", "gate_up", "down"})


@dataclass(frozen=True)
class DecoderLayout:
    """What one rank of a group of `ranks` runs in a step.

    elementwise   (bytes a token, kernels of that kind a step): norms, rotary embedding, activation, quantization
    fused         the same of what runs inside other kernels, and moves its bytes all the same
    sampling      (bytes a sample, kernels): logits to fp32, their softmax, the choice
    all_reduces   a step, each of `hidden` bf16 numbers a token; 0 of one rank
    weight_bytes  of the rank
    cached_numbers_per_token  of the rank, all layers: keys and values, or what is latent of them
    """

    ranks: int
    hidden: int
    layers: int
    gemms: tuple[Gemm, ...]
    attention: Attention
    sparse: Sparse | None
    elementwise: tuple[tuple[float, int], ...]
    fused: tuple[tuple[float, int], ...]
    sampling: tuple[tuple[float, int], ...]
    all_reduces: int
    weight_bytes: float
    cached_numbers_per_token: int


_WEIGHT_BYTES = {"bfloat16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "nvfp4": 0.5625}
_BF16 = "bfloat16"
_DENSE = ("llama", "mistral", "qwen2", "qwen3")
_SPARSE = ("mixtral", "qwen3_moe")


def decoder_layout(
    config: Mapping[str, Any], ranks: int, expert_parallel: int, dtype: str, fusion: Fusion = Fusion()
) -> DecoderLayout:
    """From the content of a Hugging Face config.json.

    The vocabulary projection and routers stay in bf16; with nvfp4 so do the projections of latent attention, as in the
    checkpoints that NVIDIA publishes.

    Args:
        ranks: GPUs of the replica, which share every layer.
        expert_parallel: parts that whole experts are divided into; ranks / expert_parallel share each expert.
        dtype: of the linear layers, as aiconfigurator names it.
    Raises: BadTable: an architecture that is not one of these.
    """
    hidden, layers, vocab = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    heads = config["num_attention_heads"]
    head = Gemm(-(-vocab // ranks), hidden, 1, _BF16, "samples")
    if config.get("model_type") == "deepseek_v3":
        return _latent(config, ranks, expert_parallel, dtype, head, fusion)
    if config.get("model_type") not in (*_DENSE, *_SPARSE):
        known = ", ".join((*_DENSE, *_SPARSE, "deepseek_v3"))
        raise BadTable("config.json: model_type", config.get("model_type"), known, "its layout is not known here")
    kv_heads = max(1, config["num_key_value_heads"] // ranks)
    head_dim = config.get("head_dim") or hidden // heads
    mine = heads // ranks
    attention = (
        Gemm((mine + 2 * kv_heads) * head_dim, hidden, layers, dtype),
        Gemm(hidden, mine * head_dim, layers, dtype),
    )
    sparse = None
    if config["model_type"] in _SPARSE:
        experts = config.get("num_experts") or config["num_local_experts"]
        each, topk = config.get("moe_intermediate_size") or config["intermediate_size"], config["num_experts_per_tok"]
        sparse = Sparse(layers, dtype, hidden, each, topk, experts, ranks // expert_parallel, expert_parallel)
        gemms: tuple[Gemm, ...] = (*attention, Gemm(experts, hidden, layers, _BF16), head)
        inter = each * topk // ranks
        expert_bytes = layers * experts * 3.0 * hidden * each / ranks * _WEIGHT_BYTES[dtype]
    else:
        inter = config["intermediate_size"] // ranks
        gemms = (*attention, Gemm(2 * inter, hidden, layers, dtype), Gemm(hidden, inter, layers, dtype), head)
        expert_bytes = 0.0
    norms = ((8.0 * hidden, 2 * layers),)
    fused = norms if fusion.norms and ranks > 1 else ()
    elementwise = [
        *(() if fused else norms),
        (4.0 * (mine + 2 * kv_heads) * head_dim, layers),
        (6.0 * inter, 0 if sparse else layers),  # the experts' tables have their activation inside
    ]
    if config["model_type"].startswith("qwen3"):
        elementwise.append((4.0 * (mine + kv_heads) * head_dim, layers))  # norms of queries and keys
    if dtype == "fp8":
        read = {"qkv": hidden, "output": mine * head_dim, "gate_up": hidden, "down": inter}
        elementwise += [(3.0 * width, layers) for matrix, width in read.items() if matrix not in fusion.quantization]
    return DecoderLayout(
        ranks,
        hidden,
        layers,
        gemms,
        Attention(layers, kv_heads, mine // kv_heads, head_dim),
        sparse,
        tuple(elementwise),
        fused,
        _sampling(vocab),
        2 * layers if ranks > 1 else 0,
        _bytes(gemms) + expert_bytes + 2.0 * vocab * hidden / ranks,
        2 * kv_heads * head_dim * layers,
    )


def _latent(
    config: Mapping[str, Any], ranks: int, expert_parallel: int, dtype: str, head: Gemm, fusion: Fusion
) -> DecoderLayout:
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    mine = config["num_attention_heads"] // ranks
    rank_q, rank_kv, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    dense = config["first_k_dense_replace"]
    routed = layers - dense
    projections = _BF16 if dtype == "nvfp4" else dtype
    inter, shared = config["intermediate_size"] // ranks, config["moe_intermediate_size"] // ranks
    gemms = (
        Gemm(rank_q + rank_kv + rope, hidden, layers, projections),
        Gemm(mine * (nope + rope), rank_q, layers, projections),
        Gemm(mine * (nope + value), rank_kv, layers, projections, "prefill"),
        Gemm(hidden, mine * value, layers, projections),
        Gemm(2 * inter, hidden, dense, dtype),
        Gemm(hidden, inter, dense, dtype),
        Gemm(2 * shared, hidden, routed, dtype),
        Gemm(hidden, shared, routed, dtype),
        Gemm(config["n_routed_experts"], hidden, routed, _BF16),
        head,
    )
    sparse = Sparse(
        routed,
        dtype,
        hidden,
        config["moe_intermediate_size"],
        config["num_experts_per_tok"],
        config["n_routed_experts"],
        ranks // expert_parallel,
        expert_parallel,
    )
    experts = routed * config["n_routed_experts"] * 3.0 * hidden * config["moe_intermediate_size"]
    norms = ((8.0 * hidden, 2 * layers),)
    fused = norms if fusion.norms and ranks > 1 else ()
    elementwise = (
        *(() if fused else norms),
        (4.0 * (rank_q + rank_kv), layers),
        (4.0 * mine * (nope + rope), layers),
        (3.0 * mine * value, layers),
        (6.0 * shared, routed),
        (4.0 * hidden, routed),
        (6.0 * inter, dense),
    )
    return DecoderLayout(
        ranks,
        hidden,
        layers,
        gemms,
        Attention(layers, mine, 1, nope + rope, latent=True),
        sparse,
        elementwise,
        fused,
        _sampling(config["vocab_size"]),
        2 * layers if ranks > 1 else 0,
        _bytes(gemms) + experts / ranks * _WEIGHT_BYTES[dtype] + 2.0 * config["vocab_size"] * hidden / ranks,
        (rank_kv + rope) * layers,
    )


def _sampling(vocab: int) -> tuple[tuple[float, int], ...]:
    return ((6.0 * vocab, 1), (8.0 * vocab, 1), (4.0 * vocab, 1))


def _bytes(gemms: tuple[Gemm, ...]) -> float:
    return sum(g.count * g.n * g.k * _WEIGHT_BYTES[g.dtype] for g in gemms)
