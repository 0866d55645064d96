"""A table as data, and as text for a terminal or CSV for a spreadsheet."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

# A spreadsheet takes a cell that starts with one of these for a formula and runs it (OWASP, "CSV Injection").
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Table:
    """A title, a header and rows of as many cells, everything as people read it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.header) for row in self.rows):
            raise ValueError(f"{self.title}: every row needs {len(self.header)} cells, as many as the header")


def as_text(table: Table) -> str:
    """Columns aligned by blanks, the first to the left, the rest to the right; control characters are spelled out."""
    lines = [tuple(_printable(cell) for cell in line) for line in (table.header, *table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    text = ["  ".join(_aligned(cell, widths[i], i) for i, cell in enumerate(line)).rstrip() for line in lines]
    return (
        "\n".join([_printable(table.title), "", text[0], "  ".join("-" * width for width in widths), *text[1:]]) + "\n"
    )


def as_csv(table: Table) -> str:
    """RFC 4180; a cell that a spreadsheet would run as a formula gets an apostrophe before it."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerows([harmless(cell) for cell in line] for line in (table.header, *table.rows))
    return out.getvalue()


def harmless(cell: str) -> str:
    """
    >>> harmless("=1+1"), harmless("1+1")
    ("'=1+1", '1+1')
    """
    return f"'{cell}" if cell.startswith(FORMULA_STARTS) else cell


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
