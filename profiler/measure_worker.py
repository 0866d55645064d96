"""One measuring process: the real engine through steps of chosen compositions, or the load of a neighbor beside it.

Started by measure.py as `python -m paretune.profiler.measure_worker` with the environment that a server gives its
replicas. The task is one line of JSON on standard input; the answer one line on standard output. It ends when standard
input closes.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.engine import Engine, Request, StepRecord
from ..runtime.sampler import SamplingParams
from ..runtime.scheduler_state import MAX_NUM_BATCHED_TOKENS
from ..runtime.spec import Deployment, parse_deployment
from .measure import PATIENCE

# Rows of decode batches: all run together first, then they end level by level, so that one prefill serves every level.
_LEVELS = (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
_STEPS_PER_LEVEL = 5
_DECODE_CONTEXTS = (16, 128, 384, 1024)
_DECODE_TOKENS = 16384
_PROMPTS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_CHUNKS = (64, 128, 256, 512)
_MOST_CHUNKS = 8
# share of a step's time that its thread must have had a core for the step to count as undisturbed
_UNDISTURBED = 0.95
_MIXED = ((4, 32), (4, 256), (16, 64), (16, 256), (32, 128), (32, 448))
_SEVERAL = ((2, 16), (4, 32), (8, 16), (16, 32), (8, 64), (4, 256))

Key = tuple[Any, ...]
Record = tuple[Key, StepRecord]
Scenario = tuple[int, Callable[[], Iterator[Record]]]


class Driver:
    """Makes an engine compute what is asked: random prompts, greedy decoding; nothing is found in a prefix cache."""

    def __init__(self, deployment: Deployment, model_dir: Path, seed: int = 0) -> None:
        self.engine = Engine(deployment, model_dir)
        self.pool = deployment.pool
        self._rng = np.random.default_rng(seed)
        self._next_id = 1
        self.undisturbed = True

    def add(self, prompt_tokens: int, max_tokens: int) -> None:
        prompt = self._rng.integers(3, self.engine.shape.vocab_size, prompt_tokens).astype(np.int32)
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0)
        self.engine.add(Request(self._next_id, prompt, sampling))
        self._next_id += 1

    def step(self) -> StepRecord:
        """One step; its seconds are those that this thread had a core, where other programs took it away meanwhile.

        `undisturbed` says afterwards whether they did not. On a machine where six programs shared two cores the CPU
        time of a step repeated within 15 % and its wall time within a factor of 7. Several ranks wait for each other
        off their cores: of them the wall time is taken, disturbed or not.
        """
        cpu_s, wall_s = time.thread_time(), time.perf_counter()
        self.engine.step()
        cpu_s, wall_s = time.thread_time() - cpu_s, time.perf_counter() - wall_s
        self.undisturbed = self.pool.devices_per_replica > self.pool.num_threads or cpu_s > _UNDISTURBED * wall_s
        record = self.engine.last_step
        assert record is not None
        return record if self.undisturbed else replace(record, seconds=min(cpu_s, record.seconds))

    def drain(self) -> Iterator[StepRecord]:
        while self.engine.has_work:
            yield self.step()

    def set_budget(self, tokens: int) -> None:
        """Tokens a step may compute; a pool's own limit is fixed, and one engine measures all of them."""
        self.engine._state.limits[MAX_NUM_BATCHED_TOKENS] = tokens

    def scenarios(self) -> Iterator[Scenario]:
        """What to run in one pass, as (tokens it computes, how); small and telling ones first."""
        most, context = self.pool.max_num_batched_tokens, self.pool.max_model_len
        for n in _PROMPTS:
            if n <= most and n < context:
                yield n, partial(self._prompts, 1, n)
        for length in _DECODE_CONTEXTS:
            rows = min(self.pool.max_num_seqs, _DECODE_TOKENS // length)
            levels = [level for level in _LEVELS if level <= rows]
            if length + len(levels) * _STEPS_PER_LEVEL < context:
                yield levels[0] * length, partial(self._decode, length, levels)
        for rows, n in _MIXED:
            longest = max(n, 64 + 8)
            if rows + n <= most and rows < self.pool.max_num_seqs and longest < context:
                yield 2 * rows * 64 + n, partial(self._mixed, rows, n)
        for rows, n in _SEVERAL:
            if rows * n <= most and rows <= self.pool.max_num_seqs and n < context:
                yield rows * n, partial(self._prompts, rows, n)
        for budget in _CHUNKS:
            if budget < most and budget < context // 2:
                yield min(context - 1, _MOST_CHUNKS * budget), partial(self._chunked, budget)

    def _prompts(self, rows: int, tokens: int) -> Iterator[Record]:
        for _ in range(rows):
            self.add(tokens, 1)
        for record in self.drain():
            yield _composition(record), record

    def _chunked(self, budget: int) -> Iterator[Record]:
        self.set_budget(budget)
        self.add(min(self.pool.max_model_len - 1, _MOST_CHUNKS * budget), 1)
        for record in self.drain():
            yield _composition(record), record
        self.set_budget(self.pool.max_num_batched_tokens)

    def _decode(self, context: int, levels: list[int]) -> Iterator[Record]:
        ends = dict(zip(levels, range(1, len(levels) + 1)))
        for row in range(levels[0]):
            # the row stays as long as levels above `row` rows run
            last = max(end for level, end in ends.items() if level > row)
            self.add(context, 1 + last * _STEPS_PER_LEVEL)
        for record in self.drain():
            pure = record.prefill_pairs == 0 and record.num_tokens == record.num_rows
            yield ("decode", context, record.num_rows) if pure else _composition(record), record

    def _mixed(self, rows: int, tokens: int) -> Iterator[Record]:
        for _ in range(rows):
            self.add(64, 8)
        while self.engine.stats().waiting:
            self.step()
        for _ in range(2):
            self.add(tokens, 1)
            record = self.step()
            yield ("mixed", rows, tokens, record.num_tokens, record.num_samples), record
        for _ in self.drain():
            pass


def _composition(record: StepRecord) -> Key:
    return (record.num_tokens, record.num_rows, record.num_samples, record.decode_context, record.prefill_pairs)


def measure_steps(driver: Driver, seconds: float) -> dict[str, Any]:
    """Points of whole steps: passes over all scenarios until the time is up, at least one.

    "disturbed" is the share of steps during which other programs took the core (see Driver.step): how steps stretch
    on a machine that serves is measured on a live server (calibration.py), not by chance here.

    In the first pass what would take more than a quarter of the time is left out; the tables say what was the largest.
    """
    records: dict[Key, list[tuple[StepRecord, bool]]] = {}
    began = time.perf_counter()
    rate = _tokens_per_s(driver)
    passes = 0
    while passes == 0 or time.perf_counter() - began < seconds:
        for tokens, run in driver.scenarios():
            left = seconds - (time.perf_counter() - began)
            if tokens / rate > (0.25 * seconds if passes == 0 else left):
                continue
            if left < (0 if passes else (1 - PATIENCE) * seconds):
                break
            for key, record in run():
                records.setdefault(key, []).append((record, driver.undisturbed))
        passes += 1
    undisturbed = [kept for found in records.values() for _, kept in found]
    points = map(_point, records.values())
    # 0 s: all its steps were disturbed, and the CPU clock stood still; it says nothing
    steps = [point for point in points if point["median_s"] > 0]
    return {"steps": steps, "disturbed": 1 - float(np.mean(undisturbed))}


def _tokens_per_s(driver: Driver) -> float:
    tokens = min(128, driver.pool.max_num_batched_tokens, driver.pool.max_model_len - 1)
    best_s = math.inf
    for _ in range(3):
        driver.add(tokens, 1)
        began = time.perf_counter()
        for _ in driver.drain():
            pass
        best_s = min(best_s, time.perf_counter() - began)
    return tokens / best_s


def _point(found: list[tuple[StepRecord, bool]]) -> dict[str, Any]:
    """One point of the records, each with whether it was undisturbed; disturbed ones only where there are no others.

    Of those the mean is taken: it is their sum that the CPU clock has right (see `_call_times`).
    """
    records = [record for record, undisturbed in found if undisturbed] or [record for record, _ in found]
    seconds = np.array([record.seconds for record in records])
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    if not any(undisturbed for _, undisturbed in found):
        median = seconds.mean()
    first = records[0]
    return {
        "num_tokens": first.num_tokens,
        "num_rows": first.num_rows,
        "num_samples": first.num_samples,
        "decode_context": float(np.mean([record.decode_context for record in records])),
        "prefill_pairs": float(np.mean([record.prefill_pairs for record in records])),
        "median_s": float(median),
        "iqr_s": float(high - low),
        "count": len(records),
    }


def load(driver: Driver) -> None:
    """What a busy neighbor does to the caches and the memory: prompts and decoding, without a pause, for ever."""
    prompt = min(128, driver.pool.max_model_len // 2)
    while True:
        while driver.engine.stats().running + driver.engine.stats().waiting < min(16, driver.pool.max_num_seqs):
            driver.add(prompt, min(64, driver.pool.max_model_len - prompt - 1))
        driver.step()


def read_rates(num_threads: int) -> list[tuple[int, float]]:
    """(bytes, bytes/s) of reading an array again and again: the faster of torch's sum and our matrix by a vector."""
    import torch

    from ..kernels.linear import linear, pack

    torch.set_num_threads(num_threads)
    rates = []
    for megabytes in (0.25, 1, 4, 16, 64):
        rows = int(megabytes * (1 << 20)) // 4096
        matrix = torch.ones((rows, 1024))
        packed, vector = pack(matrix, "fp32"), torch.ones((1, 1024))
        best_s = min(_best_s(matrix.sum), _best_s(partial(linear, vector, packed)))
        rates.append((rows * 4096, rows * 4096 / best_s))
    return rates


def peak_flops(num_threads: int) -> dict[str, float]:
    """Best operations/s of a linear layer by precision: 512 rows through 1024 x 1024 and 4096 x 1024."""
    import torch

    from ..kernels.linear import linear, pack

    torch.set_num_threads(num_threads)
    rates = {}
    for precision in ("fp32", "bf16", "int8"):  # the kinds of arithmetic
        best = 0.0
        for out in (1024, 4096):
            packed, x = pack(torch.randn((out, 1024)), precision), torch.randn((512, 1024))
            best = max(best, 2 * 512 * out * 1024 / _best_s(partial(linear, x, packed)))
        rates[precision] = best
    return rates


def _best_s(call: Callable[[], Any], least_s: float = 0.05) -> float:
    """Least time of one call, over at least `least_s` and three calls: for a peak the best counts, not the median."""
    return float(min(_call_times(call, least_s, least=3)))


def linear_points(
    layers: list[dict[str, Any]], precision: str, tiles: list[dict[str, Any]], rows: list[int], num_threads: int
) -> list[dict[str, Any]]:
    """Operator points of linear layers, each by itself. tiles: {"backend", "parameters", "default"}."""
    import torch

    from ..kernels.linear import linear, pack
    from ..kernels.tiles import Tile

    torch.set_num_threads(num_threads)
    points = []
    for layer in layers:
        weight = torch.randn((layer["out_features"], layer["in_features"]))
        for tile in tiles:
            chosen = Tile("linear", tile["backend"], tuple(tile["parameters"].items()))
            packed = pack(weight, layer["stored_as"], backends=(chosen.backend,))
            for m in rows:
                x = torch.randn((m, layer["in_features"]))
                low, median, high, count = _quartiles(partial(linear, x, packed, chosen))
                points.append(
                    {
                        "operator": "linear",
                        "name": layer["name"],
                        "precision": precision,
                        "rows": m,
                        "tensor_parallel_size": layer["tensor_parallel_size"],
                        "default": tile["default"],
                        "backend": chosen.backend,
                        "parameters": dict(chosen.parameters),
                        "median_s": median,
                        "iqr_s": high - low,
                        "count": count,
                    }
                )
    return points


def attention_points(shape: dict[str, int], kv_dtype: str, num_threads: int) -> list[dict[str, Any]]:
    """Operator points of attention of one layer: decode by rows and context, prefill by tokens from the start."""
    import torch

    from ..kernels.decode_attention import decode_attention
    from ..kernels.paged_cache import PagedCache
    from ..kernels.prefill_attention import prefill_attention

    torch.set_num_threads(num_threads)
    heads, kv_heads, head_dim = shape["heads"], shape["kv_heads"], shape["head_dim"]
    cache = PagedCache.zeros(1024, kv_dtype, 16, kv_heads, head_dim)
    cache.write(torch.arange(1024 * 16), *torch.randn((2, 1024 * 16, kv_heads, head_dim)))
    points = []
    for rows, context in ((1, 256), (1, 1024), (8, 256), (8, 1024), (16, 1024)):
        tables = torch.arange(rows * context // 16, dtype=torch.int32).view(rows, -1)
        q, length = torch.randn((rows, heads, head_dim)), torch.full((rows,), context, dtype=torch.int32)
        quartiles = _quartiles(partial(decode_attention, q, cache, tables, length, head_dim**-0.5))
        points.append(("decode_attention", rows, context, quartiles))
    for tokens in (16, 64, 256, 1024):
        tables = torch.arange(tokens // 16, dtype=torch.int32).view(1, -1)
        q, start = torch.randn((tokens, heads, head_dim)), torch.tensor([0, tokens], dtype=torch.int32)
        before = torch.zeros(1, dtype=torch.int32)
        quartiles = _quartiles(partial(prefill_attention, q, cache, tables, start, before, head_dim**-0.5))
        points.append(("prefill_attention", tokens, tokens, quartiles))
    return [
        {
            "operator": operator,
            "name": operator,
            "precision": kv_dtype,
            "rows": rows,
            "context": context,
            "tensor_parallel_size": shape["tensor_parallel_size"],
            "default": True,
            "backend": "default",
            "parameters": {},
            "median_s": median,
            "iqr_s": high - low,
            "count": count,
        }
        for operator, rows, context, (low, median, high, count) in points
    ]


def _quartiles(call: Callable[[], Any], least_s: float = 0.012, least: int = 5) -> tuple[float, float, float, int]:
    times = _call_times(call, least_s, least)
    low, median, high = np.quantile(np.array(times), (0.25, 0.5, 0.75)).tolist()
    return low, median, high, len(times)


def _call_times(call: Callable[[], Any], least_s: float, least: int) -> list[float]:
    """Wall times of the calls, over at least `least_s`, during which this thread kept its core; where it never did,
    one: the mean CPU time of a call, but no less than half the shortest wall time.

    Single differences of CPU time are not to be trusted where a hypervisor takes the core away: time that it stole is
    taken off late, from whatever runs next, and whole calls have shown 0 s. Their sum is right, but for what is still
    to be taken off. Several threads have no common CPU clock; of them all wall times count.
    """
    import torch

    alone = torch.get_num_threads() == 1
    call()
    kept: list[float] = []
    shortest_s = math.inf
    calls, all_cpu_s, began = 0, 0.0, time.perf_counter()
    while calls < least or time.perf_counter() - began < least_s:
        cpu_s, wall_s = time.thread_time(), time.perf_counter()
        call()
        wall_s, cpu_s = time.perf_counter() - wall_s, time.thread_time() - cpu_s
        if not alone or cpu_s > _UNDISTURBED * wall_s:
            kept.append(wall_s)
        calls, all_cpu_s, shortest_s = calls + 1, all_cpu_s + cpu_s, min(shortest_s, wall_s)
    return kept or [max(all_cpu_s / calls, 0.5 * shortest_s)]


def _answer(task: dict[str, Any]) -> Any:
    if task["kind"] == "peaks":
        threads = task["num_threads"]
        return {"flops_per_s": peak_flops(threads), "read_bytes": read_rates(threads)}
    if task["kind"] == "operators":
        linear = linear_points(task["layers"], task["precision"], task["tiles"], task["rows"], task["num_threads"])
        return linear + attention_points(task["attention"], task["kv_dtype"], task["num_threads"])
    driver = Driver(parse_deployment(task["deployment"]), Path(task["model_dir"]))
    gc.collect()
    gc.freeze()  # as a replica does: a full collection would walk all of torch in the middle of a step
    if task["kind"] == "load":
        _say("ready")
        load(driver)
    points = measure_steps(driver, task["seconds"])
    driver.engine.close()
    return points


def _say(answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _leave_with_the_parent() -> None:
    # the bare file: a thread that waits in sys.stdin holds its lock, and Python cannot end
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)


def main() -> None:
    task = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    try:
        answer = _answer(task)
    except Exception as error:
        if not isinstance(getattr(error, "exit_code", None), int):
            raise
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)  # type: ignore[attr-defined]
    _say(answer)


if __name__ == "__main__":
    main()
