"""Linear layers on an NVIDIA GPU: which weights the libraries multiply, and which a Triton kernel.

    fp32, bf16, fp16   cuBLAS, activations in the weights' own dtype (fp32 without TF32)
    fp8                w8a8 from capability 8.9 on: rows of x rounded to e4m3, one scale a row; few rows multiplied by
                       triton_stored_matmul.py, more by torch._scaled_mm; below it, and where a size is no multiple of
                       16, as the four-bit formats
    int8               w8a8: rows of x rounded to int8; few rows multiplied by triton_stored_matmul.py, and any number
                       where a size is no multiple of 8, else by torch._int_mm
    int4, ternary, nvfp4, mxfp4   activations are not rounded; few rows: expanded to their dtype inside the product
                       (triton_stored_matmul.py); more: expanded in memory, a part at a time, and multiplied by cuBLAS

Where few ends lies between numbers of rows that were timed on an NVIDIA H200 (64, 256 and 2,048:
benchmarks/results/kernels_gpu.json). Imported only where it runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from . import placement
from .stored_weight import StoredWeight
from .tiles import BadTile, Tile, TileTable, bucket
from .weight_formats import FP8_CAPABILITY, GPU_EXPANDED_BYTES
from .weight_layout import rows_of

if TYPE_CHECKING:
    from .linear import PackedLinear

_LEAST_INT_MM_ROWS = 32  # torch._int_mm refuses 16 rows or fewer (aten/src/ATen/native/cuda/Blas.cpp)
_FEW_ROWS = {"fp8": 64, "int8": 256}  # that Triton multiplies by default; of the others:
_FEW_ROWS_EXPANDED = 128
_CHANNELS = 128  # a part that is expanded has a multiple of so many
_BUCKETS = 33
_WHOLE = ("fp32", "bf16", "fp16")
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def activation_dtype(precision: str) -> torch.dtype:
    """In which the activations beside weights of this precision are kept, and multiplied."""
    return _DTYPES.get(precision, torch.bfloat16)


def backends(precision: str, out_features: int, in_features: int) -> tuple[str, ...]:
    """Which backends multiply such a weight on a GPU."""
    if precision == "int8" and (out_features % 8 or in_features % 8):
        return ("triton",)
    return ("torch", "triton")


def default_tile(precision: str, rows: int, backend: str | None = None) -> Tile:
    """The fastest of the few that were timed on an NVIDIA H200, in 99 KB of shared memory.

    Args:
        backend: left out: the better one of both for a weight of this precision.
    """
    if precision in _WHOLE:
        if backend != "triton":
            return Tile("linear", "torch")
        block_m = min(64, max(16, bucket(rows)))
        shape = (block_m, 64, 32, 8 if block_m == 64 else 4, 2)
    elif backend == "torch" or (backend is None and rows > _FEW_ROWS.get(precision, _FEW_ROWS_EXPANDED)):
        return Tile("linear", "torch")
    elif rows <= 32:
        shape = (16 if rows <= 16 else 32, 64, 128, 4, 4)
    elif rows <= 64 and precision != "int4":
        shape = (64, 64, 128, 8, 3)
    elif rows <= 128:
        shape = (64, 128, 128, 8, 2)
    else:
        shape = (128, 128, 64, 8, 3)
    return Tile("linear", "triton", tuple(zip(("block_m", "block_n", "block_k", "num_warps", "num_stages"), shape)))


def chosen_tiles(stored: StoredWeight, tiles: TileTable | None) -> tuple[Tile, ...]:
    """The tile of each power-of-two number of rows. Raises BadTile: a backend that does not multiply this weight."""
    out_features, in_features = stored.values.shape
    return _chosen(stored.precision, out_features, in_features, tiles or TileTable.default())


def _chosen(precision: str, out_features: int, in_features: int, tiles: TileTable) -> tuple[Tile, ...]:
    having = backends(precision, out_features, in_features)
    only = having[0] if len(having) == 1 else None
    chosen = []
    for exponent in range(_BUCKETS):
        tile = tiles.lookup("linear", precision, 1 << exponent) or default_tile(precision, 1 << exponent, only)
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
    return replace(packed, tiles=_chosen(packed.precision, packed.out_features, packed.in_features, tiles))


def linear(x: Tensor, packed: PackedLinear, tile: Tile | None = None) -> Tensor:
    """As kernels/linear.py: x (M, in) fp32, fp16 or bf16, rows contiguous -> (M, out), dtype of x."""
    assert packed.weight is not None
    rows = x.shape[0]
    if tile is None:
        tile = packed.tiles[(rows - 1).bit_length() if rows else 0]
    if rows == 0:
        return x.new_empty((0, packed.out_features))
    weight = packed.weight
    if packed.precision in _WHOLE:
        multiplied = x if x.dtype == weight.dtype else x.to(weight.dtype)
        if tile.backend == "torch":
            out = functional.linear(multiplied, weight, packed.bias)
        else:
            from .triton_matmul import matmul

            out = matmul(_by_rows(multiplied), weight, tile, packed.bias)
        return out if out.dtype == x.dtype else out.to(x.dtype)
    x = _by_rows(x)
    if rounds_rows(packed):
        return _of_rounded_rows(x, packed, tile)
    if tile.backend == "torch":
        return _through_expanded(x, packed)
    from .triton_stored_matmul import stored_matmul

    return stored_matmul(x, packed.precision, weight, packed.group_scale, packed.channel_scale, tile, packed.bias)


def rounds_rows(packed: PackedLinear) -> bool:
    """Whether rows of x are rounded to the dtype of this weight."""
    assert packed.weight is not None
    if packed.precision == "fp8":
        whole = not (packed.out_features % 16 or packed.in_features % 16)
        return whole and placement.capability(packed.weight.device) >= FP8_CAPABILITY
    return packed.precision == "int8"


def _by_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _of_rounded_rows(x: Tensor, packed: PackedLinear, tile: Tile) -> Tensor:
    from .triton_rounding import rounded_rows
    from .triton_stored_matmul import scaled, stored_matmul

    weight, by_channel = packed.weight, packed.channel_scale
    assert weight is not None
    assert by_channel is not None
    values, by_row = rounded_rows(x, packed.precision)
    if tile.backend == "triton":
        return stored_matmul(values, packed.precision, weight, None, by_channel, tile, packed.bias, by_row, x.dtype)
    if packed.precision == "fp8":
        # row scales times channel scales, applied inside the product; the result is bf16 whatever x is
        out = torch._scaled_mm(
            values, weight.t(), scale_a=by_row[:, None], scale_b=by_channel[None, :], out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip
        return (out if packed.bias is None else out + packed.bias).to(x.dtype)
    rows = x.shape[0]
    if rows < _LEAST_INT_MM_ROWS:
        values = functional.pad(values, (0, 0, 0, _LEAST_INT_MM_ROWS - rows))
    return scaled(torch._int_mm(values, weight.t()).narrow(0, 0, rows), by_row, by_channel, packed.bias, x.dtype)


def _through_expanded(x: Tensor, packed: PackedLinear) -> Tensor:
    """The weight is expanded in parts of at most GPU_EXPANDED_BYTES, one after the other in the same memory."""
    from .triton_rounding import expanded

    weight, out_features, in_features = packed.weight, packed.out_features, packed.in_features
    assert weight is not None
    out = torch.empty((x.shape[0], out_features), dtype=x.dtype, device=x.device)
    step = channels_at_a_time(out_features, in_features, x.itemsize)
    for first in range(0, out_features, step):
        channels = min(step, out_features - first)
        by_group, by_channel = (
            None if scale is None else scale.narrow(0, first, channels)
            for scale in (packed.group_scale, packed.channel_scale)
        )
        held = weight.narrow(0, first, channels)
        whole = expanded(packed.precision, held, by_group, by_channel, in_features, x.dtype)
        torch.mm(x, whole.t(), out=out.narrow(1, first, channels))
        del whole  # the next part takes its memory: the GPU does one after the other
    return out if packed.bias is None else out.add_(packed.bias)


def channels_at_a_time(out_features: int, in_features: int, itemsize: int) -> int:
    """Output channels of the parts, all but the last alike, that are expanded one after the other.

    >>> channels_at_a_time(28672, 4096, 2), channels_at_a_time(6144, 4096, 2), channels_at_a_time(33, 17, 2)
    (7168, 6144, 128)
    """
    most = max(_CHANNELS, GPU_EXPANDED_BYTES // (in_features * itemsize) // _CHANNELS * _CHANNELS)
    each = -(-out_features // -(-out_features // most))
    return -(-each // _CHANNELS) * _CHANNELS
