"""Profiles of LLMServingSim 2 (MIT, casys-kaist/LLMServingSim): vLLM's layers on one GPU, timed one by one.

A folder HARDWARE/ORGANIZATION/MODEL/VARIANT holds meta.yaml and, for each degree of tensor parallelism, tpN with dense
(layers by tokens), per_sequence (by rows that sample), attention (by chunk, cached tokens, decode rows and their
context), moe and skew (decode rows of unequal context); each as .csv or .parquet, times in microseconds. The kernels'
own time counts there: gaps between them, the host and collectives are in none of the files. A variant is called by the
precision of its weights and, where it is another than the model's, of its KV cache ("fp8-kvfp8"), or as somebody liked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from ...kernels.weight_formats import WEIGHT_FORMATS
from ...runtime.model_shape import ModelShape
from ..hardware import Accelerator, BadHardware, accelerator
from ..operator_tables import BadTable, Bound, OperatorTable, Origin
from ..operators import linears
from .checks import Finding, drops, other_unit
from .measured_file import read_frame, with_numbers

Floats = NDArray[np.float64]

# Calls of each entry in one decoder layer: an entry of several calls (two norms; one of queries, one of keys) is their
# mean, as a comparison of `layernorm` with `final_layernorm` shows.
LAYERS = {
    "layernorm": 2,
    "qkv_proj": 1,
    "qk_norm": 2,
    "rotary_emb": 1,
    "o_proj": 1,
    "gate_up_proj": 1,
    "act_fn": 1,
    "down_proj": 1,
}
ONCE = ("embedding", "final_layernorm")
SAMPLED = ("lm_head", "sampler")
_MATRICES = {"qkv_proj": "qkv", "o_proj": "o", "gate_up_proj": "gate_up", "down_proj": "down", "lm_head": "head"}
_AXES = {
    "dense": ("tokens",),
    "per_sequence": ("sequences",),
    "attention": ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode"),
    "moe": ("tokens", "activated_experts"),
}
_SPREAD: Floats = np.asarray(2.0 ** np.arange(-8.0, 0.0), np.float64)
_SHAPE_ONLY = (1e17, 1e17 / 300)  # FLOP/s and bytes/s that bound nothing, in a GPU's proportion
_SAME_UNIT = 1.5
_SAYS_UNIT_S = 1e-6  # what physics bounds below it takes what its launch takes, in any unit

# What vLLM, and the profiler in the names of variants, call precisions; of ours each by its own name too.
_DTYPES = {name: name for name in WEIGHT_FORMATS} | {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8",
    "fp8e5m2": "fp8",
}
_UNQUANTIZED = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Skew:
    """How much longer decode rows of unequal context take, as `batch_time.AttentionTimes` has it."""

    prompt: Floats
    rows: Floats
    longest: Floats
    spread: Floats
    share: Floats


@dataclass(frozen=True, eq=False)
class EngineProfile:
    """What was measured of one model's layers at one degree of tensor parallelism. Times are of one layer, one rank.

    accelerator   of the catalog; None: it knows none of this name, so rows were not checked against physics
    meta          meta.yaml
    dense         by entry: (tokens,)
    per_sequence  by entry: (rows that sample,)
    prefill       (chunk, cached)
    decode        (rows, context)
    mixed         (chunk, cached, rows, context)
    experts       (tokens, activated experts) of one layer's router and experts; None: a dense model
    skew          None: not measured
    findings      rows that were raised to what physics allows, or are odd
    """

    folder: Path
    accelerator: Accelerator | None
    meta: Mapping[str, Any]
    tensor_parallel_size: int
    dense: Mapping[str, OperatorTable]
    per_sequence: Mapping[str, OperatorTable]
    prefill: OperatorTable
    decode: OperatorTable
    mixed: OperatorTable
    experts: OperatorTable | None
    skew: Skew | None
    findings: tuple[Finding, ...]

    @property
    def name(self) -> str:
        return (
            f"{self.meta['model']} {self.meta['variant']} on {self.meta['hardware']}, vLLM {self.meta['vllm_version']}"
        )

    @property
    def vllm_version(self) -> tuple[int, int]:
        found = re.match(r"(\d+)\.(\d+)", str(self.meta["vllm_version"]))
        return (int(found[1]), int(found[2])) if found else (0, 0)

    @property
    def weight_dtype(self) -> str | None:
        """Of the linear layers, as in WEIGHT_FORMATS; None: meta.yaml does not say."""
        return _precisions(self.meta)[0]

    @property
    def kv_cache_dtype(self) -> str | None:
        """Of the KV cache, as in WEIGHT_FORMATS; None: meta.yaml does not say."""
        return _precisions(self.meta)[1]


def _precisions(meta: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Of weights and KV cache, by the variant's name, else by the engine's arguments; None: neither says.

    Without a word of its own a cache is of the model's dtype, which beside weights of fewer bits is bf16 (vLLM's
    `auto`).
    """
    engine = meta.get("engine_effective") or {}
    named, _, cache = str(meta["variant"]).partition("-kv")
    weights = _DTYPES.get(named) or _DTYPES.get(str(engine.get("quantization") or engine.get("dtype")))
    cache = cache or str(engine.get("kv_cache_dtype") or "auto")
    if cache == "auto" and weights is not None:
        return weights, weights if weights in _UNQUANTIZED else "bf16"
    return weights, _DTYPES.get(cache)


def _bytes(dtype: str | None, least: float) -> float:
    return least if dtype is None else WEIGHT_FORMATS[dtype].bits / 8


def find_profile(folder: Path, model: str | None = None) -> Path:
    """The folder of a model's profile (that of meta.yaml), or of the only one, in or below a folder.

    Raises: BadTable: none, or several.
    """
    found = [path.parent for path in sorted(folder.rglob("meta.yaml")) if model in (None, _meta(path)["model"])]
    if len(found) != 1:
        names = ", ".join(str(path) for path in found) or "none"
        said = f"{len(found)} profiles{f' of {model}' if model else ''}: {names}"
        raise BadTable(str(folder), said, "one", "name the model's own folder")
    return found[0]


def read_profile(folder: Path, shape: ModelShape, tensor_parallel_size: int = 1) -> EngineProfile:
    """Read a profile and check it against physics.

    A time below what the device's peaks allow is raised to it and flagged: repeated measurements find small weights in
    the cache, where a serving step, which reads all layers in turn, does not. Where the precision is not known, the
    least that any would take is what counts: half a byte a weight, a byte a number of the KV cache, the fastest
    arithmetic.

    Args:
        folder: that of meta.yaml.
        shape: of the profiled model.
    Raises: BadTable: a file, column or kind of row is missing, holds no numbers, or times as if in another unit, or the
        shape has layers that were not measured.
    """
    meta = _meta(folder / "meta.yaml")
    _check_shape(folder, meta, shape)
    try:
        device: Accelerator | None = accelerator(str(meta["hardware"]))
    except BadHardware:
        device = None
    reader = _Reader(folder / f"tp{tensor_parallel_size}", meta, device, shape, tensor_parallel_size, [])
    dense, per_sequence = reader.by_layer("dense"), reader.by_layer("per_sequence")
    wanted = ["layernorm", "qkv_proj", "rotary_emb", "o_proj", *ONCE]
    wanted += ["gate_up_proj", "act_fn", "down_proj"] if shape.experts is None else []
    wanted += ["qk_norm"] if shape.qk_norm else []
    missing = [name for name in wanted if name not in dense] + [name for name in SAMPLED if name not in per_sequence]
    if missing:
        raise BadTable(str(reader.folder), f"no {', '.join(missing)}", "all layers of the model", "profile them")
    prefill, decode, mixed = reader.attention()
    return EngineProfile(
        folder=folder,
        accelerator=device,
        meta=meta,
        tensor_parallel_size=tensor_parallel_size,
        dense=dense,
        per_sequence=per_sequence,
        prefill=prefill,
        decode=decode,
        mixed=mixed,
        experts=reader.experts() if shape.experts else None,
        skew=reader.skew(decode),
        findings=tuple(reader.findings),
    )


def _check_shape(folder: Path, meta: Mapping[str, Any], shape: ModelShape) -> None:
    """Raises: BadTable: the sizes in meta.yaml, those of a rank of the most that were profiled, are another model's."""
    sizes = (meta.get("engine_effective") or {}).get("hf_overrides") or {}
    ranks = max(meta.get("tp_degrees") or [1])
    for size, mine in (("num_attention_heads", shape.num_heads), ("vocab_size", shape.vocab_size)):
        if size in sizes and not 0 <= sizes[size] * ranks - mine < ranks:
            todo = "name the profile of this model"
            raise BadTable(f"{folder}: {size} of {meta['model']}", sizes[size] * ranks, str(mine), todo)


def _meta(path: Path) -> dict[str, Any]:
    try:
        meta = yaml.safe_load(path.read_text())
        missing = [key for key in ("model", "hardware", "variant", "vllm_version") if key not in meta]
    except (OSError, yaml.YAMLError, TypeError) as error:
        raise BadTable(str(path), error, "a profile's meta.yaml", "name the folder of a profile") from None
    if missing:
        raise BadTable(str(path), f"no {', '.join(missing)}", "a profile's meta.yaml", "profile it again")
    return dict(meta)


@dataclass(frozen=True)
class _Reader:
    folder: Path
    meta: Mapping[str, Any]
    device: Accelerator | None
    shape: ModelShape
    tensor_parallel_size: int
    findings: list[Finding]

    def frame(self, name: str, columns: Sequence[str]) -> pd.DataFrame | None:
        """A file's rows; None: there is no file.

        Raises: BadTable: no table, other columns, no rows, no number where one belongs, or a time that is not above 0.
        """
        path = next((p for p in (self.folder / f"{name}.csv", self.folder / f"{name}.parquet") if p.exists()), None)
        if path is None:
            return None
        frame = read_frame(path)
        missing = [column for column in columns if column not in frame]
        if missing:
            raise BadTable(str(path), f"no {', '.join(missing)}", ", ".join(columns), "profile it again")
        if frame.empty:
            raise BadTable(str(path), "no rows", "a row for each operator that was timed", "profile it again")
        frame = with_numbers(path, frame, [column for column in columns if column != "layer"], 0)
        if "time_us" in columns and not (frame["time_us"] > 0).all():
            row = int(np.flatnonzero(frame["time_us"] == 0)[0])
            raise BadTable(f"{path}:{row + 2}", "time_us 0", "microseconds above 0", "profile it again")
        return frame

    def needed(self, name: str) -> pd.DataFrame:
        columns = (*_AXES[name], "time_us", *(["layer"] if name in ("dense", "per_sequence") else []))
        frame = self.frame(name, columns)
        if frame is None:
            raise BadTable(str(self.folder), f"no {name}.csv or {name}.parquet", "both kinds of file", "profile it")
        return frame

    @property
    def known(self) -> Accelerator | None:
        """The device, where its peaks are known."""
        return self.device if self.device is not None and self.device.peak_bytes_per_s else None

    @property
    def bytes_per_s(self) -> float:
        """Of device memory; where that is not known, a figure that bounds nothing."""
        return self.known.peak_bytes_per_s if self.known else _SHAPE_ONLY[1]

    def flops_per_s(self, dtype: str | None) -> float:
        """Peak of the fastest arithmetic on numbers so stored, of any at all where that is not known.

        Raises: BadHardware: the accelerator has no rate.
        """
        if self.known is None:
            return _SHAPE_ONLY[0]
        bf16, rates = self.known.flops_per_s("bf16"), self.known.peak_flops_per_s
        if dtype in _UNQUANTIZED:
            return bf16
        return max(bf16, rates.get("fp8", 0.0)) if dtype == "fp8" else max(rates.values())

    def table(self, operator: str, frame: pd.DataFrame, axes: Sequence[str], bound_s: Bound) -> OperatorTable:
        frame = frame.groupby(list(axes))["time_us"].median().reset_index()
        points, seconds = frame[list(axes)].to_numpy(np.float64), frame.time_us.to_numpy(np.float64) * 1e-6
        least = bound_s(points)
        file = str(self.folder.relative_to(self.folder.parents[3]))
        unit = other_unit(seconds, least) if self.known and least.max() > _SAYS_UNIT_S else None
        if unit:
            todo = "correct the unit, or leave the profile out"
            raise BadTable(f"{file}: {operator}", unit, "microseconds", todo)
        for rows, reason in (
            (seconds < least, "faster than the device's memory or arithmetic, as from a cache: raised to the bound"),
            (drops(frame, axes, "time_us"), "less than half the time of the next smaller operator"),
        ):
            if rows.any():
                example = ", ".join(f"{k} {v:g}" for k, v in frame[rows].iloc[0].items())
                self.findings.append(Finding(file, operator, False, reason, int(rows.sum()), len(frame), example))
        origin = Origin(str(self.meta["hardware"]), "vLLM", str(self.meta["vllm_version"]), file)
        return OperatorTable(operator, {}, tuple(axes), points, np.maximum(seconds, least), bound_s, origin)

    def by_layer(self, name: str) -> dict[str, OperatorTable]:
        sizes = {x.name: float(x.out_features * x.in_features) for x in linears(self.shape, self.tensor_parallel_size)}
        dtype, bytes_per_s = _precisions(self.meta)[0], self.bytes_per_s
        flops_per_s, weight_bytes = self.flops_per_s(dtype), _bytes(dtype, 0.5)

        def bound(elements: float) -> Bound:
            if elements == 0.0:  # what is between two matrices may stay in the cache
                return lambda points: np.full(len(points), 1e-9)
            read_s = weight_bytes * elements / bytes_per_s
            return lambda points: np.maximum(2.0 * points[:, 0] * elements / flops_per_s, read_s)

        return {
            str(layer): self.table(str(layer), rows, _AXES[name], bound(sizes.get(_MATRICES.get(str(layer), ""), 0.0)))
            for layer, rows in self.needed(name).groupby("layer")
        }

    def attention(self) -> tuple[OperatorTable, OperatorTable, OperatorTable]:
        frame = self.needed("attention")
        chunk, rows = _AXES["attention"][0], _AXES["attention"][2]
        kinds = [
            ("prefill attention", (frame[chunk] > 0) & (frame[rows] == 0), (0, 1)),
            ("decode attention", (frame[chunk] == 0) & (frame[rows] > 0), (2, 3)),
            ("mixed attention", (frame[chunk] > 0) & (frame[rows] > 0), (0, 1, 2, 3)),
        ]
        missing = [name for name, of, _ in kinds if not of.any()]
        if missing:
            where, allowed = f"{self.folder}: attention", "rows of prefill, of decode and of both at once (mixed)"
            raise BadTable(where, f"no {', '.join(missing)}", allowed, "profile them")
        prefill, decode, mixed = (
            self.table(name, frame[of], [_AXES["attention"][i] for i in axes], self._attention_bound(axes))
            for name, of, axes in kinds
        )
        return prefill, decode, mixed

    def _attention_bound(self, axes: Sequence[int]) -> Bound:
        shape, tp = self.shape, self.tensor_parallel_size
        dtype, bytes_per_s = _precisions(self.meta)[1], self.bytes_per_s
        flops_per_s = self.flops_per_s(dtype)
        per_pair = 4.0 * (shape.num_heads // tp) * shape.head_dim
        per_token = 2.0 * _bytes(dtype, 1.0) * max(1, shape.num_kv_heads // tp) * shape.head_dim

        def bound_s(points: Floats) -> Floats:
            four = np.zeros((len(points), 4))
            four[:, list(axes)] = points
            chunk, cached, rows, context = four.T
            pairs = chunk * (cached + chunk / 2) + rows * context
            read = cached + chunk + rows * context
            return np.asarray(np.maximum(per_pair * pairs / flops_per_s, per_token * read / bytes_per_s))

        return bound_s

    def experts(self) -> OperatorTable:
        experts = self.shape.experts
        assert experts is not None
        size = 3.0 * self.shape.hidden_size * experts.intermediate_size / self.tensor_parallel_size
        chosen = float(experts.experts_per_token)
        dtype, bytes_per_s = _precisions(self.meta)[0], self.bytes_per_s
        flops_per_s, weight_bytes = self.flops_per_s(dtype), _bytes(dtype, 0.5)

        def bound_s(points: Floats) -> Floats:
            tokens, active = points.T
            read_s = weight_bytes * active * size / bytes_per_s
            return np.asarray(np.maximum(2.0 * tokens * chosen * size / flops_per_s, read_s))

        return self.table("experts", self.needed("moe"), _AXES["moe"], bound_s)

    def skew(self, decode: OperatorTable) -> Skew | None:
        """Shares of the way from the time at the mean context to that at the longest, by least squares."""
        columns = ("n", "nb", "pc", "kp", "kvs", "kv_big", "kv_mean", "t_mean_us", "t_max_us", "t_skew_us")
        frame = self.frame("skew", columns)
        if frame is None:
            return None
        pure = frame[frame.pc == 0]
        unit = float(np.median(pure.t_mean_us * 1e-6 / decode.lookup(pure[["n", "kv_mean"]].to_numpy(np.float64))))
        if not 1 / _SAME_UNIT < unit < _SAME_UNIT:
            reason = (
                "times are a multiple of those in the attention table (shares of them are used, which are free of it)"
            )
            file = str(self.folder.relative_to(self.folder.parents[3]))
            self.findings.append(Finding(file, "skew", False, reason, len(frame), len(frame), f"{unit:.2f} times"))
        frame = frame[frame.t_max_us > frame.t_mean_us].assign(
            way=lambda f: f.t_max_us - f.t_mean_us, more=lambda f: f.t_skew_us - f.t_mean_us, part=lambda f: f.nb / f.n
        )
        prompt, longest = np.unique(frame.pc).astype(np.float64), np.unique(frame.kv_big).astype(np.float64)
        rows = np.unique(frame.n).astype(np.float64)
        share = np.full((len(prompt), len(rows), len(longest), len(_SPREAD)), np.nan)
        sums = frame.assign(up=frame.more * frame.way, down=frame.way**2)
        sums = sums.groupby(["pc", "n", "kv_big", "part"])[["up", "down"]].sum().reset_index()
        of_cell = ["pc", "n", "kv_big"]
        cells = sums[of_cell].to_numpy(np.float64)
        for cell in np.unique(cells, axis=0):
            group = sums[(cells == cell).all(axis=1)]
            at = tuple(int(np.searchsorted(axis, v)) for axis, v in zip((prompt, rows, longest), cell, strict=True))
            up, down = group.up.to_numpy(np.float64), group.down.to_numpy(np.float64)
            share[at] = np.interp(np.log(_SPREAD), np.log(group.part.to_numpy(np.float64)), up / down)
        return Skew(prompt, rows, longest, _SPREAD, _filled(share))


def _filled(share: Floats) -> Floats:
    """Cells that were not measured take those of the nearest length, else of the nearest smaller number of rows."""
    for axis in (2, 1):
        for step in (1, -1):
            moved = np.moveaxis(share, axis, 0)[::step]
            for i in range(1, len(moved)):
                moved[i] = np.where(np.isnan(moved[i]), moved[i - 1], moved[i])
    return share
