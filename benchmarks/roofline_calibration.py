"""How far real engines are from the data sheet: fits the two constants of profiler/roofline.py, and their error.

    python benchmarks/roofline_calibration.py --data ../shared/data

Data: e2e/aiconfigurator_silicon/silicon_dev.csv (Apache-2.0, ai-dynamo/aiconfigurator) and models/hf_configs. Dense
models in fp8 served closed-loop at a fixed concurrency C. In the steady state each of C requests brings one prefill
of ISL tokens and decodes OSL tokens, so TPOT = decode step of C rows at a mean context of ISL + OSL / 2, plus (C - 1)
/ OSL prefills of others.
"""

from __future__ import annotations

import csv
import json
from typing import NamedTuple

import numpy as np

from bars import needed_data
from paretune.profiler import roofline
from paretune.profiler.hardware import accelerator
from paretune.profiler.operators import Composition, step_work
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import Pool

MODELS = {
    "Qwen/Qwen3-32B": "Qwen--Qwen3-32B.json",
    "meta-llama/Llama-3.1-70B": "meta-llama--Meta-Llama-3.1-70B.json",
}
EFFICIENCIES = np.arange(0.30, 1.001, 0.02)
OVERHEADS_S = np.arange(0.0, 150e-6, 2e-6)


class Point(NamedTuple):
    """tpot_s = bound_s / efficiency + layers * overhead + collectives_s, interleaved prefills counted, too."""

    group: str
    measured_s: float
    bound_s: float
    layers: float
    collectives_s: float


def read_points() -> list[Point]:
    points = []
    with open(needed_data("e2e", "aiconfigurator_silicon", "silicon_dev.csv"), newline="") as stream:
        for row in csv.DictReader(stream):
            concurrency = row["concurrency"] or row["batch_size"]
            if row["model_path"] not in MODELS or row["precision"] != "fp8" or not (row["isl"] and concurrency):
                continue
            config = json.loads(needed_data("models", "hf_configs", MODELS[row["model_path"]]).read_text())
            points.append(_point(row, ModelShape.from_config(config), int(float(concurrency))))
    return points


def _point(row: dict[str, str], shape: ModelShape, rows: int) -> Point:
    device = accelerator(row["system"].split("_")[0])
    isl, osl = int(row["isl"]), int(row["osl"])
    pool = Pool(
        accelerator=device.name,
        tensor_parallel_size=int(float(row["tp_size"])),
        weight_dtype="fp8",
        kv_cache_dtype="bf16",
    )
    decode = Composition(rows, rows, rows, rows * (isl + osl / 2), 0.0)
    prefill = Composition(isl, 1, 1, 0.0, isl * (isl + 1) / 2)
    bound_s, collectives_s = 0.0, 0.0
    others = (rows - 1) / osl
    for step, times in ((decode, 1.0), (prefill, others)):
        for name, seconds in roofline.step_bound_s(device, shape, step, pool).items():
            if name.endswith((".all_reduce", ".all_gather")):
                collectives_s += times * seconds / roofline.COLLECTIVE_EFFICIENCY
            else:
                bound_s += times * seconds
        sharding = {"tensor_parallel_size": pool.tensor_parallel_size, "weight_dtype": "fp8", "kv_dtype": "bf16"}
        messages = sum(work.messages for work in step_work(shape, step, **sharding))
        collectives_s += times * messages * roofline.COLLECTIVE_OVERHEAD_S
    return Point(
        f"{row['system']} {row['backend']} {row['model_path']}", float(row["silicon_tpot_ms"]) / 1e3,
        bound_s, shape.num_layers * (1 + others), collectives_s,
    )  # fmt: skip


def fit(points: list[Point]) -> tuple[float, float]:
    """Efficiency and overhead a layer (seconds) with the least median |log(measured / predicted)|."""
    measured, bound, layers, collectives = (np.array([getattr(p, f) for p in points]) for f in Point._fields[1:])
    best = min(
        (float(np.median(np.abs(np.log(measured / (bound / e + layers * o + collectives))))), float(e), float(o))
        for e in EFFICIENCIES
        for o in OVERHEADS_S
    )
    return best[1], best[2]


def errors(points: list[Point], efficiency: float, overhead_s: float) -> np.ndarray:
    """|measured / predicted - 1| of every point."""
    return np.array(
        [abs(p.measured_s / (p.bound_s / efficiency + p.layers * overhead_s + p.collectives_s) - 1) for p in points]
    )


def main() -> None:
    points = read_points()
    efficiency, overhead_s = fit(points)
    groups = sorted({p.group for p in points})
    held_out = []
    for group in groups:
        rest = [p for p in points if p.group != group]
        inside = [p for p in points if p.group == group]
        error = errors(inside, *fit(rest))
        held_out.append(error)
        median, most = np.quantile(error, (0.5, 0.9))
        print(f"{group}: {len(inside)} points, held out: median {median:.2f}, 90 % {most:.2f}")
    bounds = np.array([p.measured_s / (p.bound_s + p.collectives_s) for p in points])
    low, middle, high = np.quantile(bounds, (0.05, 0.5, 0.95))
    print(f"measured / (bound and collectives): 5 % {low:.2f}, median {middle:.2f}, 95 % {high:.2f}")
    error = max(float(np.quantile(group, 0.9)) for group in held_out)
    print(f"held out, all points: 90 % {np.quantile(np.concatenate(held_out), 0.9):.2f}")
    print(f"efficiency {efficiency:.2f}, overhead {overhead_s * 1e6:.0f} µs a layer, {len(points)} points")
    fields = (
        ("efficiency", efficiency, roofline.EFFICIENCY),
        ("layer overhead, s", overhead_s, roofline.LAYER_OVERHEAD_S),
        ("held-out relative error, 90 %, worst group", error, roofline.RELATIVE_ERROR),
    )
    bars = [{"name": n, "value": v, "target": t, "ok": abs(v - t) <= 0.02 * t} for n, v, t in fields]
    print(json.dumps({"bars": bars}))


if __name__ == "__main__":
    main()
