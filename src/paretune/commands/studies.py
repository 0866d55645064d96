"""`paretune simulate | tune | front | pick | export | report`: from a request log to a chosen spec."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..default_paths import LEDGER
from ..output import Speaker, speaks, table
from . import two_pools
from .arrival_words import Waiting, arrival_options, arrival_words
from .machine import MODEL, OUTPUT
from .numbers import NOT_NEGATIVE, POSITIVE, Finite
from .run_words import (
    milliseconds,
    missed_words,
    note_words,
    protocol_options,
    room_text,
    samples_text,
    worst_text,
)
from .scaling_words import Scaling, autoscale_options, autoscaler_words, elastic_text
from .source_options import EXISTING, calibration_option, profile_option, table_options
from .traces import LOG

if TYPE_CHECKING:
    from ..optimizer.capacity import Owed
    from ..optimizer.front import Evaluation
    from ..optimizer.study import Study
    from ..profiler.table_choice import TableChoice
    from ..runtime.spec import Prediction
    from ..traces.metrics import RequestTimes, Summary, Target

NOTHING_FEASIBLE = 3
OUT_OF_TIME = 75

# Reasons may name all that would have been allowed; --json has them whole.
REASON_LENGTH = 100
NOT_MEASURED = "NOT MEASURED: step times come from a data sheet, or from single operators"

storage_option = click.option("--storage", default=LEDGER, show_default=True, help="Ledger: a file or postgresql://...")
prices_option = click.option("--prices", "prices_path", type=EXISTING, help="Your price book (CSV) in place of ours.")
compare_prices_option = click.option(
    "--compare-prices", multiple=True, type=EXISTING, help="Further price books: the winner under each of their sheets."
)
accelerator_option = click.option(
    "--accelerator", default="cpu", show_default=True, help="Name in the catalog; 'cpu' is this machine."
)


def goodput_of(times: RequestTimes, owed: Owed) -> float | None:
    """Requests per second that met their targets, of those that count; None where there are none."""
    from ..traces.metrics import goodput

    return goodput(times, owed, owed.counted) if owed.targets else None


def check_k(k: int, targets: Sequence[Target]) -> None:
    """Raises: UsageError: a target on another TTF-k than a run with this k tells."""
    others = [target for target in targets if target.metric.name == "ttf" and target.metric.k not in (1, k)]
    if others:
        raise click.UsageError(f"-k: found {k}; {others[0]} asks for another: give -k {others[0].metric.k}")


def summary_table(summary: Summary, goodput_per_s: float | None = None) -> str:
    """Latencies of a run in milliseconds."""
    names = ("mean", "p50", "p90", "p95", "p99")
    rows = [[metric, *(milliseconds(values[name]) for name in names)] for metric, values in summary.values.items()]
    head = (
        f"{summary.finished:,} of {summary.requests:,} requests finished in {summary.duration_s:,.1f} s, "
        f"{summary.output_tokens_per_s:,.1f} output tokens/s; "
        f"{summary.short_of_k_share:.0%} of answers have fewer than k tokens\n"
    )
    if goodput_per_s is not None:
        head += f"goodput {goodput_per_s:,.2f} requests/s within their targets\n"
    if summary.tpot_undefined:
        head += f"TPOT leaves out {summary.tpot_undefined:,} answers of one token\n"
    return head + table(["milliseconds", *names], rows)


@click.command()
@click.argument("log", type=LOG)
@click.option("--spec", "spec_path", type=EXISTING, required=True, help="The deployment.")
@profile_option
@calibration_option
@table_options
@prices_option
@click.option("--rate", type=POSITIVE, default=1.0, show_default=True, help="Arrivals that many times as fast.")
@click.option("-k", type=click.IntRange(min=1), help="Of TTF-k; default: that of the log's targets, else 30.")
@click.option("--slo", "slos", multiple=True, help="What must hold; default: the spec's targets, else the log's.")
@click.option("--survive", type=click.IntRange(min=0), default=0, help="Also with so many replicas lost.")
@click.option("--head-room", "ask_head_room", is_flag=True, help="Also the most traffic at which the targets hold.")
@click.option(
    "--size", is_flag=True, help="Of a disaggregated spec: also the replicas, up to 256, that hold at least cost."
)
@arrival_options
@autoscale_options
@protocol_options
@speaks
def simulate(
    speaker: Speaker,
    log: str,
    spec_path: str,
    profile_path: str,
    calibration_path: str | None,
    tables: TableChoice,
    prices_path: str | None,
    rate: float,
    k: int | None,
    slos: tuple[str, ...],
    survive: int,
    ask_head_room: bool,
    size: bool,
    warm_up_s: float,
    ramp_s: float,
    length_jitter: float,
    waiting: Waiting,
    scaling: Scaling,
) -> None:
    """Serve a request log on a virtual clock with one deployment.

    \b
    Example: paretune simulate log.parquet --spec out/spec.yaml
    """
    from ..optimizer.bill import run_cost
    from ..optimizer.capacity import Owed, check_governed, k_of
    from ..optimizer.elastic_fleet import ELASTIC_LEAVES_OUT, compared
    from ..optimizer.head_room import head_room, survivors
    from ..optimizer.sources import Sources
    from ..profiler.hardware import as_cataloged
    from ..profiler.simulator import simulate as run
    from ..reports.bill import run_words
    from ..runtime.spec import load_deployment
    from ..traces import Target, read
    from ..traces.confidence import estimates, plain
    from ..traces.metrics import summarize, violations
    from ..traces.run_protocol import RunProtocol
    from ..traces.worst_window import worst_windows

    deployment = as_cataloged(load_deployment(spec_path))
    protocol = RunProtocol(warm_up_s, ramp_s, length_jitter)
    recorded = read(log)
    trace = protocol.applied(recorded)
    targets = tuple(map(Target.parse, slos or deployment.targets)) or trace.targets
    check_governed(trace, targets)
    if (survive or ask_head_room or size) and not targets:
        raise click.UsageError("--survive, --head-room and --size ask whether targets hold: give --slo")
    k = k or k_of(target.metric for target in targets)
    check_k(k, targets)
    if size and warm_up_s:
        raise click.UsageError("--size: its runs count every request: leave out --warm-up")
    if warm_up_s and (survive or ask_head_room):
        speaker.warn("--survive and --head-room count every request: --warm-up leaves none out there")
    if deployment.is_disaggregated:
        two_pools.check_options(
            {"--calibration": calibration_path, **tables.flags(), "--survive": survive, "--head-room": ask_head_room,
             **waiting.given, **scaling.given}
        )  # fmt: skip
        two_pools.simulate_pools(
            speaker, deployment, trace, protocol, profile_path=profile_path, prices_path=prices_path, targets=targets,
            k=k, rate=rate, size=size,
        )  # fmt: skip
        return
    if size:
        raise click.UsageError("--size: for a disaggregated spec; `tune --cost sizing` is for one pool")
    arrivals = waiting.arrivals(recorded, rate, ramp_s)
    pool = deployment.pool
    sources = Sources.of(
        deployment.model,
        accelerator_name=pool.accelerator,
        profile_path=profile_path,
        prices_path=prices_path,
        calibration_path=calibration_path,
        tables=tables,
    )
    modeled = sources.step_model(pool)
    autoscaler = scaling.autoscaler(sources.shape, pool)
    if (survive or ask_head_room) and (waiting.asked or autoscaler is not None):
        raise click.UsageError("--survive and --head-room ask about recorded arrivals and the spec's replicas alone")
    asked: dict[str, Any] = {"policy": deployment.scheduler_policy, "k": k, "rate": rate, "arrivals": arrivals}
    result = run(trace, pool, modeled.tables, autoscaler=autoscaler, **asked)
    elastic = None
    if autoscaler is not None:
        pool = pool.model_copy(update={"replicas": autoscaler.max_replicas})
        fixed = run(trace, pool, modeled.tables, **asked)
        elastic = compared(
            result, fixed, pool, sources, autoscaler=autoscaler, cold_start_inferred=scaling.inferred, protocol=protocol
        )
    counted = protocol.counted(result.times)
    summary = summarize(result.times, counted)
    owed = Owed(trace, targets, counted)
    goodput_per_s, missed = goodput_of(result.times, owed), violations(result.times, owed)
    label = "" if modeled.measured else f"\n{NOT_MEASURED}"
    not_modeled = modeled.not_modeled
    if deployment.engine != "paretune":
        ran = {"paretune": "paretune's own", "vllm_v1": "paretune's, by the rules of vLLM's V1,"}
        other = f"the scheduler of {deployment.engine}: {ran[deployment.scheduler_policy]} ran in its place"
        not_modeled, label = (other, *not_modeled), f"{label}\nnot modeled: {other}"
    samples, worst = estimates(result.times, rows=counted), worst_windows(result.times, rows=counted)
    text = (
        f"{summary_table(summary, goodput_per_s)}\n"
        f"{samples_text(samples)}\n{worst_text(worst)}\n{protocol.words(result.times)}\n"
        f"{arrival_words(arrivals, rate)}\n{''.join(f'{each}{chr(10)}' for each in note_words(trace))}"
        f"{result.steps:,} steps, {result.preemptions:,} preemptions, {result.rejected:,} rejected, "
        f"step times +-{modeled.relative_error:.0%}{label}"
    )
    if pool.speculation != "none":
        kept = result.accepted_tokens / max(1, result.draft_tokens)
        text += f"\n{result.draft_tokens:,} tokens proposed, {kept:.0%} of them kept, as often as the log recorded"
    cost = None
    if autoscaler is not None and elastic is not None:
        not_modeled = (*not_modeled, *ELASTIC_LEAVES_OUT)
        text = f"{text}\n{autoscaler_words(autoscaler, scaling.inferred)}\n{elastic_text(elastic)}"
        text += "".join(f"\nnot modeled: {each}" for each in ELASTIC_LEAVES_OUT)
    else:
        cost = run_cost(result, pool, sources)
        text = "\n".join([text, *run_words(cost)])
    text += "".join(f"\n{each}" for each in missed_words(missed))
    lost = survivors(trace, deployment, sources.step_model, targets, lost=survive, k=k, rate=rate) if survive else None
    room = None
    if lost is not None:
        text += f"\n{lost.words}"
        not_modeled = (*not_modeled, *lost.not_modeled)
    if ask_head_room:
        room = head_room(trace, deployment, modeled, targets, k=k)
        text += f"\n{room_text(room)}"
    data = {
        "summary": summary.to_dict(),
        "goodput_per_s": goodput_per_s,
        "targets": list(map(str, targets)),
        "missed": {str(target): value for target, value in missed},
        "samples": plain(samples),
        "worst_window": worst,
        "protocol": vars(protocol),
        "arrivals": arrival_words(arrivals, rate).split("\n"),
        "notes": trace.notes,
        "autoscaler": autoscaler,
        "elastic": elastic and elastic.to_dict(),
        "survive": lost,
        "head_room": room,
        "steps": result.steps,
        "preemptions": result.preemptions,
        "rejected": result.rejected,
        "prefix_hit_tokens": result.prefix_hit_tokens,
        "draft_tokens": result.draft_tokens,
        "accepted_tokens": result.accepted_tokens,
        "measured_step_times": modeled.measured,
        "relative_error": modeled.relative_error,
        "not_modeled": not_modeled,
        "cost": cost and cost.to_dict(),
    }
    speaker.result(data, text)


def deployment_words(evaluation: Evaluation) -> str:
    """A candidate in one line."""
    pool = evaluation.deployment.pool
    threads = f" x {pool.num_threads} threads" if pool.accelerator == "cpu" else ""
    flags = ("" if pool.enable_chunked_prefill else ", whole prompts") + (
        "" if pool.enable_prefix_caching else ", no prefix cache"
    )
    sizes = (pool.pipeline_parallel_size, pool.context_parallel_size)
    ranks = "".join(f"{name} {size} x " for name, size in zip(("PP", "CP"), sizes) if size > 1)
    ranks += "EP + " if pool.enable_expert_parallel else ""
    return (
        f"{pool.replicas} x {ranks}TP {pool.tensor_parallel_size}{threads}, {pool.weight_dtype}, "
        f"seqs {pool.max_num_seqs}, tokens {pool.max_num_batched_tokens}{flags}"
    )


def front_table(study: Study) -> str:
    """The curve, cheapest first; each point with what it carries, or without targets with the load it is under."""
    from ..traces.metrics import usd_per_month

    front = study.front
    latency = f"{front.metric} p{front.percentile:g}, ms"
    units = ["$/M tokens"] if front.cost == "capacity" else ["$/hour", "$/month"]
    last = "load" if not study.targets else "capacity" if front.cost == "capacity" else "replicas"
    rows = []
    for number, each in enumerate(front.points, start=1):
        low, high = each.interval(front.metric, front.percentile)
        value = each.value(front.metric, front.percentile)
        rows.append(
            [
                f"{number}  {deployment_words(each)}",
                *map(dollars, (each.cost(front.cost), usd_per_month(each.usd_per_hour))[: len(units)]),
                milliseconds(value),
                f"{milliseconds(low)} to {milliseconds(high)}",
                {
                    "load": f"{each.load:.2f}x",
                    "capacity": f"{each.capacity_rate:.2f}x",
                    "replicas": str(each.replicas_needed),
                }[last],
                each.fidelity,
            ]
        )
    return table(["point", *units, latency, "90 % interval", last, "latency known by"], rows)


def price_words(source: str, as_of: str) -> str:
    """Where dollars come from, and what a month is."""
    from ..traces.metrics import HOURS_PER_MONTH

    return f"prices: {source}, as of {as_of}; a month is {HOURS_PER_MONTH} hours"


@click.command()
@click.argument("log", type=LOG)
@click.option("--model", default=MODEL, show_default=True, help="Model directory, or paretune/small.")
@click.option("--slo", "slos", multiple=True, help="What must hold, such as ttf30:p95<=600ms; else the log's targets.")
@click.option("--metric", default="ttf30:p95", show_default=True, help="The latency axis of the curve.")
@click.option("--cost", type=click.Choice(["capacity", "sizing"]), default="capacity", show_default=True)
@click.option("--survive", type=click.IntRange(min=0), default=0,
              help="Size so that the targets hold with so many replicas lost.")  # fmt: skip
@click.option("--space", "space_path", type=EXISTING, help="YAML with the values to try for each field.")
@click.option("--baseline", "baseline_path", type=EXISTING, help="Spec that runs today: trial 0.")
@accelerator_option
@click.option(
    "--max-devices", type=click.IntRange(min=1), help="Most devices of a deployment (cpu: this machine's cores)."
)
@profile_option
@click.option("--tiles", "tiles_path", type=EXISTING, help="Tiles that `kernels tune` found.")
@calibration_option
@table_options
@prices_option
@compare_prices_option
@click.option("--study", default="default", show_default=True)
@storage_option
@click.option("--trials", type=click.IntRange(min=1), default=200, show_default=True, help="Candidates to simulate.")
@click.option("--measure", "finalists", type=click.IntRange(min=0), default=0, show_default=True,
              help="Finalists to serve and replay for real.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), help="Threads; default: the cores. Does not change the result.")
@click.option("--time-budget", type=NOT_NEGATIVE, help="Seconds after which no trial is begun.")
@click.option("--fresh", is_flag=True, help="Delete an earlier study of this name first.")
@click.option("--optuna-storage", metavar="URL",
              help="At the end, copy the trials into this database for Optuna's own tools.")  # fmt: skip
@speaks
def tune(speaker: Speaker, log: str, **options: Any) -> None:
    """Work out the curve of cost against latency for a request log.

    A study that was interrupted goes on when the same command is typed again. Exits with 3 when no candidate holds the
    targets, and with 75 when it was interrupted or the time budget ended it.

    \b
    Example: paretune tune log.parquet --slo 'ttf30:p95<=600ms' --measure 6
    """
    from ..optimizer.bill import compared_prices
    from ..optimizer.tuning import Ask, tune_trace
    from ..reports.bill import sheet_words

    if options["finalists"] and options["accelerator"] != "cpu":
        message = f"--measure: {options['accelerator']} is not this machine, so nothing can be measured on it"
        if click.get_current_context().get_parameter_source("finalists") is ParameterSource.COMMANDLINE:
            raise click.UsageError(message)
        speaker.warn(message)
    ask = Ask(log=log, **options)
    with speaker.progress("tuning") as report:
        study = tune_trace(ask, report)
    found = study.screened
    sheets = compared_prices(ask, study)
    text = [
        _curve(study),
        *sheet_words(sheets, deployment_words),
        *(f"note: {note}" for note in study.trace_notes),
        f"study {study.name}: {found.points:,} points, {found.simulated:,} simulated, {found.measured} measured"
        + ("" if study.complete else "; out of time, type the same command again to go on"),
    ]
    left_out = sorted([*found.invalid.items(), *found.dropped.items()], key=lambda item: -item[1])
    text += [f"left out: {count:,} points: {reason[:REASON_LENGTH]}" for reason, count in left_out]
    if not study.front.points:
        text.append(f"no candidate is feasible; the default: {study.default.reason}")
    exit_code = OUT_OF_TIME if not study.complete else 0 if study.front.points else NOTHING_FEASIBLE
    data = {**_study_data(study), "notes": study.trace_notes, "price_sheets": sheets.to_dict()}
    speaker.result(data, "\n".join(text), exit_code)
    sys.exit(exit_code)


def _study_data(study: Any) -> dict[str, Any]:
    whole: dict[str, Any] = study.to_dict()
    return {
        "study": study.name,
        "points": [each.to_dict() for each in study.front.points],
        "screened": whole["screened"],
        "price": whole["price"],
        "not_modeled": whole["not_modeled"],
        "complete": study.complete,
    }


@click.command()
@click.argument("study", default="default")
@storage_option
@click.option("--csv", "as_csv", is_flag=True, help="Every evaluation as CSV.")
@speaks
def front(speaker: Speaker, study: str, storage: str, as_csv: bool) -> None:
    """Show a study's curve as a table, CSV or JSON.

    \b
    Example: paretune front default
    """
    from ..optimizer.store import Ledger
    from ..optimizer.study import load_study

    if as_csv and speaker.json:
        raise click.UsageError("--csv and --json: give one")
    found = load_study(Ledger(storage), study)
    text = found.front.to_pandas().to_csv(index=False) if as_csv else _curve(found)
    speaker.result(_study_data(found), text)


def _curve(study: Study) -> str:
    """The front with what it leaves out, the label for unmeasured step times first."""
    lines = [front_table(study)]
    if not study.targets:
        lines.append("load: traffic that one replica carries, as a multiple of the recorded rate")
    if study.price is not None:
        lines.append(price_words(study.price.source, study.price.as_of))
    if not study.measured_steps:
        lines.append(NOT_MEASURED)
    return "\n".join([*lines, *(f"not modeled: {each}" for each in study.not_modeled)])


@click.command()
@click.argument("study", default="default")
@storage_option
@click.option("--slo", "slos", multiple=True, help="The cheapest point that holds these; default: the study's targets.")
@click.option("--budget", type=POSITIVE, help="The fastest point within so many dollars (in the study's unit of cost).")
@click.option("--knee", is_flag=True, help="The point after which more money buys little.")
@click.option("--point", type=click.IntRange(min=1), help="The point of this number in `paretune front`.")
@click.option("--confidence", type=Finite(0.0, 0.999), default=0.9, show_default=True)
@compare_prices_option
@click.option("--token-prices", "token_prices_path", type=EXISTING, help="Your token prices (CSV) in place of ours.")
@click.option("--token-model", help="The model's name among token prices; default: that of the study's model.")
@click.option("-o", "--output", type=OUTPUT, default="out/spec.yaml", show_default=True)
@speaks
def pick(
    speaker: Speaker,
    study: str,
    storage: str,
    slos: tuple[str, ...],
    budget: float | None,
    knee: bool,
    point: int | None,
    confidence: float,
    compare_prices: tuple[str, ...],
    token_prices_path: str | None,
    token_model: str | None,
    output: str,
) -> None:
    """Choose a point of the curve and write its deployment spec.

    Beside it stand the winner under every price sheet, the energy of a token, inferred from the devices' greatest
    power, and what others ask for tokens of the same model.

    \b
    Example: paretune pick default --slo 'ttf30:p95<=600ms' -o out/spec.yaml
    """
    from ..optimizer.bill import bill_of_pick
    from ..optimizer.tuning import pick_spec
    from ..reports.bill import bill_words
    from ..traces.metrics import usd_per_month

    ways = {"--slo": bool(slos), "--budget": budget is not None, "--knee": knee, "--point": point is not None}
    if sum(ways.values()) > 1:
        given = ", ".join(name for name, used in ways.items() if used)
        raise click.UsageError(f"{given}: these are several ways to choose; give one")
    source = click.get_current_context().get_parameter_source("confidence")
    if source is ParameterSource.COMMANDLINE and (budget is not None or knee or point is not None):
        raise click.UsageError("--confidence goes with targets, not with --budget, --knee or --point")
    way: dict[str, Any] = {"slos": slos, "budget_usd": budget, "knee": knee, "confidence": confidence}
    chosen, deployment = pick_spec(study, storage, **way, point=point, output=output)
    bill = bill_of_pick(
        study,
        storage,
        chosen,
        **way,
        compare_prices=compare_prices,
        token_prices_path=token_prices_path,
        token_model=token_model,
    )
    data = {"written": output, "deployment": deployment.model_dump(mode="json"), **bill.to_dict()}
    lines = [f"wrote {output}: {deployment_words(chosen)}"]
    for each in deployment.predicted:
        if each.percentile in (50, 95):
            interval = _interval(each, milliseconds)
            lines.append(f"  {each.metric} p{each.percentile:g}: {milliseconds(each.value)} ms{interval}")
        elif each.metric == "usd_per_million_tokens":
            lines.append(f"  $ per million tokens: {dollars(each.value)}{_interval(each, dollars)}")
        elif each.metric == "usd_per_hour":
            month = f"{dollars(usd_per_month(each.value))} a month"
            lines.append(f"  $ an hour: {dollars(each.value)}{_interval(each, dollars)}, {month}")
    if deployment.provenance is not None:
        origin = deployment.provenance
        if not chosen.values:
            lines.append(f"  all of it at {origin.rate:.3g} x the recorded rate, {chosen.load:.3g} x for each replica")
        lines.append(price_words(origin.prices, origin.prices_as_of))
        if not origin.measured:
            lines.append(NOT_MEASURED)
    speaker.result(data, "\n".join([*lines, *bill_words(bill, deployment_words)]))


def dollars(usd: float) -> str:
    """As tables print money, under a heading that names it."""
    return f"{usd:,.4g}"


def _interval(prediction: Prediction, text: Callable[[float], str]) -> str:
    """Of a prediction, in brackets; nothing where it has none."""
    if prediction.low is None or prediction.high is None:
        return ""
    return f" ({text(prediction.low)} to {text(prediction.high)})"


COMMANDS = (simulate, tune, front, pick)
