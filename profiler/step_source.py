"""What takes the place of an accelerator's data sheet: tables that others measured, of operators, layers or steps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from ..runtime.model_shape import ModelShape
from ..runtime.spec import Pool
from .engine_tables import engine_step
from .hardware import Accelerator, BadHardware
from .importers import aiconfigurator, vidur
from .importers.kinds import AICONFIGURATOR, LLMSERVINGSIM, VIDUR, kind_of, read_step_table
from .importers.llmservingsim import EngineProfile, find_profile, read_profile
from .importers.step_rows import StepRows
from .operator_source import OperatorSource
from .operator_tables import BadTable
from .roofline import check_kv_blocks
from .step_time import ModeledStep
from .table_choice import TableChoice
from .tables import step_tables, with_adapters, with_block_copies
from .vidur_step import vidur_step
from .whole_steps import whole_step

_USUAL_ENGINE = "vllm"  # of aiconfigurator's tables
_HALF = {"bf16", "fp16"}  # as wide and as fast as each other


class StepSource(Protocol):
    """Step times of one accelerator.

    name          for people
    measured      whole steps or layers of an engine were; False: inferred from single operators
    unexplained   why `explain` cannot take its steps apart; empty: it can
    """

    @property
    def name(self) -> str: ...
    @property
    def measured(self) -> bool: ...
    @property
    def unexplained(self) -> str: ...
    def modeled(self, shape: ModelShape, pool: Pool) -> ModeledStep:
        """Step times of a pool. Raises: BadTable, BadHardware, BadProfile: what was not measured."""
        ...

    def files(self) -> Iterable[Path]:
        """All that its times come from."""
        ...


def open_tables(choice: TableChoice, device: Accelerator) -> StepSource | None:
    """What was chosen, opened; None: nothing was, so the data sheet it is.

    Raises: BadTable: several, or none of the accelerator, or an engine or version of what has none; BadHardware: tables
        for "cpu"; OSError.
    """
    given = choice.given
    if len(given) > 1:
        raise BadTable("step times of an accelerator", " and ".join(given), "one of them", "leave out the others")
    if given and not device.peak_bytes_per_s:
        todo = "name one: its data sheet is what they take the place of"
        raise BadHardware(next(iter(given)), device.name, "an accelerator of the catalog", todo)
    if choice.operator_tables is None:
        _check_of_no_engine(choice, " and ".join(given) or "no operator tables")
    if choice.layer_times is not None:
        return LayerTimes(find_profile(Path(choice.layer_times)))
    if choice.step_times is not None:
        path = Path(choice.step_times)
        return StepTimes(path, read_step_table(path)[0], device)
    if choice.operator_tables is None:
        return None
    kind = kind_of(choice.operator_tables)
    if kind == VIDUR:
        _check_of_no_engine(choice, "Vidur's tables")
        return VidurTimes(vidur.read_tables(Path(choice.operator_tables), device.name))
    if kind == AICONFIGURATOR:
        return _operator_times(choice.operator_tables, device, choice.engine or _USUAL_ENGINE, choice.engine_version)
    instead = "layer times" if kind == LLMSERVINGSIM else "step times"
    raise BadTable(choice.operator_tables, kind, "tables of aiconfigurator or Vidur", f"give it as {instead}")


def _check_of_no_engine(choice: TableChoice, what: str) -> None:
    """Raises: BadTable: an engine or version was named, and what is read has none to choose."""
    for option, value in (("tables-engine", choice.engine), ("tables-version", choice.engine_version)):
        if value is not None:
            todo = "give --operator-tables of aiconfigurator's, or leave it out"
            raise BadTable(option, value, f"none with {what}", todo)


def digest_of(source: StepSource) -> str:
    """Hex digits that name the content of all files of a source."""
    found = hashlib.sha256(source.name.encode())
    for path in sorted(source.files()):
        found.update(path.name.encode())
        found.update(path.read_bytes())
    return found.hexdigest()


@dataclass(frozen=True)
class LayerTimes:
    """Layers of an engine, timed one by one (importers/llmservingsim.py)."""

    folder: Path
    measured: bool = field(default=True, init=False)
    unexplained: str = field(
        default="steps of layer times depend on the batch as a whole, so no part of them is one request's", init=False
    )

    @property
    def name(self) -> str:
        return f"layer times of {self.folder.name}"

    def modeled(self, shape: ModelShape, pool: Pool) -> ModeledStep:
        _check_plain(pool, self.name)
        profile = _engine_profile(self.folder, shape, pool.tensor_parallel_size)
        device = profile.accelerator
        if device is None or device.name != pool.accelerator:
            measured = device.name if device else f"{profile.meta['hardware']}, which is not in the catalog"
            raise BadHardware("pool.accelerator", pool.accelerator, measured, "give the tables of the pool's")
        profiled = {"weight_dtype": profile.weight_dtype, "kv_cache_dtype": profile.kv_cache_dtype}
        for field_name, dtype in profiled.items():
            asked = getattr(pool, field_name)
            if dtype not in (None, asked) and not {dtype, asked} <= _HALF:
                raise BadHardware(f"pool.{field_name}", asked, f"{dtype}, which was profiled", "choose it")
        if pool.host_kv_blocks:
            raise BadHardware("pool.host_kv_blocks", pool.host_kv_blocks, f"0 with {self.name}", "leave it out")
        check_kv_blocks(device, shape, pool)
        step = engine_step(profile, shape, pool)
        if None not in profiled.values():
            return step
        note = f"the precision of variant {profile.meta['variant']} is not known, times are taken as of the pool's"
        return replace(step, not_modeled=(*step.not_modeled, note))

    def files(self) -> Iterable[Path]:
        return (path for path in self.folder.rglob("*") if path.is_file())


@lru_cache(maxsize=16)
def _engine_profile(folder: Path, shape: ModelShape, ranks: int) -> EngineProfile:
    return read_profile(folder, shape, ranks)


@dataclass(frozen=True)
class OperatorTimes:
    """Sums of single operators (importers/aiconfigurator.py)."""

    source: OperatorSource
    measured: bool = field(default=False, init=False)
    unexplained: str = field(default="", init=False)

    @property
    def name(self) -> str:
        tables = self.source.tables
        return f"operator tables of {tables.system} with {tables.engine}"

    def modeled(self, shape: ModelShape, pool: Pool) -> ModeledStep:
        return step_tables(self.source, shape, pool)

    def files(self) -> Iterable[Path]:
        for tables in (self.source.tables, *self.source.beside):
            yield from (path for path, _ in tables.files.values())


@dataclass(frozen=True)
class VidurTimes:
    """Sums of single operators (importers/vidur.py)."""

    tables: vidur.VidurTables
    measured: bool = field(default=False, init=False)
    unexplained: str = field(default="", init=False)

    @property
    def name(self) -> str:
        return f"Vidur's operator tables of {self.tables.device}"

    def modeled(self, shape: ModelShape, pool: Pool) -> ModeledStep:
        _check_plain(pool, self.name)
        found = vidur_step(self.tables, shape, pool)
        assert self.tables.accelerator is not None
        return _with_data_sheet(found, self.tables.accelerator, shape, pool)

    def files(self) -> Iterable[Path]:
        return self.tables.files()


@dataclass(frozen=True)
class StepTimes:
    """Whole steps (importers/step_rows.py)."""

    path: Path
    tables: tuple[StepRows, ...]
    device: Accelerator
    measured: bool = field(default=True, init=False)
    unexplained: str = field(default="", init=False)

    @property
    def name(self) -> str:
        return f"whole steps of {self.path.name}"

    def modeled(self, shape: ModelShape, pool: Pool) -> ModeledStep:
        if pool.speculation != "none":
            raise BadHardware("pool.speculation", pool.speculation, f"none with {self.name}", "leave it out")
        return _with_data_sheet(whole_step(self.tables, shape, pool, self.device), self.device, shape, pool)

    def files(self) -> Iterable[Path]:
        return (self.path,)


def _operator_times(where: str, device: Accelerator, engine: str, version: str | None) -> OperatorTimes:
    folder = aiconfigurator.folder_of(where)
    tables = aiconfigurator.read_tables(folder, device.name, engine, version)
    beside = []
    for other in aiconfigurator.ENGINES:
        if other != engine:
            try:
                beside.append(aiconfigurator.read_tables(folder, device.name, other, families=("gemm",)))
            except BadTable:
                continue  # an engine that was not measured there
    return OperatorTimes(OperatorSource(tables, tuple(beside)))


def _with_data_sheet(found: ModeledStep, device: Accelerator, shape: ModelShape, pool: Pool) -> ModeledStep:
    """What such tables know nothing of, as the data sheet has it: adapters, and blocks on their way to the host."""
    return with_adapters(with_block_copies(found, device, shape, pool), device, shape, pool)


def _check_plain(pool: Pool, name: str) -> None:
    """Raises: BadHardware: what a pool asks for beside tensor parallelism, which these tables know nothing of."""
    plain = {
        "pipeline_parallel_size": 1, "context_parallel_size": 1, "enable_expert_parallel": False, "speculation": "none",
    }  # fmt: skip
    for field_name, value in plain.items():
        if getattr(pool, field_name) != value:
            allowed = f"{value} with {name}"
            raise BadHardware(f"pool.{field_name}", getattr(pool, field_name), allowed, "leave it out")
