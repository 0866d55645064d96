"""`paretune tune | front | pick`: from a request log to a chosen spec."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..default_paths import LEDGER
from ..output import Speaker, speaks, table
from .machine import MODEL, OUTPUT
from .numbers import NOT_NEGATIVE, POSITIVE, Finite
from .run_words import NOT_MEASURED, milliseconds
from .source_options import EXISTING, calibration_option, prices_option, profile_option, table_options
from .traces import LOG

if TYPE_CHECKING:
    from ..optimizer.front import Evaluation
    from ..optimizer.study import Study
    from ..runtime.spec import Prediction

NOTHING_FEASIBLE = 3
OUT_OF_TIME = 75

# Reasons may name all that would have been allowed; --json has them whole.
REASON_LENGTH = 100

storage_option = click.option("--storage", default=LEDGER, show_default=True, help="Ledger: a file or postgresql://...")
compare_prices_option = click.option(
    "--compare-prices", multiple=True, type=EXISTING, help="Further price books: the winner under each of their sheets."
)
accelerator_option = click.option(
    "--accelerator", default="cpu", show_default=True, help="Name in the catalog; 'cpu' is this machine."
)


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


COMMANDS = (tune, front, pick)
