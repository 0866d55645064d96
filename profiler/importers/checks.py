"""Whether rows of a table of measured times can be true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DROP = 0.5
"""A time that halves where an axis grows is no noise of a single value: the larger operator contains the smaller."""

UNIT_BELOW, UNIT_ABOVE = 0.1, 200.0
"""Shares of the bound between which some time of a table lies: the largest operators reach more than a hundredth of the
peak, and operands that a cache kept are read less than ten times as fast as from device memory."""


@dataclass(frozen=True)
class Finding:
    """Rows of one table that are refused (not used) or flagged (used, with care).

    rows     how many, of how many in the table
    example  one of them, in the words of the file
    """

    file: str
    table: str
    refused: bool
    reason: str
    rows: int
    of: int
    example: str

    def __str__(self) -> str:
        word = "refused" if self.refused else "flagged"
        return f"{self.file}: {self.table}: {word} {self.rows} of {self.of} rows: {self.reason}; {self.example}"


def by_file(findings: Sequence[Finding]) -> list[Finding]:
    """Findings of the same kind in one file as one, with the first one's example."""
    groups: dict[tuple[str, bool, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.file, finding.refused, finding.reason), []).append(finding)
    return [
        replace(
            each[0],
            table=each[0].table if len(each) == 1 else f"{len(each)} tables, first {each[0].table}",
            rows=sum(finding.rows for finding in each),
            of=sum(finding.of for finding in each),
        )
        for each in groups.values()
    ]


def faster_than_physics(seconds: Floats, bound_s: Floats) -> NDArray[np.bool_]:
    """Rows below the least time: arithmetic above the peak rate, or bytes above the bandwidth of device memory (also
    where a repeated measurement found its operands in a cache, which a serving step does not)."""
    return np.asarray(~(seconds >= bound_s), np.bool_)


def disordered(least: Floats, median: Floats, most: Floats) -> NDArray[np.bool_]:
    """Rows whose statistics contradict each other, or that have none: what is written there is no measurement."""
    return np.asarray(~((least > 0) & (least <= median) & (median <= most)), np.bool_)


def other_unit(seconds: Floats, bound_s: Floats) -> str | None:
    """What times of a whole table look like where their unit is another one than was taken; None: like times.

    One mistaken row is a row; a thousandth, or a thousand times, in every row is a unit.
    """
    if not len(seconds):
        return None
    ratio = seconds / bound_s
    if ratio.max() < UNIT_BELOW:
        return f"no time above {ratio.max():.1g} of what physics allows, as if in a larger unit"
    if ratio.min() > UNIT_ABOVE:
        return f"no time below {ratio.min():,.0f} times what physics allows, as if in a smaller unit"
    return None


def drops(frame: pd.DataFrame, axes: Sequence[str], seconds: str) -> NDArray[np.bool_]:
    """Rows whose time is less than DROP times that of the next smaller operator along any one axis."""
    found = np.zeros(len(frame), np.bool_)
    if frame.empty:
        return found
    for axis in axes:
        others = [a for a in axes if a != axis]
        order = frame.sort_values([*others, axis], kind="stable")
        values = order[seconds].to_numpy()
        same = np.ones(len(order) - 1, np.bool_)
        for other in others:
            column = order[other].to_numpy()
            same &= column[1:] == column[:-1]
        fell = np.concatenate([[False], same & (values[1:] < DROP * values[:-1])])
        found[order.index.to_numpy()[fell]] = True
    return found
