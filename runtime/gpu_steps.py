"""What a rank on a GPU does with a step: the batch over, the layers captured or kernel by kernel, the result back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .batch import ALL_LOGITS, ARGMAX, Batch
from .decode_graphs import CudaRecorder, DecodeGraphs, Recorded
from .device_batch import DeviceBatch
from .graph_sizes import captured_sizes
from .parallel import RankFailed
from .peers import COLLECTIVE_TIMEOUT_S, Peers
from .spec import Pool
from .transformer import Transformer

_cuda: Any = torch.cuda  # its classes have no annotations
_SPINNING_S = 0.01  # a decode step is over by then; after it, waiting costs no core
_BETWEEN_LOOKS_S = 0.001


class GpuSteps:
    """Steps of one rank on its GPU, one at a time."""

    def __init__(self, pool: Pool, transformer: Transformer, device: torch.device, peers: Peers | None) -> None:
        self._transformer, self._device, self._peers = transformer, device, peers
        self._batch = DeviceBatch(pool, device)
        self._empty = Batch(pool)
        self.graphs = DecodeGraphs(captured_sizes(pool), self._batch, self._transformer.forward)
        cuda = device.type == "cuda"
        self._tokens = torch.zeros(pool.max_num_batched_tokens, dtype=torch.int64, pin_memory=cuda)
        self._ended = _cuda.Event() if cuda else None

    def capture(self, record: Callable[[Callable[[], Tensor]], Recorded] | None = None) -> None:
        """Capture the decode steps. Every rank does, at the same time: their collectives run while they warm up.

        Raises: RankFailed: another rank does not take part.
        """
        if not self.graphs.sizes:
            return
        self._empty.read()
        self.graphs.capture(self._empty, record or CudaRecorder(self.wait))

    def logits(self, batch: Batch) -> Tensor:
        """Begin a step that `batch` has read; its logits (head rows, this rank's vocabulary), until the next begins."""
        self._transformer.copy_blocks(batch.copies)
        logits = self.graphs.run(batch)
        if logits is not None:
            return logits
        self._batch.take(batch)
        return self._transformer.forward(self._batch)

    def result(self, result: Tensor, head: int) -> Tensor:
        """Wait for the step: tokens and all logits on the host, logits to sample from where they are.

        Raises: RankFailed: a rank does not answer.
        """
        host = result
        if head == ARGMAX:
            host = self._tokens.narrow(0, 0, result.shape[0])
            host.copy_(result, non_blocking=True)
        self.wait()
        return host.cpu() if head == ALL_LOGITS else host

    def wait(self) -> None:
        """Return when the GPU has done what it was given. Raises: RankFailed: it waits for a rank that is gone."""
        if self._ended is None:
            return
        self._ended.record()
        started_s = time.monotonic()
        while not self._ended.query():
            waited_s = time.monotonic() - started_s
            if waited_s > COLLECTIVE_TIMEOUT_S and self._peers is not None:
                self._peers.abort()
                raise RankFailed(f"a rank does not answer within {COLLECTIVE_TIMEOUT_S:.0f} s; start the engine again")
            if waited_s > _SPINNING_S:
                time.sleep(_BETWEEN_LOOKS_S)
