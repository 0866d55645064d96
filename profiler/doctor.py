"""What this machine can do for paretune, what is missing, what that costs, and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..kernels.cpu.build import load, why_missing
from ..kernels.jit import cache_dir
from ..kernels.weight_formats import BF16_CAPABILITY, FP8_CAPABILITY, WEIGHT_FORMATS
from ..runtime.device import Gpu, gpus
from .prices import PriceBook
from .profile import BadProfile, Profile, this_machine

State = Literal["ok", "limited", "missing"]

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing looked at. todo: what to do about it; empty where nothing needs doing."""

    name: str
    state: State
    text: str
    todo: str = ""


def examine(profile_path: str | os.PathLike[str] | None = None) -> tuple[Finding, ...]:
    """Look at the processor, compiler, caches, packages, disk, prices, and the profile where one is named."""
    findings = [
        _processor(),
        _compiler(),
        _weight_formats(),
        _cache(),
        _triton(),
        _cuda(),
        _postgres(),
        _disk(),
        _prices(),
    ]
    if profile_path is not None:
        findings.append(_profile(Path(profile_path)))
    return tuple(findings)


def _processor() -> Finding:
    library = load()
    machine = this_machine("" if library is None else library.instructions)
    flags = [flag for flag in ("avx512_bf16", "avx512_vnni", "avx512f", "avx2") if flag in machine.flags]
    text = f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / GIB:.0f} GiB; {' '.join(flags) or 'no AVX2'}"
    if "avx512_bf16" in flags and "avx512_vnni" in flags:
        return Finding("processor", "ok", text)
    todo = "bf16 and int8 weights are right here, computed without dot-product instructions: profile before you choose"
    return Finding("processor", "limited", text, todo)


def _compiler() -> Finding:
    reason = why_missing()
    if reason is None:
        return Finding("CPU operators", "ok", "the C++ library is compiled and loaded")
    text = f"torch computes all operators ({reason}); decode takes about twice as long"
    return Finding("CPU operators", "limited", text, "install a C++ compiler (Debian: apt install g++)")


def _weight_formats() -> Finding:
    """Which precisions of weights gain speed here, and which only memory."""
    library = load()
    having = "" if library is None else library.instructions
    fast = ["fp32"]
    if library is not None:
        fast += ["int4", "ternary"]
        fast += ["bf16"] if "bf16" in having else []
        fast += ["int8"] if "vnni" in having else []
    slow = [name for name in WEIGHT_FORMATS if name not in fast]
    text = f"multiplied as stored: {', '.join(fast)}; right, but expanded or emulated: {', '.join(slow)}"
    return Finding("weight precisions", "ok", text, "profile before you choose one of the latter")


def _cache() -> Finding:
    folder = cache_dir()
    if folder is not None:
        return Finding("compile cache", "ok", str(folder.parent.parent))
    todo = "set PARETUNE_CACHE_DIR to a folder of your own that others cannot write"
    return Finding("compile cache", "limited", "none: every start compiles anew (about 20 s)", todo)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton() -> Finding:
    version = _version("triton")
    if version is None:
        return Finding("triton", "missing", "not installed: only the CPU operators run", "pip install triton (Linux)")
    return Finding("triton", "ok", version)


def _cuda() -> Finding:
    import torch

    found = gpus()
    if not found:
        text = f"none that torch {torch.__version__} sees. The bundled runtime serves on the CPU"
        return Finding("GPU", "missing", text, "tune for an accelerator of the catalog: paretune tune --accelerator")
    shown = "; ".join(_gpu_text(gpu) for gpu in found)
    if any(gpu.capability < BF16_CAPABILITY for gpu in found):
        todo = "the bundled runtime takes capability 8.0 and up: hide the others with CUDA_VISIBLE_DEVICES"
        return Finding("GPU", "limited", shown, todo)
    if _version("triton") is None:
        return Finding("GPU", "limited", shown, "pip install triton: attention and norms on GPUs are its kernels")
    todo = "check it first: python benchmarks/gpu.py; the GPU path has run on an NVIDIA H200 alone"
    return Finding("GPU", "limited", shown, todo)


def _gpu_text(gpu: Gpu) -> str:
    """Which weights its tensor cores multiply as stored, by capability (kernels/gpu_linear.py)."""
    fast = ["bf16", "fp16", "int8"] if gpu.capability >= BF16_CAPABILITY else []
    fast += ["fp8"] if gpu.capability >= FP8_CAPABILITY else []
    slow = [name for name in WEIGHT_FORMATS if name not in (*fast, "fp32")]
    memory = f"{gpu.free_bytes / GIB:.0f} of {gpu.total_bytes / GIB:.0f} GiB free"
    capability = ".".join(map(str, gpu.capability))
    text = f"{gpu.name}, capability {capability}, {memory}; multiplied as stored: {', '.join(fast) or 'none'}"
    return f"{text}; expanded: {', '.join(slow)}"


def _postgres() -> Finding:
    version = _version("psycopg")
    if version is None:
        todo = "pip install 'paretune[postgres]' to keep studies in PostgreSQL"
        return Finding("PostgreSQL driver", "missing", "not installed: studies are kept in SQLite", todo)
    return Finding("PostgreSQL driver", "ok", version)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    state: State = "ok" if free > GIB else "limited"
    return Finding(
        "disk", state, f"{free / GIB:.1f} GiB free here", "" if state == "ok" else "make room: 1 GiB is safe"
    )


def _prices() -> Finding:
    price = PriceBook.load().usd_per_device_hour("cpu")
    text = f"a CPU core {price.usd_per_hour:.3f} USD an hour, as of {price.as_of} ({price.source})"
    return Finding("price book", "ok", text, "give your own prices with --prices FILE")


def _profile(path: Path) -> Finding:
    if not path.exists():
        return Finding("profile", "missing", f"{path} is not there", f"paretune profile run -o {path}")
    try:
        profile = Profile.load(path)
    except BadProfile as error:
        return Finding("profile", "limited", str(error), f"paretune profile run -o {path}")
    return Finding("profile", "ok", f"{path}: {profile.name}, {len(profile.configurations)} configurations")
