"""What a study found, how it is kept, and how it reads when it stopped early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..profiler.prices import Price
from ..traces.metrics import Metric, Target
from .capacity import TOLERANCE
from .finalists import Correction, corrected
from .front import Evaluation, Front, pareto
from .store import Ledger, NoSuchStudy

if TYPE_CHECKING:
    import pandas as pd


class Interrupted(Exception):
    """A study that was stopped and can go on: its name, and how many trials are kept where."""

    exit_code: ClassVar[int] = 75

    def __init__(self, study: str, kept: int, where: str) -> None:
        super().__init__(study, kept, where)
        self.study, self.kept, self.where = study, kept, where

    def __str__(self) -> str:
        if not self.where:
            return f"study {self.study!r}: interrupted; without a ledger nothing is kept"
        return (
            f"study {self.study!r}: interrupted; its {self.kept} finished trials are kept in {self.where}; "
            "type the same command again to go on"
        )


@dataclass(frozen=True)
class Progress:
    """How far a study is. stage: "screen", "simulate", "sharpen", "refine" or "measure"."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Screened:
    """The space, counted.

    points    of the space, valid or not
    invalid   reason -> points that are no valid deployment
    dropped   reason -> candidates that the analytic screen left out
    simulated candidates (the default is one of them); failed: of these, those that could not be simulated
    measured  finalists; measurements_failed: of these, those that gave nothing
    """

    points: int
    invalid: Mapping[str, int]
    dropped: Mapping[str, int]
    simulated: int = 0
    failed: int = 0
    measured: int = 0
    measurements_failed: int = 0


@dataclass(frozen=True)
class Study:
    """What a study found.

    front            of all evaluations, measured values where there are some; intervals on its points
    default          trial 0 at its highest fidelity (without targets: at its highest load)
    finalists        the measured ones, in the order they were chosen
    corrections      measured over simulated, by metric; empty where fewer than three were measured
    sampler          how candidates were proposed
    measured_steps   False: step times are bounds of a data sheet
    relative_error   90 % half width of the default's step times
    not_modeled     what predictions leave out, in words
    price            of one device of the default, with source and date; None: a ledger of before they were kept
    complete         False: a time budget ended it, or it was interrupted
    trace_notes      what reading the log left out or changed; of a study that a ledger gives back, empty
    """

    name: str
    seed: int
    targets: tuple[Target, ...]
    front: Front
    default: Evaluation
    finalists: tuple[Evaluation, ...]
    corrections: tuple[Correction, ...]
    screened: Screened
    sampler: str
    measured_steps: bool
    relative_error: float
    not_modeled: tuple[str, ...]
    price: Price | None
    complete: bool
    trace_notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data: all but the evaluations that only were simulated, which the ledger has trial by trial."""
        special = {id(each): each for each in (*self.front.points, *self.finalists, self.default)}
        for each in self.front.evaluations:
            if each.intervals or each.capacity_tolerance <= TOLERANCE * (1 + 1e-6):
                special.setdefault(id(each), each)
        return {
            "seed": self.seed,
            "targets": [str(target) for target in self.targets],
            "metric": str(self.front.metric),
            "percentile": self.front.percentile,
            "cost": self.front.cost,
            "refined": [each.to_dict() for each in special.values()],
            "finalists": [each.candidate for each in self.finalists],
            "corrections": [asdict(each) for each in self.corrections],
            "screened": asdict(self.screened),
            "sampler": self.sampler,
            "measured_steps": self.measured_steps,
            "relative_error": self.relative_error,
            "not_modeled": list(self.not_modeled),
            "price": None if self.price is None else asdict(self.price),
            "complete": self.complete,
        }

    def to_pandas(self) -> pd.DataFrame:
        """The front's frame, one row an evaluation; the rest of the study stands in `attrs["paretune"]`, too."""
        frame = self.front.to_pandas()
        about = {key: value for key, value in self.to_dict().items() if key != "refined"}
        frame.attrs["paretune"] |= {"study": self.name, **about}
        return frame

    @classmethod
    def from_pandas(cls, frame: pd.DataFrame) -> Study:
        """What `to_pandas` made; of rows that were taken out of it, trial 0 may not be one."""
        about = frame.attrs["paretune"]
        return _study(about["study"], Front.from_pandas(frame), about)


def default_of(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Trial 0 at its highest fidelity; without targets, at its highest load."""
    own = [each for each in evaluations if each.trial == 0]
    return max(own, key=lambda each: (each.load, each.fidelity == "measured"))


def load_study(ledger: Ledger, name: str) -> Study:
    """A study as the ledger keeps it; one that was interrupted with what it has. Raises: NoSuchStudy, LedgerError."""
    row = ledger.study(name)
    records = ledger.records(name)
    settings, result = row.settings, row.result or {}
    if not records:
        raise NoSuchStudy(f"study {name!r} in {ledger.where}", "no finished trial", "at least one", "go on tuning it")
    targets = tuple(Target.parse(text) for text in settings["targets"])
    corrections = tuple(Correction(**each) for each in result.get("corrections", ()))
    refined = [Evaluation.from_dict(each) for each in result.get("refined", ())]
    better = {(each.candidate, each.load, each.fidelity): each for each in refined}
    evaluations = []
    for record in records:
        for each in record.evaluations:
            key = (each.candidate, each.load, each.fidelity)
            evaluations.append(better.get(key) or corrected(each, corrections, targets))
    front = pareto(evaluations, Metric.parse(settings["metric"]), settings["percentile"], settings["cost"])
    begun = {"screened": asdict(Screened(0, {}, {}, len(records))), "price": (row.about or {}).get("price")}
    return _study(name, front, {**begun, **settings, **result})


def _study(name: str, front: Front, known: Mapping[str, Any]) -> Study:
    """A study from its front and what `Study.to_dict` says of the rest; of one that was interrupted less is known."""
    measured = [each for each in front.evaluations if each.fidelity == "measured"]
    order = {candidate: place for place, candidate in enumerate(known.get("finalists", ()))}
    return Study(
        name=name,
        seed=known["seed"],
        targets=tuple(Target.parse(text) for text in known["targets"]),
        front=front,
        default=default_of(front.evaluations),
        finalists=tuple(sorted(measured, key=lambda each: order.get(each.candidate, len(order)))),
        corrections=tuple(Correction(**each) for each in known.get("corrections", ())),
        screened=Screened(**known["screened"]),
        sampler=known.get("sampler", ""),
        measured_steps=known.get("measured_steps", False),
        relative_error=known.get("relative_error", 0.0),
        not_modeled=tuple(known.get("not_modeled", ())),
        price=None if known.get("price") is None else Price(**known["price"]),
        complete=known.get("complete", False),
    )
