"""The server's request log: one JSON object a line, which `paretune.traces.read` takes. No text, ever.

Lines are appended in order of completion; the reader sorts them by arrival. Prefixes appear as keyed hashes; the key,
the salt, lies beside the log in a file that only its owner can read, and is shared by all logs of that folder.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..traces.prefix import prefix_hashes
from .speculated import Speculated

SALT_FILE = "prefix_salt.json"
_SALT_BYTES = 32
# a prompt of a million tokens at 16 a hash makes 1.3 MB of hashes
_LONGEST_LINE = 1 << 22


class BadRequestLog(Exception):
    """A request log that cannot be written, or a salt that cannot be trusted: where, found, allowed, what to do."""

    exit_code: ClassVar[int] = 1

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:80]}; allowed: {self.allowed}; {self.todo}"


@dataclass(frozen=True)
class PrefixKey:
    """What the hashes of a folder's logs have in common: the secret, and the tokens that one hash covers."""

    salt: bytes
    block_size: int

    @classmethod
    def of_folder(cls, folder: Path, block_size: int) -> PrefixKey:
        """The key of a folder; made of fresh random bytes, with this block size, where there is none yet.

        Raises: BadRequestLog: others can read it, or it is damaged. OSError.
        """
        path = folder / SALT_FILE
        if not path.exists():
            # mkstemp gives 0600; a link appears whole, and only if nobody else's did
            handle, scratch = tempfile.mkstemp(prefix=f".{SALT_FILE}.", dir=folder)
            try:
                with open(handle, "w") as stream:
                    stream.write(json.dumps({"salt": secrets.token_hex(_SALT_BYTES), "block_size": block_size}) + "\n")
                    stream.flush()
                    os.fsync(stream.fileno())
                with suppress(FileExistsError):
                    os.link(scratch, path)
            finally:
                os.unlink(scratch)
        return cls._read(path)

    @classmethod
    def _read(cls, path: Path) -> PrefixKey:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            todo = f"run: chmod 600 {path}; whoever read it can test prompts against the hashes"
            raise BadRequestLog(str(path), f"mode {mode:04o}", "0600, for its owner alone", todo)
        try:
            data = json.loads(path.read_text("ascii"))
            key = cls(bytes.fromhex(data["salt"]), int(data["block_size"]))
        except (ValueError, KeyError, TypeError) as error:
            todo = "move it and the folder's logs away, so that a new one is made"
            raise BadRequestLog(str(path), error, "salt and block_size", todo) from None
        if len(key.salt) != _SALT_BYTES or key.block_size < 1:
            raise BadRequestLog(str(path), "another length", f"{_SALT_BYTES} bytes of salt", "move it away")
        return key


@dataclass(frozen=True)
class FinishedRequest:
    """What is logged of a request; times in seconds from receipt, `created` in epoch seconds at receipt."""

    created: float
    model: str
    app: str | None
    session: str | None
    prompt_token_ids: NDArray[np.int32]
    completion_tokens: int
    cached_tokens: int
    ttft_s: float | None
    e2e_s: float
    finish_reason: str
    adapter: str | None = None
    speculated: Speculated | None = None  # None: the server does not speculate


class RequestLog:
    """Appends finished requests, each with one write of one whole line. A log that is there already is continued.

    failed_writes counts lines that the disk did not take; the first is told on stderr, and serving goes on.
    """

    def __init__(self, path: str | Path, *, block_size: int) -> None:
        """Open a log.

        Args:
            block_size: tokens that one prefix hash covers, for a folder that has no salt yet.
        Raises: BadRequestLog: the folder cannot be written, or see PrefixKey.
        """
        self.path = Path(path)
        self.failed_writes = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._key = PrefixKey.of_folder(self.path.parent, block_size)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            _finish_last_line(self._handle, self.path)
        except OSError as error:
            raise BadRequestLog(str(path), error.strerror, "a file that can be written", "choose another") from None

    def write(self, request: FinishedRequest) -> None:
        """Append one line."""
        line = json.dumps(self._object(request), separators=(",", ":")).encode() + b"\n"
        end = os.fstat(self._handle).st_size
        try:
            written = os.write(self._handle, line)
            if written < len(line):
                os.ftruncate(self._handle, end)
                raise OSError(None, "no space for a whole line")
        except OSError as error:
            self.failed_writes += 1
            if self.failed_writes == 1:
                sys.stderr.write(f"paretune serve: {self.path}: {error.strerror}; requests are missing from this log\n")

    def close(self) -> None:
        os.close(self._handle)

    def _object(self, request: FinishedRequest) -> dict[str, Any]:
        data: dict[str, Any] = {"created": request.created, "model": request.model}
        data |= {name: value for name in ("app", "session", "adapter") if (value := getattr(request, name)) is not None}
        prompt_tokens = len(request.prompt_token_ids)
        data["usage"] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": request.completion_tokens,
            "total_tokens": prompt_tokens + request.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": request.cached_tokens},
        }
        hashes = prefix_hashes(request.prompt_token_ids, self._key.block_size, self._key.salt)
        data["prefix_hashes"] = hashes.tolist()
        data["prefix_block_size"] = self._key.block_size
        data["timings"] = {"ttft_s": request.ttft_s, "e2e_s": request.e2e_s}
        data["finish_reason"] = request.finish_reason
        if request.speculated is not None:
            data["speculation"] = request.speculated.logged(request.completion_tokens)
        return data


def _finish_last_line(handle: int, path: Path) -> None:
    """End a log on a line end: half an object, left by a crash, is cut off, as no reader could use it.

    Raises: BadRequestLog: the file is something else, and shall stay as it is.
    """
    size = os.fstat(handle).st_size
    if not size:
        return
    if os.pread(handle, 1, 0) != b"{":
        raise BadRequestLog(str(path), "a file that is no request log", "JSON lines, or no file yet", "choose another")
    tail = os.pread(handle, _LONGEST_LINE, max(0, size - _LONGEST_LINE))
    last = tail[tail.rfind(b"\n") + 1 :]
    if not last:
        return
    try:
        json.loads(last)
    except ValueError:
        os.ftruncate(handle, size - len(last))
    else:
        os.write(handle, b"\n")
