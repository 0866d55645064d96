"""The lines of a text log, or a clear word on why there are none."""

from __future__ import annotations

from pathlib import Path

from .columns import MAX_TOKENS, BadTrace

COUNT = f"an integer of 0 to {MAX_TOKENS}"
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}
_LONGEST_SHOWN = 200


def bad_line(name: str, line: int, field: str, found: object, allowed: str, todo: str | None = None) -> BadTrace:
    """A refusal that names file, line (counted from 1) and field; a long text is cut to what people can read."""
    where = f"{name}:{line}: {field}" if field else f"{name}:{line}"
    if isinstance(found, (str, bytes)):
        found = found[:_LONGEST_SHOWN]
    return BadTrace(where, found, allowed, todo or "correct the line and run again")


def read_bytes(path: Path) -> bytes:
    """Raises: BadTrace: there is no such file, or it is a folder, unreadable, empty or compressed."""
    name = path.name or str(path)
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise BadTrace(name, "no such file", "a request log", "check the path") from None
    except IsADirectoryError:
        raise BadTrace(name, "a folder", "a request log", "name one file in it") from None
    except PermissionError:
        raise BadTrace(name, "a file that you may not read", "a request log", "check its permissions") from None
    if not data.strip():
        raise BadTrace(name, "an empty file", "at least one request", "check how it was written") from None
    for magic, kind in _COMPRESSED.items():
        if data.startswith(magic):
            raise BadTrace(name, f"a {kind} file", "plain text or Parquet", "decompress it first")
    return data


def lines_of(data: bytes, name: str) -> tuple[list[str], tuple[str, ...]]:
    """The lines of a UTF-8 text (byte-order mark and CRLF allowed) without blank ones at the end; and notes for people.

    Raises: BadTrace: other encodings, or NUL bytes.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadTrace(f"{name}:1", "UTF-16", "UTF-8", "convert it: iconv -f UTF-16 -t UTF-8")
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise bad_line(name, line, "", "a NUL byte", "UTF-8 text", "the file is binary or damaged; write it again")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise bad_line(name, line, "", data[error.start : error.start + 8], "UTF-8 text") from None
    notes = () if text.endswith("\n") else ("the last line has no line end: if the file was cut there, so may it be",)
    lines = text.replace("\r\n", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise BadTrace(name, "an empty file", "at least one request", "check how it was written")
    return lines, notes
