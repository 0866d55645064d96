"""Step times from a data sheet: never measured, and labeled so.

The bound of an operator is max(operations / peak rate, bytes / peak bandwidth) (Williams, Waterman and Patterson,
"Roofline", CACM 52(4), 2009), of a collective what collectives.py says of the links that its group spans. Real
engines take longer: a share of the peaks, and time between kernels. Both are fitted to published serving points.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..runtime.attention_shape import Attention
from ..runtime.draft_shape import draft_shape
from ..runtime.memory import GPU_MEMORY_SHARE
from ..runtime.model_shape import ModelShape
from ..runtime.quantization import Storage
from ..runtime.spec import Pool
from .attention_work import attention_work
from .collectives import collective_bound_s
from .hardware import Accelerator, BadHardware
from .operators import Composition, OperatorWork, Rows, Sharding, kv_bytes_per_token, rank_work
from .rank_memory import state_bytes_of_request, weight_bytes
from .routing import UNIFORM, Routing
from .step_time import WORK_GRID, PromptPairs, StepTables

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


class _Shares(NamedTuple):
    """What share of its bound an operator and a collective reach, and what a collective takes beside it, seconds."""

    operators: float
    collectives: float
    collective_s: float


_REACHED = _Shares(EFFICIENCY, COLLECTIVE_EFFICIENCY, COLLECTIVE_OVERHEAD_S)
_LEAST = _Shares(1.0, 1.0, 0.0)

# By storage of the weights: the arithmetic they are multiplied in. Attention and the vocabulary projection of fp8 and
# int8 models, and the routers of experts, compute in bf16; an indexer scores in fp8, as its keys are cached.
_ARITHMETIC = {
    "fp32": "fp32",
    "bf16": "bf16",
    "fp16": "bf16",
    "fp8": "fp8",
    "int8": "int8",
    "int4": "bf16",  # expanded in the kernel (W4A16)
    "nvfp4": "fp4",
    "mxfp4": "fp4",  # at best; see _usual_bound_s
    "ternary": "int8",
}
# A window of less than one eighth of max_model_len is taken as full; queries of a wider one as seeing all before them.
# Either is at most what is read, and tables by sums know no single contexts.
_SHORT_WINDOW = 8
_UNQUANTIZED = ("head", "router", "shared_gate")


def operator_bound_s(work: OperatorWork, accelerator: Accelerator, precision: str) -> float:
    """Least time of an operator on one rank, seconds: a bound, not an estimate. Arrays for as many steps.

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
    if work.collective is not None:
        # of an all-to-all our bytes are those given away, collectives.py's those for all, the rank's own included
        nbytes = work.message_bytes * (work.ranks / (work.ranks - 1) if work.collective == "all_to_all" else 1)
        # linear in the bytes, so that many steps take two calls
        latency_s = collective_bound_s(work.collective, accelerator, work.ranks, 0.0, work.messages)
        gigabyte_s = collective_bound_s(work.collective, accelerator, work.ranks, 1e9, work.messages)
        seconds = seconds + latency_s + (gigabyte_s - latency_s) / 1e9 * nbytes
    return seconds


def step_bound_s(accelerator: Accelerator, shape: ModelShape, step: Composition | Rows, pool: Pool) -> dict[str, float]:
    """Least time of each operator of a step, seconds by operator."""
    deployed = _Deployed.of(shape, pool)
    return {one.name: _bound_s(one, accelerator, deployed) for one in _work(shape, step, deployed)}


def usual_work(
    accelerator: Accelerator, shape: ModelShape, step: Composition | Rows, pool: Pool
) -> list[tuple[OperatorWork, float]]:
    """Each operator of a step, and its least time in the arithmetic that engines use, seconds: what estimates are a
    share of."""
    deployed = _Deployed.of(shape, pool)
    return [(one, _usual_bound_s(one, accelerator, deployed)) for one in _work(shape, step, deployed)]


class _Deployed(NamedTuple):
    """What of a pool decides how long a step of a given composition takes."""

    sharding: Sharding
    storage: Storage
    kv_dtype: str
    max_model_len: int

    @classmethod
    def of(cls, shape: ModelShape, pool: Pool) -> _Deployed:
        sharding = Sharding(pool.tensor_parallel_size, expert_parallel=pool.enable_expert_parallel)
        return cls(sharding, storage_of(shape, pool.weight_dtype), pool.kv_cache_dtype, pool.max_model_len)


def storage_of(shape: ModelShape, weight_dtype: str) -> Storage:
    """How weights of `weight_dtype` lie in memory: as in the checkpoint where it has them so, else as the bundled
    engine quantizes them."""
    if shape.quantization is not None and shape.quantization.weight_dtype == weight_dtype:
        return Storage.of_checkpoint(shape.quantization)
    return Storage.bundled(weight_dtype)


def _work(
    shape: ModelShape, step: Composition | Rows, deployed: _Deployed, shares: _Shares = _REACHED
) -> tuple[OperatorWork, ...]:
    """Of a step in a real engine, or the least of any: all tokens choose the same experts, and what one operator leaves
    for the next stays in a cache."""
    routing = UNIFORM
    if shares is _LEAST and shape.experts is not None:
        routing = Routing(1.0, shape.experts.experts_per_token / shape.experts.num_experts)
    found = rank_work(shape, step, deployed.sharding, deployed.storage, deployed.kv_dtype, routing=routing)
    return tuple(replace(one, activation_bytes=0.0) for one in found) if shares is _LEAST else found


def _bound_s(work: OperatorWork, accelerator: Accelerator, deployed: _Deployed) -> float:
    return operator_bound_s(work, accelerator, arithmetic_of(work.name, deployed.storage, accelerator))


def _usual_bound_s(work: OperatorWork, accelerator: Accelerator, deployed: _Deployed) -> float:
    """The same in the arithmetic that engines use: they multiply mxfp4 with activations of mxfp8 (W4A8)."""
    precision = arithmetic_of(work.name, deployed.storage, accelerator)
    if precision == "fp4" and deployed.storage.dtype(work.name) == "mxfp4":
        precision = "fp8"
    return operator_bound_s(work, accelerator, precision)


def arithmetic_of(operator: str, storage: Storage, accelerator: Accelerator) -> str:
    """The fastest precision that an operator may compute in; weights of four bits are expanded to bf16 where there is
    no fp4."""
    plain, rates = "fp32" if storage.weight_dtype == "fp32" else "bf16", accelerator.peak_flops_per_s
    if operator == "indexer":
        return "fp8" if "fp8" in rates else plain
    if "attention" in operator or operator in _UNQUANTIZED:
        return plain
    stored_as = storage.dtype(operator)
    return plain if stored_as in ("nvfp4", "mxfp4") and "fp4" not in rates else _ARITHMETIC[stored_as]


def step_estimate_s(accelerator: Accelerator, shape: ModelShape, step: Composition | Rows, pool: Pool) -> float:
    """What a step may take in a real engine: each operator's bound over the share it reaches, and overheads."""
    deployed = _Deployed.of(shape, pool)
    return _estimate_s(accelerator, _work(shape, step, deployed), deployed) + shape.num_layers * LAYER_OVERHEAD_S


def _estimate_s(
    accelerator: Accelerator, work: Iterable[OperatorWork], deployed: _Deployed, shares: _Shares = _REACHED
) -> float:
    """Seconds of operators, without what a layer takes beside them."""
    total_s = 0.0
    for one in work:
        least = shares is _LEAST
        bound_s = _bound_s(one, accelerator, deployed) if least else _usual_bound_s(one, accelerator, deployed)
        if one.collective is None:
            total_s = total_s + bound_s / shares.operators
        else:
            total_s = total_s + bound_s / shares.collectives + one.messages * shares.collective_s
    return total_s


def roofline_tables(accelerator: Accelerator, shape: ModelShape, pool: Pool) -> StepTables:
    """Step tables of a pool on an accelerator that nobody measured.

    The chords between the points of the tables lie above the convex bound, so no step is faster than it. Of a mixture
    of experts it is no bound but an expectation, by uniform routing, and not convex: there the points are close.

    Attention that sees no more than a short window, a chunk or what an indexer chose counts by rows and tokens, each
    taken to see all of it: at most what a step reads.

    Raises: BadHardware: a missing peak rate, or a model that the memory does not hold.
    """
    if accelerator.peak_bytes_per_s == 0:
        todo = "run `paretune profile` and tune with the profile"
        raise BadHardware(accelerator.name, "no data sheet", "an accelerator of the catalog", todo)
    check_kv_blocks(accelerator, shape, pool)

    found = _tables(accelerator, shape, pool, _REACHED)
    found.tokens_s[1:] += shape.num_layers * LAYER_OVERHEAD_S
    return found


def roofline_bounds(accelerator: Accelerator, shape: ModelShape, pool: Pool) -> StepTables:
    """The least step times that the data sheet allows, by part: a floor under what was measured. What depends on the
    batch as a whole counts as little as it can: experts that all tokens share, windows and chunks that hold nothing.

    Raises: BadHardware: a missing peak rate.
    """
    return _tables(accelerator, shape, pool, _LEAST)


def _tables(accelerator: Accelerator, shape: ModelShape, pool: Pool, shares: _Shares) -> StepTables:
    deployed = _Deployed.of(shape, pool)
    key = (accelerator, shape, deployed, shares)
    tokens_s = _linear_s(*key, pool.max_num_batched_tokens, False).copy()
    row_s, token_s = _limited_s(*key)
    return StepTables(
        tokens_s=tokens_s + token_s * np.arange(len(tokens_s)),
        rows_s=np.asarray(row_s * np.arange(pool.max_num_seqs + 1), np.float64),
        samples_s=_linear_s(*key, pool.max_num_samples, True).copy(),
        decode_attention_s=_attention_s(*key, True).copy(),
        prefill_attention_s=_attention_s(*key, False).copy(),
        request_s=np.zeros(2),
        prompt_pairs=_prompt_pairs(accelerator, shape, deployed),
    )


# A search asks for a thousand pools of a few shardings: these tables were a sixth of its time.
@lru_cache(maxsize=256)
def _linear_s(
    accelerator: Accelerator, shape: ModelShape, deployed: _Deployed, shares: _Shares, size: int, samples: bool
) -> NDArray[np.float64]:
    """(size + 1,) seconds of 0 to `size` tokens (of samples: of the vocabulary projection), attention left out."""
    at = np.unique(np.concatenate([[1, size], np.round(WORK_GRID[size >= WORK_GRID])])).astype(np.float64)
    none = np.zeros_like(at)
    # each token of a latent model decodes, so that kv_b is applied to it; what more of it prompts take, _prompt_pairs
    rows = at if shape.latent is not None else none
    tokens = (none + 1, none + 1, at) if samples else (at, rows, none)
    step = Composition.of_many(*tokens, none, none)
    work = [one for one in _work(shape, step, deployed, shares) if one.name.startswith("head") == samples]
    times_s = np.broadcast_to(_estimate_s(accelerator, work, deployed, shares), at.shape)
    table: NDArray[np.float64] = np.interp(np.arange(size + 1), at, times_s)
    table[0] = 0.0
    return table


@lru_cache(maxsize=256)
def _attention_s(
    accelerator: Accelerator, shape: ModelShape, deployed: _Deployed, shares: _Shares, decode: bool
) -> NDArray[np.float64]:
    """Seconds of attention to whole contexts at each point of WORK_GRID."""
    one, none = np.ones_like(WORK_GRID), np.zeros_like(WORK_GRID)
    # the fewest tokens that make so many pairs read the most cache for each: one prompt from its start
    tokens = one if decode else np.maximum(1, np.ceil(np.sqrt(2 * WORK_GRID) - 1))
    pairs = (WORK_GRID, none) if decode else (none, WORK_GRID)
    step = Composition.of_many(tokens, one, none, *pairs)
    found = _of_whole_contexts(shape, step, deployed, shares)
    times_s = none + sum(_bound_s(each, accelerator, deployed) for each in found) / shares.operators
    return np.asarray(np.maximum.accumulate(times_s), np.float64)


@lru_cache(maxsize=256)
def _limited_s(
    accelerator: Accelerator, shape: ModelShape, deployed: _Deployed, shares: _Shares
) -> tuple[float, float]:
    """Seconds for each row and for each token of attention to less than the context, and of the states of linear
    attention, which each row reads and writes."""
    row_s = token_s = 0.0
    if shape.linear_attention is not None:
        # of this operator the tokens' part is in _linear_s; read and written by each row is the state
        state = next(o for o in _work(shape, Composition(1, 1, 0, 0.0, 0.0), deployed) if o.name == "linear_attention")
        row_s += state.kv_bytes / accelerator.peak_bytes_per_s / shares.operators
    for limited, seen in _limited(shape, deployed) if shares is not _LEAST else ():
        many = 1024  # tokens of one prompt, which read the same keys
        for work in _attention(limited, Composition(1, 1, 0, float(seen), 0.0), deployed):
            row_s += _bound_s(work, accelerator, deployed) / shares.operators * (work.name != "indexer")
        for work in _attention(limited, Composition(many, 1, 0, 0.0, float(many * seen)), deployed):
            token_s += _bound_s(work, accelerator, deployed) / shares.operators / many * (work.name != "indexer")
    return row_s, token_s


def _attention(shape: ModelShape, step: Composition, deployed: _Deployed) -> list[OperatorWork]:
    tp = deployed.sharding.tensor_parallel_size
    found = attention_work(shape, step, tp, deployed.kv_dtype, activation_bytes=2).operators
    return [work for work in found if work.name != "linear_attention"]


def _of_whole_contexts(
    shape: ModelShape, step: Composition, deployed: _Deployed, shares: _Shares = _REACHED
) -> list[OperatorWork]:
    """Attention of queries that see all before them, and what an indexer scores."""

    def sees_all(kind: Attention) -> bool:
        return kind.window is None and kind.chunk is None if shares is _LEAST else _sees_all(kind, deployed)

    kinds = tuple(
        replace(kind, window=None, chunk=None, layers=kind.layers if sees_all(kind) else ())
        for kind in shape.attention_kinds()
    )
    found = _attention(replace(shape, attention=kinds, sliding_window=None) if kinds else shape, step, deployed)
    if shares is _LEAST:
        found = [replace(work, activation_bytes=0.0) for work in found]
    chooses = shape.latent is not None and shape.latent.indexer is not None
    return [work for work in found if work.name == "indexer"] if chooses else found


def _limited(shape: ModelShape, deployed: _Deployed) -> list[tuple[ModelShape, int]]:
    """Each kind of attention that sees less than the context, alone, with the tokens that it sees."""
    found = []
    for kind in shape.attention_kinds():
        limit = kind.window or kind.chunk
        if limit is not None and not _sees_all(kind, deployed):
            found.append((replace(shape, attention=(replace(kind, window=None, chunk=None),)), limit))
    if shape.latent is not None and shape.latent.indexer is not None:
        found.append((shape, min(shape.latent.indexer.topk, deployed.max_model_len)))
    return found


def _sees_all(kind: Attention, deployed: _Deployed) -> bool:
    limit = kind.window or kind.chunk
    return limit is None or limit > deployed.max_model_len / _SHORT_WINDOW


def _prompt_pairs(accelerator: Accelerator, shape: ModelShape, deployed: _Deployed) -> PromptPairs:
    """What attention of prompts takes beside its query-key pairs, in pairs of the prefill table."""
    work = _of_whole_contexts(shape, Composition(1, 1, 0, 0.0, 1.0), deployed)
    rates = [accelerator.flops_per_s(arithmetic_of(one.name, deployed.storage, accelerator)) for one in work]
    pair_s = sum(one.flops / rate for one, rate in zip(work, rates))
    if pair_s == 0:
        return PromptPairs()
    key_s = sum(one.kv_bytes for one in work) / accelerator.peak_bytes_per_s
    if shape.latent is None or shape.latent.indexer is not None:
        return PromptPairs(key_s / pair_s)
    expand = next(o for o in _work(shape, Composition(1, 1, 0, 1.0, 0.0), deployed) if o.name == "kv_b")
    expand_s = expand.flops / accelerator.flops_per_s(arithmetic_of("kv_b", deployed.storage, accelerator))
    in_latent = _of_whole_contexts(shape, Composition(1, 1, 0, 1.0, 0.0), deployed)
    in_latent_s = sum(one.flops / rate for one, rate in zip(in_latent, rates))
    return PromptPairs(key_s / pair_s, expand_s / pair_s, in_latent_s / pair_s)


def kv_blocks(accelerator: Accelerator, shape: ModelShape, pool: Pool) -> int:
    """KV blocks of pool.block_size tokens that fit: GPU_MEMORY_SHARE of the memory, less the weights to the byte.

    A draft model's weights, and its cache of as many blocks, take part of it, and states of linear attention.
    Activations and the engine's own buffers come out of the rest; 0 or less where the weights alone do not fit.
    """
    sharding = Sharding(pool.tensor_parallel_size, expert_parallel=pool.enable_expert_parallel)
    draft = draft_shape(pool)
    models = (shape,) if draft is None else (shape, draft)
    left = accelerator.memory_bytes * GPU_MEMORY_SHARE
    for model in models:
        left -= weight_bytes(model, sharding, storage_of(model, pool.weight_dtype))
        left -= pool.max_num_seqs * state_bytes_of_request(model, sharding)
    tp = sharding.tensor_parallel_size
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
