"""`paretune serve | replay | verify`: the running server."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from ..output import Speaker, speaks, table
from .arrival_words import Waiting, arrival_options, arrival_words
from .machine import OUTPUT
from .numbers import NOT_NEGATIVE, POSITIVE
from .run_words import (
    check_k,
    goodput_of,
    milliseconds,
    note_words,
    protocol_options,
    samples_text,
    summary_table,
    worst_text,
)
from .source_options import EXISTING
from .traces import LOG

VERIFICATION_FAILED = 5
FOLDER = click.Path(exists=True, file_okay=False)


@click.command()
@click.argument("spec", type=EXISTING)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--request-log", type=OUTPUT, help="One JSON line a request, which `trace` and `retune` read; no text.")
@click.option("--step-log", type=OUTPUT, help="One JSON line an engine step, for calibration.")
@click.option("--api-key-file", type=EXISTING, help="File with the keys that clients may send, one a line.")
@click.option("--served-model-name", help="The model's name for clients.")
@click.option("--allow-anyone", is_flag=True, help="Listen beyond this machine without a key.")
@click.option("--adapter-dir", type=FOLDER, help="LoRA adapters in it may be loaded and unloaded by clients.")
def serve(
    spec: str,
    host: str,
    port: int,
    request_log: str | None,
    step_log: str | None,
    api_key_file: str | None,
    served_model_name: str | None,
    allow_anyone: bool,
    adapter_dir: str | None,
) -> None:
    """Serve a deployment over an OpenAI-compatible API until Ctrl-C or SIGTERM; streams that run are finished first.

    A key may also come in the environment variable PARETUNE_API_KEY. SIGHUP reads the spec again: batch limits, queue
    limit and tiles change at once; for the rest new replicas are loaded, and no request is dropped.

    \b
    Example: paretune serve out/spec.yaml --request-log out/requests.jsonl
    """
    from ..runtime.parallel import thread_environment, usable_cores
    from ..runtime.server import serve as run
    from ..runtime.spec import CPU, load_deployment

    deployment = load_deployment(spec)
    # taken out: the replicas inherit what is left
    from_environment = os.environ.pop("PARETUNE_API_KEY", None)
    api_keys = [] if from_environment is None else [from_environment]
    if api_key_file is not None:
        with open(api_key_file) as stream:
            # an empty file is an empty key, which is refused
            api_keys += [line.strip() for line in stream if line.strip()] or [""]
    pool, cores = deployment.pool, usable_cores()
    busy = pool.devices_per_replica * pool.replicas
    if pool.accelerator == CPU and busy > cores:
        click.echo(f"warning: {busy} threads on {cores} cores: they take turns, so every step takes longer", err=True)
    os.environ.update(thread_environment(deployment.pool))
    sys.exit(
        run(
            deployment,
            host=host,
            port=port,
            request_log=request_log,
            step_log=step_log,
            api_keys=api_keys,
            served_model_name=served_model_name,
            allow_anyone=allow_anyone,
            spec_file=spec,
            adapter_dir=adapter_dir,
        )
    )


def schedule_kept(late_s: Mapping[str, float]) -> str:
    """How well a replay kept the recorded arrival times."""
    p50, p95, most = (milliseconds(late_s[name]) for name in ("p50", "p95", "max"))
    return f"schedule kept within {p50} ms (p50), {p95} ms (p95), {most} ms (most)"


def warn_of(errors: Sequence[str], speaker: Speaker) -> None:
    """The first ten requests that failed, and how many more."""
    for error in errors[:10]:
        speaker.warn(error)
    if len(errors) > 10:
        speaker.warn(f"and {len(errors) - 10} more requests failed")


record_option = click.option(
    "--record", type=click.Path(file_okay=False), help="Keep the run in this folder, for `explain --analyze`."
)


def _check_record(record: str | None, ramp_s: float, length_jitter: float, waiting: Waiting) -> None:
    if record is not None and waiting.asked:
        raise click.UsageError("--record keeps a run that `explain` can predict, an open loop: leave one of them out")
    if record is not None and (ramp_s or length_jitter):
        raise click.UsageError("--record keeps a run of the log as it is: leave out --ramp and --length-jitter")


@click.command()
@click.argument("log", type=LOG)
@click.option("--url", required=True, help="Of an OpenAI-compatible server.")
@click.option("--model", help="The name to ask for; default: the first that the server has.")
@click.option("--rate", type=POSITIVE, default=1.0, show_default=True, help="Arrivals that many times as fast.")
@click.option("-k", type=click.IntRange(min=1), default=30, show_default=True, help="Of TTF-k.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the prompts' tokens.")
@click.option("--timeout", type=POSITIVE, default=600.0, show_default=True, help="Seconds for one request.")
@record_option
@arrival_options
@protocol_options
@speaks
def replay(
    speaker: Speaker,
    log: str,
    url: str,
    model: str | None,
    rate: float,
    k: int,
    seed: int,
    timeout: float,
    record: str | None,
    warm_up_s: float,
    ramp_s: float,
    length_jitter: float,
    waiting: Waiting,
) -> None:
    """Send a request log's requests to a running server at their recorded times, and measure.

    The key, if the server wants one, comes in the environment variable PARETUNE_API_KEY.

    \b
    Example: paretune replay log.parquet --url http://127.0.0.1:8000
    """
    from ..optimizer.capacity import Owed
    from ..profiler.analyze import save_run
    from ..profiler.replay import replay as run
    from ..traces import read
    from ..traces.confidence import estimates, plain
    from ..traces.metrics import summarize
    from ..traces.run_protocol import RunProtocol
    from ..traces.worst_window import worst_windows

    _check_record(record, ramp_s, length_jitter, waiting)
    protocol = RunProtocol(warm_up_s, ramp_s, length_jitter, seed)
    recorded = read(log)
    arrivals = waiting.arrivals(recorded, rate, ramp_s)
    trace = protocol.applied(recorded)
    check_k(k, trace.targets)
    with speaker.progress("replaying") as report:
        result = run(
            trace,
            url,
            k=k,
            seed=seed,
            rate=rate,
            api_key=os.environ.get("PARETUNE_API_KEY"),
            model=model,
            timeout_s=timeout,
            arrivals=arrivals,
            progress=lambda ended, all_: report(ended / all_, f"{ended:,} of {all_:,} requests"),
        )
    warn_of(result.errors, speaker)
    if record is not None:
        save_run(record, trace, result, rate)
    counted = protocol.counted(result.times)
    summary = summarize(result.times, counted)
    goodput_per_s = goodput_of(result.times, Owed(trace, trace.targets, counted))
    samples, worst = estimates(result.times, rows=counted), worst_windows(result.times, rows=counted)
    lines = [summary_table(summary, goodput_per_s), samples_text(samples), worst_text(worst)]
    lines += [protocol.words(result.times), arrival_words(arrivals, rate), *note_words(trace)]
    lines.append(schedule_kept(result.schedule_error_s))
    data = {
        "summary": summary.to_dict(),
        "samples": plain(samples),
        "worst_window": worst,
        "protocol": vars(protocol),
        "arrivals": arrival_words(arrivals, rate).split("\n"),
        "notes": trace.notes,
        "goodput_per_s": goodput_per_s,
        "schedule_error_s": result.schedule_error_s,
        "errors": result.errors,
        "server": result.server,
        "client_cpu_s": result.client_cpu_s,
    }
    exit_code = 1 if result.errors else 0
    speaker.result(data, "\n".join(lines), exit_code)
    sys.exit(exit_code)


@click.command()
@click.argument("spec", type=EXISTING)
@click.argument("log", type=LOG)
@click.option("--slo", "slos", multiple=True, help="What must hold; default: the spec's targets.")
@click.option("-o", "--output", type=OUTPUT, default="out/verification.json", show_default=True, help="For `report`.")
@record_option
@click.option("--warm-up", "warm_up_s", type=NOT_NEGATIVE, default=0.0, help="First seconds, not counted.")
@speaks
def verify(
    speaker: Speaker,
    spec: str,
    log: str,
    slos: tuple[str, ...],
    output: str,
    record: str | None,
    warm_up_s: float,
) -> None:
    """Start a spec's server, replay the log against it, and hold what was predicted against what was measured.

    Exits with 5 when a target is missed.

    \b
    Example: paretune verify out/spec.yaml log.parquet
    """
    from ..optimizer.verify import asked_of
    from ..optimizer.verify import verify as compare
    from ..profiler.analyze import STEPS_FILE, save_run
    from ..profiler.live import measure_live
    from ..runtime.spec import load_deployment
    from ..traces import Target, read
    from ..traces.run_protocol import RunProtocol, counted_part

    deployment = load_deployment(spec)
    trace = read(log)
    targets = [Target.parse(text) for text in slos]
    k, rate = asked_of(deployment, trace, targets)
    if rate != 1.0:
        speaker.note(f"replaying at {rate:.3g} x the recorded rate, which the spec's predictions speak of")
    with speaker.progress("replaying") as report:
        result = measure_live(
            deployment,
            trace,
            k=k,
            rate=rate,
            step_log=None if record is None else _fresh(Path(record) / STEPS_FILE),
            progress=lambda ended, all_: report(ended / all_, f"{ended:,} of {all_:,} requests"),
        )
    warn_of(result.errors, speaker)
    if record is not None:
        save_run(record, trace, result, rate)
    protocol = RunProtocol(warm_up_s)
    replayed, times = counted_part(protocol, trace, result.times)
    found = compare(deployment, replayed, times, targets=targets, schedule_error_s=result.schedule_error_s)
    found.save(output)
    if found.same_trace is False:
        speaker.warn(f"{log} is not the trace that {spec} was tuned on: its predictions speak of another workload")
    rows = [
        [
            f"{row.metric} p{row.percentile:g}",
            milliseconds(row.predicted),
            f"{milliseconds(row.low)} to {milliseconds(row.high)}",
            milliseconds(row.measured),
            f"{row.error:+.0%}",
            "inside" if row.inside else "outside",
        ]
        for row in found.rows
    ]
    lines = (
        [table(["milliseconds", "predicted", "90 % interval", "measured", "error", "interval"], rows)] if rows else []
    )
    inside = sum(row.inside for row in found.rows)
    if rows:
        lines.append(f"{inside} of {len(rows)} measured values lie inside their interval")
    lines += [f"{'met' if met else 'MISSED'}: {target}" for target, met in found.met.items()]
    lines.append(f"{found.summary.finished:,} of {found.summary.requests:,} requests finished")
    lines += [samples_text(found.samples), worst_text(found.worst), protocol.words(result.times), *note_words(trace)]
    lines.append(schedule_kept(found.schedule_error_s))
    exit_code = 0 if found.passed else VERIFICATION_FAILED
    speaker.result(
        {"verification": found, "protocol": vars(protocol), "notes": trace.notes, "passed": found.passed},
        "\n".join(lines),
        exit_code,
    )
    sys.exit(exit_code)


def _fresh(path: Path) -> Path:
    """A step log of this run alone: servers append to what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


COMMANDS = (serve, replay, verify)
