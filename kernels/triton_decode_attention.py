# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Paged decode attention on a GPU: the Triton kernels of `decode_attention.py`, their launcher and tiles.

Same formula and reference as kernels/decode_attention.py. The query heads of one KV head are the rows of one tile, so
that K and V are read once; the context is cut into `splits` parts, merged by a second kernel. Import it only where it
runs."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import placement
from .paged_cache import PagedCache
from .tiles import BadTile, Tile
from .triton_formats import e4m3_value

_MOST_SPLITS = 64
_PROGRAMS = 4  # on each multiprocessor
LOG2_E = 1.4426950408889634  # exponentials are powers of two here: the scale of the scores has this factor


@triton.jit
def cached_numbers(ptrs, mask, FORMAT: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    """Keys or values as stored, without their scales; e4m3 as fp32."""
    stored = tl.load(ptrs, mask=mask, other=0)
    if FORMAT == 1:
        stored = e4m3_value(stored, NATIVE_E4M3)
    return stored


@triton.jit(do_not_specialize=["table_stride"])  # changes from step to step: one kernel for all
def decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, tables_ptr, context_ptr, mixed_ptr, largest_ptr, total_ptr, scale,
    q_stride, table_stride, block_stride, head_stride, scale_block_stride, kv_heads, BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, FORMAT: tl.constexpr, NATIVE_E4M3: tl.constexpr,
):  # fmt: skip
    # The grid hangs on the number of sequences alone, not on how long they are: so a CUDA graph can hold it.
    # With one split mixed_ptr is that of the result.
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(context_ptr + sequence)
    part = tl.cdiv(tl.cdiv(context, SPLITS), BLOCK_N) * BLOCK_N
    begin = split * part
    end = min(begin + part, context)
    g, dim = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_DIM)
    head = kv_head * GROUP + g
    real = (g[:, None] < GROUP) & (dim[None, :] < HEAD_DIM)
    q_ptrs = q_ptr + sequence.to(tl.int64) * q_stride + head[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(q_ptrs, mask=real, other=0.0)
    largest = tl.full((PADDED_GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((PADDED_GROUP,), tl.float32)
    mixed = tl.zeros((PADDED_GROUP, PADDED_DIM), tl.float32)
    for start in range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        there = position < end
        block = tl.load(tables_ptr + sequence * table_stride + position // BLOCK_SIZE, mask=there, other=0)
        slot = block.to(tl.int64) * block_stride + position % BLOCK_SIZE * HEAD_DIM
        offset = slot + kv_head * head_stride
        have = there[:, None] & (dim[None, :] < HEAD_DIM)
        k = cached_numbers(k_ptr + offset[:, None] + dim[None, :], have, FORMAT, NATIVE_E4M3)
        v = cached_numbers(v_ptr + offset[:, None] + dim[None, :], have, FORMAT, NATIVE_E4M3)
        scores = tl.dot(q, tl.trans(k).to(q.dtype), input_precision="ieee") * scale
        if FORMAT == 2:
            scale_place = block.to(tl.int64) * scale_block_stride + kv_head * 2 * BLOCK_SIZE + position % BLOCK_SIZE
            scores *= tl.load(k_scale_ptr + scale_place, mask=there, other=0.0)[None, :]
        scores = tl.where(there[None, :], scores, float("-inf"))
        peak = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - peak[:, None])
        down = tl.exp2(largest - peak)
        total = total * down + tl.sum(weights, 1)
        if FORMAT == 2:
            weights *= tl.load(v_scale_ptr + scale_place, mask=there, other=0.0)[None, :]
        mixed = mixed * down[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        largest = peak
    row = (sequence * kv_heads * GROUP + head) * SPLITS + split
    if SPLITS == 1:
        mixed = tl.where(total[:, None] > 0, mixed / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    else:
        tl.store(largest_ptr + row, largest, mask=g < GROUP)
        tl.store(total_ptr + row, total, mask=g < GROUP)
    mixed_ptrs = mixed_ptr + row[:, None].to(tl.int64) * HEAD_DIM + dim[None, :]
    tl.store(mixed_ptrs, mixed.to(mixed_ptr.dtype.element_ty), mask=real)


@triton.jit
def merge_kernel(
    mixed_ptr, largest_ptr, total_ptr, out_ptr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, SPLITS: tl.constexpr
):
    row, split, dim = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, PADDED_DIM)
    inside = dim < HEAD_DIM
    largest = tl.load(largest_ptr + row * SPLITS + split)
    total = tl.load(total_ptr + row * SPLITS + split)
    peak = tl.max(largest, 0)
    weight = tl.where(total > 0, tl.exp2(largest - peak), 0.0)
    offset = (row * SPLITS + split)[:, None].to(tl.int64) * HEAD_DIM + dim[None, :]
    mixed = tl.sum(tl.load(mixed_ptr + offset, mask=inside[None, :], other=0.0) * weight[:, None], 0)
    whole = tl.sum(total * weight, 0)
    out = tl.where(whole > 0, mixed / tl.where(whole > 0, whole, 1.0), 0.0)
    tl.store(out_ptr + row.to(tl.int64) * HEAD_DIM + dim, out.to(out_ptr.dtype.element_ty), mask=inside)


def decode_attention(
    q: Tensor,
    cache: PagedCache,
    block_tables: Tensor,
    context_len: Tensor,
    scale: float,
    tile: Tile | None = None,
) -> Tensor:
    """As kernels/decode_attention.py, for tensors on a GPU (or on the CPU under TRITON_INTERPRET=1); also fp16.

    Args:
        tile: left out: `default_tile`.
    Raises BadTile: the tile belongs to another operator or backend.
    """
    if tile is None:
        wide = q.shape[2] * q.itemsize > 256
        converted = cache.gpu_planes.format == 1 and placement.converts_e4m3(q.device)
        tile = default_tile(q.shape[0] * cache.kv_heads, placement.multiprocessors(q.device), wide, converted)
    if (tile.operator, tile.backend) != ("decode_attention", "triton"):
        found = f"{tile.operator} on {tile.backend}"
        raise BadTile("decode_attention: tile", found, "decode_attention on triton", "look it up again")
    sequences, heads, head_dim = q.shape
    planes = cache.gpu_planes
    kv_heads = cache.kv_heads
    block_n, splits, num_warps, num_stages = tile.arguments
    group, padded_dim = heads // kv_heads, max(16, triton.next_power_of_2(head_dim))
    out = torch.empty((sequences, heads, head_dim), dtype=q.dtype, device=q.device)
    mixed = largest = total = out
    if splits > 1:
        mixed = torch.empty((sequences, heads, splits, head_dim), dtype=torch.float32, device=q.device)
        largest = torch.empty((sequences, heads, splits), dtype=torch.float32, device=q.device)
        total = torch.empty_like(largest)
    if not sequences:
        return out
    decode_attention_kernel[(sequences, kv_heads, splits)](
        q, planes.keys, planes.values, planes.key_scales, planes.value_scales, block_tables, context_len, mixed,
        largest, total, scale * LOG2_E, q.stride(0), block_tables.stride(0), *planes.keys.stride()[:2],
        planes.key_scales.stride(0), kv_heads, cache.block_size, group, max(16, triton.next_power_of_2(group)),
        head_dim, padded_dim, splits, block_n, planes.format, placement.converts_e4m3(q.device), num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(sequences * heads,)](mixed, largest, total, out, head_dim, padded_dim, splits)
    return out


def default_tile(pairs: int, multiprocessors: int, wide: bool, converted: bool = False) -> Tile:
    """Parts such that each multiprocessor has about four programs.

    Args:
        pairs: sequences times KV heads.
        wide: heads of more than 256 bytes.
        converted: keys and values are fp8 that the GPU converts by an instruction: twice the tokens a step.
    On an NVIDIA H200 within 2 % of the fastest tile tried for 16 sequences of 1,024 tokens, 64 of 1,024 or 4,096, and
    one of 16,384 (bf16 and fp8 caches, 8 KV heads of 128 numbers).
    """
    wanted = _PROGRAMS * multiprocessors // max(1, pairs)
    splits = min(_MOST_SPLITS, 1 << max(0, wanted.bit_length() - 1))
    parameters = {"block_n": 16 if wide else 128 if converted else 64, "splits": splits, "num_stages": 1 if wide else 2}
    return Tile("decode_attention", "triton", tuple(parameters.items()))


def tiles(context_tokens: int, head_dim: int, shared_memory_bytes: int, itemsize: int = 2) -> list[Tile]:
    """What a search may try. Left out: parts shorter than one step, and pipelines of K and V beyond shared memory."""
    found = []
    for block_n, splits, num_warps, num_stages in itertools.product(
        (16, 32, 64, 128), (1, 2, 4, 8, 16, 32), (2, 4, 8), (1, 2, 3)
    ):
        fits = 2 * block_n * num_stages * head_dim * itemsize <= shared_memory_bytes
        if fits and (splits == 1 or splits * block_n <= context_tokens):
            parameters = {"block_n": block_n, "splits": splits, "num_warps": num_warps, "num_stages": num_stages}
            found.append(Tile("decode_attention", "triton", tuple(parameters.items())))
    return found
