"""The KV cache's formats: bytes, what is rounded and by how much, and that a block is one thing to copy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paretune.kernels.paged_cache import CACHE_DTYPES, PagedCache, block_bytes
from paretune.kernels.tiles import CACHE_PRECISIONS
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.runnable import KV_CACHE_DTYPES
from paretune.runtime.small_model import MODEL_DIR

# The largest error of one number, relative to itself, or for int8 to the largest of its token's head (half a step).
ROUNDING = {"fp32": 0.0, "bf16": 2**-8, "fp8": 2**-4, "int8": 0.5 / 127}


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@given(
    block_size=st.sampled_from([1, 3, 16]), kv_heads=st.integers(1, 3), head_dim=st.sampled_from([2, 16, 30]),
    seed=st.integers(0, 99), size=st.sampled_from([1e-3, 1.0, 30.0]),
)  # fmt: skip
def test_what_is_written_is_read_back_rounded(dtype, block_size, kv_heads, head_dim, seed, size):
    generator = torch.Generator().manual_seed(seed)
    cache = PagedCache.zeros(5, dtype, block_size, kv_heads, head_dim)
    slots = torch.randperm(5 * block_size, generator=generator)[: 2 * block_size]
    k, v = size * torch.randn(2, len(slots), kv_heads, head_dim, generator=generator)
    cache.write(slots, k, v)
    for found, x in zip(cache.read(torch.arange(5), 5 * block_size), (k, v)):
        scale = x.abs().amax(dim=-1, keepdim=True) if dtype == "int8" else x.abs()
        least = 2**-10 if dtype == "fp8" else 0  # half of the smallest fp8 number
        assert ((found[slots] - x).abs() <= 1.0001 * ROUNDING[dtype] * scale + least).all()


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_a_copied_block_is_the_block_with_its_scales(dtype):
    cache = PagedCache.zeros(3, dtype, 4, 2, 8)
    cache.write(torch.arange(4), *torch.randn(2, 4, 2, 8))
    before = cache.read(torch.tensor([0]), 4)
    assert all(part.std() > 0.5 for part in before)
    elsewhere = cache.blocks[0].clone()
    cache.blocks[0].zero_()
    cache.blocks[2].copy_(elsewhere)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.read(torch.tensor([2]), 4)))


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_the_model_shape_knows_the_bytes_without_torch(dtype):
    shape = ModelShape.load(MODEL_DIR)
    of_blocks = shape.num_layers * block_bytes(dtype, 16, shape.num_kv_heads, shape.head_dim)
    assert 16 * shape.kv_bytes_per_token(dtype) == of_blocks


def test_specs_and_tiles_name_the_formats_that_there_are():
    assert CACHE_DTYPES == CACHE_PRECISIONS == KV_CACHE_DTYPES


def test_fp8_saturates_and_nan_comes_through():
    x = torch.tensor([1e9, -1e9, float("inf"), 449.0]).view(1, 1, 4)
    cache = PagedCache.zeros(1, "fp8", 1, 1, 4)
    cache.write(torch.tensor([0]), x, x * float("nan"))
    keys, values = cache.read(torch.tensor([0]), 1)
    assert keys.flatten().tolist() == [448, -448, 448, 448]
    assert values.isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_spoils_its_int8_head_and_no_other(bad):
    x = torch.ones(1, 2, 4)
    x[0, 1, 2] = bad
    cache = PagedCache.zeros(1, "int8", 1, 2, 4)
    cache.write(torch.tensor([0]), x, x)
    for part in cache.read(torch.tensor([0]), 1):
        assert torch.equal(part[0, 0], torch.ones(4))
        assert part[0, 1].isnan().all()


def test_heads_of_zeros_are_zeros_in_every_format():
    for dtype in CACHE_DTYPES:
        cache = PagedCache.zeros(1, dtype, 1, 1, 4)
        cache.blocks.fill_(0xFF)
        cache.write(torch.tensor([0]), *torch.zeros(2, 1, 1, 4))
        assert all((part == 0).all() for part in cache.read(torch.tensor([0]), 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "fp16"}, "not one of"),
        ({"block_size": 8}, "uint8"),
        ({"blocks": torch.zeros(2, 160, dtype=torch.int8)}, "uint8"),
        ({"blocks": torch.zeros(2, 66, dtype=torch.uint8), "block_size": 1, "kv_heads": 3, "head_dim": 7}, "even head"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(change, message):
    good = {"blocks": torch.zeros(2, 160, dtype=torch.uint8), "dtype": "int8", "block_size": 4, "kv_heads": 1,
            "head_dim": 16}  # fmt: skip
    PagedCache(**good)
    with pytest.raises(ValueError, match=message):
        PagedCache(**good | change)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_tokens_as_they_are_stored_can_be_put_into_another_cache(dtype):
    here, there = (PagedCache.zeros(3, dtype, 4, 2, 6) for _ in range(2))
    slots = torch.tensor([9, 1, 6])
    here.write(slots, *torch.randn(2, 3, 2, 6))
    rows = here.stored(slots)
    assert rows.shape == (3, block_bytes(dtype, 1, 2, 6))
    there.put_stored(slots, rows)
    assert torch.equal(here.blocks, there.blocks)
