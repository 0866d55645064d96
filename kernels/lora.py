"""Low-rank adapters of one base, many in one step: y[row] += scale * (x[row] @ A.T) @ B.T, A and B of the adapter
that the row names.

LoRA (Hu et al., arXiv:2106.09685). That rows of one batch may each name another adapter, gathered by an index, is
Punica's BGMV and SGMV (Chen et al., arXiv:2310.18547) as S-LoRA serves them (Sheng et al., arXiv:2311.03285): the
base's product is computed once for all rows, and what is added costs the bytes of the adapters in the step.

An adapter is packed once (`pack_adapter`) and lies in a slot of a `LoraSlots` while it is in use. A matrix may be
several of the checkpoint's side by side (q, k and v; gate and up): each is a part of it, with its own A, B and scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cpu.build import Library, load
from .cpu.huge_pages import zeros_on_huge_pages
from .jit import njit

MAX_RANK = 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BACKENDS = ("cpp", "torch")
# lora.cpp: Part. While packed, a and b are offsets from the start of the adapter's bytes.
_PART = np.dtype(
    [("a", "u8"), ("b", "u8"), ("first", "i8"), ("channels", "i8"), ("rank", "i8"), ("scale", "f4"), ("unused", "i4")]
)


class Matrix(NamedTuple):
    """One matrix that adapters may change: (sum of parts, in_features), its parts side by side in the output."""

    in_features: int
    parts: tuple[int, ...]


class Delta(NamedTuple):
    """What an adapter adds to one part: scale * b @ a; a (rank, in_features), b (channels, rank), any float dtype."""

    a: Tensor
    b: Tensor
    scale: float


class AdapterRows(NamedTuple):
    """The rows of a step that have an adapter, those of one adapter side by side. All int32.

    row (n,) place in x and y · start (groups + 1,) · slot (groups,)
    Group g is row[start[g] : start[g + 1]], and its adapter lies in slot[g].
    """

    row: Tensor
    start: Tensor
    slot: Tensor


@njit
def sort_by_slot(
    slot_of_row: NDArray[np.int32],
    counts: NDArray[np.int32],
    row: NDArray[np.int32],
    start: NDArray[np.int32],
    slot: NDArray[np.int32],
) -> int:
    """Fill the arrays of AdapterRows; returns the number of groups.

    Args:
        slot_of_row: (T,) -1 where a row has no adapter.
        counts: (slots,) scratch.
        row, start, slot: at least (T,), (slots + 1,), (slots,).
    """
    counts[:] = 0
    for at in range(slot_of_row.shape[0]):
        if slot_of_row[at] >= 0:
            counts[slot_of_row[at]] += 1
    groups = 0
    place = 0
    for its in range(counts.shape[0]):
        if counts[its] > 0:
            slot[groups] = its
            start[groups] = place
            place += counts[its]
            counts[its] = start[groups]  # from here on: where its next row goes
            groups += 1
    start[groups] = place
    for at in range(slot_of_row.shape[0]):
        its = slot_of_row[at]
        if its >= 0:
            row[counts[its]] = at
            counts[its] += 1
    return groups


def adapter_rows(slot_of_row: NDArray[np.int32], num_slots: int) -> AdapterRows | None:
    """AdapterRows of (T,) slots; None where no row has an adapter."""
    row, start, slot = (np.zeros(n, np.int32) for n in (len(slot_of_row), num_slots + 1, num_slots))
    groups = sort_by_slot(slot_of_row, np.zeros(num_slots, np.int32), row, start, slot)
    if groups == 0:
        return None
    arrays = row[: start[groups]], start[: groups + 1], slot[:groups]
    return AdapterRows(*(torch.from_numpy(array) for array in arrays))


def reference(x: Tensor, y: Tensor, slot_of_row: Sequence[int], deltas: Sequence[Mapping[int, Delta]],
              parts: tuple[int, ...]) -> Tensor:  # fmt: skip
    """y with every row's own delta added, in float64: the oracle.

    Args:
        x: (T, in_features). y: (T, sum of parts).
        slot_of_row: -1 where a row has no adapter.
        deltas: by slot, then by part.
    """
    out = y.double().clone()
    starts = [sum(parts[:part]) for part in range(len(parts))]
    for row, slot in enumerate(slot_of_row):
        for part, delta in deltas[slot].items() if slot >= 0 else ():
            added = delta.scale * (x[row].double() @ delta.a.double().T) @ delta.b.double().T
            out[row, starts[part] : starts[part] + parts[part]] += added
    return out


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter's deltas of all matrices in the layout of one backend: bytes that are copied into a slot as they are.

    content  (n,) uint8
    parts    (matrices, most parts) of the C++ side's Part, a and b as offsets into content; rank 0 where there is none
    """

    backend: str
    dtype: torch.dtype
    content: Tensor
    parts: NDArray[np.void]

    @property
    def nbytes(self) -> int:
        """Bytes in memory, and in a slot."""
        return self.content.nbytes


def pack_adapter(
    deltas: Mapping[tuple[int, int], Delta], matrices: Sequence[Matrix], precision: str, *, backend: str | None = None
) -> PackedAdapter:
    """Lay out an adapter.

    Args:
        deltas: by (matrix, part); what is absent the adapter leaves alone.
        precision: "fp32" or "bf16", of A and B; sums are fp32, and the scale is applied to them.
    Raises ValueError: shapes that do not fit the matrices, a rank beyond MAX_RANK.
    """
    library = _library(backend)
    dtype = DTYPES[precision]
    parts = np.zeros((len(matrices), max(len(matrix.parts) for matrix in matrices)), _PART)
    pieces: list[Tensor] = []
    place = 0
    for (matrix, part), (a, b, scale) in sorted(deltas.items()):
        shape = matrices[matrix]
        rank, channels = a.shape[0], shape.parts[part]
        if a.shape != (rank, shape.in_features) or b.shape != (channels, rank) or not 1 <= rank <= MAX_RANK:
            found = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
            raise ValueError(f"lora: {found}, not (r, {shape.in_features}) and ({channels}, r) with r <= {MAX_RANK}")
        packed = (a.to(dtype), b.to(dtype))
        if library is not None:
            packed = _pack_a(packed[0], library), _pack_b(packed[1], library)
        flat = [piece.contiguous().view(torch.uint8).flatten() for piece in packed]
        first = sum(shape.parts[:part])
        parts[matrix, part] = (place, place + len(flat[0]), first, channels, rank, scale, 0)
        pieces += flat
        place += len(flat[0]) + len(flat[1])
    content = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.uint8)
    return PackedAdapter("torch" if library is None else "cpp", dtype, content, parts)


def _pack_a(a: Tensor, library: Library) -> Tensor:
    """(rank, in) -> flat [rank / ranks][in / lanes][ranks][lanes]; of the last group only the ranks that are there."""
    rank, in_features = a.shape
    steps = -(-in_features // library.lanes)
    padded = torch.zeros((rank, steps * library.lanes), dtype=a.dtype)
    padded[:, :in_features] = a
    whole = rank // library.lora_ranks * library.lora_ranks
    cut = padded.view(rank, steps, library.lanes)
    groups = cut[:whole].view(-1, library.lora_ranks, steps, library.lanes).permute(0, 2, 1, 3)
    return torch.cat([groups.flatten(), cut[whole:].permute(1, 0, 2).flatten()])


def _pack_b(b: Tensor, library: Library) -> Tensor:
    """(channels, rank) -> flat [channels / panel][rank][panel]."""
    channels, rank = b.shape
    panels = -(-channels // library.panel)
    padded = torch.zeros((panels * library.panel, rank), dtype=b.dtype)
    padded[:channels] = b
    return padded.view(panels, library.panel, rank).permute(0, 2, 1).flatten()


def slot_bytes(matrices: Sequence[Matrix], max_rank: int, precision: str) -> int:
    """Most bytes that an adapter of rank max_rank on every part takes, packed by any backend."""
    values = 0
    for in_features, parts in matrices:
        values += sum(_up(in_features, 16) + _up(channels, 32) for channels in parts)
    return values * max_rank * DTYPES[precision].itemsize


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class LoraSlots:
    """Places for packed adapters, on huge pages where Linux gives them; memory is taken only as slots are filled.

    Args:
        matrices: as the adapters were packed for.
        num_slots: adapters that may take part in one step.
        max_rank: of their parts.
        precision: "fp32" or "bf16".
        backend: left out: C++, torch where there is no compiler.
    """

    def __init__(
        self, matrices: Sequence[Matrix], num_slots: int, max_rank: int, precision: str, *, backend: str | None = None
    ) -> None:
        self.num_slots = num_slots
        self._matrices = tuple(matrices)
        self._library = _library(backend)
        self._dtype = DTYPES[precision]
        self._max_rank = max_rank
        size = _up(slot_bytes(matrices, max_rank, precision), 64)
        self._memory = zeros_on_huge_pages((num_slots, size), torch.uint8)
        width = max(len(matrix.parts) for matrix in matrices)
        self._table = np.zeros((len(matrices), num_slots, width), _PART)
        self._table_address = [self._table[matrix].ctypes.data for matrix in range(len(matrices))]
        self._touched = np.zeros((num_slots, len(matrices)), np.bool_)
        self._anybody = [False] * len(matrices)

    def put(self, slot: int, adapter: PackedAdapter) -> None:
        """Fill a slot; what lay there is gone. No step that reads it may be under way.

        Raises ValueError: packed for another backend or dtype, or of a higher rank than the slots are for.
        """
        backend = "torch" if self._library is None else "cpp"
        if (adapter.backend, adapter.dtype) != (backend, self._dtype):
            found = f"{adapter.backend} {adapter.dtype}"
            raise ValueError(f"lora: an adapter packed for {found}, a slot of {backend} {self._dtype}")
        if adapter.parts["rank"].max() > self._max_rank:
            raise ValueError(f"lora: an adapter of rank {adapter.parts['rank'].max()}, slots of rank {self._max_rank}")
        self._memory[slot, : adapter.nbytes] = adapter.content
        rows = adapter.parts.copy()
        base = self._memory[slot].data_ptr()
        rows["a"] += base
        rows["b"] += base
        self._table[:, slot] = rows
        self._touched[slot] = (adapter.parts["rank"] > 0).any(axis=1)
        self._anybody = list(map(bool, np.logical_or.reduce(self._touched)))

    def add(self, matrix: int, x: Tensor, y: Tensor, rows: AdapterRows) -> None:
        """y += every row's own delta of this matrix, IN PLACE.

        Args:
            x: (T, in_features) fp32, rows contiguous.
            y: (T, sum of parts) fp32, rows contiguous. Rows and parts without an adapter are not touched.
        Within 1e-5 of reference() relative to the largest output for N(0, 1) inputs; the same bits for a row whatever
        rows stand beside it.
        Raises ValueError: x or y has another shape or dtype.
        """
        if not self._anybody[matrix]:
            return
        in_features, parts = self._matrices[matrix]
        tokens = x.shape[0]
        if x.shape != (tokens, in_features) or y.shape != (tokens, sum(parts)) or x.dtype != torch.float32:
            raise ValueError(f"lora: x {tuple(x.shape)} {x.dtype} and y {tuple(y.shape)} for {in_features} -> {parts}")
        if y.dtype != torch.float32 or y.stride(1) != 1:
            raise ValueError(f"lora: y is {y.dtype} with strides {y.stride()}, not float32 with contiguous rows")
        if self._library is None:
            self._add_torch(matrix, x, y, rows)
            return
        if x.stride(1) != 1:
            x = x.contiguous()
        self._library.lora(
            self._table_address[matrix], self._table.shape[2], self._dtype is torch.bfloat16, x.data_ptr(), x.stride(0),
            in_features, y.data_ptr(), y.stride(0), rows.row.data_ptr(), rows.start.data_ptr(), rows.slot.data_ptr(),
            len(rows.slot), torch.get_num_threads(),
        )  # fmt: skip

    def _add_torch(self, matrix: int, x: Tensor, y: Tensor, rows: AdapterRows) -> None:
        starts = rows.start.tolist()
        for slot, first, last in zip(rows.slot.tolist(), starts, starts[1:]):
            its = rows.row[first:last].long()
            base = self._memory[slot].data_ptr()
            for part in self._table[matrix, slot]:
                rank, channels = int(part["rank"]), int(part["channels"])
                if rank:
                    a = self._stored(slot, int(part["a"]) - base, rank, x.shape[1])
                    b = self._stored(slot, int(part["b"]) - base, channels, rank)
                    added = float(part["scale"]) * (x[its] @ a.T) @ b.T
                    y[its, int(part["first"]) : int(part["first"]) + channels] += added

    def _stored(self, slot: int, offset: int, rows: int, columns: int) -> Tensor:
        nbytes = rows * columns * self._dtype.itemsize
        return self._memory[slot, offset : offset + nbytes].view(self._dtype).view(rows, columns).float()


def _library(backend: str | None) -> Library | None:
    library = load()
    if backend is None:
        return library
    if backend not in BACKENDS or (backend == "cpp" and library is None):
        raise ValueError(f"backend {backend!r} is not one of {BACKENDS[library is None :]}")
    return library if backend == "cpp" else None
