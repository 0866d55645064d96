"""The replicas as the server sees them: processes to start and stop, and the connection to each."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...traces.prefix import prefix_hashes
from .. import worker
from ..engine_stats import EngineStats
from ..parallel import thread_environment
from ..router import new_router, num_prefix_hashes, route
from ..spec import Deployment, Pool
from ..speculated import Speculated
from ..worker import (
    ABORT,
    ADAPTER,
    ADD,
    CHANGE,
    CHANGED,
    FAILED,
    LOAD_ADAPTER,
    READY,
    START,
    UNLOAD_ADAPTER,
    Frames,
    Queue,
    frame,
)
from .generation import Generation
from .protocol import ApiError

_STOP_S = 5.0
_STDERR = 2
# admissions that the speed of a queue is measured over, and how old they may be
_ADMISSIONS = 64
_ADMISSIONS_FOR_S = 60.0
# openai's client waits at most a minute
_LEAST_RETRY_S, _MOST_RETRY_S = 1, 60


class Replica(asyncio.Protocol):
    """The connection to one replica.

    ready   it has loaded its model
    closed  the server has let it go
    lost    its connection has ended
    on_step called after each of its steps
    stats   what it reported last
    live    requests that it works on, by id
    outstanding_tokens  that these may take, prompts and answers together
    """

    def __init__(self, index: int, on_change: Callable[[Replica], None]) -> None:
        """on_change is called when it gets ready, and when its connection is lost."""
        self.index = index
        self.ready = False
        self.closed = False
        self.lost = False
        self.failure: tuple[int, str] | None = None
        self.stats = EngineStats()
        self.live: dict[int, Generation] = {}
        self.outstanding_tokens = 0
        self._on_change = on_change
        self.on_step: Callable[[Queue], None] = lambda queue: None
        self._sent = 0
        self._queue = Queue(0, 0, [], 0.0, 0)
        self._changes: deque[asyncio.Future[str | None]] = deque()
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
        self._sent += 1
        self.outstanding_tokens += most_tokens(generation)
        prompt, priority = generation.prompt_token_ids.tobytes(), generation.call.priority
        self._send((ADD, request_id, prompt, generation.sampling, priority, generation.adapter))

    @property
    def unseen(self) -> int:
        """Requests on their way to it, which its scheduler has not seen."""
        return self._sent - self._queue.taken

    @property
    def waiting(self) -> int:
        """Requests that its last step left in the queue."""
        return self._queue.waiting

    async def change(self, pool: Pool) -> str | None:
        """Let it go on with other limits and tiles. Returns None, or why it goes on as before."""
        if self.lost:
            return "the replica has ended"
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._changes.append(answer)
        self._send((CHANGE, pool.model_dump(mode="json")))
        return await answer

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
        self.closed = True
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        for message in self._frames.feed(data):
            if message[0] == READY:
                self.ready = True
                self._on_change(self)
            elif message[0] == CHANGED:
                self._changes.popleft().set_result(message[1])
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
        for answer in self._changes:
            answer.set_result("the replica has ended")
        self._changes.clear()
        for waiter in self._loads.values():
            if not waiter.done():
                waiter.set_result(self._gone().message)
        self._on_change(self)

    def fail_live(self, error: ApiError) -> None:
        """Answer every request that it works on with an error."""
        live, self.live = self.live, {}
        self.outstanding_tokens = 0
        for generation in live.values():
            generation.fail(error)

    def _step(self, message: tuple[object, ...], now_s: float) -> None:
        _, request_ids, counts, token_ids, finish_reasons, cached, speculated, logprobs, stats, queue = message
        self._queue = Queue(*queue)  # type: ignore[misc]
        for request_id in self._queue.admitted:
            admitted = self.live.get(request_id)
            if admitted is not None and admitted.admitted_s is None:
                admitted.admitted_s = self._queue.started_s
        self.on_step(self._queue)
        start = 0
        for request_id, count, finish_reason, cached_tokens, its_speculated, its_logprobs in zip(
            request_ids,
            counts,
            finish_reasons,
            cached,
            speculated,
            logprobs,  # type: ignore[call-overload]
        ):
            ids = token_ids[start : start + count]  # type: ignore[index]
            start += count
            # a request that was aborted here may still be in the outputs of the step that ran meanwhile
            generation = self.live.get(request_id)
            if generation is not None:
                if its_speculated is not None:
                    generation.speculated = Speculated(*its_speculated)
                if finish_reason is not None:
                    del self.live[request_id]
                    self.outstanding_tokens -= most_tokens(generation)
                generation.receive(ids, finish_reason, cached_tokens, its_logprobs, now_s)
        if stats is not None:
            self.stats = EngineStats(*stats)  # type: ignore[misc]

    def _abort(self, request_id: int) -> None:
        generation = self.live.pop(request_id, None)
        if generation is not None:
            self.outstanding_tokens -= most_tokens(generation)
            self._send((ABORT, request_id))

    def _send(self, message: tuple[object, ...]) -> None:
        assert self._transport is not None, "not connected"
        self._transport.write(frame(message))

    def _gone(self) -> ApiError:
        reason = "" if self.failure is None else f": {self.failure[1]}"
        return ApiError(500, f"replica {self.index} stopped while it worked on this request{reason}")


class DrainRate:
    """How fast a queue gets shorter: admissions per second, over the last of them."""

    def __init__(self) -> None:
        self._admissions: deque[tuple[float, int]] = deque(maxlen=_ADMISSIONS)

    def admitted(self, count: int, now_s: float) -> None:
        """`count` requests left the queue at `now_s`."""
        if count:
            self._admissions.append((now_s, count))

    def retry_after_s(self, queued: int, now_s: float) -> int:
        """Whole seconds in which the `queued` requests will have begun, as far as the past tells; 1 to 60."""
        if not self._admissions:
            return _LEAST_RETRY_S
        recent = [(at_s, count) for at_s, count in self._admissions if now_s - at_s <= _ADMISSIONS_FOR_S]
        if not recent:
            return _MOST_RETRY_S
        # the first of them ended a wait from before
        count = sum(count for _, count in recent[1:]) or recent[0][1]
        seconds = queued * (now_s - recent[0][0]) / count
        return min(_MOST_RETRY_S, max(_LEAST_RETRY_S, math.ceil(seconds)))


def most_tokens(generation: Generation) -> int:
    """Tokens that a request may take, prompt and answer together."""
    return len(generation.prompt_token_ids) + int(generation.sampling["max_tokens"])


class Fleet:
    """All replicas of a deployment, and the router before them, which is the simulator's, too.

    pool      what the replicas run as now
    replicas  those that get new requests
    on_step   called after each step of any of them
    """

    def __init__(self, replicas: Sequence[Replica], pool: Pool) -> None:
        self.on_step: Callable[[Queue], None] = lambda queue: None
        self.drain_rate = DrainRate()
        self._take(replicas, pool)
        self._retired: list[Replica] = []
        self._past = EngineStats()
        self._ids = itertools.count()
        self._salt = secrets.token_bytes(32)  # nobody can make prompts that all go to one replica

    @property
    def ready(self) -> bool:
        return all(replica.ready for replica in self.replicas)

    def all(self) -> tuple[Replica, ...]:
        """The replicas that get new requests, and those that finish what they have."""
        return (*self.replicas, *self._retired)

    def stats(self) -> list[EngineStats]:
        """Of all replicas, and what those that have ended did."""
        return [*(replica.stats for replica in self.all()), self._past]

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
        outstanding = np.array([replica.outstanding_tokens for replica in self.replicas], np.int64)
        chosen = route(self._router, outstanding, most_tokens(generation), self._prefix(generation.prompt_token_ids))
        self.replicas[chosen].add(next(self._ids), generation)

    def _prefix(self, prompt_token_ids: NDArray[np.int32]) -> NDArray[np.int64]:
        if self._router.policy != "prefix_affinity":
            return np.zeros(0, np.int64)
        block_size = self.pool.block_size
        first = prompt_token_ids[: num_prefix_hashes(block_size) * block_size]
        return prefix_hashes(first, block_size, self._salt)

    @property
    def queued(self) -> int:
        """Requests that no step has admitted yet, as far as is known here."""
        return sum(replica.waiting + replica.unseen for replica in self.replicas)

    def has_room(self, count: int) -> bool:
        """Whether `count` more requests may come, by the spec's max_queued_requests.

        Where nobody waited at the last step, the next one admits whom it has a seat for: only those beyond
        max_num_seqs will wait.
        """
        if self.pool.max_queued_requests == 0:
            return True
        if any(replica.waiting for replica in self.replicas):
            will_wait = self.queued + count
        else:
            will_wait = sum(len(replica.live) for replica in self.replicas) + count
            will_wait -= self.pool.max_num_seqs * len(self.replicas)
        return will_wait <= self.pool.max_queued_requests * len(self.replicas)

    def replace(self, replicas: Sequence[Replica], pool: Pool) -> tuple[Replica, ...]:
        """Send new requests to other replicas from now on; returns those that only finish what they have."""
        before = self.replicas
        self._retired.extend(before)
        self._take(replicas, pool)
        return before

    def _take(self, replicas: Sequence[Replica], pool: Pool) -> None:
        self.replicas, self.pool = tuple(replicas), pool
        self._router = new_router(pool)
        for replica in self.replicas:
            replica.on_step = self._stepped

    def _stepped(self, queue: Queue) -> None:
        self.drain_rate.admitted(len(queue.admitted), time.perf_counter())
        self.on_step(queue)

    def forget(self, replica: Replica) -> None:
        """A retired replica has ended: keep what it counted."""
        self._retired.remove(replica)
        counted = replica.stats._replace(running=0, waiting=0, kv_blocks_used=0, kv_blocks_total=0)
        self._past = self._past.plus(counted)


class ReplicaProcesses:
    """The operating-system processes of a deployment's replicas. None outlives `stop`, nor the server itself."""

    def __init__(
        self,
        deployment: Deployment,
        model_dir: Path,
        step_log: Path | None,
        on_change: Callable[[ReplicaProcesses, Replica], None],
    ) -> None:
        """Start one process a replica; on_change is called when one gets ready, and when its connection is lost."""
        self.deployment = deployment
        self.replicas = tuple(
            Replica(index, lambda replica: on_change(self, replica)) for index in range(deployment.pool.replicas)
        )
        self._connections: list[socket.socket] = []
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
            self._connections.append(ours)

    async def connect(self) -> None:
        """Begin to listen to them."""
        loop = asyncio.get_running_loop()
        for replica, connection in zip(self.replicas, self._connections):
            await loop.create_connection(lambda replica=replica: replica, sock=connection)  # type: ignore[misc]

    def close(self) -> None:
        """Let them end: they have nothing left to do."""
        for replica in self.replicas:
            replica.close()

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
