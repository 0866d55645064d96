"""A step on a GPU: the tensors of a `Batch`, in one copy from pinned memory, at places that a CUDA graph can know."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels import placement
from ..kernels.gpu_lora import RowTiles, most_tile_places, tile_rows
from .batch import Batch
from .spec import Pool

_cuda: Any = torch.cuda  # its classes have no annotations
_NO_SLOT = -1
_ALIGNED = 4  # int32 places: of addresses that are no multiple of 16 bytes Triton makes, and compiles, other kernels
_MOST_PARTS = 16


class DeviceBatch:
    """The tensors of one step under the names of `Batch`, all int32, on the device; `copies` stays on the host.

    All of them lie one after the other in one buffer, each on a multiple of 16 bytes, in an order and of sizes that
    follow from the numbers of tokens, rows and blocks alone: the views of a padded decode step of n rows are the same
    memory each time.

    max_query_rows   most tokens of one request
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    context_len: Tensor
    length: Tensor
    head_rows: Tensor
    block_tables: Tensor
    copies: Tensor
    head: int
    adapter_rows: RowTiles | None
    head_adapter_rows: RowTiles | None
    decode_only: bool
    max_query_rows: int

    def __init__(self, pool: Pool, device: torch.device) -> None:
        tokens, rows = pool.max_num_batched_tokens, pool.max_num_seqs
        self._width = -(-pool.max_model_len // pool.block_size)
        places = 4 * tokens + 3 * rows + 1 + rows * self._width
        places += 2 * most_tile_places(tokens, pool.max_loras) if pool.max_loras else 0
        places += _MOST_PARTS * _ALIGNED
        self._on_gpu = placement.on_gpu(device)
        pinned = device.type == "cuda"
        self._host = torch.zeros(places, dtype=torch.int32, pin_memory=pinned)
        self._places: NDArray[np.int32] = self._host.numpy()
        self._device = torch.zeros(places, dtype=torch.int32, device=device)
        self._copied = _cuda.Event() if pinned else None
        self._used = 0

    def take(self, batch: Batch, padded_rows: int | None = None) -> None:
        """Take over a step that `batch` has read.

        Args:
            padded_rows: of a step of pure decoding: fill up to so many with rows that write no cache, read none, and
                are nobody's answer; the block tables are as wide as they get.
        """
        if self._copied is not None:
            self._copied.synchronize()  # the copy of the step before has read the pinned memory
        rows, width = batch.block_tables.shape
        missing = 0 if padded_rows is None else padded_rows - rows
        self._used = 0
        self.token_ids = self._put(batch.token_ids, missing, 0)
        self.positions = self._put(batch.positions, missing, 0)
        self.slot_mapping = self._put(batch.slot_mapping, missing, _NO_SLOT)
        self.context_len = self._put(batch.context_len, missing, 0)
        self.length = self._put(batch.length, missing, 0)
        heads = batch.head_rows.shape[0]
        self.head_rows = self._put(batch.head_rows, 0 if padded_rows is None else padded_rows - heads, 0)
        wide = width if padded_rows is None else self._width
        self.block_tables = self._put_tables(batch.block_tables, rows + missing, wide)
        self.query_start = self._put(batch.query_start, 0, 0)
        self.adapter_rows = self.head_adapter_rows = None
        if batch.adapter_rows is not None:
            self.adapter_rows = RowTiles(*(self._put(each, 0, 0) for each in tile_rows(batch.adapter_rows)))
        if batch.head_adapter_rows is not None:
            self.head_adapter_rows = RowTiles(*(self._put(each, 0, 0) for each in tile_rows(batch.head_adapter_rows)))
        self.copies, self.head, self.decode_only = batch.copies, batch.head, batch.decode_only
        self.max_query_rows = int(np.diff(batch.query_start.numpy()).max(initial=0))
        self._device.narrow(0, 0, self._used).copy_(self._host.narrow(0, 0, self._used), non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _put(self, values: Tensor, missing: int, filler: int) -> Tensor:
        count = values.shape[0]
        first = self._room(count + missing)
        self._places[first : first + count] = values.numpy()
        self._places[first + count : first + count + missing] = filler
        return self._device.narrow(0, first, count + missing)

    def _put_tables(self, tables: Tensor, rows: int, width: int) -> Tensor:
        first = self._room(rows * width)
        places = self._places[first : first + rows * width].reshape(rows, width)
        places[: tables.shape[0], : tables.shape[1]] = tables.numpy()
        return self._device.narrow(0, first, rows * width).view(rows, width)

    def _room(self, places: int) -> int:
        """Where the next part begins."""
        first = self._used
        self._used += -(-places // _ALIGNED) * _ALIGNED
        return first
