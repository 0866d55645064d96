"""Searched tiles of one model on one machine, as a file: what `kernels tune` writes and `profile` and `tune` read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..kernels.tiles import BadTile, TileGain, TileTable
from ..runtime.model_shape import ModelShape, matrix_dtype, resolve_model
from ..runtime.spec import Pool
from ..traces.whole_file import write_whole
from .operators import UNTILED, linears
from .profile import Machine, now, this_machine

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ThreadTiles:
    """The tiles found with so many threads, for every precision, and what each brought against the default."""

    num_threads: int
    table: TileTable
    gains: tuple[TileGain, ...]


@dataclass(frozen=True)
class TileFile:
    """Searched tiles: of which model, on which machine, when."""

    model: str
    machine: Machine
    created_at: str
    of_threads: tuple[ThreadTiles, ...]

    def table(self, num_threads: int) -> TileTable:
        """The tiles for ranks of so many threads; the default table where none were searched."""
        return next((each.table for each in self.of_threads if each.num_threads == num_threads), TileTable())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, whole or not at all."""
        plain = {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "machine": self.machine.model_dump(),
            "created_at": self.created_at,
            "of_threads": [
                {
                    "num_threads": each.num_threads,
                    "table": each.table.to_dict(),
                    "gains": [asdict(gain) for gain in each.gains],
                }
                for each in self.of_threads
            ],
        }
        write_whole(path, json.dumps(plain, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TileFile:
        """Read what `save` wrote. Raises: BadTile: it is none, or of another machine; OSError."""
        name = Path(path).name
        try:
            plain: dict[str, Any] = json.loads(Path(path).read_bytes())
            if plain["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema_version {plain['schema_version']}")
            machine = Machine.model_validate(plain["machine"])
            tiles = tuple(
                ThreadTiles(
                    each["num_threads"],
                    TileTable.from_dict(each["table"]),
                    tuple(TileGain(**gain) for gain in each["gains"]),
                )
                for each in plain["of_threads"]
            )
            file = cls(plain["model"], machine, plain["created_at"], tiles)
        except BadTile:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadTile(name, str(error), "a file that `paretune kernels tune` wrote", "search again") from None
        if not machine.fits(this_machine(machine.instructions)):
            raise BadTile(f"{name}: machine", machine.cpu, "tiles searched on this machine", "search again here")
        return file


def tune_tiles(
    model: str,
    *,
    precisions: Sequence[str],
    kv_cache_dtypes: Sequence[str] = ("bf16",),
    num_threads: Sequence[int],
    buckets: Sequence[int],
    seconds: float,
    progress: Callable[[float, str], None] | None = None,
) -> TileFile:
    """Search the tiles of a model's linear layers and attention on this machine.

    Args:
        model: directory, or "paretune/small".
        precisions: of the weights.
        kv_cache_dtypes: formats of the KV cache, for attention.
        num_threads: thread counts of a rank to search for, each by itself.
        buckets: powers of two of the rows of a step.
        seconds: for all of it.
    Raises: BadModel, BadTile.
    """
    import torch

    from ..kernels.cpu.build import load
    from ..kernels.tile_search import AttentionShape, search

    shape = ModelShape.load(resolve_model(model))
    layers = linears(shape, 1)
    shapes = [
        ("linear", precision, each.out_features, each.in_features)
        for precision in precisions
        for each in layers
        if each.name not in UNTILED and matrix_dtype(each.name, precision) == precision
    ]
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim, Pool.model_fields["block_size"].default)
    attention = [AttentionShape(dtype, *heads) for dtype in dict.fromkeys(kv_cache_dtypes)]
    before = torch.get_num_threads()
    found = []
    try:
        for number, threads in enumerate(num_threads):
            torch.set_num_threads(threads)

            def tell(done: int, total: int, what: str, number: int = number, threads: int = threads) -> None:
                if progress is not None:
                    progress((number + done / total) / len(num_threads), f"{threads} threads, {what}")

            share_s = seconds / len(num_threads)
            result = search(shapes, buckets, seconds=share_s, attention=attention, progress=tell)
            found.append(ThreadTiles(threads, result.table, result.gains))
    finally:
        torch.set_num_threads(before)
    library = load()
    machine = this_machine("torch" if library is None else library.instructions)
    return TileFile(model, machine, now(), tuple(found))
