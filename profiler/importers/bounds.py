"""The least time of the operators in public tables: floating-point operations over the peak rate, bytes over bandwidth.

Every tensor counts once, in the precision it is stored in; caches between operators are not counted on, and what the
row does not say (scales, indices, padding) is left out, so each is a lower bound.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..hardware import Accelerator
from ..operator_tables import Bound

Floats = NDArray[np.float64]

WEIGHT_BYTES = {
    "bfloat16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0,
    "int8_wo": 1.0,
    "int4_wo": 0.5,
    "nvfp4": 0.5,
    "w4a16_mxfp4": 0.5,
    "w4a8_mxfp4_mxfp8": 0.5,
}
"""By the names that aiconfigurator gives: bytes of a weight, scales left out."""

_ARITHMETIC = {"fp8": "fp8", "fp8_block": "fp8", "nvfp4": "fp4", "w4a8_mxfp4_mxfp8": "fp8"}
_ACTIVATION_BYTES = {"fp8": 1.0, "fp8_block": 1.0, "nvfp4": 0.5, "w4a8_mxfp4_mxfp8": 1.0}


def flops_per_s(accelerator: Accelerator, dtype: str) -> float:
    """Peak dense rate of the arithmetic behind a dtype of the tables.

    fp4 is at most twice fp8, where no source has it; without fp8 arithmetic weights are expanded to bf16.
    Raises: BadHardware: the accelerator has no rate at all.
    """
    arithmetic, known = _ARITHMETIC.get(dtype, "bf16"), accelerator.peak_flops_per_s
    if arithmetic == "fp4" and "fp4" not in known and "fp8" in known:
        return 2.0 * known["fp8"]
    return accelerator.flops_per_s(arithmetic if arithmetic in known else "bf16")


def gemm(accelerator: Accelerator, dtype: str) -> Bound:
    """(m, n, k): an (m, k) activation by an (n, k) weight."""
    rate, bandwidth = flops_per_s(accelerator, dtype), accelerator.peak_bytes_per_s
    weight, activation = WEIGHT_BYTES[dtype], _ACTIVATION_BYTES.get(dtype, 2.0)

    def bound_s(points: Floats) -> Floats:
        m, n, k = points.T
        moved = weight * n * k + activation * m * k + 2.0 * m * n
        return np.asarray(np.maximum(2.0 * m * n * k / rate, moved / bandwidth))

    return bound_s


def attention(
    accelerator: Accelerator, arithmetic: str, kv_dtype: str, prefill: bool, window: int
) -> Callable[..., Floats]:
    """f(batch, tokens, heads, kv_heads, head_dim): prefill of prompts of so many tokens each, or one decode step over
    contexts of so many."""
    rate, bandwidth = flops_per_s(accelerator, arithmetic), accelerator.peak_bytes_per_s
    cached = 1.0 if kv_dtype in ("fp8", "int8") else 2.0

    def bound_s(batch: Floats, tokens: Floats, heads: Floats, kv_heads: Floats, head_dim: Floats) -> Floats:
        seen = np.minimum(tokens, window) if window else tokens
        if prefill:
            pairs, queries = seen * (seen + 1) / 2 + (tokens - seen) * seen, tokens
        else:
            pairs, queries = seen, np.ones_like(seen)
        flops = 4.0 * batch * heads * head_dim * pairs
        key_value = 2.0 * batch * (tokens if prefill else seen) * kv_heads * head_dim * cached
        moved = key_value + 2.0 * 2.0 * batch * queries * heads * head_dim
        return np.asarray(np.maximum(flops / rate, moved / bandwidth))

    return bound_s


def mla(accelerator: Accelerator, kv_dtype: str, prefill: bool) -> Callable[..., Floats]:
    """f(batch, tokens, heads) of multi-head latent attention as DeepSeek-V3 has it (arXiv:2412.19437): 512 latent and
    64 rotary dimensions are cached; prefill computes heads of 192 by 128, decode (absorbed) of 576 by 512."""
    rate, bandwidth = flops_per_s(accelerator, "fp8" if kv_dtype == "fp8" else "bfloat16"), accelerator.peak_bytes_per_s
    cached = 1.0 if kv_dtype == "fp8" else 2.0

    def bound_s(batch: Floats, tokens: Floats, heads: Floats) -> Floats:
        if prefill:
            flops = batch * heads * tokens * (tokens + 1) * (192 + 128)
            moved = 2.0 * batch * tokens * heads * (192 + 128)
        else:
            flops = 2.0 * batch * heads * tokens * (576 + 512)
            moved = batch * tokens * 576 * cached + 2.0 * batch * heads * (576 + 512)
        return np.asarray(np.maximum(flops / rate, moved / bandwidth))

    return bound_s


def mla_bmm(accelerator: Accelerator, dtype: str) -> Callable[..., Floats]:
    """f(tokens, heads): queries into the latent space, or values out of it: heads of (tokens, 128) by (128, 512)."""
    rate, bandwidth = flops_per_s(accelerator, dtype), accelerator.peak_bytes_per_s

    def bound_s(tokens: Floats, heads: Floats) -> Floats:
        moved = heads * (128 * 512 * WEIGHT_BYTES[dtype] + tokens * (128 + 512))
        return np.asarray(np.maximum(2.0 * tokens * heads * 128 * 512 / rate, moved / bandwidth))

    return bound_s


def all_reduce(accelerator: Accelerator) -> Bound:
    """(bytes,): each rank sends what it has and receives the sum, as a switch that reduces allows (NVLink SHARP).

    A ring takes 2 (n - 1) / n of it; on two ranks they are the same.
    """
    link = accelerator.link_bytes_per_s
    return lambda points: np.asarray(points[:, 0] / link)


def moe(
    accelerator: Accelerator, dtype: str, hidden: int, inter: int, topk: int, experts: int, tp: int, ep: int
) -> Bound:
    """(tokens,): MLPs of the chosen experts on the busiest rank, which has at least the mean load.

    It reads at least one expert's weights, or its share of what one token chooses. Two matrices an expert: tables do
    not say which have a gate too.
    """
    rate, bandwidth = flops_per_s(accelerator, dtype), accelerator.peak_bytes_per_s
    size = 2.0 * hidden * (inter / tp)

    def bound_s(points: Floats) -> Floats:
        tokens = points[:, 0]
        flops = 2.0 * tokens * topk / ep * size
        # one token chooses topk different experts, of which the busiest rank has at least its share
        read = np.maximum(1.0, np.minimum(topk / ep, experts / ep)) * size * WEIGHT_BYTES[dtype]
        return np.asarray(np.maximum(flops / rate, read / bandwidth))

    return bound_s
