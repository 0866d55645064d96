"""Requests simulated per CPU-second, warm, on one core: the first 40 minutes of the Azure conversation trace.

256 sequences, 2,048 batched tokens, blocks of 16 tokens, 30,000 of them; step times of Llama-3.1-8B on one H200 from
its data sheet. The same trace with 1,500 blocks preempts, and is reported beside it, as are single steps without jumps.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

from bars import Bar, finish, needed_data, spread
from paretune.profiler.hardware import accelerator
from paretune.profiler.simulator import SimulationResult, simulate
from paretune.profiler.tables import step_tables
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import Pool
from paretune.traces import Trace, read
from paretune.traces.metrics import summarize

RUNS = 7
TARGET = 300_000
DEVICE = "H200"


def timed(trace: Trace, pool: Pool, tables: object, **options: object) -> tuple[list[float], SimulationResult]:
    simulate(trace.select(slice(0, 64)), pool, tables, **options)  # compiles, or loads what was compiled
    rates = []
    for _ in range(RUNS):
        begin = time.process_time()
        result = simulate(trace, pool, tables, **options)
        rates.append(len(trace) / (time.process_time() - begin))
    return rates, result


def main() -> int:
    trace = read(needed_data("traces", "azure2023", "conv_first40min.csv"))
    config = needed_data("models", "hf_configs", "meta-llama--Meta-Llama-3.1-8B.json")
    shape = ModelShape.from_config(json.loads(config.read_text()))
    details = {}
    for name, blocks, jump in (
        ("30,000 blocks", 30_000, True),
        ("1,500 blocks", 1_500, True),
        ("no jumps", 30_000, False),
    ):
        pool = Pool(
            accelerator=DEVICE,
            max_model_len=16_384,
            max_num_seqs=256,
            max_num_batched_tokens=2_048,
            num_kv_blocks=blocks,
        )
        tables = step_tables(accelerator(DEVICE), shape, pool).tables
        rates, result = timed(trace, pool, tables, jump=jump)
        summary = summarize(result.times)
        details[name] = {
            "requests_per_cpu_second": spread(rates),
            "steps": result.steps,
            "preemptions": result.preemptions,
            "finished": summary.finished,
            "ttft_p95_s": summary.value("ttft", 95),
            "tpot_p50_s": summary.value("tpot", 50),
        }
        print(f"{name:>14}: {statistics.median(rates):>11,.0f} requests per CPU-second", file=sys.stderr)
    rate = details["30,000 blocks"]["requests_per_cpu_second"]["median"]
    finish([Bar("requests per CPU-second, Azure conv 40 min", rate, TARGET)], details, "simulator_speed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
