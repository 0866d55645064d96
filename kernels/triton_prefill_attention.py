# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Paged causal attention on a GPU: the Triton kernel of `prefill_attention.py`, its launcher and its tiles.

Same formula and reference as kernels/prefill_attention.py. Import it only where it runs.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import placement
from .paged_cache import PagedCache
from .tiles import BadTile, Tile, bucket
from .triton_decode_attention import LOG2_E, cached_numbers


@triton.jit
def _attend(
    q, largest, total, mixed, start, end, seen_upto, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, scale,
    block_stride, head_offset, scale_block_stride, scale_offset, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, BLOCK_N: tl.constexpr, FORMAT: tl.constexpr, NATIVE_E4M3: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """BLOCK_N positions from `start` on. MASKED: those from `end` on do not exist, and row m sees the ones up to
    seen_upto[m]; else all exist and are seen."""
    position, dim = start + tl.arange(0, BLOCK_N), tl.arange(0, PADDED_DIM)
    there = position < end
    if MASKED:
        block = tl.load(table_ptr + position // BLOCK_SIZE, mask=there, other=0)
    else:
        block = tl.load(table_ptr + position // BLOCK_SIZE)
    have = dim[None, :] < HEAD_DIM
    if MASKED:
        have = there[:, None] & have
    offset = (block.to(tl.int64) * block_stride + head_offset + position % BLOCK_SIZE * HEAD_DIM)[:, None]
    k = cached_numbers(k_ptr + offset + dim[None, :], have, FORMAT, NATIVE_E4M3)
    v = cached_numbers(v_ptr + offset + dim[None, :], have, FORMAT, NATIVE_E4M3)
    scores = tl.dot(q, tl.trans(k).to(q.dtype), input_precision="ieee") * scale
    if FORMAT == 2:
        scale_place = block.to(tl.int64) * scale_block_stride + scale_offset + position % BLOCK_SIZE
        scores *= tl.load(k_scale_ptr + scale_place, mask=there, other=0.0)[None, :]
    if MASKED:
        scores = tl.where(position[None, :] <= seen_upto[:, None], scores, float("-inf"))
    peak = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp2(scores - peak[:, None])
    down = tl.exp2(largest - peak)
    total = total * down + tl.sum(weights, 1)
    if FORMAT == 2:
        weights *= tl.load(v_scale_ptr + scale_place, mask=there, other=0.0)[None, :]
    mixed = mixed * down[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision="ieee")
    return peak, total, mixed


@triton.jit(do_not_specialize=["table_stride"])  # changes from step to step: one kernel for all
def prefill_attention_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, tables_ptr, query_start_ptr, context_ptr, out_ptr, scale, q_stride,
    table_stride, block_stride, head_stride, scale_block_stride, heads, kv_heads, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FORMAT: tl.constexpr, NATIVE_E4M3: tl.constexpr,
):  # fmt: skip
    # One program: BLOCK_M query tokens of one head of one sequence. Those that see most come first: the last ones.
    head, sequence = tl.program_id(0), tl.program_id(1)
    first_row = (tl.num_programs(2) - 1 - tl.program_id(2)) * BLOCK_M
    kv_head = head // (heads // kv_heads)
    first = tl.load(query_start_ptr + sequence)
    rows = tl.load(query_start_ptr + sequence + 1) - first
    context = tl.load(context_ptr + sequence)
    row = first_row + tl.arange(0, BLOCK_M)
    if first_row < rows:
        dim = tl.arange(0, PADDED_DIM)
        token = (first + row).to(tl.int64)
        real = (row[:, None] < rows) & (dim[None, :] < HEAD_DIM)
        q = tl.load(q_ptr + token[:, None] * q_stride + head * HEAD_DIM + dim[None, :], mask=real, other=0.0)
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        mixed = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)
        length = context + min(rows, first_row + BLOCK_M)
        seen_by_all = (context + first_row + 1) // BLOCK_N * BLOCK_N
        table_ptr = tables_ptr + sequence * table_stride
        head_offset, scale_offset = kv_head * head_stride, kv_head * 2 * BLOCK_SIZE
        for start in range(0, seen_by_all, BLOCK_N):
            largest, total, mixed = _attend(
                q, largest, total, mixed, start, length, context + row, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr,
                table_ptr, scale, block_stride, head_offset, scale_block_stride, scale_offset, BLOCK_SIZE, HEAD_DIM,
                PADDED_DIM, BLOCK_N, FORMAT, NATIVE_E4M3, False,
            )  # fmt: skip
        for start in range(seen_by_all, length, BLOCK_N):
            largest, total, mixed = _attend(
                q, largest, total, mixed, start, length, context + row, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr,
                table_ptr, scale, block_stride, head_offset, scale_block_stride, scale_offset, BLOCK_SIZE, HEAD_DIM,
                PADDED_DIM, BLOCK_N, FORMAT, NATIVE_E4M3, True,
            )  # fmt: skip
        out = mixed / total[:, None]
        out_ptrs = out_ptr + (token[:, None] * heads + head) * HEAD_DIM + dim[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=real)


def prefill_attention(
    q: Tensor,
    cache: PagedCache,
    block_tables: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    scale: float,
    tile: Tile | None,
    max_query_rows: int,
) -> Tensor:
    """As kernels/prefill_attention.py, for tensors on a GPU (or on the CPU under TRITON_INTERPRET=1); also fp16.

    Args:
        tile: None: `default_tile`.
        max_query_rows: most new tokens of a sequence, known to the caller: reading it off `query_start` would wait for
            the GPU.
    Raises BadTile: the tile belongs to another operator or backend.
    """
    planes = cache.gpu_planes
    if tile is None:
        wide = placement.has_wide_shared_memory(q.device)
        tile = default_tile(max_query_rows, q.shape[2], q.itemsize, wide, planes.format)
    if (tile.operator, tile.backend) != ("prefill_attention", "triton"):
        found = f"{tile.operator} on {tile.backend}"
        raise BadTile("prefill_attention: tile", found, "prefill_attention on triton", "look it up again")
    tokens, heads, head_dim = q.shape
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    block_m, block_n, num_warps, num_stages = tile.arguments
    grid = (heads, context_len.shape[0], triton.cdiv(max_query_rows, block_m))
    if not tokens:
        return out
    prefill_attention_kernel[grid](
        q, planes.keys, planes.values, planes.key_scales, planes.value_scales, block_tables, query_start, context_len,
        out, scale * LOG2_E, q.stride(0), block_tables.stride(0), *planes.keys.stride()[:2],
        planes.key_scales.stride(0), heads, cache.kv_heads, cache.block_size, head_dim,
        max(16, triton.next_power_of_2(head_dim)), block_m, block_n, planes.format, placement.converts_e4m3(q.device),
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def default_tile(query_rows: int, head_dim: int, itemsize: int, wide_shared_memory: bool, cached_as: int) -> Tile:
    """A tile without spills on sm_80 and sm_90.

    Args:
        wide_shared_memory: 227 KB a program, where else a tile shall fit 99 KB.
        cached_as: 0: in 16 or 32 bits, 1: fp8, 2: int8 with scales.
    With wide shared memory the fastest of four tiles on an NVIDIA H200 (two, at 64 tokens) for prompts of 64, 512 and
    2,048 tokens with and without context, where the cache is bf16; where it is fp8, but for 8 % at 4 prompts of 512
    (heads of 128 numbers); int8 and the rest: not measured. Four warps spill on sm_80 where the cache is fp8 or int8.
    """
    if head_dim * itemsize > 256:
        shape = (16 if query_rows <= 16 else 32, 16, 8, 1)
    elif query_rows <= 16:
        shape = (16, 64, 4, 2)
    elif wide_shared_memory:
        few = query_rows <= 64 or cached_as == 0
        shape = (64, 64, 4, 2) if few else (128, 64 if cached_as == 2 else 128, 8, 2)
    else:
        shape = (64, 64, 8, 2)
    return Tile("prefill_attention", "triton", tuple(zip(("block_m", "block_n", "num_warps", "num_stages"), shape)))


def tiles(query_rows: int, head_dim: int, shared_memory_bytes: int, itemsize: int = 2) -> list[Tile]:
    """What a search may try. Left out: query tiles beyond the bucket of the rows, pipelines of K and V that do not fit
    shared memory, and sums of more than 128 registers per thread (they spill)."""
    found = []
    most_rows = max(16, bucket(query_rows))
    for block_m, block_n, num_warps, num_stages in itertools.product(
        (16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
    ):
        fits = (block_m + 2 * block_n * num_stages) * head_dim * itemsize <= shared_memory_bytes
        sums_per_thread = block_m * (head_dim + block_n) // (32 * num_warps)
        if block_m <= most_rows and fits and sums_per_thread <= 128:
            parameters = {"block_m": block_m, "block_n": block_n, "num_warps": num_warps, "num_stages": num_stages}
            found.append(Tile("prefill_attention", "triton", tuple(parameters.items())))
    return found
