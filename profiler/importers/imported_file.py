"""Operator tables that passed the checks, as one file: a row for each measured point."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from ...traces.whole_file import write_whole
from ..operator_tables import OperatorTable


def write_tables(path: Path, tables: Iterable[OperatorTable]) -> int:
    """Writes Parquet, whole or not at all, and returns the number of points.

    Columns: operator, keys and point (JSON objects: what is fixed, and the coordinates by axis), seconds, bound_s (the
    least that physics allows), and system, engine, version and file of the measurement.
    """
    parts = []
    for table in tables:
        parts.append(
            pd.DataFrame(
                {
                    "operator": table.operator,
                    "keys": json.dumps(dict(table.keys)),
                    "point": [json.dumps(dict(zip(table.axes, p, strict=True))) for p in table.points.tolist()],
                    "seconds": table.seconds,
                    "bound_s": table.bound_s(table.points),
                    "system": table.origin.system,
                    "engine": table.origin.engine,
                    "version": table.origin.version,
                    "file": table.origin.file,
                }
            )
        )
    whole = pd.concat(parts, ignore_index=True)
    buffer = io.BytesIO()
    whole.to_parquet(buffer, index=False)
    write_whole(path, buffer.getvalue())
    return len(whole)
