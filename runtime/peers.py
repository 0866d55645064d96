"""How the ranks of one replica talk: processes that meet through a file in a folder of ours, over gloo on loopback."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .batch import HEADER, used_places

_distributed: Any = torch.distributed  # its annotations leave out much that its documentation has

COLLECTIVE_TIMEOUT_S = 120.0  # a rank that lets the others wait longer within one step is taken for dead
_FOREVER = timedelta(days=3650)  # an idle server gives its ranks nothing to do, and that is no error
_DIRECT_BYTES = 64 << 10
_FIRST_PART = 1024  # int32 places of the wire sent at once: a decode step in one message


class Peers:
    """The ranks of one replica, seen from one of them. Every method is a collective: all ranks call it, in one order.

    Two groups: waiting for the next step has no time limit, and answering within a step has. They are this object's
    own, not torch's global default: several engines may live in one process.
    """

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        store = _distributed.FileStore(str(folder / "store"), size)
        # in this order: meeting has a time limit, too
        self._step = _gloo(_distributed.PrefixStore("step", store), rank, size, timedelta(seconds=COLLECTIVE_TIMEOUT_S))
        self._idle = _gloo(_distributed.PrefixStore("idle", store), rank, size, _FOREVER)

    def all_reduce(self, x: Tensor) -> None:
        """x becomes the sum of all ranks' x, the same bits on every rank.

        Two ranks with little to say tell each other directly: 92 us where gloo's all-reduce takes 214 (8 rows of 256,
        least of 300 on two busy cores).
        """
        if self.size > 2 or x.nbytes > _DIRECT_BYTES:
            self._step.allreduce([x]).wait()
            return
        other = torch.empty_like(x)
        incoming = self._step.recv([other], 1 - self.rank, 0)
        outgoing = self._step.send([x], 1 - self.rank, 0)
        incoming.wait()
        outgoing.wait()
        x.add_(other)

    def broadcast_wire(self, wire: Tensor, used: int) -> None:
        """Rank 0's wire on every rank; `used` counts on rank 0 only, and one message carries most steps.

        The first place past a short wire's end is never read, and the length of a long one follows from its header.
        """
        first = min(_FIRST_PART, wire.shape[0])
        self._idle.broadcast([wire[:first]], _from_rank_0()).wait()
        if self.rank != 0:
            used = used_places(wire[:HEADER].tolist())
        if used > first:
            self._step.broadcast([wire[first:used]], _from_rank_0()).wait()

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x (of one shape) on rank 0; nothing elsewhere."""
        options = _distributed.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        self._step.gather([parts] if self.rank == 0 else [], [x], options).wait()
        return parts


def _from_rank_0() -> Any:
    options = _distributed.BroadcastOptions()
    options.rootRank = 0
    return options


def _gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    options = _distributed.ProcessGroupGloo._Options()
    options._devices = [_distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timeout
    return _distributed.ProcessGroupGloo(store, rank, size, options)
