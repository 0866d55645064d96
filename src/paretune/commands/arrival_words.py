"""When requests are sent: the options of `simulate` and `replay` that say so, and what they print of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from typing import TYPE_CHECKING, Any

import click

from .numbers import NOT_NEGATIVE

if TYPE_CHECKING:
    from ..traces.sessions import DependentArrivals
    from ..traces.trace import Trace

COUNT = click.IntRange(min=1)

# option -> its name as a parameter, and what click is told; all of them are off unless asked for
_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "--sessions": (
        "by_session",
        {"is_flag": True, "help": "A session's next request waits for the end of its last, and the pause."},
    ),
    "--pause": ("pause_s", {"type": NOT_NEGATIVE, "help": "Seconds of every pause; default: as recorded."}),
    "--recorded-ttft": (
        "recorded_ttft_s",
        {"type": NOT_NEGATIVE, "help": "Where no pause is recorded: seconds to first tokens of the recorded server."},
    ),
    "--recorded-tpot": (
        "recorded_tpot_s",
        {"type": NOT_NEGATIVE, "help": "Its seconds for each other token; what is left of a gap is the pause."},
    ),
    "--clients": ("clients", {"type": COUNT, "help": "Closed loop: each sends its next when its last has ended."}),
    "--think-time": (
        "think_time_s",
        {"type": NOT_NEGATIVE, "help": "Seconds that a client waits before its next; default: 0."},
    ),
    "--max-concurrency": ("max_concurrency", {"type": COUNT, "help": "As recorded, with at most so many open."}),
}


def arrival_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Who waits for whom; without any of them requests come as recorded. They are handed on as one `waiting`."""

    def gathered(**options: Any) -> Any:
        own = {name: options.pop(name) for name, _ in _OPTIONS.values()}
        return command(**options, waiting=Waiting(**own))

    update_wrapper(gathered, command)
    for option, (name, settings) in reversed(_OPTIONS.items()):
        gathered = click.option(option, name, **settings)(gathered)
    return gathered


@dataclass(frozen=True)
class Waiting:
    """What was asked for; None and False: it was not."""

    by_session: bool
    pause_s: float | None
    recorded_ttft_s: float | None
    recorded_tpot_s: float | None
    clients: int | None
    think_time_s: float | None
    max_concurrency: int | None

    @property
    def given(self) -> dict[str, bool]:
        """Each option, and whether it was given."""
        values = {option: getattr(self, name) for option, (name, _) in _OPTIONS.items()}
        return {option: value is not None and value is not False for option, value in values.items()}

    @property
    def asked(self) -> bool:
        return self.by_session or self.clients is not None or self.max_concurrency is not None

    def arrivals(self, trace: Trace, rate: float, ramp_s: float) -> DependentArrivals | None:
        """Of a log as it was read; None: an open loop. Raises: click.UsageError: options that contradict each other."""
        from ..traces.sessions import RecordedService, closed_loop, limited, sessions

        self._check(rate, ramp_s)
        recorded = None
        if self.recorded_ttft_s is not None and self.recorded_tpot_s is not None:
            recorded = RecordedService(self.recorded_ttft_s, self.recorded_tpot_s)
        think_s = self.think_time_s or 0.0
        if self.by_session:
            return sessions(trace, pause_s=self.pause_s, recorded=recorded, clients=self.clients or 0, think_s=think_s)
        if self.clients is not None:
            return closed_loop(trace, self.clients, think_s)
        return None if self.max_concurrency is None else limited(trace, self.max_concurrency)

    def _check(self, rate: float, ramp_s: float) -> None:
        typed = [name for name in ("--pause", "--recorded-ttft", "--recorded-tpot") if self.given[name]]
        if not self.by_session and typed:
            raise click.UsageError(f"{', '.join(typed)}: of the turns of sessions: give --sessions")
        if (self.recorded_ttft_s is None) != (self.recorded_tpot_s is None):
            other = "--recorded-tpot" if self.recorded_tpot_s is None else "--recorded-ttft"
            raise click.UsageError(f"{typed[-1]}: half of how fast the recorded server was: give {other}, too")
        if self.pause_s is not None and self.recorded_ttft_s is not None:
            raise click.UsageError("--pause and --recorded-ttft both say how long pauses are: give one")
        if self.think_time_s is not None and self.clients is None:
            raise click.UsageError("--think-time is what a client waits: give --clients")
        if self.max_concurrency is not None and (self.clients is not None or self.by_session):
            raise click.UsageError("--max-concurrency keeps recorded arrivals: leave out --clients and --sessions")
        if self.clients is not None and (rate != 1.0 or ramp_s):
            raise click.UsageError("--clients uses no recorded arrivals: leave out --rate and --ramp")


def arrival_words(arrivals: DependentArrivals | None, rate: float) -> str:
    """How requests were sent, for people."""
    if arrivals is None:
        return "open loop: every request at its recorded arrival"
    pauses = "; pauses stay as they are" if rate != 1.0 and (arrivals.after >= 0).any() else ""
    return "\n".join([*arrivals.words]) + pauses
