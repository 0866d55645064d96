# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Between the matrix products, on a GPU: the Triton kernels of `fused.py` and their launchers. Import it only where it
runs.

Same formulas and references as kernels/fused.py; a program takes a row, and everything is computed in fp32. Numbers of
warps were not searched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import placement
from .paged_cache import PagedCache
from .triton_formats import e4m3_code, round_half_even

_MOST_WIDTH = 1 << 16
_COLUMNS = 1024  # of swiglu, by program
_FEW_TOKENS = 128  # of rope_and_cache


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, eps, width, x_stride, residual_stride, out_stride,
    ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        residual_ptrs = residual_ptr + row * residual_stride + at
        x += tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual_ptrs, x.to(residual_ptr.dtype.element_ty), mask=inside)
        x = x.to(residual_ptr.dtype.element_ty).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + row * out_stride + at, (x * inverse * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, width, gate_up_stride, out_stride, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up_ptr + row * gate_up_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * gate_up_stride + width + at, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * out_stride + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rope_and_cache_kernel(
    q_ptr, k_ptr, v_ptr, position_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr,
    slot_ptr, q_stride, k_stride, v_stride, heads, kv_heads, block_stride, head_stride, scale_block_stride,
    BLOCK_SIZE: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    FORMAT: tl.constexpr, NATIVE_E4M3: tl.constexpr,
):  # fmt: skip
    # A program takes BLOCK_HEADS heads of a token: the first ones rotate those of q, the others KV heads, and store
    # these keys and their values.
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = tl.arange(0, PADDED_HALF)
    angle = tl.load(position_ptr + token).to(tl.int64) * HALF + half
    cosine = tl.load(cos_ptr + angle, mask=half < HALF, other=0.0)[None, :]
    sine = tl.load(sin_ptr + angle, mask=half < HALF, other=0.0)[None, :]
    parts_of_q = tl.cdiv(heads, BLOCK_HEADS)
    if part < parts_of_q:
        head = part * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        inside = (head < heads)[:, None] & (half < HALF)[None, :]
        q_ptrs = q_ptr + token * q_stride + head[:, None] * (2 * HALF) + half[None, :]
        first = tl.load(q_ptrs, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(q_ptrs + HALF, mask=inside, other=0.0).to(tl.float32)
        tl.store(q_ptrs, (first * cosine - second * sine).to(q_ptr.dtype.element_ty), mask=inside)
        tl.store(q_ptrs + HALF, (second * cosine + first * sine).to(q_ptr.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slot_ptr + token).to(tl.int64)
        if slot >= 0:
            head = (part - parts_of_q) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
            inside = (head < kv_heads)[:, None] & (half < HALF)[None, :]
            at = head[:, None] * (2 * HALF) + half[None, :]
            k_ptrs, v_ptrs = k_ptr + token * k_stride + at, v_ptr + token * v_stride + at
            first = tl.load(k_ptrs, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(k_ptrs + HALF, mask=inside, other=0.0).to(tl.float32)
            left = tl.load(v_ptrs, mask=inside, other=0.0).to(tl.float32)
            right = tl.load(v_ptrs + HALF, mask=inside, other=0.0).to(tl.float32)
            block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
            place = block * block_stride + offset * 2 * HALF + head[:, None] * head_stride + half[None, :]
            scale_place = block * scale_block_stride + offset + head * (2 * BLOCK_SIZE)
            turned, also = first * cosine - second * sine, second * cosine + first * sine
            there = head < kv_heads
            _store_token(
                keys_ptr + place, key_scale_ptr + scale_place, turned, also, inside, there, HALF, FORMAT, NATIVE_E4M3
            )
            _store_token(
                values_ptr + place, value_scale_ptr + scale_place, left, right, inside, there, HALF, FORMAT, NATIVE_E4M3
            )


@triton.jit
def _store_token(
    ptrs, scale_ptrs, left, right, inside, there, HALF: tl.constexpr, FORMAT: tl.constexpr, NATIVE_E4M3: tl.constexpr
):
    """Heads of one token, (heads, half) in two halves, as paged_cache.py rounds them; inside, there: which are real."""
    if FORMAT == 2:  # int8
        finite_left, finite_right = _finite(left), _finite(right)
        largest = tl.maximum(tl.max(tl.abs(finite_left), 1), tl.max(tl.abs(finite_right), 1))
        inverse = tl.where(largest > 7.888609052210118e-31, 127.0 / largest, 0.0)[:, None]  # 2**-100: paged_cache.py
        tl.store(ptrs, round_half_even(finite_left * inverse).to(tl.int8), mask=inside)
        tl.store(ptrs + HALF, round_half_even(finite_right * inverse).to(tl.int8), mask=inside)
        # 0 * NaN and 0 * infinity are NaN, and mark the token
        marked = tl.sum(tl.where(inside, left * 0.0 + right * 0.0, 0.0), 1)
        tl.store(scale_ptrs, largest / 127.0 + marked, mask=there)
    elif FORMAT == 1:  # fp8
        tl.store(ptrs, e4m3_code(left, NATIVE_E4M3), mask=inside)
        tl.store(ptrs + HALF, e4m3_code(right, NATIVE_E4M3), mask=inside)
    else:
        tl.store(ptrs, left.to(ptrs.dtype.element_ty), mask=inside)
        tl.store(ptrs + HALF, right.to(ptrs.dtype.element_ty), mask=inside)


@triton.jit
def _finite(x):
    most = 3.4028234663852886e38
    x = tl.where(x == x, x, 0.0)
    return tl.where(x > most, most, tl.where(x < -most, -most, x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As kernels/fused.py; also fp16. Raises ValueError: rows of more than 65,536 numbers."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(x, None, weight, eps, out)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As kernels/fused.py; also fp16. Raises ValueError: rows of more than 65,536 numbers."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(x, residual, weight, eps, out)
    return out


def _launch_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    rows, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    if width > _MOST_WIDTH:
        raise ValueError(f"rows of {width} numbers: one program normalizes at most {_MOST_WIDTH}")
    block = triton.next_power_of_2(width)
    added_to = x if residual is None else residual
    if rows:
        rms_norm_kernel[(rows,)](
            x, added_to, weight, out, eps, width, x.stride(0), added_to.stride(0), out.stride(0), residual is not None,
            block,
            num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip


def swiglu(gate_up: Tensor) -> Tensor:
    """As kernels/fused.py; also fp16."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    block = min(_COLUMNS, triton.next_power_of_2(width))
    if rows:
        swiglu_kernel[(rows, triton.cdiv(width, block))](gate_up, out, width, gate_up.stride(0), out.stride(0), block)
    return out


def rope_and_cache(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, cache: PagedCache,
    slot_mapping: Tensor,
) -> None:  # fmt: skip
    """As kernels/fused.py; also fp16."""
    tokens, heads, head_dim = q.shape
    if not tokens:
        return
    planes = cache.gpu_planes
    # at few tokens many programs, at many each with more to do
    block_heads = 4 if tokens <= _FEW_TOKENS else 16
    parts = triton.cdiv(heads, block_heads) + triton.cdiv(cache.kv_heads, block_heads)
    rope_and_cache_kernel[(tokens, parts)](
        q, k, v, positions, cos, sin, planes.keys, planes.values, planes.key_scales, planes.value_scales, slot_mapping,
        q.stride(0), k.stride(0), v.stride(0), heads, cache.kv_heads, *planes.keys.stride()[:2],
        planes.key_scales.stride(0), cache.block_size, head_dim // 2, triton.next_power_of_2(head_dim // 2),
        block_heads, planes.format, placement.converts_e4m3(q.device), num_warps=block_heads // 4,
    )  # fmt: skip
