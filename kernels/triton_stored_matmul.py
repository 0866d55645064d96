# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Linear layers on a GPU whose weights have 8 bits or fewer, multiplied as they are stored or expanded in the product.

Same formula and reference as kernels/linear.py, with the weight as `weight_layout.rows_of` lays it out.

    x of 16 or 32 bits     not rounded: weights below eight bits, and fp8, are expanded to the dtype of x
    x of e4m3, or int8     rows rounded by triton_rounding.py; multiplied as stored with fp8, or int8, weights

Each byte of a weight is loaded once, along the input channels, and each scale once. Few rows have few tiles: then the
input channels are cut into splits, whose sums a second kernel adds in one order. Import it only where it runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import placement
from .tiles import BadTile, Tile
from .triton_formats import FORMAT_CODES, expanded_weights
from .weight_formats import WEIGHT_FORMATS

STORED_PRECISIONS = tuple(FORMAT_CODES)
_PROGRAMS = 4  # on each multiprocessor, so that loads enough are under way
_LEAST_STEPS = 4  # of a split
_COLUMNS = 512  # of finish_kernel, by program


@triton.jit(do_not_specialize=["rows"])  # changes from step to step: one kernel for all
def stored_matmul_kernel(
    x_ptr, weight_ptr, group_scale_ptr, row_scale_ptr, channel_scale_ptr, bias_ptr, out_ptr, rows, out_features,
    in_features, x_stride, weight_stride, group_stride, FORMAT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, HAS_CHANNEL_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, NATIVE_E4M3: tl.constexpr,
    EVEN: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    # Programs are numbered as in triton_matmul.py. EVEN: the steps end where the input channels do.
    BYTES: tl.constexpr = BLOCK_K * BITS // 8
    SCALES: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1
    ZERO: tl.constexpr = 0.0 if HAS_ROW_SCALE else 0
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    height = min(tiles_m - first_m, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    m = (first_m + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = n[:, None].to(tl.int64)
    part = tl.cdiv(tl.cdiv(in_features, BLOCK_K), SPLITS)
    first = tl.program_id(1) * part
    last = min(first + part, tl.cdiv(in_features, BLOCK_K))
    k, at, scale_at = tl.arange(0, BLOCK_K), tl.arange(0, BYTES), tl.arange(0, SCALES)
    x_ptrs = x_ptr + m[:, None].to(tl.int64) * x_stride + (first * BLOCK_K + k)[None, :]
    weight_ptrs = weight_ptr + channel * weight_stride + (first * BYTES + at)[None, :]
    scale_row = group_scale_ptr + channel * group_stride
    row_there, channel_there = m[:, None] < rows, n[:, None] < out_features
    if HAS_ROW_SCALE and FORMAT == 1:
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if not (HAS_ROW_SCALE or FORMAT == 0 or FORMAT == 3):
        column = (first * BLOCK_K // GROUP + scale_at)[None, :]
        ahead = tl.load(scale_row + column, mask=channel_there & (column < group_stride), other=0)
    for step in range(first, last):
        if EVEN:
            x = tl.load(x_ptrs, mask=row_there, other=0.0)
            stored = tl.load(weight_ptrs, mask=channel_there, other=ZERO)
        else:
            x = tl.load(x_ptrs, mask=row_there & (step * BLOCK_K + k < in_features)[None, :], other=0.0)
            inside = step * BYTES + at < weight_stride
            stored = tl.load(weight_ptrs, mask=channel_there & inside[None, :], other=ZERO)
        if HAS_ROW_SCALE:
            sums = tl.dot(x, tl.trans(stored), sums, out_dtype=sums.dtype)
        else:
            if FORMAT == 0 or FORMAT == 3:
                scale = stored  # has none
            else:
                # too few for the pipeline: those of the next step are loaded before these are used
                scale = ahead
                column = ((step + 1) * BLOCK_K // GROUP + scale_at)[None, :]
                ahead = tl.load(scale_row + column, mask=channel_there & (column < group_stride), other=0)
            weight = expanded_weights(stored, scale, FORMAT, GROUP, BLOCK_N, BLOCK_K, NATIVE_E4M3).to(x.dtype)
            sums = tl.dot(x, tl.trans(weight), sums, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BYTES
    # the last splits may have no steps: their sums are zeros
    place = (tl.program_id(1) * rows + m)[:, None].to(tl.int64) * out_features + n[None, :]
    there = row_there & (n[None, :] < out_features)
    if SPLITS == 1:
        out = _scaled(
            sums, m, n, rows, out_features, row_scale_ptr, channel_scale_ptr, bias_ptr, HAS_ROW_SCALE,
            HAS_CHANNEL_SCALE, HAS_BIAS,
        )  # fmt: skip
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=there)
    else:
        tl.store(out_ptr + place, sums, mask=there)


@triton.jit
def _scaled(
    sums, m, n, rows, out_features, row_scale_ptr, channel_scale_ptr, bias_ptr, HAS_ROW_SCALE: tl.constexpr,
    HAS_CHANNEL_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """sums (M, N) int32 or fp32 times their scales, plus the bias, in fp32."""
    sums = sums.to(tl.float32)
    if HAS_CHANNEL_SCALE:
        scale = tl.load(channel_scale_ptr + n, mask=n < out_features, other=0.0)[None, :]
        if HAS_ROW_SCALE:
            scale = tl.load(row_scale_ptr + m, mask=m < rows, other=0.0)[:, None] * scale
        sums *= scale
    if HAS_BIAS:
        sums += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
    return sums


@triton.jit(do_not_specialize=["rows"])
def finish_kernel(
    sums_ptr, row_scale_ptr, channel_scale_ptr, bias_ptr, out_ptr, rows, out_features, HAS_ROW_SCALE: tl.constexpr,
    HAS_CHANNEL_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n < out_features)[None, :]
    place = m[:, None].to(tl.int64) * out_features + n[None, :]
    sums = tl.load(sums_ptr + place, mask=inside, other=0)
    for split in tl.static_range(1, SPLITS):
        before = rows.to(tl.int64) * out_features * split
        sums += tl.load(sums_ptr + before + place, mask=inside, other=0)
    out = _scaled(
        sums, m, n, rows, out_features, row_scale_ptr, channel_scale_ptr, bias_ptr, HAS_ROW_SCALE, HAS_CHANNEL_SCALE,
        HAS_BIAS,
    )  # fmt: skip
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


def stored_matmul(
    x: Tensor,
    precision: str,
    weight: Tensor,
    group_scale: Tensor | None,
    channel_scale: Tensor | None,
    tile: Tile,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x (M, in) @ weight.T + bias -> (M, out), accumulated in fp32, or int32 for int8.

    Args:
        x: fp32, fp16 or bf16; with row_scale in the dtype of the weight, which is fp8 or int8. Rows contiguous.
        precision: one of STORED_PRECISIONS; int8 only with row_scale.
        weight: (out, in) int8 or float8_e4m3fn, below eight bits (out, bytes) uint8; contiguous.
        group_scale, channel_scale: as StoredWeight has them; contiguous.
        tile: of the operator "linear" with backend "triton".
        row_scale: (M,) fp32, of the rows of x as triton_rounding.py has rounded them.
        dtype: of the result; left out: that of x.
    Weights times their group's scale are rounded to the dtype of x, which is exact for nvfp4 and mxfp4.
    Raises BadTile: the tile belongs to another operator or backend.
    """
    if (tile.operator, tile.backend) != ("linear", "triton"):
        raise BadTile("matmul: tile", f"{tile.operator} on {tile.backend}", "linear on triton", "look it up again")
    rows, in_features = x.shape
    out_features = weight.shape[0]
    stored = WEIGHT_FORMATS[precision]
    block_m, block_n, block_k, group_m, num_warps, num_stages, splits = tile.arguments
    # Triton's dot of bytes takes 32 input channels at the least
    block_k = max(block_k, 8 // stored.bits * 16 if row_scale is None else 32)
    programs = triton.cdiv(rows, block_m) * triton.cdiv(out_features, block_n)
    steps = triton.cdiv(in_features, block_k)
    multiprocessors = placement.multiprocessors(x.device)
    splits = min(splits, steps) or enough_splits(programs, steps, multiprocessors)
    out = torch.empty((rows, out_features), dtype=dtype or x.dtype, device=x.device)
    sums = out
    if splits > 1:
        sum_dtype = torch.int32 if x.dtype == torch.int8 else torch.float32
        sums = torch.empty((splits, rows, out_features), dtype=sum_dtype, device=x.device)
    weight = weight if row_scale is not None else _as_read(weight)
    scale = weight if group_scale is None else _as_read(group_scale)
    by_row, by_channel, added = (sums if each is None else each for each in (row_scale, channel_scale, bias))
    has = row_scale is not None, channel_scale is not None, bias is not None
    stored_matmul_kernel[(programs, splits)](
        x, weight, scale, by_row, by_channel, added, sums, rows, out_features, in_features, x.stride(0),
        weight.stride(0), scale.stride(0), FORMAT_CODES[precision], stored.bits, stored.group, *has,
        placement.converts_e4m3(x.device), in_features % block_k == 0, splits, block_m, block_n, block_k, group_m,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    if splits > 1:
        _finish(sums, row_scale, channel_scale, bias, out, splits)
    return out


def enough_splits(programs: int, steps: int, multiprocessors: int) -> int:
    """A power of two of parts of `steps` steps, such that each multiprocessor has programs enough, if there are
    steps for them.

    >>> [enough_splits(programs, 112, 132) for programs in (8, 64, 400)]
    [16, 8, 1]
    """
    wanted = min(_PROGRAMS * multiprocessors // programs, steps // _LEAST_STEPS)
    return 1 << max(0, wanted.bit_length() - 1)


def scaled(sums: Tensor, row_scale: Tensor, channel_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """sums (M, out) int32, contiguous, times (M,) and (out,) fp32 scales, plus bias (out,) -> (M, out)."""
    out = torch.empty(sums.shape, dtype=dtype, device=sums.device)
    _finish(sums, row_scale, channel_scale, bias, out, 1)
    return out


def _finish(
    sums: Tensor, row_scale: Tensor | None, channel_scale: Tensor | None, bias: Tensor | None, out: Tensor, splits: int
) -> None:
    rows, out_features = out.shape
    by_row, by_channel, added = (sums if each is None else each for each in (row_scale, channel_scale, bias))
    has = row_scale is not None, channel_scale is not None, bias is not None
    finish_kernel[(rows, triton.cdiv(out_features, _COLUMNS))](
        sums, by_row, by_channel, added, out, rows, out_features, *has, splits, _COLUMNS
    )


def _as_read(tensor: Tensor) -> Tensor:
    """The kernels read e4m3 as bytes."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
