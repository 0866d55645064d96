"""The operators between the matrix products: normalization, rotary embedding with the KV write, and the gated
activation.

Each is one pass over memory in C++ where there is a compiler, and a few torch calls where not; on a GPU it is a Triton
kernel. Activations are fp32 or bf16, on a GPU also fp16; weights and angles are fp32; everything is computed in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from . import placement
from .cpu.build import Library, load
from .paged_cache import PagedCache

BACKENDS = ("cpp", "torch")


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * weight in float64 (Zhang and Sennrich, arXiv:1910.07467)."""
    x = x.double()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.double()


def reference_rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, heads, head_dim) rotated by its positions, halves of the head as pairs (Su et al., arXiv:2104.09864, in the
    layout of Llama checkpoints in Hugging Face format), float64."""
    first, second = x.double().chunk(2, dim=-1)
    cosine, sine = cos[positions.long()].double()[:, None], sin[positions.long()].double()[:, None]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def reference_swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up in float64 (Shazeer, arXiv:2002.05202); gate is the first half of the columns, up the second."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return functional.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    """x (T, hidden) fp32 or bf16, rows contiguous; weight (hidden,) fp32 -> (T, hidden), dtype of x."""
    rows, width = x.shape
    _check_weight(x, weight)
    if placement.on_gpu(x):
        from . import triton_fused

        return triton_fused.rms_norm(x, weight, eps)
    library = _library(backend)
    if library is None:
        return _torch_rms_norm(x, weight, eps)
    if x.stride(1) != 1:
        x = x.contiguous()
    out = x.new_empty((rows, width))
    library.rms_norm(
        x.data_ptr(), x.stride(0), weight.data_ptr(), eps, out.data_ptr(), rows, width, x.dtype is torch.bfloat16,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    """residual += x IN PLACE, then rms_norm(residual); x and residual (T, hidden), same dtype, contiguous."""
    rows, width = x.shape
    _check_weight(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
        raise ValueError(f"residual is {tuple(residual.shape)} {residual.dtype}, x {tuple(x.shape)} {x.dtype}")
    if placement.on_gpu(x):
        from . import triton_fused

        return triton_fused.add_rms_norm(x, residual, weight, eps)
    library = _library(backend)
    if library is None:
        residual.copy_(residual.float() + x.float())
        return _torch_rms_norm(residual, weight, eps)
    x = x.contiguous()
    out = x.new_empty((rows, width))
    library.add_rms_norm(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), rows, width,
        x.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out


def swiglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up of gate_up (T, 2 * inter) = [gate, up] -> (T, inter), dtype of gate_up."""
    rows, width = gate_up.shape
    if width % 2:
        raise ValueError(f"gate_up has {width} columns, which is odd")
    if placement.on_gpu(gate_up):
        from . import triton_fused

        return triton_fused.swiglu(gate_up)
    library = _library(backend)
    if library is None:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (functional.silu(gate) * up).to(gate_up.dtype)
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    out = gate_up.new_empty((rows, width // 2))
    library.swiglu(
        gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), rows, width // 2, gate_up.dtype is torch.bfloat16,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: PagedCache,
    slot_mapping: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Rotate q IN PLACE and k, and write k and v into the cache, rounded to its format.

    Args:
        q: (T, heads, head_dim); k, v: (T, kv_heads, head_dim); same dtype; tokens may be strided (slices of one qkv
            matrix), heads and dims not. k is read and not changed.
        positions: (T,) int32 or int64, rows of cos and sin.
        cos, sin: (max_position, head_dim / 2) fp32, contiguous.
        cache: one layer's blocks, in any format.
        slot_mapping: (T,) int32 or int64, block * block_size + offset; a negative slot writes nothing.
    Raises ValueError: shapes or dtypes that do not fit together.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    if k.shape != (tokens, kv_heads, head_dim) or v.shape != k.shape or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, v {tuple(v.shape)} {v.dtype}")
    if head_dim % 2 or cos.shape[1] != head_dim // 2 or sin.shape != cos.shape or cos.dtype != torch.float32:
        raise ValueError(f"cos {tuple(cos.shape)} {cos.dtype}, not (positions, {head_dim // 2}) float32")
    if (cache.kv_heads, cache.head_dim) != (kv_heads, head_dim):
        raise ValueError(
            f"a cache of {cache.kv_heads} KV heads of {cache.head_dim} numbers does not take keys {tuple(k.shape)}"
        )
    library = _library(backend)
    if library is None and not placement.on_gpu(q):
        _torch_rope_and_cache(q, k, v, positions, cos, sin, cache, slot_mapping)
        return
    for tensor in (q, k, v):
        if tensor.stride(2) != 1 or tensor.stride(1) != head_dim:
            raise ValueError("the heads of q, k and v must lie side by side within a token")
    if placement.on_gpu(q):
        from . import triton_fused

        triton_fused.rope_and_cache(q, k, v, positions, cos, sin, cache, slot_mapping)
        return
    assert library is not None
    positions = positions.to(torch.int64)
    slot_mapping = slot_mapping.to(torch.int64)
    refused = library.rope_and_cache(
        q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), q.dtype is torch.bfloat16,
        positions.data_ptr(), cos.data_ptr(), sin.data_ptr(), cache.blocks.data_ptr(), cache.code,
        cache.block_size, slot_mapping.data_ptr(), tokens, heads, kv_heads, head_dim, torch.get_num_threads(),
    )  # fmt: skip
    if refused:
        raise ValueError(f"heads of {head_dim} numbers: the C++ operator takes at most 1024")


def _library(backend: str | None) -> Library | None:
    library = load()
    if backend is None:
        return library
    if backend not in BACKENDS or (backend == "cpp" and library is None):
        raise ValueError(f"backend {backend!r} is not one of {BACKENDS[library is None :]}")
    return library if backend == "cpp" else None


def _check_weight(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[1:] or weight.dtype != torch.float32:
        raise ValueError(f"weight is {tuple(weight.shape)} {weight.dtype}, not ({x.shape[1]},) float32")


def _torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x.float(), (x.shape[1],), weight, eps).to(x.dtype)


def _torch_rope_and_cache(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, cache: PagedCache,
    slot_mapping: Tensor,
) -> None:  # fmt: skip
    cosine, sine = cos[positions.long()][:, None], sin[positions.long()][:, None]
    rotated = []
    for x in (q, k):
        first, second = x.float().chunk(2, dim=-1)
        rotated.append(torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1))
    q.copy_(rotated[0])
    kept = slot_mapping >= 0
    cache.write(slot_mapping[kept], rotated[1][kept], v[kept])
