"""The columns a trace may carry besides numbers: names, and identities of prefixes; and the error that refuses one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

MAX_TOKENS = 2**31 - 1
# 31,700 years: a time past it is a damaged one, and below it a double still tells tenths of milliseconds.
MAX_SECONDS = 1e12


class BadTrace(Exception):
    """A request log, or a column of one, that cannot be a Trace."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {self.found!r:.80}; allowed: {self.allowed}; {self.todo}"


def frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A read-only copy, or the array itself where it is read-only already."""
    if array.flags.writeable:
        array = array.copy()
        array.flags.writeable = False
    return array


def is_text(name: str) -> bool:
    """Whether a name can be written down: JSON's "\\ud800" gives half a character, which no file can hold."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


@dataclass(frozen=True, eq=False)
class Labels:
    """A column of names.

    names  distinct, not empty
    codes  (n,) int32, index into names; -1 = none
    """

    names: tuple[str, ...]
    codes: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", frozen(np.asarray(self.codes, dtype=np.int32)))
        if len(set(self.names)) != len(self.names) or not all(name and is_text(name) for name in self.names):
            raise BadTrace("labels", self.names, "distinct names that are not empty", "merge or fill them")
        if len(self.codes) and not (self.codes.min() >= -1 and self.codes.max() < len(self.names)):
            raise BadTrace("labels", self.codes.max(), f"codes of -1 to {len(self.names) - 1}", "correct the codes")

    @classmethod
    def of(cls, values: Iterable[str | None]) -> Labels | None:
        """From one name (or None) a row; names in order of first appearance. None where every row is None."""
        index: dict[str, int] = {}
        codes = [-1 if value is None else index.setdefault(value, len(index)) for value in values]
        return cls(tuple(index), np.array(codes, dtype=np.int32)) if index else None

    def values(self) -> list[str | None]:
        """One name (or None) a row."""
        names = (*self.names, None)
        return [names[code] for code in self.codes.tolist()]

    def select(self, rows: Any) -> Labels | None:
        """These rows, with the names that are left in order of first appearance."""
        codes = self.codes[rows]
        used, first = np.unique(codes[codes >= 0], return_index=True)
        if not len(used):
            return None
        used = used[np.argsort(first)]
        position = np.full(len(self.names) + 1, -1, dtype=np.int32)
        position[used] = np.arange(len(used), dtype=np.int32)
        return Labels(tuple(self.names[code] for code in used), position[codes])


@dataclass(frozen=True, eq=False)
class PrefixHashes:
    """Identity of every request's prefix, block by block.

    hashes      (m,) int64, chained: equal hash <=> equal prefix up to and with that block
    offsets     (n + 1,) int64, request i has hashes[offsets[i]:offsets[i + 1]]
    block_size  tokens a hash covers; the last hash of a request may cover fewer
    """

    hashes: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    block_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "hashes", frozen(np.asarray(self.hashes, dtype=np.int64)))
        object.__setattr__(self, "offsets", frozen(np.asarray(self.offsets, dtype=np.int64)))
        if not 1 <= self.block_size <= MAX_TOKENS:
            raise BadTrace("prefix block size", self.block_size, "an integer >= 1", "give the tokens of a block")
        offsets = self.offsets
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(self.hashes) or (np.diff(offsets) < 0).any():
            raise BadTrace("prefix offsets", len(offsets), "ascending from 0 to the number of hashes", "correct them")

    @classmethod
    def of(cls, rows: Sequence[Sequence[int] | npt.NDArray[np.int64]], block_size: int) -> PrefixHashes:
        """From one sequence of hashes a row."""
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        parts = [np.asarray(row, dtype=np.int64) for row in rows]
        return cls(np.concatenate(parts) if parts else np.empty(0, np.int64), offsets, block_size)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """(n,) int64, hashes of every request."""
        return np.diff(self.offsets)

    def row(self, i: int) -> npt.NDArray[np.int64]:
        return self.hashes[self.offsets[i] : self.offsets[i + 1]]

    def previous(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The hash before each, (m,) int64 (0: none); and whether it is its request's first, (m,) bool."""
        first = np.zeros(len(self.hashes) + 1, dtype=np.bool_)
        first[self.offsets[:-1]] = True
        first = first[:-1]
        return np.where(first, 0, np.concatenate([self.hashes[:1], self.hashes[:-1]])), first

    def select(self, rows: Any) -> PrefixHashes:
        counts = self.counts
        kept = np.zeros(len(counts), dtype=np.bool_)
        kept[rows] = True
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[kept])])
        return PrefixHashes(self.hashes[np.repeat(kept, counts)], offsets, self.block_size)

    def limited(self, counts: npt.NDArray[np.int64]) -> PrefixHashes:
        """At most counts[i] hashes of request i, (n,) int64."""
        had = self.counts
        kept = np.minimum(had, counts)
        position = np.arange(len(self.hashes)) - np.repeat(self.offsets[:-1], had)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
        return PrefixHashes(self.hashes[position < np.repeat(kept, had)], offsets, self.block_size)
