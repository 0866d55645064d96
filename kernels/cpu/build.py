"""Compiles the C++ operators for this machine, once, and loads them.

The compiled file lies in `user_cache_dir()/cpu`, named by a hash of sources, flags, compiler version and CPU flags, so
that an edit, an upgrade or another processor never meets old machine code. Ranks that start together race for it: one
compiles under a file lock, and the file appears by rename. Where there is a compiler but no cache folder it is
compiled in every process; where there is no compiler, `load()` is None and torch does the work.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding

from ..jit import user_cache_dir

SOURCE_FOLDER = Path(__file__).absolute().parent
COMPILE_LIMIT_S = 300


class Library:
    """The loaded operators: each attribute is a C function with its argument types set; see the .cpp files for
    meanings.

    `lanes` is the number of floats in one vector register, `panel` the output channels of one weight panel;
    `instructions` names what was compiled in, for example "avx512 bf16 vnni".
    """

    def __init__(self, path: Path) -> None:
        dll = ctypes.CDLL(str(path))

        def bind(name: str, result: Any, *arguments: Any) -> Any:
            function = getattr(dll, "paretune_" + name)
            function.argtypes = arguments
            function.restype = result
            return function

        pointer, size, number = c_void_p, c_int64, c_int
        workspace = (pointer, size, number)  # address, bytes, threads
        self.path = path
        self.lanes: int = bind("lanes", c_int)()
        self.panel = 2 * self.lanes
        self.max_row_tile: int = bind("max_row_tile", c_int)()
        self.instructions: str = bind("instructions", c_char_p)().decode()
        self.linear = bind(
            "linear", c_int64, pointer, pointer, number, size, size, pointer, *([number] * 5), *workspace
        )
        cache = (pointer, number, size)  # blocks, format, block size
        tables = (pointer, size)  # block tables, their row stride
        heads = (size, size, size, c_float)  # heads, kv_heads, head_dim, scale
        self.decode_attention = bind(
            "decode_attention", c_int64, pointer, size, number, *cache, *tables, pointer, size, *heads, pointer,
            number, number, *workspace,
        )  # fmt: skip
        self.prefill_attention = bind(
            "prefill_attention", c_int64, pointer, size, number, *cache, *tables, pointer, pointer, size, *heads,
            pointer, number, number, *workspace,
        )  # fmt: skip
        self.rms_norm = bind("rms_norm", None, pointer, size, pointer, c_float, pointer, size, size, number, number)
        self.add_rms_norm = bind(
            "add_rms_norm", None, pointer, pointer, pointer, c_float, pointer, size, size, number, number
        )
        self.swiglu = bind("swiglu", None, pointer, size, pointer, size, size, number, number)
        self.route = bind("route", None, pointer, *([size] * 4), number, pointer, pointer, number)
        self.experts = bind(
            "experts", c_int64, pointer, size, size, pointer, size, size, pointer, pointer, size, *([pointer] * 2),
            *workspace,
        )  # fmt: skip
        self.argmax = bind("argmax", None, pointer, size, size, size, pointer, number)
        self.draw = bind("draw", c_int64, pointer, size, size, size, *([pointer] * 4), *workspace)
        self.race = bind("race", c_int64, pointer, size, size, size, *([pointer] * 4), *workspace)
        self.rope_and_cache = bind(
            "rope_and_cache", c_int64, pointer, size, pointer, size, pointer, size, number, pointer, pointer, pointer,
            *cache, pointer, *([size] * 4), number,
        )  # fmt: skip
        self.decoder = bind("decoder", c_int64, *([pointer] * 4), *workspace)
        self.lora_ranks: int = bind("lora_ranks", c_int)()
        self.lora = bind(
            "lora", None, pointer, size, number, pointer, size, size, pointer, size, pointer, pointer, pointer, size,
            number,
        )  # fmt: skip


class _Attempt(NamedTuple):
    library: Library | None
    why_missing: str | None


def load() -> Library | None:
    """The operators compiled for this machine (at first use, seconds), or None: then `why_missing()` has the reason."""
    return _attempt().library


def why_missing() -> str | None:
    """Why there is no C++ library here and what to do about it; None where there is one."""
    return _attempt().why_missing


@functools.cache
def _attempt() -> _Attempt:
    compiler = _compiler()
    if compiler is None:
        chosen = os.environ.get("CXX", "c++, g++ or clang++")
        return _Attempt(None, f"no C++ compiler ({chosen}) on PATH: install g++ or clang++, or set CXX")
    try:
        version = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_LIMIT_S, check=True
        ).stdout
        folder = _cache_folder()
        if folder is None:
            with tempfile.TemporaryDirectory(prefix="paretune-cpu-") as once:
                path = Path(once) / "operators.so"
                compile_library(compiler, path)
                return _Attempt(Library(path), None)
        path = folder / f"operators-{_key(compiler, version)}.so"
        if not path.exists():
            _compile_locked(compiler, path)
        return _Attempt(Library(path), None)
    except subprocess.TimeoutExpired:
        return _Attempt(None, f"{compiler[0]} took longer than {COMPILE_LIMIT_S} s: try again on a quieter machine")
    except subprocess.CalledProcessError as error:
        return _Attempt(None, f"{compiler[0]} failed: {(error.stderr or '').strip()[-600:]}")
    except OSError as error:
        return _Attempt(None, f"the compiled operators could not be written or loaded: {error}")


def _compiler() -> list[str] | None:
    chosen = os.environ.get("CXX")
    for command in (shlex.split(chosen),) if chosen else (["c++"], ["g++"], ["clang++"]):
        if command and shutil.which(command[0]):
            return command
    return None


def flags() -> list[str]:
    """Flags of the compiler. No -ffast-math: masked scores are -inf, and NaN must come through."""
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return [
        "-O3",
        native,
        "-std=c++17",
        "-shared",
        "-pthread",
        "-fPIC",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
    ]


def sources() -> list[Path]:
    return sorted(SOURCE_FOLDER.glob("*.cpp"))


def compile_library(compiler: list[str], path: Path, extra: tuple[str, ...] = ()) -> None:
    """Compile all operators into `path`.

    Raises subprocess.CalledProcessError (stderr holds the messages) and TimeoutExpired.
    """
    command = [*compiler, *flags(), *extra, *map(str, sources()), "-o", str(path)]
    subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_LIMIT_S, check=True)


def _compile_locked(compiler: list[str], path: Path) -> None:
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:
            written = Path(aside) / path.name
            compile_library(compiler, written)
            os.replace(written, path)


def _cache_folder() -> Path | None:
    root = user_cache_dir()
    if root is None:
        return None
    folder = root / "cpu"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        return None
    return folder


def _key(compiler: list[str], version: str) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCE_FOLDER.glob("*.[ch]*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update(repr((compiler, flags(), version, llvmlite.binding.get_host_cpu_name())).encode())
    digest.update(llvmlite.binding.get_host_cpu_features().flatten().encode())
    return digest.hexdigest()[:24]
