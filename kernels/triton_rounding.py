# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Rows of activations rounded on a GPU, to e4m3 or to int8, and weights of 8 bits or fewer expanded to 16.

Import it only where it runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import placement
from .triton_formats import FORMAT_CODES, e4m3_code, expanded_weights, round_half_even
from .weight_formats import WEIGHT_FORMATS

_MOST_COLUMNS = 8192  # of round_rows_kernel at a time
_EXPANDED_ROWS, _EXPANDED_COLUMNS = 16, 256  # of expand_kernel, by program


@triton.jit
def round_rows_kernel(
    x_ptr, out_ptr, scale_ptr, width, x_stride, TO_INT8: tl.constexpr, NATIVE_E4M3: tl.constexpr, ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # A program takes a row. ONCE: the row is one block, read once.
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x_ptrs = x_ptr + row * x_stride + column
    x = tl.load(x_ptrs, mask=column < width, other=0.0).to(tl.float32)
    largest = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 0)  # NaN shall not vanish
    if not ONCE:
        for start in range(BLOCK, width, BLOCK):
            more = tl.load(x_ptrs + start, mask=start + column < width, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.where(more == more, tl.abs(more), float("inf")), 0))
    if TO_INT8:
        scale = tl.div_rn(largest, 127.0)
        inverse = tl.where(scale > 0, tl.div_rn(tl.full((), 1.0, tl.float32), tl.where(scale > 0, scale, 1.0)), 0.0)
    else:
        scale = tl.where(largest > 0, tl.div_rn(largest, 448.0), 1.0)
        inverse = scale  # it divides
    tl.store(scale_ptr + row, scale)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        if not ONCE:
            x = tl.load(x_ptrs + start, mask=inside, other=0.0).to(tl.float32)
        if TO_INT8:
            rounded = round_half_even(x * inverse)
            rounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8)
        else:
            rounded = e4m3_code(tl.div_rn(x, inverse), NATIVE_E4M3)
        tl.store(out_ptr + row * width + start + column, rounded, mask=inside)


def rounded_rows(x: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Rows rounded to e4m3 ("fp8") or int8, and the fp32 scale of each: x ~ rounded * scale[:, None].

    int8 is stored_weight.quantize_int8 bit by bit. The largest number of a row becomes 448, or 127; a row of zeros has
    the scale 1 for e4m3, 0 for int8.
    x: (M, width) fp32, fp16 or bf16, rows contiguous. A row with NaN or infinity has an infinite scale.
    """
    rows, width = x.shape
    dtype = torch.int8 if precision == "int8" else torch.uint8
    out = torch.empty((rows, width), dtype=dtype, device=x.device)
    scale = torch.empty((rows,), dtype=torch.float32, device=x.device)
    block = min(_MOST_COLUMNS, triton.next_power_of_2(width))
    round_rows_kernel[(rows,)](
        x, out, scale, width, x.stride(0), precision == "int8", placement.converts_e4m3(x.device), width <= block,
        block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return (out if precision == "int8" else out.view(torch.float8_e4m3fn)), scale


@triton.jit
def expand_kernel(
    weight_ptr, group_scale_ptr, channel_scale_ptr, out_ptr, out_features, in_features, weight_stride, group_stride,
    FORMAT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_CHANNEL_SCALE: tl.constexpr,
    NATIVE_E4M3: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    BYTES: tl.constexpr = BLOCK_K * BITS // 8
    SCALES: tl.constexpr = BLOCK_K // GROUP
    step, n = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel, there = n[:, None].to(tl.int64), n[:, None] < out_features
    at, column = step * BYTES + tl.arange(0, BYTES), step * SCALES + tl.arange(0, SCALES)
    inside = there & (at < weight_stride)[None, :]
    stored = tl.load(weight_ptr + channel * weight_stride + at[None, :], mask=inside, other=0)
    if FORMAT == 0 or FORMAT == 3:
        scale = stored  # has none
    else:
        inside = there & (column < group_stride)[None, :]
        scale = tl.load(group_scale_ptr + channel * group_stride + column[None, :], mask=inside, other=0)
    weight = expanded_weights(stored, scale, FORMAT, GROUP, BLOCK_N, BLOCK_K, NATIVE_E4M3)
    if HAS_CHANNEL_SCALE:
        weight *= tl.load(channel_scale_ptr + n, mask=n < out_features, other=0.0)[:, None]
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    place = channel * in_features + k[None, :]
    tl.store(out_ptr + place, weight.to(out_ptr.dtype.element_ty), mask=there & (k < in_features)[None, :])


def expanded(
    precision: str, weight: Tensor, group_scale: Tensor | None, channel_scale: Tensor | None, in_features: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Rows of a stored weight as (out, in) numbers of `dtype`, all scales multiplied.

    weight, group_scale, channel_scale: as `triton_stored_matmul.stored_matmul` takes them; not int8.
    """
    out_features, stored = weight.shape[0], WEIGHT_FORMATS[precision]
    out = torch.empty((out_features, in_features), dtype=dtype, device=weight.device)
    weight = weight.view(torch.uint8)
    scale = weight if group_scale is None else group_scale
    scale = scale.view(torch.uint8) if scale.dtype == torch.float8_e4m3fn else scale
    grid = (triton.cdiv(in_features, _EXPANDED_COLUMNS), triton.cdiv(out_features, _EXPANDED_ROWS))
    expand_kernel[grid](
        weight, scale, out if channel_scale is None else channel_scale, out, out_features, in_features,
        weight.stride(0), scale.stride(0), FORMAT_CODES[precision], stored.bits, stored.group,
        channel_scale is not None, placement.converts_e4m3(weight.device), _EXPANDED_ROWS, _EXPANDED_COLUMNS,
    )  # fmt: skip
    return out
