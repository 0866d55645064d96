"""Linear layers: y = x @ weight.T + bias, with weights in any of `weight_formats`.

Activations may be fp32 or bf16 whatever the weights are; sums are fp32 (int32 under int8) and the result has the dtype
of x. On the CPU keep activations fp32 between operators: the C++ kernel rounds a panel of rows to bf16 while it packs
it, which costs less than a pass of its own.

Beside int8, int4 and ternary weights each row of x is rounded to int8 at run time, symmetric, with one scale (dynamic
quantization; Dettmers et al., "LLM.int8()", arXiv:2208.07339, without its outlier split). fp16, fp8, nvfp4 and mxfp4
stay in memory as they are stored and are expanded to fp32 (fp16) or bf16, exactly, a panel at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from . import placement
from .cpu.build import Library, load
from .cpu.huge_pages import on_huge_pages
from .cpu.workspace import WORKSPACE
from .stored_weight import StoredWeight, quantize_int8, store
from .tiles import PRECISIONS, BadTile, Tile, TileTable
from .weight_formats import WEIGHT_FORMATS
from .weight_layout import panels_of, rows_of, stored_rows

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16)
MAX_IN_FEATURES_INT8 = 65536  # int32 sums of 255 * 127 products stay below 2**31
_BUCKETS = 33
_EXPANDED_ROWS = 512  # of the torch layout, expanded at a time
_CPU = torch.device("cpu")


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, in) @ weight (out, in).T + bias in float64: the oracle."""
    return functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


class _Weight(ctypes.Structure):
    """What linear.cpp's `Weight` holds, field by field."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero_sum", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("precision", ctypes.c_int64),
    )


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A weight in the layout its tiles want; immutable. `pack` makes it.

    precision      a key of WEIGHT_FORMATS
    out_features, in_features
    tiles          Tile for each power-of-two bucket of M, index = exponent
    panels         C++ layout: (out/P, steps, bytes of a step), P = 2 vector registers of channels, group scales among
                   the weights; kernels/cpu/gemm_tile.h, low_bit.h and expand.h say what a step is
    weight         torch layout (out, in), for the backend "torch"; below eight bits (out, bytes), low bits first
    group_scale    of `weight`, as StoredWeight has it
    channel_scale  (out,) fp32, where the format has one
    bias           (out,) fp32 or None; on a GPU in the dtype of the activations
    """

    precision: str
    out_features: int
    in_features: int
    tiles: tuple[Tile, ...]
    panels: Tensor | None
    weight: Tensor | None
    group_scale: Tensor | None
    channel_scale: Tensor | None
    bias: Tensor | None
    _zero_sum: Tensor | None = field(repr=False)
    _descriptor: _Weight | None = field(repr=False)
    _descriptor_address: int = field(repr=False)

    @property
    def descriptor_address(self) -> int:
        """What C++ operators that multiply are handed, valid as long as this lives; 0: it is not packed for C++."""
        return self._descriptor_address

    @property
    def nbytes(self) -> int:
        """Bytes in memory, of all layouts it holds."""
        held = (self.panels, self.weight, self.group_scale, self.channel_scale, self.bias, self._zero_sum)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def pack(
    weight: Tensor | StoredWeight,
    precision: str | None = None,
    *,
    bias: Tensor | None = None,
    tiles: TileTable | None = None,
    backends: tuple[str, ...] | None = None,
    device: torch.device = _CPU,
) -> PackedLinear:
    """Lay out a weight for the CPU, or for a GPU.

    Args:
        weight: stored, or (out, in) of any float dtype and then rounded to `precision`.
        backends: whose layouts are kept in memory; left out: what `tiles` names for this precision, and C++ (torch
            where there is no compiler) if it names nothing. Not asked on a GPU, where one layout serves all.
        device: that will compute with it.
    Raises BadTile: unknown precision or backend, a backend that this machine lacks, a shape that cannot be packed.
    """
    stored = weight if isinstance(weight, StoredWeight) else store(weight, precision or "")
    precision = stored.precision
    out_features, in_features = stored.values.shape
    if bias is not None and bias.shape != (out_features,):
        raise BadTile("linear: bias", tuple(bias.shape), f"({out_features},)", "pass one number per output channel")
    if stored.format.arithmetic == "int8" and in_features > MAX_IN_FEATURES_INT8:
        allowed = f"<= {MAX_IN_FEATURES_INT8} for {precision}"
        raise BadTile("linear: in_features", in_features, allowed, "use bf16")
    if placement.on_gpu(device):
        from . import gpu_linear

        chosen = gpu_linear.chosen_tiles(stored, tiles)
        weight, group_scale, channel_scale, bias = gpu_linear.on_device(stored, bias, device)
        return PackedLinear(
            precision, out_features, in_features, chosen, None, weight, group_scale, channel_scale, bias, None, None, 0
        )
    library = load()
    default = Tile("linear", "cpp" if library is not None else "torch")
    table = tiles or TileTable.default()
    if backends is None:
        backends = table.backends("linear", precision) or (default.backend,)
    for backend in backends:
        if backend not in ("cpp", "torch") or (backend == "cpp" and library is None):
            raise BadTile("linear: backend", backend, _backends_here(library), "run `paretune doctor` for the reason")
    if default.backend not in backends:
        default = Tile("linear", backends[0])
    chosen = tuple(table.lookup("linear", precision, 1 << exponent) or default for exponent in range(_BUCKETS))
    for tile in chosen:
        _check_tile(tile, backends, library)

    channel_scale = None if stored.channel_scale is None else stored.channel_scale.contiguous()
    bias = None if bias is None else bias.detach().float().contiguous()
    panels = zero_sum = descriptor = None
    address = 0
    if "cpp" in backends and library is not None:
        panels = on_huge_pages(panels_of(stored, library.panel))
        if precision == "int8":
            zero_sum = (stored.values.sum(dim=1, dtype=torch.int32) * 128).contiguous()
        descriptor = _Weight(
            panels.data_ptr(), _address(channel_scale), _address(zero_sum), _address(bias), out_features, in_features,
            PRECISIONS.index(precision),
        )  # fmt: skip
        address = ctypes.addressof(descriptor)
    held = rows_of(stored) if "torch" in backends else None
    group_scale = stored.group_scale if "torch" in backends else None
    return PackedLinear(
        precision, out_features, in_features, chosen, panels, held, group_scale, channel_scale, bias, zero_sum,
        descriptor, address,
    )  # fmt: skip


def retile(packed: PackedLinear, tiles: TileTable) -> PackedLinear:
    """The same packed weight, computed with other tiles; nothing is copied.

    Raises BadTile: a tile whose backend wants the weight in a layout that is not there.
    """
    if packed.weight is not None and placement.on_gpu(packed.weight):
        from . import gpu_linear

        return gpu_linear.retiled(packed, tiles)
    held = [name for name, layout in (("cpp", packed.panels), ("torch", packed.weight)) if layout is not None]
    library = load()
    default = Tile("linear", held[0])
    chosen = tuple(tiles.lookup("linear", packed.precision, 1 << exponent) or default for exponent in range(_BUCKETS))
    for tile in chosen:
        _check_tile(tile, tuple(held), library)
    return replace(packed, tiles=chosen)


def descriptors(weights: Sequence[PackedLinear]) -> ctypes.Array[_Weight]:
    """What C++ operators that take several weights read, one after the other; valid as long as the weights live.

    All of them were packed for C++.
    """
    return (_Weight * len(weights))(*(packed._descriptor for packed in weights if packed._descriptor is not None))


def linear(x: Tensor, packed: PackedLinear, tile: Tile | None = None) -> Tensor:
    """x (M, in) @ weight.T + bias -> (M, out), dtype of x.

    Args:
        x: (M, in_features) fp32 or bf16, rows contiguous; M may be 0.
        packed: from `pack`.
        tile: left out: the one that `packed` holds for this M.
    Within 1e-5 (fp32), 1e-2 (bf16) of reference() relative to the largest output for N(0, 1) inputs.
    Raises ValueError: x has another shape or dtype; BadTile: the tile's backend was not packed.
    On a GPU x may be fp16, too; what is exact there, gpu_linear.py says.
    """
    if placement.on_gpu(x):
        from . import gpu_linear

        return gpu_linear.linear(x, packed, tile)
    if x.ndim != 2 or x.shape[1] != packed.in_features or x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"linear: x is {tuple(x.shape)} {x.dtype}, not (M, {packed.in_features}) float32 or bfloat16")
    rows = x.shape[0]
    if tile is None:
        tile = packed.tiles[(rows - 1).bit_length() if rows else 0]
    if tile.backend != "cpp" or packed.panels is None:
        return _linear_torch(x, packed, tile)
    if x.stride(1) != 1:
        x = x.contiguous()
    out = x.new_empty((rows, packed.out_features))
    library = load()
    assert library is not None
    arguments = (
        packed._descriptor_address, x.data_ptr(), x.dtype is torch.bfloat16, x.stride(0), rows, out.data_ptr(),
        *tile.arguments,
    )  # fmt: skip
    threads = torch.get_num_threads()
    needed = library.linear(*arguments, WORKSPACE.address, WORKSPACE.nbytes, threads)
    if needed > 0:
        WORKSPACE.grow(needed)
        needed = library.linear(*arguments, WORKSPACE.address, WORKSPACE.nbytes, threads)
    if needed < 0:
        _check_tile(tile, ("cpp",), library)
    return out


def _linear_torch(x: Tensor, packed: PackedLinear, tile: Tile) -> Tensor:
    if tile.backend != "torch" or packed.weight is None:
        held = [name for name, layout in (("cpp", packed.panels), ("torch", packed.weight)) if layout is not None]
        raise BadTile("linear: backend", tile.backend, ", ".join(held), "pack the weight with this backend")
    arithmetic = WEIGHT_FORMATS[packed.precision].arithmetic
    dtype = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    if packed.weight.dtype is dtype:
        bias = None if packed.bias is None else packed.bias.to(dtype)
        return functional.linear(x.to(dtype), packed.weight, bias).to(x.dtype)
    scale, multiplied = packed.channel_scale, x
    if arithmetic == "int8":
        multiplied, row_scale = quantize_int8(x)
        scale = row_scale[:, None] if scale is None else row_scale[:, None] * scale
    if packed.precision == "int8":
        out = torch._int_mm(multiplied, packed.weight.t()).float()
    else:
        out = _through_expanded(multiplied.to(dtype), packed).float()
    out = out if scale is None else out * scale
    return (out if packed.bias is None else out + packed.bias).to(x.dtype)


def _through_expanded(x: Tensor, packed: PackedLinear) -> Tensor:
    """x @ the weight without its channel scales, which is never expanded whole."""
    assert packed.weight is not None
    parts = []
    for at in range(0, packed.out_features, _EXPANDED_ROWS):
        cut = slice(at, at + _EXPANDED_ROWS)
        scale = None if packed.group_scale is None else packed.group_scale[cut]
        stored = stored_rows(packed.precision, packed.weight[cut], scale, packed.in_features)
        parts.append(functional.linear(x, stored.expanded(torch.float32).to(x.dtype)))
    return torch.cat(parts, dim=1)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _backends_here(library: Library | None) -> str:
    return "torch" if library is None else "cpp, torch"


def _check_tile(tile: Tile, backends: tuple[str, ...], library: Library | None) -> None:
    if tile.operator != "linear" or tile.backend not in backends:
        found = f"{tile.operator} on {tile.backend}"
        raise BadTile("linear: tile", found, f"linear on {', '.join(backends)}", "pack with the backends of its tiles")
    if tile.backend == "cpp" and library is not None and tile.get("row_tile") > library.max_row_tile:
        allowed = f"0 to {library.max_row_tile} with {library.instructions}"
        raise BadTile("linear: row_tile", tile.get("row_tile"), allowed, "search tiles on this machine")
