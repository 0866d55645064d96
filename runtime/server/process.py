"""The server as a process: what is checked before anything is loaded, signals, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import uvicorn
from starlette.types import ASGIApp

from ...traces.whole_file import write_whole
from ..device import check_gpus
from ..launch import Launch
from ..memory import available_for, check_memory, memory_need, memory_text
from ..model_shape import BadModel, ModelShape, resolve_model
from ..parallel import RankFailed
from ..request_log import BadRequestLog, RequestLog
from ..runnable import check_runnable
from ..spec import BadSpec, Deployment
from ..text import BadTokenizer, ChatTemplate, Tokenizer
from .adapters import ServedAdapters
from .app import ServedModel, Service
from .connections import KEEP_ALIVE_S, MAX_HEAD_BYTES, SEND_BUFFER_BYTES, Connection, connection_limit
from .protocol import ApiError
from .reload import Reloader
from .replicas import Fleet, Replica, ReplicaProcesses

DRAIN_S = 30
_BACKLOG = 2048


class BadOption(Exception):
    """An option that this server refuses: which, what was found, what is allowed, what to do."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:80]}; allowed: {self.allowed}; {self.todo}"


class CannotListen(Exception):
    """An address that cannot be listened on."""

    exit_code: ClassVar[int] = 1

    def __init__(self, host: str, port: int, reason: str) -> None:
        super().__init__(host, port, reason)
        self.host, self.port, self.reason = host, port, reason

    def __str__(self) -> str:
        return f"{self.host}:{self.port}: {self.reason}; stop what listens there, or choose another port"


class CannotWrite(Exception):
    """A file that cannot be written."""

    exit_code: ClassVar[int] = 1

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; choose another file"


def run(
    deployment: Deployment,
    *,
    host: str,
    port: int,
    request_log: Path | None,
    step_log: Path | None,
    api_keys: Sequence[str],
    served_model_name: str | None,
    ready_file: Path | None,
    allow_anyone: bool,
    spec_file: Path | None,
    adapter_dir: Path | None,
) -> int:
    """See `serve`."""
    try:
        _check_address(host, port, api_keys, allow_anyone)
        _check_step_log(step_log)
        model_dir = resolve_model(deployment.model)
        shape = ModelShape.load(model_dir)
        check_runnable(deployment, shape)
        launch = Launch.from_environment()
        if launch is not None:
            launch.check(deployment.pool)
        ranks = None if launch is None else launch.local
        check_gpus(deployment.pool, ranks, deployment.pool.replicas)
        available = available_for(deployment.pool, ranks)
        check_memory(shape, deployment.pool, available=available, ranks=ranks)
        if launch is not None and launch.rank > 0:
            return _follow(deployment, model_dir, launch)
        model = _served_model(deployment, shape, model_dir, served_model_name)
        _check_adapters(deployment, model.name, adapter_dir)
        listener = listen(host, port)
        log = None if request_log is None else RequestLog(request_log, block_size=deployment.pool.block_size)
    except (BadOption, BadSpec, BadModel, BadTokenizer, BadRequestLog, CannotListen, CannotWrite) as error:
        _say(str(error))
        return error.exit_code
    _say(f"loading {deployment.model}: {memory_text(memory_need(shape, deployment.pool, ranks=ranks), available)} ...")
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)
    process = _Process(deployment, model, model_dir, step_log, ready_file)
    try:
        return asyncio.run(process.serve(listener, shape, log, api_keys, spec_file, adapter_dir))
    finally:
        process.stop()
        if log is not None:
            log.close()


def _follow(deployment: Deployment, model_dir: Path, launch: Launch) -> int:
    """Be a rank of the replica that rank 0 serves, until that ends."""
    from ..rank import follow_rank_0

    try:
        return follow_rank_0(deployment.pool, model_dir, launch)
    except RankFailed as error:
        _say(str(error))
        return error.exit_code


class _Process:
    """The server while it runs: its replicas, signals, and how it ends."""

    def __init__(
        self,
        deployment: Deployment,
        model: ServedModel,
        model_dir: Path,
        step_log: Path | None,
        ready_file: Path | None,
    ) -> None:
        """Start the replicas, which load while the server starts."""
        self._model, self._model_dir = model, model_dir
        self._step_log, self._ready_file = step_log, ready_file
        self._exit_code = 0
        self._url, self._told = "", False
        self._started: list[ReplicaProcesses] = []
        self._processes = self._start(deployment)
        self._fleet = Fleet(self._processes.replicas, deployment.pool)

    def _start(self, deployment: Deployment) -> ReplicaProcesses:
        processes = ReplicaProcesses(deployment, self._model_dir, self._step_log, self._on_change)
        self._started.append(processes)
        return processes

    async def serve(
        self,
        listener: socket.socket,
        shape: ModelShape,
        request_log: RequestLog | None,
        api_keys: Sequence[str],
        spec_file: Path | None,
        adapter_dir: Path | None,
    ) -> int:
        """Serve until a signal, or a replica that is lost; returns the exit code."""
        loop = asyncio.get_running_loop()
        host, port = listener.getsockname()[:2]
        self._url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        adapters = ServedAdapters(self._model.name, self._processes.deployment.adapters, self._fleet, adapter_dir)
        service = Service(self._model, self._fleet, api_keys=api_keys, request_log=request_log, adapters=adapters)
        self._server = _Server(http_config(service.app()))
        await self._processes.connect()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._drain)
        reloader = None
        if spec_file is not None:
            reloader = Reloader(spec_file, shape, service, self._processes, self._start, _say)
            loop.add_signal_handler(signal.SIGHUP, reloader.request)
        gc.collect()
        gc.freeze()
        await self._server.serve(sockets=[listener])
        if reloader is not None:
            reloader.cancel()
        for processes in self._started:
            processes.close()
        if self._ready_file is not None:
            self._ready_file.unlink(missing_ok=True)
        return self._exit_code

    def stop(self) -> None:
        """End all processes, whose connections are closed."""
        for processes in self._started:
            processes.stop()

    def _on_change(self, processes: ReplicaProcesses, replica: Replica) -> None:
        serving = replica in self._fleet.replicas
        if replica.lost and not replica.closed:
            exit_code, reason = replica.failure or (1, processes.exit_text(replica.index))
            if not serving:
                _say(f"replica {replica.index}, which got no new requests, stopped ({reason})")
            elif not self._server.should_exit:
                self._exit_code = exit_code
                _say(f"replica {replica.index} stopped ({reason}); the server ends")
                self._drain()
        elif serving and self._fleet.ready and not self._told:
            self._told = True
            self._tell()

    def _tell(self) -> None:
        """Say that every replica has loaded."""
        host, _, port = self._url.removeprefix("http://").rpartition(":")
        if self._ready_file is not None:
            name = self._model.name
            ready = {
                "url": self._url, "host": host.strip("[]"), "port": int(port), "model": name, "pid": os.getpid()
            }  # fmt: skip
            write_whole(self._ready_file, json.dumps(ready) + "\n")
        _say(f"{self._model.name} on {self._url}, replicas: {len(self._fleet.replicas)}")

    def _drain(self) -> None:
        if self._server.should_exit:
            self._give_up()
        self._server.should_exit = True
        asyncio.get_running_loop().call_later(DRAIN_S, self._give_up)

    def _give_up(self) -> None:
        for replica in self._fleet.all():
            replica.fail_live(ApiError(503, "the server ended before this answer did"))


class _Server(uvicorn.Server):
    """Uvicorn without its signal handling, which raises the signal again at the end: a drained server exits with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_config(app: ASGIApp) -> uvicorn.Config:
    """Uvicorn's settings, with our limits of time, size and number."""
    Connection.max_connections = connection_limit()
    return uvicorn.Config(
        app,
        loop="asyncio",
        http=Connection,
        ws="none",
        lifespan="off",
        access_log=False,
        # what clients do wrong is theirs to hear, not for the log
        log_level="error",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        # streams have ended by then, but for clients that do not read
        timeout_graceful_shutdown=DRAIN_S + 5,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )


def _served_model(deployment: Deployment, shape: ModelShape, model_dir: Path, name: str | None) -> ServedModel:
    return ServedModel(
        name=name or deployment.model,
        vocab_size=shape.vocab_size,
        max_model_len=deployment.pool.max_model_len,
        end_token_ids=frozenset(shape.eos_token_ids),
        tokenizer=Tokenizer.load(model_dir),
        chat_template=ChatTemplate.load(model_dir),
        by_priority=deployment.pool.scheduling == "priority",
    )


def _check_adapters(deployment: Deployment, name: str, adapter_dir: Path | None) -> None:
    if name in (adapter.name for adapter in deployment.adapters):
        raise BadOption("served_model_name", name, "a name that no adapter has", "choose another")
    if adapter_dir is None:
        return
    if deployment.pool.max_loras == 0:
        todo = "set max_loras in the spec to the most adapters in one step"
        raise BadOption("adapter_dir", adapter_dir, "only with pools.0.max_loras of at least 1", todo)
    if not adapter_dir.is_dir():
        raise BadOption("adapter_dir", adapter_dir, "a folder", "name one that is there")


def _check_address(host: str, port: int, api_keys: Sequence[str], allow_anyone: bool) -> None:
    if not 0 <= port < 1 << 16:
        # getaddrinfo would take the last 16 bits of it
        raise BadOption("port", port, "0 to 65535, 0 for any free port", "choose another")
    if not all(api_keys):
        raise BadOption("api_keys", "an empty key", "keys that cannot be guessed, or none", "give one")
    if not api_keys and not allow_anyone and not _is_loopback(host):
        allowed = "127.0.0.1 without an API key"
        raise BadOption("host", host, allowed, "give an API key, or say that anyone may use this server")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_step_log(path: Path | None) -> None:
    """Raises: CannotWrite, before the replicas would find out."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise CannotWrite(path, error.strerror or str(error)) from None


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before anything is loaded. Raises: CannotListen."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # asyncio switches Nagle's algorithm off only where the protocol is named; with it a token that follows another
        # within a client's delayed acknowledgment waits for it: up to 40 ms
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise CannotListen(host, port, error.strerror or str(error)) from None
    try:
        # a port whose last server has just ended may be taken again; one that is in use may not
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise CannotListen(host, port, error.strerror or str(error)) from None
    listener.setblocking(False)
    return listener


def _say(text: str) -> None:
    # a terminal that has hung up takes nothing, and the server goes on
    with contextlib.suppress(OSError):
        sys.stderr.write(f"paretune serve: {text}\n")
        sys.stderr.flush()
