"""Numba's `njit` with a compile cache that cannot go stale.

`cache=True` alone looks only at the function's own file: after an edit of a callee in another file the old machine
code still runs. So our cache folder is keyed by every jitted source of the package and what these import from it (whose
constants are compiled in), Numba's version and the CPU. Where
no folder can be written (read-only install, no home directory) functions compile in every process instead.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite.binding
import numba
import numba.core.config

Function = TypeVar("Function", bound=Callable[..., Any])

_config: Any = numba.core.config
_typeof: Any = numba.typeof
_RELATIVE_IMPORT = re.compile(r"^from (\.+)([\w.]*) import ([\w, ]*)", re.MULTILINE)
_OPTIONS: dict[str, Any] = {"nogil": True, "_nrt": False, "error_model": "numpy", "forceinline": True}


def user_cache_dir() -> Path | None:
    """The user's own cache folder for compiled code (mode 0700), or None where there is none that we may trust.

    `PARETUNE_CACHE_DIR`, else `$XDG_CACHE_HOME/paretune`, else `~/.cache/paretune`. A folder that belongs to another
    user or that others may write is not used: whoever can write there can run code as us.
    """
    chosen = os.environ.get("PARETUNE_CACHE_DIR")
    if chosen:
        folder = Path(chosen)
    else:
        xdg = os.environ.get("XDG_CACHE_HOME")
        home = os.path.expanduser("~")
        if not xdg and not os.path.isabs(home):
            return None
        folder = Path(xdg or os.path.join(home, ".cache")) / "paretune"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            return None
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


@functools.cache
def cache_dir() -> Path | None:
    """Folder of compiled Numba code, keyed by all jitted sources, Numba and the CPU; None = nothing is cached."""
    root = user_cache_dir()
    if root is None:
        return None
    digest = hashlib.sha256()
    digest.update(f"{numba.__version__} {llvmlite.binding.get_host_cpu_name()}".encode())
    digest.update(llvmlite.binding.get_host_cpu_features().flatten().encode())
    package = Path(__file__).absolute().parent.parent
    for source in compiled_sources(package):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    folder = root / "numba" / digest.hexdigest()[:24]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


def compiled_sources(package: Path) -> list[Path]:
    """The files of a package that jitted code comes from: those with @njit, and those that they import directly."""
    found = set()
    for source in package.glob("*/*.py"):
        text = source.read_text()
        if "@njit" not in text:
            continue
        found.add(source)
        for dots, module, names in _RELATIVE_IMPORT.findall(text):
            folder = source.parents[len(dots) - 1].joinpath(*filter(None, module.split(".")))
            # from . import a, b names modules; from .a import B one
            modules = [folder / name.strip() for name in names.split(",")] if not module else [folder]
            found.update(path for path in (each.with_suffix(".py") for each in modules) if path.is_file())
    return sorted(found)


def bind(function: Callable[..., Any], *arguments: object, then: tuple[object, ...] = ()) -> Callable[..., Any]:
    """A jitted function with its first arguments given, for calls every few milliseconds, of the types it has now.

    Numba looks at the type of every argument at every call: 15 us for the scheduler's 60 arrays, more than what it then
    computes. This looks once.

    Args:
        arguments: what it works on; arrays stay the same ones, in place.
        then: an example of each argument that follows; what is passed for it has that type, dtype and contiguity, and
            nobody checks that.
    """
    compile_for = getattr(function, "compile", None)
    if compile_for is None:  # NUMBA_DISABLE_JIT: a plain Python function
        return functools.partial(function, *arguments)
    return functools.partial(compile_for(tuple(_typeof(each) for each in (*arguments, *then))), *arguments)


def njit(function: Function) -> Function:
    """Compile a function with Numba (no Python objects, no GIL while it runs), cached on disk where that is safe.

    The function reads and writes arrays it is given and allocates none. So reference counts are switched off: with the
    scheduler's arrays in one tuple, 28 then, they took seven eighths of the simulator's time (40,000 against 300,000
    requests per CPU-second). And every call is inlined: one that is not copies the descriptors of all these arrays, 50
    by now, which took half of the time (300,000 against 540,000); compiling takes no longer. Division by zero gives inf
    or nan, as in NumPy.

    With `NUMBA_DISABLE_JIT=1` the plain Python function runs, for debuggers. Results must be the same bytes: accumulate
    in int64 and float64, since Numba widens int32 arithmetic and NumPy does not.
    """
    return _compiled(function, _OPTIONS)


def njit_called(function: Function) -> Function:
    """`njit`, but calls of it stay calls: for large functions with few arrays that are called from many places, which
    would take minutes to compile if each call were a copy."""
    return _compiled(function, {**_OPTIONS, "forceinline": False})


def _compiled(function: Function, options: dict[str, Any]) -> Function:
    folder = cache_dir()
    if folder is None or _config.DISABLE_JIT:
        return cast(Function, numba.njit(**options)(function))
    # Numba picks the cache folder when a function is decorated; its setting is global, so it is ours for that moment.
    before = _config.CACHE_DIR
    _config.CACHE_DIR = str(folder)
    try:
        return cast(Function, numba.njit(cache=True, **options)(function))
    finally:
        _config.CACHE_DIR = before
