"""Which kind of measurements lies somewhere, and all of it read at once: what `paretune profile import` lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...runtime.model_shape import ModelShape
from ..hardware import BadHardware, accelerator
from ..operator_tables import BadTable, OperatorTable
from ..table_choice import INSTALLED
from . import aiconfigurator, llmservingsim, splitwise, step_rows, vidur
from .checks import Finding
from .measured_file import read_frame
from .step_rows import StepRows
from .vidur_folder import devices

AICONFIGURATOR, LLMSERVINGSIM, VIDUR, SPLITWISE, STEPS = (
    "aiconfigurator",
    "llmservingsim",
    "vidur",
    "splitwise",
    "steps",
)
KINDS = (AICONFIGURATOR, LLMSERVINGSIM, VIDUR, SPLITWISE, STEPS)


@dataclass(frozen=True)
class ImportAsk:
    """What an import is to read beside where it lies; each kind takes some of these.

    system    a device, as the folder calls it or as the catalog does
    engine, version  of aiconfigurator's tables
    shape     of the model that LLMServingSim profiled
    """

    system: str | None = None
    engine: str | None = None
    version: str | None = None
    shape: ModelShape | None = None


_OPTIONS = {"system": "--system", "engine": "--engine", "version": "--version", "shape": "--model"}
_TAKES: Mapping[str, tuple[str, ...]] = {
    AICONFIGURATOR: ("system", "engine", "version"),
    LLMSERVINGSIM: ("shape",),
    VIDUR: ("system",),
    SPLITWISE: (),
    STEPS: (),
}


@dataclass(frozen=True)
class Imported:
    """What was read: tables of operators, or whole steps; each row of it can be true.

    versions  by operator, where the tables have some
    not_read  what lies there and is none of what is understood
    """

    kind: str
    findings: Sequence[Finding]
    operators: tuple[OperatorTable, ...] = ()
    steps: tuple[StepRows, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    not_read: tuple[str, ...] = ()

    @property
    def points(self) -> dict[str, int]:
        """How many, by operator, or by what whole steps were measured on."""
        found: dict[str, int] = {}
        for table in self.operators:
            found[table.operator] = found.get(table.operator, 0) + len(table.seconds)
        return found | {str(table.of): len(table.points) for table in self.steps}


def kind_of(where: str) -> str:
    """The kind of measurements at a place, by how it is laid out. Raises: BadTable: none that is known; OSError."""
    path = Path(where)
    if where == INSTALLED or aiconfigurator.systems(path):
        return AICONFIGURATOR
    if (path / "compute").is_dir() or (path / "network").is_dir():
        return VIDUR
    if path.is_dir() and next(path.rglob("meta.yaml"), None) is not None:
        return LLMSERVINGSIM
    if path.is_file():
        columns = set(read_frame(path).columns)
        for kind, needed in ((SPLITWISE, splitwise.COLUMNS), (STEPS, step_rows.COLUMNS)):
            if len(columns & set(needed)) > len(needed) // 2:
                return kind
    allowed = f"{', '.join(KINDS)}, each as its project lays it out"
    found = "nothing there" if not path.exists() else "none of them"
    raise BadTable(where, found, allowed, "name the folder that the project's own files lie in")


def read_step_table(path: Path) -> tuple[tuple[StepRows, ...], list[Finding]]:
    """Whole steps of a file, ours or Splitwise's, that can be true, and what was refused or flagged.

    Raises: BadTable: another kind of file, or rows that are none; OSError.
    """
    kind = kind_of(str(path))
    if kind == SPLITWISE:
        return splitwise.read(path, read_frame(path))
    if kind != STEPS:
        raise BadTable(str(path), kind, "a file of whole steps", "give operators and layers as what they are")
    findings: list[Finding] = []
    kept = []
    for table in step_rows.read_steps(path, read_frame(path)):
        try:
            device = accelerator(table.of.accelerator)
        except BadHardware:
            device = None
        if device is None or not device.peak_bytes_per_s:
            reason = f"{table.of.accelerator} is not in the catalog: not checked against physics"
            many = len(table.points)
            findings.append(Finding(path.name, str(table.of), False, reason, many, many, str(table.of)))
            device = None
        found = step_rows.checked(path.name, table, device, findings)
        if found is not None:
            kept.append(found)
    return tuple(kept), findings


def imported(where: str, kind: str | None, ask: ImportAsk) -> Imported:
    """Everything at a place, read and checked.

    Args:
        kind: what it is said to be; None: what it looks like.
    Raises: BadTable: of another kind, of none, or an option that its kind does not have; OSError.
    """
    found = kind_of(where)
    if kind not in (None, found):
        raise BadTable(where, f"measurements of {found}", str(kind), f"say {found}, or name the other place")
    for name, option in _OPTIONS.items():
        if getattr(ask, name) is not None and name not in _TAKES[found]:
            taken = ", ".join(_OPTIONS[each] for each in _TAKES[found]) or "none of its kind"
            raise BadTable(option, f"given for {found}", taken, "leave it out")
    readers: dict[str, Callable[[str, ImportAsk], Imported]] = {
        AICONFIGURATOR: _aiconfigurator,
        LLMSERVINGSIM: _llmservingsim,
        VIDUR: _vidur,
        SPLITWISE: _steps,
        STEPS: _steps,
    }
    return readers[found](where, ask)


def _aiconfigurator(where: str, ask: ImportAsk) -> Imported:
    folder = aiconfigurator.folder_of(where)
    if ask.system is None or ask.engine is None:
        missing = "--system" if ask.system is None else "--engine"
        known = aiconfigurator.systems(folder) if ask.system is None else aiconfigurator.ENGINES
        raise BadTable(f"{where}: {missing}", "nothing", ", ".join(known), "say which of them to read")
    tables = aiconfigurator.read_tables(folder, ask.system, ask.engine, ask.version)
    operators = tuple(tables.every())
    versions = {stem.removesuffix("_perf"): version for stem, version in tables.versions.items()}
    not_read = tuple(sorted(set(tables.files) - set(aiconfigurator.UNDERSTOOD)))
    return Imported(AICONFIGURATOR, tables.findings, operators, versions=versions, not_read=not_read)


def _vidur(where: str, ask: ImportAsk) -> Imported:
    folder = Path(where)
    operators: list[OperatorTable] = []
    findings: list[Finding] = []
    not_read = []
    for device in devices(folder) if ask.system is None else (ask.system,):
        tables = vidur.read_tables(folder, device)
        own = list(tables.every())
        operators += own
        findings += tables.findings
        if between := tables.between_nodes():
            not_read.append(f"{between:,} rows of collectives of {tables.device} between nodes")
        if tables.accelerator is None:
            not_read.append(f"peaks of {tables.device}, which is not in the catalog: its rows were not checked by them")
        if not any(table.operator == "attn_decode" for table in own):
            not_read.append(f"attention of {tables.device}: not in the folder")
    if not operators:
        allowed = "compute/DEVICE/ORGANIZATION/MODEL/mlp or network/NODE/all_reduce, .csv or .parquet"
        raise BadTable(where, "no table of any device", allowed, "name the folder that they lie in")
    return Imported(VIDUR, findings, tuple(operators), not_read=tuple(not_read))


def _llmservingsim(where: str, ask: ImportAsk) -> Imported:
    folder = llmservingsim.find_profile(Path(where))
    if ask.shape is None:
        raise BadTable(f"{where}: --model", "nothing", "a folder with the config.json of the profiled model", "name it")
    operators: list[OperatorTable] = []
    findings: list[Finding] = []
    for ranks in sorted(int(path.name[2:]) for path in folder.glob("tp*") if path.name[2:].isdigit()):
        profile = llmservingsim.read_profile(folder, ask.shape, ranks)
        operators += [*profile.dense.values(), *profile.per_sequence.values()]
        operators += [profile.prefill, profile.decode, profile.mixed]
        operators += [] if profile.experts is None else [profile.experts]
        findings += profile.findings
    return Imported(LLMSERVINGSIM, findings, tuple(operators))


def _steps(where: str, ask: ImportAsk) -> Imported:
    steps, findings = read_step_table(Path(where))
    return Imported(kind_of(where), findings, steps=steps)
