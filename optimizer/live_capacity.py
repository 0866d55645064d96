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


@dataclass(frozen=True)
class LoadRun:
    """One replay at a multiple of the recorded rate."""

    rate: float
    holds: bool
    summary: Summary


@dataclass(frozen=True)
class LiveCapacity:
    """Between which multiples of the recorded rate the targets cease to hold.

    low     highest rate seen to hold; 0 = none
    high    lowest rate above it that was seen to fail; infinite = none
    runs    every replay, in order
    """

    low: float
    high: float
    runs: tuple[LoadRun, ...]

    @property
    def rate(self) -> float:
        """The middle of the bracket on a log scale; its known end where the other is open."""
        if self.low == 0.0:
            return self.high
        return self.low if math.isinf(self.high) else math.sqrt(self.low * self.high)

    @property
    def output_tokens_per_s(self) -> float:
        """At `low`; NaN where no rate held."""
        held = [run.summary.output_tokens_per_s for run in self.runs if run.holds and run.rate == self.low]
        return held[0] if held else math.nan


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

    Steps of 15 % away from the guess until one run holds and one fails, then the middle; the answer's resolution is the
    bracket that is returned.

    Args:
        guess: multiple of the recorded rate where the simulator puts the capacity.
        replays: how many may be spent.
    Raises: ServerFailed, BadModel.
    """
    token_ids = prompt_token_ids(resolve_model(deployment.model))
    low, high, rate = 0.0, math.inf, guess
    runs: list[LoadRun] = []
    with live_server(deployment) as server:
        warm_server(server, trace, token_ids)
        for number in range(replays):
            if progress is not None:
                progress(number / replays, f"{rate:.2f} x the recorded rate")
            times = replay(trace, server.url, k=k, rate=rate, model=server.model, token_ids=token_ids).times
            holds = all(meets(times, target, governed_rows(trace, target)) for target in targets)
            runs.append(LoadRun(rate, holds, summarize(times)))
            if holds:
                low = max(low, rate)
            else:
                high = min(high, rate)
            if low == 0.0:
                rate = high / 1.15
            elif math.isinf(high):
                rate = low * 1.15
            else:
                rate = math.sqrt(low * high)
    return LiveCapacity(low, high if high > low else math.inf, tuple(runs))
