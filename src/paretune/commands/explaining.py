"""`paretune explain`: where the time of a metric goes, and what would relieve it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..output import Speaker, speaks, table
from . import two_pools
from .machine import OUTPUT
from .numbers import POSITIVE
from .run_words import NOT_MEASURED, milliseconds, note_words
from .source_options import EXISTING, calibration_option, profile_option, table_options
from .traces import LOG

if TYPE_CHECKING:
    from ..optimizer.knobs import Effect
    from ..profiler.analyze import Analyzed
    from ..profiler.explain import Explained, Explanation
    from ..profiler.host_share import HostShare
    from ..profiler.table_choice import TableChoice
    from ..runtime.spec import Deployment
    from ..traces.metrics import Metric
    from ..traces.trace import Trace

FOLDER = click.Path(exists=True, file_okay=False)
# parts below this share of a metric stand in --json alone
_LEAST_SHARE = 0.005


@click.command()
@click.argument("spec", type=EXISTING)
@click.argument("log", metavar="TRACE", type=LOG)
@profile_option
@calibration_option
@table_options
@click.option(
    "--metric", "metrics", multiple=True, help="Such as ttft:p95; default: those of the log's targets, else p95s."
)
@click.option("--rate", type=POSITIVE, help="Arrivals that many times as fast; default: 1, or that of --analyze.")
@click.option("--analyze", "run_folder", type=FOLDER, help="A recorded run: `verify --record`, or `replay --record`.")
@click.option("--knobs/--no-knobs", default=True, show_default=True, help="Simulate changes of the spec.")
@click.option("--step-log", type=OUTPUT, help="Write every simulated step here, one JSON line each.")
@speaks
def explain(
    speaker: Speaker,
    spec: str,
    log: str,
    profile_path: str,
    calibration_path: str | None,
    tables: TableChoice,
    metrics: tuple[str, ...],
    rate: float | None,
    run_folder: str | None,
    knobs: bool,
    step_log: str | None,
) -> None:
    """Say where the time of a metric goes, what bounds the steps, and which change of the spec would help.

    \b
    Example: paretune explain out/spec.yaml log.parquet --metric ttft:p95
    """
    from ..optimizer.capacity import k_of
    from ..optimizer.knobs import relieving
    from ..optimizer.sources import Sources
    from ..profiler.analyze import RecordedRun, analyze
    from ..profiler.explain import default_asked, parse_asked
    from ..profiler.explain import explain as run
    from ..profiler.hardware import as_cataloged
    from ..profiler.host_share import host_shares
    from ..profiler.step_limits import LABELS_ARE_INFERRED, draft_limit_tables, limit_tables
    from ..runtime.spec import load_deployment
    from ..traces import read
    from ..traces.whole_file import write_whole

    deployment = as_cataloged(load_deployment(spec))
    trace = read(log)
    if deployment.is_disaggregated:
        if run_folder is not None:
            raise click.UsageError("--analyze: for a spec of one pool; this one is disaggregated")
        two_pools.check_options({"--calibration": calibration_path, **tables.flags()})
        asked_of_both = tuple(parse_asked(text) for text in metrics)
        _explain_pools(speaker, deployment, trace, profile_path, asked_of_both, rate or 1.0, step_log)
        return
    pool = deployment.pool
    recorded = None if run_folder is None else RecordedRun.load(run_folder, trace)
    asked = tuple(parse_asked(text) for text in metrics)
    k = k_of(metric for metric, _ in asked or [(target.metric, 0.0) for target in trace.targets])
    if recorded is not None:
        k, rate = recorded.times.k if not asked else k, rate or recorded.rate
    rate = rate or 1.0
    sources = Sources.of(
        deployment.model,
        accelerator_name=pool.accelerator,
        profile_path=profile_path,
        calibration_path=calibration_path,
        tables=tables,
    )
    sources.check_explained()
    modeled = sources.step_model(pool)
    limits = limit_tables(sources.peaks, sources.shape, pool, modeled)
    draft_limits = draft_limit_tables(sources.peaks, pool, modeled)
    with speaker.progress("explaining") as report:
        found, steps = run(
            trace, pool, modeled, limits, asked or default_asked(trace, k), draft_limits=draft_limits,
            policy=deployment.scheduler_policy, k=k, rate=rate,
        )  # fmt: skip
        report(0.5, "simulating changes")
        effects = {}
        if knobs:
            effects = {
                _name(each): relieving(each, trace, deployment, sources.step_model, k=k, rate=rate)
                for each in found.metrics
            }
    analyzed = None
    if recorded is not None:
        analyzed = analyze(recorded, trace, modeled.tables, found)
    if step_log is not None:
        write_whole(step_log, "".join(json.dumps(row) + "\n" for row in steps.rows()))
    not_modeled = (*modeled.not_modeled, LABELS_ARE_INFERRED)
    lines = [_metric_text(each, effects.get(_name(each), ()), analyzed) for each in found.metrics]
    lines.append(_steps_text(found))
    shares = host_shares(pool, modeled, policy=deployment.scheduler_policy)
    lines.append(host_text(shares))
    if analyzed is not None:
        lines.append(_analyzed_text(analyzed))
    if not modeled.measured:
        lines.append(NOT_MEASURED)
    lines.append("\n".join([*note_words(trace), *(f"not modeled: {each}" for each in not_modeled)]))
    data = {**_data(found, effects, analyzed, shares, not_modeled, rate), "notes": trace.notes}
    speaker.result(data, "\n\n".join(lines))


def _explain_pools(
    speaker: Speaker,
    deployment: Deployment,
    trace: Trace,
    profile_path: str,
    asked: tuple[tuple[Metric, float], ...],
    rate: float,
    step_log: str | None,
) -> None:
    """The same of a prefill and a decode pool: parts of both and of the way between them; no change is tried."""
    from ..optimizer.capacity import k_of
    from ..optimizer.sources import Sources
    from ..profiler.disaggregated import NOT_MODELED
    from ..profiler.explain import default_asked
    from ..profiler.explain_pools import ASKABLE, POOL_WORDS, PoolStep, explain_pools
    from ..profiler.kv_transfer import transfer_link
    from ..profiler.step_limits import LABELS_ARE_INFERRED, draft_limit_tables, limit_tables
    from ..traces.whole_file import write_whole

    k = k_of(metric for metric, _ in asked or [(target.metric, 0.0) for target in trace.targets])
    steps, shapes = [], []
    for pool in deployment.phases:
        sources = Sources.of(deployment.model, accelerator_name=pool.accelerator, profile_path=profile_path)
        modeled = sources.step_model(pool)
        limits = limit_tables(sources.peaks, sources.shape, pool, modeled)
        steps.append(PoolStep(modeled, limits, draft_limit_tables(sources.peaks, pool, modeled)))
        shapes.append(sources.shape)
    link = transfer_link(deployment)
    with speaker.progress("explaining"):
        found = explain_pools(
            trace, deployment, shapes[0], link, steps[0], steps[1], asked or default_asked(trace, k, ASKABLE), k=k,
            rate=rate,
        )  # fmt: skip
    roles = ("prefill", "decode")
    if step_log is not None:
        rows = [{"pool": role, **row} for role, log in zip(roles, found.steps) for row in log.rows()]
        write_whole(step_log, "".join(json.dumps(row) + "\n" for row in rows))
    left_out = [*steps[0].modeled.not_modeled, *steps[1].modeled.not_modeled, *link.not_modeled, *NOT_MODELED]
    if not asked and any(target.metric.name not in ASKABLE for target in trace.targets):
        left_out.append("ITL, of which the log has targets: single gaps are not taken apart over two pools")
    not_modeled = tuple(dict.fromkeys([*left_out, LABELS_ARE_INFERRED]))
    lines = [_metric_text(each, (), None, POOL_WORDS) for each in found.metrics]
    lines.append("changes of the spec are tried for one pool alone")
    lines += [f"{role} pool\n{_steps_text(each)}" for role, each in zip(roles, found.pools)]
    if not all(each.modeled.measured for each in steps):
        lines.append(NOT_MEASURED)
    lines.append("\n".join([*note_words(trace), *(f"not modeled: {each}" for each in not_modeled)]))
    pools = {
        role: {"steps": each.steps, "occupancy": each.occupancy, "busy_share": each.busy_share}
        for role, each in zip(roles, found.pools)
    }
    data = {
        "rate": rate,
        "metrics": {_name(each): _metric_data(each, ()) for each in found.metrics},
        "pools": pools,
        "preemptions": found.run.result.preemptions,
        "not_modeled": not_modeled,
        "notes": trace.notes,
    }
    speaker.result(data, "\n\n".join(lines))


def _name(each: Explained) -> str:
    return f"{each.metric}:p{each.percentile:g}"


def _metric_text(
    each: Explained, effects: tuple[Effect, ...], analyzed: Analyzed | None, words: Mapping[str, str] | None = None
) -> str:
    from ..optimizer.knobs import best
    from ..profiler.explain import WORDS

    words = WORDS if words is None else words

    if not each.parts:
        return f"{each.metric} p{each.percentile:g}: defined for no request"
    rows = [
        [words[part.name], milliseconds(part.seconds), f"{part.seconds / each.value:.0%}", part.bound]
        for part in each.parts
        if part.seconds >= _LEAST_SHARE * each.value
    ]
    bound = max(each.by_resource, key=lambda resource: each.by_resource[resource])
    rows.append(["all of it", milliseconds(each.value), "100%", bound])
    around = f"by the {each.neighbors:,} {'gaps' if each.metric == 'itl' else 'requests'} around it"
    lines = [
        f"{each.metric} p{each.percentile:g} = {milliseconds(each.value)} ms over all requests ({around})",
        table(["milliseconds", "time", "share", "steps bound by"], rows),
    ]
    if analyzed is not None and _name(each) in analyzed.values:
        rows = [
            [part.name, milliseconds(part.predicted_s), milliseconds(part.measured_s)]
            for part in analyzed.parts.get(_name(each), ())
        ]
        rows.append(["all of it", milliseconds(each.value), milliseconds(analyzed.values[_name(each)])])
        lines.append(table(["milliseconds", "predicted", "measured"], rows))
    found = best(effects)
    if effects and found is None:
        lines.append("no change that was tried helps")
    for effect in effects:
        mark = "-> " if effect is found else "   "
        if effect.after != effect.after:
            lines.append(f"{mark}{effect.words}: {effect.note}")
            continue
        devices = f", {effect.devices:+d} devices" if effect.devices else ""
        note = f"; {effect.note}" if effect.note else ""
        after = f"{milliseconds(effect.after)} ms ({-effect.gain:+.0%}){devices}{note}"
        lines.append(f"{mark}{effect.words}: {after}")
    return "\n".join(lines)


def _steps_text(found: Explanation) -> str:
    kinds = [
        f"{each.steps:,} steps are {each.label}-bound ({each.share:.0%} of the computing time)" for each in found.steps
    ]
    rows = [
        [each.name, f"{each.mean:,.1f}", f"{each.p95:,.0f}", f"{each.limit:,}" if each.limit else "-",
         f"{each.mean / each.limit:.0%}" if each.limit else "-"]
        for each in found.occupancy
    ]  # fmt: skip
    occupancy = table(["while steps run", "mean", "p95", "limit", "full"], rows)
    return "\n".join([*kinds, occupancy, f"busy {found.busy_share:.0%} of the time, "
                      f"{found.result.preemptions:,} preemptions"])  # fmt: skip


def host_text(shares: Sequence[HostShare]) -> str:
    """What the host takes of the unloaded time to first token, by prompt length."""
    rows = [
        [f"{each.prompt_tokens:,}", milliseconds(each.ttft_s), milliseconds(each.host_steps_s),
         milliseconds(each.host_request_s), f"{each.share:.0%}"]
        for each in shares
    ]  # fmt: skip
    return table(["prompt alone, ms; tokens", "ttft", "host in steps", "host beside them", "host's share"], rows)


def _analyzed_text(analyzed: Analyzed) -> str:
    rows = []
    for each in analyzed.steps:
        both = [milliseconds(each.predicted_s), milliseconds(each.measured_s)]
        rows.append([each.name, f"{each.steps:,}", *both, f"{each.error:+.1%}"])
    steps = table(["measured steps, ms all together", "steps", "predicted", "measured", "error"], rows)
    return "\n".join([steps, *analyzed.notes])


def _data(
    found: Explanation,
    effects: dict[str, tuple[Effect, ...]],
    analyzed: Analyzed | None,
    shares: Sequence[HostShare],
    not_modeled: tuple[str, ...],
    rate: float,
) -> dict[str, Any]:
    return {
        "rate": rate,
        "metrics": {_name(each): _metric_data(each, effects.get(_name(each), ())) for each in found.metrics},
        "steps": found.steps,
        "occupancy": found.occupancy,
        "busy_share": found.busy_share,
        "preemptions": found.result.preemptions,
        "analyzed": analyzed,
        "host_share": [{**vars(each), "share": each.share} for each in shares],
        "not_modeled": not_modeled,
    }


def _metric_data(each: Explained, tried: tuple[Effect, ...]) -> dict[str, Any]:
    from ..optimizer.knobs import best

    chosen = best(tried)
    return {
        "value": each.value,
        "parts": {part.name: {"seconds": part.seconds, "by_resource": part.by_resource} for part in each.parts},
        "neighbors": each.neighbors,
        "scale": each.scale,
        "knobs": [{**vars(effect), "gain": effect.gain} for effect in tried],
        "best_knob": None if chosen is None else chosen.change,
    }


COMMANDS = (explain,)
