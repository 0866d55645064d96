"""How the ranks of one replica talk: torch.distributed in groups of their own, over gloo, and NCCL between GPUs.

Steps travel over gloo in both cases: they are a few KB that the hosts read. What the ranks of a layer add up or gather
lies on their devices, and on GPUs goes over NCCL, in order with the kernels around it, so that a CUDA graph holds it.
"""

from __future__ import annotations

import os
from collections import deque
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .batch import HEADER, used_places
from .parallel import Layout

_distributed: Any = torch.distributed  # its annotations leave out much that its documentation has

COLLECTIVE_TIMEOUT_S = 120.0  # a rank that lets the others wait longer within one step is taken for dead
_FOREVER = timedelta(days=3650)  # an idle server gives its ranks nothing to do, and that is no error
_DIRECT_BYTES = 64 << 10
_FIRST_PART = 1024  # int32 places of the wire sent at once: a decode step in one message
_ACTIVATIONS = 0  # tags of what goes from one rank to another
_RESULT = 1


class Peers:
    """The ranks of one replica, seen from one of them. The ranks concerned call a method all, in one order.

    Waiting for the next step has no time limit, and answering within a step has: two kinds of groups. They are this
    object's own, not torch's global default: several engines may live in one process.
    """

    def __init__(
        self, store: Any, rank: int, layout: Layout, address: str = "127.0.0.1", *, nccl: bool = False
    ) -> None:
        """
        Args:
            store: torch.distributed's, where the ranks find each other.
            address: of this machine, at which the other ranks reach it.
            nccl: the ranks compute on GPUs, this one on torch's current device.
        """
        self.rank = rank
        self.layout = layout
        self.place = layout.place(rank)
        self._store, self._address = store, address
        self._groups: dict[tuple[str, tuple[int, ...]], Any] = {}
        # every rank goes through all groups in this order, so that nobody waits for one who waits for another
        for stage in range(layout.stages):
            with_rank_0 = tuple(sorted({0, *layout.stage(stage)}))
            # in this order: meeting has a time limit, too
            for kind, ranks in (("step", with_rank_0), ("idle", with_rank_0)):
                self._meet(kind, ranks)
            for place in map(layout.place, layout.stage(stage)):
                self._meet("step", layout.shards_of(place))
                self._meet("step", layout.parts_of(place))
        if layout.stages > 1:
            self._meet("step", tuple(range(layout.size)))
        self._shards = self._groups["step", layout.shards_of(self.place)]
        self._nccl = nccl and layout.shards > 1
        if self._nccl:
            self._shards = self._over_nccl(layout.shards_of(self.place))
        self._parts = self._groups["step", layout.parts_of(self.place)]
        self._all = self._groups["step", tuple(range(layout.size))] if layout.stages > 1 else None
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._wires: deque[list[Any]] = deque()

    def _meet(self, kind: str, ranks: tuple[int, ...]) -> None:
        if self.rank in ranks and (kind, ranks) not in self._groups:
            timeout = _FOREVER if kind == "idle" else timedelta(seconds=COLLECTIVE_TIMEOUT_S)
            store = _distributed.PrefixStore(f"{kind} {ranks}", self._store)
            options = _distributed.ProcessGroupGloo._Options()
            options._devices = [_distributed.ProcessGroupGloo.create_device(hostname=self._address)]
            options._timeout = timeout
            group = _distributed.ProcessGroupGloo(store, ranks.index(self.rank), len(ranks), options)
            self._groups[kind, ranks] = group

    def _over_nccl(self, ranks: tuple[int, ...]) -> Any:
        # NCCL's own watchdog ends the process where a rank is gone, and knows nothing of collectives inside a graph.
        # Whoever waits for the result of a step has a time limit (gpu_steps.py), raises RankFailed, and aborts these.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        options = _distributed.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        store = _distributed.PrefixStore(f"nccl {ranks}", self._store)
        return _distributed.ProcessGroupNCCL(store, ranks.index(self.rank), len(ranks), options)

    def abort(self) -> None:
        """Let go of collectives that will never end, and with them of the GPU."""
        if self._nccl:
            self._shards.abort()

    def all_reduce(self, x: Tensor) -> None:
        """x becomes the sum of the x of all ranks that share this layer, the same bits on each of them.

        Two ranks with little to say tell each other directly: 92 us where gloo's all-reduce takes 214 (8 rows of 256,
        least of 300 on two busy cores).
        """
        if self._nccl or self.layout.shards > 2 or x.nbytes > _DIRECT_BYTES:
            self._shards.allreduce([x]).wait()
            return
        other = torch.empty_like(x)
        incoming = self._shards.recv([other], 1 - self.place.shard, 0)
        outgoing = self._shards.send([x], 1 - self.place.shard, 0)
        incoming.wait()
        outgoing.wait()
        x.add_(other)

    def send_wire(self, wire: Tensor, used: int) -> None:
        """Rank 0: a step for everybody; with several stages each takes it when it comes to it.

        One message carries most steps: the first place past a short wire's end is never read, and the length of a long
        one follows from its header.
        """
        first = min(_FIRST_PART, wire.shape[0])
        if self.layout.stages > 1:
            wire = wire[: max(first, used)].clone()  # the caller writes the next step while some still wait for this
        pending = []
        for stage in reversed(range(self.layout.stages)):
            ranks = tuple(sorted({0, *self.layout.stage(stage)}))
            if len(ranks) > 1:
                pending.append(self._groups["idle", ranks].broadcast([wire[:first]], _from_rank_0()))
                if used > first:
                    pending.append(self._groups["step", ranks].broadcast([wire[first:used]], _from_rank_0()))
        self._wires.append(pending)
        # a step ends when the last stage has computed it, so that these have arrived, but for a rank that lags behind
        most = 2 * self.layout.stages if self.layout.stages > 1 else 0
        while len(self._wires) > most:
            for work in self._wires.popleft():
                # a rank that waits for its next step has no time limit; one that does not come to wait has
                work.wait(timedelta(seconds=COLLECTIVE_TIMEOUT_S))

    def receive_wire(self, wire: Tensor) -> None:
        """Another rank: wait for the next step."""
        ranks = tuple(sorted({0, *self.layout.stage(self.place.stage)}))
        first = min(_FIRST_PART, wire.shape[0])
        self._groups["idle", ranks].broadcast([wire[:first]], _from_rank_0()).wait()
        used = used_places(wire[:HEADER].tolist())
        if used > first:
            self._groups["step", ranks].broadcast([wire[first:used]], _from_rank_0()).wait()

    def pass_on(self, hidden: Tensor) -> None:
        """Activations for this rank's counterpart on the next stage; returns before it has taken them."""
        self._send(hidden, self._counterpart(+1), _ACTIVATIONS)

    def take_over(self, shape: tuple[int, ...]) -> Tensor:
        """fp32 activations from this rank's counterpart on the stage before."""
        return self._received(torch.empty(shape), self._counterpart(-1), _ACTIVATIONS)

    def _counterpart(self, stages: int) -> int:
        return self.layout.rank(self.place._replace(stage=self.place.stage + stages))

    def send_result(self, result: Tensor) -> None:
        """From the first rank of the last stage to rank 0."""
        self._send(result, 0, _RESULT)

    def receive_result(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """On rank 0: what `send_result` sends."""
        first_of_the_last = self.layout.stage(self.layout.stages - 1)[0]
        return self._received(torch.empty(shape, dtype=dtype), first_of_the_last, _RESULT)

    def _send(self, x: Tensor, rank: int, tag: int) -> None:
        assert self._all is not None
        # every stage may have a step, so that waiting for more than one before would be waiting for nothing
        while len(self._sent) > self.layout.stages:
            self._sent.popleft()[0].wait()
        self._sent.append((self._all.send([x], rank, tag), x))

    def _received(self, into: Tensor, rank: int, tag: int) -> Tensor:
        assert self._all is not None
        self._all.recv([into], rank, tag).wait()
        return into

    def gather_parts(self, x: Tensor) -> list[Tensor]:
        """The x (of one shape) of all ranks that divide the step's tokens, in order of their parts, on each of them."""
        found = [torch.empty_like(x) for _ in range(self.layout.parts)]
        self._parts.allgather([found], [x]).wait()
        return found

    def reduce_parts(self, x: Tensor) -> None:
        """x becomes the sum of the x of all ranks that divide the step's tokens."""
        self._parts.allreduce([x]).wait()

    def gather(self, x: Tensor) -> list[Tensor]:
        """The x (of one shape) of all ranks that share this layer, on the first of them; nothing elsewhere."""
        options = _distributed.GatherOptions()
        options.rootRank = 0
        first = self.place.shard == 0
        parts = [torch.empty_like(x) for _ in range(self.layout.shards)] if first else []
        self._shards.gather([parts] if first else [], [x], options).wait()
        return parts


def _from_rank_0() -> Any:
    options = _distributed.BroadcastOptions()
    options.rootRank = 0
    return options
