"""What `paretune calibrate` brings on a GPU: step times of the data sheet against recorded steps, before and after.

Data: results/gpu_steps.json, steps of the bundled engine on an H200 (gpu_steps.py), with CUDA graphs and eager. The
calibration is fitted to a part of them and scored on the rest, which it never saw:

    blocks        as the command does it: every second of 20 blocks of time
    halves        a random half, ten times (errors of all of them together)
    compositions  steps of one kind left out at a time: all decode steps of a number of rows, all prompts of about one
                  length, all mixed steps of about one size; each kind is then predicted from the others

    python benchmarks/calibrate_gpu.py
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from bars import RESULTS, Bar, finish
from paretune.profiler.calibration import LoggedStep
from paretune.profiler.hardware import accelerator
from paretune.profiler.recalibration import PARTS, calibrate, fit_factors, step_parts_s
from paretune.profiler.tables import step_tables
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import Deployment, Pool

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

RANDOM_HALVES = 10
# After calibrating on a part of a curve, the rest within 5 %: what the project asks of published points' TPOT.
MEDIAN, P90 = 0.05, 0.25


def read_steps(eager: bool) -> list[LoggedStep]:
    recorded = json.loads((RESULTS / "gpu_steps.json").read_text())
    rows = [dict(zip(recorded["columns"], row, strict=True)) for row in recorded["steps"]]
    # they ran one after the other; when each began was not recorded, and only their order counts
    return [
        LoggedStep(replica=0, started_s=float(place), **{k: v for k, v in row.items() if k != "eager"})
        for place, row in enumerate(rows)
        if bool(row["eager"]) == eager
    ]


def deployment(gpu: str, eager: bool) -> Deployment:
    pool = Pool(
        accelerator=gpu, weight_dtype="bf16", max_model_len=4096, max_num_seqs=128, max_num_batched_tokens=4096,
        num_kv_blocks=128 * 130, enforce_eager=eager, enable_prefix_caching=False,
    )  # fmt: skip
    return Deployment(model="random", pools=(pool,))


def kind(step: LoggedStep) -> str:
    """Steps of one kind are alike but for their contexts."""
    octave = round(math.log2(step.num_tokens))
    if not step.prefill_pairs:
        return f"decode {step.num_rows} rows" if step.num_rows & (step.num_rows - 1) == 0 else f"decode ~2^{octave}"
    return f"{'mixed' if step.decode_context else 'prompts'} ~2^{octave} tokens"


def splits(steps: list[LoggedStep], how: str) -> Iterator[Mask]:
    """What is held out, split after split."""
    if how == "halves":
        rng = np.random.default_rng(0)
        for _ in range(RANDOM_HALVES):
            yield rng.permutation(len(steps)) % 2 == 1
    else:
        kinds = np.array([kind(step) for step in steps])
        for each in sorted(set(kinds.tolist())):
            yield kinds == each


def errors(parts: Floats, measured_s: Floats, held_out: Iterator[Mask]) -> tuple[Floats, Floats]:
    """|predicted / measured - 1| of all that was held out: before, and after."""
    before, after = [], []
    for out in held_out:
        factors, step_s = fit_factors(parts[~out], measured_s[~out])
        before.append(np.abs(parts[out].sum(axis=1) / measured_s[out] - 1))
        after.append(np.abs((parts[out] @ factors + step_s) / measured_s[out] - 1))
    return np.concatenate(before), np.concatenate(after)


def score(gpu: str, shape: ModelShape, eager: bool, say: Callable[[str], None]) -> tuple[list[Bar], dict[str, object]]:
    name, steps = "eager" if eager else "graphs", read_steps(eager)
    deployed = deployment(gpu, eager)
    modeled = step_tables(accelerator(gpu), shape, deployed.pool)
    parts, measured_s = step_parts_s(steps, modeled.tables), np.array([step.seconds for step in steps])
    as_typed = calibrate(
        steps, modeled, deployed, recorded_in="gpu_steps.json", source="data sheet", source_name=f"data sheet of {gpu}"
    )
    found: dict[str, dict[str, float]] = {
        "blocks": {
            f"{when} {which}": getattr(each["step"], which)
            for when, each in (("before", as_typed.before), ("after", as_typed.after))
            for which in ("median", "p90")
        }
    }
    for how in ("halves", "compositions"):
        before, after = errors(parts, measured_s, splits(steps, how))
        found[how] = {
            f"{when} {which}": float(np.quantile(wrong, share))
            for when, wrong in (("before", before), ("after", after))
            for which, share in (("median", 0.5), ("p90", 0.9))
        }
    bars = []
    for how, figures in found.items():
        shown = ", ".join(f"{what} {value:.1%}" for what, value in figures.items())
        say(f"{name}, {len(steps)} steps, {how}: {shown}")
        for which, target in (("median", MEDIAN), ("p90", P90)):
            bars.append(Bar(f"{name}, {how}: {which} error after", figures[f"after {which}"], target, at_least=False))
    by_kind = {}
    kinds = np.array([kind(step) for step in steps])
    for each in sorted(set(kinds.tolist())):
        out = kinds == each
        before, after = (float(np.median(wrong)) for wrong in errors(parts, measured_s, iter([out])))
        by_kind[each] = {"steps": int(out.sum()), "before": before, "after": after}
        say(f"  {each:24} {out.sum():4d} steps, left out: median before {before:6.1%}, after {after:6.1%}")
    details = {"errors": found, "factors": as_typed.factors, "step_s": as_typed.step_s, "left out one kind": by_kind}
    return bars, details


def main() -> int:
    recorded = json.loads((RESULTS / "gpu_steps.json").read_text())
    gpu = recorded["gpu"].removeprefix("NVIDIA ")
    config = {
        "model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, **recorded["model"],
    }  # fmt: skip
    shape = ModelShape.from_config(config)
    bars, details = [], {}
    for eager in (False, True):
        found, about = score(gpu, shape, eager, print)
        bars += found
        details["eager" if eager else "graphs"] = about
    finish(bars, {"recorded": {k: recorded[k] for k in ("gpu", "date", "torch")}, "parts": PARTS, **details},
           "calibrate_gpu")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
