"""The tuner's front desk: from a request log and what the user asked to a study, and from a study to a spec."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..profiler.hardware import as_cataloged
from ..profiler.live import measure_live
from ..profiler.profile import Profile
from ..profiler.table_choice import TableChoice
from ..profiler.tile_file import TileFile
from ..runtime.parallel import usable_cores
from ..runtime.spec import CPU, Deployment, load_deployment, save_deployment
from ..traces import BadTrace, Trace, read, with_targets
from ..traces.metrics import Metric, RequestTimes, Target
from .capacity import k_of
from .evaluate import Question, assess
from .finalists import rate_of
from .front import Cost, Evaluation
from .pick import make_spec, pick
from .retune import Comparison
from .search import tune
from .sources import Sources, absolute
from .space import SearchSpace, TileKey, default_space, load_space
from .store import Ledger
from .study import Progress, Study, load_study

if TYPE_CHECKING:
    from .optuna_mirror import OptunaMirror

# How the whole of a study is shared out between its stages, for a progress bar.
_STAGES = {"screen": (0.0, 0.05), "simulate": (0.05, 0.5), "sharpen": (0.5, 0.55), "refine": (0.55, 0.6)}

Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Ask:
    """What the user asked of `tune`; paths as typed.

    storage     the ledger: a file or a database URL
    metric      the latency axis with its percentile, such as "ttf30:p95"
    slos        targets; none: those that the log carries
    survive     replicas that may be lost with the targets still held; of cost "sizing"
    finalists   candidates to serve and replay for real; 0: simulate only
    tables      what takes the place of an accelerator's data sheet
    compare_prices  further price books, under which the winner is worked out again
    fresh       forget an earlier study of the name
    renew       forget it unless it has the same settings and was interrupted: then go on with it
    optuna_storage  database URL of Optuna's own storage that the trials are mirrored into; None: they are not
    """

    log: str
    model: str
    storage: str
    slos: tuple[str, ...] = ()
    metric: str = "ttf30:p95"
    cost: Cost = "capacity"
    survive: int = 0
    space_path: str | None = None
    baseline_path: str | None = None
    accelerator: str = CPU
    max_devices: int | None = None
    profile_path: str | None = None
    tiles_path: str | None = None
    prices_path: str | None = None
    calibration_path: str | None = None
    tables: TableChoice = field(default_factory=TableChoice)
    compare_prices: tuple[str, ...] = ()
    study: str = "default"
    trials: int = 200
    finalists: int = 0
    seed: int = 0
    jobs: int | None = None
    time_budget: float | None = None
    fresh: bool = False
    renew: bool = False
    optuna_storage: str | None = None


def _axis(text: str) -> tuple[Metric, float]:
    # the axis is a target without its limit, so a target's own parser reads it
    target = Target.parse(f"{text}<=1s")
    return target.metric, target.percentile


def _space(ask: Ask, trace: Trace, sources: Sources) -> SearchSpace:
    devices = ask.max_devices or (usable_cores() if ask.accelerator == CPU else 8)
    if ask.baseline_path is None:
        default = sources.plain_default(trace, cores=devices)
    else:
        default = as_cataloged(load_deployment(ask.baseline_path))
        default = default.model_copy(update={"predicted": (), "provenance": None})
    if ask.space_path is None:
        space = default_space(trace, default, cores=devices, has_experts=sources.shape.experts is not None)
        if sources.profile is not None:
            space = _within_profile(space, sources.profile)
    else:
        space = load_space(ask.space_path, default=default, max_devices=devices)
    if ask.baseline_path is not None:
        space = replace(space, default=default)
    return space if ask.tiles_path is None else _with_tiles(space, TileFile.load(ask.tiles_path))


def _within_profile(space: SearchSpace, profile: Profile) -> SearchSpace:
    """The default space without values that the profile did not measure; in a space of the user's they are counted."""
    measured: dict[str, set[object]] = {
        "weight_dtype": {each.weight_dtype for each in profile.configurations},
        "pipeline_parallel_size": {each.pipeline_parallel_size for each in profile.configurations},
        "context_parallel_size": {each.context_parallel_size for each in profile.configurations},
        "enable_expert_parallel": {each.enable_expert_parallel for each in profile.configurations},
        "tensor_parallel_size": {each.tensor_parallel_size for each in profile.configurations},
        "num_threads": {each.num_threads for each in profile.configurations},
    }
    fields = []
    for name, values in space.fields:
        kept = tuple(value for value in values if name not in measured or value in measured[name])
        fields.append((name, kept or values))
    return replace(space, fields=tuple(fields))


def _with_tiles(space: SearchSpace, tiles: TileFile) -> SearchSpace:
    """Tuned tiles for every way to shard and store that the space can ask for."""
    choices = dict(space.fields)
    pool = space.default.pool
    found = []
    for tp in choices.get("tensor_parallel_size", (pool.tensor_parallel_size,)):
        for threads in choices.get("num_threads", (pool.num_threads,)):
            for dtype in choices.get("weight_dtype", (pool.weight_dtype,)):
                table = tiles.table(int(threads)).only(str(dtype))
                found.append((TileKey(pool.accelerator, int(tp), int(threads), str(dtype)), table))
    return replace(space, tiles=tuple(found))


def _fits_here(deployment: Deployment) -> bool:
    """Whether this machine has a core for each that the deployment holds: crowded, it would measure something else."""
    pool = deployment.pool
    return pool.replicas * pool.devices_per_replica <= usable_cores()


def live_measure(trace: Trace, k: int) -> Callable[[Deployment, float], RequestTimes]:
    """What `tune` calls to measure a finalist: serve it on this machine and replay the trace."""
    return lambda deployment, rate: measure_live(deployment, trace, k=k, rate=rate).times


def _optuna_mirror(url: str) -> OptunaMirror:
    # Optuna takes a second to import, which only those pay who ask for it
    from .optuna_mirror import OptunaMirror

    return OptunaMirror(url)


def tune_trace(ask: Ask, report: Report) -> Study:
    """Read everything, tune, keep the study in its ledger, and mirror it where that is asked for.

    Raises: what its parts raise, each with an exit code.
    """
    trace = read(ask.log)
    if ask.slos:
        trace = with_targets(trace, [Target.parse(text) for text in ask.slos])
    sources = Sources.of(
        ask.model,
        accelerator_name=ask.accelerator,
        profile_path=ask.profile_path,
        prices_path=ask.prices_path,
        calibration_path=ask.calibration_path,
        tables=ask.tables,
    )
    metric, percentile = _axis(ask.metric)
    space = _space(ask, trace, sources)
    ledger = Ledger(ask.storage)
    optuna = None if ask.optuna_storage is None else _optuna_mirror(ask.optuna_storage)
    if ask.fresh and any(row.name == ask.study for row in ledger.studies()):
        ledger.delete(ask.study)
    about = {
        "log": absolute(ask.log),
        "slos": list(ask.slos),
        "model": absolute(ask.model) if Path(ask.model).is_dir() else ask.model,
        "accelerator": ask.accelerator,
        "profile": absolute(ask.profile_path),
        "tiles": absolute(ask.tiles_path),
        "prices": absolute(ask.prices_path),
        "compare_prices": [absolute(path) for path in ask.compare_prices],
        "options": {
            "metric": ask.metric,
            "cost": ask.cost,
            "survive": ask.survive or None,
            "space": absolute(ask.space_path),
            "baseline": absolute(ask.baseline_path),
            "calibration": absolute(ask.calibration_path),
            **ask.tables.absolute().options(),
            "max-devices": ask.max_devices,
            "trials": ask.trials,
            "measure": ask.finalists,
            "seed": ask.seed,
        },
    }

    def progress(at: Progress) -> None:
        begin, end = _STAGES.get(at.stage, (0.6, 1.0))
        report(begin + (end - begin) * at.done / max(1, at.total), f"{at.stage} {at.done:,} of {at.total:,}")

    k = k_of([metric, *(target.metric for target in trace.targets)])
    measure = live_measure(trace, k) if ask.finalists and ask.accelerator == CPU else None
    found = tune(
        trace,
        space,
        sources.step_model,
        sources.price,
        metric=metric,
        percentile=percentile,
        cost=ask.cost,
        survive=ask.survive,
        trials=ask.trials,
        seed=ask.seed,
        jobs=ask.jobs or usable_cores(),
        ledger=ledger,
        study=ask.study,
        renew=ask.renew,
        profile=sources.digest,
        prices=sources.prices_digest,
        about=about,
        time_budget_s=ask.time_budget,
        progress=progress,
        measure=measure,
        measurable=_fits_here,
        finalists=ask.finalists,
    )
    if optuna is not None:
        optuna.add(ledger.study(ask.study), ledger.records(ask.study), space)
    return replace(found, trace_notes=trace.notes)


@dataclass(frozen=True)
class Kept:
    """A study as the ledger keeps it, with the trace and sources that it was made from."""

    study: Study
    trace: Trace
    sources: Sources
    about: dict[str, Any]


def kept(name: str, storage: str | os.PathLike[str]) -> Kept:
    """Read a study back. Raises: NoSuchStudy; BadTrace: the log is not there any more, or is another one."""
    ledger = Ledger(storage)
    study = load_study(ledger, name)
    row = ledger.study(name)
    about = dict(row.about or {})
    log = Path(about.get("log", ""))
    if not log.is_file():
        raise BadTrace(f"study {name!r}: log", str(log), "the log it was tuned for", "put it back, or tune again")
    trace = read(log)
    if about["slos"]:
        trace = with_targets(trace, [Target.parse(text) for text in about["slos"]])
    if trace.digest() != row.settings["trace"]:
        raise BadTrace(f"study {name!r}: log", str(log), "what it was tuned for", "tune again for what it says now")
    sources = Sources.of(
        about["model"],
        accelerator_name=about["accelerator"],
        profile_path=about["profile"],
        prices_path=about["prices"],
        calibration_path=about.get("options", {}).get("calibration"),
        tables=TableChoice.of_options(about.get("options", {})),
        any_machine=True,
    )
    return Kept(study, trace, sources, about)


def spec_of(found: Kept, evaluation: Evaluation, targets: Sequence[Target]) -> Deployment:
    """The spec of a candidate of a study."""
    price = found.sources.price(evaluation.deployment.pool)
    return make_spec(
        evaluation,
        trace=found.trace,
        targets=targets,
        study=found.study.name,
        profile=found.sources.name,
        profile_digest=found.sources.digest,
        measured_steps=found.study.measured_steps,
        prices=price.source,
        prices_as_of=price.as_of,
        rate=rate_of(evaluation, found.study.targets),
    )


def pick_spec(
    name: str,
    storage: str,
    *,
    slos: Sequence[str] = (),
    budget_usd: float | None = None,
    knee: bool = False,
    point: int | None = None,
    confidence: float = 0.9,
    output: str | None = None,
) -> tuple[Evaluation, Deployment]:
    """Choose a point of a study, and write its spec where `output` says.

    Without a way to choose: the cheapest that holds the study's targets; if it has none, the knee.
    Raises: BadPick (exit code 2), NothingFeasible (3).
    """
    found = kept(name, storage)
    targets = [Target.parse(text) for text in slos] or list(found.study.targets)
    by_target = bool(targets) and not knee and budget_usd is None and point is None
    chosen = pick(
        found.study.front,
        slo=targets if by_target else None,
        budget_usd=budget_usd,
        point=point,
        confidence=confidence,
    )
    deployment = spec_of(found, chosen, targets)
    if output is not None:
        save_deployment(deployment, output)
    return chosen, deployment


def tonight(ask: Ask, report: Report) -> Callable[[Trace, Deployment], Comparison]:
    """What `retune` calls where the workload moved: tune on tonight's log with the old spec as trial 0, and pick.

    Both deployments are evaluated on tonight's log with the same step times, so their difference is theirs.
    """

    def compare(trace: Trace, old: Deployment) -> Comparison:
        targets = [Target.parse(text) for text in old.targets]
        study = tune_trace(replace(ask, slos=old.targets, renew=True), report)
        chosen = pick(study.front, slo=targets) if targets else pick(study.front)
        found = kept(ask.study, ask.storage)
        before = study.default
        if study.front.cost == "sizing":
            # sizing gave trial 0 the replicas it would need; the old spec keeps those it runs with
            front = study.front
            question = Question(
                trace,
                tuple(targets),
                front.metric,
                front.percentile,
                front.cost,
                k_of([front.metric, *(target.metric for target in targets)]),
                None,
                found.sources.step_model,
                found.sources.price,
            )
            before = assess(question, study.default.deployment.with_pool(replicas=old.pool.replicas))
        return Comparison(before, chosen, spec_of(found, chosen, targets), study.front.cost)

    return compare
