"""Linear layers: y = x @ weight.T + bias, with weights in fp32, bf16 or int8.

Activations may be fp32 or bf16 whatever the weights are; sums are fp32 (int32 for int8) and the result has the dtype of
x. On the CPU keep activations fp32 between operators: the C++ kernel rounds a panel of rows to bf16 while it packs it,
which costs less than a pass of its own.

int8 is w8a8, symmetric: one scale per output channel, fixed when packed, and one per row of x, found at run time
(dynamic quantization; Dettmers et al., "LLM.int8()", arXiv:2208.07339, without its outlier split).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from .cpu.build import Library, load
from .cpu.workspace import WORKSPACE
from .tiles import PRECISIONS, BadTile, Tile, TileTable

ACTIVATION_DTYPES = (torch.float32, torch.bfloat16)
MAX_IN_FEATURES_INT8 = 65536  # int32 sums of 255 * 127 products stay below 2**31
_BUCKETS = 33
_HUGE_PAGE_BYTES = 2 << 20


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, in) @ weight (out, in).T + bias in float64: the oracle."""
    return functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


def quantize_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded to int8 in [-127, 127], and the scale of each row: values ~ int8 * scale[:, None]."""
    values = values.float()
    scale = values.abs().amax(dim=1) / 127
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return (values * inverse[:, None]).round().clamp(-127, 127).to(torch.int8), scale


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

    precision          "fp32", "bf16" or "int8"
    out_features, in_features
    tiles              Tile for each power-of-two bucket of M, index = exponent
    panels             C++ layout (out/P, in/g, P, g), P = 2 vector registers of channels, g = 1 (fp32), 2 (bf16), 4
    (int8) weight             torch layout (out, in), for the backend "torch"
    channel_scale      (out,) fp32, int8 only
    bias               (out,) fp32 or None
    """

    precision: str
    out_features: int
    in_features: int
    tiles: tuple[Tile, ...]
    panels: Tensor | None
    weight: Tensor | None
    channel_scale: Tensor | None
    bias: Tensor | None
    _zero_sum: Tensor | None = field(repr=False)
    _descriptor: _Weight | None = field(repr=False)
    _descriptor_address: int = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, of all layouts it holds."""
        held = (self.panels, self.weight, self.channel_scale, self.bias, self._zero_sum)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def pack(
    weight: Tensor,
    precision: str,
    *,
    bias: Tensor | None = None,
    tiles: TileTable | None = None,
    backends: tuple[str, ...] | None = None,
) -> PackedLinear:
    """Lay out a weight (out, in) of any float dtype for the CPU, rounding it to `precision`.

    The layouts kept in memory are those of `backends`; left out: what `tiles` names for this precision, and C++ (torch
    where there is no compiler) if it names nothing.

    Raises BadTile: unknown precision or backend, a backend that this machine lacks, a shape that cannot be packed.
    """
    if precision not in PRECISIONS:
        raise BadTile("linear: precision", precision, ", ".join(PRECISIONS), "correct the precision")
    if weight.ndim != 2 or 0 in weight.shape or not weight.is_floating_point():
        found = f"{tuple(weight.shape)} {weight.dtype}"
        raise BadTile("linear: weight", found, "a non-empty (out, in) float tensor", "pass the weight matrix")
    out_features, in_features = weight.shape
    if bias is not None and bias.shape != (out_features,):
        raise BadTile("linear: bias", tuple(bias.shape), f"({out_features},)", "pass one number per output channel")
    if precision == "int8" and in_features > MAX_IN_FEATURES_INT8:
        raise BadTile("linear: in_features", in_features, f"<= {MAX_IN_FEATURES_INT8} for int8", "use bf16")
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

    channel_scale = None
    if precision == "int8":
        stored, channel_scale = quantize_int8(weight)
    else:
        stored = weight.detach().to(torch.float32 if precision == "fp32" else torch.bfloat16)
    bias = None if bias is None else bias.detach().float().contiguous()
    panels = zero_sum = descriptor = None
    address = 0
    if "cpp" in backends and library is not None:
        panels = _panels(stored, library.panel, {"fp32": 1, "bf16": 2, "int8": 4}[precision])
        if precision == "int8":
            zero_sum = (stored.to(torch.int32).sum(dim=1, dtype=torch.int32) * 128).contiguous()
        descriptor = _Weight(
            panels.data_ptr(), _address(channel_scale), _address(zero_sum), _address(bias), out_features, in_features,
            PRECISIONS.index(precision),
        )  # fmt: skip
        address = ctypes.addressof(descriptor)
    return PackedLinear(
        precision, out_features, in_features, chosen, panels, stored.contiguous() if "torch" in backends else None,
        channel_scale, bias, zero_sum, descriptor, address,
    )  # fmt: skip


def retile(packed: PackedLinear, tiles: TileTable) -> PackedLinear:
    """The same packed weight, computed with other tiles; nothing is copied.

    Raises BadTile: a tile whose backend wants the weight in a layout that is not there.
    """
    held = [name for name, layout in (("cpp", packed.panels), ("torch", packed.weight)) if layout is not None]
    library = load()
    default = Tile("linear", held[0])
    chosen = tuple(tiles.lookup("linear", packed.precision, 1 << exponent) or default for exponent in range(_BUCKETS))
    for tile in chosen:
        _check_tile(tile, tuple(held), library)
    return replace(packed, tiles=chosen)


def linear(x: Tensor, packed: PackedLinear, tile: Tile | None = None) -> Tensor:
    """x (M, in) @ weight.T + bias -> (M, out), dtype of x.

    Args:
        x: (M, in_features) fp32 or bf16, rows contiguous; M may be 0.
        packed: from `pack`.
        tile: left out: the one that `packed` holds for this M.
    Within 1e-5 (fp32), 1e-2 (bf16) of reference() relative to the largest output for N(0, 1) inputs.
    Raises ValueError: x has another shape or dtype; BadTile: the tile's backend was not packed.
    """
    if x.ndim != 2 or x.shape[1] != packed.in_features or x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"linear: x is {tuple(x.shape)} {x.dtype}, not (M, {packed.in_features}) float32 or bfloat16")
    rows = x.shape[0]
    if tile is None:
        tile = packed.tiles[(rows - 1).bit_length() if rows else 0]
    if tile.backend != "cpp" or packed.panels is None:
        return _linear_torch(x, packed, tile)
    if x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty((rows, packed.out_features), dtype=x.dtype)
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
    if packed.precision == "int8":
        assert packed.channel_scale is not None
        quantized, row_scale = quantize_int8(x)
        total = torch._int_mm(quantized, packed.weight.t()).float()
        out = total * row_scale[:, None] * packed.channel_scale
        return (out if packed.bias is None else out + packed.bias).to(x.dtype)
    bias = None if packed.bias is None else packed.bias.to(packed.weight.dtype)
    return functional.linear(x.to(packed.weight.dtype), packed.weight, bias).to(x.dtype)


def _panels(stored: Tensor, panel: int, group: int) -> Tensor:
    """(out, in) -> (out/panel, in/group, panel, group), padded with zeros."""
    out_features, in_features = stored.shape
    shape = (-(-out_features // panel), panel, -(-in_features // group), group)
    padded = torch.zeros((shape[0] * panel, shape[2] * group), dtype=stored.dtype)
    padded[:out_features, :in_features] = stored
    panels = _empty_on_huge_pages(padded.nbytes).view(stored.dtype)
    ordered = panels.view(shape[0], shape[2], panel, group)
    ordered.copy_(padded.view(shape).permute(0, 2, 1, 3))
    return ordered


def _empty_on_huge_pages(nbytes: int) -> Tensor:
    """Bytes on 2 MB pages where Linux gives them: decoding reads all weights per token, and the page walks cost 10-30 %
    of it (201 M parameters, batch 1, Zen 4)."""
    if nbytes < 2 * _HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


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
