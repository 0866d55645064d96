"""Files that appear whole or not at all: write aside, fsync, rename, fsync the folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch path beside `path`; when the block ends well it takes `path`'s place in one step, else it is removed.

    A reader, or a machine that loses power, sees the old file or the new one, never half of one.

    Raises: OSError: the folder cannot be written, or the disk is full.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        with open(scratch, "rb") as stream:
            os.fsync(stream.fileno())
        # mkstemp gives 0600; what we publish follows the user's umask like any other file
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o666 & ~umask)
        os.replace(scratch, target)
    except BaseException as error:
        scratch.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            # a full disk does not say which file it could not hold
            error.filename = os.fspath(path)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Put `data` at `path`, whole or not at all (text as UTF-8)."""
    with whole_file(path) as scratch:
        scratch.write_bytes(data.encode() if isinstance(data, str) else data)
