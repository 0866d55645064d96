"""Requests simulated and candidates screened per CPU-second, warm, on one core, with every percentile of every metric.

The first 40 minutes of the Azure conversation trace with 256 sequences, 2,048 batched tokens and blocks of 16 tokens:
30,000 of them, and 1,500, as recorded and with steps twice as long (then requests pile up and preempt each other, most
where a prompt is admitted as soon as its first chunk fits). Mooncake's synthetic trace with its prefixes. Steps of
Llama-3.1-8B on one H200 from its data sheet, and (a real profile's tables) on one H100 with fp8 KV from the operators
that aiconfigurator measured there; a bar counts for the slower of the two. Beside the rates: what of the time the event
loop takes, and what the percentiles; how far jumping over decode steps is from taking them one by one, percentile by
percentile; and what memory the Azure trace takes when it is streamed again and again until it has 20 million requests
(`--stream N`).
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from bars import Bar, finish, needed_data, spread
from paretune.optimizer.screen import estimate_all, means_of, screen
from paretune.profiler.hardware import accelerator
from paretune.profiler.importers import read_tables
from paretune.profiler.operator_source import OperatorSource
from paretune.profiler.simulator import SimulationResult, simulate
from paretune.profiler.step_time import StepTables, scaled
from paretune.profiler.stream import simulate_stream
from paretune.profiler.tables import step_tables
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.spec import Pool
from paretune.traces import Trace, read
from paretune.traces.metrics import PERCENTILES, TTFT, Summary, Target, summarize

RUNS = 7
DEVICE = "H200"
MEASURED = {"accelerator": "H100", "kv_cache_dtype": "fp8"}
LIMITS = {"max_model_len": 16_384, "max_num_seqs": 256, "max_num_batched_tokens": 2_048, "num_kv_blocks": 30_000}


def rates_of(work: Callable[[], Any], count: int) -> list[float]:
    work()  # compiles, or loads what was compiled
    rates = []
    for _ in range(RUNS):
        begin = time.process_time()
        work()
        rates.append(count / (time.process_time() - begin))
    return rates


def run(trace: Trace, pool: Pool, tables: StepTables, jump: bool = True) -> tuple[SimulationResult, Summary]:
    result = simulate(trace, pool, tables, jump=jump)
    return result, summarize(result.times)


def tables_of(shape: ModelShape, limits: dict[str, Any], slower: float) -> dict[str, tuple[Pool, StepTables]]:
    """By where step times come from: a pool and its tables."""
    operators = OperatorSource(read_tables(needed_data("ops", "aiconfigurator"), "H100", "vllm"))
    found = {}
    for name, source, device in (
        (f"data sheet of {DEVICE}", accelerator(DEVICE), {"accelerator": DEVICE}),
        ("operators measured on H100", operators, MEASURED),
    ):
        pool = Pool.model_validate({**device, **limits})
        found[name] = pool, scaled(step_tables(source, shape, pool).tables, slower)
    return found


def largest_difference(one: Summary, other: Summary) -> float:
    """Of every percentile of every metric, relative."""
    pairs = [(one.value(metric, p), other.value(metric, p)) for metric in one.values for p in PERCENTILES]
    return max(abs(a / b - 1) for a, b in pairs)


def screening(trace: Trace, shape: ModelShape) -> tuple[list[float], int]:
    """Candidates per CPU-second: batch limits and caches under one device's tables, estimated and screened."""
    base = Pool(accelerator=DEVICE, **LIMITS)
    tables = step_tables(accelerator(DEVICE), shape, base).tables
    pools = [
        base.model_copy(update={"max_num_seqs": seqs, "max_num_batched_tokens": tokens, "num_kv_blocks": blocks})
        for seqs in range(8, 257, 8)
        for tokens in range(256, 2_049, 256)
        for blocks in range(1_500, 30_001, 1_500)
    ]
    targets = (Target(TTFT, 95.0, 1.0),)
    means = means_of(trace, targets, False)

    def work() -> object:
        estimates = estimate_all([means] * len(pools), pools, [tables] * len(pools), 30)
        many = [1.0] * len(pools)
        ones = [1] * len(pools)
        return screen(
            estimates, pools, [means] * len(pools), many, targets=targets, metric=TTFT, p=95.0, most_replicas=ones
        )

    return rates_of(work, len(pools)), len(pools)


def streamed(trace: Trace, pool: Pool, tables: StepTables, requests: int) -> dict[str, float]:
    """The trace again and again until there are so many requests, in memory that is looked at before and after."""
    copies = -(-requests // len(trace))
    span_s = float(trace.arrival_s[-1]) + 1.0

    def chunks(count: int) -> Iterator[Trace]:
        for copy in range(count):
            yield Trace(trace.arrival_s + copy * span_s, trace.input_tokens, trace.output_tokens)

    simulate_stream(chunks(2), pool, tables)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    result = simulate_stream(chunks(copies), pool, tables)
    seconds = time.process_time() - begin
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {
        "requests": result.summary.requests,
        "finished": result.summary.finished,
        "peak_memory_bytes": (before + grown // 1024) * 1024,
        "grown_bytes_per_request": grown / result.summary.requests,
        "requests_per_cpu_second": result.summary.requests / seconds,
        "itl_p99_s": result.summary.value("itl", 99),
    }


def main() -> int:
    azure = read(needed_data("traces", "azure2023", "conv_first40min.csv"))
    mooncake = read(needed_data("traces", "mooncake", "synthetic_trace.jsonl"))
    config = needed_data("models", "hf_configs", "meta-llama--Meta-Llama-3.1-8B.json")
    shape = ModelShape.from_config(json.loads(config.read_text()))
    details: dict[str, Any] = {}
    worst = 0.0
    for name, trace, changes, slower in (
        ("30,000 blocks", azure, {}, 1.0),
        ("1,500 blocks", azure, {"num_kv_blocks": 1_500}, 1.0),
        ("1,500 blocks, steps twice as long", azure, {"num_kv_blocks": 1_500, "admission": "first_chunk"}, 2.0),
        ("Mooncake with its prefixes", mooncake, {"max_model_len": 200_000}, 1.0),
    ):
        details[name] = {}
        for source, (pool, tables) in tables_of(shape, {**LIMITS, **changes}, slower).items():
            rates = rates_of(partial(run, trace, pool, tables), len(trace))
            loop = rates_of(partial(simulate, trace, pool, tables), len(trace))
            result, summary = run(trace, pool, tables)
            difference = largest_difference(summary, run(trace, pool, tables, jump=False)[1])
            worst = max(worst, difference)
            details[name][source] = {
                "requests_per_cpu_second": spread(rates),
                "without_percentiles": spread(loop),
                "steps": result.steps,
                "preemptions": result.preemptions,
                "prefix_hit_tokens": result.prefix_hit_tokens,
                "finished": summary.finished,
                "values": {metric: dict(values) for metric, values in summary.values.items()},
                "largest_difference_to_single_steps": difference,
            }
            print(
                f"{name}, {source}: {statistics.median(rates):,.0f} requests per CPU-second "
                f"({statistics.median(loop):,.0f} without percentiles); {result.preemptions:,} preemptions; "
                f"jumps differ from single steps by at most {difference:.1e}",
                file=sys.stderr,
            )
    pool = Pool(accelerator=DEVICE, **LIMITS)
    many = int(sys.argv[sys.argv.index("--stream") + 1]) if "--stream" in sys.argv else 20_000_000
    stream = streamed(azure, pool, step_tables(accelerator(DEVICE), shape, pool).tables, many)
    details["stream"] = stream
    print(
        f"stream of {stream['requests']:,}: {stream['grown_bytes_per_request']:.2f} bytes more a request, "
        f"{stream['requests_per_cpu_second']:,.0f} requests per CPU-second",
        file=sys.stderr,
    )
    rates, candidates = screening(azure, shape)
    details["screen"] = {"candidates_per_cpu_second": spread(rates), "candidates": candidates}
    print(f"screen: {statistics.median(rates):,.0f} candidates per CPU-second", file=sys.stderr)

    def rate(name: str) -> float:
        return min(float(each["requests_per_cpu_second"]["median"]) for each in details[name].values())

    bars = [
        Bar("requests per CPU-second, Azure conv 40 min", rate("30,000 blocks"), 1_000_000),
        Bar("requests per CPU-second, 1,500 blocks", rate("1,500 blocks"), 250_000),
        Bar("requests per CPU-second, 1,500 blocks and overload", rate("1,500 blocks, steps twice as long"), 250_000),
        Bar("requests per CPU-second, Mooncake with prefix cache", rate("Mooncake with its prefixes"), 100_000),
        Bar("largest relative difference of a percentile, jumps to single steps", worst, 1e-3, at_least=False),
        Bar("bytes of memory a streamed request", stream["grown_bytes_per_request"], 200, at_least=False),
        Bar("candidates screened per CPU-second", float(np.median(rates)), 200_000),
    ]
    finish(bars, details, "simulator_speed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
