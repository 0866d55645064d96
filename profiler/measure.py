"""Measures a model on this machine, configuration by configuration, into a Profile.

Each configuration runs in processes of its own, started as a server starts its replicas. Where replicas share the
machine the others are busy while one is measured, because they share memory bandwidth and caches: under full load
that is right, and under little load it errs on the slow side.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from ..kernels.cpu.build import load
from ..kernels.tiles import Tile, TileTable
from ..kernels.weight_formats import WEIGHT_FORMATS
from ..runtime.memory import check_memory
from ..runtime.model_shape import ModelShape, matrix_dtype, resolve_model
from ..runtime.parallel import tensor_parallel_sizes, thread_environment, usable_cores
from ..runtime.runnable import USUAL_WEIGHT_DTYPES, check_runnable
from ..runtime.spec import Deployment, Pool
from .operators import UNTILED, linears
from .profile import (
    Configuration,
    Key,
    OperatorPoint,
    Peaks,
    Profile,
    StepPoint,
    now,
    shape_data,
    this_machine,
    versions,
)

OPERATOR_ROWS = (1, 4, 16, 64, 256, 1024)
START_LIMIT_S = 300.0
# the first pass over the scenarios is ended, whatever it lacks, when it takes so many times what it was given
PATIENCE = 3.0
# beside that, for a scenario that has begun
PASS_LIMIT_S = 600.0

Progress = Callable[[str, float], None]


class MeasureFailed(RuntimeError):
    """A measuring process that failed, with what it said."""

    def __init__(self, reason: str, exit_code: int = 1) -> None:
        super().__init__(reason)
        # 2: what it was to measure was refused, the model say
        self.exit_code = 2 if exit_code == 2 else 1


def possible_configurations(
    cores: int | None = None,
    *,
    weight_dtypes: Sequence[str] = USUAL_WEIGHT_DTYPES,
    kv_cache_dtypes: Sequence[str] = ("bf16",),
    pipeline_parallel_sizes: Sequence[int] = (1,),
    context_parallel_sizes: Sequence[int] = (1,),
    shape: ModelShape | None = None,
) -> tuple[Key, ...]:
    """Ways to use up to `cores` cores (default: this machine's): ranks x threads x replicas.

    Ranks and threads by powers of two; replicas by powers of two, and as many as there are cores for. Ranks that share
    a mixture of experts divide either every expert or, expert parallel, the experts among them.

    Args:
        shape: of the model; left out: any number of ranks may share a layer.
    """
    cores = usable_cores() if cores is None else cores
    powers = [1 << i for i in range(cores.bit_length()) if 1 << i <= cores]
    ranks = powers if shape is None else [tp for tp in powers if tp in tensor_parallel_sizes(shape)]
    keys = (
        Key(tp, threads, replicas, weight, kv, stages, parts, whole_experts)
        for weight in weight_dtypes
        for kv in kv_cache_dtypes
        for stages in pipeline_parallel_sizes
        for parts in context_parallel_sizes
        for tp in ranks
        for whole_experts in (False, True)[: 1 + _divides_experts(shape, tp)]
        for threads in powers
        for replicas in sorted({*powers, max(1, cores // (stages * parts * tp * threads))})
    )
    return tuple(key for key in keys if key.cores <= cores)


def _divides_experts(shape: ModelShape | None, ranks: int) -> bool:
    return shape is not None and shape.experts is not None and 1 < ranks <= shape.experts.num_experts


def measure(
    model: str,
    configurations: Sequence[Key] | None = None,
    *,
    seconds_per_configuration: float = 10.0,
    tiles: Callable[[Key], TileTable] | None = None,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 2048,
    max_model_len: int = 2048,
    progress: Progress | None = None,
    command: str = "",
) -> Profile:
    """Measure whole steps, operators and peaks.

    Args:
        model: directory, or "paretune/small".
        configurations: left out: all that this machine can run (`possible_configurations`).
        seconds_per_configuration: of whole steps, starting and operators not counted.
        tiles: the tiles that a configuration's whole steps run on; its linear tiles are measured as operators, too,
            beside the default one. Left out: default tiles.
        max_num_seqs, max_num_batched_tokens, max_model_len: largest steps to measure.
        progress: called with what comes next and the share that is done.
    Raises: BadModel, BadSpec: the model cannot run so; MeasureFailed: a measuring process failed.
    """
    model_dir = resolve_model(model)
    shape = ModelShape.load(model_dir)
    keys = possible_configurations(shape=shape) if configurations is None else configurations
    max_model_len = min(max_model_len, shape.max_position_embeddings)
    tell = progress or (lambda what, share: None)
    threads = sorted({key.num_threads for key in keys})
    busy_before = psutil.cpu_percent(interval=1.0) / 100
    jobs = len(threads) + 2 * len(keys)
    done = 0
    peaks = []
    for number in threads:
        tell(f"peaks of {number} threads", done / jobs)
        environment = {"OMP_NUM_THREADS": str(number)}
        answer = _run({"kind": "peaks", "num_threads": number}, environment)
        peaks.append(Peaks(num_threads=number, **answer))
        done += 1
    measured = []
    operators: dict[tuple[int, bool, int, str, str], tuple[OperatorPoint, ...]] = {}
    for key in keys:
        table = tiles(key) if tiles is not None else TileTable()
        pool = Pool(
            **key._asdict(),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            num_kv_blocks=-(-max(24576, max_num_seqs * 320, max_model_len + 16) // 16),
            enable_prefix_caching=False,
            tiles=table,
        )
        deployment = Deployment(model=str(model_dir), pools=(pool,))
        check_runnable(deployment, shape)
        check_memory(shape, pool)
        sharding = (key.tensor_parallel_size, key.enable_expert_parallel)
        kind = (*sharding, key.num_threads, key.weight_dtype, key.kv_cache_dtype)
        if kind not in operators:
            tell(f"operators, {key}", done / jobs)
            operators[kind] = _operators(shape, pool)
        done += 1
        tell(f"steps, {key}", done / jobs)
        answer = _steps(deployment, model_dir, seconds_per_configuration)
        steps = tuple(StepPoint(**point) for point in answer["steps"])
        configuration = Configuration(
            **key._asdict(), tiles=table, steps=steps, disturbed=answer["disturbed"], operators=operators[kind]
        )
        measured.append(configuration)
        done += 1
    library = load()
    return Profile(
        created_at=now(),
        command=command,
        machine=this_machine("torch" if library is None else library.instructions),
        versions=versions(),
        model=model,
        shape=shape_data(shape),
        peaks=tuple(_raised(p, measured, shape) for p in peaks),
        configurations=tuple(measured),
        busy_before=busy_before,
    )


def _steps(deployment: Deployment, model_dir: Path, seconds: float) -> Any:
    pool = deployment.pool
    environment = dict(thread_environment(pool))
    task = {"deployment": deployment.model_dump(mode="json"), "model_dir": str(model_dir.resolve()), "seconds": seconds}
    with ExitStack() as stack:
        load = {**task, "kind": "load"}
        neighbors = [stack.enter_context(_worker(load, environment)) for _ in range(pool.replicas - 1)]
        found = _run({**task, "kind": "steps"}, environment)
        for neighbor in neighbors:
            if neighbor.process.poll() is not None:
                # what was measured had fewer beside it than it says
                raise _failed(neighbor.process, neighbor.said)
        return found


def _operators(shape: ModelShape, pool: Pool) -> tuple[OperatorPoint, ...]:
    tp, precision = pool.tensor_parallel_size, pool.weight_dtype
    default = Tile("linear", "torch" if load() is None else "cpp")
    wanted = ("linear", precision)
    named = {tile for key, tile in pool.tiles.items() if key[:2] == wanted}
    chosen = [default, *sorted(named - {default}, key=repr)]
    task = {
        "kind": "operators",
        "layers": [
            {
                "name": x.name,
                "out_features": x.out_features,
                "in_features": x.in_features,
                "tensor_parallel_size": tp,
                "stored_as": matrix_dtype(x.name, precision),
            }
            for x in linears(shape, tp, pool.enable_expert_parallel)
            if x.name not in UNTILED
        ],
        "precision": precision,
        "kv_dtype": pool.kv_cache_dtype,
        "tiles": [{"backend": t.backend, "parameters": dict(t.parameters), "default": t == default} for t in chosen],
        "rows": [rows for rows in OPERATOR_ROWS if rows <= pool.max_num_batched_tokens],
        "attention": {
            "heads": shape.num_heads // tp,
            "kv_heads": max(1, shape.num_kv_heads // tp),
            "head_dim": shape.head_dim,
            "tensor_parallel_size": tp,
        },
        "num_threads": pool.num_threads,
    }
    return tuple(OperatorPoint(**point) for point in _run(task, {"OMP_NUM_THREADS": str(pool.num_threads)}))


def _raised(peaks: Peaks, configurations: Sequence[Configuration], shape: ModelShape) -> Peaks:
    """The peaks, and no less than what any operator has shown: a bound that a measurement beats is no bound."""
    flops, reads = dict(peaks.flops_per_s), dict(peaks.read_bytes)
    for configuration in configurations:
        if configuration.num_threads != peaks.num_threads:
            continue
        tp = configuration.tensor_parallel_size
        layers = linears(shape, tp, configuration.enable_expert_parallel)
        sizes = {x.name: x.out_features * x.in_features for x in layers}
        for point in configuration.operators:
            if point.operator != "linear":
                continue
            fastest_s = max(point.median_s - point.iqr_s, 0.5 * point.median_s)
            rate = 2 * point.rows * sizes[point.name] / fastest_s
            flops[point.precision] = max(flops.get(point.precision, 0.0), rate)
            if point.rows == 1:
                stored_as = WEIGHT_FORMATS[matrix_dtype(point.name, point.precision)]
                read = int(sizes[point.name] * stored_as.bytes_per_weight())
                reads[read] = max(reads.get(read, 0.0), read / fastest_s)
    return Peaks(num_threads=peaks.num_threads, flops_per_s=flops, read_bytes=tuple(sorted(reads.items())))


@dataclass(frozen=True)
class _Worker:
    """A measuring process that has answered, and the file of what it said beside."""

    process: subprocess.Popen[str]
    answer: Any
    said: IO[str]


@contextmanager
def _worker(task: dict[str, Any], environment: dict[str, str]) -> Iterator[_Worker]:
    """A measuring process; waits for its answer, and ends it after the block."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.measure_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, **environment},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            limit_s = START_LIMIT_S + PASS_LIMIT_S + PATIENCE * task.get("seconds", 0.0)
            yield _Worker(process, _answer(process, process.stdout, said, limit_s), said)
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def _run(task: dict[str, Any], environment: dict[str, str]) -> Any:
    with _worker(task, environment) as worker:
        return worker.answer


def _answer(process: subprocess.Popen[str], stdout: IO[str], said: IO[str], limit_s: float) -> Any:
    deadline = time.monotonic() + limit_s
    while not select.select([stdout], [], [], 0.5)[0]:
        if time.monotonic() > deadline:
            raise MeasureFailed(f"a measuring process did not answer within {limit_s:.0f} s")
    line = stdout.readline()
    if not line:
        process.wait()
        raise _failed(process, said)
    return json.loads(line)


def _failed(process: subprocess.Popen[str], said: IO[str]) -> MeasureFailed:
    said.seek(0)
    lines = said.read().strip().splitlines()
    return MeasureFailed(
        f"a measuring process ended with exit code {process.returncode}: {' | '.join(lines[-3:])}", process.returncode
    )
