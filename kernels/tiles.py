"""Tiles: how an operator is cut up, as data that a deployment carries and a search can change.

A tile names the backend that computes an operator and the sizes of its blocks. The best one depends on the precision
and on the number of rows M of a step (decode: a few; prefill: hundreds), so a `TileTable` holds one per (operator,
precision, bucket of M), where the buckets are powers of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from .weight_formats import WEIGHT_FORMATS

PRECISIONS = tuple(WEIGHT_FORMATS)
CACHE_PRECISIONS = ("fp32", "bf16", "fp8", "int8")  # of attention: the formats of the KV cache, paged_cache.py


class BadTile(ValueError):
    """A tile or tile table that names something we do not have."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {self.found!r:.60}; allowed: {self.allowed}; {self.todo}"


class Parameter(NamedTuple):
    """One number of a tile: its default and what it may be."""

    default: int
    least: int
    most: int
    meaning: str
    power_of_two: bool = False

    def allows(self, value: int) -> bool:
        if not self.least <= value <= self.most:
            return False
        return not self.power_of_two or value & (value - 1) == 0

    def allowed(self) -> str:
        kind = "a power of two" if self.power_of_two else "an integer"
        return f"{kind} from {self.least} to {self.most} ({self.meaning})"


_WARPS = Parameter(4, 1, 16, "warps of one program", power_of_two=True)
_STAGES = Parameter(3, 1, 8, "depth of the software pipeline")

# What a tile of each operator may set on each backend. The row and K blocks of the C++ linear were the best, within the
# noise of 10 %, of a hand sweep on one thread of a Zen 4 (5632 x 1024 and 1024 x 2816, 16 and 512 rows); the thresholds
# for one thread are estimates. tile_search.py finds what suits another machine.
PARAMETERS: dict[str, dict[str, dict[str, Parameter]]] = {
    "linear": {
        "cpp": {
            "row_tile": Parameter(0, 0, 14, "rows of a register tile; 0 = as many as the registers hold"),
            "row_block": Parameter(
                0, 0, 65536, "rows whose activations stay in the L2 cache; 0 = what fills half of it"
            ),
            "k_block": Parameter(0, 0, 65536, "input channels of a weight panel per pass; 0 = all of them"),
            "prefetch_bytes": Parameter(2048, 0, 65536, "how far ahead weights are prefetched; 0 = not"),
            "serial_below_kmacs": Parameter(256, 0, 1 << 20, "thousands of multiply-adds below which one thread works"),
        },
        "torch": {},
        "triton": {
            "block_m": Parameter(64, 16, 256, "rows of a program's tile", power_of_two=True),
            "block_n": Parameter(64, 16, 256, "output channels of a program's tile", power_of_two=True),
            "block_k": Parameter(64, 16, 256, "input channels of one step", power_of_two=True),
            "group_m": Parameter(8, 1, 32, "row tiles that share weights in the L2 cache"),
            "num_warps": _WARPS,
            "num_stages": _STAGES,
            "splits": Parameter(
                0, 0, 64, "parts the input channels of weights below 16 bits are cut into; 0 = to occupy the GPU"
            ),
        },
    },
    "decode_attention": {
        "cpp": {
            "split_tokens": Parameter(256, 16, 65536, "tokens of context one thread takes at a time"),
            "serial_below_tokens": Parameter(
                64, 0, 1 << 20, "tokens of context in a step below which one thread works"
            ),
        },
        "torch": {},
        "triton": {
            "block_n": Parameter(64, 16, 256, "tokens of context of one step", power_of_two=True),
            "splits": Parameter(1, 1, 64, "parts the context is cut into", power_of_two=True),
            "num_warps": _WARPS,
            "num_stages": _STAGES,
        },
    },
    "prefill_attention": {
        "cpp": {
            "query_rows": Parameter(
                0, 0, 1024, "query tokens of one work item; 0 = such that 256 rows lie under a KV head"
            ),
            "serial_below_kmacs": Parameter(128, 0, 1 << 20, "thousands of multiply-adds below which one thread works"),
        },
        "torch": {},
        "triton": {
            "block_m": Parameter(64, 16, 128, "query tokens of a program", power_of_two=True),
            "block_n": Parameter(64, 16, 128, "tokens of context of one step", power_of_two=True),
            "num_warps": _WARPS,
            "num_stages": _STAGES,
        },
    },
}


def bucket(rows: int) -> int:
    """Least power of two that is >= rows (rows >= 1).

    >>> [bucket(m) for m in (1, 2, 3, 16, 17)]
    [1, 2, 4, 16, 32]
    """
    if rows < 1:
        raise BadTile("bucket", rows, "an integer >= 1", "a step has at least one row")
    return 1 << (rows - 1).bit_length()


@dataclass(frozen=True)
class Tile:
    """How one operator is computed. Parameters left out take their defaults, so equal tiles compare equal.

    operator    a key of PARAMETERS
    backend     "cpp", "torch" or "triton", as far as the operator has it
    parameters  (name, value) pairs; afterwards all of them, in the order of PARAMETERS
    arguments   the values alone: what a launcher hands on without looking up names
    """

    operator: str
    backend: str
    parameters: tuple[tuple[str, int], ...] = ()
    arguments: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        backends = PARAMETERS.get(self.operator)
        if backends is None:
            raise BadTile("tile: operator", self.operator, ", ".join(PARAMETERS), "correct the name")
        known = backends.get(self.backend)
        if known is None:
            raise BadTile(f"tile of {self.operator}: backend", self.backend, ", ".join(backends), "correct the name")
        given = dict(self.parameters)
        if len(given) != len(self.parameters):
            raise BadTile(f"tile of {self.operator}", self.parameters, "each parameter once", "delete the repetition")
        for name, value in given.items():
            where = f"tile of {self.operator} ({self.backend}): {name}"
            if name not in known:
                raise BadTile(where, value, ", ".join(known) or "no parameters", "delete it or correct the name")
            if isinstance(value, bool) or not isinstance(value, int) or not known[name].allows(value):
                raise BadTile(where, value, known[name].allowed(), "correct the value")
        full = tuple((name, given.get(name, parameter.default)) for name, parameter in known.items())
        object.__setattr__(self, "parameters", full)
        object.__setattr__(self, "arguments", tuple(value for _, value in full))

    def get(self, name: str) -> int:
        """Value of one parameter. Raises KeyError where the backend has no such parameter."""
        return dict(self.parameters)[name]


@dataclass(frozen=True)
class TileTable(Mapping[tuple[str, str, int], Tile]):
    """The tiles of a deployment: (operator, precision, bucket of M) -> Tile. Immutable; equal contents are equal.

    An empty table is the default: every operator then takes what is best by default on the machine it runs on.
    """

    entries: tuple[tuple[tuple[str, str, int], Tile], ...] = ()

    def __post_init__(self) -> None:
        seen: set[tuple[str, str, int]] = set()
        for key, tile in self.entries:
            operator, precision, rows = key
            where = f"tile table: {operator}, {precision}, {rows} rows"
            if tile.operator != operator:
                raise BadTile(where, tile.operator, operator, "a tile stands under its own operator")
            precisions = PRECISIONS if operator == "linear" else CACHE_PRECISIONS
            if precision not in precisions:
                raise BadTile(where, precision, ", ".join(precisions), "correct the precision")
            if rows < 1 or rows & (rows - 1):
                raise BadTile(where, rows, "powers of two >= 1", "correct the bucket")
            if key in seen:
                raise BadTile(where, rows, "each bucket once", "delete one of the two")
            seen.add(key)
        object.__setattr__(self, "entries", tuple(sorted(self.entries, key=lambda entry: entry[0])))

    @classmethod
    def default(cls) -> TileTable:
        return cls()

    def __getitem__(self, key: tuple[str, str, int]) -> Tile:
        for known, tile in self.entries:
            if known == key:
                return tile
        raise KeyError(key)

    def __iter__(self) -> Iterator[tuple[str, str, int]]:
        return (key for key, _ in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def lookup(self, operator: str, precision: str, rows: int) -> Tile | None:
        """The tile for a step of so many rows, or None: the operator's default on this machine.

        Between two buckets that the table has, the larger one counts; beyond the last, the last.
        """
        wanted = bucket(rows)
        having = [(key[2], tile) for key, tile in self.entries if key[:2] == (operator, precision)]
        if not having:
            return None
        return next((tile for rows_upto, tile in having if rows_upto >= wanted), having[-1][1])

    def only(self, precision: str) -> TileTable:
        """The entries of linear layers of one precision, and all of attention, whose precision is the KV cache's."""
        return TileTable(tuple(entry for entry in self.entries if entry[0][0] != "linear" or entry[0][1] == precision))

    def backends(self, operator: str, precision: str) -> tuple[str, ...]:
        """The backends that the table names for an operator: each wants the weights in its own layout."""
        return tuple(sorted({tile.backend for key, tile in self.entries if key[:2] == (operator, precision)}))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, for JSON or YAML."""
        return {
            "schema_version": 1,
            "tiles": [
                {
                    "operator": operator,
                    "precision": precision,
                    "rows": rows,
                    "backend": tile.backend,
                    "parameters": dict(tile.parameters),
                }
                for (operator, precision, rows), tile in self.entries
            ],
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> TileTable:
        """What `to_dict` wrote. Raises BadTile, naming the entry."""
        version = plain.get("schema_version")
        if version != 1:
            raise BadTile("tile table: schema_version", version, "1", "write the table with this version of paretune")
        entries = []
        for index, row in enumerate(plain.get("tiles", ())):
            fields = {"operator", "precision", "rows", "backend", "parameters"}
            if not isinstance(row, Mapping) or set(row) != fields:
                raise BadTile(f"tile table: entry {index}", row, ", ".join(sorted(fields)), "correct its fields")
            tile = Tile(row["operator"], row["backend"], tuple(row["parameters"].items()))
            entries.append(((row["operator"], row["precision"], row["rows"]), tile))
        return cls(tuple(entries))


@dataclass(frozen=True)
class TileGain:
    """What a searched tile brought. Seconds are medians, rows = bucket: for all weights of the model once, or for the
    attention of one layer."""

    operator: str
    precision: str
    bucket: int
    default_s: float
    best_s: float

    @property
    def speedup(self) -> float:
        return self.default_s / self.best_s
