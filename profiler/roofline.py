"""Step times from a data sheet: never measured, and labeled so.

The bound of an operator is max(operations / peak rate, bytes / peak bandwidth) (Williams, Waterman and Patterson,
"Roofline", CACM 52(4), 2009), of a collective what collectives.py says of the links that its group spans. Real
engines take longer: a share of the peaks, and time between kernels. Both are fitted to published serving points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ..runtime.draft_shape import draft_shape
from ..runtime.memory import GPU_MEMORY_SHARE
from ..runtime.model_shape import ModelShape
from ..runtime.spec import Pool
from .collectives import Collective, collective_bound_s
from .hardware import Accelerator, BadHardware
from .operators import Composition, OperatorWork, kv_bytes_per_token, rank_weight_bytes, step_work
from .step_time import WORK_GRID, StepTables

# Fitted by benchmarks/roofline_calibration.py on 2026-11-26 to the TPOT of 360 published fp8 points of dense models
# (H100 and B200, TensorRT-LLM and vLLM, TP 1 to 8; NVIDIA's aiconfigurator silicon set): the share of its bound that
# an operator reaches, and the time a layer takes beside its operators. The error: each group (GPU, engine, model) is
# predicted by the others, and of the groups' 90 % quantiles (0.14 to 0.55; all points together 0.26) the worst counts,
# because a tune asks about a new group. Other accelerators and precisions were not checked at all.
EFFICIENCY = 0.78
LAYER_OVERHEAD_S = 32e-6
RELATIVE_ERROR = 0.56

# A collective reaches another share of its bound, and takes time beside it (launch, waiting for the slowest rank). The
# share is that of the largest messages in aiconfigurator's tables: 0.74, 0.53, 0.60 for 2, 4, 8 of H100, 0.63, 0.47,
# 0.46 of B200. The time is its p2p_latency, 10 us a message "based on observations" (systems/*.yaml, 2026-07-25).
COLLECTIVE_EFFICIENCY = 0.55
COLLECTIVE_OVERHEAD_S = 10e-6

# By storage of the weights: the arithmetic they are multiplied in. Attention and the vocabulary projection of fp8 and
# int8 models, and the routers of experts, compute in bf16.
_ARITHMETIC = {
    "fp32": "fp32",
    "bf16": "bf16",
    "fp16": "bf16",
    "fp8": "fp8",
    "int8": "int8",
    "int4": "bf16",  # expanded in the kernel (W4A16)
    "nvfp4": "fp4",
    "mxfp4": "fp4",
    "ternary": "int8",
}
_UNQUANTIZED = ("head", "router", "shared_gate")


def operator_bound_s(work: OperatorWork, accelerator: Accelerator, precision: str) -> float:
    """Least time of an operator on one rank, seconds: a bound, not an estimate.

    Args:
        precision: of the arithmetic, not of the storage.
    Raises: BadHardware: the accelerator has no rate for this precision; no other is put in its place.

    >>> from .hardware import accelerator
    >>> one_token = OperatorWork("4096 x 4096", flops=2 * 4096**2, weight_bytes=2 * 4096**2)
    >>> f"{operator_bound_s(one_token, accelerator('H100'), 'bf16') * 1e6:.1f} µs"
    '10.0 µs'
    """
    seconds = (work.weight_bytes + work.kv_bytes + work.activation_bytes) / accelerator.peak_bytes_per_s
    if np.any(work.flops):
        seconds = np.maximum(seconds, work.flops / accelerator.flops_per_s(precision))
    if work.messages:
        kind, size = cast(Collective, work.name.rpartition(".")[2]), work.message_bytes
        if kind == "all_to_all" and work.ranks > 1:  # here what leaves a rank; there its own part counts, too
            size = size * work.ranks / (work.ranks - 1)
        seconds += collective_bound_s(kind, accelerator, work.ranks, size, work.messages)
    return seconds


def step_bound_s(accelerator: Accelerator, shape: ModelShape, step: Composition, pool: Pool) -> dict[str, float]:
    """Least time of each operator of a step, seconds by operator."""
    return _bound_s(accelerator, shape, step, _Sharding.of(pool))


class _Sharding(NamedTuple):
    """What of a pool decides how long a step of a given composition takes."""

    tensor_parallel_size: int
    weight_dtype: str
    kv_dtype: str
    expert_parallel: bool

    @classmethod
    def of(cls, pool: Pool) -> _Sharding:
        return cls(pool.tensor_parallel_size, pool.weight_dtype, pool.kv_cache_dtype, pool.enable_expert_parallel)


def _bound_s(accelerator: Accelerator, shape: ModelShape, step: Composition, sharding: _Sharding) -> dict[str, float]:
    work = step_work(shape, step, **sharding._asdict())
    plain = "fp32" if sharding.weight_dtype == "fp32" else "bf16"
    stored = _ARITHMETIC[sharding.weight_dtype]
    return {
        w.name: operator_bound_s(w, accelerator, plain if "attention" in w.name or w.name in _UNQUANTIZED else stored)
        for w in work
    }


def _is_collective(name: str) -> bool:
    """Whether an operator of a step is a collective, by its name."""
    return name.rpartition(".")[2] in get_args(Collective)


def _num_collectives(
    shape: ModelShape, step: Composition, sharding: _Sharding, of: Callable[[str], bool] = lambda name: True
) -> int:
    """Collectives of a step, all layers together."""
    return sum(work.messages for work in step_work(shape, step, **sharding._asdict()) if of(work.name))


def step_estimate_s(accelerator: Accelerator, shape: ModelShape, step: Composition, pool: Pool) -> float:
    """What a step may take in a real engine: each operator's bound over the share it reaches, and overheads."""
    return _estimate_s(accelerator, shape, step, _Sharding.of(pool)) + shape.num_layers * LAYER_OVERHEAD_S


def _estimate_s(
    accelerator: Accelerator,
    shape: ModelShape,
    step: Composition,
    sharding: _Sharding,
    of: Callable[[str], bool] = lambda name: True,
) -> float:
    """Seconds of the operators whose names are `of` interest, without what a layer takes beside them."""
    bound = {name: s for name, s in _bound_s(accelerator, shape, step, sharding).items() if of(name)}
    collective_s = [s for name, s in bound.items() if _is_collective(name)]
    operators_s = sum(bound.values()) - sum(collective_s)
    return (
        operators_s / EFFICIENCY
        + sum(collective_s) / COLLECTIVE_EFFICIENCY
        + _num_collectives(shape, step, sharding, of) * COLLECTIVE_OVERHEAD_S
    )


def _least_s(
    accelerator: Accelerator, shape: ModelShape, step: Composition, sharding: _Sharding, of: Callable[[str], bool]
) -> float:
    return sum(s for name, s in _bound_s(accelerator, shape, step, sharding).items() if of(name))


def roofline_tables(accelerator: Accelerator, shape: ModelShape, pool: Pool) -> StepTables:
    """Step tables of a pool on an accelerator that nobody measured.

    The chords between the points of the tables lie above the convex bound, so no step is faster than it. Of a mixture
    of experts it is no bound but an expectation, by uniform routing, and not convex: there the points are close.

    Raises: BadHardware: a missing peak rate, or a model that the memory does not hold.
    """
    if accelerator.peak_bytes_per_s == 0:
        todo = "run `paretune profile` and tune with the profile"
        raise BadHardware(accelerator.name, "no data sheet", "an accelerator of the catalog", todo)
    check_kv_blocks(accelerator, shape, pool)
    found = _tables(accelerator, shape, pool, _estimate_s)
    found.tokens_s[1:] += shape.num_layers * LAYER_OVERHEAD_S
    return found


def roofline_bounds(accelerator: Accelerator, shape: ModelShape, pool: Pool) -> StepTables:
    """The least step times that the data sheet allows, by part. Raises: BadHardware: a missing peak rate."""
    return _tables(accelerator, shape, pool, _least_s)


_Seconds = Callable[[Accelerator, ModelShape, Composition, "_Sharding", Callable[[str], bool]], float]


def _tables(accelerator: Accelerator, shape: ModelShape, pool: Pool, seconds: _Seconds) -> StepTables:
    key = (accelerator, shape, _Sharding.of(pool), seconds)
    return StepTables(
        tokens_s=_linear_s(*key, pool.max_num_batched_tokens, False).copy(),
        rows_s=np.zeros(pool.max_num_seqs + 1),
        samples_s=_linear_s(*key, pool.max_num_samples, True).copy(),
        decode_attention_s=_attention_s(*key, True).copy(),
        prefill_attention_s=_attention_s(*key, False).copy(),
        request_s=np.zeros(2),
    )


# A search asks for a thousand pools of a few shardings: these tables were a sixth of its time.
@lru_cache(maxsize=256)
def _linear_s(
    accelerator: Accelerator, shape: ModelShape, sharding: _Sharding, seconds: _Seconds, size: int, samples: bool
) -> NDArray[np.float64]:
    """(size + 1,) seconds of 0 to `size` tokens (of samples: of the vocabulary projection), attention left out."""
    at = np.unique(np.concatenate([[1, size], np.round(WORK_GRID[size >= WORK_GRID])])).astype(np.int64)
    times_s = []
    for n in at.tolist():
        step = Composition(1, 1, n, 0.0, 0.0) if samples else Composition(n, 1, 0, 0.0, 0.0)
        times_s.append(seconds(accelerator, shape, step, sharding, lambda name: name.startswith("head") == samples))
    table: NDArray[np.float64] = np.interp(np.arange(size + 1), at, np.array(times_s))
    table[0] = 0.0
    return table


@lru_cache(maxsize=256)
def _attention_s(
    accelerator: Accelerator, shape: ModelShape, sharding: _Sharding, seconds: _Seconds, decode: bool
) -> NDArray[np.float64]:
    """Seconds of attention at each point of WORK_GRID."""
    attention = "decode_attention" if decode else "prefill_attention"
    table = []
    for work in WORK_GRID.tolist():
        # the fewest tokens that make so many pairs read the most cache for each: one prompt from its start
        tokens = 1 if decode else max(1, math.ceil(math.sqrt(2 * work) - 1))
        step = Composition(tokens, 1, 0, work if decode else 0.0, 0.0 if decode else work)
        table.append(seconds(accelerator, shape, step, sharding, lambda name: name == attention))
    return np.maximum.accumulate(np.array(table))


def kv_blocks(accelerator: Accelerator, shape: ModelShape, pool: Pool) -> int:
    """KV blocks of pool.block_size tokens that fit: GPU_MEMORY_SHARE of the memory, less the weights.

    A draft model's weights, and its cache of as many blocks, take part of it.
    Activations and the engine's own buffers come out of the rest; 0 or less where the weights alone do not fit.
    """
    tp = pool.tensor_parallel_size
    draft = draft_shape(pool)
    models = (shape,) if draft is None else (shape, draft)
    weights = sum(rank_weight_bytes(m, tp, pool.weight_dtype, pool.enable_expert_parallel) for m in models)
    left = accelerator.memory_bytes * GPU_MEMORY_SHARE - weights
    return math.floor(left / (pool.block_size * sum(kv_bytes_per_token(m, tp, pool.kv_cache_dtype) for m in models)))


def check_kv_blocks(accelerator: Accelerator, shape: ModelShape, pool: Pool) -> None:
    """Raises: BadHardware: the pool asks for more KV blocks than fit."""
    fit = kv_blocks(accelerator, shape, pool)
    if pool.num_kv_blocks > fit:
        devices = f"{pool.tensor_parallel_size} x {accelerator.name}"
        allowed = f"at most {max(fit, 0)} on {devices} with {pool.weight_dtype} weights"
        raise BadHardware(
            "num_kv_blocks", pool.num_kv_blocks, allowed, "lower it, or shard the model over more devices"
        )
