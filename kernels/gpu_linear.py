"""Linear layers on an NVIDIA GPU: which weights the libraries multiply, and which a Triton kernel expands.

    fp32, bf16, fp16   cuBLAS, activations in the weights' own dtype (fp32 without TF32)
    fp8                w8a8 by torch._scaled_mm from capability 8.9 on: rows of x rounded to e4m3, one scale a row;
                       below it, and where a size is no multiple of 16, expanded
    int8               w8a8 by torch._int_mm, rows of x rounded to int8; where a size is no multiple of 8, expanded
    int4, ternary, nvfp4, mxfp4   expanded to the activations' dtype inside the product (triton_stored_matmul.py)

None of it has run on a GPU yet; which tile suits which number of rows was not measured. Imported only where it runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from . import placement
from .stored_weight import StoredWeight, quantize_int8
from .tiles import BadTile, Tile, TileTable, bucket
from .weight_formats import FP8_CAPABILITY
from .weight_layout import rows_of

if TYPE_CHECKING:
    from .linear import PackedLinear

_MOST_E4M3 = 448.0
_LEAST_INT_MM_ROWS = 32  # torch._int_mm refuses 16 rows or fewer (aten/src/ATen/native/cuda/Blas.cpp)
_BUCKETS = 33
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def activation_dtype(precision: str) -> torch.dtype:
    """In which the activations beside weights of this precision are kept, and multiplied."""
    return _DTYPES.get(precision, torch.bfloat16)


def backends(precision: str, out_features: int, in_features: int, capability: tuple[int, int]) -> tuple[str, ...]:
    """Which backends multiply such a weight on a GPU of such a capability, the default first."""
    if precision in ("fp32", "bf16", "fp16"):
        return ("torch", "triton")
    if precision == "fp8" and capability >= FP8_CAPABILITY and not (out_features % 16 or in_features % 16):
        return ("torch", "triton")
    if precision == "int8" and not (out_features % 8 or in_features % 8):
        return ("torch", "triton")
    return ("triton",)


def default_tile(backend: str, rows: int) -> Tile:
    """Not measured: narrow row tiles where decoding has few rows, in 99 KB of shared memory, without spills."""
    if backend == "torch":
        return Tile("linear", "torch")
    block_m = min(64, max(16, bucket(rows)))
    num_warps = 8 if block_m == 64 else 4
    parameters = {"block_m": block_m, "block_k": 32, "num_warps": num_warps, "num_stages": 2}
    return Tile("linear", "triton", tuple(parameters.items()))


def chosen_tiles(stored: StoredWeight, tiles: TileTable | None, device: torch.device) -> tuple[Tile, ...]:
    """The tile of each power-of-two number of rows. Raises BadTile: a backend that does not multiply this weight."""
    out_features, in_features = stored.values.shape
    return _chosen(stored.precision, out_features, in_features, tiles or TileTable.default(), device)


def _chosen(
    precision: str, out_features: int, in_features: int, tiles: TileTable, device: torch.device
) -> tuple[Tile, ...]:
    having = backends(precision, out_features, in_features, placement.capability(device))
    chosen = []
    for exponent in range(_BUCKETS):
        tile = tiles.lookup("linear", precision, 1 << exponent) or default_tile(having[0], 1 << exponent)
        if tile.backend not in having:
            where = f"linear: backend for {precision} of {out_features} x {in_features} on a GPU"
            raise BadTile(where, tile.backend, ", ".join(having), "search tiles on this machine, or delete the entry")
        chosen.append(tile)
    return tuple(chosen)


def on_device(
    stored: StoredWeight, bias: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Weight, group scales, channel scales and bias as the GPU's products read them, on the GPU."""
    precision = stored.precision
    group = None if stored.group_scale is None else stored.group_scale.contiguous().to(device)
    channel = None if stored.channel_scale is None else stored.channel_scale.float().contiguous().to(device)
    moved = None if bias is None else bias.detach().to(activation_dtype(precision)).contiguous().to(device)
    return rows_of(stored).to(device), group, channel, moved


def retiled(packed: PackedLinear, tiles: TileTable) -> PackedLinear:
    """The same weight with other tiles. Raises BadTile."""
    assert packed.weight is not None
    chosen = _chosen(packed.precision, packed.out_features, packed.in_features, tiles, packed.weight.device)
    return replace(packed, tiles=chosen)


def linear(x: Tensor, packed: PackedLinear, tile: Tile | None = None) -> Tensor:
    """As kernels/linear.py: x (M, in) fp32, fp16 or bf16, rows contiguous -> (M, out), dtype of x."""
    assert packed.weight is not None
    rows = x.shape[0]
    if tile is None:
        tile = packed.tiles[(rows - 1).bit_length() if rows else 0]
    precision, weight = packed.precision, packed.weight
    if rows == 0:
        return x.new_empty((0, packed.out_features))
    if tile.backend == "triton":
        return _by_triton(x, packed, tile)
    if precision == "fp8":
        return _by_scaled_mm(x, packed)
    if precision == "int8":
        return _by_int_mm(x, packed)
    return functional.linear(x.to(weight.dtype), weight, packed.bias).to(x.dtype)


def _by_triton(x: Tensor, packed: PackedLinear, tile: Tile) -> Tensor:
    assert packed.weight is not None
    x = x if x.stride(1) == 1 else x.contiguous()
    if packed.precision in ("fp32", "bf16", "fp16"):
        from .triton_matmul import matmul

        return matmul(x.to(packed.weight.dtype), packed.weight, tile, packed.bias).to(x.dtype)
    from .triton_stored_matmul import stored_matmul

    return stored_matmul(
        x, packed.precision, packed.weight, packed.group_scale, packed.channel_scale, tile, packed.bias
    )


def _by_scaled_mm(x: Tensor, packed: PackedLinear) -> Tensor:
    """Row scales times channel scales, applied inside the product; the result is bf16 whatever x is."""
    assert packed.weight is not None
    assert packed.channel_scale is not None
    values, scale = quantize_e4m3(x)
    out = torch._scaled_mm(
        values, packed.weight.t(), scale_a=scale[:, None], scale_b=packed.channel_scale[None, :],
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
    return (out if packed.bias is None else out + packed.bias).to(x.dtype)


def _by_int_mm(x: Tensor, packed: PackedLinear) -> Tensor:
    assert packed.weight is not None
    assert packed.channel_scale is not None
    values, scale = quantize_int8(x)
    rows = x.shape[0]
    if rows < _LEAST_INT_MM_ROWS:
        values = functional.pad(values, (0, 0, 0, _LEAST_INT_MM_ROWS - rows))
    sums = torch._int_mm(values, packed.weight.t()).narrow(0, 0, rows)
    out = sums.float() * (scale[:, None] * packed.channel_scale[None, :])
    return (out if packed.bias is None else out + packed.bias).to(x.dtype)


def quantize_e4m3(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded to e4m3, and the fp32 scale of each: values ~ e4m3 * scale[:, None]. A row of zeros has scale 1."""
    values = values.float()
    largest = values.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / _MOST_E4M3, torch.ones_like(largest))
    return (values / scale[:, None]).clamp(-_MOST_E4M3, _MOST_E4M3).to(torch.float8_e4m3fn), scale
