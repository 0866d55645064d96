"""What a report says, gathered from a study in its ledger and from the live runs that were kept with it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import ClassVar

from .. import __version__
from ..optimizer.bill import bill_of, choice
from ..optimizer.finalists import rate_of
from ..optimizer.front import Evaluation
from ..optimizer.pick import NothingFeasible, knee, pick
from ..optimizer.sources import absolute
from ..optimizer.study import Study
from ..optimizer.tuning import Kept, kept
from ..optimizer.verify import measured_summary
from ..profiler.tile_file import TileFile
from ..runtime.spec import CPU, load_deployment
from ..traces import statistics
from .bill import bill_words
from .changes import short
from .report_data import Measured, ReportData, TileGain, is_same
from .summary import search_words


class BadReport(Exception):
    """A report that was asked for a spec which its study does not know."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:80]}; allowed: {self.allowed}; {self.todo}"


def gather(
    study: str,
    storage: str,
    *,
    spec_path: str | None = None,
    verification_path: str | None = None,
    chosen_measured: Measured | None = None,
    default_measured: Measured | None = None,
    commands: tuple[str, ...] = (),
    quality: str = "",
) -> ReportData:
    """Everything for `write_report`.

    Args:
        spec_path: the spec that was picked; None: the knee of the curve.
        verification_path: what `paretune verify` wrote about that spec.
        chosen_measured, default_measured: from `verify`; None: the study's own measurements, where it made any.
        commands: that led here; None: the ones that would.
        quality: what the pick's precision costs in quality, in words, where it was measured.
    Raises: NoSuchStudy, BadTrace, BadSpec, BadReport (exit code 2), LedgerError (1).
    """
    found = kept(study, storage)
    chosen = knee(found.study.front) if spec_path is None else _picked(found, spec_path)
    verified = None
    if verification_path is not None:
        verified = Measured(measured_summary(verification_path, chosen.deployment))
    price = found.sources.price(chosen.deployment.pool)
    default = found.study.default
    return ReportData(
        study=study,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        statistics=statistics(found.trace),
        front=found.study.front,
        chosen=chosen,
        default=default,
        targets=found.study.targets,
        profile=found.sources.name,
        profile_measured=found.study.measured_steps,
        prices=price.source,
        prices_as_of=price.as_of,
        bill=_bill(found, chosen),
        search=search_words(found.study),
        not_modeled=found.study.not_modeled,
        chosen_measured=chosen_measured or verified or _measured(chosen),
        default_measured=default_measured or _measured(default),
        tile_gains=_tile_gains(found),
        commands=commands or _commands(found, storage, chosen, spec_path),
        provenance=(
            *((("quality", quality),) if quality else ()),
            ("paretune", __version__),
            ("trace", f"{found.trace.source}, {found.trace.digest()[:16]}"),
            ("step times", f"{found.sources.name}, {found.sources.digest}"),
            ("prices", f"{price.source}, as of {price.as_of}"),
            ("study", f"{study}, seed {found.study.seed}, {found.study.sampler}"),
        ),
    )


def _bill(found: Kept, chosen: Evaluation) -> tuple[str, ...]:
    return bill_words(bill_of(found, chosen, choice(found.study.targets)), lambda each: short(each.deployment.pool))


def _picked(found: Kept, spec_path: str) -> Evaluation:
    """The study's best-known evaluation of what a spec runs, under the load that its predictions speak of."""
    spec = load_deployment(spec_path)
    same = [each for each in found.study.front.evaluations if each.deployment.digest() == spec.digest()]
    words = f"a deployment with the digest {spec.digest()}"
    if spec.provenance is not None:
        # without targets one deployment is on the curve under several loads
        rate, targets = spec.provenance.rate, found.study.targets
        same = [each for each in same if math.isclose(rate_of(each, targets), rate, rel_tol=1e-6)]
        words += f" at {rate:.3g} x the recorded rate"
    if not same:
        raise BadReport(spec_path, words, f"one that study {found.study.name!r} tried", "name the study of the spec")
    return max(same, key=lambda each: (each.fidelity == "measured", bool(each.intervals)))


def _commands(found: Kept, storage: str, chosen: Evaluation, spec_path: str | None) -> tuple[str, ...]:
    """What to type for this study again and for the deployment that the report shows, as the ledger kept it."""
    about, study = found.about, found.study
    where = ["--storage", storage if "://" in storage else str(absolute(storage))]
    paths = {name: about[name] for name in ("accelerator", "profile", "tiles", "prices")}
    if about["accelerator"] != CPU:
        del paths["profile"]
    given = {"model": about["model"], "study": study.name, **paths, **about.get("options", {})}
    options = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    slos = [word for text in about["slos"] for word in ("--slo", text)]
    options += [word for path in about.get("compare_prices", ()) for word in ("--compare-prices", path)]
    spec = spec_path or "out/spec.yaml"
    targets = () if spec_path is None else load_deployment(spec_path).targets
    lines = [
        ["tune", about["log"], *options, *slos, *where],
        ["pick", study.name, *_way(study, chosen, targets), *where, "-o", spec],
        ["verify", spec, about["log"]],
    ]
    profile = found.sources.profile
    measured = [] if profile is None or not profile.command.startswith("paretune ") else [profile.command]
    return (*measured, *(shlex.join(["paretune", *words]) for words in lines))


def _way(study: Study, chosen: Evaluation, targets: Sequence[str]) -> list[str]:
    """How `pick` comes to a point of a study: unasked, by the targets of its spec, or by its number."""
    own = [str(target) for target in study.targets]
    if targets and list(targets) != own:
        return [word for target in targets for word in ("--slo", target)]
    try:
        unasked = pick(study.front, slo=study.targets or None)
    except NothingFeasible:
        unasked = None
    if unasked is not None and is_same(unasked, chosen):
        return []
    number = next((i for i, each in enumerate(study.front.points, start=1) if is_same(each, chosen)), None)
    return [] if number is None else ["--point", str(number)]


def _measured(evaluation: Evaluation) -> Measured | None:
    if evaluation.measured is None:
        return None
    return Measured(evaluation.measured, math.nan)


def _tile_gains(found: Kept) -> tuple[TileGain, ...]:
    path = found.about.get("tiles")
    if path is None:
        return ()
    gains = []
    for each in TileFile.load(path).of_threads:
        for gain in each.gains:
            tile = each.table.get((gain.operator, gain.precision, gain.bucket))
            words = "default" if tile is None else " ".join([tile.backend, *(f"{n}={v}" for n, v in tile.parameters)])
            threads = f"{gain.operator}, {each.num_threads} threads" if each.num_threads > 1 else gain.operator
            gains.append(TileGain(threads, gain.precision, gain.bucket, gain.default_s, gain.best_s, words))
    return tuple(gains)
