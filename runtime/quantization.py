"""What a quantized checkpoint quantizes and what it leaves as it was, read from `quantization_config`. No tensors.

Embedding, norms and biases are never quantized. Of the matrices, which stay is what the configuration lists, and by
its method: fp8 with 128 x 128 blocks and one fp32 scale each (DeepSeek-V3, its README_WEIGHTS.md) leaves the head, the
routers and gates; mxfp4 (gpt-oss) quantizes the experts alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..kernels.weight_formats import WEIGHT_FORMATS
from .config_fields import BadModel

ALWAYS_FP32 = ("router", "shared_gate")
"""Matrices that the bundled engine keeps in fp32: they are small, and a rounded router takes tokens elsewhere."""

# Where each matrix of ModelShape.matrices lies in a checkpoint, below its layer
_MODULES = {
    "qkv": ("self_attn.q_proj",),
    "global_qkv": ("self_attn.q_proj",),
    "o": ("self_attn.o_proj",),
    "global_o": ("self_attn.o_proj",),
    "q": ("self_attn.q_proj",),
    "q_a": ("self_attn.q_a_proj",),
    "q_b": ("self_attn.q_b_proj",),
    "kv_a": ("self_attn.kv_a_proj_with_mqa",),
    "kv_b": ("self_attn.kv_b_proj",),
    "index_q": ("self_attn.indexer.wq_b",),
    "index_k": ("self_attn.indexer.wk",),
    "index_weights": ("self_attn.indexer.weights_proj",),
    "linear_in": ("linear_attn.in_proj_qkv",),
    "linear_gates": ("linear_attn.in_proj_a",),
    "linear_out": ("linear_attn.out_proj",),
    "gate_up": ("mlp.gate_proj",),
    "down": ("mlp.down_proj",),
    "router": ("mlp.gate", "mlp.router", "block_sparse_moe.gate"),
    "expert_gate_up": ("mlp.experts",),
    "expert_down": ("mlp.experts",),
    "shared_gate": ("mlp.shared_expert_gate",),
    "shared_gate_up": ("mlp.shared_experts.gate_proj",),
    "shared_down": ("mlp.shared_experts.down_proj",),
    "head": ("lm_head",),
}
_FP8_LEAVES = ("router", "shared_gate", "index_weights", "head")


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint stores its matrices.

    weight_dtype  of those that are quantized
    kept          names of `ModelShape.matrices` that stay in bf16
    block         (output, input) channels of one fp32 scale; None: scales as the format of weight_dtype has them
    """

    weight_dtype: str
    kept: tuple[str, ...]
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class Storage:
    """In which dtype each matrix lies in memory, and in how many bytes.

    kept          matrices that stay in `plain_dtype`
    vector_bytes  of one number of the norms, biases and other vectors
    """

    weight_dtype: str
    kept: tuple[str, ...] = ()
    plain_dtype: str = "bf16"
    block: tuple[int, int] | None = None
    fp32: tuple[str, ...] = ()
    vector_bytes: int = 2

    @classmethod
    def bundled(cls, weight_dtype: str) -> Storage:
        """As the bundled engine stores a model: all matrices quantized but routers, and the head of a ternary one."""
        kept = ("head",) if weight_dtype == "ternary" else ()
        return cls(weight_dtype, kept, fp32=ALWAYS_FP32, vector_bytes=4)

    @classmethod
    def of_checkpoint(cls, quantization: Quantization | None, plain_dtype: str = "bf16") -> Storage:
        """As a checkpoint stores it, and the engines that serve it unchanged."""
        if quantization is None:
            return cls(plain_dtype, plain_dtype=plain_dtype, vector_bytes=4 if plain_dtype == "fp32" else 2)
        return cls(quantization.weight_dtype, quantization.kept, plain_dtype, quantization.block)

    def dtype(self, matrix: str) -> str:
        if matrix in self.fp32:
            return "fp32"
        return self.plain_dtype if matrix in self.kept else self.weight_dtype

    def bytes_per_weight(self, matrix: str) -> float:
        """Of a large matrix, scales of groups and blocks included, those of channels and tensors not."""
        dtype = self.dtype(matrix)
        if self.block is not None and dtype == self.weight_dtype:
            return WEIGHT_FORMATS[dtype].bits / 8 + 4 / (self.block[0] * self.block[1])
        return WEIGHT_FORMATS[dtype].bytes_per_weight()

    def read_bytes(self, matrix: str, out_features: int, in_features: int) -> int:
        """Of one matrix as a step reads it, scales of channels and tensors left out, which stay in caches."""
        whole = self.nbytes(matrix, out_features, in_features)
        return (
            whole if self.block is not None else whole - out_features * WEIGHT_FORMATS[self.dtype(matrix)].channel_bytes
        )

    def nbytes(self, matrix: str, out_features: int, in_features: int) -> int:
        """Of one matrix, all scales included."""
        dtype = self.dtype(matrix)
        if self.block is not None and dtype == self.weight_dtype:
            scales = -(-out_features // self.block[0]) * -(-in_features // self.block[1])
            return out_features * in_features * WEIGHT_FORMATS[dtype].bits // 8 + 4 * scales
        return WEIGHT_FORMATS[dtype].nbytes(out_features, in_features)


def quantization_of(given: Any, where: str) -> Quantization | None:
    """From the `quantization_config` of a checkpoint; None: it has none, or is a ternary one (BitNet).

    Raises: BadModel: a method whose bytes are not known here.
    """
    if not given or (isinstance(given, Mapping) and given.get("quant_method") == "bitnet"):
        return None
    method = given.get("quant_method", "quantized weights") if isinstance(given, Mapping) else given
    if method not in ("fp8", "mxfp4"):
        allowed = "fp32, bf16 or fp16 weights, fp8 or mxfp4, or bitnet (trained ternary)"
        raise BadModel(where, method, allowed, "use the original model")
    listed = tuple(given.get("modules_to_not_convert") or ())
    if method == "mxfp4":
        kept = tuple(name for name in _MODULES if not name.startswith("expert_"))
        return Quantization("mxfp4", kept)
    block = given.get("weight_block_size")
    kept = tuple(name for name in _MODULES if name in _FP8_LEAVES or _is_listed(name, listed))
    return Quantization("fp8", kept, None if block is None else (int(block[0]), int(block[1])))


def _is_listed(name: str, listed: tuple[str, ...]) -> bool:
    """Whether a list such as ["lm_head", "model.layers.*.self_attn"] leaves a matrix; one layer stands for all."""
    stripped = {re.sub(r"^model\.(language_model\.)?(layers\.[\d*]+\.)?", "", entry) for entry in listed}
    return any(
        module == entry or module.startswith(f"{entry}.") or module.rsplit(".", 1)[-1] == entry
        for module in _MODULES[name]
        for entry in stripped
    )
