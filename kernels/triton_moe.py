# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False
"""A mixture of experts on a GPU: the Triton kernel of `moe.py` and its launcher. Import it only where it runs.

Same formula, order and reference as kernels/moe.py, with the weights of all experts stacked, in one dtype with x. The
rows are sorted by expert; a program multiplies a tile of rows of one expert, so that experts without rows cost nothing.
How many tiles there are stays on the GPU: as many programs start as there could be, and those too many return at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .moe import Routing
from .tiles import BadTile, Tile
from .triton_fused import swiglu


@triton.jit
def grouped_matmul_kernel(
    x_ptr, weight_ptr, out_ptr, row_ptr, tile_start_ptr, tile_end_ptr, tile_expert_ptr, out_features, in_features,
    x_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    start, end = tl.load(tile_start_ptr + tile), tl.load(tile_end_ptr + tile)
    if start >= end:
        return
    at = start + tl.arange(0, BLOCK_M)
    here = at < end
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    row = tl.load(row_ptr + at, mask=here, other=0).to(tl.int64)
    n, k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row[:, None] * x_stride + k[None, :]
    weight_ptrs = weight_ptr + (expert * out_features + n[None, :]) * in_features + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, in_features, BLOCK_K):
        inside = first + k < in_features
        x = tl.load(x_ptrs, mask=here[:, None] & inside[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=(n[None, :] < out_features) & inside[:, None], other=0.0)
        sums = tl.dot(x, weight, sums, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    out_ptrs = out_ptr + at[:, None].to(tl.int64) * out_features + n[None, :]
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=here[:, None] & (n[None, :] < out_features))


class SortedRows(NamedTuple):
    """The choices of a step sorted by expert, and the tiles they are cut into. All int32, on the device of the routing.

    token (choices,) whose row · place (T, k) of each choice among the sorted; of experts that are not held behind all
    tile_start, tile_end, tile_expert (tiles,): sorted rows of each tile; start = end where there is none
    """

    token: Tensor
    place: Tensor
    tile_start: Tensor
    tile_end: Tensor
    tile_expert: Tensor


def sorted_rows(experts: Tensor, first: int, count: int, block_m: int) -> SortedRows:
    """Of (T, k) chosen experts, of which [first, first + count) are held. Nothing waits for the GPU."""
    k = experts.shape[1]
    local = experts.flatten().long() - first
    local = torch.where((local >= 0) & (local < count), local, count)
    order = local.argsort(stable=True)
    rows = torch.zeros(count + 1, dtype=torch.long, device=local.device).scatter_add_(0, local, torch.ones_like(local))
    ends = rows.cumsum(0)
    tiles = (rows[:count] + block_m - 1) // block_m
    tile_ends = tiles.cumsum(0)
    most = triton.cdiv(len(local), block_m) + count
    tile = torch.arange(most, device=local.device)
    expert = torch.searchsorted(tile_ends, tile, right=True).clamp(max=count - 1)
    ends_before, tiles_before = (ends - rows).index_select(0, expert), (tile_ends - tiles).index_select(0, expert)
    start = ends_before + (tile - tiles_before) * block_m
    end = torch.where(tile < tile_ends[-1], torch.minimum(start + block_m, ends.index_select(0, expert)), start)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=local.device))
    parts = (order // k, place.view(experts.shape), start, end, expert)
    return SortedRows(*(part.to(torch.int32).contiguous() for part in parts))


def moe(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, tile: Tile, *, first: int = 0) -> Tensor:
    """Sum over each token's experts of weight * down(silu(gate(x)) * up(x)); x (T, hidden) -> (T, hidden), dtype of x.

    Args:
        x: (T, hidden), last dimension contiguous; gate_up: (count, 2 * inter, hidden); down: (count, hidden, inter),
            contiguous; one dtype (fp32, fp16 or bf16). Products are summed in fp32 and rounded to it.
        routing: on the device of x. Experts outside [first, first + count) add nothing.
        tile: of the operator "linear" with backend "triton"; group_m and splits count for nothing here.
    Raises BadTile: the tile belongs to another operator or backend; ValueError: shapes or dtypes that do not fit.
    """
    if (tile.operator, tile.backend) != ("linear", "triton"):
        raise BadTile("moe: tile", f"{tile.operator} on {tile.backend}", "linear on triton", "look it up again")
    count, hidden, inter = down.shape
    if (
        gate_up.shape != (count, 2 * inter, hidden)
        or x.shape[1] != hidden
        or not x.dtype == gate_up.dtype == down.dtype
    ):
        found = f"x {tuple(x.shape)} {x.dtype}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)} {down.dtype}"
        raise ValueError(f"moe: {found}")
    if not gate_up.is_contiguous() or not down.is_contiguous():
        raise ValueError("moe: the experts' weights are not contiguous")
    block_m, block_n, block_k, _, num_warps, num_stages, _ = tile.arguments
    rows = sorted_rows(routing.experts, first, count, block_m)
    choices, tiles = len(rows.token), (rows.tile_start, rows.tile_end, rows.tile_expert)

    def multiplied(inputs: Tensor, row: Tensor, weight: Tensor) -> Tensor:
        out = torch.zeros((choices, weight.shape[1]), dtype=x.dtype, device=x.device)
        grouped_matmul_kernel[(len(rows.tile_start), triton.cdiv(weight.shape[1], block_n))](
            inputs, weight, out, row, *tiles, weight.shape[1], weight.shape[2], inputs.stride(0), block_m, block_n,
            block_k, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        return out

    activated = swiglu(multiplied(x, rows.token, gate_up))
    in_order = torch.arange(choices, dtype=torch.int32, device=x.device)
    answers = multiplied(activated, in_order, down).index_select(0, rows.place.flatten())
    answers = answers.view(*rows.place.shape, hidden).float()
    held = (routing.experts >= first) & (routing.experts < first + count)
    return (answers * routing.weights.where(held, 0.0)[:, :, None]).sum(dim=1).to(x.dtype)
