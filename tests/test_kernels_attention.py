"""Paged attention against float64: ratios of heads, empty and long contexts, scattered blocks, poisoned memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from paretune.kernels import Tile
from paretune.kernels import decode_attention as decode
from paretune.kernels import prefill_attention as prefill
from paretune.kernels.cpu.build import load
from paretune.kernels.paged_cache import CACHE_DTYPES, PagedCache

BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(load() is None, reason="no C++ compiler"))]
# Of the arithmetic alone: the oracle reads the same rounded cache. Where the CPU has dot products of bf16 pairs,
# queries and weights are rounded to bf16: in prefill but for fp32 caches, in decode for bf16 caches.
PREFILL_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp8": 2e-2, "int8": 2e-2}
DECODE_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp8": 1e-5, "int8": 1e-5}


def paged(lengths, *, kv_heads, head_dim, block_size, dtype, seed=0):
    """A cache in which every number that no sequence owns is NaN (int8: its scale), with blocks in random order."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(blocks) + 3, generator=generator).int()
    tables = torch.full((len(lengths), max(*blocks, 1) + 2), 1 << 30, dtype=torch.int32)
    cache = PagedCache.zeros(len(order), dtype, block_size, kv_heads, head_dim)
    everywhere = torch.arange(len(order) * block_size)
    nothing = torch.full((len(everywhere), kv_heads, head_dim), float("nan"))
    cache.write(everywhere, nothing, nothing)
    taken = 0
    for sequence, length in enumerate(lengths):
        tables[sequence, : blocks[sequence]] = order[taken : taken + blocks[sequence]]
        taken += blocks[sequence]
        position = torch.arange(length)
        slots = tables[sequence].long()[position // block_size] * block_size + position % block_size
        cache.write(slots, *torch.randn(2, length, kv_heads, head_dim, generator=generator))
    return cache, tables


def poison_results():
    """Freed memory full of NaN, so that an entry nobody wrote shows."""
    del_me = [torch.full((size,), float("nan")) for size in (64, 512, 4096, 32768, 200000)]
    del del_me


def worst(result, oracle):
    return float(torch.nan_to_num((result.double() - oracle).abs(), nan=float("inf")).max())


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 4, 32), (8, 2, 64), (8, 1, 16), (3, 1, 24), (14, 2, 40), (4, 2, 128), (5, 5, 7)],
)
def test_decoding_is_softmax_attention(backend, dtype, heads, kv_heads, head_dim):
    lengths = [1, 17, 0, 130, 64]
    cache, tables = paged(lengths, kv_heads=kv_heads, head_dim=head_dim, block_size=16, dtype=dtype)
    q, context = torch.randn(len(lengths), heads, head_dim), torch.tensor(lengths, dtype=torch.int32)
    poison_results()
    out = decode.decode_attention(q, cache, tables, context, head_dim**-0.5, Tile("decode_attention", backend))
    assert worst(out, decode.reference(q, cache, tables, context, head_dim**-0.5)) < DECODE_TOLERANCE[dtype]
    assert torch.equal(out[2], torch.zeros(heads, head_dim))


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 4, 32), (8, 2, 64), (8, 1, 16), (3, 1, 24), (14, 2, 40), (4, 2, 128), (5, 5, 7)],
)
def test_prefill_is_causal_softmax_attention(backend, dtype, heads, kv_heads, head_dim):
    rows, contexts = [5, 1, 70, 1, 0, 33], [0, 0, 0, 90, 0, 50]
    lengths = [r + c for r, c in zip(rows, contexts)]
    cache, tables = paged(lengths, kv_heads=kv_heads, head_dim=head_dim, block_size=16, dtype=dtype)
    q = torch.randn(sum(rows), heads, head_dim)
    starts = torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)
    context = torch.tensor(contexts, dtype=torch.int32)
    poison_results()
    out = prefill.prefill_attention(
        q, cache, tables, starts, context, head_dim**-0.5, Tile("prefill_attention", backend)
    )
    oracle = prefill.reference(q, cache, tables, starts, context, head_dim**-0.5)
    assert worst(out, oracle) < PREFILL_TOLERANCE[dtype]


@settings(max_examples=25, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 100)), min_size=1, max_size=4),
    block_size=st.sampled_from([1, 3, 16]), query_rows=st.sampled_from([0, 1, 7, 32]), group=st.sampled_from([1, 3, 4]),
)  # fmt: skip
@pytest.mark.skipif(load() is None, reason="no C++ compiler")
def test_no_cut_into_chunks_changes_prefill(sequences, block_size, query_rows, group):
    rows, contexts = [r for r, _ in sequences], [c for _, c in sequences]
    lengths = [r + c for r, c in sequences]
    cache, tables = paged(lengths, kv_heads=2, head_dim=16, block_size=block_size, dtype="fp32")
    q = torch.randn(sum(rows), 2 * group, 16)
    starts = torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)
    context = torch.tensor(contexts, dtype=torch.int32)
    tile = Tile("prefill_attention", "cpp", (("query_rows", query_rows), ("serial_below_kmacs", 0)))
    out = prefill.prefill_attention(q, cache, tables, starts, context, 0.25, tile)
    assert q.shape[0] == 0 or worst(out, prefill.reference(q, cache, tables, starts, context, 0.25)) < 1e-5


@pytest.mark.skipif(load() is None, reason="no C++ compiler")
@pytest.mark.parametrize("split_tokens", [16, 100, 65536])
def test_no_split_of_the_context_changes_decoding(split_tokens):
    lengths = [1000, 3, 0, 513]
    cache, tables = paged(lengths, kv_heads=2, head_dim=16, block_size=8, dtype="fp32")
    q, context = 3 * torch.randn(4, 8, 16), torch.tensor(lengths, dtype=torch.int32)
    tile = Tile("decode_attention", "cpp", (("split_tokens", split_tokens), ("serial_below_tokens", 0)))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        out = decode.decode_attention(q, cache, tables, context, 0.25, tile)
    finally:
        torch.set_num_threads(threads)
    assert worst(out, decode.reference(q, cache, tables, context, 0.25)) < 1e-5


def test_torch_scaled_dot_product_attention_agrees(backend):
    """Another hand's attention, dense."""
    length, heads, head_dim = 50, 4, 32
    cache, tables = paged([length], kv_heads=heads, head_dim=head_dim, block_size=length, dtype="fp32")
    q = torch.randn(length, heads, head_dim)
    starts, context = torch.tensor([0, length], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    out = prefill.prefill_attention(
        q, cache, tables, starts, context, head_dim**-0.5, Tile("prefill_attention", backend)
    )
    block = int(tables[0, 0])
    dense = functional.scaled_dot_product_attention(
        q.transpose(0, 1), cache.keys[block], cache.values[block], is_causal=True
    )
    torch.testing.assert_close(out, dense.transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_strided_bf16_queries_are_read_where_they_lie(backend):
    lengths = [20, 9]
    cache, tables = paged(lengths, kv_heads=2, head_dim=16, block_size=4, dtype="bf16")
    qkv = torch.randn(29, (4 + 2 + 2) * 16).bfloat16()
    q = qkv[:, : 4 * 16].view(29, 4, 16)
    starts, context = torch.tensor([0, 20, 29], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    out = prefill.prefill_attention(q, cache, tables, starts, context, 0.25, Tile("prefill_attention", backend))
    assert out.dtype is torch.bfloat16
    assert worst(out, prefill.reference(q, cache, tables, starts, context, 0.25)) < 3e-2
    last = torch.tensor(lengths, dtype=torch.int32)
    out = decode.decode_attention(q[[19, 28]], cache, tables, last, 0.25, Tile("decode_attention", backend))
    assert worst(out, decode.reference(q[[19, 28]], cache, tables, last, 0.25)) < 3e-2


def test_scores_too_large_for_exp_do_not_overflow(backend):
    cache, tables = paged([40], kv_heads=1, head_dim=16, block_size=8, dtype="fp32")
    q, context = 1000 * torch.randn(1, 2, 16), torch.tensor([40], dtype=torch.int32)
    out = decode.decode_attention(q, cache, tables, context, 1.0, Tile("decode_attention", backend))
    assert worst(out, decode.reference(q, cache, tables, context, 1.0)) < 1e-3


def good_arguments():
    cache, tables = paged([4, 4], kv_heads=2, head_dim=8, block_size=4, dtype="fp32")
    return {"q": torch.randn(2, 4, 8), "cache": cache, "block_tables": tables,
            "context_len": torch.tensor([4, 4], dtype=torch.int32), "scale": 1.0}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.randn(2, 3, 8)},
        {"q": torch.randn(2, 4, 16)},
        {"q": torch.randn(2, 4, 8).double()},
        {"q": torch.randn(3, 4, 8)},
        {"context_len": torch.tensor([4, 4])},
        {"context_len": torch.tensor([4], dtype=torch.int32)},
        {"block_tables": torch.zeros(2, 2)},
        {"cache": PagedCache.zeros(3, "fp32", 4, 3, 8)},
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(change):
    assert decode.decode_attention(**good_arguments()).shape == (2, 4, 8)
    with pytest.raises(ValueError, match=r"."):
        decode.decode_attention(**good_arguments() | change)
