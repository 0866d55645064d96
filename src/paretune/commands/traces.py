"""`paretune trace ...`: request logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..output import Speaker, speaks

if TYPE_CHECKING:
    from ..traces.describe import AppStatistics, Lengths, Statistics

LOG = click.Path(exists=True, dir_okay=False)
FORMATS = click.Choice(["azure", "burstgpt", "llmservingsim", "mooncake", "openai", "parquet"])
format_option = click.option("--format", "format_", type=FORMATS, help="Do not sniff the format.")


@click.group()
def trace() -> None:
    """Look at request logs, convert, cut and scale them."""


def _lengths(name: str, lengths: Lengths) -> str:
    return (
        f"  {name:<14} mean {lengths.mean:,.0f}   p50 {lengths.p50:,.0f}   p90 {lengths.p90:,.0f}   "
        f"p95 {lengths.p95:,.0f}   p99 {lengths.p99:,.0f}   max {lengths.max:,}"
    )


def _application(app: AppStatistics, title: str, window_s: float) -> list[str]:
    reuse = "no prefix hashes recorded" if app.prefix_reuse is None else f"{app.prefix_reuse:.1%} of input tokens"
    lines = [
        title,
        f"  requests       {app.requests:,} ({app.share:.1%}), {app.rate_per_s:.3g} per second",
        f"  burstiness     inter-arrival CV {app.interarrival_cv:.2f}, index of dispersion {app.dispersion:.2f}"
        f" (counts per {window_s:g} s; Poisson: 1 and 1)",
        _lengths("input tokens", app.input),
        _lengths("output tokens", app.output),
        f"  input : output {app.input_output_ratio:.2f}",
        f"  prefix reuse   {reuse}",
    ]
    if app.sessions:
        lines.append(f"  sessions       {app.sessions:,}")
    if app.acceptance is not None:
        found = app.acceptance
        lines.append(
            f"  speculation    {found.accepted_share:.1%} of {found.draft_tokens:,} proposed tokens kept; proposals in "
            f"{found.drafted_share:.1%} of the steps after a first token"
        )
    if app.adapters:
        lines.append("  adapters       " + ", ".join(f"{name} {count:,}" for name, count in app.adapters))
    return lines


def describe_text(statistics: Statistics) -> str:
    """What `trace describe` prints."""
    lines = [f"{statistics.source}: {statistics.total.requests:,} requests in {statistics.duration_s:,.1f} s"]
    lines += [f"note: {note}" for note in statistics.notes]
    lines += ["targets: " + (", ".join(statistics.targets) or "none recorded"), ""]
    lines += _application(statistics.total, "all applications", statistics.dispersion_window_s)
    for app in statistics.apps if len(statistics.apps) > 1 else ():
        lines += ["", *_application(app, f"application {app.app or '(none)'}", statistics.dispersion_window_s)]
    return "\n".join(lines)


@trace.command()
@click.argument("log", type=LOG)
@format_option
@speaks
def describe(speaker: Speaker, log: str, format_: str | None) -> None:
    """Show what a request log contains, application by application.

    \b
    Example: paretune trace describe azure.csv
    """
    from ..traces import read, statistics

    found = statistics(read(log, format=format_))
    speaker.result(found, describe_text(found))


@trace.command()
@click.argument("log", type=LOG)
@format_option
@speaks
def check(speaker: Speaker, log: str, format_: str | None) -> None:
    """Read a request log and say whether it is valid.

    \b
    Example: paretune trace check azure.csv
    """
    from ..traces import read

    found = read(log, format=format_)
    data = {"requests": len(found), "duration_s": found.duration_s, "digest": found.digest(), "notes": found.notes}
    notes = "".join(f"\nnote: {note}" for note in found.notes)
    speaker.result(data, f"{log}: valid, {len(found):,} requests over {found.duration_s:,.1f} s{notes}")


def _written(speaker: Speaker, output: str, requests: int, notes: tuple[str, ...]) -> None:
    for note in notes:
        speaker.warn(note)
    speaker.result({"written": output, "requests": requests}, f"wrote {output}: {requests:,} requests")


@trace.command()
@click.argument("log", type=LOG)
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="Parquet file to write.")
@click.option(
    "--target", "targets", multiple=True, help="A target the trace carries, such as 'voice: ttf30 p95 600 ms'."
)
@format_option
@speaks
def convert(speaker: Speaker, log: str, output: str, targets: tuple[str, ...], format_: str | None) -> None:
    """Write a request log as Parquet, with the targets it carries.

    \b
    Example: paretune trace convert azure.csv -o azure.parquet --target 'ttf30 p95 600 ms'
    """
    from ..traces import Target, read, with_targets, write

    found = read(log, format=format_)
    if targets:
        found = with_targets(found, [Target.parse(text) for text in targets])
    write(found, output)
    _written(speaker, output, len(found), found.notes)


@trace.command()
@click.argument("log", type=LOG)
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="Parquet file to write.")
@click.option("--requests", "-n", type=click.IntRange(min=1), help="Keep so many requests, at random.")
@click.option("--start", type=float, default=0.0, show_default=True, help="Keep from this second of the log on.")
@click.option("--duration", type=float, help="Keep so many seconds of the log.")
@click.option("--seed", type=int, default=0, show_default=True)
@format_option
@speaks
def sample(
    speaker: Speaker,
    log: str,
    output: str,
    requests: int | None,
    start: float,
    duration: float | None,
    seed: int,
    format_: str | None,
) -> None:
    """Cut a window out of a request log, or keep a random part of it.

    \b
    Example: paretune trace sample azure.csv -o window.parquet --start 600 --duration 300
    """
    from ..traces import read, window, write
    from ..traces import sample as sampled

    found = read(log, format=format_)
    if start or duration is not None:
        end_s = float(found.arrival_s[-1]) + 1.0 if duration is None else start + duration
        found = window(found, start, end_s)
    if requests is not None:
        found = sampled(found, n=requests, seed=seed)
    write(found, output)
    _written(speaker, output, len(found), found.notes)


@trace.command()
@click.argument("log", type=LOG)
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="Parquet file to write.")
@click.option("--rate", type=float, default=1.0, show_default=True, help="Arrivals that many times as fast.")
@click.option("--input-length", type=float, default=1.0, show_default=True, help="Prompts that many times as long.")
@click.option("--output-length", type=float, default=1.0, show_default=True, help="Answers that many times as long.")
@click.option("--max-tokens", type=click.IntRange(min=2), help="Cut requests to so many tokens in all.")
@format_option
@speaks
def scale(
    speaker: Speaker,
    log: str,
    output: str,
    rate: float,
    input_length: float,
    output_length: float,
    max_tokens: int | None,
    format_: str | None,
) -> None:
    """What if traffic came faster, or requests were longer or shorter?

    \b
    Example: paretune trace scale azure.csv -o double.parquet --rate 2
    """
    from ..traces import read, write
    from ..traces import scale as scaled

    found = scaled(
        read(log, format=format_),
        rate=rate,
        input_length=input_length,
        output_length=output_length,
        max_tokens=max_tokens,
    )
    write(found, output)
    _written(speaker, output, len(found), found.notes)


COMMANDS = (trace,)
