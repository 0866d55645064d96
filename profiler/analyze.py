"""Predicted beside measured, part by part: a recorded replay and its server's step log, under the same definitions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..traces.metrics import Metric, RequestTimes, percentile
from ..traces.trace import Trace
from ..traces.whole_file import write_whole
from .calibration import BETWEEN_STEPS_LIMIT_S, LoggedStep, read_step_log
from .explain import Explained, Explanation, near_percentile
from .replay import ReplayResult
from .step_time import StepTables, composed_time_s

SCHEMA_VERSION = 1
TIMES_FILE = "replay.json"
STEPS_FILE = "steps.jsonl"

# Connections may overtake each other on the way to the server by so many places.
_OVERTAKEN = 8

Floats = NDArray[np.float64]
_TIMES = ("scheduled_s", "sent_s", "first_token_s", "kth_token_s", "end_s")

# What both sides know of a request: the name here, for people, and the parts of a prediction that it is made of.
GROUPS = {
    "before its first step (HTTP, tokenizer, queue)": (
        "to_scheduler", "queue_seats", "queue_tokens", "queue_blocks", "queue_adapters", "queue_step",
    ),
    "own prefill": ("prefill",),
    "own decode": ("decode", "draft", "copies", "adapters"),
    "behind others' prefills": ("others_prefill",),
    "others' decodes in the batch": ("others_decode",),
    "recompute after preemption": ("recompute",),
    "between its steps (pauses, preempted, stages busy)": ("preempted", "pipeline"),
    "to the client (HTTP, text)": ("to_client",),
}  # fmt: skip
(_BEFORE, _PREFILL, _DECODE, _OTHERS_PREFILL, _OTHERS_DECODE, _RECOMPUTE, _BETWEEN, _CLIENT) = range(len(GROUPS))


class BadRun(Exception):
    """A folder that is no recorded run of this trace."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:160]}; allowed: {self.allowed}; {self.todo}"


@dataclass(frozen=True)
class RecordedRun:
    """A replay and the steps of its server.

    times      one row a request, in trace order; second 0 is second 0 of the trace
    started_s  second 0 of the trace on the clock of the steps
    rate       multiple of the recorded rate
    steps      may be none: then parts are not known
    """

    times: RequestTimes
    started_s: float
    rate: float
    steps: tuple[LoggedStep, ...]

    @classmethod
    def load(cls, folder: str | os.PathLike[str], trace: Trace) -> RecordedRun:
        """
        Raises: BadRun: no `replay.json` that paretune wrote, or one of another trace; BadProfile: a damaged step log;
            OSError.
        """
        path = Path(folder) / TIMES_FILE
        again = "record again: `paretune verify --record` or `paretune replay --record`"
        try:
            plain: dict[str, Any] = json.loads(path.read_bytes())
            version, digest = plain["schema_version"], plain["trace"]
            columns = {name: np.array(plain[name], np.float64) for name in _TIMES}
            tokens = np.array(plain["output_tokens"], np.int64)
            finished = np.array(plain["finished"], np.bool_)
            k, started_s, rate = int(plain["k"]), float(plain["started_s"]), float(plain["rate"])
        except FileNotFoundError:
            raise BadRun(str(path), "no such file", "a folder that a replay was recorded into", again) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadRun(str(path), error, "a file that paretune wrote", again) from None
        if version != SCHEMA_VERSION or digest != trace.digest():
            raise BadRun(f"{path}: trace", digest, f"{trace.digest()}, the trace that was given", again)
        log = Path(folder) / STEPS_FILE
        steps = read_step_log(log, started_s) if log.exists() else ()
        scheduled_s, sent_s, first_s, kth_s, end_s = (columns[name] for name in _TIMES)
        times = RequestTimes(scheduled_s, sent_s, first_s, kth_s, end_s, tokens, finished, k)
        return cls(times, started_s, rate, steps)


def save_run(folder: str | os.PathLike[str], trace: Trace, result: ReplayResult, rate: float) -> None:
    """Write a replay's times; the server's step log belongs beside them, as `steps.jsonl`. Raises: OSError."""
    times = result.times
    plain = {
        "schema_version": SCHEMA_VERSION,
        "trace": trace.digest(),
        "k": times.k,
        "rate": rate,
        "started_s": result.started_s,
        "output_tokens": times.output_tokens.tolist(),
        "finished": times.finished.tolist(),
        **{name: [None if x != x else x for x in getattr(times, name).tolist()] for name in _TIMES},
    }
    write_whole(Path(folder) / TIMES_FILE, json.dumps(plain) + "\n")


@dataclass(frozen=True)
class Compared:
    """Seconds of one cause, predicted and measured."""

    name: str
    predicted_s: float
    measured_s: float


@dataclass(frozen=True)
class ComparedSteps:
    """Steps of one kind that the server ran: seconds that they took, and what the model says of their compositions."""

    name: str
    steps: int
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return (self.predicted_s - self.measured_s) / self.measured_s if self.measured_s else float("nan")


@dataclass(frozen=True)
class Analyzed:
    """values: metric:pNN -> measured, seconds; parts: metric:pNN -> its causes, which add up to both; steps; notes."""

    values: dict[str, float]
    parts: dict[str, tuple[Compared, ...]]
    steps: tuple[ComparedSteps, ...]
    notes: tuple[str, ...]


def analyze(run: RecordedRun, trace: Trace, tables: StepTables, predicted: Explanation) -> Analyzed:
    """Hold a recorded run against the explanation of its prediction.

    A measured step's seconds are divided as the model divides a step of its composition: what it takes alone, beside
    others' decodes, and beside others' prompts. All else is measured.

    Args:
        tables: step times of the model.
        predicted: of the same trace at the run's rate.
    Raises: BadRun: steps that cannot be those of the trace's requests, or are larger than the model's limits.
    """
    _check_limits(run.steps, tables)
    notes = []
    parts: dict[str, tuple[Compared, ...]] = {}
    known = bool(run.steps) and all(step.requests for step in run.steps)
    measured = None
    if not run.steps:
        notes.append(f"no {STEPS_FILE} beside the recorded times: measured parts are not known")
    elif not known:
        notes.append("the step log does not say which requests were in a step: measured parts are not known")
    else:
        measured = _Measured(run, trace, tables)
    values = {}
    for each in predicted.metrics:
        name, metric = f"{each.metric}:p{each.percentile:g}", Metric.parse(each.metric)
        if metric.name == "itl" or (metric.k > 1 and metric.k != run.times.k):
            notes.append(f"{name}: not recorded")
            continue
        values[name] = percentile(run.times.values(metric), each.percentile)
        if measured is not None:
            parts[name] = measured.compared(each, metric)
    return Analyzed(values, parts, _compared_steps(run.steps, tables), tuple(notes))


def _check_limits(steps: Sequence[LoggedStep], tables: StepTables) -> None:
    """Raises: BadRun: a step that `tables`, which end at the limits of the spec, say nothing of."""
    limits = (
        ("num_tokens", "max_num_batched_tokens", tables.tokens_s),
        ("num_rows", "max_num_seqs", tables.rows_s),
        ("num_samples", "max_num_seqs * (1 + num_speculative_tokens)", tables.samples_s),
    )
    for name, limit, table in limits:
        most = max((getattr(step, name) for step in steps), default=0)
        if most >= len(table):
            allowed = f"at most {len(table) - 1}, {limit} of the spec"
            raise BadRun(f"{STEPS_FILE}: {name}", most, allowed, "give the spec that was recorded")


def _compared_steps(steps: Sequence[LoggedStep], tables: StepTables) -> tuple[ComparedSteps, ...]:
    kinds: dict[str, list[LoggedStep]] = {"decoding alone": [], "with prompts": [], "all": list(steps)}
    for step in steps:
        kinds["with prompts" if step.prefill_pairs > 0 else "decoding alone"].append(step)
    found = []
    for name, each in kinds.items():
        modeled_s = sum(_modeled_s(tables, step) for step in each)
        found.append(ComparedSteps(name, len(each), modeled_s, sum(step.seconds for step in each)))
    return tuple(found)


def _modeled_s(tables: StepTables, s: LoggedStep) -> float:
    return composed_time_s(tables, s.num_tokens, s.num_rows, s.num_samples, s.decode_context, s.prefill_pairs)


class _Measured:
    """Seconds of every request by GROUPS, at its first token, its k-th and its last."""

    def __init__(self, run: RecordedRun, trace: Trace, tables: StepTables) -> None:
        n = len(trace)
        self.times = run.times
        self.at_first, self.at_kth, self.at_end = (np.full((n, len(GROUPS)), np.nan) for _ in range(3))
        self._tables = tables
        self._prompts = trace.input_tokens.tolist()
        self._row_of = _rows_of(run, trace)
        self._parts = np.zeros((n, len(GROUPS)))
        self._last_s = np.full(n, np.nan)
        self._computed = np.zeros(n, np.int64)
        self._generated = np.zeros(n, np.int64)
        for place, step in enumerate(run.steps):
            after = run.steps[place + 1] if place + 1 < len(run.steps) else None
            pause_s = 0.0
            if after is not None and after.replica == step.replica:
                pause_s = after.started_s - step.started_s - step.seconds
            seconds = step.seconds + (pause_s if 0 < pause_s < BETWEEN_STEPS_LIMIT_S else 0.0)
            self._add(step, step.started_s - run.started_s, seconds)

    def _add(self, step: LoggedStep, began_s: float, seconds: float) -> None:
        rows = [
            (self._row_of[r], s, t) for r, s, t in zip(step.requests, step.starts, step.tokens) if r in self._row_of
        ]
        full_s = _modeled_s(self._tables, step)
        decodes = _composed([(s, t) for i, s, t in rows if self._generates(i, s)])
        decodes_s = self._seconds(decodes)
        for i, start, tokens in rows:
            if np.isnan(self._last_s[i]):
                self._parts[i, _BEFORE] = began_s - self.times.scheduled_s[i]
            else:
                self._parts[i, _BETWEEN] += began_s - self._last_s[i]
            alone_s = self._seconds(_composed([(start, tokens)]))
            own, with_s = _DECODE, decodes_s
            if not self._generates(i, start):
                own = _RECOMPUTE if start < self._computed[i] else _PREFILL
                with_s = self._seconds(tuple(a + b for a, b in zip(decodes, _composed([(start, tokens)]))))
            self._parts[i, own] += seconds * alone_s / full_s
            self._parts[i, _OTHERS_DECODE] += seconds * (with_s - alone_s) / full_s
            self._parts[i, _OTHERS_PREFILL] += seconds * (full_s - with_s) / full_s
            self._last_s[i] = began_s + seconds
            self._computed[i] = max(self._computed[i], start + tokens)
            if start + tokens >= self._prompts[i] + self._generated[i]:
                self._generated[i] += 1
                self._note(i)

    def _generates(self, i: int, start: int) -> bool:
        return bool(self._generated[i] > 0 and start >= self._prompts[i])

    def _note(self, i: int) -> None:
        """Keep the parts at this token, and what it still takes to the client."""
        times, count = self.times, int(self._generated[i])
        ends = (
            (self.at_first, times.first_token_s, count == 1),
            (self.at_kth, times.kth_token_s, count == times.k),
            (self.at_end, times.end_s, count == int(times.output_tokens[i])),
        )
        for kept, at_s, now in ends:
            if now:
                kept[i] = self._parts[i]
                kept[i, _CLIENT] = at_s[i] - self._last_s[i]

    def _seconds(self, composition: tuple[float, ...]) -> float:
        tokens, rows, samples, context, pairs = composition
        return composed_time_s(self._tables, int(tokens), int(rows), int(samples), context, pairs) if rows else 0.0

    def compared(self, each: Explained, metric: Metric) -> tuple[Compared, ...]:
        times = self.times
        if metric.name == "tpot":
            found = (self.at_end - self.at_first) / np.maximum(1, times.output_tokens - 1)[:, None]
        elif metric.name == "ttf" and metric.k > 1:
            found = np.where((times.output_tokens >= times.k)[:, None], self.at_kth, self.at_end)
        else:
            found = self.at_end if metric.name == "e2e" else self.at_first
        value, rows = near_percentile(times.values(metric), each.percentile)
        rows = rows[~np.isnan(found[rows]).any(axis=1)]
        mean = found[rows].mean(axis=0) if len(rows) else np.full(len(GROUPS), np.nan)
        scale = value / float(mean.sum())
        return tuple(
            Compared(name, each.seconds(*parts), float(seconds) * scale)
            for (name, parts), seconds in zip(GROUPS.items(), mean)
            if each.seconds(*parts) != 0 or seconds != 0
        )


def _composed(rows: Iterable[tuple[int, int]]) -> tuple[float, ...]:
    """Tokens, rows, samples, decode context and prefill pairs of rows of (start, tokens), each of which samples."""
    tokens = count = 0
    context = pairs = 0.0
    for start, own in rows:
        tokens += own
        count += 1
        if own == 1:
            context += start + 1
        else:
            pairs += own * (start + 0.5 * (own + 1))
    return tokens, count, count, context, pairs


def _rows_of(run: RecordedRun, trace: Trace) -> dict[int, int]:
    """The server's number of a request -> its row in the trace.

    The server numbers requests as they come, and the client sends them in order of the trace; who overtook whom on the
    way shows in how many tokens each took.
    """
    reached: dict[int, int] = {}
    for step in run.steps:
        for request, start, tokens in zip(step.requests, step.starts, step.tokens):
            reached[request] = max(reached.get(request, 0), start + tokens)
    numbers = sorted(reached)
    rows = np.flatnonzero(run.times.finished).tolist()
    wanted = {row: int(trace.input_tokens[row]) + int(run.times.output_tokens[row]) - 1 for row in rows}
    found: dict[int, int] = {}
    left = list(numbers)
    for row in rows:
        place = next((i for i, number in enumerate(left[:_OVERTAKEN]) if reached[number] == wanted[row]), None)
        if place is not None:
            found[left.pop(place)] = row
        elif left and len(left) > len(rows) - len(found):
            left.pop(0)  # one that failed, and took other tokens
    if len(found) < 0.9 * len(rows):
        matched = f"{len(found)} of {len(rows)} requests by their tokens"
        raise BadRun(STEPS_FILE, matched, "the steps of this replay, without speculation", "record both in one run")
    return found
