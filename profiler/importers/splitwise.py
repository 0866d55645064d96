"""Whole-model times of Splitwise (MIT, mutinifni/splitwise-sim): prompts and decoding of a static batch, end to end.

A CSV with a row for each run: model, hardware, tensor_parallel; batch_size prompts of prompt_size tokens and
token_size tokens asked for by each; prompt_time, token_time (the mean of its decode steps) and e2e_time in
milliseconds. prompt_time is one step of all prompts, token_time one decode step of the batch at its mean context, so
each run is two whole steps. Steps of one composition become one point, with their median and quartiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..composition import Composition
from ..hardware import Accelerator, accelerator
from ..operator_tables import BadTable
from ..profile import StepPoint
from .checks import Finding
from .step_rows import StepRows, StepsOf, checked

COLUMNS = (
    "model", "hardware", "tensor_parallel", "prompt_size", "batch_size", "token_size", "prompt_time", "token_time",
    "e2e_time",
)  # fmt: skip

# Of the models that the published file has, what a token is multiplied with in the layers. Llama 2 70B: 80 layers of
# hidden size 8,192, 64 heads, 8 KV heads, a gated MLP of 28,672 (arXiv:2307.09288); BLOOM: 70 layers of 12 x 14,336^2
# (arXiv:2211.05100). Both were run in half precision.
PARAMETERS: Mapping[str, int] = {
    "llama2-70b": 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672),
    "bloom-176b": 70 * 12 * 14336**2,
}

# What Splitwise calls the devices that it was measured on: boards of DGX-A100 and DGX-H100 (arXiv:2311.18677)
_DEVICES: Mapping[str, str] = {"a100-80gb": "A100", "h100-80gb": "H100"}

Floats = NDArray[np.float64]

_WHOLE = 0.1  # a share by which the parts of a run and its end may differ


class _Run(NamedTuple):
    """Repetitions of one run: what it asked for, its two steps with the seconds of each repetition, and its end."""

    example: str
    prompt: Composition
    prompt_s: Floats
    decode: Composition
    decode_s: Floats
    parts_s: float
    e2e_s: float


def read(path: Path, frame: pd.DataFrame) -> tuple[tuple[StepRows, ...], list[Finding]]:
    """Whole steps by model, hardware and sharding that can be true, and what was refused or flagged.

    A run whose end lies far beyond its parts did not run as one batch: its times are not those of so many rows, and
    are refused. One whose end lies far before them ended early, all answers at once: its decode steps are taken at the
    context that they had.

    Raises: BadTable: a column is missing, a time or size is not above 0, or times are as if in another unit.
    """
    missing = [column for column in COLUMNS if column not in frame]
    if missing:
        raise BadTable(str(path), f"no {', '.join(missing)}", ", ".join(COLUMNS), "take Splitwise's perf-model.csv")
    numbers = list(COLUMNS[2:])
    wrong = ~(frame[numbers].apply(pd.to_numeric, errors="coerce") > 0)
    if wrong.any(axis=None):
        line = int(np.flatnonzero(wrong.any(axis=1))[0]) + 2
        found = ", ".join(f"{name} {frame[name].iloc[line - 2]}" for name in numbers if wrong[name].iloc[line - 2])
        raise BadTable(f"{path.name}:{line}", found, "numbers above 0", "correct the line")
    tables, findings = [], list[Finding]()
    for key, rows in frame.groupby(["model", "hardware", "tensor_parallel"], sort=True):
        model, hardware, ranks = map(str, key)
        table = _table(path.name, model, hardware, int(float(ranks)), rows, findings)
        if table is not None:
            tables.append(table)
    return tuple(tables), findings


def _table(
    file: str, model: str, hardware: str, ranks: int, rows: pd.DataFrame, findings: list[Finding]
) -> StepRows | None:
    if model not in PARAMETERS:
        raise BadTable(f"{file}: model", model, ", ".join(PARAMETERS), "leave it out, or add its parameters")
    device = _device(hardware)
    name = hardware if device is None else device.name
    of = StepsOf(model, PARAMETERS[model], name, ranks, source=f"Splitwise, {file}")
    if device is None:
        reason = f"{hardware} is not in the catalog: not checked against physics"
        findings.append(Finding(file, str(of), False, reason, len(rows), len(rows), f"{model}, TP {ranks}"))
    runs = []
    for key, group in rows.groupby(["prompt_size", "batch_size", "token_size"], sort=True):
        prompt, batch, answer = (int(float(str(size))) for size in key)
        runs.append(_run(prompt, batch, answer, group))
    kept = []
    for run in runs:
        if run.e2e_s > (1 + _WHOLE) * run.parts_s:
            reason = "ends later than its prompts and decode steps together: the batch did not run as one"
            found = f"{run.example}: {run.e2e_s:.2f} s of {run.parts_s:.2f} s"
            findings.append(Finding(file, str(of), True, reason, 1, len(runs), found))
            continue
        if run.e2e_s < (1 - _WHOLE) * run.parts_s:
            reason = "ends before all tokens that it asked for: decode steps taken at the context that they had"
            found = f"{run.example}: {run.e2e_s:.2f} s of {run.parts_s:.2f} s"
            findings.append(Finding(file, str(of), False, reason, 1, len(runs), found))
        kept.append(run)
    points, names = _points(kept)
    if not points:
        return None
    return checked(file, StepRows(of, points), device, findings, names)


def _points(runs: Sequence[_Run]) -> tuple[tuple[StepPoint, ...], list[str]]:
    """One point for each composition, however many runs had it, and what the file calls it first."""
    seconds: dict[Composition, list[Floats]] = {}
    names: dict[Composition, str] = {}
    steps = [(run.prompt, run.prompt_s, f"prompts of {run.example}") for run in runs]
    steps += [(run.decode, run.decode_s, f"decode steps of {run.example}") for run in runs]
    for step, measured_s, name in steps:
        seconds.setdefault(step, []).append(measured_s)
        names.setdefault(step, name)
    points = []
    for step, parts in seconds.items():
        low, middle, high = (float(q) for q in np.quantile(np.concatenate(parts), (0.25, 0.5, 0.75)))
        count = sum(len(each) for each in parts)
        points.append(StepPoint(**step._asdict(), median_s=middle, iqr_s=high - low, count=count))
    return tuple(points), list(names.values())


def _run(prompt: int, batch: int, answer: int, rows: pd.DataFrame) -> _Run:
    prompt_s, token_s, e2e_s = (rows[f"{name}_time"].to_numpy(np.float64) * 1e-3 for name in ("prompt", "token", "e2e"))
    first_s, middle_s, whole_s = (float(np.median(each)) for each in (prompt_s, token_s, e2e_s))
    # tokens after the first that fit between the prompts and the end: answers end early where the model says so
    decoded = float(np.clip(round((whole_s - first_s) / middle_s), 1, max(1, answer - 1)))
    context = batch * (prompt + 1 + (decoded - 1) / 2)
    return _Run(
        f"{batch} x {prompt} tokens in, {answer} out",
        Composition(batch * prompt, batch, batch, 0.0, batch * prompt * (prompt + 1) / 2),
        prompt_s,
        Composition(batch, batch, batch, context, 0.0),
        token_s,
        first_s + (answer - 1) * middle_s,
        whole_s,
    )


def _device(hardware: str) -> Accelerator | None:
    """Of the catalog; None: another memory or board (a100-40gb, h100-pcie) is another device."""
    name = _DEVICES.get(hardware.casefold())
    return None if name is None else accelerator(name)
