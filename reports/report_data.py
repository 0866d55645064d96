"""Everything that a report says, as one frozen value; the caller gathers it, the rooms here only read it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..optimizer.front import Evaluation, Front
from ..traces.describe import Statistics
from ..traces.metrics import Summary, Target


@dataclass(frozen=True)
class Measured:
    """A deployment on the live server, the trace replayed against it.

    summary                  of the replay at the recorded rate
    usd_per_million_tokens   at the measured capacity; NaN where capacity was not measured
    """

    summary: Summary
    usd_per_million_tokens: float = math.nan


@dataclass(frozen=True)
class TileGain:
    """What the tile search brought one operator.

    operator            with its threads, where there are several
    rows                of a step, at most
    default_s, tuned_s  one pass over all weights of the model, seconds
    tile                backend and parameters
    """

    operator: str
    precision: str
    rows: int
    default_s: float
    tuned_s: float
    tile: str


@dataclass(frozen=True)
class ReportData:
    """All that a report says; nothing in it is looked up elsewhere.

    study             its name
    created_at        of the report, ISO 8601, UTC
    statistics        of the trace that was tuned for
    front             the curve
    chosen, default   the pick, and what would run without it
    targets           what had to hold
    profile           name of the profile and its machine, or the accelerator's data sheet
    profile_measured  False: step times are estimated from a data sheet or single operators, not measured
    prices, prices_as_of   source and date of the price book
    bill              winners by price sheet, energy and token prices, one sentence each
    search            how the curve was found, one sentence each
    not_modeled      what the step-time model and simulator leave out, one sentence each
    chosen_measured, default_measured   from `verify`; None where that was not run
    tile_gains        what the tile search brought; empty where it was not run
    commands          that reproduce the report, one a line
    provenance        (what, value) pairs: versions, digests, seeds
    """

    study: str
    created_at: str
    statistics: Statistics
    front: Front
    chosen: Evaluation
    default: Evaluation
    targets: tuple[Target, ...]
    profile: str
    profile_measured: bool
    prices: str
    prices_as_of: str
    bill: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    not_modeled: tuple[str, ...] = ()
    chosen_measured: Measured | None = None
    default_measured: Measured | None = None
    tile_gains: tuple[TileGain, ...] = ()
    commands: tuple[str, ...] = ()
    provenance: tuple[tuple[str, str], ...] = ()


def is_same(one: Evaluation, other: Evaluation) -> bool:
    """Whether two evaluations are of one deployment under one load, at whatever fidelity."""
    return one.load == other.load and one.deployment.digest() == other.deployment.digest()
