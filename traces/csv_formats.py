"""Logs as comma-separated values: Azure LLM inference, BurstGPT.

Azure: https://github.com/Azure/AzurePublicDataset (Patel et al., Splitwise, ISCA 2024).
BurstGPT: https://github.com/HPMLL/BurstGPT (Wang et al., arXiv:2401.17644).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .columns import MAX_TOKENS, BadTrace, Labels
from .text_file import COUNT, bad_line, lines_of
from .trace import Trace

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT_COLUMNS = ("Timestamp", "Model", "Request tokens", "Response tokens", "Log Type")

# Years outside 1900 to 2099 would leave the range of nanoseconds in int64 (1678 to 2262).
_STAMP = re.compile(r"((?:19|20)\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?)(Z|[+-]\d\d:\d\d)?", re.ASCII)
_STAMP_ALLOWED = "YYYY-MM-DD HH:MM:SS[.fraction][+HH:MM]"
_SECONDS = re.compile(r"\d{1,12}(?:\.\d{1,12})?", re.ASCII)
_COUNT = re.compile(r"\d{1,10}", re.ASCII)


def header_of(line: str) -> list[str]:
    """The column names of a CSV file's first line; [] where it cannot be one."""
    try:
        return [name.strip() for name in next(csv.reader([line], strict=True), [])]
    except csv.Error:
        return []


def read_azure(data: bytes, name: str) -> Trace:
    """TIMESTAMP (of arrival, up to 9 digits of fraction), ContextTokens, GeneratedTokens."""
    table, notes = _table(data, name, AZURE_COLUMNS, ())
    arrival_s = _clock_s(table["TIMESTAMP"], name)
    return _trace(table, name, notes, arrival_s, AZURE_COLUMNS, app=None, session=None)


def read_burstgpt(data: bytes, name: str) -> Trace:
    """Timestamp (seconds), Model, Request tokens, Response tokens, Total tokens, Log Type; newer files have Session ID.

    The application is "MODEL/LOG TYPE". A response of 0 tokens is a failed request.
    """
    table, notes = _table(data, name, BURSTGPT_COLUMNS, ("Session ID", "Elapsed time", "Total tokens"))
    arrival_s = _seconds(table["Timestamp"], name)
    app = [f"{model}/{log_type}" for model, log_type in zip(table["Model"], table["Log Type"])]
    session = [value or None for value in table["Session ID"]] if "Session ID" in table else None
    columns = ("Timestamp", "Request tokens", "Response tokens")
    return _trace(table, name, notes, arrival_s, columns, app=app, session=session)


def _trace(
    table: dict[str, list[str]],
    name: str,
    notes: tuple[str, ...],
    arrival_s: npt.NDArray[np.float64],
    columns: tuple[str, str, str],
    *,
    app: Sequence[str | None] | None,
    session: Sequence[str | None] | None,
) -> Trace:
    """The requests that have tokens in and out, from the first of them on. columns: names of time, input, output."""
    time_column, input_column, output_column = columns
    back = np.diff(arrival_s) < 0
    if back.any():
        row = int(np.argmax(back)) + 1
        stamps = table[time_column]
        raise bad_line(
            name,
            row + 2,
            time_column,
            stamps[row],
            f"not before {stamps[row - 1]}, the line above",
            "sort the log by arrival and run again",
        )
    input_tokens = _counts(table[input_column], name, input_column)
    output_tokens = _counts(table[output_column], name, output_column)
    served = (input_tokens > 0) & (output_tokens > 0)
    if not served.any():
        raise BadTrace(name, "no request with tokens in and out", "at least one", "check how it was written")
    if not served.all():
        count = int((~served).sum())
        notes = (*notes, f"{count} of {len(served)} requests left out: no input or no output tokens (failed)")
    kept = arrival_s[served]
    return Trace(
        arrival_s=kept - kept[0],
        input_tokens=input_tokens[served].astype(np.int32),
        output_tokens=output_tokens[served].astype(np.int32),
        app=_labels(app, served),
        session=_labels(session, served),
        source=name,
        notes=notes,
    )


def _labels(values: Sequence[str | None] | None, rows: npt.NDArray[np.bool_]) -> Labels | None:
    labels = None if values is None else Labels.of(values)
    return None if labels is None else labels.select(rows)


def _table(
    data: bytes, name: str, needed: tuple[str, ...], known: tuple[str, ...]
) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Column name -> the cells of its lines 2, 3, ..., without blanks around; and notes."""
    lines, notes = lines_of(data, name)
    header = header_of(lines[0])
    for column in (*needed, *known):
        if header.count(column) > 1:
            raise bad_line(name, 1, column, "the column twice", "every column once", "remove one of them")
    missing = [column for column in needed if column not in header]
    if missing:
        raise bad_line(name, 1, missing[0], lines[0], f"the columns {', '.join(needed)}", "check the format")
    unread = [column for column in header if column not in (*needed, *known)]
    if unread:
        notes = (*notes, f"columns not read: {', '.join(unread)[:200]}")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split(",") if '"' not in line else _quoted(line, name, number)
        if len(cells) != len(header):
            allowed = f"{len(header)} fields, as many as the header has"
            raise bad_line(name, number, "", line, allowed, "correct the line (is the file cut off?) and run again")
        rows.append(cells)
    if not rows:
        raise BadTrace(f"{name}:2", "nothing after the header", "at least one request", "check how it was written")
    table = {column: list(map(str.strip, cells)) for column, cells in zip(header, zip(*rows))}
    return table, notes


def _quoted(line: str, name: str, number: int) -> list[str]:
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error as error:
        raise bad_line(name, number, "", line, f"whole quoted fields ({error})") from None


def _refuse_first(cells: Sequence[str], fits: Callable[[str], object], name: str, column: str, allowed: str) -> None:
    """Raise BadTrace for the first cell that does not fit."""
    for number, cell in enumerate(cells, start=2):
        if not fits(cell):
            raise bad_line(name, number, column, cell, allowed)


def _counts(cells: Sequence[str], name: str, column: str) -> npt.NDArray[np.int64]:
    _refuse_first(cells, _COUNT.fullmatch, name, column, COUNT)
    counts = np.array(list(map(int, cells)), dtype=np.int64)
    if counts.max() > MAX_TOKENS:
        _refuse_first(cells, lambda cell: int(cell) <= MAX_TOKENS, name, column, COUNT)
    return counts


def _seconds(cells: Sequence[str], name: str) -> npt.NDArray[np.float64]:
    _refuse_first(cells, _SECONDS.fullmatch, name, "Timestamp", "seconds, as a plain decimal number >= 0")
    return np.array(list(map(float, cells)), dtype=np.float64)


def _clock_s(cells: Sequence[str], name: str) -> npt.NDArray[np.float64]:
    """Seconds since the first stamp; exact to the nanosecond."""
    _refuse_first(cells, _STAMP.fullmatch, name, "TIMESTAMP", _STAMP_ALLOWED)
    matches = [match for match in map(_STAMP.fullmatch, cells) if match]
    try:
        clock = np.array([match[1] for match in matches], dtype="datetime64[ns]").astype(np.int64)
    except ValueError:
        _refuse_first(cells, _is_date, name, "TIMESTAMP", f"a date and time that exist, as {_STAMP_ALLOWED}")
        raise
    zones = {match[2]: _zone_ns(match[2]) for match in matches}
    if len(zones) > 1:
        clock = clock - np.array([zones[match[2]] for match in matches], dtype=np.int64)
    seconds: npt.NDArray[np.float64] = (clock - clock[0]) / 1e9
    return seconds


def _is_date(cell: str) -> bool:
    match = _STAMP.fullmatch(cell)
    try:
        np.datetime64(match[1] if match else "", "ns")
    except ValueError:
        return False
    return True


def _zone_ns(zone: str | None) -> int:
    if zone is None or zone == "Z":
        return 0
    minutes = int(zone[1:3]) * 60 + int(zone[4:6])
    return (-1 if zone[0] == "-" else 1) * minutes * 60_000_000_000
