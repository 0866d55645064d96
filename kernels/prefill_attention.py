"""Causal attention of any number of new tokens per sequence over a paged KV cache (prefill, chunked prefill, mixed
steps).

For query token i of sequence s, whose context held context_len[s] tokens before this step, and query head h:

    out[i, h] = softmax(scale * q[i, h] @ K[0 .. context_len[s] + i, h // g].T) @ V[0 .. context_len[s] + i, h // g]

with g = heads / kv_heads. The K and V of the new tokens already lie in the cache. Paging: Kwon et al.,
arXiv:2309.06180; blocks of scores with a running maximum and sum: Dao et al., arXiv:2205.14135.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import placement
from .cpu.build import load
from .cpu.workspace import WORKSPACE
from .paged_cache import PagedCache
from .tiles import BadTile, Tile

FLOAT_DTYPES = (torch.float32, torch.bfloat16)
GPU_FLOAT_DTYPES = (*FLOAT_DTYPES, torch.float16)


def reference(
    q: Tensor,
    cache: PagedCache,
    block_tables: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    scale: float,
) -> Tensor:
    """Dense, in float64: the oracle. Arguments as in `prefill_attention`."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    kv_head_of = torch.arange(q.shape[1]) // (q.shape[1] // cache.kv_heads)
    for sequence in range(len(context_len)):
        first, last = int(query_start[sequence]), int(query_start[sequence + 1])
        length = int(context_len[sequence]) + last - first
        k, v = (part.double()[:, kv_head_of].transpose(0, 1) for part in cache.read(block_tables[sequence], length))
        scores = scale * (q[first:last].double().transpose(0, 1) @ k.transpose(1, 2))
        ahead = torch.arange(length) > torch.arange(length - (last - first), length)[:, None]
        weights = torch.softmax(scores.masked_fill(ahead, -torch.inf), dim=2)
        out[first:last] = (weights @ v).transpose(0, 1)
    return out


def prefill_attention(
    q: Tensor,
    cache: PagedCache,
    block_tables: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    scale: float,
    tile: Tile | None = None,
    *,
    max_query_rows: int | None = None,
) -> Tensor:
    """Attention of the new tokens of every sequence of a step; sequences with one new token are decoded on the way.

    Args:
        q: (T, heads, head_dim) fp32 or bf16; tokens may be strided, heads and dims not.
        cache: one layer's blocks, in any format.
        block_tables: (S, max_blocks) int32, block ids in order of the context; entries past the last block are not
        read. query_start: (S + 1,) int32, rows query_start[s] .. query_start[s + 1] - 1 of q belong to sequence s.
        context_len: (S,) int32, tokens in the cache BEFORE this step.
        scale: usually head_dim ** -0.5.
        tile: left out: C++, or torch where there is no compiler; on a GPU Triton.
        max_query_rows: most new tokens of a sequence, asked for on a GPU alone; left out: T.
    Returns: (T, heads, head_dim), dtype of q, accumulated in fp32; within 1e-5 (fp32 cache) or 1e-2 (other
    formats: queries, weights and scaled int8 are rounded to bf16 where the CPU has bf16 dot products) of reference()
    for N(0, 1) inputs.
    Raises ValueError: shapes or dtypes that do not fit together.
    """
    check_shapes(q, cache, block_tables, context_len)
    sequences = context_len.shape[0]
    if query_start.shape != (sequences + 1,) or query_start.dtype != torch.int32:
        raise ValueError(f"query_start is {tuple(query_start.shape)} {query_start.dtype}, not ({sequences + 1},) int32")
    if placement.on_gpu(q):
        from . import triton_prefill_attention

        most = q.shape[0] if max_query_rows is None else max_query_rows
        return triton_prefill_attention.prefill_attention(
            q, cache, block_tables, query_start, context_len, scale, tile, most
        )
    library = load()
    if tile is None:
        tile = Tile("prefill_attention", "torch") if library is None else _DEFAULT
    if tile.backend == "torch":
        return torch_attention(q, cache, block_tables, query_start, context_len, scale)
    if tile.backend != "cpp" or library is None:
        raise BadTile("prefill_attention: backend", tile.backend, "what this machine has", "run `paretune doctor`")
    tokens, heads, head_dim = q.shape
    if q.stride(2) != 1 or q.stride(1) != head_dim:
        q = q.contiguous()
    out = q.new_empty((tokens, heads, head_dim))
    arguments = (
        q.data_ptr(), q.stride(0), q.dtype is torch.bfloat16,
        cache.blocks.data_ptr(), cache.code, cache.block_size,
        block_tables.data_ptr(), block_tables.stride(0), query_start.data_ptr(), context_len.data_ptr(), sequences,
        heads, cache.kv_heads, head_dim, scale, out.data_ptr(), *tile.arguments,
    )  # fmt: skip
    threads = torch.get_num_threads()
    needed = library.prefill_attention(*arguments, WORKSPACE.address, WORKSPACE.nbytes, threads)
    if needed > 0:
        WORKSPACE.grow(needed)
        library.prefill_attention(*arguments, WORKSPACE.address, WORKSPACE.nbytes, threads)
    return out


_DEFAULT = Tile("prefill_attention", "cpp")


def check_shapes(q: Tensor, cache: PagedCache, block_tables: Tensor, context_len: Tensor) -> None:
    dtypes = GPU_FLOAT_DTYPES if placement.on_gpu(q) else FLOAT_DTYPES
    if q.ndim != 3 or q.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"q is {tuple(q.shape)} {q.dtype}, not (tokens, heads, head_dim) {allowed}")
    if cache.head_dim != q.shape[2] or q.shape[1] % cache.kv_heads:
        raise ValueError(
            f"q {tuple(q.shape)} does not fit a cache of {cache.kv_heads} KV heads of {cache.head_dim} numbers"
        )
    sequences = context_len.shape[0]
    if block_tables.dtype != torch.int32 or block_tables.ndim != 2 or block_tables.shape[0] != sequences:
        raise ValueError(
            f"block_tables is {tuple(block_tables.shape)} {block_tables.dtype}, not ({sequences}, n) int32"
        )
    if context_len.dtype != torch.int32 or block_tables.stride(1) != 1:
        raise ValueError("context_len must be int32, and the rows of block_tables contiguous")


def torch_attention(
    q: Tensor,
    cache: PagedCache,
    block_tables: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    scale: float,
) -> Tensor:
    heads, head_dim = q.shape[1:]
    kv_heads = cache.kv_heads
    out = q.new_empty((q.shape[0], heads, head_dim))
    starts, contexts = query_start.tolist(), context_len.tolist()
    for sequence, context in enumerate(contexts):
        first, last = starts[sequence], starts[sequence + 1]
        rows = last - first
        if rows == 0:
            continue
        length = context + rows
        k, v = cache.read(block_tables[sequence], length)
        grouped = q[first:last].float().reshape(rows, kv_heads, heads // kv_heads, head_dim)
        scores = torch.einsum("rkgd,tkd->kgrt", grouped, k) * scale
        if rows > 1:
            ahead = torch.arange(length) > (context + torch.arange(rows))[:, None]
            scores.masked_fill_(ahead, float("-inf"))
        mixed = torch.einsum("kgrt,tkd->rkgd", torch.softmax(scores, dim=-1), v)
        out[first:last] = mixed.reshape(rows, heads, head_dim).to(q.dtype)
    return out
