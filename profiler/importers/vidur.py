"""Operator tables of Vidur (MIT, microsoft/vidur): one layer's operators and NCCL's collectives, timed one by one.

A folder has compute/DEVICE/ORGANIZATION/MODEL/mlp (all operators but attention, by tokens), beside it where measured
attention (prompts by chunk and cached tokens, decode rows by their number and context; with either, the time to save
new keys and values), and network/NODE/all_reduce and send_recv by message; each as .csv or .parquet. Times are
milliseconds (median of repetitions, with min, max, mean and std), fp16; message sizes are bytes there
(vidur/profiling/collectives/collectives_wrapper.py: elements times two). The kernels' own time counts: gaps between
them and the host are in none of the files, nor is the vocabulary projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ...runtime.model_shape import ModelShape
from ..facts import same_name
from ..hardware import Accelerator, BadHardware, accelerator
from ..operator_tables import BadTable, Bound, OperatorTable, Origin
from . import bounds
from .checks import Finding, disordered, drops, faster_than_physics, other_unit
from .measured_file import read_frame, with_numbers
from .vidur_folder import device_of, devices, files_of

Floats = NDArray[np.float64]

OPERATORS = {
    "emb": 0,
    "input_layernorm": 1,
    "attn_pre_proj": 1,
    "attn_rope": 1,
    "attn_post_proj": 1,
    "post_attention_layernorm": 1,
    "mlp_up_proj": 1,
    "mlp_act": 1,
    "mlp_down_proj": 1,
    "add": 2,
}
"""Calls of each in one decoder layer; the embedding is beside the layers. The residual of attention is added, too, and
is not timed apart from that of the MLP."""
OPTIONAL = ("emb", "post_attention_layernorm", "add")
"""Operators that some models do not have, or run inside others: all else of OPERATORS must have been timed."""
_SIZES = ("n_head", "n_kv_head", "n_embd", "n_expanded_embd", "use_gated_mlp")
_MLP = (*_SIZES, "num_tokens", "num_tensor_parallel_workers")
_COLLECTIVE = ("num_workers", "devices_per_node", "size", "collective")
_ATTENTION = (
    "n_embd", "n_q_head", "n_kv_head", "num_tensor_parallel_workers", "batch_size", "prefill_chunk_size",
    "kv_cache_size",
)  # fmt: skip
_TEXT_OR_BOOL = ("use_gated_mlp", "collective")
_FROM_0 = ("num_tokens", "size", "prefill_chunk_size", "kv_cache_size")
_STATISTICS = ("min", "median", "max")
_NOTHING_S = 1e-9  # a bound of what may stay in the cache: its shape is a constant


@dataclass(frozen=True, eq=False)
class VidurTables:
    """Tables of one device below a folder; each is read and checked when it is first asked for.

    device    as the folder calls it; accelerator: of the catalog, None where it knows none of this name
    findings  what was refused, raised or flagged in the tables read so far
    """

    folder: Path
    device: str
    accelerator: Accelerator | None
    findings: list[Finding] = field(default_factory=list)
    _frames: dict[Path, pd.DataFrame] = field(default_factory=dict)
    _tables: dict[tuple[object, ...], OperatorTable] = field(default_factory=dict)

    @property
    def models(self) -> tuple[str, ...]:
        """ORGANIZATION/MODEL of every model that was measured."""
        compute = self.folder / "compute" / self.device
        return tuple(str(path.parent.relative_to(compute)) for path in files_of(compute, "mlp"))

    def files(self) -> Iterator[Path]:
        """All that its tables are read from."""
        for stem in ("mlp", "attention"):
            yield from files_of(self.folder / "compute" / self.device, stem)
        for network in self.networks:
            for stem in ("all_reduce", "send_recv"):
                yield from files_of(self.folder / "network" / network, stem)

    @property
    def networks(self) -> tuple[str, ...]:
        """Nodes of this device whose collectives were measured."""
        found = self.folder / "network"
        names = {path.parent.name for stem in ("all_reduce", "send_recv") for path in files_of(found, stem)}
        return tuple(sorted(name for name in names if device_of(self.folder, name) == self.device))

    def model_of(self, shape: ModelShape) -> str:
        """The measured model with a shape's sizes; vocabularies may differ, as no vocabulary projection was measured.

        Raises: BadTable: none.
        """
        wanted = (shape.num_heads, shape.num_kv_heads, shape.hidden_size, shape.intermediate_size, True)
        for model in self.models:
            frame = self._frame("compute", self.device, model, "mlp", _MLP)
            if (frame[list(_SIZES)] == list(wanted)).all(axis=1).any():
                return model
        sizes = "{} heads, {} KV heads, hidden {}, intermediate {}".format(*wanted[:4])
        raise BadTable(f"{self.folder}: models", f"none with {sizes}", ", ".join(self.models), "take one of these")

    def ranks_of(self, model: str) -> tuple[int, ...]:
        """Degrees of tensor parallelism that a model was measured at."""
        frame = self._frame("compute", self.device, model, "mlp", _MLP)
        return tuple(sorted(int(n) for n in frame["num_tensor_parallel_workers"].unique()))

    def layer(self, model: str, tensor_parallel_size: int) -> Mapping[str, OperatorTable]:
        """By operator (of OPERATORS, those of OPTIONAL where they were timed), axis (tokens).

        Raises: BadTable: not measured with so many ranks, or an operator that every model has was not.
        """
        frame = self._frame("compute", self.device, model, "mlp", _MLP)
        rows = frame[frame["num_tensor_parallel_workers"] == tensor_parallel_size]
        if rows.empty:
            known = ", ".join(map(str, self.ranks_of(model)))
            raise BadTable(f"{model}: tensor_parallel_size", tensor_parallel_size, known, "choose one of these")
        timed = [name for name in OPERATORS if _timed(rows, name)]
        missing = [name for name in OPERATORS if name not in timed and name not in OPTIONAL]
        if missing:
            where, allowed = f"{model}: mlp of {tensor_parallel_size} ranks", "every operator of a layer"
            raise BadTable(where, f"no times of {', '.join(missing)}", allowed, "profile them")
        found = {}
        for name in timed:
            arithmetic, memory = self._bounds(name, rows.iloc[0], tensor_parallel_size)
            keys = {"model": model, "tensor_parallel_size": tensor_parallel_size}
            found[name] = self._table(
                ("compute", self.device, model, "mlp"), name, keys, rows, {"tokens": "num_tokens"}, arithmetic, memory
            )
        return found

    def attention(self, model: str, tensor_parallel_size: int) -> tuple[OperatorTable, OperatorTable] | None:
        """Of one prompt, axes (chunk, cached), and of decode rows, axes (rows, context); None: not in the folder."""
        parts, frame = ("compute", self.device, model, "attention"), self._attention_rows(model, tensor_parallel_size)
        if frame is None:
            return None
        prompts = frame[(frame["prefill_chunk_size"] > 0) & (frame["batch_size"] == 1)]
        rows = frame[frame["prefill_chunk_size"] == 0]
        if prompts.empty or rows.empty:
            found = f"{len(prompts)} prompts, {len(rows)} decode steps of {tensor_parallel_size} ranks"
            raise BadTable(f"{model}: attention", found, "both", "profile them")
        first = frame.iloc[0]
        heads, kv_heads = (max(1, int(first[n]) // tensor_parallel_size) for n in ("n_q_head", "n_kv_head"))
        head_dim = int(first["n_embd"]) // int(first["n_q_head"])
        keys = {"model": model, "tensor_parallel_size": tensor_parallel_size}
        prefill = self._table(
            parts, "attn_prefill", keys, prompts, {"chunk": "prefill_chunk_size", "cached": "kv_cache_size"},
            *self._attention_bounds(heads, kv_heads, head_dim, _prompt_work),
        )  # fmt: skip
        decode = self._table(
            parts, "attn_decode", keys, rows, {"rows": "batch_size", "context": "kv_cache_size"},
            *self._attention_bounds(heads, kv_heads, head_dim, _decode_work),
        )  # fmt: skip
        return prefill, decode

    def cache_save(self, model: str, tensor_parallel_size: int) -> OperatorTable | None:
        """Of new keys and values into the cache, axis (tokens): those of one prompt or of decode rows; None: not timed
        apart."""
        frame = self._attention_rows(model, tensor_parallel_size)
        if frame is None or not _timed(frame, "attn_kv_cache_save"):
            return None
        frame = frame[(frame["prefill_chunk_size"] == 0) | (frame["batch_size"] == 1)]
        frame = frame.assign(num_tokens=frame[["prefill_chunk_size", "batch_size"]].max(axis=1))
        keys = {"model": model, "tensor_parallel_size": tensor_parallel_size}
        return self._table(
            ("compute", self.device, model, "attention"), "attn_kv_cache_save", keys, frame, {"tokens": "num_tokens"},
            None, lambda points: np.full(len(points), _NOTHING_S),
        )  # fmt: skip

    def _attention_rows(self, model: str, ranks: int) -> pd.DataFrame | None:
        """None: attention of the model is not in the folder."""
        parts = ("compute", self.device, model, "attention")
        if not files_of(self.folder.joinpath(*parts[:-1]), "attention"):
            return None
        frame = self._frame(*parts, _ATTENTION)
        return frame[frame["num_tensor_parallel_workers"] == ranks]

    def collective(self, name: str, network: str, ranks: int) -> OperatorTable:
        """Of "all_reduce" or "send_recv" among ranks of one node, axis (bytes).

        Raises: BadTable: not measured there, or not among so many.
        """
        parts = ("network", network, name)
        frame = self._frame(*parts, _COLLECTIVE)
        frame = frame[frame["collective"] == name]
        # ranks of one node: those of several measured its network
        rows = frame[(frame["num_workers"] == ranks) & (frame["devices_per_node"] == ranks)]
        if rows.empty:
            inside = frame[frame["num_workers"] == frame["devices_per_node"]]
            known = ", ".join(str(n) for n in sorted(inside["num_workers"].unique())) or "none within a node"
            raise BadTable(f"{network}: {name} of ranks", ranks, known, "choose one of these")
        keys = {"network": network, "ranks": ranks}
        return self._table(parts, name, keys, rows, {"bytes": "size"}, None, self._link_bound())

    def every(self) -> Iterator[OperatorTable]:
        """Every table of the device, each checked."""
        for model in self.models:
            for ranks in self.ranks_of(model):
                yield from self.layer(model, ranks).values()
                yield from self.attention(model, ranks) or ()
                if (saved := self.cache_save(model, ranks)) is not None:
                    yield saved
        for network in self.networks:
            for name in ("all_reduce", "send_recv"):
                if files_of(self.folder / "network" / network, name):
                    frame = self._frame("network", network, name, _COLLECTIVE)
                    inside = frame[(frame["num_workers"] == frame["devices_per_node"]) & (frame["num_workers"] > 1)]
                    for ranks in sorted(int(n) for n in inside["num_workers"].unique()):
                        yield self.collective(name, network, ranks)

    def between_nodes(self) -> int:
        """Rows of collectives whose ranks were not of one node: not read."""
        left = 0
        for network in self.networks:
            for name in ("all_reduce", "send_recv"):
                if files_of(self.folder / "network" / network, name):
                    frame = self._frame("network", network, name, _COLLECTIVE)
                    left += int((frame["num_workers"] != frame["devices_per_node"]).sum())
        return left

    def _bounds(self, name: str, sizes: Any, ranks: int) -> tuple[Bound | None, Bound]:
        """Of arithmetic, and of memory; of what runs between two matrices nothing: it may stay in a cache."""
        hidden, head_dim = int(sizes["n_embd"]), int(sizes["n_embd"]) // int(sizes["n_head"])
        inter, gated = int(sizes["n_expanded_embd"]), 2 if sizes["use_gated_mlp"] else 1
        matrices = {
            "attn_pre_proj": hidden * (int(sizes["n_head"]) + 2 * int(sizes["n_kv_head"])) * head_dim / ranks,
            "attn_post_proj": hidden * int(sizes["n_head"]) * head_dim / ranks,
            "mlp_up_proj": hidden * gated * inter / ranks,
            "mlp_down_proj": hidden * inter / ranks,
        }
        device = self.accelerator
        if name not in matrices or device is None:
            return None, lambda points: np.full(len(points), _NOTHING_S)
        elements, rate = matrices[name], device.flops_per_s("bf16")
        bandwidth = device.peak_bytes_per_s

        def arithmetic(points: Floats) -> Floats:
            return np.asarray(2.0 * points[:, 0] * elements / rate, np.float64)

        return arithmetic, lambda points: np.maximum(arithmetic(points), 2.0 * elements / bandwidth)

    def _attention_bounds(
        self, heads: int, kv_heads: int, head_dim: int, work: Callable[[Floats], tuple[Floats, Floats]]
    ) -> tuple[Bound | None, Bound]:
        """Of arithmetic, and of memory. work: query-key pairs, and keys read, at points of the table."""
        if self.accelerator is None:
            return None, lambda points: np.full(len(points), _NOTHING_S)
        rate, bandwidth = self.accelerator.flops_per_s("bf16"), self.accelerator.peak_bytes_per_s

        def arithmetic(points: Floats) -> Floats:
            pairs, _ = work(points)
            return np.asarray(np.maximum(4.0 * heads * head_dim * pairs / rate, _NOTHING_S), np.float64)

        def memory(points: Floats) -> Floats:
            _, read = work(points)
            return np.maximum(arithmetic(points), 4.0 * kv_heads * head_dim * read / bandwidth)

        return arithmetic, memory

    def _link_bound(self) -> Bound:
        if self.accelerator is None or not self.accelerator.link_bytes_per_s:
            return lambda points: np.maximum(points[:, 0], 1.0) * 1e-15
        return bounds.all_reduce(self.accelerator)

    def _frame(self, *parts: Any) -> pd.DataFrame:
        *where, columns = parts
        found = files_of(self.folder.joinpath(*where[:-1]), where[-1])
        if not found:
            raise BadTable("/".join(where), "no such table", "a .csv or .parquet of that name", "name Vidur's folder")
        path = found[0]
        if path not in self._frames:
            frame = read_frame(path)
            missing = [column for column in columns if column not in frame]
            if missing:
                raise BadTable(str(path), f"no {', '.join(missing)}", ", ".join(columns), "profile it again")
            counts = [column for column in columns if column not in (*_TEXT_OR_BOOL, *_FROM_0)]
            frame = with_numbers(path, frame, counts, 1)
            frame = with_numbers(path, frame, [column for column in columns if column in _FROM_0], 0)
            times = [column for column in map(str, frame) if column.startswith("time_stats.")]
            self._frames[path] = with_numbers(path, frame, times, None)
        return self._frames[path]

    def _table(
        self,
        parts: Sequence[str],
        name: str,
        keys: Mapping[str, object],
        rows: pd.DataFrame,
        axes: Mapping[str, str],
        arithmetic: Bound | None,
        least: Bound,
    ) -> OperatorTable:
        """Refuses what no device could do, raises to the bound what came from a cache, flags what is odd."""
        known = (tuple(parts), name, *keys.items())
        if known in self._tables:
            return self._tables[known]
        file, columns = "/".join(parts), list(axes.values())
        label = f"{name} {', '.join(str(value) for value in keys.values())}"
        statistics = {s: f"time_stats.{name}.{s}" for s in _STATISTICS}
        missing = [column for column in statistics.values() if column not in rows]
        if missing:
            raise BadTable(file, f"no {', '.join(missing)}", "min, median and max of each operator", "profile it again")
        where, allowed, todo = f"{file}: {label}", "times that can be", "leave it out"
        rows = rows[rows[statistics["median"]].notna()].reset_index(drop=True)
        if rows.empty:
            raise BadTable(where, "no row with a time", allowed, todo)
        note = _Noted(self.findings, file, label, columns, statistics["median"])
        wrong = disordered(*(rows[statistics[s]].to_numpy(np.float64) for s in _STATISTICS))
        rows = note.refuse(rows, wrong, "min, median and max are not in order, or a time is not above 0")
        if rows.empty:
            found = "no row whose min, median and max are above 0 and in order"
            raise BadTable(where, found, allowed, todo)
        # several ranks, or repeated runs, of one operator
        rows = rows.groupby(columns)[statistics["median"]].median().reset_index()
        points = rows[columns].to_numpy(np.float64)
        seconds = rows[statistics["median"]].to_numpy(np.float64) * 1e-3
        bounded = self.accelerator is not None and (arithmetic is not None or parts[0] == "network")
        unit = other_unit(seconds, least(points)) if bounded else None
        if unit:
            raise BadTable(where, unit, "milliseconds", "correct the unit, or leave the table out")
        if arithmetic is not None:
            fast = faster_than_physics(seconds, arithmetic(points))
            rows = note.refuse(rows, fast, "faster than peak FLOP/s allow")
        elif name in ("all_reduce", "send_recv"):
            fast = faster_than_physics(seconds, least(points))
            rows = note.refuse(rows, fast, "more bytes than the link carries: another unit of size, or another link")
        if rows.empty:
            raise BadTable(where, "every row with statistics in order faster than physics", allowed, todo)
        points = rows[columns].to_numpy(np.float64)
        seconds = rows[statistics["median"]].to_numpy(np.float64) * 1e-3
        cached = faster_than_physics(seconds, least(points))
        note.flag(rows, cached, "faster than device memory, as from a cache: raised to the bound")
        note.flag(rows, drops(rows, columns, statistics["median"]), "less than half the time of a smaller operator")
        table = OperatorTable(
            name, dict(keys), tuple(axes), points, np.maximum(seconds, least(points)), least,
            Origin(self.device, "vidur", "", file),
        )  # fmt: skip
        self._tables[known] = table
        return table


def _prompt_work(points: Floats) -> tuple[Floats, Floats]:
    """Of (chunk, cached)."""
    chunk, cached = points.T
    return chunk * (cached + chunk / 2), cached + chunk


def _decode_work(points: Floats) -> tuple[Floats, Floats]:
    """Of (rows, context)."""
    rows, context = points.T
    return rows * context, rows * context


@dataclass(frozen=True)
class _Noted:
    """Writes down rows of one table that are refused or flagged."""

    findings: list[Finding]
    file: str
    label: str
    columns: list[str]
    milliseconds: str

    def flag(self, rows: pd.DataFrame, which: NDArray[np.bool_], reason: str, refused: bool = False) -> None:
        if which.any():
            first = rows[which].iloc[0]
            where = ", ".join(f"{column} {first[column]:g}" for column in self.columns)
            example = f"{where}: {first[self.milliseconds] * 1e3:.1f} µs"
            self.findings.append(Finding(self.file, self.label, refused, reason, int(which.sum()), len(rows), example))

    def refuse(self, rows: pd.DataFrame, which: NDArray[np.bool_], reason: str) -> pd.DataFrame:
        """The rows that are left."""
        self.flag(rows, which, reason, refused=True)
        return rows[~which].reset_index(drop=True)


def read_tables(folder: Path, device: str | None = None) -> VidurTables:
    """The tables of one device below a folder of Vidur's profiles.

    Args:
        device: as the folder calls it ("rtx_pro_6000"), or as the catalog does ("RTX PRO 6000"); None: the only one.
    Raises: BadTable: none such, or several.
    """
    known = devices(folder)
    found = [name for name in known if device is None or same_name(name, device)]
    if len(found) != 1:
        said = device if device is not None else f"{len(known)} devices"
        raise BadTable(str(folder), said, ", ".join(known) or "a folder with compute/ or network/", "name one of these")
    try:
        cataloged: Accelerator | None = accelerator(found[0])
    except BadHardware:
        cataloged = None
    return VidurTables(folder, found[0], cataloged)


def _timed(rows: pd.DataFrame, operator: str) -> bool:
    column = f"time_stats.{operator}.median"
    return column in rows and bool(rows[column].notna().any())
