"""An OpenAI-compatible HTTP server for one deployment: `serve`.

This process speaks HTTP and text; every replica is a process of its own that runs the engine (runtime/worker.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..spec import Deployment

__all__ = ["serve"]


def serve(
    deployment: Deployment,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    request_log: str | Path | None = None,
    step_log: str | Path | None = None,
    api_keys: Sequence[str] = (),
    served_model_name: str | None = None,
    ready_file: str | Path | None = None,
    allow_anyone: bool = False,
    spec_file: str | Path | None = None,
    adapter_dir: str | Path | None = None,
) -> int:
    """Serve a deployment until SIGTERM or SIGINT; call it in the main thread.

    What memory it takes is said on stderr before anything is loaded. On a signal no more connections are taken, streams
    that run are finished (in at most 30 s, or until a second signal), and all processes end.

    Args:
        host: address to listen on; one that other machines reach needs an API key.
        port: 0 takes a free one.
        request_log: file that gets one JSON line a finished request, which `paretune.traces.read` takes.
        step_log: file that gets one JSON line an engine step.
        api_keys: any of them is what clients must send as `Authorization: Bearer KEY`; none = nothing.
        served_model_name: the model's name for clients; None = deployment.model.
        ready_file: file that appears, whole, when every replica has loaded: JSON with url, host, port, model and pid.
        allow_anyone: listen on a host that other machines reach without an API key.
        spec_file: the deployment's, which is read again at SIGHUP: limits and tiles change in the replicas that run,
            for the rest new ones are loaded beside them, which takes the memory of both; no request is dropped. None:
            SIGHUP ends the process.
        adapter_dir: folder of LoRA adapters that clients may load while the server runs; None = they may not.
    Returns: the exit code. 0: ended by a signal; 1: port in use, a log that cannot be written, or a replica that died;
        2: a spec, model or option that cannot be served. What was wrong is one line on stderr.
    """
    from .process import run

    return run(
        deployment,
        host=host,
        port=port,
        request_log=None if request_log is None else Path(request_log),
        step_log=None if step_log is None else Path(step_log),
        api_keys=tuple(api_keys),
        served_model_name=served_model_name,
        ready_file=None if ready_file is None else Path(ready_file),
        allow_anyone=allow_anyone,
        spec_file=None if spec_file is None else Path(spec_file),
        adapter_dir=None if adapter_dir is None else Path(adapter_dir),
    )
