"""One replica: an operating-system process that runs the engine in a tight loop and talks to the server over a socket.

Messages are tuples of plain values in Python's marshal format (both ends are the same interpreter), each behind its
length. One message carries all outputs of a step. An idle replica blocks on the socket. It ends when the server closes
the socket, or dies.

to the replica    (START, deployment, model folder, number of the replica, step log or None), once and first
                  (ADD, request_id, prompt token ids: bytes of int32, sampling: dict for SamplingParams, priority,
                   name of the adapter or None)
                  (ABORT, request_id)
                  (CHANGE, pool), between two steps; answered by CHANGED
                  (LOAD_ADAPTER, number of the call, name, folder); answered by ADAPTER
                  (UNLOAD_ADAPTER, name)
from the replica  (READY,)
                  (STEP, request ids, tokens of each, token ids of all in a row, finish reasons, cached tokens,
                   speculated of each or None, logprobs of each or None, stats or None, queue)
                  (CHANGED, None, or why nothing changed)
                  (ADAPTER, number of the call, why it was not loaded or None)
                  (FAILED, exit code, message)

`queue` is a Queue. A step that brings no tokens (a chunk of a prompt) is told, too.
"""

from __future__ import annotations

import ctypes
import gc
import json
import marshal
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ..kernels.tiles import BadTile
from .device import VISIBLE, visible_to_replica
from .engine_stats import EngineStats
from .spec import BadSpec, Deployment, Pool, parse_deployment

if TYPE_CHECKING:
    from .engine import Output, Request, StepRecord
    from .sampler import TokenLogprobs

START, ADD, ABORT, CHANGE, LOAD_ADAPTER, UNLOAD_ADAPTER, READY, STEP, CHANGED, ADAPTER, FAILED = range(11)

# Statistics ride along with outputs at most this often: Prometheus scrapes every few seconds.
STATS_EVERY_S = 0.2
_STEPS_PER_WRITE = 256
_PR_SET_PDEATHSIG = 1


class Queue(NamedTuple):
    """A replica's queue as its last step left it.

    taken      requests handed to it so far
    waiting    of these, those that are not admitted
    admitted   ids of those that this step admitted; after a preemption they come again
    started_s  when the step began, on the clock of time.perf_counter, which all processes of a machine share
    tokens     that the step computed
    """

    taken: int
    waiting: int
    admitted: list[int]
    started_s: float
    tokens: int


class AnyEngine(Protocol):
    """What the loop asks of an engine.

    last_step      of the last step that computed something
    last_admitted  ids of the requests that this step admitted
    log_rows       whether last_step shall say which requests were in it
    capture_s      seconds that capturing decode steps as CUDA graphs took
    """

    last_step: StepRecord | None
    last_admitted: list[int]
    log_rows: bool

    @property
    def capture_s(self) -> float: ...
    @property
    def has_work(self) -> bool: ...
    @property
    def num_waiting(self) -> int: ...
    def change(self, pool: Pool) -> None: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: int) -> object: ...
    def load_adapter(self, name: str, folder: Path) -> object: ...
    def unload_adapter(self, name: str) -> object: ...
    def step(self) -> list[Output]: ...
    def stats(self) -> EngineStats: ...
    def close(self) -> None: ...


def frame(message: tuple[Any, ...]) -> bytes:
    """A message as it goes over the socket."""
    data = marshal.dumps(message)
    return struct.pack("<I", len(data)) + data


class Frames:
    """Cuts what a socket delivers into messages."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[tuple[Any, ...]]:
        """The messages that are whole now."""
        buffer = self._data
        buffer += data
        messages = []
        start, end = 0, len(buffer)
        while end - start >= 4:
            length = int.from_bytes(buffer[start : start + 4], "little")
            if end - start - 4 < length:
                break
            messages.append(marshal.loads(buffer[start + 4 : start + 4 + length]))
            start += 4 + length
        del buffer[:start]
        return messages


class StepLog:
    """One JSON line per engine step, for calibration; many whole lines a write, so that replicas may share it.

    Where the disk takes no more it ends, with a line on stderr, and serving goes on.
    """

    def __init__(self, path: Path, replica: int) -> None:
        self._path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._replica = replica
        self._records: list[StepRecord] = []
        self._full = False

    def add(self, record: StepRecord) -> None:
        if not self._full:
            self._records.append(record)
            if len(self._records) >= _STEPS_PER_WRITE:
                self.flush()

    def flush(self) -> None:
        """Write what was added since the last time."""
        if not self._records:
            return
        rows = ({"replica": self._replica, **asdict(record)} for record in self._records)
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        self._records.clear()
        try:
            self._full = os.write(self._handle, lines) < len(lines)
        except OSError:
            self._full = True
        if self._full:
            sys.stderr.write(f"paretune serve: {self._path}: no space; replica {self._replica} logs no more steps\n")


def main() -> None:
    """What the process runs: load, report READY, serve until the socket closes. Argument: the socket's descriptor.

    Whatever goes wrong is reported as FAILED, with the exit code of the error's class.
    """
    _live_and_die_with_the_server()
    connection = socket.socket(fileno=int(sys.argv[1]))
    try:
        inbox = Inbox(connection)
        messages = inbox.take(block=True)
        if messages is None:
            return
        _, plain, model_dir, replica, step_log = messages[0]
        deployment = parse_deployment(plain)
        visible = visible_to_replica(deployment.pool, replica)
        if visible is not None:
            os.environ[VISIBLE] = visible
        engine = load_engine(deployment, Path(model_dir))
        log = StepLog(Path(step_log), replica) if step_log else None
        engine.log_rows = log is not None
        gc.collect()
        gc.freeze()  # a full collection in the middle of a step would walk all of torch
        try:
            if engine.capture_s:
                sys.stderr.write(f"paretune serve: capturing decode steps took {engine.capture_s:.1f} s\n")
            connection.sendall(frame((READY,)))
            run(engine, connection, inbox, log)
        finally:
            engine.close()
    # the server is gone, and nobody is left to tell
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(1)
    except Exception as error:
        if not hasattr(error, "exit_code"):
            traceback.print_exc()
        connection.sendall(frame((FAILED, getattr(error, "exit_code", 1), f"{error}" or type(error).__name__)))
        sys.exit(1)


def load_engine(deployment: Deployment, model_dir: Path) -> AnyEngine:
    from .engine import Engine
    from .launch import Launch

    return Engine(deployment, model_dir, launch=Launch.from_environment())


def run(engine: AnyEngine, connection: socket.socket, inbox: Inbox, step_log: StepLog | None = None) -> None:
    """Step the engine while it has work, wait on the socket while it has none; return when the other end closes."""
    from .adapters import BadAdapter
    from .engine import Output, Request
    from .sampler import SamplingParams

    told, told_s, taken = EngineStats(), 0.0, 0
    recorded: StepRecord | None = None
    while True:
        messages = inbox.take(block=not engine.has_work)
        if messages is None:
            break
        outputs: list[Output] = []
        for message in messages:
            if message[0] == ADD:
                _, request_id, prompt, sampling, priority, adapter = message
                prompt_token_ids = np.frombuffer(prompt, dtype=np.int32)
                taken += 1
                try:
                    engine.add(Request(request_id, prompt_token_ids, SamplingParams(**sampling), priority, adapter))
                except BadAdapter as error:  # unloaded meanwhile, or its files are no longer what they were
                    sys.stderr.write(f"paretune serve: {error}\n")
                    outputs.append(Output(request_id, (), None, "abort", 0))
            elif message[0] == CHANGE:
                connection.sendall(frame((CHANGED, _changed(engine, Pool.model_validate(message[1])))))
            elif message[0] == LOAD_ADAPTER:
                connection.sendall(frame((ADAPTER, message[1], _load_adapter(engine, message[2], message[3]))))
            elif message[0] == UNLOAD_ADAPTER:
                engine.unload_adapter(message[1])
            else:
                engine.abort(message[1])
        computed: StepRecord | None = None
        if engine.has_work:
            outputs += engine.step()
            # a step that only reports what was aborted computes nothing, and leaves the record of the one before
            if engine.last_step is not None and engine.last_step is not recorded:
                recorded = computed = engine.last_step
                if step_log is not None:
                    step_log.add(computed)
        stats = None
        now_s = time.monotonic()
        if now_s - told_s >= STATS_EVERY_S or not engine.has_work:
            now = engine.stats()
            if now != told:
                told, told_s, stats = now, now_s, tuple(now)
        if outputs or stats or computed:
            started_s, tokens = (computed.started_s, computed.num_tokens) if computed else (0.0, 0)
            queue = Queue(taken, engine.num_waiting, engine.last_admitted if computed else [], started_s, tokens)
            connection.sendall(frame(_step_message(outputs, stats, queue)))
        if step_log is not None and not engine.has_work:
            step_log.flush()
    if step_log is not None:
        step_log.flush()


def _load_adapter(engine: AnyEngine, name: str, folder: str) -> str | None:
    """Why it was not loaded; None: it was."""
    from .adapters import BadAdapter

    try:
        engine.load_adapter(name, Path(folder))
    except BadAdapter as error:
        return str(error)
    return None


def _changed(engine: AnyEngine, pool: Pool) -> str | None:
    """Let an engine go on with other limits and tiles; None, or why it does not."""
    try:
        engine.change(pool)
    except (BadSpec, BadTile) as error:
        return str(error)
    return None


def _step_message(outputs: list[Output], stats: tuple[object, ...] | None, queue: Queue) -> tuple[Any, ...]:
    token_ids: list[int] = []
    for output in outputs:
        token_ids.extend(output.token_ids)
    return (
        STEP,
        [output.request_id for output in outputs],
        [len(output.token_ids) for output in outputs],
        token_ids,
        [output.finish_reason for output in outputs],
        [output.num_cached_tokens for output in outputs],
        [tuple(output.speculated) if output.speculated.drafts else None for output in outputs],
        [None if output.logprobs is None else _plain_logprobs(output.logprobs) for output in outputs],
        stats,
        tuple(queue),
    )


def _plain_logprobs(logprobs: tuple[TokenLogprobs, ...]) -> list[tuple[float, list[int], list[float]]]:
    return [
        (float(one.logprob), [int(token_id) for token_id, _ in one.top], [float(value) for _, value in one.top])
        for one in logprobs
    ]


class Inbox:
    """The messages that have come, with or without waiting."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames = Frames()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def take(self, *, block: bool) -> list[tuple[Any, ...]] | None:
        """Messages, none if nothing came and `block` is false; None when the other end has closed."""
        messages: list[tuple[Any, ...]] = []
        while self._poll.poll(None if block and not messages else 0):
            try:
                data = self._connection.recv(1 << 18)
            except ConnectionResetError:  # it closed without reading our last message
                return None
            if not data:
                return None
            messages += self._frames.feed(data)
        return messages


def _live_and_die_with_the_server() -> None:
    """Ctrl-C and SIGTERM to the whole group leave it running while the server drains; the server's death ends it.

    So does SIGHUP, which is for the server. Both get a handler, not SIG_IGN, which the engine's ranks would inherit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, stack: None)
    if sys.platform == "linux":
        # the closed socket ends an idle replica everywhere; this also ends one in the middle of loading or of a step
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
