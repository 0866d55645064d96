"""The public load generators against our server, as they come from PyPI: aiperf and guidellm, streaming.

Each is installed into a virtual environment of its own in the cache folder where it is missing (some gigabytes, most of
it torch); --no-install uses what is there. A name among the arguments leaves out the other. Both read the model
folder's own tokenizer to make prompts and count tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime_peers import has, pip, say

from bars import Bar, finish
from paretune.kernels.jit import user_cache_dir
from paretune.profiler.live import LiveServer, live_server
from paretune.runtime.small_model import MODEL_DIR
from paretune.runtime.spec import Deployment

REQUESTS = 40
RUN_LIMIT_S = 300.0
VERSIONS = {"aiperf": "0.13.0", "guidellm": "0.8.1"}
DEPLOYMENT = Deployment().with_pool(max_model_len=1024, num_kv_blocks=1024, max_num_seqs=16)


def aiperf(venv: Path, server: LiveServer, folder: Path) -> tuple[int, dict[str, Any]]:
    """(requests that finished, what it measured)."""
    run(
        [venv / "bin/aiperf", "profile", "--model", server.model, "--url", server.url, "--endpoint-type", "chat"],
        ["--streaming", "--concurrency", "4", "--request-count", REQUESTS, "--isl", "64", "--osl", "16"],
        ["--tokenizer", MODEL_DIR, "--output-artifact-dir", folder / "aiperf", "--ui", "none"],
    )
    found = json.loads((folder / "aiperf" / "profile_export_aiperf.json").read_text())
    return int(found["request_count"]["avg"]), {
        "ttft_ms": found["time_to_first_token"]["avg"],
        "inter_token_ms": found["inter_token_latency"]["avg"],
        "errors": found["error_summary"],
    }


def guidellm(venv: Path, server: LiveServer, folder: Path) -> tuple[int, dict[str, Any]]:
    """(requests that finished, what it measured)."""
    out = folder / "guidellm.json"
    run(
        [venv / "bin/guidellm", "run", "--backend", f"kind=openai_http,target={server.url}"],
        ["--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={REQUESTS}"],
        ["--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"],
        ["--tokenizer", f"kind=hf_auto,model={MODEL_DIR}", "--output", f"kind=json,path={out}", "--disable-console"],
    )
    metrics = json.loads(out.read_text())["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    return int(totals["successful"]), {
        "ttft_ms": metrics["time_to_first_token_ms"]["successful"]["mean"],
        "inter_token_ms": metrics["inter_token_latency_ms"]["successful"]["mean"],
        "requests": totals,
    }


GENERATORS: dict[str, Callable[[Path, LiveServer, Path], tuple[int, dict[str, Any]]]] = {
    "aiperf": aiperf,
    "guidellm": guidellm,
}


def run(*parts: list[object]) -> None:
    command = [str(word) for part in parts for word in part]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=RUN_LIMIT_S
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stdout[-1500:]} {done.stderr[-1500:]}")


def ready(name: str, venv: Path, install: bool) -> bool:
    if not has(venv, name) and install:
        say(f"installing {name} in {venv} ...")
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        # the processor's build of torch, where the index has one, before the generator asks for any
        pip(venv, "torch<2.14")
        pip(venv, f"{name}=={VERSIONS[name]}")
    if not has(venv, name):
        say(f"left out: {name} is not installed")
        return False
    return True


def main() -> int:
    root = user_cache_dir()
    if root is None:
        say("no cache folder that can be written: set PARETUNE_CACHE_DIR")
        return 1
    venvs = {name: root / "peers" / "venv" / name for name in GENERATORS}
    asked = [name for name in sys.argv if name in GENERATORS] or list(GENERATORS)
    names = [name for name in asked if ready(name, venvs[name], "--no-install" not in sys.argv)]
    if not names:
        say("nothing to run")
        return 1
    bars, details = [], {}
    with live_server(DEPLOYMENT) as server, tempfile.TemporaryDirectory() as folder:
        for name in names:
            finished, details[name] = GENERATORS[name](venvs[name], server, Path(folder))
            details[name]["version"] = VERSIONS[name]
            say(f"{name}: {finished} of {REQUESTS} finished; {details[name]}")
            bars.append(Bar(f"{name}: share of its requests that finished", finished / REQUESTS, 1.0))
    finish(bars, details)
    return 0


if __name__ == "__main__":
    sys.exit(main())
