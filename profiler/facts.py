"""Files of dated facts: CSV with remarks, read row by row, each error with its line and column."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import ClassVar

DATA_FOLDER = Path(__file__).absolute().parent / "data"


class BadHardware(Exception):
    """An accelerator we know too little of, or a catalog or price file that will not be used."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:80]}; allowed: {self.allowed}; {self.todo}"


def same_name(left: str, right: str) -> bool:
    """Whether two names mean one thing: upper and lower case, blanks, hyphens and underscores do not matter."""

    def key(name: str) -> str:
        return "".join(letter for letter in name.casefold() if letter not in " -_")

    return key(left) == key(right)


def rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a CSV with where each stands; lines that begin with # are remarks. Raises: BadHardware; OSError."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            lines = [(number, line) for number, line in enumerate(stream, start=1) if line.strip() and line[0] != "#"]
    except UnicodeDecodeError:
        raise BadHardware(file.name, "bytes that are no UTF-8", "a CSV in UTF-8", "save it as UTF-8") from None
    reader = csv.DictReader(line for _, line in lines)
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise BadHardware(f"{file.name}: header", reader.fieldnames, ", ".join(columns), "add the missing columns")
    for (number, _), row in zip(lines[1:], reader):
        where = f"{file.name}:{number}"
        if None in row or None in row.values():
            raise BadHardware(
                where, "another number of fields than the header", "one field a column", "correct the row"
            )
        yield where, row


def number(where: str, row: dict[str, str], column: str) -> float:
    """A finite number >= 0 in a column. Raises: BadHardware."""
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise BadHardware(f"{where}: {column}", row[column], "a number >= 0", "correct the row")
    return value


def positive(where: str, row: dict[str, str], column: str) -> float:
    """A finite number > 0 in a column. Raises: BadHardware."""
    value = number(where, row, column)
    if value == 0:
        raise BadHardware(f"{where}: {column}", row[column], "more than 0", "correct the row")
    return value


def day(where: str, row: dict[str, str]) -> str:
    """The date in the column as_of, ISO. Raises: BadHardware: none.

    One in the future is taken: a machine's clock is no witness against a source.
    """
    try:
        found = date.fromisoformat(row["as_of"])
    except ValueError:
        found = None
    if found is None:
        allowed = "a date such as 2026-02-26"
        raise BadHardware(f"{where}: as_of", row["as_of"], allowed, "say when the source gave it")
    return found.isoformat()


def choice(where: str, row: dict[str, str], column: str, allowed: tuple[str, ...]) -> str:
    """One of some words in a column. Raises: BadHardware."""
    if row[column] not in allowed:
        raise BadHardware(f"{where}: {column}", row[column], ", ".join(allowed), "correct the row")
    return row[column]
