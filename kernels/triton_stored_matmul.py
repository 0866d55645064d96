# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Linear layers on a GPU whose weights have fewer than 16 bits, expanded inside the product.

Same formula and reference as kernels/linear.py, with the weight as `weight_layout.rows_of` lays it out and activations
of 16 or 32 bits that are not rounded: int4 and ternary are w4a16 and w2a16 here, where the CPU has int8 activations.
Import it only where it runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import BadTile, Tile
from .triton_formats import e2m1_value, e4m3_value
from .weight_formats import WEIGHT_FORMATS

FP8, INT8, INT4, TERNARY, NVFP4, MXFP4 = (tl.constexpr(code) for code in range(6))
_FORMAT = {"fp8": FP8, "int8": INT8, "int4": INT4, "ternary": TERNARY, "nvfp4": NVFP4, "mxfp4": MXFP4}
STORED_PRECISIONS = tuple(_FORMAT)


@triton.jit(do_not_specialize=["rows"])  # changes from step to step: one kernel for all
def stored_matmul_kernel(
    x_ptr, weight_ptr, group_scale_ptr, channel_scale_ptr, bias_ptr, out_ptr, rows, out_features, in_features,
    x_stride, weight_stride, group_stride, out_stride, FORMAT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    HAS_CHANNEL_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # programs are numbered as in triton_matmul.py
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    height = min(tiles_m - first_m, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    m = (first_m + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = n.to(tl.int64)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, in_features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < in_features
        x_at = m[:, None].to(tl.int64) * x_stride + k[None, :]
        x = tl.load(x_ptr + x_at, mask=(m[:, None] < rows) & inside[None, :], other=0.0)
        there = (n[None, :] < out_features) & inside[:, None]
        weight_at = channel[None, :] * weight_stride + (k * BITS // 8)[:, None]
        stored = tl.load(weight_ptr + weight_at, mask=there, other=0)
        if FORMAT == INT8:
            weight = stored.to(tl.float32)
        elif FORMAT == FP8:
            weight = e4m3_value(stored)
        else:
            # the first input channel of a byte lies in its low bits
            code = (stored.to(tl.int32) >> ((k * BITS) % 8)[:, None]) & ((1 << BITS) - 1)
            if FORMAT == INT4:
                weight = (code - 8).to(tl.float32)
            elif FORMAT == TERNARY:
                weight = (code - 1).to(tl.float32)
            else:
                weight = e2m1_value(code)
            if FORMAT != TERNARY:
                scale_at = channel[None, :] * group_stride + (k // GROUP)[:, None]
                scale = tl.load(group_scale_ptr + scale_at, mask=there, other=0)
                if FORMAT == INT4:
                    weight *= scale.to(tl.float32)
                elif FORMAT == NVFP4:
                    weight *= e4m3_value(scale)
                else:
                    # a power of two whose exponent + 127 is the code: the very bits of an fp32; code 0 is 2**-127
                    bits = tl.where(scale == 0, 0x00400000, scale.to(tl.int32) << 23)
                    weight *= bits.to(tl.float32, bitcast=True)
        sums = tl.dot(x, weight.to(x.dtype), sums, input_precision="ieee")
    if HAS_CHANNEL_SCALE:
        sums *= tl.load(channel_scale_ptr + n, mask=n < out_features, other=0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
    out_at = m[:, None].to(tl.int64) * out_stride + n[None, :]
    tl.store(
        out_ptr + out_at, sums.to(out_ptr.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < out_features)
    )


def stored_matmul(
    x: Tensor,
    precision: str,
    weight: Tensor,
    group_scale: Tensor | None,
    channel_scale: Tensor | None,
    tile: Tile,
    bias: Tensor | None = None,
) -> Tensor:
    """x (M, in) @ weight.T + bias -> (M, out), dtype of x, accumulated in fp32.

    Args:
        x: fp32, fp16 or bf16, rows contiguous.
        precision: one of STORED_PRECISIONS.
        weight: (out, in) int8 or float8_e4m3fn, below eight bits (out, bytes) uint8.
        group_scale, channel_scale: as StoredWeight has them.
        tile: of the operator "linear" with backend "triton".
    Weights times their group's scale are rounded to the dtype of x, which is exact for nvfp4 and mxfp4.
    Raises BadTile: the tile belongs to another operator or backend.
    """
    if (tile.operator, tile.backend) != ("linear", "triton"):
        raise BadTile("matmul: tile", f"{tile.operator} on {tile.backend}", "linear on triton", "look it up again")
    rows, in_features = x.shape
    out_features = weight.shape[0]
    stored = WEIGHT_FORMATS[precision]
    out = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    block_m, block_n, block_k, group_m, num_warps, num_stages = tile.arguments
    scale = x if group_scale is None else _as_read(group_scale)
    grid = (triton.cdiv(rows, block_m) * triton.cdiv(out_features, block_n),)
    stored_matmul_kernel[grid](
        x, _as_read(weight), scale, x if channel_scale is None else channel_scale, x if bias is None else bias, out,
        rows, out_features, in_features, x.stride(0), weight.stride(0), scale.stride(0), out.stride(0),
        _FORMAT[precision].value, stored.bits, stored.group, channel_scale is not None, bias is not None,
        block_m, block_n, block_k, group_m, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def _as_read(tensor: Tensor) -> Tensor:
    """The kernels read e4m3 as bytes."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
