"""Our own format: Parquet, one row a request, what is not per request as JSON in the file's metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from .acceptance import acceptance_of_rows, acceptance_rows
from .agent_formats import LMCACHE_COLUMNS, lmcache_trace
from .columns import BadTrace, Labels, PrefixHashes
from .servegen import RATE_COLUMNS, draw_servegen
from .trace import Trace, join_targets, parse_target
from .whole_file import whole_file

SCHEMA_VERSION = 1
_METADATA_KEY = b"paretune.trace"
_NUMBERS = {"arrival_s": "double", "input_tokens": "int32", "output_tokens": "int32"}
_LABELS = ("app", "adapter", "session")


def write_parquet(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Columns arrival_s, input_tokens, output_tokens; app, adapter, session, pause_s, prefix_hashes, target where the
    trace has them. The file appears whole or not at all.

    Raises: OSError: the folder cannot be written, or the disk is full.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {name: pa.array(getattr(trace, name)) for name in _NUMBERS}
    for name in _LABELS:
        labels: Labels | None = getattr(trace, name)
        if labels is not None:
            codes = pa.array(labels.codes, mask=labels.codes < 0)
            columns[name] = pa.DictionaryArray.from_arrays(codes, pa.array(labels.names, type=pa.string()))
    if trace.pause_s is not None:
        columns["pause_s"] = pa.array(trace.pause_s, mask=np.isnan(trace.pause_s))
    if trace.prefix is not None:
        columns["prefix_hashes"] = pa.LargeListArray.from_arrays(trace.prefix.offsets, trace.prefix.hashes)
    owned: set[int] = set()
    if trace.target is not None:
        owned = set(trace.target.tolist()) - {-1}
        texts = [None if i < 0 else str(trace.targets[i]) for i in trace.target.tolist()]
        columns["target"] = pa.array(texts, type=pa.string())
    about = {
        "schema_version": SCHEMA_VERSION,
        "targets": [str(target) for i, target in enumerate(trace.targets) if i not in owned],
        "prefix_block_size": None if trace.prefix is None else trace.prefix.block_size,
        "acceptance": acceptance_rows(trace.acceptance),
        "source": trace.source,
        "notes": list(trace.notes),
    }
    table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(about).encode()})
    with whole_file(path) as scratch:
        pq.write_table(table, scratch, compression="zstd")


def read_parquet(data: bytes, path: Path) -> Trace:
    """A trace of ours, an agents' log (agent_formats.py), or one drawn from a client pool (servegen.py).

    Raises: BadTrace: damaged, of a newer version, or without the columns of a trace.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = path.name
    try:
        table = pq.read_table(pa.BufferReader(data))
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        todo = "the file is damaged or cut off; write it again"
        raise BadTrace(name, str(error).split("\n")[0], "a whole Parquet file", todo) from None
    if set(LMCACHE_COLUMNS) <= set(table.column_names):
        return lmcache_trace(table, name)
    if set(RATE_COLUMNS) <= set(table.column_names):
        return draw_servegen(table, path)
    about = _about(table.schema.metadata or {}, name)
    columns: dict[str, Any] = {column: _numbers(table, column, kind, name) for column, kind in _NUMBERS.items()}
    columns |= {column: _labels(table, column, name) for column in _LABELS}
    optional = (*_LABELS, "pause_s", "prefix_hashes", "target")
    unread = [column for column in table.column_names if column not in (*_NUMBERS, *optional)]
    own = _texts(table, "target", name)
    targets, target = join_targets(
        [parse_target(f"{name}: targets", text) for text in about["targets"]],
        own,
        lambda i: f"{name}: row {i}: target",
    )
    return Trace(
        **columns,
        pause_s=_pauses(table, name),
        prefix=_prefix(table, about["prefix_block_size"], name),
        targets=targets,
        target=target,
        acceptance=acceptance_of_rows(about["acceptance"], f"{name}: metadata"),
        source=about["source"],
        notes=(*about["notes"], *([f"columns not read: {', '.join(unread)[:200]}"] if unread else [])),
    )


def _about(metadata: dict[bytes, bytes], name: str) -> dict[str, Any]:
    """The JSON of our metadata, checked; what a Parquet file has that somebody else wrote, where there is none."""
    about = {"schema_version": SCHEMA_VERSION, "targets": [], "prefix_block_size": None, "source": name, "notes": []}
    about["acceptance"] = []
    if _METADATA_KEY not in metadata:
        return about
    try:
        found = json.loads(metadata[_METADATA_KEY])
    except (ValueError, RecursionError):
        found = None
    version = found.get("schema_version") if isinstance(found, dict) else None
    if not isinstance(version, int) or not isinstance(found, dict):
        raise BadTrace(f"{name}: metadata", found, "a JSON object with schema_version", "write the file again")
    if version != SCHEMA_VERSION:
        todo = "read it with the paretune that wrote it"
        raise BadTrace(f"{name}: schema_version", version, str(SCHEMA_VERSION), todo)
    for key, kinds in (("targets", list), ("notes", list), ("source", str), ("prefix_block_size", (int, type(None)))):
        if not isinstance(found.get(key), kinds):
            raise BadTrace(f"{name}: metadata: {key}", found.get(key), f"{kinds}", "write the file again")
        about[key] = found[key]
    about["acceptance"] = found.get("acceptance", [])  # files from before it was recorded have none
    about["notes"] = [str(note) for note in found["notes"]]
    return about


def _column(table: Any, column: str, name: str) -> Any:
    if table.column_names.count(column) > 1:
        raise BadTrace(f"{name}: {column}", "the column twice", "every column once", "remove one of them")
    return table.column(column).combine_chunks()


def _numbers(table: Any, column: str, kind: str, name: str) -> np.ndarray[Any, Any]:
    import pyarrow as pa

    if column not in table.column_names:
        raise BadTrace(f"{name}: {column}", table.column_names, "a column of that name", "check the format")
    values = _column(table, column, name)
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise BadTrace(f"{name}: {column}", str(values.type), kind, "write the column as numbers")
    if values.null_count:
        row = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
        raise BadTrace(f"{name}: row {row}: {column}", None, "a number", "fill it or leave the row out")
    return np.asarray(values.to_numpy(zero_copy_only=False))


def _pauses(table: Any, name: str) -> np.ndarray[Any, Any] | None:
    """Seconds, NaN where there is none."""
    import pyarrow as pa

    if "pause_s" not in table.column_names:
        return None
    values = _column(table, "pause_s", name)
    if not pa.types.is_floating(values.type):
        raise BadTrace(f"{name}: pause_s", str(values.type), "double", "write the column as numbers")
    return np.array(values.to_numpy(zero_copy_only=False), np.float64)


def _texts(table: Any, column: str, name: str) -> list[str | None] | None:
    import pyarrow as pa

    if column not in table.column_names:
        return None
    values = _column(table, column, name)
    inner = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_null(inner)):
        raise BadTrace(f"{name}: {column}", str(values.type), "string", "write the column as text")
    texts: list[str | None] = values.to_pylist()
    return texts


def _labels(table: Any, column: str, name: str) -> Labels | None:
    texts = _texts(table, column, name)
    return None if texts is None else Labels.of([text or None for text in texts])


def _prefix(table: Any, block_size: int | None, name: str) -> PrefixHashes | None:
    import pyarrow as pa

    if "prefix_hashes" not in table.column_names:
        return None
    values = _column(table, "prefix_hashes", name)
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)) or values.null_count:
        raise BadTrace(f"{name}: prefix_hashes", str(values.type), "a list of int64 a row", "write them as lists")
    flat = values.flatten()
    if flat.type != pa.int64() or flat.null_count:
        raise BadTrace(f"{name}: prefix_hashes", str(values.type), "a list of int64 a row", "write them as int64")
    if block_size is None:
        todo = "write it with paretune, or drop the column"
        raise BadTrace(f"{name}: prefix_block_size", None, "the tokens a hash covers, in the metadata", todo)
    counts = values.value_lengths().to_numpy(zero_copy_only=False)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    return PrefixHashes(flat.to_numpy(zero_copy_only=False), offsets, block_size)
