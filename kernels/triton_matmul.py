# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Linear layers on a GPU: the Triton kernel of `linear.py`, its launcher and its tiles. Import it only where it runs.

Same formula and reference as kernels/linear.py: y = x @ weight.T + bias, here with x and weight in one dtype.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import BadTile, Tile, bucket


@triton.jit(do_not_specialize=["rows"])  # changes from step to step: one kernel for all
def matmul_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, out_features, in_features, x_stride, weight_stride, out_stride,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Programs are numbered so that GROUP_M row tiles in a row share a column of weight tiles in the L2 cache.
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    height = min(tiles_m - first_m, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    m = (first_m + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m[:, None].to(tl.int64) * x_stride + k[None, :]
    weight_ptrs = weight_ptr + n[None, :].to(tl.int64) * weight_stride + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, in_features, BLOCK_K):
        inside = start + k < in_features
        x = tl.load(x_ptrs, mask=(m[:, None] < rows) & inside[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=(n[None, :] < out_features) & inside[:, None], other=0.0)
        sums = tl.dot(x, weight, sums, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    if HAS_BIAS:
        sums += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + m[:, None].to(tl.int64) * out_stride + n[None, :]
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < out_features))


def matmul(x: Tensor, weight: Tensor, tile: Tile, bias: Tensor | None = None) -> Tensor:
    """x (M, in) @ weight (out, in).T + bias (out,) -> (M, out), accumulated in fp32.

    Args:
        x, weight: one dtype (fp32, fp16 or bf16), last dimension contiguous, on the GPU (or the CPU under
        TRITON_INTERPRET=1). tile: of the operator "linear" with backend "triton"; its splits count for nothing here.
    Raises BadTile: the tile belongs to another operator or backend.
    """
    if (tile.operator, tile.backend) != ("linear", "triton"):
        raise BadTile("matmul: tile", f"{tile.operator} on {tile.backend}", "linear on triton", "look it up again")
    rows, in_features = x.shape
    out_features = weight.shape[0]
    out = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    block_m, block_n, block_k, group_m, num_warps, num_stages, _ = tile.arguments
    grid = (triton.cdiv(rows, block_m) * triton.cdiv(out_features, block_n),)
    matmul_kernel[grid](
        x, weight, x if bias is None else bias, out, rows, out_features, in_features, x.stride(0), weight.stride(0),
        out.stride(0), bias is not None, block_m, block_n, block_k, group_m, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def tiles(shape: tuple[int, int, int], shared_memory_bytes: int, itemsize: int = 2) -> list[Tile]:
    """What a search may try for x (M, K) and weight (N, K), shape = (M, N, K), on a GPU with so much shared memory per
    block.

    Left out: row tiles beyond the bucket of M (they compute padding), pipelines that do not fit shared memory, sums of
    more than 128 registers per thread (256 x 256 on 8 warps spills on sm_80), and warps with less than one 16 x 8 tile
    each."""
    most_rows = max(16, bucket(shape[0]))
    found = []
    blocks = itertools.product((16, 32, 64, 128, 256), (32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4))
    for block_m, block_n, block_k, num_warps, num_stages in blocks:
        fits = (block_m + block_n) * block_k * itemsize * num_stages <= shared_memory_bytes
        sums_per_thread = block_m * block_n // (32 * num_warps)
        if block_m <= most_rows and block_k <= 2 * shape[2] and fits and 4 <= sums_per_thread <= 128:
            blocks_chosen = {"block_m": block_m, "block_n": block_n, "block_k": block_k}
            parameters = blocks_chosen | {"num_warps": num_warps, "num_stages": num_stages}
            found.append(Tile("linear", "triton", tuple(parameters.items())))
    return found
