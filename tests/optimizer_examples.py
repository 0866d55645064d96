"""What tests of the optimizer share: a made-up machine with roofline-like step times, made-up prices, small traces."""

from __future__ import annotations

import numpy as np

from paretune.optimizer.front import Evaluation
from paretune.optimizer.space import SearchSpace
from paretune.profiler.hardware import Price
from paretune.profiler.step_time import WORK_GRID, ModeledStep, StepTables
from paretune.runtime.spec import Deployment, Pool
from paretune.traces.acceptance import Acceptance
from paretune.traces.columns import Labels
from paretune.traces.metrics import RequestTimes, Summary, Target, summarize
from paretune.traces.trace import Trace

# a model of 50 M parameters on a made-up core: 80 GFLOP/s and 20 GB/s at fp32
PARAMETERS = 50e6
FLOPS_PER_S = {"fp32": 80e9, "bf16": 144e9, "int8": 240e9}
BYTES_PER_PARAMETER = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0}
BYTES_PER_S = 20e9


def step_model(pool: Pool) -> ModeledStep:
    """A step: the longer of computing and reading the weights, a host's share, a collective; faster by tiles."""
    cores = (pool.num_threads * pool.tensor_parallel_size) ** 0.9
    tokens = np.arange(pool.max_num_batched_tokens + 1.0)
    rows = np.arange(pool.max_num_seqs + 1.0)
    faster = 1.25 if len(pool.tiles) else 1.0
    compute_s = tokens * 2 * PARAMETERS / (FLOPS_PER_S[pool.weight_dtype] * cores * faster)
    read_s = PARAMETERS * BYTES_PER_PARAMETER[pool.weight_dtype] / (BYTES_PER_S * cores)
    tokens_s = np.maximum(compute_s, read_s) + 5e-4 + 4e-4 * (pool.tensor_parallel_size > 1)
    tokens_s[0] = 0.0
    tables = StepTables(
        tokens_s=tokens_s,
        rows_s=rows * 1e-5,
        samples_s=np.arange(pool.max_num_samples + 1.0) * 2e-5 / cores,
        decode_attention_s=WORK_GRID * 5e-8 / cores,
        prefill_attention_s=WORK_GRID * 2e-9 / cores,
        request_s=np.array([1e-3, 1e-3]),
    )
    return ModeledStep(tables, True, 0.1, ("the weather",))


def price(pool: Pool) -> Price:
    return Price(0.05, 0.04, 0.06, "made up", "2026-11-01")


def poisson_trace(
    n: int = 300, rate_per_s: float = 1.0, seed: int = 0, *, apps: bool = False, targets: tuple[str, ...] = ()
) -> Trace:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2, n).astype(np.int32)
    return Trace(
        arrival_s=np.cumsum(rng.exponential(1 / rate_per_s, n)),
        input_tokens=rng.integers(10, 200, n).astype(np.int32),
        output_tokens=rng.integers(5, 60, n).astype(np.int32),
        app=Labels(("batch", "voice"), codes) if apps else None,
        targets=tuple(Target.parse(text) for text in targets),
        source="made up",
    )


NGRAM = {"speculation": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
ALL_KEPT = (Acceptance(None, 100, 100, 300, 300),)


def deployment(**changes: object) -> Deployment:
    fields = {"max_model_len": 512, "num_kv_blocks": 1024, "max_num_seqs": 16, "max_num_batched_tokens": 512}
    return Deployment(pools=(Pool.model_validate({**fields, **changes}),))


def small_space(**changes: tuple[object, ...]) -> SearchSpace:
    fields = {
        "num_threads": (1, 2),
        "replicas": (1, 2),
        "weight_dtype": ("bf16", "int8"),
        "max_num_seqs": (2, 8, 32),
        "max_num_batched_tokens": (64, 512),
        **changes,
    }
    return SearchSpace(tuple(fields.items()), deployment(), 2)  # type: ignore[arg-type]


def summary(latency_s: float) -> Summary:
    """A summary in which every latency is that long."""
    n, second = 3, np.full(3, latency_s)
    scheduled_s = np.arange(n, dtype=np.float64)
    times = RequestTimes(
        scheduled_s=scheduled_s,
        sent_s=scheduled_s,
        first_token_s=scheduled_s + second,
        kth_token_s=scheduled_s + second,
        end_s=scheduled_s + second,
        output_tokens=np.full(n, 40),
        finished=np.ones(n, np.bool_),
        k=30,
    )
    return summarize(times)


def evaluation(cost: float, latency_s: float, trial: int = 0, **changes: object) -> Evaluation:
    known = {
        "deployment": deployment(max_num_seqs=trial % 60 + 1),
        "fidelity": "simulated",
        "feasible": True,
        "reason": "",
        "summary": summary(latency_s),
        "usd_per_hour": min(cost, 1e6) * 2,
        "usd_per_million_tokens": cost,
        "capacity_rate": 1.0,
        "replicas_needed": 1,
        "trial": trial,
        "candidate": f"candidate {trial}",
    }
    return Evaluation(**{**known, **changes})  # type: ignore[arg-type]
