"""The capacity of a deployment on the live runtime: one server, replays at several rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..profiler.live import live_server, warm_server
from ..profiler.replay import prompt_token_ids, replay
from ..profiler.simulator import governed_rows
from ..runtime.model_shape import resolve_model
from ..runtime.spec import Deployment
from ..traces.metrics import Summary, Target, meets, summarize
from ..traces.trace import Trace

# The first step away from a guess, and how much each further one grows: three steps reach a factor of 2.6.
STRIDE = 1.2
STRIDE_GROWTH = 1.5
_FIRST_SEED = 100


@dataclass(frozen=True)
class Bracket:
    """Between which multiples of the recorded rate the targets cease to hold.

    low   highest rate seen to hold; 0 = none
    high  lowest rate above it that was seen to fail; infinite = none
    """

    low: float
    high: float

    @property
    def rate(self) -> float:
        """The middle on a log scale; where one end is open, the other."""
        if self.low == 0.0:
            return self.high
        return self.low if math.isinf(self.high) else math.sqrt(self.low * self.high)


def bracket(holds: Callable[[float], bool], *, guess: float, runs: int) -> Bracket:
    """Ask `holds(rate)` `runs` times: growing steps away from a guess until one holds and one fails, then middles."""
    low, high, rate, stride = 0.0, math.inf, guess, STRIDE
    for _ in range(runs):
        if holds(rate):
            low = rate
        else:
            high = rate
        if low == 0.0:
            rate, stride = high / stride, stride**STRIDE_GROWTH
        elif math.isinf(high):
            rate, stride = low * stride, stride**STRIDE_GROWTH
        else:
            rate = math.sqrt(low * high)
    return Bracket(low, high)


@dataclass(frozen=True)
class LoadRun:
    """One replay at a multiple of the recorded rate."""

    rate: float
    holds: bool
    summary: Summary


@dataclass(frozen=True)
class LiveCapacity:
    """What the replays showed; runs in order."""

    bracket: Bracket
    runs: tuple[LoadRun, ...]

    @property
    def output_tokens_per_s(self) -> float:
        """At the highest rate that was seen to hold; NaN where none did."""
        held = [run for run in self.runs if run.holds and run.rate == self.bracket.low]
        return held[0].summary.output_tokens_per_s if held else math.nan


def live_capacity(
    deployment: Deployment,
    trace: Trace,
    targets: Sequence[Target],
    *,
    guess: float,
    replays: int = 4,
    k: int = 30,
    progress: Callable[[float, str], None] | None = None,
) -> LiveCapacity:
    """Replay a trace against a live server at rates around `guess`, and bracket the highest that holds the targets.

    Args:
        guess: multiple of the recorded rate where the simulator puts the capacity.
        replays: how many may be spent; they decide how narrow the bracket is.
    Raises: ServerFailed, BadModel.
    """
    token_ids = prompt_token_ids(resolve_model(deployment.model))
    runs: list[LoadRun] = []
    with live_server(deployment) as server:
        warm_server(server, trace, token_ids)

        def holds(rate: float) -> bool:
            if progress is not None:
                progress(len(runs) / replays, f"{rate:.2f} x the recorded rate")
            # other prompts each time: those of the runs before, and of the warm-up, are in the server's prefix cache
            seed = _FIRST_SEED + len(runs)
            times = replay(trace, server.url, k=k, seed=seed, rate=rate, model=server.model, token_ids=token_ids).times
            held = all(meets(times, target, governed_rows(trace, target)) for target in targets)
            runs.append(LoadRun(rate, held, summarize(times)))
            return held

        found = bracket(holds, guess=guess, runs=replays)
    return LiveCapacity(found, tuple(runs))
