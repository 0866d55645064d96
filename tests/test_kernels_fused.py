"""Normalization, rotary embedding with the KV write, and the gated activation against float64."""

import pytest
import torch

from paretune.kernels import fused
from paretune.kernels.cpu.build import load
from paretune.kernels.paged_cache import CACHE_DTYPES, PagedCache

BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(load() is None, reason="no C++ compiler"))]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = [(1, 1), (1, 17), (3, 256), (127, 33), (40, 1024)]


def close(result, oracle):
    tolerance = TOLERANCE[result.dtype]
    torch.testing.assert_close(result.double(), oracle, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_its_formula(backend, dtype, shape):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[1])
    out = fused.rms_norm(x, weight, 1e-5, backend=backend)
    assert out.dtype is dtype
    close(out, fused.reference_rms_norm(x, weight, 1e-5))


def test_rms_norm_agrees_with_torch(backend):
    x, weight = torch.randn(5, 100), torch.randn(100)
    torch.testing.assert_close(
        fused.rms_norm(x, weight, 1e-6, backend=backend), torch.rms_norm(x, (100,), weight, 1e-6)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_residual_takes_the_sum_and_its_norm_is_returned(backend, dtype, shape):
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1])
    total = residual.double() + x.double()
    out = fused.add_rms_norm(x, residual, weight, 1e-5, backend=backend)
    close(residual, total)
    close(out, fused.reference_rms_norm(residual, weight, 1e-5))


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_is_its_formula_also_far_out(backend, dtype, shape):
    gate_up = (20 * torch.randn(shape[0], 2 * shape[1])).to(dtype)
    gate_up[0, 0] = -200.0
    out = fused.swiglu(gate_up, backend=backend)
    oracle = fused.reference_swiglu(gate_up)
    torch.testing.assert_close(out.double(), oracle, rtol=TOLERANCE[dtype], atol=1e-4)


# The largest error of one number, relative to itself and, int8, to the largest of its head (half a step of 127).
ROUNDING = {"fp32": 0.0, "bf16": 2**-8, "fp8": 2**-4, "int8": 0.5 / 127}


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("head_dim", [2, 16, 34, 64, 72])
def test_rotated_keys_and_values_land_in_their_slots_and_nowhere_else(backend, dtype, cache_dtype, head_dim):
    tokens, heads, kv_heads, block_size = 7, 6, 2, 4
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    before = qkv.clone()
    q, k, v = (
        part.view(tokens, -1, head_dim) for part in qkv.split([heads * head_dim, *[kv_heads * head_dim] * 2], dim=1)
    )
    angle = torch.outer(torch.arange(100.0), 10000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2)))
    cos, sin = angle.cos(), angle.sin()
    positions, slots = torch.tensor([0, 1, 99, 5, 5, 6, 7]), torch.tensor([11, 0, 3, -1, 19, 8, 9])
    cache = PagedCache.zeros(5, cache_dtype, block_size, kv_heads, head_dim)
    cache.blocks.fill_(0xA5)
    old_q, old_k = q.clone(), k.clone()
    fused.rope_and_cache(q, k, v, positions, cos, sin, cache, slots, backend=backend)
    close(q, fused.reference_rope(old_q, positions, cos, sin))
    assert torch.equal(qkv[:, heads * head_dim :], before[:, heads * head_dim :])
    kept = slots >= 0
    written = cache.read(torch.arange(5), 5 * block_size)
    for found, oracle in zip(written, (fused.reference_rope(old_k, positions, cos, sin), v.double())):
        oracle = oracle[kept]
        size = oracle.abs().amax(dim=-1, keepdim=True) if cache_dtype == "int8" else oracle.abs()
        allowed = ROUNDING[cache_dtype] * size + (2**-10 if cache_dtype == "fp8" else 0) + 1e-5
        assert ((found[slots[kept]].double() - oracle).abs() <= allowed).all()
    fresh = PagedCache.zeros(5, cache_dtype, block_size, kv_heads, head_dim)
    fresh.blocks.fill_(0xA5)
    for part, scales in (("keys", "key_scales"), ("values", "value_scales")):
        for name in (part, scales)[: 2 if cache_dtype == "int8" else 1]:
            for slot in set(range(20)) - set(slots[kept].tolist()):
                at = (slice(slot // block_size, slot // block_size + 1), slice(None), slot % block_size)
                ours, untouched = getattr(cache, name)[at], getattr(fresh, name)[at]
                assert ours.contiguous().view(torch.uint8).equal(untouched.contiguous().view(torch.uint8))


def test_a_rotation_keeps_lengths_and_position_zero_changes_nothing(backend):
    q = torch.randn(2, 1, 32)
    before = q.clone()
    angle = torch.outer(torch.arange(10.0), torch.rand(16))
    cache = PagedCache.zeros(1, "fp32", 2, 1, 32)
    fused.rope_and_cache(q, q.clone(), q.clone(), torch.tensor([0, 7]), angle.cos(), angle.sin(), cache,
                         torch.tensor([0, 1]), backend=backend)  # fmt: skip
    torch.testing.assert_close(q.norm(dim=-1), before.norm(dim=-1))
    assert torch.equal(q[0], before[0])
    assert not torch.allclose(q[1], before[1])


def test_nan_comes_through(backend):
    x = torch.ones(1, 40)
    x[0, 3] = float("nan")
    assert fused.rms_norm(x, torch.ones(40), 1e-5, backend=backend).isnan().all()
    assert fused.swiglu(x, backend=backend).isnan().sum() == 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="weight is"):
        fused.rms_norm(torch.zeros(2, 4), torch.zeros(5), 1e-5)
    with pytest.raises(ValueError, match="weight is"):
        fused.rms_norm(torch.zeros(2, 4), torch.zeros(4).bfloat16(), 1e-5)
    with pytest.raises(ValueError, match="residual is"):
        fused.add_rms_norm(torch.zeros(2, 4), torch.zeros(2, 4).bfloat16(), torch.zeros(4), 1e-5)
    with pytest.raises(ValueError, match="odd"):
        fused.swiglu(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="backend"):
        fused.rms_norm(torch.zeros(2, 4), torch.zeros(4), 1e-5, backend="cuda")
