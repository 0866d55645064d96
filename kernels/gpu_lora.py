"""Many adapters in one step on an NVIDIA GPU: what `lora.py` does, for steps whose tensors lie there.

Which rows have which adapter is known on the host, so their tiles are made there and travel with the step: nothing
waits for the GPU. The kernels are in triton_lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .lora import AdapterRows, Matrix, PackedAdapter

BLOCK_ROWS = 16  # of one adapter in one program: the least that tensor cores multiply
_LEAST_RANK = 16


class RowTiles(NamedTuple):
    """The rows of a step that have an adapter, in tiles of at most BLOCK_ROWS rows of one adapter. All int32.

    row (n,) place in x and y · start, end (tiles,) the rows of a tile are row[start : end] · slot (tiles,) its adapter
    """

    row: Tensor
    start: Tensor
    end: Tensor
    slot: Tensor


def most_tile_places(rows: int, groups: int) -> int:
    """Most numbers in a RowTiles of so many rows in so many groups."""
    return rows + 3 * (rows // BLOCK_ROWS + groups)


def tile_rows(rows: AdapterRows) -> RowTiles:
    """On the device of `rows`, which is the host's while a step is made."""
    sizes = rows.start[1:] - rows.start[:-1]
    tiles = (sizes + BLOCK_ROWS - 1) // BLOCK_ROWS
    group = torch.repeat_interleave(torch.arange(len(sizes), device=rows.start.device), tiles)
    before = torch.cumsum(tiles, 0) - tiles
    start = rows.start[:-1][group] + (torch.arange(len(group), device=rows.start.device) - before[group]) * BLOCK_ROWS
    end = torch.minimum(start + BLOCK_ROWS, rows.start[1:][group])
    return RowTiles(rows.row, start.to(torch.int32), end.to(torch.int32), rows.slot[group])


class GpuLoraSlots:
    """Places for adapters on a GPU: A and B of each part of each matrix, all slots stacked, ranks padded with zeros.

    Args:
        matrices, num_slots, max_rank: as LoraSlots has them.
        dtype: of the activations, which A and B are converted to.
        device: where they lie.
    """

    def __init__(
        self, matrices: Sequence[Matrix], num_slots: int, max_rank: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_slots = num_slots
        rank = _LEAST_RANK
        while rank < max_rank:
            rank *= 2

        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        self._matrices = tuple(matrices)
        self._a = [[zeros(num_slots, rank, matrix.in_features) for _ in matrix.parts] for matrix in matrices]
        self._b = [[zeros(num_slots, channels, rank) for channels in matrix.parts] for matrix in matrices]
        self._scale = [[zeros(num_slots, of=torch.float32) for _ in matrix.parts] for matrix in matrices]
        self._there = [[[False] * num_slots for _ in matrix.parts] for matrix in matrices]

    def put(self, slot: int, adapter: PackedAdapter) -> None:
        """Fill a slot, in the order of the steps; what lay there is gone.

        Raises ValueError: packed for another backend.
        """
        if adapter.backend != "torch":
            raise ValueError(f"lora: an adapter packed for {adapter.backend}, a slot on a GPU wants torch's layout")
        for matrix, (in_features, parts) in enumerate(self._matrices):
            for part, channels in enumerate(parts):
                row = adapter.parts[matrix, part]
                rank = int(row["rank"])
                self._there[matrix][part][slot] = rank > 0
                a, b = self._a[matrix][part].select(0, slot).zero_(), self._b[matrix][part].select(0, slot).zero_()
                if rank:
                    a.narrow(0, 0, rank).copy_(_stored(adapter, int(row["a"]), rank, in_features))
                    b.narrow(1, 0, rank).copy_(_stored(adapter, int(row["b"]), channels, rank))
                    self._scale[matrix][part].select(0, slot).fill_(float(row["scale"]))

    def add(self, matrix: int, x: Tensor, y: Tensor, rows: RowTiles) -> None:
        """y += every row's own delta of this matrix, IN PLACE; x (T, in_features), y (T, sum of parts)."""
        from .triton_lora import lora

        first = 0
        for part, channels in enumerate(self._matrices[matrix].parts):
            if any(self._there[matrix][part]):
                lora(x, y, self._a[matrix][part], self._b[matrix][part], self._scale[matrix][part], rows, first=first)
            first += channels


def _stored(adapter: PackedAdapter, offset: int, rows: int, columns: int) -> Tensor:
    nbytes = rows * columns * adapter.dtype.itemsize
    return adapter.content[offset : offset + nbytes].view(adapter.dtype).view(rows, columns)
