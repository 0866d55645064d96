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

from .paged_cache import PagedCache
from .tiles import BadTile, Tile, bucket
from .triton_decode_attention import cached_numbers


@triton.jit(do_not_specialize=["table_stride"])  # changes from step to step: one kernel for all
def prefill_attention_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, tables_ptr, query_start_ptr, context_ptr, out_ptr, scale, q_stride,
    table_stride, block_size, block_stride, head_stride, scale_block_stride, heads, kv_heads, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    # One program: BLOCK_M query tokens of one head of one sequence.
    head, sequence = tl.program_id(1), tl.program_id(2)
    kv_head = head // (heads // kv_heads)
    first = tl.load(query_start_ptr + sequence)
    rows = tl.load(query_start_ptr + sequence + 1) - first
    context = tl.load(context_ptr + sequence)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M < rows:
        dim = tl.arange(0, PADDED_DIM)
        token = (first + row).to(tl.int64)
        real = (row[:, None] < rows) & (dim[None, :] < HEAD_DIM)
        q = tl.load(q_ptr + token[:, None] * q_stride + head * HEAD_DIM + dim[None, :], mask=real, other=0.0)
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        mixed = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)
        length = context + min(rows, (tl.program_id(0) + 1) * BLOCK_M)
        for start in range(0, length, BLOCK_N):
            position = start + tl.arange(0, BLOCK_N)
            there = position < length
            block = tl.load(tables_ptr + sequence * table_stride + position // block_size, mask=there, other=0)
            slot = block.to(tl.int64) * block_stride + position % block_size * HEAD_DIM
            offset = slot + kv_head * head_stride
            have = there[:, None] & (dim[None, :] < HEAD_DIM)
            k = cached_numbers(k_ptr + offset[:, None] + dim[None, :], have, FORMAT)
            v = cached_numbers(v_ptr + offset[:, None] + dim[None, :], have, FORMAT)
            scores = tl.dot(q, tl.trans(k).to(q.dtype), input_precision="ieee") * scale
            if FORMAT == 2:
                scale_place = block.to(tl.int64) * scale_block_stride + kv_head * 2 * block_size + position % block_size
                scores *= tl.load(k_scale_ptr + scale_place, mask=there, other=0.0)[None, :]
            seen = there[None, :] & (position[None, :] <= context + row[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            peak = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.exp(scores - peak[:, None])
            down = tl.exp(largest - peak)
            total = total * down + tl.sum(weights, 1)
            if FORMAT == 2:
                weights *= tl.load(v_scale_ptr + scale_place, mask=there, other=0.0)[None, :]
            mixed = mixed * down[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision="ieee")
            largest = peak
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
    if tile is None:
        tile = default_tile(max_query_rows, q.shape[2], q.itemsize)
    if (tile.operator, tile.backend) != ("prefill_attention", "triton"):
        found = f"{tile.operator} on {tile.backend}"
        raise BadTile("prefill_attention: tile", found, "prefill_attention on triton", "look it up again")
    tokens, heads, head_dim = q.shape
    planes = cache.gpu_planes
    block_size, kv_heads = cache.block_size, cache.kv_heads
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    block_m, block_n, num_warps, num_stages = tile.arguments
    grid = (triton.cdiv(max_query_rows, block_m), heads, context_len.shape[0])
    if not tokens:
        return out
    prefill_attention_kernel[grid](
        q, planes.keys, planes.values, planes.key_scales, planes.value_scales, block_tables, query_start, context_len,
        out, scale, q.stride(0), block_tables.stride(0), block_size, *planes.keys.stride()[:2],
        planes.key_scales.stride(0), heads, kv_heads, head_dim, max(16, triton.next_power_of_2(head_dim)),
        block_m, block_n, planes.format, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def default_tile(query_rows: int, head_dim: int, itemsize: int) -> Tile:
    """A tile without spills (four warps spill on sm_80 where the cache is fp8 or int8) in less than 99 KB of shared
    memory, which every GPU from sm_80 on has; not measured."""
    wide = head_dim * itemsize > 256
    parameters = {
        "block_m": 16 if query_rows <= 16 else 32 if wide else 64,
        "block_n": 32 if wide else 64,
        "num_warps": 8,
        "num_stages": 1 if wide else 2,
    }
    return Tile("prefill_attention", "triton", tuple(parameters.items()))


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
