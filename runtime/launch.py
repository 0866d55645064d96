"""Ranks that somebody else started, by torchrun or alike, here or on several machines: who this one is, where all meet.

    torchrun --nnodes 2 --nproc-per-node 1 --node-rank N --master-addr A --master-port P -m paretune serve spec.yaml

What torchrun says in the environment is read here and nowhere else. No torch before the ranks meet.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from .parallel import Layout
from .spec import BadSpec, Pool

MEETING_LIMIT_S = 600.0  # for all ranks to be started
_LOOPBACK = "127.0.0.1"
_BACKLOG = 1024


@dataclass(frozen=True)
class Launch:
    """One of the ranks that were started together.

    rank, size   among all
    local        ranks on this machine, by number
    host, port   where rank 0, or torchrun's agent for it, waits for the others; host defaults to 127.0.0.1
    agent        torchrun's agent holds that port; the attempt counts its restarts
    """

    rank: int
    size: int
    local: range
    host: str
    port: int
    agent: bool
    attempt: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch | None:
        """None where RANK is not set: the engine starts its own ranks. Raises: BadSpec, naming the variable."""
        if "RANK" not in environment:
            return None
        rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        if rank >= size:
            raise BadSpec("environment: RANK", rank, f"0 to {size - 1} (WORLD_SIZE - 1)", "start the ranks again")
        first = rank - _number(environment, "LOCAL_RANK", 0)
        return cls(
            rank=rank,
            size=size,
            local=range(first, first + _number(environment, "LOCAL_WORLD_SIZE", 1)),
            host=environment.get("MASTER_ADDR", _LOOPBACK),
            port=_number(environment, "MASTER_PORT"),
            agent=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
        )

    def check(self, pool: Pool) -> None:
        """Raises: BadSpec: these ranks are not those of one replica of the pool."""
        size = Layout.of(pool).size
        if self.size != size:
            sizes = "pipeline_parallel_size x context_parallel_size x tensor_parallel_size"
            raise BadSpec("environment: WORLD_SIZE", self.size, f"{size} ({sizes})", "start as many ranks")
        if pool.replicas != 1:
            raise BadSpec("pools.0.replicas", pool.replicas, "1 where the ranks are started from outside")
        if pool.max_loras and len(self.local) < self.size:
            todo = "start all ranks on one machine: each of them reads the adapters' files"
            raise BadSpec("pools.0.max_loras", pool.max_loras, "0 where ranks are on other machines", todo)

    def store(self) -> Any:
        """torch.distributed's store in which the ranks find each other. Rank 0 listens on `host` alone."""
        distributed: Any = importlib.import_module("torch.distributed")
        timeout = timedelta(seconds=MEETING_LIMIT_S)
        if self.agent or self.rank > 0:
            store = distributed.TCPStore(self.host, self.port, None, False, timeout, wait_for_workers=False)
        else:
            listener = socket.create_server((self.host, self.port), backlog=_BACKLOG)
            store = distributed.TCPStore(
                self.host, self.port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        return distributed.PrefixStore(f"paretune {self.attempt}", store)

    def address(self) -> str:
        """This machine's address on the way to `host`, at which the other ranks reach it."""
        family, _, _, _, where = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing
            return str(probe.getsockname()[0])


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        found = "nothing" if text is None else repr(text)
        raise BadSpec(f"environment: {name}", found, "an integer >= 0", "start the ranks by torchrun, or unset RANK")
    return int(text)
