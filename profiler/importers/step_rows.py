"""Whole steps as a plain table, a row for each composition: the form that step times are exported in, and read back.

Columns (CSV or Parquet), in this order:

    model                   as it was called where it was measured
    parameters              of the layers, that each token is multiplied with (of experts those that are chosen; without
                            embedding and vocabulary projection): which model it is, and what bounds its steps
    accelerator             in the catalog's words, or the processor
    tensor_parallel_size    and num_threads, replicas, pipeline_parallel_size, context_parallel_size,
                            enable_expert_parallel: as in a deployment's pool; num_threads of "cpu" alone
    weight_dtype, kv_cache_dtype
    num_tokens, num_rows, num_samples, decode_context, prefill_pairs
                            what stands in the step (profiler/composition.py)
    median_s, iqr_s         seconds of the step, and between the quartiles
    count                   steps measured
    source                  where it comes from, for people
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ...kernels.weight_formats import WEIGHT_FORMATS
from ...runtime.model_shape import ModelShape
from ...runtime.quantization import Storage
from ...traces.whole_file import write_whole
from ..hardware import Accelerator
from ..operator_tables import BadTable
from ..operators import linears
from ..profile import Profile, StepPoint
from ..roofline import arithmetic_of
from .checks import Finding, faster_than_physics, other_unit

Floats = NDArray[np.float64]

_COUNTS = (
    "parameters", "tensor_parallel_size", "num_threads", "replicas", "pipeline_parallel_size", "context_parallel_size",
)  # fmt: skip


@dataclass(frozen=True)
class StepsOf:
    """What a group of rows was measured on: all of a row but the step itself."""

    model: str
    parameters: int
    accelerator: str
    tensor_parallel_size: int = 1
    num_threads: int = 1
    replicas: int = 1
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    enable_expert_parallel: bool = False
    weight_dtype: str = "bf16"
    kv_cache_dtype: str = "bf16"
    source: str = ""

    def __str__(self) -> str:
        ranks = f"TP {self.tensor_parallel_size}"
        for name, size in (("PP", self.pipeline_parallel_size), ("CP", self.context_parallel_size)):
            ranks += f" x {name} {size}" if size > 1 else ""
        ranks += " + EP" if self.enable_expert_parallel else ""
        many = f"{self.replicas} x " if self.replicas > 1 else ""
        threads = f" x {self.num_threads} threads" if self.num_threads > 1 else ""
        return f"{self.model} on {many}{self.accelerator} {ranks}{threads} {self.weight_dtype}/{self.kv_cache_dtype}"


@dataclass(frozen=True)
class StepRows:
    """Measured whole steps of one model, device and sharding."""

    of: StepsOf
    points: tuple[StepPoint, ...]


_OF = tuple(each.name for each in fields(StepsOf) if each.name != "source")
_POINT = tuple(StepPoint.model_fields)
COLUMNS = (*_OF, *_POINT, "source")


def layer_parameters(shape: ModelShape) -> int:
    """What the column `parameters` holds of a model."""
    layers = (each for each in linears(shape, 1) if each.name != "head")
    return sum(round(each.out_features * each.in_features * each.count * each.chosen) for each in layers)


def of_profile(profile: Profile, shape: ModelShape) -> tuple[StepRows, ...]:
    """The whole steps of a profile of this runtime, by configuration.

    Raises: BadProfile: the shape is of another model.
    """
    profile.check_shape(shape)
    parameters = layer_parameters(shape)
    return tuple(
        StepRows(
            StepsOf(
                model=profile.model,
                parameters=parameters,
                accelerator=profile.machine.cpu,
                source=f"paretune profile {profile.digest()}, {profile.created_at}",
                **{name: getattr(each, name) for name in each.key._fields},
            ),
            each.steps,
        )
        for each in profile.configurations
    )


def write_steps(path: Path, tables: Iterable[StepRows]) -> int:
    """Writes CSV, or Parquet where the name says so, whole or not at all; returns the number of rows."""
    rows = [{**asdict(table.of), **point.model_dump()} for table in tables for point in table.points]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    if path.suffix == ".parquet":
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False)
        write_whole(path, buffer.getvalue())
    else:
        write_whole(path, frame.to_csv(index=False))
    return len(frame)


def read_steps(path: Path, frame: pd.DataFrame) -> tuple[StepRows, ...]:
    """Rows of a table of these columns, by what they were measured on; nothing is checked but the form.

    Raises: BadTable: a column that is missing, or a value that is no number of its kind.
    """
    missing = [column for column in COLUMNS if column not in frame]
    if missing:
        raise BadTable(str(path), f"no {', '.join(missing)}", ", ".join(COLUMNS), "export it again")
    found: dict[StepsOf, list[StepPoint]] = {}
    for number, row in enumerate(frame[list(COLUMNS)].to_dict("records"), start=2):
        try:
            point = StepPoint.model_validate({name: row[name] for name in _POINT})
            of = _of_row({name: _plain(row[name]) for name in (*_OF, "source")})
        except (ValueError, TypeError) as error:
            said = str(error).splitlines()
            raise BadTable(f"{path.name}:{number}", "; ".join(said[1:3]) or said[0], "numbers", "correct it") from None
        found.setdefault(of, []).append(point)
    return tuple(StepRows(of, tuple(points)) for of, points in found.items())


def _plain(value: Any) -> Any:
    """A Python value; a cell that is empty as no text."""
    if isinstance(value, float) and np.isnan(value):
        return ""
    return value.item() if isinstance(value, np.generic) else value


def _of_row(row: dict[str, Any]) -> StepsOf:
    """Raises: ValueError: a value that a column cannot have."""
    counts = {}
    for name in _COUNTS:
        value = row[name]  # another program may have written whole numbers as floats
        if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer() or value < 1:
            raise ValueError(f"{name}: {value!r}, not a whole number of at least 1")
        counts[name] = int(value)
    if not isinstance(expert_parallel := row["enable_expert_parallel"], bool):
        raise ValueError(f"enable_expert_parallel: {expert_parallel!r}, not true or false")
    if row["weight_dtype"] not in WEIGHT_FORMATS:
        raise ValueError(f"weight_dtype: {row['weight_dtype']!r}, not one of {', '.join(WEIGHT_FORMATS)}")
    return StepsOf(**{**row, **counts})


def bound_s(of: StepsOf, points: Sequence[StepPoint], device: Accelerator) -> Floats:
    """The least that each step may take by its parameters alone: two operations for each and token, and each read once.

    Attention, the cache, the vocabulary and what ranks say to each other only add to it; so do the scales of groups,
    which other engines have for more weights or fewer. A precision without a rate of its own is multiplied in bf16.
    """
    ranks = of.tensor_parallel_size * of.pipeline_parallel_size * of.context_parallel_size
    arithmetic = arithmetic_of("layers", Storage.bundled(of.weight_dtype), device)
    rate = device.flops_per_s(arithmetic if arithmetic in device.peak_flops_per_s else "bf16")
    tokens = np.array([point.num_tokens for point in points], np.float64)
    flops = 2.0 * of.parameters * tokens / ranks
    weight_bytes = WEIGHT_FORMATS[of.weight_dtype].bits / 8
    read = weight_bytes * of.parameters / (of.tensor_parallel_size * of.pipeline_parallel_size)
    return np.maximum(flops / rate, read / device.peak_bytes_per_s)


def checked(
    file: str, table: StepRows, device: Accelerator | None, findings: list[Finding], examples: Sequence[str] = ()
) -> StepRows | None:
    """The rows that can be true; None where none can. What is refused or odd goes to `findings`.

    Args:
        device: None: the catalog knows none of this name, so nothing is compared with its peaks.
        examples: how the file calls each point; without them its composition.
    Raises: BadTable: all times as if in another unit.
    """
    points = table.points
    names = examples or [
        f"{p.num_tokens} tokens, {p.num_rows} rows, context {p.decode_context:g}, pairs {p.prefill_pairs:g}"
        for p in points
    ]
    seconds = np.array([point.median_s for point in points])

    def note(which: NDArray[np.bool_], refused: bool, reason: str) -> None:
        if which.any():
            first = int(np.flatnonzero(which)[0])
            example = f"{names[first]}: {seconds[first] * 1e3:.2f} ms"
            findings.append(Finding(file, str(table.of), refused, reason, int(which.sum()), len(points), example))

    fast = np.zeros(len(points), np.bool_)
    if device is not None:
        least = bound_s(table.of, points, device)
        unit = other_unit(seconds, least)
        if unit:
            raise BadTable(f"{file}: {table.of}", unit, "times in its unit", "correct the unit, or leave it out")
        fast = faster_than_physics(seconds, least)
        note(fast, True, "faster than peak FLOP/s or memory bandwidth allow")
    odd = contained(points, seconds) & ~fast
    note(odd, False, "less than half the time of a step that it contains")
    kept = tuple(point for point, out in zip(points, fast) if not out)
    return StepRows(table.of, kept) if kept else None


def contained(points: Sequence[StepPoint], seconds: Floats) -> NDArray[np.bool_]:
    """Steps that take less than half of what a step took that has no more of anything."""
    parts = np.array([[p.num_tokens, p.num_rows, p.num_samples, p.decode_context, p.prefill_pairs] for p in points])
    found = np.zeros(len(points), np.bool_)
    for place in range(len(points)):
        within = (parts <= parts[place]).all(axis=1)
        found[place] = seconds[place] < 0.5 * seconds[within].max()
    return found
