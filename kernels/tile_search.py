"""Finds the tiles of linear layers and attention on the machine at hand, by measurement.

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
from functools import partial
from itertools import count, cycle
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .cpu.build import Library, load
from .decode_attention import decode_attention
from .linear import PackedLinear, linear, pack
from .paged_cache import PagedCache, block_bytes
from .prefill_attention import prefill_attention
from .tiles import CACHE_PRECISIONS, PRECISIONS, BadTile, Tile, TileGain, TileTable, bucket

ROTATED_BYTES = (
    96 << 20
)  # weights read in turn, so that each comes from memory: three times the L3 cache of a Zen 4 CCD
MOST_COPIES = 64  # of weights so small that they would live in a cache of the real model too
WORTHWHILE = 0.98  # a winner must be 2 % faster than the default, or the default stays

# What is tried for each parameter of the C++ operators, one parameter after the other around the best so far.
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "linear": {
        "row_tile": (0, 4, 6, 8, 10, 12),
        "k_block": (0, 256, 512, 1024, 2048),
        "row_block": (0, 48, 96, 192, 384),
        "prefetch_bytes": (0, 1024, 2048, 4096, 8192),
        "serial_below_kmacs": (0, 64, 256, 1024, 1 << 20),
    },
    "decode_attention": {
        "split_tokens": (64, 128, 256, 512, 1024, 65536),
        "serial_below_tokens": (0, 64, 256, 1024, 1 << 20),
    },
    "prefill_attention": {
        "query_rows": (0, 8, 16, 32, 64, 128, 256),
        "serial_below_kmacs": (0, 128, 1024, 8192, 1 << 20),
    },
}
DECODE_CONTEXT = 1024  # tokens of each sequence of the decode workload, fewer where there are many sequences
MOST_CONTEXT = 65536  # tokens of all of them


class AttentionShape(NamedTuple):
    """Attention of one layer on one rank; `precision` is the format of the KV cache."""

    precision: str
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int


@dataclass(frozen=True)
class SearchResult:
    """The tiles found and what each brought; `unsearched` lists (operator, precision, bucket) that time did not
    reach."""

    table: TileTable
    gains: tuple[TileGain, ...]
    unsearched: tuple[tuple[str, str, int], ...] = ()


class _Workload(Protocol):
    """What tiles of one operator and precision are timed on."""

    operator: str
    precision: str

    def prepare(self, rows: int) -> None: ...
    def seconds(self, tile: Tile) -> float: ...


@dataclass
class _Linears:
    """All weights of one precision, with copies enough that no call finds its weights in a cache."""

    precision: str
    sizes: list[tuple[int, int]]
    copies: list[list[PackedLinear]]
    inputs: list[Tensor] = field(default_factory=list)
    turn: Iterator[int] = field(default_factory=count)
    operator: str = "linear"

    def prepare(self, rows: int) -> None:
        self.inputs = [torch.randn(rows, k) for _, k in self.sizes]

    def seconds(self, tile: Tile) -> float:
        weights = self.copies[next(self.turn) % len(self.copies)]
        begin = time.perf_counter()
        for x, packed in zip(self.inputs, weights):
            linear(x, packed, tile)
        return time.perf_counter() - begin


class _Attention:
    """One layer's attention over a cache so large that no call finds its blocks in a processor's cache.

    decode_attention: `rows` sequences of up to DECODE_CONTEXT tokens. prefill_attention: one prompt of `rows` tokens.
    """

    def __init__(self, operator: str, shape: AttentionShape) -> None:
        self.operator, self.precision, self._shape = operator, shape.precision, shape
        sizes = (shape.precision, shape.block_size, shape.kv_heads, shape.head_dim)
        least = MOST_CONTEXT // shape.block_size if operator == "decode_attention" else 1024
        self._cache = PagedCache.zeros(max(least, ROTATED_BYTES // block_bytes(*sizes)), *sizes)
        one = torch.randn(2, shape.block_size, shape.kv_heads, shape.head_dim)
        self._cache.write(torch.arange(shape.block_size), *one)
        self._cache.blocks.copy_(self._cache.blocks[:1].clone().expand_as(self._cache.blocks))

    def prepare(self, rows: int) -> None:
        shape, decode = self._shape, self.operator == "decode_attention"
        sequences, tokens = (rows, max(1, min(DECODE_CONTEXT, MOST_CONTEXT // rows))) if decode else (1, rows)
        blocks = -(-tokens // shape.block_size)
        order = torch.randperm(len(self._cache.blocks)).int()
        calls = max(1, len(order) // (sequences * blocks))
        self._tables = cycle(order[: calls * sequences * blocks].view(calls, sequences, blocks).unbind())
        self._q = torch.randn(rows, shape.heads, shape.head_dim)
        self._lengths = torch.full((sequences,), tokens, dtype=torch.int32)
        self._starts, self._before = torch.tensor([0, rows], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    def seconds(self, tile: Tile) -> float:
        tables, scale = next(self._tables), self._shape.head_dim**-0.5
        begin = time.perf_counter()
        if self.operator == "decode_attention":
            decode_attention(self._q, self._cache, tables, self._lengths, scale, tile)
        else:
            prefill_attention(self._q, self._cache, tables, self._starts, self._before, scale, tile)
        return time.perf_counter() - begin


def search(
    shapes: Sequence[tuple[str, str, int, int]],
    buckets: Sequence[int],
    *,
    seconds: float,
    attention: Sequence[AttentionShape] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> SearchResult:
    """Search the tile of every (operator, precision) in `shapes` and every bucket, and those of both attentions.

    Args:
        shapes: (operator, precision, out_features, in_features), one for each weight of a model; equal ones may repeat.
        buckets: powers of two of M.
        seconds: for all of it; each bucket gets an equal share of what is left.
        attention: at most one for each format of the KV cache.
        progress: called with (buckets done, buckets in all, what was found).
    Raises BadTile: an operator in `shapes` other than "linear", an unknown precision, a bucket that is no power of two.
    """
    for operator, precision, _, _ in shapes:
        if operator != "linear":
            raise BadTile("tile search: operator", operator, "linear", "leave it out: it keeps its default tile")
        if precision not in PRECISIONS:
            raise BadTile("tile search: precision", precision, ", ".join(PRECISIONS), "correct the precision")
    for each in attention:
        if each.precision not in CACHE_PRECISIONS:
            raise BadTile("tile search: KV cache", each.precision, ", ".join(CACHE_PRECISIONS), "correct the precision")
    for rows in buckets:
        if bucket(rows) != rows:
            raise BadTile("tile search: bucket", rows, "powers of two >= 1", "correct the bucket")
    deadline = time.perf_counter() + seconds
    library = load()
    workloads: list[Callable[[], _Workload]] = []
    for precision in sorted({precision for _, precision, _, _ in shapes}):
        sizes = [(n, k) for _, other, n, k in shapes if other == precision]
        workloads.append(partial(_linears, precision, sizes, library))
    for operator in ("decode_attention", "prefill_attention"):
        workloads += [partial(_Attention, operator, each) for each in attention]
    total, done = len(workloads) * len(buckets), 0
    entries: list[tuple[tuple[str, str, int], Tile]] = []
    gains: list[TileGain] = []
    unsearched: list[tuple[str, str, int]] = []
    for make in workloads:
        workload = make()
        for rows in sorted(set(buckets)):
            now = time.perf_counter()
            key = (workload.operator, workload.precision, rows)
            if now >= deadline:
                unsearched.append(key)
                continue
            workload.prepare(rows)
            tile, gain = _search_bucket(workload, rows, now + (deadline - now) / (total - done), library)
            done += 1
            entries.append((key, tile))
            gains.append(gain)
            if progress is not None:
                what = f"{workload.operator} {workload.precision}, {rows} rows"
                progress(done, total, f"{what}: {tile.backend}, {gain.speedup:.2f} x the default")
    return SearchResult(TileTable(tuple(entries)), tuple(gains), tuple(unsearched))


def _linears(precision: str, sizes: list[tuple[int, int]], library: Library | None) -> _Linears:
    return _Linears(precision, sizes, _copies(sizes, precision, library))


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
    operator = workload.operator
    default = Tile(operator, "torch" if library is None else "cpp")
    workload.seconds(default)
    begin = time.perf_counter()
    knock_out_until = begin + 0.75 * (until - begin)
    best = default
    if library is not None:
        for name, choices in CHOICES[operator].items():
            allowed = [value for value in choices if name != "row_tile" or value <= library.max_row_tile]
            around = [_with(best, name, value) for value in allowed]
            best = _knock_out(workload, [best, *(tile for tile in around if tile != best)], knock_out_until)
    finalists = list(dict.fromkeys((default, best)))
    if operator == "linear" and library is not None:  # attention in torch gathers all of its cache first: never near
        finalists.append(Tile(operator, "torch"))
    times = _rounds(workload, finalists, 25, until, at_least=3)
    winner = min(finalists, key=lambda tile: times[tile])
    if times[winner] > WORTHWHILE * times[default]:
        winner = default
    return winner, TileGain(operator, workload.precision, rows, times[default], times[winner])


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
