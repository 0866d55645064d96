"""What commands that make a run say of it: how sure its percentiles are, its worst five minutes, its head-room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..output import table
from .arrival_words import arrival_words
from .numbers import NOT_NEGATIVE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..optimizer.capacity import Owed
    from ..optimizer.head_room import HeadRoom
    from ..profiler.simulator import SimulationResult
    from ..runtime.spec import Deployment
    from ..traces.confidence import Estimate
    from ..traces.metrics import RequestTimes, Summary, Target
    from ..traces.run_protocol import RunProtocol
    from ..traces.sessions import DependentArrivals
    from ..traces.trace import Trace
    from ..traces.worst_window import WorstWindow

NOT_MEASURED = "NOT MEASURED: step times come from a data sheet, or from single operators"


def milliseconds(value_s: float) -> str:
    """As tables print a latency."""
    return "-" if value_s != value_s else f"{value_s * 1e3:,.1f}"


def protocol_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a run is made of the log; all three are off unless asked for, and printed."""
    for option in (
        click.option("--length-jitter", type=NOT_NEGATIVE, default=0.0, help="Relative spread added to lengths."),
        click.option("--ramp", "ramp_s", type=NOT_NEGATIVE, default=0.0, help="Seconds in which the rate rises."),
        click.option("--warm-up", "warm_up_s", type=NOT_NEGATIVE, default=0.0, help="First seconds, not counted."),
    ):
        command = option(command)
    return command


def note_words(trace: Trace) -> list[str]:
    """What reading the log left out or changed."""
    return [f"note: {note}" for note in trace.notes]


def missed_words(missed: Sequence[tuple[Target, float]]) -> list[str]:
    """Targets that a simulated run does not hold, each with its percentile in seconds."""
    return [f"missed: {target} (simulated {milliseconds(value_s)} ms)" for target, value_s in missed]


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


class SimulatedRun(NamedTuple):
    """What is said of any simulated run, of one pool or two.

    counted  (requests,) bool  those that count
    lines    for people, up to the steps
    missed   one line for each target that does not hold
    data     for --json
    """

    counted: NDArray[Any]
    lines: list[str]
    missed: list[str]
    data: dict[str, Any]


def simulated_run(
    result: SimulationResult,
    trace: Trace,
    targets: tuple[Target, ...],
    protocol: RunProtocol,
    arrivals: DependentArrivals | None,
    *,
    rate: float,
    measured: bool,
    relative_error: float,
) -> SimulatedRun:
    """Describe a run.

    measured, relative_error: of the step times (ModeledStep).
    """
    from ..optimizer.capacity import Owed
    from ..traces.confidence import estimates, plain
    from ..traces.metrics import summarize, violations
    from ..traces.worst_window import worst_windows

    counted = protocol.counted(result.times)
    owed = Owed(trace, targets, counted)
    summary, goodput_per_s = summarize(result.times, counted), goodput_of(result.times, owed)
    missed = violations(result.times, owed)
    samples, worst = estimates(result.times, rows=counted), worst_windows(result.times, rows=counted)
    lines = [
        summary_table(summary, goodput_per_s),
        samples_text(samples),
        worst_text(worst),
        protocol.words(result.times),
        arrival_words(arrivals, rate),
        *note_words(trace),
        f"{result.steps:,} steps, {result.preemptions:,} preemptions, {result.rejected:,} rejected, "
        f"step times +-{relative_error:.0%}",
    ]
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
        "steps": result.steps,
        "preemptions": result.preemptions,
        "rejected": result.rejected,
        "prefix_hit_tokens": result.prefix_hit_tokens,
        "draft_tokens": result.draft_tokens,
        "accepted_tokens": result.accepted_tokens,
        "measured_step_times": measured,
        "relative_error": relative_error,
    }
    return SimulatedRun(counted, [line for line in lines if line], missed_words(missed), data)


def speculation_words(result: SimulationResult) -> str:
    """How many of the proposed tokens were kept."""
    kept = result.accepted_tokens / max(1, result.draft_tokens)
    return f"{result.draft_tokens:,} tokens proposed, {kept:.0%} of them kept, as often as the log recorded"


def scheduler_not_modeled(deployment: Deployment) -> tuple[str, ...]:
    """That another engine's scheduler was not simulated, where the deployment asks for that engine."""
    if deployment.engine == "paretune":
        return ()
    ran = {"paretune": "paretune's own", "vllm_v1": "paretune's, by the rules of vLLM's V1,"}
    return (f"the scheduler of {deployment.engine}: {ran[deployment.scheduler_policy]} ran in its place",)


def samples_text(found: Sequence[Estimate]) -> str:
    """Intervals of percentiles, and which the run is too short for."""
    by_metric: dict[str, list[Estimate]] = {}
    for each in found:
        by_metric.setdefault(each.metric, []).append(each)
    rows = []
    for metric, those in by_metric.items():
        rows.append(
            [metric, *(f"{milliseconds(e.low)} to {milliseconds(e.high)}{'' if e.enough else ' *'}" for e in those)]
        )
    head = ["90 % intervals, ms", *(f"p{each.percentile:g}" for each in next(iter(by_metric.values()), []))]
    lines = [table(head, rows)]
    for p in dict.fromkeys(each.percentile for each in found):
        short = [each for each in found if each.percentile == p and not each.enough]
        if short:
            worst = max(short, key=lambda each: each.needed_s)
            names = ", ".join(each.metric for each in short)
            lines.append(
                f"* too short for p{p:g} of {names}: about {worst.needed_s:,.0f} s of this traffic would do, "
                f"not {worst.duration_s:,.0f} s ({worst.metric}: {worst.why})"
            )
    return "\n".join(lines)


def worst_text(found: Sequence[WorstWindow]) -> str:
    """The worst five minutes beside the whole."""

    from ..traces.worst_window import WINDOW_S

    if not found:
        return ""
    first = found[0]
    if first.seconds < WINDOW_S:
        return f"worst five minutes: the run has {first.seconds:,.0f} s of arrivals, no more than that"
    rows = []
    for each in found:
        both = [milliseconds(each.whole), milliseconds(each.value)]
        rows.append([each.metric, *both, f"{each.started_s:,.0f} s", f"{each.requests:,}"])
    head = [f"p{first.percentile:g}, ms", "whole run", "worst 5 min", "from", "requests"]
    return table(head, rows)


def room_text(room: HeadRoom) -> str:
    """The most traffic that the whole deployment carries inside its targets."""
    if not room.rate:
        return "head-room: the targets hold at no rate"
    more = "" if room.tolerance < 1 else "; the log is too short to fail at more"
    band = f"({room.low:.2f} to {room.high:.2f})"
    return f"head-room: the targets hold up to {room.rate:.2f} x the recorded rate {band}{more}"
