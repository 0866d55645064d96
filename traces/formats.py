"""Reading a request log whatever its format, and writing ours."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

from .agent_formats import read_llmservingsim
from .columns import BadTrace
from .csv_formats import AZURE_COLUMNS, BURSTGPT_COLUMNS, header_of, read_azure, read_burstgpt
from .jsonl_formats import object_of, read_mooncake, read_openai
from .parquet_format import read_parquet, write_parquet
from .text_file import bad_line, lines_of, read_bytes
from .trace import Trace

__all__ = ["FORMATS", "BadTrace", "read", "sample_path", "sniff", "write"]

_TEXT_READERS = {
    "azure": read_azure,
    "burstgpt": read_burstgpt,
    "llmservingsim": read_llmservingsim,
    "mooncake": read_mooncake,
    "openai": read_openai,
}
FORMATS = (*_TEXT_READERS, "parquet")
_RECOGNIZED = (
    f"CSV with the columns {','.join(AZURE_COLUMNS)} (azure) or {','.join(BURSTGPT_COLUMNS)} (burstgpt); "
    "JSON lines with input_length (mooncake), input_toks or sub_requests (llmservingsim), or usage (openai); Parquet"
)


def read(path: str | os.PathLike[str], *, format: str | None = None) -> Trace:
    """Read a request log.

    Args:
        path: of the file.
        format: one of FORMATS; None recognizes it by content, never by the file's name.
    Returns: a Trace; `notes` says what was left out or changed.
    Raises: BadTrace: names the file, the line and the field.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise BadTrace("format", format, ", ".join(FORMATS), "name one of them, or none to have it recognized")
    data = read_bytes(path)
    name = path.name
    format = sniff(data, name) if format is None else format
    return read_parquet(data, path) if format == "parquet" else _TEXT_READERS[format](data, name)


def write(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace as Parquet, whole or not at all; `read` gives back one of the same digest. Raises: OSError."""
    write_parquet(trace, path)


def sniff(data: bytes, name: str) -> str:
    """Which of FORMATS a file's bytes are, by the header of a CSV or the first object of JSON lines.

    Raises: BadTrace: none of them.
    """
    if data.startswith(b"PAR1"):
        return "parquet"
    lines, _ = lines_of(data, name)
    number, line = next((n, line) for n, line in enumerate(lines, start=1) if line.strip())
    if line.lstrip().startswith("["):
        raise bad_line(name, number, "", line, "one JSON object a line, no list", "convert it: jq -c '.[]'")
    if line.lstrip().startswith("{"):
        row = object_of(line, name, number)
        if "sub_requests" in row or "input_toks" in row:
            return "llmservingsim"
        if "input_length" in row or "hash_ids" in row:
            return "mooncake"
        if "usage" in row or "response" in row:
            return "openai"
        raise bad_line(name, number, "", sorted(row)[:20], _RECOGNIZED, "name the format, or convert the log")
    header = header_of(line)
    for format, columns in (("azure", AZURE_COLUMNS), ("burstgpt", BURSTGPT_COLUMNS)):
        if set(columns) <= set(header):
            return format
    raise bad_line(name, number, "", line, _RECOGNIZED, "name the format, or convert the log")


def sample_path() -> Path:
    """The small trace that ships with paretune: ten minutes of Azure conversations, CC-BY-4.0 (samples/NOTICE.md)."""
    return Path(str(importlib.resources.files(__package__) / "samples" / "azure_conv_sample.csv"))
