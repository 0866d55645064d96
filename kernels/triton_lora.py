# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Many adapters in one step on a GPU: the Triton kernels of `lora.py` and their launcher. Import it only where it runs.

Same formula, grouping and reference as kernels/lora.py, here for one part, with A and B of all slots stacked and their
ranks padded with zeros. Two kernels as in Punica (Chen et al., arXiv:2310.18547): shrink to the rank, then expand; a
program takes a tile of rows of one adapter, so that a group of one row is its BGMV and a long one its SGMV.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_lora import BLOCK_ROWS, RowTiles


@triton.jit
def shrink_kernel(
    x_ptr, a_ptr, h_ptr, scale_ptr, row_ptr, tile_start_ptr, tile_end_ptr, tile_slot_ptr, in_features, x_stride,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    at = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
    here = at < tl.load(tile_end_ptr + tile)
    slot = tl.load(tile_slot_ptr + tile).to(tl.int64)
    row = tl.load(row_ptr + at, mask=here, other=0).to(tl.int64)
    rank, k = tl.arange(0, RANK), tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
    for start in range(0, in_features, BLOCK_K):
        inside = start + k < in_features
        x = tl.load(
            x_ptr + row[:, None] * x_stride + start + k[None, :], mask=here[:, None] & inside[None, :], other=0.0
        )
        a_at = (slot * RANK + rank[None, :]) * in_features + start + k[:, None]
        a = tl.load(a_ptr + a_at, mask=inside[:, None], other=0.0)
        sums = tl.dot(x, a, sums, input_precision="ieee")
    sums *= tl.load(scale_ptr + slot)
    h_at = at[:, None].to(tl.int64) * RANK + rank[None, :]
    tl.store(h_ptr + h_at, sums, mask=here[:, None])


@triton.jit
def expand_kernel(
    h_ptr, b_ptr, y_ptr, row_ptr, tile_start_ptr, tile_end_ptr, tile_slot_ptr, first, channels, y_stride,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    at = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
    here = at < tl.load(tile_end_ptr + tile)
    slot = tl.load(tile_slot_ptr + tile).to(tl.int64)
    row = tl.load(row_ptr + at, mask=here, other=0).to(tl.int64)
    rank = tl.arange(0, RANK)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.load(h_ptr + at[:, None].to(tl.int64) * RANK + rank[None, :], mask=here[:, None], other=0.0)
    b = tl.load(b_ptr + (slot * channels + n[None, :]) * RANK + rank[:, None], mask=n[None, :] < channels, other=0.0)
    added = tl.dot(h.to(b.dtype), b, input_precision="ieee")
    y_ptrs = y_ptr + row[:, None] * y_stride + first + n[None, :]
    mask = here[:, None] & (n[None, :] < channels)
    y = tl.load(y_ptrs, mask=mask, other=0.0)
    tl.store(y_ptrs, (y + added).to(y_ptr.dtype.element_ty), mask=mask)


def lora(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: Tensor, rows: RowTiles, *, first: int = 0, block_n: int = 64,
    block_k: int = 64,
) -> None:  # fmt: skip
    """y[row, first : first + channels] += scale[slot] * (x[row] @ A[slot].T) @ B[slot].T, IN PLACE.

    Args:
        x: (T, in_features); y: (T, any); a: (slots, rank, in_features); b: (slots, channels, rank), contiguous; x, a
            and b of one dtype (fp32, fp16 or bf16). rank: a power of two >= 16, smaller ranks padded with zeros.
        scale: (slots,) fp32.
        rows: on the device of x; a row is in it at most once.
        block_n, block_k: powers of two >= 16. Not searched.
    Sums are fp32; between the two products they are rounded to the dtype of b.
    Raises ValueError: shapes or dtypes that do not fit together.
    """
    slots, rank, in_features = a.shape
    channels = b.shape[1]
    if b.shape != (slots, channels, rank) or x.shape[1] != in_features or not x.dtype == a.dtype == b.dtype:
        raise ValueError(
            f"lora: x {tuple(x.shape)} {x.dtype}, A {tuple(a.shape)} {a.dtype}, B {tuple(b.shape)} {b.dtype}"
        )
    if rank < 16 or rank & (rank - 1) or not a.is_contiguous() or not b.is_contiguous():
        raise ValueError(f"lora: A {tuple(a.shape)} is not contiguous with a rank that is a power of two >= 16")
    tiles = len(rows.slot)
    if not tiles:
        return
    h = torch.empty((len(rows.row), rank), dtype=torch.float32, device=x.device)
    shrink_kernel[(tiles,)](
        x, a, h, scale, rows.row, rows.start, rows.end, rows.slot, in_features, x.stride(0), rank, BLOCK_ROWS, block_k
    )
    expand_kernel[(tiles, triton.cdiv(channels, block_n))](
        h, b, y, rows.row, rows.start, rows.end, rows.slot, first, channels, y.stride(0), rank, BLOCK_ROWS, block_n
    )
