"""What commands that make a run say of it: how sure its percentiles are, its worst five minutes, its head-room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..output import table
from .numbers import NOT_NEGATIVE

if TYPE_CHECKING:
    from ..optimizer.head_room import HeadRoom
    from ..traces.confidence import Estimate
    from ..traces.metrics import Target
    from ..traces.trace import Trace
    from ..traces.worst_window import WorstWindow


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
