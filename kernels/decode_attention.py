"""Attention of one new token per sequence over its paged KV cache.

    out[s, h] = softmax(scale * q[s, h] @ K[s, :, h // g].T) @ V[s, :, h // g],   g = heads / kv_heads

Long contexts are cut into parts that threads take as they come free, merged by running maximum and sum (Milakov and
Gimelshein, arXiv:1805.02867). K and V are read once per KV head for its whole group of query heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import placement
from . import prefill_attention as general
from .cpu.build import load
from .cpu.workspace import WORKSPACE
from .paged_cache import PagedCache
from .tiles import BadTile, Tile


def reference(q: Tensor, cache: PagedCache, block_tables: Tensor, context_len: Tensor, scale: float) -> Tensor:
    """In float64: the oracle. Arguments as in `decode_attention`."""
    filled = context_len > 0
    starts = torch.arange(int(filled.sum()) + 1)
    out = torch.zeros(q.shape, dtype=torch.float64)
    out[filled] = general.reference(q[filled], cache, block_tables[filled], starts, context_len[filled] - 1, scale)
    return out


def decode_attention(
    q: Tensor,
    cache: PagedCache,
    block_tables: Tensor,
    context_len: Tensor,
    scale: float,
    tile: Tile | None = None,
) -> Tensor:
    """One query token per sequence.

    Args:
        q: (S, heads, head_dim) fp32 or bf16; sequences may be strided, heads and dims not.
        cache: one layer's blocks, in any format.
        block_tables: (S, max_blocks) int32, block ids in order of the context; entries past the last block are not
        read. context_len: (S,) int32, tokens in the cache WITH the new one; 0 gives a row of zeros.
        scale: usually head_dim ** -0.5.
        tile: left out: C++, or torch where there is no compiler; on a GPU Triton.
    Returns: (S, heads, head_dim), dtype of q; within 1e-5 of reference() for N(0, 1) q and cache, computed in fp32:
        what the cache's format rounds is rounded when tokens are written, not here. But for a bf16 cache where the
        processor has bf16 dot products: queries and attention weights are rounded to bf16 for them, within 2e-2.
    Raises ValueError: shapes or dtypes that do not fit together.
    Cost: bandwidth-bound; reads sum(context_len) / block_size * block_bytes bytes of cache.
    """
    general.check_shapes(q, cache, block_tables, context_len)
    sequences, heads, head_dim = q.shape
    if sequences != context_len.shape[0]:
        raise ValueError(f"{sequences} rows of q for {context_len.shape[0]} sequences; decoding takes one row each")
    if placement.on_gpu(q):
        from . import triton_decode_attention

        return triton_decode_attention.decode_attention(q, cache, block_tables, context_len, scale, tile)
    library = load()
    if tile is None:
        tile = Tile("decode_attention", "torch") if library is None else _DEFAULT
    if tile.backend == "torch":
        return _torch(q, cache, block_tables, context_len, scale)
    if tile.backend != "cpp" or library is None:
        raise BadTile("decode_attention: backend", tile.backend, "what this machine has", "run `paretune doctor`")
    if q.stride(2) != 1 or q.stride(1) != head_dim:
        q = q.contiguous()
    out = q.new_empty((sequences, heads, head_dim))
    arguments = (
        q.data_ptr(), q.stride(0), q.dtype is torch.bfloat16,
        cache.blocks.data_ptr(), cache.code, cache.block_size,
        block_tables.data_ptr(), block_tables.stride(0), context_len.data_ptr(), sequences,
        heads, cache.kv_heads, head_dim, scale, out.data_ptr(), *tile.arguments,
    )  # fmt: skip
    threads = torch.get_num_threads()
    needed = library.decode_attention(*arguments, WORKSPACE.address, WORKSPACE.nbytes, threads)
    if needed > 0:
        WORKSPACE.grow(needed)
        library.decode_attention(*arguments, WORKSPACE.address, WORKSPACE.nbytes, threads)
    return out


_DEFAULT = Tile("decode_attention", "cpp")


def _torch(q: Tensor, cache: PagedCache, block_tables: Tensor, context_len: Tensor, scale: float) -> Tensor:
    filled = context_len > 0
    starts = torch.arange(int(filled.sum()) + 1, dtype=torch.int32)
    out = torch.zeros(q.shape, dtype=q.dtype)
    out[filled] = general.torch_attention(
        q[filled], cache, block_tables[filled], starts, context_len[filled] - 1, scale
    )
    return out
