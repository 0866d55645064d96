"""Decode steps captured as CUDA graphs, one for each of a few numbers of rows: a smaller step is padded and replayed.

Launching a step's kernels one by one costs the host more time than a GPU needs to decode a small batch; replaying a
graph launches them all at once. A graph holds addresses and grids, so it reads its batch from the same memory each time
(device_batch.py), and the kernels take lengths from there and not from their grid (kernels/triton_decode_attention.py).
Padding rows write no cache and read none. Steps with a prompt, an adapter, or more rows than the largest size are
launched kernel by kernel. What it brings on an NVIDIA H200: benchmarks/results/gpu.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .device_batch import DeviceBatch
from .graph_sizes import padded_rows

_cuda: Any = torch.cuda  # its classes have no annotations
_WARM_UPS = 2  # cuBLAS, Triton and NCCL set themselves up at their first calls, which no capture may hold


class Recorded(NamedTuple):
    """A step that can be computed again on what its batch then holds; the result is the same memory each time."""

    replay: Callable[[], None]
    result: Tensor


class CudaRecorder:
    """Captures with one memory pool for all graphs: only one of them runs at a time.

    Args:
        wait: returns when the GPU has done what it was given, and raises where that will never be.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> Recorded:
        side = _cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(side)
        self._wait()
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog queries events from its own thread, which "global" would take for an error of this capture
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = compute()
        return Recorded(graph.replay, result)


class DecodeGraphs:
    """The captured steps of one rank. Every rank of a replica captures and replays the same ones, in one order.

    capture_s   seconds that capturing all of them took; 0 before
    """

    def __init__(self, sizes: Sequence[int], batch: DeviceBatch, forward: Callable[[DeviceBatch], Tensor]) -> None:
        self.sizes = tuple(sizes)
        self.capture_s = 0.0
        self._batch, self._forward = batch, forward
        self._recorded: dict[int, Recorded] = {}

    def capture(self, empty: Batch, record: Callable[[Callable[[], Tensor]], Recorded]) -> None:
        """Capture all sizes, the largest first, whose memory the others then share, that of its logits too.

        Args:
            empty: a step without a row: padded, it is nothing but padding.
        """
        started_s = time.perf_counter()
        for size in reversed(self.sizes):
            self._batch.take(empty, size)
            if size == self.sizes[-1]:
                self._recorded[size] = record(lambda: self._forward(self._batch))
            else:
                shared = self._recorded[self.sizes[-1]].result.narrow(0, 0, size)
                self._recorded[size] = record(partial(self._forward_into, shared))
        self.capture_s = time.perf_counter() - started_s

    def _forward_into(self, shared: Tensor) -> Tensor:
        return shared.copy_(self._forward(self._batch))

    def run(self, batch: Batch) -> Tensor | None:
        """The logits (head rows, vocabulary) of a step; None: it is not captured. The next step overwrites them."""
        rows, heads = batch.length.shape[0], batch.head_rows.shape[0]
        size = padded_rows(self.sizes, rows)
        if size not in self._recorded or not batch.decode_only or batch.adapter_rows is not None or rows == 0:
            return None
        self._batch.take(batch, size)
        recorded = self._recorded[size]
        recorded.replay()
        return recorded.result.narrow(0, 0, heads)
