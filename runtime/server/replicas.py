"""The replicas as the server sees them: processes to start and stop, and the connection to each."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import worker
from ..parallel import thread_environment
from ..spec import Deployment
from ..worker import ABORT, ADAPTER, ADD, FAILED, LOAD_ADAPTER, READY, START, UNLOAD_ADAPTER, Frames, Stats, frame
from .generation import Generation
from .protocol import ApiError

_STOP_S = 5.0
_STDERR = 2


class Replica(asyncio.Protocol):
    """The connection to one replica.

    ready   it has loaded its model
    stats   what it reported last
    live    requests that it works on, by id
    """

    def __init__(self, index: int, on_change: Callable[[Replica], None]) -> None:
        """on_change is called when it gets ready, and when its connection is lost."""
        self.index = index
        self.ready = False
        self.lost = False
        self.failure: tuple[int, str] | None = None
        self.stats = Stats()
        self.live: dict[int, Generation] = {}
        self._on_change = on_change
        self._frames = Frames()
        self._loads: dict[int, asyncio.Future[str | None]] = {}
        self._load_numbers = itertools.count()
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def add(self, request_id: int, generation: Generation) -> None:
        """Hand a prompt to the engine."""
        generation.abort = lambda: self._abort(request_id)
        if self.lost:
            generation.fail(self._gone())
            return
        self.live[request_id] = generation
        prompt = generation.prompt_token_ids.tobytes()
        self._send((ADD, request_id, prompt, generation.sampling, generation.adapter))

    async def load_adapter(self, name: str, folder: Path) -> str | None:
        """Why it cannot be loaded; None: requests may name it."""
        if self.lost:
            return self._gone().message
        number = next(self._load_numbers)
        self._loads[number] = asyncio.get_running_loop().create_future()
        self._send((LOAD_ADAPTER, number, name, str(folder)))
        try:
            return await self._loads[number]
        finally:
            del self._loads[number]

    def unload_adapter(self, name: str) -> None:
        """No more requests name it."""
        if not self.lost:
            self._send((UNLOAD_ADAPTER, name))

    def close(self) -> None:
        """Let the replica end: it has nothing left to do."""
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        for message in self._frames.feed(data):
            if message[0] == READY:
                self.ready = True
                self._on_change(self)
            elif message[0] == FAILED:
                self.failure = (message[1], message[2])
            elif message[0] == ADAPTER:
                waiter = self._loads.get(message[1])
                if waiter is not None and not waiter.done():
                    waiter.set_result(message[2])
            else:
                self._step(message, now_s)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self.ready = False
        self.fail_live(self._gone())
        for waiter in self._loads.values():
            if not waiter.done():
                waiter.set_result(self._gone().message)
        self._on_change(self)

    def fail_live(self, error: ApiError) -> None:
        """Answer every request that it works on with an error."""
        live, self.live = self.live, {}
        for generation in live.values():
            generation.fail(error)

    def _step(self, message: tuple[object, ...], now_s: float) -> None:
        _, request_ids, counts, token_ids, finish_reasons, cached, logprobs, stats = message
        start = 0
        for request_id, count, finish_reason, cached_tokens, its_logprobs in zip(
            request_ids,
            counts,
            finish_reasons,
            cached,
            logprobs,  # type: ignore[call-overload]
        ):
            ids = token_ids[start : start + count]  # type: ignore[index]
            start += count
            # a request that was aborted here may still be in the outputs of the step that ran meanwhile
            generation = self.live.get(request_id)
            if generation is not None:
                if finish_reason is not None:
                    del self.live[request_id]
                generation.receive(ids, finish_reason, cached_tokens, its_logprobs, now_s)
        if stats is not None:
            self.stats = Stats(*stats)  # type: ignore[misc]

    def _abort(self, request_id: int) -> None:
        if self.live.pop(request_id, None) is not None:
            self._send((ABORT, request_id))

    def _send(self, message: tuple[object, ...]) -> None:
        assert self._transport is not None, "not connected"
        self._transport.write(frame(message))

    def _gone(self) -> ApiError:
        reason = "" if self.failure is None else f": {self.failure[1]}"
        return ApiError(500, f"replica {self.index} stopped while it worked on this request{reason}")


class Fleet:
    """All replicas of a deployment. Requests go to them in turn, in order of arrival, as the simulator assumes."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = tuple(replicas)
        self._ids = itertools.count()

    @property
    def ready(self) -> bool:
        return all(replica.ready for replica in self.replicas)

    def stats(self) -> list[Stats]:
        return [replica.stats for replica in self.replicas]

    async def load_adapter(self, name: str, folder: Path) -> str | None:
        """Why a replica cannot load it, and then none has it; None: requests may name it."""
        refusals = await asyncio.gather(*(replica.load_adapter(name, folder) for replica in self.replicas))
        for refusal in filter(None, refusals):
            self.unload_adapter(name)
            return refusal
        return None

    def unload_adapter(self, name: str) -> None:
        """No more requests name it."""
        for replica in self.replicas:
            replica.unload_adapter(name)

    def dispatch(self, generation: Generation) -> None:
        request_id = next(self._ids)
        self.replicas[request_id % len(self.replicas)].add(request_id, generation)


class ReplicaProcesses:
    """The operating-system processes behind a fleet. None outlives `stop`, nor the server itself."""

    def __init__(self, deployment: Deployment, model_dir: Path, step_log: Path | None) -> None:
        """Start one process a replica; they load while the server starts."""
        self.connections: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        spec = deployment.model_dump(mode="json")
        environment = {**os.environ, **thread_environment(deployment.pool)}
        for index in range(deployment.pool.replicas):
            ours, theirs = socket.socketpair()
            descriptor = str(theirs.fileno())
            # -P: a file in the user's folder shall not stand in for a module of ours
            command = [sys.executable, "-P", "-m", worker.__name__, descriptor]
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,
                env=environment,
            )
            self._processes.append(process)
            theirs.close()
            ours.sendall(frame((START, spec, str(model_dir.resolve()), index, step_log and str(step_log.resolve()))))
            self.connections.append(ours)

    def exit_text(self, index: int) -> str:
        """How a replica's process ended, for people; it has closed its connection."""
        try:
            code = self._processes[index].wait(_STOP_S)
        except subprocess.TimeoutExpired:
            return "its connection is closed"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def stop(self) -> None:
        """Wait for the processes, whose connections are closed, and kill those that do not end."""
        deadline_s = time.monotonic() + _STOP_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
