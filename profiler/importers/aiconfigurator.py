"""Operator tables of NVIDIA's aiconfigurator (Apache-2.0): a folder SYSTEM/FAMILY/ENGINE/VERSION/*.parquet, or the same
inside the installed package `aiconfigurator-core` (the extra `paretune[operator-tables]`).

Latencies there are milliseconds, single values without spread. Of a kernel measured several times at one shape, or of
several kernels there, the kernel with the most rows of the file counts, then the median.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..hardware import Accelerator, accelerator
from ..operator_tables import BadTable, Bound, OperatorTable, Origin
from ..table_choice import INSTALLED
from . import bounds
from .checks import Finding, drops, faster_than_physics

Floats = NDArray[np.float64]

PACKAGE = "aiconfigurator_core"
UNDERSTOOD = (
    "gemm_perf",
    "context_attention_perf",
    "generation_attention_perf",
    "custom_allreduce_perf",
    "moe_perf",
    "context_mla_perf",
    "generation_mla_perf",
    "mla_bmm_perf",
)
"""The files that are read; those of NCCL, of modules as a whole and of wide expert parallelism are not."""
ENGINES = ("trtllm", "vllm", "sglang")
_ACCELERATORS = {
    "a100_sxm": "A100",
    "h100_sxm": "H100",
    "h200_sxm": "H200",
    "b200_sxm": "B200",
    "l40s": "L40S",
    "rtx_pro_6000_server": "RTX PRO 6000",
}
_VERSION = re.compile(r"(\d+(?:\.\d+)*)(?:\.?(dev|a|b|rc)(\d+))?(?:\.?post(\d+))?")
_STAGES = ("dev", "a", "b", "rc", None)  # the release itself comes after all


def installed_folder() -> Path:
    """Where the installed aiconfigurator-core keeps its tables; nothing of it is run.

    Raises: BadTable: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        todo = "pip install 'paretune[operator-tables]', or give the folder"
        raise BadTable("aiconfigurator-core", "not installed", "an installed package", todo)
    return Path(found.submodule_search_locations[0]) / "systems" / "data"


def folder_of(where: str) -> Path:
    """A folder as named, or of "aiconfigurator-core" that of the installed package. Raises: BadTable: not installed."""
    return installed_folder() if where == INSTALLED else Path(where)


def systems(folder: Path) -> dict[str, str]:
    """Systems of a folder that the catalog has an accelerator for: folder name to the catalog's name."""
    return {name: known for name, known in _ACCELERATORS.items() if (folder / name).is_dir()}


def read_tables(
    folder: Path, system: str, engine: str, version: str | None = None, families: Iterable[str] | None = None
) -> OperatorTables:
    """The tables of a system as an engine's kernels were measured there.

    Args:
        system: as the folder calls it, "h100_sxm", or as the catalog does, "H100".
        version: of the engine; without it, of each family the newest. Collectives of NCCL have a version of their own.
    Raises: BadTable: an unknown system or engine, or no such tables.
    """
    known = systems(folder)
    named = {name.casefold(): at for at, name in known.items()} | {at: at for at in known}
    found = named.get(system.casefold())
    if found is None:
        raise BadTable(str(folder), system, ", ".join(known) or "a folder with systems", "name one of these")
    if engine not in ENGINES:
        raise BadTable("engine", engine, ", ".join(ENGINES), "name one of these")
    files: dict[str, tuple[Path, str]] = {}
    for path in sorted((folder / found).glob("*/*/*/*.parquet")):
        family, of_engine, of_version = path.parts[-4:-1]
        if families is not None and family not in families:
            continue
        whose = (of_engine == engine and (version is None or of_version == version)) or of_engine == "nccl"
        if whose and (path.stem not in files or _newer(of_version, files[path.stem][1])):
            files[path.stem] = (path, of_version)
    if not any(path.parts[-3] == engine for path, _ in files.values()):
        have = sorted({"/".join(p.parts[-3:-1]) for p in (folder / found).glob("*/*/*/*.parquet")})
        raise BadTable(f"{folder / found}", f"{engine} {version or ''}", ", ".join(have), "name one of these")
    return OperatorTables(accelerator(known[found]), found, engine, dict(files))


def _newer(left: str, right: str) -> bool:
    """Whether one version comes after another: 1.0.0rc6, 1.0.0, 1.0.0.post1, 1.1; what is no version before all."""

    def key(version: str) -> tuple[list[int], int, int, int]:
        found = _VERSION.match(version)
        if found is None:
            return [], 0, 0, 0
        release, stage, number, post = found.groups()
        parts = [int(part) for part in re.sub(r"(\.0+)+$", "", release).split(".")]  # 1.0.0 is 1
        return parts, _STAGES.index(stage), int(number or 0), int(post or -1)

    return key(left) > key(right)


@dataclass(frozen=True, eq=False)
class OperatorTables:
    """Measured tables of one system and engine; each is read and checked when it is first asked for.

    files     by the name of a table's file: where it lies, and its version
    findings  what was refused or flagged in the tables read so far
    """

    accelerator: Accelerator
    system: str
    engine: str
    files: Mapping[str, tuple[Path, str]]
    findings: list[Finding] = field(default_factory=list)
    _tables: dict[tuple[object, ...], OperatorTable] = field(default_factory=dict)
    _frames: dict[str, pd.DataFrame] = field(default_factory=dict)
    _rows: dict[tuple[str, tuple[str, ...]], Mapping[tuple[object, ...], NDArray[np.intp]]] = field(
        default_factory=dict
    )

    @cached_property
    def versions(self) -> dict[str, str]:
        """Version of the engine (or of NCCL) by file."""
        return {stem: version for stem, (_, version) in self.files.items()}

    def gemm(self, dtype: str) -> OperatorTable:
        """Axes (m, n, k)."""
        return self._table(
            "gemm_perf",
            {"gemm_dtype": dtype},
            {"m": "m", "n": "n", "k": "k"},
            lambda _: bounds.gemm(self.accelerator, dtype),
        )

    def attention(
        self, prefill: bool, heads_per_kv_head: int, head_dim: int, dtype: str, kv_dtype: str, window: int = 0
    ) -> OperatorTable:
        """Axes (batch, tokens, kv_heads): prompts of so many tokens, or one decode step over contexts of so many.

        Raises: BadTable: not measured with so many query heads for each KV head, or in these precisions.
        """
        bound = bounds.attention(self.accelerator, dtype, kv_dtype, prefill, window)
        group, dim = float(heads_per_kv_head), float(head_dim)
        return self._table(
            "context_attention_perf" if prefill else "generation_attention_perf",
            {
                "heads_per_kv_head": heads_per_kv_head,
                "head_dim": head_dim,
                "attn_dtype": dtype,
                "kv_cache_dtype": kv_dtype,
                "window_size": window,
            },
            {"batch": "batch_size", "tokens": "tokens", "kv_heads": "num_key_value_heads"},
            lambda _: lambda p: bound(p[:, 0], p[:, 1], group * p[:, 2], p[:, 2], np.full(len(p), dim)),
        )

    def all_reduce(self, ranks: int, graph: bool = True) -> OperatorTable:
        """Axis (bytes): of the engine's own kernels, in a CUDA graph or launched one by one."""
        keys: dict[str, object] = {"num_gpus": ranks}
        if "backend" in self._frame("custom_allreduce_perf"):
            keys["backend"] = f"{self.engine}_{'graph' if graph else 'eager'}"
        return self._table(
            "custom_allreduce_perf", keys, {"bytes": "bytes"}, lambda _: bounds.all_reduce(self.accelerator)
        )

    def moe(
        self, dtype: str, hidden: int, inter: int, topk: int, experts: int, tp: int, ep: int, routing: str
    ) -> OperatorTable:
        """Axis (tokens): the chosen experts' MLPs on the busiest rank, routed as `routing` says ("balanced", …)."""
        return self._table(
            "moe_perf",
            {
                "moe_dtype": dtype,
                "hidden_size": hidden,
                "inter_size": inter,
                "topk": topk,
                "num_experts": experts,
                "moe_tp_size": tp,
                "moe_ep_size": ep,
                "distribution": routing,
            },
            {"tokens": "num_tokens"},
            lambda _: bounds.moe(self.accelerator, dtype, hidden, inter, topk, experts, tp, ep),
        )

    def mla(self, prefill: bool, kv_dtype: str) -> OperatorTable:
        """Axes (batch, tokens, heads): multi-head latent attention without its projections."""
        bound = bounds.mla(self.accelerator, kv_dtype, prefill)
        return self._table(
            "context_mla_perf" if prefill else "generation_mla_perf",
            {"kv_cache_dtype": kv_dtype},
            {"batch": "batch_size", "tokens": "tokens", "heads": "num_heads"},
            lambda _: lambda p: bound(p[:, 0], p[:, 1], p[:, 2]),
        )

    def mla_bmm(self, name: str, dtype: str) -> OperatorTable:
        """Axes (tokens, heads): "mla_gen_pre" takes queries into the latent space, "mla_gen_post" values out of it."""
        bound = bounds.mla_bmm(self.accelerator, dtype)
        return self._table(
            "mla_bmm_perf",
            {"op_name": name, "bmm_dtype": dtype},
            {"tokens": "num_tokens", "heads": "num_heads"},
            lambda _: lambda p: bound(p[:, 0], p[:, 1]),
        )

    def values(self, stem: str, column: str) -> tuple[object, ...]:
        """The different values of a column of a file, sorted."""
        return tuple(sorted(self._frame(stem)[column].unique().tolist(), key=str))

    def every(self) -> Iterator[OperatorTable]:
        """Every table of the files that are understood, each checked; a precision without a known width is skipped."""
        for (dtype,) in self._combinations("gemm_perf", "gemm_dtype"):
            if dtype in bounds.WEIGHT_BYTES:
                yield self.gemm(dtype)
        for prefill, stem in ((True, "context_attention_perf"), (False, "generation_attention_perf")):
            keys = ("heads_per_kv_head", "head_dim", "attn_dtype", "kv_cache_dtype", "window_size")
            for group, dim, dtype, kv_dtype, window in self._combinations(stem, *keys):
                yield self.attention(prefill, group, dim, dtype, kv_dtype, window)
        for (ranks,) in self._combinations("custom_allreduce_perf", "num_gpus"):
            for graph in (True, False) if "backend" in self._frame("custom_allreduce_perf") else (True,):
                yield self.all_reduce(ranks, graph)
        sizes = ("hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size", "distribution")
        for dtype, *shape in self._combinations("moe_perf", "moe_dtype", *sizes):
            if dtype in bounds.WEIGHT_BYTES:
                yield self.moe(dtype, *shape)
        for prefill, stem in ((True, "context_mla_perf"), (False, "generation_mla_perf")):
            for (kv_dtype,) in self._combinations(stem, "kv_cache_dtype"):
                yield self.mla(prefill, kv_dtype)
        for name, dtype in self._combinations("mla_bmm_perf", "op_name", "bmm_dtype"):
            yield self.mla_bmm(name, dtype)

    def _combinations(self, stem: str, *columns: str) -> Iterator[tuple[Any, ...]]:
        if stem in self.files:
            yield from self._frame(stem)[list(columns)].drop_duplicates().itertuples(index=False, name=None)

    def _frame(self, stem: str) -> pd.DataFrame:
        if stem not in self._frames:
            if stem not in self.files:
                have = ", ".join(self.files)
                raise BadTable(f"{self.system}/{self.engine}", f"no table {stem}", have, "choose another engine")
            frame = pd.read_parquet(self.files[stem][0])
            frame["seconds"] = frame["latency"] * 1e-3
            if stem in ("context_attention_perf", "generation_attention_perf"):
                # older files: without windows, and of the only precision there was
                for column, fallback in (("window_size", 0), ("attn_dtype", "bfloat16")):
                    if column not in frame:
                        frame[column] = fallback
                frame["heads_per_kv_head"] = frame["num_heads"] // frame["num_key_value_heads"]
            if stem.startswith(("context", "generation")):
                # a decode step of one token after `step` others reads the new token's keys too
                frame["tokens"] = frame["isl"] + frame["step"]
            if stem == "custom_allreduce_perf":
                frame["bytes"] = frame["message_size"] * 2  # elements of bfloat16 or half, not bytes
            self._frames[stem] = frame
        return self._frames[stem]

    def _table(
        self,
        stem: str,
        keys: Mapping[str, object],
        axes: Mapping[str, str],
        bound_of: Callable[[pd.DataFrame], Bound],
    ) -> OperatorTable:
        name = (stem, *keys.items())
        if name in self._tables:
            return self._tables[name]
        frame = self._frame(stem)
        path, version = self.files[stem]
        file = "/".join(path.parts[-5:])
        rows = frame.take(self._places(stem, tuple(keys)).get(tuple(keys.values()), []))
        if rows.empty:
            self._raise_missing(file, frame, keys)
        columns = list(axes.values())
        if "kernel_source" in rows:
            usual = rows["kernel_source"].map(frame["kernel_source"].value_counts())
            rows = rows[usual == usual.groupby([rows[c] for c in columns]).transform("max")]
        rows = rows.groupby(columns)["seconds"].median().reset_index()
        points = rows[columns].to_numpy(np.float64)
        bound_s = bound_of(rows)
        label = f"{stem.removesuffix('_perf')} {', '.join(str(v) for v in keys.values())}"
        fast = faster_than_physics(rows["seconds"].to_numpy(), bound_s(points))
        self._note(file, label, rows, fast, True, "faster than peak FLOP/s or memory bandwidth allow", columns)
        if fast.all():
            raise BadTable(f"{file}: {label}", "every row faster than physics", "times that can be", "refuse the file")
        rows = rows[~fast].reset_index(drop=True)
        odd = drops(rows, columns, "seconds")
        self._note(file, label, rows, odd, False, "less than half the time of a smaller operator", columns)
        origin = Origin(self.system, self.engine, version, file)
        table = OperatorTable(
            stem.removesuffix("_perf"),
            dict(keys),
            tuple(axes),
            rows[columns].to_numpy(np.float64),
            rows["seconds"].to_numpy(np.float64),
            bound_s,
            origin,
        )
        self._tables[name] = table
        return table

    def _places(self, stem: str, columns: tuple[str, ...]) -> Mapping[tuple[object, ...], NDArray[np.intp]]:
        """Where in a file the rows of each combination of keys are; tables of experts are thousands."""
        if (stem, columns) not in self._rows:
            found = self._frame(stem).groupby(list(columns), sort=False).indices
            self._rows[stem, columns] = {
                key if isinstance(key, tuple) else (key,): np.asarray(at, np.intp) for key, at in found.items()
            }
        return self._rows[stem, columns]

    @staticmethod
    def _raise_missing(file: str, frame: pd.DataFrame, keys: Mapping[str, object]) -> None:
        for column, value in keys.items():
            kept = frame[frame[column] == value]
            if kept.empty:
                have = ", ".join(str(v) for v in sorted(frame[column].unique().tolist(), key=str))
                raise BadTable(f"{file}: {column}", value, have, "choose another precision, shape or engine")
            frame = kept

    def _note(
        self,
        file: str,
        table: str,
        rows: pd.DataFrame,
        which: NDArray[np.bool_],
        refused: bool,
        reason: str,
        columns: list[str],
    ) -> None:
        if which.any():
            first = rows[which].iloc[0]
            example = ", ".join(f"{c} {first[c]:g}" for c in columns) + f": {first['seconds'] * 1e6:.1f} µs"
            self.findings.append(Finding(file, table, refused, reason, int(which.sum()), len(rows), example))
