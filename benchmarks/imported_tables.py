"""How well imported measurements predict what was left out of them, and what others measured of the same machines.

Vidur (ops/vidur): every second number of tokens, or message, of each table is left out and looked up in the rest.
Splitwise (ops/splitwise): every fourth step of each model and sharding is left out, and predicted by a fit to the rest,
until each was. Then Splitwise's prompts and decode steps of Llama 2 70B on A100, predicted from Vidur's operators, and
from the data sheet. Every step is a composition of its own: repetitions of one never stand on both sides.

    python benchmarks/imported_tables.py --data ../shared/data
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bars import Bar, finish, needed_data
from paretune.profiler.hardware import BadHardware, accelerator
from paretune.profiler.importers import vidur
from paretune.profiler.importers.checks import Finding, by_file
from paretune.profiler.importers.kinds import read_step_table
from paretune.profiler.importers.step_rows import StepRows, bound_s
from paretune.profiler.operator_tables import OperatorTable
from paretune.profiler.step_fit import fit_all_steps
from paretune.profiler.step_time import composed_time_s
from paretune.profiler.tables import step_tables
from paretune.profiler.vidur_step import vidur_step
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import Pool

Floats = NDArray[np.float64]

LLAMA_2_70B = ModelShape.from_config(
    {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
     "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 32000, "rms_norm_eps": 1e-5,
     "max_position_embeddings": 16384}
)  # fmt: skip


def wrong(predicted: Floats, measured: Floats) -> Floats:
    return np.abs(predicted / measured - 1)


def said(errors: Sequence[float] | Floats) -> str:
    median, most = np.quantile(np.asarray(errors), (0.5, 0.9))
    return f"{len(errors):5d} left out, median {median:6.1%}, 90 % {most:6.1%}"


def summed(errors: Sequence[float] | Floats) -> dict[str, float]:
    """What `said` prints."""
    median, most = np.quantile(np.asarray(errors), (0.5, 0.9))
    return {"left_out": len(errors), "median": float(median), "90 %": float(most)}


def counted(findings: Sequence[Finding]) -> dict[str, object]:
    """What was refused and flagged, all together and by file and reason."""
    return {
        "refused": sum(each.rows for each in findings if each.refused),
        "flagged": sum(each.rows for each in findings if not each.refused),
        "by file": [
            {"file": each.file, "refused": each.refused, "reason": each.reason, "rows": each.rows, "of": each.of}
            for each in by_file(findings)
        ],
    }


def halved(table: OperatorTable) -> Floats:
    """Errors of every second point, looked up in the others; the ends are kept."""
    order = np.argsort(table.points[:, 0], kind="stable")
    inner = order[1:-1:2]
    rest = np.setdiff1d(order, inner)
    kept = replace(table, points=table.points[rest], seconds=table.seconds[rest])
    return wrong(kept.lookup(table.points[inner]), table.seconds[inner])


def vidur_bars(tables: vidur.VidurTables) -> tuple[list[Bar], dict[str, object]]:
    by_operator = defaultdict(list)
    for table in tables.every():
        if len(table.seconds) > 4:
            by_operator[table.operator] += halved(table).tolist()
    print(f"Vidur, {tables.device}:")
    for name, errors in by_operator.items():
        print(f"  {name:26} {said(errors)}")
    for finding in by_file(tables.findings):
        print(f"  {finding}")
    layers = [e for name, errors in by_operator.items() if name in vidur.OPERATORS for e in errors]
    links = [e for name, errors in by_operator.items() if name not in vidur.OPERATORS for e in errors]
    by_operator |= {"all operators": layers, "all collectives": links}
    for name in ("all operators", "all collectives"):
        print(f"  {name:26} {said(by_operator[name])}")
    bars = [
        Bar("Vidur: operators of a layer left out, median error", float(np.median(layers)), 0.05, at_least=False),
        Bar("Vidur: collectives left out, median error", float(np.median(links)), 0.05, at_least=False),
    ]
    found: dict[str, object] = {name: summed(errors) for name, errors in by_operator.items()}
    return bars, found | {"findings": counted(tables.findings)}


def splitwise_bars(tables: Sequence[StepRows]) -> tuple[list[Bar], dict[str, object]]:
    errors: dict[str, list[float]] = {"prompts": [], "decode steps": []}
    details: dict[str, object] = {}
    print("Splitwise, whole steps:")
    for table in tables:
        ordered = sorted(table.points, key=lambda p: (p.prefill_pairs, p.decode_context))
        found = np.abs(
            fit_all_steps(table.points, bound_s(table.of, table.points, accelerator("A100")).tolist()).errors
        )  # in the same order
        prompts = np.array([p.prefill_pairs > 0 for p in ordered])
        for name, of in (("prompts", prompts), ("decode steps", ~prompts)):
            print(f"  {table.of!s:42} {name:13} {said(found[of])}")
            errors[name] += found[of].tolist()
            details[f"{table.of}: {name}"] = summed(found[of])
    for name, each in errors.items():
        print(f"  {'all of them':42} {name:13} {said(each)}")
        details[f"all: {name}"] = summed(each)
    bars = [
        Bar(f"Splitwise: {name} left out, median error", float(np.median(each)), target, at_least=False)
        for (name, each), target in zip(errors.items(), (0.10, 0.05))
    ]
    return bars, details


def together(tables: vidur.VidurTables, steps: Sequence[StepRows]) -> tuple[list[Bar], dict[str, object]]:
    """Splitwise's prompts by Vidur's operators, and by the data sheet.

    Decode steps there are the host's (45 ms, of which reading the weights takes 9), and are printed beside them.
    """
    device = accelerator("A100")
    errors: dict[str, list[float]] = defaultdict(list)
    details: dict[str, object] = {}
    print("Splitwise's steps of Llama 2 70B on A100, predicted from Vidur's operators | from the data sheet:")
    for table in steps:
        if not table.of.model.startswith("llama2"):
            continue
        pool = Pool(
            accelerator="A100", tensor_parallel_size=table.of.tensor_parallel_size, max_model_len=16384,
            max_num_seqs=64, max_num_batched_tokens=64 * 512, num_kv_blocks=1024,
        )  # fmt: skip
        try:
            models = (vidur_step(tables, LLAMA_2_70B, pool), step_tables(device, LLAMA_2_70B, pool))
        except BadHardware as error:
            print(f"  {table.of}: {error}")
            continue
        for point in table.points:
            step = (point.num_tokens, point.num_rows, point.num_samples, point.decode_context, point.prefill_pairs)
            both = [composed_time_s(each.tables, *step) for each in models]
            name = "prompts" if point.prefill_pairs else "decode steps"
            for by, seconds in zip(("operators", "data sheet"), both):
                for each in (name, "all"):
                    errors[f"{each} by {by}"].append(abs(seconds / point.median_s - 1))
            print(
                f"  TP {table.of.tensor_parallel_size} {name[:-1]:12} {point.num_tokens:6d} tokens "
                f"{point.num_rows:3d} rows  {point.median_s * 1e3:9.1f} ms, predicted {both[0] * 1e3:9.1f} | "
                f"{both[1] * 1e3:9.1f}"
            )
    for name, each in errors.items():
        print(f"  {name:28} {said(each)}")
        details[name] = summed(each)
    found = errors.get("prompts by operators")
    value = float(np.median(found)) if found else None
    return [Bar("Splitwise's prompts from Vidur's operators, median error", value, 0.30, at_least=False)], details


def main() -> int:
    folder = needed_data("ops", "vidur")
    tables = vidur.read_tables(folder, "A100")
    steps, findings = read_step_table(needed_data("ops", "splitwise", "splitwise_a100_dev.csv"))
    bars, details = vidur_bars(tables)
    for finding in by_file(findings):
        print(finding)
    more, about_steps = splitwise_bars(steps)
    last, about_both = together(tables, steps)
    about_steps["findings"] = counted(findings)
    finish(
        [*bars, *more, *last], {"vidur": details, "splitwise": about_steps, "together": about_both}, "imported_tables"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
