"""Tables of others as files: CSV or Parquet, and numbers where numbers belong."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from ..operator_tables import BadTable


def read_frame(path: Path) -> pd.DataFrame:
    """Raises: BadTable: neither CSV nor Parquet; OSError."""
    try:
        return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, engine="pyarrow")
    except (ValueError, pd.errors.ParserError) as error:  # pyarrow's own errors are values, too
        raise BadTable(str(path), str(error).splitlines()[0], "CSV or Parquet", "name such a file") from None


def with_numbers(path: Path, frame: pd.DataFrame, columns: Iterable[str], least: float | None) -> pd.DataFrame:
    """The table with these columns as numbers.

    Args:
        least: of each value; None: of any size, and NaN where there is none.
    Raises: BadTable: text, or a value that is missing or too small.
    """
    found = frame.copy()
    for column in columns:
        found[column] = pd.to_numeric(frame[column], errors="coerce")
        wrong = found[column].isna() & frame[column].notna() if least is None else ~(found[column] >= least)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            allowed = "a number, or nothing" if least is None else f"a number of at least {least:g}"
            raise BadTable(f"{path}:{row + 2}", f"{column} {frame[column].iloc[row]}", allowed, "correct the line")
    return found
