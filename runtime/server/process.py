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
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import uvicorn
from starlette.applications import Starlette

from ...traces.whole_file import write_whole
from ..memory import check_memory
from ..model_shape import BadModel, ModelShape, resolve_model
from ..request_log import BadRequestLog, RequestLog
from ..runnable import check_runnable
from ..spec import BadSpec, Deployment
from ..text import BadTokenizer, ChatTemplate, Tokenizer
from .adapters import ServedAdapters
from .app import ServedModel, Service
from .protocol import ApiError
from .replicas import Fleet, Replica, ReplicaProcesses

DRAIN_S = 30
_KEEP_ALIVE_S = 75
_MAX_HEADER_BYTES = 16 << 10
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
    api_key: str | None,
    served_model_name: str | None,
    ready_file: Path | None,
    allow_anyone: bool,
    adapter_dir: Path | None,
) -> int:
    """See `serve`."""
    try:
        _check_address(host, port, api_key, allow_anyone)
        _check_step_log(step_log)
        model_dir = resolve_model(deployment.model)
        shape = ModelShape.load(model_dir)
        check_runnable(deployment, shape)
        check_memory(shape, deployment.pool)
        model = _served_model(deployment, shape, model_dir, served_model_name)
        _check_adapters(deployment, model.name, adapter_dir)
        listener = _listen(host, port)
        log = None if request_log is None else RequestLog(request_log, block_size=deployment.pool.block_size)
    except (BadOption, BadSpec, BadModel, BadTokenizer, BadRequestLog, CannotListen, CannotWrite) as error:
        _say(str(error))
        return error.exit_code
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)
    processes = ReplicaProcesses(deployment, model_dir, step_log)
    try:
        return asyncio.run(_serve(deployment, model, processes, listener, log, api_key, ready_file, adapter_dir))
    finally:
        processes.stop()
        if log is not None:
            log.close()


async def _serve(
    deployment: Deployment,
    model: ServedModel,
    processes: ReplicaProcesses,
    listener: socket.socket,
    request_log: RequestLog | None,
    api_key: str | None,
    ready_file: Path | None,
    adapter_dir: Path | None,
) -> int:
    loop = asyncio.get_running_loop()
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    exit_code = 0

    def on_change(replica: Replica) -> None:
        nonlocal exit_code
        if replica.lost and not server.should_exit:
            exit_code, reason = replica.failure or (1, processes.exit_text(replica.index))
            _say(f"replica {replica.index} stopped ({reason}); the server ends")
            drain()
        elif replica.ready and fleet.ready:
            if ready_file is not None:
                ready = {"url": url, "host": host, "port": port, "model": model.name, "pid": os.getpid()}
                write_whole(ready_file, json.dumps(ready) + "\n")
            _say(f"{model.name} on {url}, replicas: {len(fleet.replicas)}")

    def drain() -> None:
        if server.should_exit:
            give_up()
        server.should_exit = True
        loop.call_later(DRAIN_S, give_up)

    def give_up() -> None:
        for replica in fleet.replicas:
            replica.fail_live(ApiError(503, "the server ended before this answer did"))

    fleet = Fleet([Replica(index, on_change) for index in range(len(processes.connections))])
    adapters = ServedAdapters(model.name, deployment.adapters, fleet, adapter_dir)
    service = Service(model, fleet, api_key=api_key, request_log=request_log, adapters=adapters)
    server = _Server(_config(service.app()))
    for replica, connection in zip(fleet.replicas, processes.connections):
        await loop.create_connection(lambda replica=replica: replica, sock=connection)  # type: ignore[misc]
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain)
    gc.collect()
    gc.freeze()
    await server.serve(sockets=[listener])
    for replica in fleet.replicas:
        replica.close()
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)
    return exit_code


class _Server(uvicorn.Server):
    """Uvicorn without its signal handling, which raises the signal again at the end: a drained server exits with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _config(app: Starlette) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        # streams have ended by then, but for clients that do not read
        timeout_graceful_shutdown=DRAIN_S + 5,
        proxy_headers=False,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
    )


def _served_model(deployment: Deployment, shape: ModelShape, model_dir: Path, name: str | None) -> ServedModel:
    return ServedModel(
        name=name or deployment.model,
        vocab_size=shape.vocab_size,
        max_model_len=deployment.pool.max_model_len,
        end_token_ids=frozenset(shape.eos_token_ids),
        tokenizer=Tokenizer.load(model_dir),
        chat_template=ChatTemplate.load(model_dir),
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


def _check_address(host: str, port: int, api_key: str | None, allow_anyone: bool) -> None:
    if not 0 <= port < 1 << 16:
        # getaddrinfo would take the last 16 bits of it
        raise BadOption("port", port, "0 to 65535, 0 for any free port", "choose another")
    if api_key == "":
        raise BadOption("api_key", "an empty key", "a key that cannot be guessed, or none", "give one")
    if api_key is None and not allow_anyone and not _is_loopback(host):
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


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before anything is loaded. Raises: CannotListen."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise CannotListen(host, port, error.strerror or str(error)) from None
    try:
        # a port whose last server has just ended may be taken again; one that is in use may not
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise CannotListen(host, port, error.strerror or str(error)) from None
    listener.setblocking(False)
    return listener


def _say(text: str) -> None:
    sys.stderr.write(f"paretune serve: {text}\n")
    sys.stderr.flush()
