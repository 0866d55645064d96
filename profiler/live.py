"""A server of our own for as long as a measurement takes: started, waited for, stopped, never left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime.model_shape import resolve_model
from ..runtime.parallel import thread_environment
from ..runtime.server import serve
from ..runtime.spec import Deployment, load_deployment, save_deployment
from ..traces.trace import Trace
from .replay import NoServer, Progress, ReplayResult, prompt_token_ids, replay

START_LIMIT_S = 180.0
# the server drains its streams for 30 s, and then ends its replicas
STOP_LIMIT_S = 45.0
_KILLED_STOP_LIMIT_S = 10.0
WARM_UP_REQUESTS = 8


class ServerFailed(RuntimeError):
    """Our server did not come up, or went down: what it said on stderr."""

    def __init__(self, reason: str, exit_code: int = 1) -> None:
        super().__init__(reason)
        # 2: the server refused the spec or the model
        self.exit_code = 2 if exit_code == 2 else 1


@dataclass(frozen=True)
class LiveServer:
    """A running server. url: http://HOST:PORT; model: the name to ask for; pid: of the HTTP process."""

    url: str
    model: str
    pid: int


@contextmanager
def live_server(
    deployment: Deployment,
    *,
    step_log: str | os.PathLike[str] | None = None,
    request_log: str | os.PathLike[str] | None = None,
    start_limit_s: float = START_LIMIT_S,
) -> Iterator[LiveServer]:
    """Serve a deployment on a free port of this machine while the block runs.

    The server has a process group and a pipe of its own: it stops at the end of the block (SIGTERM, then SIGKILL), and
    when this process dies, however that happens. One that ends before the block does has failed.

    Args:
        step_log, request_log: files that get a line for each step and for each request.
        start_limit_s: seconds for every replica to load.
    Raises: ServerFailed.
    """
    with tempfile.TemporaryDirectory(prefix="paretune-live-") as name, open(Path(name) / "stderr", "w+b") as said:
        folder = Path(name)
        save_deployment(deployment, folder / "spec.yaml")
        task = {
            "spec": str(folder / "spec.yaml"),
            "ready_file": str(folder / "ready.json"),
            "step_log": None if step_log is None else os.path.abspath(step_log),
            "request_log": None if request_log is None else os.path.abspath(request_log),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.live", json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
            env={**os.environ, **thread_environment(deployment.pool)},
            start_new_session=True,
        )
        try:
            server = _wait_until_ready(process, folder / "ready.json", folder / "stderr", start_limit_s)
            try:
                yield server
            except (ServerFailed, NoServer) as error:
                if process.poll() is None:
                    raise
                # requests that failed, or found no server: its last words say why
                raise _ended(process, folder / "stderr") from error
            if process.poll() is not None:
                raise _ended(process, folder / "stderr")
        finally:
            _stop(process)


def measure_live(
    deployment: Deployment,
    trace: Trace,
    *,
    k: int = 30,
    rate: float = 1.0,
    seed: int = 0,
    warm_up: bool = True,
    timeout_s: float = 600.0,
    step_log: str | os.PathLike[str] | None = None,
    request_log: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> ReplayResult:
    """Replay a trace against a server that is started for it and stopped after it.

    Args:
        warm_up: first send a few requests of the trace's lengths, all at once and with other tokens, which are not
            counted.
    Raises: ServerFailed; BadModel.
    """
    token_ids = prompt_token_ids(resolve_model(deployment.model))
    with live_server(deployment, step_log=step_log, request_log=request_log) as server:
        if warm_up:
            warm_server(server, trace, token_ids, seed=seed + 1, timeout_s=timeout_s)
        return replay(
            trace,
            server.url,
            k=k,
            seed=seed,
            rate=rate,
            model=server.model,
            token_ids=token_ids,
            timeout_s=timeout_s,
            progress=progress,
        )


def warm_server(
    server: LiveServer, trace: Trace, token_ids: NDArray[np.int32], *, seed: int = 1, timeout_s: float = 600.0
) -> None:
    """Send a few requests of a trace's lengths, all at once and uncounted: the first steps of a server are slow.

    Raises: ServerFailed: one of them failed.
    """
    some = trace.select(slice(0, WARM_UP_REQUESTS))
    at_once = Trace(np.zeros(len(some)), some.input_tokens, np.minimum(some.output_tokens, 16))
    check_served(replay(at_once, server.url, model=server.model, token_ids=token_ids, seed=seed, timeout_s=timeout_s))


def check_served(result: ReplayResult) -> None:
    """Raises: ServerFailed: requests failed, so that what was measured is no measurement of the others either."""
    if result.errors:
        total = len(result.times.finished)
        raise ServerFailed(f"{len(result.errors)} of {total} requests failed, the first one: {result.errors[0]}")


def _wait_until_ready(process: subprocess.Popen[bytes], ready: Path, stderr: Path, limit_s: float) -> LiveServer:
    """The file that the server writes when GET /health would answer 200."""
    deadline = time.monotonic() + limit_s
    while not ready.exists():
        if process.poll() is not None:
            raise _ended(process, stderr)
        if time.monotonic() > deadline:
            raise ServerFailed(f"the server was not ready within {limit_s:.0f} s: {_last_lines(stderr)}")
        time.sleep(0.02)
    told = json.loads(ready.read_text())
    return LiveServer(told["url"], told["model"], process.pid)


def _ended(process: subprocess.Popen[bytes], stderr: Path) -> ServerFailed:
    return ServerFailed(
        f"the server ended with exit code {process.returncode}: {_last_lines(stderr)}", process.returncode
    )


def _last_lines(stderr: Path) -> str:
    lines = stderr.read_text(errors="replace").strip().splitlines()
    return " | ".join(lines[-5:]) or "it said nothing"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM; what is left of its process group after that is killed."""
    assert process.stdin is not None
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_KILLED_STOP_LIMIT_S)
    with contextlib.suppress(ProcessLookupError):  # the whole group has ended, as it should
        os.killpg(process.pid, signal.SIGKILL)
    process.stdin.close()


def main() -> int:
    """The server process; its standard input ends when the process that measures does, and it with that."""
    task = json.loads(sys.argv[1])
    threading.Thread(target=_stop_with_the_parent, daemon=True).start()
    return serve(
        load_deployment(task["spec"]),
        port=0,
        ready_file=task["ready_file"],
        step_log=task["step_log"],
        request_log=task["request_log"],
    )


def _stop_with_the_parent() -> None:
    # the bare file: a thread that waits in sys.stdin holds its lock, and Python cannot end
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
