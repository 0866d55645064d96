"""Finds the tiles of linear layers on the machine at hand, by measurement.

For every precision and bucket of rows, tiles are timed on all weights of a model together, in rounds in which each
candidate runs once, so that a busy moment of a shared machine strikes all alike. Half of the candidates leave after
each round of the knock-out; the last few meet the default again on fresh measurements, and only those count: the best
of many noisy figures is always too good.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from .cpu.build import Library, load
from .linear import PackedLinear, linear, pack
from .tiles import PRECISIONS, BadTile, Tile, TileGain, TileTable, bucket

ROTATED_BYTES = (
    96 << 20
)  # weights read in turn, so that each comes from memory: three times the L3 cache of a Zen 4 CCD
MOST_COPIES = 64  # of weights so small that they would live in a cache of the real model too
WORTHWHILE = 0.98  # a winner must be 2 % faster than the default, or the default stays

# What is tried for each parameter of the C++ linear, one parameter after the other around the best so far.
CHOICES: dict[str, tuple[int, ...]] = {
    "row_tile": (0, 4, 6, 8, 10, 12),
    "k_block": (0, 256, 512, 1024, 2048),
    "row_block": (0, 48, 96, 192, 384),
    "prefetch_bytes": (0, 1024, 2048, 4096, 8192),
    "serial_below_kmacs": (0, 64, 256, 1024, 1 << 20),
}


@dataclass(frozen=True)
class SearchResult:
    """The tiles found and what each brought; `unsearched` lists (operator, precision, bucket) that time did not
    reach."""

    table: TileTable
    gains: tuple[TileGain, ...]
    unsearched: tuple[tuple[str, str, int], ...] = ()


@dataclass
class _Workload:
    """All weights of one precision, with copies enough that no call finds its weights in a cache."""

    precision: str
    copies: list[list[PackedLinear]]
    inputs: list[Tensor] = field(default_factory=list)
    turn: Iterator[int] = field(default_factory=count)

    def seconds(self, tile: Tile) -> float:
        weights = self.copies[next(self.turn) % len(self.copies)]
        begin = time.perf_counter()
        for x, packed in zip(self.inputs, weights):
            linear(x, packed, tile)
        return time.perf_counter() - begin


def search(
    shapes: Sequence[tuple[str, str, int, int]],
    buckets: Sequence[int],
    *,
    seconds: float,
    progress: Callable[[int, int, str], None] | None = None,
) -> SearchResult:
    """Search the tile of every (operator, precision) in `shapes` and every bucket.

    Args:
        shapes: (operator, precision, out_features, in_features), one for each weight of a model; equal ones may repeat.
        buckets: powers of two of M.
        seconds: for all of it; each bucket gets an equal share of what is left.
        progress: called with (buckets done, buckets in all, what was found).
    Raises BadTile: an operator other than "linear", an unknown precision, a bucket that is no power of two.
    """
    for operator, precision, _, _ in shapes:
        if operator != "linear":
            raise BadTile("tile search: operator", operator, "linear", "leave it out: it keeps its default tile")
        if precision not in PRECISIONS:
            raise BadTile("tile search: precision", precision, ", ".join(PRECISIONS), "correct the precision")
    for rows in buckets:
        if bucket(rows) != rows:
            raise BadTile("tile search: bucket", rows, "powers of two >= 1", "correct the bucket")
    deadline = time.perf_counter() + seconds
    library = load()
    precisions = sorted({precision for _, precision, _, _ in shapes})
    total, done = len(precisions) * len(buckets), 0
    entries: list[tuple[tuple[str, str, int], Tile]] = []
    gains: list[TileGain] = []
    unsearched: list[tuple[str, str, int]] = []
    for precision in precisions:
        sizes = [(n, k) for _, other, n, k in shapes if other == precision]
        workload = _Workload(precision, _copies(sizes, precision, library))
        for rows in sorted(set(buckets)):
            now = time.perf_counter()
            key = ("linear", precision, rows)
            if now >= deadline:
                unsearched.append(key)
                continue
            workload.inputs = [torch.randn(rows, k) for _, k in sizes]
            tile, gain = _search_bucket(workload, rows, now + (deadline - now) / (total - done), library)
            done += 1
            entries.append((key, tile))
            gains.append(gain)
            if progress is not None:
                progress(done, total, f"{precision}, {rows} rows: {tile.backend}, {gain.speedup:.2f} x the default")
    return SearchResult(TileTable(tuple(entries)), tuple(gains), tuple(unsearched))


def _copies(sizes: list[tuple[int, int]], precision: str, library: Library | None) -> list[list[PackedLinear]]:
    backends = ("torch",) if library is None else ("cpp", "torch")
    first = [pack(torch.randn(n, k), precision, backends=backends) for n, k in sizes]
    one_layout = sum(packed.nbytes for packed in first) // len(backends)
    wanted = min(MOST_COPIES, -(-ROTATED_BYTES // one_layout))
    return [first] + [
        [pack(torch.randn(n, k), precision, backends=backends) for n, k in sizes] for _ in range(wanted - 1)
    ]


def _search_bucket(workload: _Workload, rows: int, until: float, library: Library | None) -> tuple[Tile, TileGain]:
    """Three quarters of the time for the knock-outs, the rest for the final."""
    default = Tile("linear", "torch" if library is None else "cpp")
    workload.seconds(default)
    begin = time.perf_counter()
    knock_out_until = begin + 0.75 * (until - begin)
    best = default
    if library is not None:
        for name, choices in CHOICES.items():
            allowed = [value for value in choices if name != "row_tile" or value <= library.max_row_tile]
            around = [_with(best, name, value) for value in allowed]
            best = _knock_out(workload, [best, *(tile for tile in around if tile != best)], knock_out_until)
    finalists = list(dict.fromkeys((default, best, Tile("linear", "torch"))))
    times = _rounds(workload, finalists, 25, until, at_least=3)
    winner = min(finalists, key=lambda tile: times[tile])
    if times[winner] > WORTHWHILE * times[default]:
        winner = default
    return winner, TileGain("linear", workload.precision, rows, times[default], times[winner])


def _knock_out(workload: _Workload, tiles: list[Tile], until: float) -> Tile:
    """The first of `tiles` that is still in when the others have left, or when time is up."""
    while len(tiles) > 1 and time.perf_counter() < until:
        times = _rounds(workload, tiles, 5, until, at_least=1)
        tiles = sorted(tiles, key=lambda tile: times[tile])[: len(tiles) // 2]
    return tiles[0]


def _rounds(workload: _Workload, tiles: list[Tile], rounds: int, until: float, *, at_least: int) -> dict[Tile, float]:
    """Median seconds of each tile over rounds in which each runs once."""
    times: dict[Tile, list[float]] = {tile: [] for tile in tiles}
    for done in range(rounds):
        if done >= at_least and time.perf_counter() >= until:
            break
        for tile in tiles:
            times[tile].append(workload.seconds(tile))
    return {tile: statistics.median(seconds) for tile, seconds in times.items()}


def _with(tile: Tile, name: str, value: int) -> Tile:
    return Tile(tile.operator, tile.backend, tuple((dict(tile.parameters) | {name: value}).items()))
