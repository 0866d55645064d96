"""The paged KV cache of one layer: what a block holds in each format, and how tokens get in and out.

A block is one contiguous row of bytes, so that moving one is one copy whatever its format:

    for every KV head:   keys (block_size, head_dim), values (block_size, head_dim)
    for every KV head:   scales of these keys (block_size,), of these values (block_size,)    fp32, int8 only

The tokens of one head lie together because attention goes head by head: 16 tokens of 64 bf16 numbers are a stream of
2 KB, and the values come right behind. Scales stand behind all values, so that rows of whole cache lines stay such.

Formats: fp32; bf16; fp8 (e4m3, finite: Micikevicius et al., arXiv:2209.05433), without a scale, what lies beyond +-448
is stored as +-448; int8, symmetric: number * 127 / largest magnitude of the token's head, and that magnitude / 127 as
its scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

FP8_LARGEST = 448.0
_SCALE_BYTES = 4
_NO_SCALE_BELOW = 2.0**-100  # a head this small is stored as zeros: 127 / magnitude must stay finite


class _Format(NamedTuple):
    code: int  # CacheType of cpu/paged_cache.h
    stored: torch.dtype
    scaled: bool


_FORMATS = {
    "fp32": _Format(0, torch.float32, False),
    "bf16": _Format(1, torch.bfloat16, False),
    "fp8": _Format(2, torch.float8_e4m3fn, False),
    "int8": _Format(3, torch.int8, True),
}
CACHE_DTYPES = tuple(_FORMATS)


class GpuPlanes(NamedTuple):
    """What the Triton kernels are given of a cache; all are views.

    keys, values             (num_blocks, kv_heads, block_size, head_dim) as stored, e4m3 as its bytes
    key_scales, value_scales  (num_blocks, kv_heads, block_size) fp32; keys and values again where there are none
    format                   0: floats, 1: e4m3, 2: int8 with scales
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor
    value_scales: Tensor
    format: int


def block_bytes(dtype: str, block_size: int, kv_heads: int, head_dim: int) -> int:
    """Bytes of one block of one layer.

    >>> block_bytes("int8", 16, 4, 64)    # 2 * 16 * 4 * (64 numbers + a scale of 4 bytes)
    8704
    """
    stored = _FORMATS[dtype]
    row = head_dim * stored.stored.itemsize + (_SCALE_BYTES if stored.scaled else 0)
    return 2 * block_size * kv_heads * row


@dataclass(frozen=True)
class PagedCache:
    """One layer's blocks. Raises ValueError: sizes that do not fit `blocks`, or an unknown format.

    blocks  (num_blocks, block_bytes) uint8, contiguous; `blocks[i]` is all there is of block i
    dtype   a name of CACHE_DTYPES
    """

    blocks: Tensor
    dtype: str
    block_size: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.dtype not in _FORMATS:
            raise ValueError(f"KV cache format {self.dtype!r} is not one of {', '.join(CACHE_DTYPES)}")
        width = block_bytes(self.dtype, self.block_size, self.kv_heads, self.head_dim)
        if self.blocks.dtype != torch.uint8 or self.blocks.shape[1:] != (width,) or not self.blocks.is_contiguous():
            raise ValueError(
                f"the blocks are {tuple(self.blocks.shape)} {self.blocks.dtype}, not (n, {width}) uint8, contiguous"
            )
        if width % 4:
            raise ValueError(f"a block of {width} bytes: its scales would not lie on 4 bytes; use an even head_dim")

    @classmethod
    def zeros(cls, num_blocks: int, dtype: str, block_size: int, kv_heads: int, head_dim: int) -> PagedCache:
        width = block_bytes(dtype, block_size, kv_heads, head_dim)
        return cls(torch.zeros((num_blocks, width), dtype=torch.uint8), dtype, block_size, kv_heads, head_dim)

    @property
    def code(self) -> int:
        """The format's number in the C++ operators."""
        return _FORMATS[self.dtype].code

    @property
    def keys(self) -> Tensor:
        """(num_blocks, kv_heads, block_size, head_dim) as stored, a view."""
        return self._numbers[:, :, 0]

    @property
    def values(self) -> Tensor:
        """As `keys`."""
        return self._numbers[:, :, 1]

    @property
    def key_scales(self) -> Tensor | None:
        """(num_blocks, kv_heads, block_size) fp32, a view; None in formats without scales."""
        return None if self._scales is None else self._scales[:, :, 0]

    @property
    def value_scales(self) -> Tensor | None:
        """As `key_scales`."""
        return None if self._scales is None else self._scales[:, :, 1]

    @property
    def _numbers(self) -> Tensor:
        stored = _FORMATS[self.dtype].stored
        bytes_of_all = 2 * self.kv_heads * self.block_size * self.head_dim * stored.itemsize
        flat = self.blocks[:, :bytes_of_all].view(stored)
        return flat.view(-1, self.kv_heads, 2, self.block_size, self.head_dim)

    @property
    def _scales(self) -> Tensor | None:
        if not _FORMATS[self.dtype].scaled:
            return None
        bytes_of_all = 2 * self.kv_heads * self.block_size * _SCALE_BYTES
        flat = self.blocks[:, -bytes_of_all:].view(torch.float32)
        return flat.view(-1, self.kv_heads, 2, self.block_size)

    @cached_property
    def gpu_planes(self) -> GpuPlanes:
        """Made once: a step asks for them in each layer."""
        keys, values = self.keys, self.values
        if keys.dtype == torch.float8_e4m3fn:
            keys, values = keys.view(torch.uint8), values.view(torch.uint8)
        key_scales, value_scales = self.key_scales, self.value_scales
        if key_scales is None or value_scales is None:
            return GpuPlanes(keys, values, keys, values, int(self.dtype == "fp8"))
        return GpuPlanes(keys, values, key_scales, value_scales, 2)

    def read(self, block_ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a context's first `length` tokens, each (length, kv_heads, head_dim) fp32."""
        ids = block_ids[: -(-length // self.block_size)].long()
        parts = []
        for numbers, scales in ((self.keys, self.key_scales), (self.values, self.value_scales)):
            taken = numbers[ids].float()
            if scales is not None:
                taken = taken * scales[ids][..., None]
            parts.append(taken.transpose(1, 2).reshape(-1, self.kv_heads, self.head_dim)[:length])
        return parts[0], parts[1]

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store tokens, each (T, kv_heads, head_dim), at slots (T,) = block * block_size + offset, rounding them."""
        slots = slots.long()
        block, offset = slots // self.block_size, slots % self.block_size
        for to, to_scales, x in (
            (self.keys, self.key_scales, keys.float()),
            (self.values, self.value_scales, values.float()),
        ):
            if to_scales is not None:
                x, to_scales[block, :, offset] = _quantized(x)
            if to.dtype == torch.float8_e4m3fn:
                rounded = x.clamp(-FP8_LARGEST, FP8_LARGEST).to(to.dtype)
                to.view(torch.uint8)[block, :, offset] = rounded.view(torch.uint8)
            else:
                to[block, :, offset] = x.to(to.dtype)

    def stored(self, slots: Tensor) -> Tensor:
        """What the cache holds of the tokens at slots (T,), as it lies there: (T, bytes of a token) uint8."""
        block, offset = slots // self.block_size, slots % self.block_size
        return torch.cat([plane[block, :, offset].flatten(1) for plane in self._planes], 1)

    def put_stored(self, slots: Tensor, rows: Tensor) -> None:
        """Store what `stored` gave, of a cache like this one, at slots (T,)."""
        block, offset = slots // self.block_size, slots % self.block_size
        planes = self._planes
        widths = [self.kv_heads * plane.shape[-1] for plane in planes]
        for plane, part in zip(planes, rows.split_with_sizes(widths, 1)):
            plane[block, :, offset] = part.reshape(-1, self.kv_heads, plane.shape[-1])

    @property
    def _planes(self) -> list[Tensor]:
        """All that is stored, as views (num_blocks, kv_heads, block_size, bytes) uint8."""
        numbers = [self.keys.view(torch.uint8), self.values.view(torch.uint8)]
        scales = [each for each in (self.key_scales, self.value_scales) if each is not None]
        return numbers + [each[..., None].view(torch.uint8) for each in scales]


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., head_dim) fp32 as int8 numbers and their scales (...,); what is not finite makes the scale NaN."""
    finite = x.nan_to_num(nan=0.0)
    largest = finite.abs().amax(dim=-1)
    inverse = torch.where(largest > _NO_SCALE_BELOW, 127.0 / largest, 0.0)
    numbers = (finite * inverse[..., None]).round().nan_to_num().to(torch.int8)
    return numbers, largest / 127.0 + (x * 0.0).sum(dim=-1)
