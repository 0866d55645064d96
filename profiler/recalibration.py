"""A step-time model fitted anew to the user's own server: from its step log, or from one recorded run.

From a step log each part of a step (tokens, requests, samples, attention of decode and of prompts) gets a factor of its
own, and a step a constant: robust, non-negative least squares on relative errors, drawn towards one common factor where
the log does not tell the parts apart. From a request log, which has no steps, all step times get one factor, such that
simulated and recorded TPOT agree, and what the recorded TTFT has beyond the simulated one becomes time before the
scheduler. Of both every second block of time is left out of the fit, and only these blocks say how wrong the model was
before and is after. No part of a calibrated step is faster than physics; times by the whole batch, and a draft model's,
get the one factor unchecked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..runtime.spec import Deployment, Pool
from ..traces.jsonl_formats import read_openai
from ..traces.metrics import TPOT, TTFT, RequestTimes
from ..traces.trace import Trace
from ..traces.whole_file import write_whole
from .batch_time import scaled_batch
from .calibration import BETWEEN_STEPS_LIMIT_S, LoggedStep, pauses_s, read_step_log
from .profile import BadProfile, now
from .simulator import simulate
from .step_fit import CONFIDENCE, non_negative_least_squares
from .step_time import ModeledStep, StepTables, interpolate, scaled

SCHEMA_VERSION = 1
PARTS = ("tokens_s", "rows_s", "samples_s", "decode_attention_s", "prefill_attention_s")
LEAST_STEPS = 40
LEAST_REQUESTS = 20
_BLOCKS = 20  # of time; every second one is held out
_DISTURBED = 0.05  # residuals beyond this share of a step count by their size (Huber, 1964)
_APART = 0.5  # standard deviation of the factors about the common one, as a share of it, before any step is seen
_REWEIGHTINGS = 6
_SEARCH = 24  # halvings of the factor's range, on a log scale
_RANGE = (0.1, 10.0)

Floats = NDArray[np.float64]


class Errors(BaseModel):
    """|predicted / measured - 1| over what was held out: median, and the 90 % quantile."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    median: float
    p90: float

    @classmethod
    def of(cls, predicted: Floats, measured: Floats) -> Errors:
        wrong = np.abs(predicted / measured - 1)
        return cls(median=float(np.median(wrong)), p90=float(np.quantile(wrong, CONFIDENCE)))


class Calibration(BaseModel):
    """What the user's own server says of a step-time model.

    kind      "steps" (a step log) or "run" (a request log with times)
    source    digest of the profile, or of the data sheet, that was calibrated
    taken_on  sharding and precisions of the deployment that was recorded
    step_s    added to every step
    factors   of the parts of a step, as in StepTables
    before_scheduler_s  added between a request's arrival and the scheduler
    before, after       errors on what was held out of the fit, by what was compared
    points, held_out    steps or requests that were fitted, and that were left out
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    FORMAT: ClassVar[str] = "a calibration as `paretune calibrate` wrote it"

    schema_version: int = SCHEMA_VERSION
    kind: Literal["steps", "run"]
    created_at: str
    recorded_in: str
    model: str
    source: str
    source_name: str
    taken_on: str
    step_s: float = Field(ge=0)
    factors: dict[str, float]
    before_scheduler_s: float = Field(ge=0)
    before: dict[str, Errors]
    after: dict[str, Errors]
    points: int
    held_out: int

    @property
    def relative_error(self) -> float:
        """90 % of what was held out lies within so much of the calibrated model."""
        return self.after["step" if self.kind == "steps" else str(TPOT)].p90

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all. Raises: OSError."""
        write_whole(path, json.dumps(self.model_dump(mode="json"), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Raises: BadProfile: not a calibration of this version; OSError."""
        again = "calibrate again: `paretune calibrate`"
        try:
            plain = json.loads(Path(path).read_bytes())
            version = plain["schema_version"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise BadProfile(os.fspath(path), "no JSON with a schema_version", cls.FORMAT, again) from None
        if version != SCHEMA_VERSION:
            raise BadProfile(f"{path}: schema_version", version, str(SCHEMA_VERSION), again)
        try:
            return cls.model_validate(plain)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = f"{path}: {'.'.join(map(str, first['loc']))}"
            raise BadProfile(where, first["msg"], cls.FORMAT, again) from None

    def applied(self, modeled: ModeledStep, bound: StepTables, pool: Pool, source: str) -> ModeledStep:
        """The model with this calibration, and never faster than `bound`.

        Raises: BadProfile: it was made of another source.
        """
        if source != self.source:
            todo = "calibrate what you use, or use what you calibrated"
            raise BadProfile("calibration: source", source, f"{self.source} ({self.source_name})", todo)
        tables = _with_factors(modeled.tables, self.factors, self.step_s)
        least = bound._asdict()
        bounded = {part: np.maximum(getattr(tables, part), least[part]) for part in PARTS}
        request_s = tables.request_s + np.array([self.before_scheduler_s, 0.0])
        notes, error = modeled.not_modeled, self.relative_error
        if tables.batch is not None or tables.draft is not None:
            notes = (
                *notes,
                "calibration: times by the whole batch, or of a draft model, are not checked against physics",
            )
        if (here := sharding_of(pool)) != self.taken_on:
            error = max(error, modeled.relative_error)
            notes = (*notes, f"calibration: taken with {self.taken_on}, and applied to {here} all the same")
        return replace(
            modeled,
            tables=tables._replace(**bounded, request_s=request_s),
            host_step_s=modeled.host_step_s * self.factors["tokens_s"] + self.step_s,
            device_row_s=modeled.device_row_s * self.factors["rows_s"],
            relative_error=error,
            not_modeled=notes,
        )


def sharding_of(pool: Pool) -> str:
    """What decides how long a step of a given composition takes, for people and to compare."""
    sizes = (pool.tensor_parallel_size, pool.pipeline_parallel_size, pool.context_parallel_size)
    shards = "TP {} x PP {} x CP {}".format(*sizes)
    threads = f" x {pool.num_threads} threads" if pool.accelerator == "cpu" else ""
    return f"{pool.accelerator}: {shards}{threads}, {pool.weight_dtype}/{pool.kv_cache_dtype}"


def _with_factors(tables: StepTables, factors: dict[str, float], step_s: float) -> StepTables:
    found = tables._replace(**{part: getattr(tables, part) * factors[part] for part in PARTS})
    found.tokens_s[1:] += step_s
    # what is known by the whole batch, or of another model, is not told apart by parts
    return found._replace(
        draft=None if tables.draft is None else scaled(tables.draft, factors["tokens_s"]),
        batch=None if tables.batch is None else scaled_batch(tables.batch, factors["tokens_s"]),
    )


@dataclass(frozen=True)
class RecordedRun:
    """A request log's trace and the times that its server took, seconds from receipt: TTFT, E2E (n,)."""

    trace: Trace
    ttft_s: Floats
    e2e_s: Floats

    @property
    def tpot_s(self) -> Floats:
        """As traces.metrics defines it; NaN for answers of one token."""
        rest = self.trace.output_tokens.astype(np.float64) - 1
        return np.asarray(np.where(rest > 0, (self.e2e_s - self.ttft_s) / np.maximum(rest, 1), np.nan), np.float64)


def read_recorded(path: str | os.PathLike[str]) -> tuple[LoggedStep, ...] | RecordedRun:
    """A step log, or a request log whose lines have `timings`, told apart by their first line.

    Raises: BadProfile: neither, or a damaged step log; BadTrace: a damaged request log; OSError.
    """
    allowed = "a step log (`serve --step-log`), or a request log with timings (`serve --request-log`)"
    todo = "record one of the two with `paretune serve`"
    lines = Path(path).read_bytes().splitlines()
    try:
        first = json.loads(lines[0])
        if {"num_tokens", "seconds", "started_s"} <= first.keys():
            return read_step_log(path)
        timed = [line for line in lines if (json.loads(line).get("timings") or {}).get("ttft_s") is not None]
    except (ValueError, AttributeError, TypeError, IndexError):
        raise BadProfile(os.fspath(path), "no JSON lines of either kind", allowed, todo) from None
    if not timed:
        raise BadProfile(os.fspath(path), "no line with timings.ttft_s", allowed, todo)
    name = Path(path).name
    one_by_one = [json.loads(line) for line in timed]
    order = np.argsort([row["created"] for row in one_by_one], kind="stable")
    trace = read_openai(b"\n".join(timed), name)
    if len(trace) != len(timed):
        raise BadProfile(name, f"{len(timed) - len(trace)} failed requests with timings", "none", todo)
    timings = [one_by_one[i]["timings"] for i in order]
    return RecordedRun(
        trace, np.array([t["ttft_s"] for t in timings], np.float64), np.array([t["e2e_s"] for t in timings], np.float64)
    )


def _held_out(count: int) -> NDArray[np.bool_]:
    """(count,) in order of time: every second of _BLOCKS blocks."""
    odd: NDArray[np.bool_] = np.arange(count) * _BLOCKS // count % 2 == 1
    return odd


def calibrate(
    recorded: Sequence[LoggedStep] | RecordedRun,
    modeled: ModeledStep,
    deployment: Deployment,
    *,
    recorded_in: str,
    source: str,
    source_name: str,
) -> Calibration:
    """What a recording of a deployment says of its modeled step times.

    Args:
        modeled: the deployment's step times as they are without calibration.
        recorded_in, source_name: for people. source: digest of what the step times come from.
    Raises: BadProfile: too short a recording, or steps whose logged time has parts that their composition does not
        tell.
    """
    if isinstance(recorded, RecordedRun):
        found = _from_run(recorded, modeled.tables, deployment)
    else:
        found = _from_steps(recorded, modeled.tables)
    return Calibration(
        **found,
        created_at=now(),
        recorded_in=recorded_in,
        model=deployment.model,
        source=source,
        source_name=source_name,
        taken_on=sharding_of(deployment.pool),
    )


def step_parts_s(steps: Sequence[LoggedStep], tables: StepTables) -> Floats:
    """(n, len(PARTS)) modeled seconds of each step's parts."""

    def of(step: LoggedStep) -> tuple[float, ...]:
        return (
            float(tables.tokens_s[step.num_tokens]),
            float(tables.rows_s[step.num_rows]),
            float(tables.samples_s[step.num_samples]),
            interpolate(tables.decode_attention_s, step.decode_context),
            interpolate(tables.prefill_attention_s, step.prefill_pairs),
        )

    return np.array([of(step) for step in steps], np.float64)


def _lasting_s(steps: Sequence[LoggedStep]) -> Floats:
    """(n,) seconds from the start of each step until its replica begins the next, as the simulator counts it: with the
    pause between them, and behind the last step of a burst with the usual pause."""
    after_s = pauses_s(steps)
    short = after_s < BETWEEN_STEPS_LIMIT_S
    usual_s = float(np.median(after_s[short])) if short.any() else 0.0
    return np.array([s.seconds for s in steps]) + np.where(short, after_s, usual_s)


def _from_steps(steps: Sequence[LoggedStep], tables: StepTables) -> dict[str, object]:
    beside = {
        "a draft model's passes": tables.draft is not None,
        "the batch as a whole": tables.batch is not None,
        "LoRA adapters": any(tables.adapters),
        "KV blocks on their way to the host": tables.block_copy_s > 0,
    }
    for what, counted in beside.items():
        if counted:
            allowed = "steps of tokens, requests and attention alone"
            todo = "calibrate from a run: `paretune serve --request-log`"
            raise BadProfile("calibration: a step log", f"steps whose time depends on {what}", allowed, todo)
    steps = sorted(steps, key=lambda s: (s.replica, s.started_s))
    usable = [
        (s, lasting_s)
        for s, lasting_s in sorted(zip(steps, _lasting_s(steps)), key=lambda each: each[0].started_s)
        if 0 < s.num_tokens < len(tables.tokens_s)
        and s.num_rows < len(tables.rows_s)
        and s.num_samples < len(tables.samples_s)
    ]
    if len(usable) < LEAST_STEPS:
        found = f"{len(usable)} steps within the spec's limits"
        raise BadProfile("calibration", found, f"at least {LEAST_STEPS}", "record for longer, or give its own spec")
    parts, measured_s = step_parts_s([s for s, _ in usable], tables), np.array([seconds for _, seconds in usable])
    held_out = _held_out(len(usable))
    factors, step_s = fit_factors(parts[~held_out], measured_s[~held_out])
    truth = measured_s[held_out]
    return {
        "kind": "steps",
        "step_s": step_s,
        "factors": dict(zip(PARTS, factors.tolist())),
        "before_scheduler_s": 0.0,
        "before": {"step": Errors.of(parts[held_out].sum(axis=1), truth)},
        "after": {"step": Errors.of(parts[held_out] @ factors + step_s, truth)},
        "points": int((~held_out).sum()),
        "held_out": int(held_out.sum()),
    }


def fit_factors(parts: Floats, measured_s: Floats) -> tuple[Floats, float]:
    """(len(PARTS),) factors of the parts, and the constant of a step in seconds, that explain measured steps best.

    Args:
        parts: (n, len(PARTS)) modeled seconds. measured_s: (n,) of the same steps.
    """
    common = float(np.median(measured_s / parts.sum(axis=1)))
    constant_s = float(measured_s.min())
    design = np.hstack([parts, np.full((len(parts), 1), constant_s)]) / measured_s[:, None]
    # what is known beforehand, as rows of equations: factors about the common one, and a constant about none
    pull = _DISTURBED / _APART * np.diag([*np.full(len(PARTS), 1 / common), 1.0])
    towards = _DISTURBED / _APART * np.array([*np.ones(len(PARTS)), 0.0])
    weights = np.ones(len(parts))
    for _ in range(_REWEIGHTINGS):
        matrix = np.vstack([design * weights[:, None], pull])
        found = non_negative_least_squares(matrix, np.concatenate([weights, towards]))
        residuals = np.abs(design @ found - 1)
        weights = np.sqrt(np.minimum(1.0, _DISTURBED / np.maximum(residuals, 1e-12)))
    factors = np.where(parts.max(axis=0) > 0, found[:-1], common)  # of what never occurred nothing is known
    return factors, float(found[-1] * constant_s)


def _from_run(run: RecordedRun, tables: StepTables, deployment: Deployment) -> dict[str, object]:
    if len(run.trace) < LEAST_REQUESTS:
        found = f"{len(run.trace)} requests"
        raise BadProfile("calibration", found, f"at least {LEAST_REQUESTS}", "record for longer")
    held_out = _held_out(len(run.trace))
    measured = {str(TTFT): run.ttft_s, str(TPOT): run.tpot_s}
    several = np.isfinite(run.tpot_s)
    if several.sum() < LEAST_REQUESTS or not (several & held_out).any() or not (several & ~held_out).any():
        found, allowed = f"{several.sum()} answers of more than one token", f"at least {LEAST_REQUESTS}, all along"
        raise BadProfile("calibration", found, allowed, "record for longer")

    def times(factor: float) -> RequestTimes:
        of_steps = scaled(tables, factor)
        return simulate(run.trace, deployment.pool, of_steps, policy=deployment.scheduler_policy).times

    def too_slow(factor: float) -> bool:
        ratio = times(factor).values(TPOT) / measured[str(TPOT)]
        return bool(np.nanmedian(ratio[~held_out]) > 1)

    low, high = _RANGE
    for _ in range(_SEARCH):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if too_slow(middle) else (middle, high)
    factor = float(np.sqrt(low * high))
    if factor < 1.01 * _RANGE[0] or factor > 0.99 * _RANGE[1]:
        found = f"steps {factor:.2g} times as long as modeled"
        raise BadProfile(
            "calibration", found, f"{_RANGE[0]:g} to {_RANGE[1]:g} times", "give the spec that was recorded"
        )
    before, after = times(1.0), times(factor)
    later_s = float(np.nanmedian((run.ttft_s - after.values(TTFT))[~held_out]))
    later_s = max(0.0, later_s)

    def errors(found: RequestTimes, added_s: float) -> dict[str, Errors]:
        compared = {str(TTFT): found.values(TTFT) + added_s, str(TPOT): found.values(TPOT)}
        known = {name: held_out & ~np.isnan(values) & ~np.isnan(measured[name]) for name, values in compared.items()}
        return {name: Errors.of(values[known[name]], measured[name][known[name]]) for name, values in compared.items()}

    return {
        "kind": "run",
        "step_s": 0.0,
        "factors": dict.fromkeys(PARTS, factor),
        "before_scheduler_s": later_s,
        "before": errors(before, 0.0),
        "after": errors(after, later_s),
        "points": int((~held_out).sum()),
        "held_out": int(held_out.sum()),
    }
