"""What serving over HTTP adds to the steps, measured with one short replay against a live server and its step log.

Three things: what steps take while HTTP, text and a client take their part of the cores; the time between two steps;
and the time before and after them. No more: what differs between configurations beyond that is in their profile.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from ..runtime.model_shape import ModelShape, resolve_model
from ..runtime.spec import Deployment
from ..traces.trace import Trace
from .live import check_served, measure_live
from .profile import BadProfile, Key, LivePoint, Profile, Serving
from .replay import Progress, ReplayResult
from .simulator import simulate
from .step_time import IDLE_S, StepTables, composed_time_s
from .tables import step_tables

# A longer pause after a step means that the replica had nothing to do, and belongs to no step.
BETWEEN_STEPS_LIMIT_S = 2e-3
_BLOCKS = 10
_LEAST_STEPS = 50
_LEAST_LONE_REQUESTS = 5
_LONE_REQUESTS = 20
_LONE_INPUT, _LONE_OUTPUT = 48, 4
_LOADED_INPUT, _LOADED_OUTPUT = (16, 1024), (8, 96)
_LOAD = 0.6  # of the modeled capacity
_PROBED_REQUESTS = 200  # that say what the capacity is
_LEAST_LOADED_REQUESTS = 20


@dataclass(frozen=True)
class LoggedStep:
    """A line of a server's step log (runtime.engine.StepRecord, and which replica); logs of before had no requests."""

    replica: int
    num_tokens: int
    num_rows: int
    num_samples: int
    decode_context: float
    prefill_pairs: float
    seconds: float
    started_s: float
    requests: Sequence[int] = ()
    starts: Sequence[int] = ()
    tokens: Sequence[int] = ()


_NUMBERS = tuple(name for name in LoggedStep.__dataclass_fields__ if name not in ("requests", "starts", "tokens"))


def read_step_log(path: str | os.PathLike[str], since_s: float = 0.0) -> tuple[LoggedStep, ...]:
    """Steps that began at or after `since_s` (clock of time.perf_counter), in order of time by replica.

    Raises: BadProfile: a line that is no whole step, by its number; OSError.
    """
    steps = []
    with open(path, encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                step = LoggedStep(**json.loads(line))
                if not all(isinstance(getattr(step, name), int | float) for name in _NUMBERS):
                    raise TypeError
                steps.append(step)
            except (ValueError, TypeError, RecursionError):
                allowed = "a whole step, as `paretune serve --step-log` writes it"
                todo = "correct the line (is the file cut off?) and run again"
                raise BadProfile(f"{os.fspath(path)}:{number}", line.strip(), allowed, todo) from None
    kept = [step for step in steps if step.started_s >= since_s]
    return tuple(sorted(kept, key=lambda step: (step.replica, step.started_s)))


def serving_from(
    trace: Trace, result: ReplayResult, steps: Sequence[LoggedStep], tables: StepTables, key: Key, loaded_s: float = 0.0
) -> Serving:
    """What serving added, from a replay and the steps that its server logged.

    Args:
        tables: as modeled without serving.
        key: the configuration that served.
        loaded_s: when in the trace the load begins. Steps before tell what lies outside the steps, and no more: after
            a second with next to nothing to do all steps take up to twice as long.
    Raises: BadProfile: too few steps, or too few requests that were alone in the server.
    """
    again = "calibrate with a longer replay"
    if len(steps) < _LEAST_STEPS:
        raise BadProfile("calibration: steps", len(steps), f"at least {_LEAST_STEPS}", again)
    measured_s = np.array([step.seconds for step in steps])
    modeled_s = np.array(
        [
            composed_time_s(tables, s.num_tokens, s.num_rows, s.num_samples, s.decode_context, s.prefill_pairs)
            for s in steps
        ]
    )
    pause_s = pauses_s(steps)
    follows = np.concatenate([[math.inf], pause_s[:-1]]) < IDLE_S
    loaded = np.array([step.started_s >= result.started_s + loaded_s for step in steps])
    busy: list[int] = np.flatnonzero(follows & loaded).tolist()
    if len(busy) < _LEAST_STEPS:
        raise BadProfile("calibration: steps that followed others", len(busy), f"at least {_LEAST_STEPS}", again)
    blocks = np.array_split(sorted(busy, key=lambda i: steps[i].started_s), _BLOCKS)
    ratios = np.array([measured_s[block].sum() / modeled_s[block].sum() for block in blocks])
    low, high = np.quantile(ratios, (0.05, 0.95))
    before_s, after_s = _lone_requests(trace, result, steps)
    if len(before_s) < _LEAST_LONE_REQUESTS:
        raise BadProfile("calibration: lone requests", len(before_s), f"at least {_LEAST_LONE_REQUESTS}", again)
    return Serving(
        cores=key.cores,
        ranks=key.ranks,
        points=live_points([steps[i] for i in busy], pause_s[busy]),
        spread=float(high - low) / 2 / float(measured_s[busy].sum() / modeled_s[busy].sum()),
        between_steps_s=float(np.median(known)) if len(known := pause_s[pause_s < BETWEEN_STEPS_LIMIT_S]) else 0.0,
        after_idle_s=_after_idle_s(steps, follows & loaded, ~follows & loaded, measured_s, modeled_s),
        to_scheduler_s=max(0.0, float(np.median(before_s))),
        to_client_s=max(0.0, float(np.median(after_s))),
        steps=len(busy),
        requests=len(before_s),
        measured_on=str(key),
    )


def kind_of_step(step: LoggedStep | LivePoint) -> tuple[int, ...]:
    """Equal for steps that are alike: in rows and samples, and within a quarter of an octave in the rest."""
    sizes = (step.num_tokens, step.decode_context, step.prefill_pairs)
    return (step.num_rows, step.num_samples, *(round(4 * math.log2(1 + size)) for size in sizes))


def live_points(steps: Sequence[LoggedStep], after_s: NDArray[np.float64]) -> tuple[LivePoint, ...]:
    """The steps by composition, those that are alike as one.

    Args:
        after_s: the pause after each step (`pauses_s`).
    """
    alike: dict[tuple[int, ...], list[LoggedStep]] = {}
    pauses: dict[tuple[int, ...], list[float]] = {}
    for step, pause_s in zip(steps, after_s.tolist()):
        alike.setdefault(kind_of_step(step), []).append(step)
        if pause_s < BETWEEN_STEPS_LIMIT_S:
            pauses.setdefault(kind_of_step(step), []).append(pause_s)
    return tuple(
        LivePoint(
            num_tokens=round(fmean(step.num_tokens for step in found)),
            num_rows=found[0].num_rows,
            num_samples=found[0].num_samples,
            decode_context=fmean(step.decode_context for step in found),
            prefill_pairs=fmean(step.prefill_pairs for step in found),
            mean_s=fmean(step.seconds for step in found),
            pause_s=fmean(pauses[kind]) if kind in pauses else None,
            count=len(found),
        )
        for kind, found in sorted(alike.items())
    )


def pauses_s(steps: Sequence[LoggedStep]) -> NDArray[np.float64]:
    """From the end of each step to the start of its replica's next, seconds; infinite after the last.

    Args:
        steps: in order of time by replica.
    """
    pauses = [
        max(0.0, later.started_s - step.started_s - step.seconds) if step.replica == later.replica else math.inf
        for step, later in itertools.pairwise(steps)
    ]
    return np.array([*pauses, math.inf])


def _after_idle_s(
    steps: Sequence[LoggedStep],
    follow: NDArray[np.bool_],
    begin: NDArray[np.bool_],
    measured_s: NDArray[np.float64],
    modeled_s: NDArray[np.float64],
) -> float:
    """Median of what steps with prompts that begin after a pause take longer than their model and those that follow."""
    prompts = np.array([step.prefill_pairs > 0 for step in steps])
    usual, woken = prompts & follow, prompts & begin
    woken[np.flatnonzero(woken)[:1]] = False  # behind the lone requests: longer than any pause to come
    if woken.sum() < _LEAST_LONE_REQUESTS:
        return 0.0
    ratio = measured_s[usual].sum() / modeled_s[usual].sum() if usual.any() else 1.0
    return max(0.0, float(np.median(measured_s[woken] - ratio * modeled_s[woken])))


def _lone_requests(
    trace: Trace, result: ReplayResult, steps: Sequence[LoggedStep]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of requests whose whole prompt was a step of its own: seconds before and after that step.

    Before: from the scheduled arrival to its start. After: from its end to the first token at the client.
    """
    times = result.times
    lone = sorted((s for s in steps if s.num_rows == 1 and s.num_samples == 1), key=lambda s: s.started_s)
    starts = np.array([step.started_s for step in lone]) - result.started_s
    before, after = [], []
    for i in np.flatnonzero(times.finished).tolist():
        place = int(np.searchsorted(starts, times.sent_s[i]))
        if place < len(lone) and lone[place].num_tokens == trace.input_tokens[i]:
            end_s = starts[place] + lone[place].seconds
            if end_s <= times.first_token_s[i]:
                before.append(starts[place] - times.scheduled_s[i])
                after.append(times.first_token_s[i] - end_s)
    return np.array(before), np.array(after)


def calibration_trace(tables: StepTables, deployment: Deployment, *, seconds: float, seed: int) -> Trace:
    """First requests that are alone in the server, then Poisson arrivals at _LOAD of the modeled capacity.

    Prompts of the loaded part are as often between 32 and 64 tokens as between 512 and 1,024, up to three quarters of
    what the pool takes: what the server adds differs by their length.
    The capacity is what a simulation of requests of these lengths does when they arrive all at once.

    Args:
        seconds: of the loaded part; more where fewer than _LEAST_LOADED_REQUESTS would come.
    """
    rng = np.random.default_rng(seed)
    pool = deployment.pool
    most_output = max(1, pool.max_model_len // 4)
    most_input = max(1, pool.max_model_len - most_output - 1)
    lone_input, lone_output = min(_LONE_INPUT, most_input), min(_LONE_OUTPUT, most_output)

    def loaded(arrival_s: NDArray[np.float64]) -> Trace:
        shortest, longest = map(math.log, _LOADED_INPUT)
        lengths = np.exp(rng.uniform(shortest, longest, len(arrival_s)))
        outputs = np.minimum(rng.integers(*_LOADED_OUTPUT, len(arrival_s)), most_output)
        return Trace(arrival_s, np.minimum(lengths.astype(int), most_input), outputs)

    probe = simulate(loaded(np.zeros(_PROBED_REQUESTS)), pool, tables, policy=deployment.scheduler_policy)
    rate = _LOAD * _PROBED_REQUESTS / float(np.nanmax(probe.times.end_s))
    # of a Poisson process so many arrivals in a time are uniform in it
    seconds = max(seconds, _LEAST_LOADED_REQUESTS / rate)
    count = max(_LEAST_LOADED_REQUESTS, int(rng.poisson(rate * seconds)))
    load = loaded(np.sort(rng.uniform(0.0, seconds, count)))
    prompt_s = float(tables.tokens_s[min(lone_input, len(tables.tokens_s) - 1)])
    alone_s = prompt_s + lone_output * float(tables.tokens_s[1])
    spacing_s = max(0.1, 4 * alone_s)
    lone_s = np.arange(_LONE_REQUESTS) * spacing_s
    return Trace(
        np.concatenate([lone_s, lone_s[-1] + 2 * spacing_s + load.arrival_s]),
        np.concatenate([np.full(_LONE_REQUESTS, lone_input), load.input_tokens]),
        np.concatenate([np.full(_LONE_REQUESTS, lone_output), load.output_tokens]),
        source="calibration",
    )


def calibrate_serving(
    profile: Profile,
    deployment: Deployment,
    *,
    seconds: float = 12.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Profile:
    """The profile with what serving adds where a deployment's number of cores computes, with as many ranks and the
    same weights; what it has for others is kept.

    Args:
        seconds: of the loaded part of the replay; starting the server and the lone requests come on top.
    Raises: BadProfile: the deployment's configuration is not in the profile; ServerFailed: the server did not start, or
        a request failed.
    """
    shape = ModelShape.load(resolve_model(deployment.model))
    pool = deployment.pool
    bare = profile.model_copy(update={"serving": ()})
    modeled = step_tables(bare, shape, pool)
    trace = calibration_trace(modeled.tables, deployment, seconds=seconds, seed=seed)
    with tempfile.TemporaryDirectory(prefix="paretune-calibration-") as folder:
        log = Path(folder) / "steps.jsonl"
        result = measure_live(deployment, trace, step_log=log, seed=seed, progress=progress)
        check_served(result)
        steps = read_step_log(log, result.started_s)
    key, loaded_s = profile.configuration(pool).key, float(trace.arrival_s[_LONE_REQUESTS])
    serving = serving_from(trace, result, steps, modeled.tables, key, loaded_s)
    return with_serving(profile, serving)


def with_serving(profile: Profile, serving: Serving) -> Profile:
    """The profile with this in place of what it had of the same cores, ranks and weights, in their order.

    Raises: BadProfile: a configuration that served is not in the profile.
    """
    mine = profile.served_by(serving).served_as
    served = {profile.served_by(each).served_as: each for each in profile.serving} | {mine: serving}
    return profile.model_copy(update={"serving": tuple(each for _, each in sorted(served.items()))})
