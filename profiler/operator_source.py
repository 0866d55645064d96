"""Step tables of an accelerator from measured operator tables: a source beside a profile and a data sheet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.model_shape import ModelShape
from ..runtime.spec import Pool
from .accelerator_step import BATCH_GRID, CONTEXT_GRID, TOKEN_GRID, Precision, engine_fusion, gpu_step
from .closed_loop import Host
from .decoder_layout import decoder_layout
from .hardware import BadHardware
from .importers import OperatorTables
from .roofline import check_kv_blocks
from .serving_point import PUBLISHED_HOST
from .step_time import WORK_GRID, StepTables

# 90 % of the TPOT of 838 published points lie within it, predicted from tables alone (benchmarks/silicon.py,
# 2026-11-27).
RELATIVE_ERROR = 0.20
_DTYPES = {"bf16": "bfloat16", "fp8": "fp8", "nvfp4": "nvfp4"}
_CACHES = {"bf16": "bfloat16", "fp8": "fp8"}
_CONTEXT_OF_A_ROW = 1024.0


@dataclass(frozen=True, eq=False)
class OperatorSource:
    """Measured operators of one accelerator, as one engine's kernels run them.

    beside  tables of other engines there, for the matrices
    host    what the host adds to steps and requests
    """

    tables: OperatorTables
    beside: tuple[OperatorTables, ...] = ()
    host: Host = PUBLISHED_HOST
    routing: str = "power_law_1.01"

    @property
    def not_modeled(self) -> tuple[str, ...]:
        versions = ", ".join(sorted(set(self.tables.versions.values())))
        measured = f"{self.tables.system} with {self.tables.engine} {versions}"
        return (
            f"step times are sums of single operators that others measured ({measured}), not measured steps",
            "operators of another engine version than yours; gaps between kernels",
            f"decode attention: by the sum of contexts, at {_CONTEXT_OF_A_ROW:.0f} tokens a row",
            "CUDA graphs: padding and memory; steps with prompts are launched as fast as the GPU runs them",
            "time outside the steps: 15.6 ms a request, published for another server",
        )


def operator_step_tables(source: OperatorSource, shape: ModelShape, pool: Pool) -> StepTables:
    """Step times of a pool of this accelerator.

    Raises: BadHardware: another accelerator, a precision or sharding that tables do not have, or a model that does not
        fit; BadTable: an operator that was not measured.
    """
    accelerator = source.tables.accelerator
    if pool.accelerator != accelerator.name:
        raise BadHardware("pool.accelerator", pool.accelerator, accelerator.name, "give the tables of the pool's")
    for field, value, known in (
        ("weight_dtype", pool.weight_dtype, _DTYPES),
        ("kv_cache_dtype", pool.kv_cache_dtype, _CACHES),
    ):
        if value not in known:
            raise BadHardware(f"pool.{field}", value, ", ".join(known), "choose one that was measured")
    check_kv_blocks(accelerator, shape, pool)
    ranks, cache = pool.tensor_parallel_size, _CACHES[pool.kv_cache_dtype]
    experts = ranks if pool.enable_expert_parallel else 1
    fusion = engine_fusion(source.tables.engine, shape.family)
    layout = decoder_layout(_config(shape), ranks, experts, _DTYPES[pool.weight_dtype], fusion)
    over_prompts = "fp8" if cache == "fp8" and source.tables.engine == "trtllm" else "bfloat16"
    step = gpu_step(source.tables, layout, Precision(over_prompts, cache), source.routing, source.beside)

    def by_count(table: NDArray[np.float64], most: int) -> NDArray[np.float64]:
        count = np.arange(most + 1, dtype=np.float64)
        seconds = np.interp(count, TOKEN_GRID, table) * np.maximum(1.0, count / TOKEN_GRID[-1])
        seconds[0] = 0.0
        return np.asarray(seconds, np.float64)

    tokens_s = by_count(np.maximum(step.decode_s, step.prefill_s), pool.max_num_batched_tokens)
    tokens_s[1:] += source.host.step_s
    rows = np.clip(WORK_GRID / _CONTEXT_OF_A_ROW, 1.0, float(pool.max_num_seqs))
    decode_s = _bilinear(step.decode_attention_s, rows, WORK_GRID / rows)
    prefill_s = _bilinear(step.prefill_attention_s, np.ones_like(WORK_GRID), np.sqrt(2.0 * WORK_GRID))
    return StepTables(
        tokens_s=tokens_s,
        rows_s=source.host.row_s * np.arange(pool.max_num_seqs + 1, dtype=np.float64),
        samples_s=by_count(step.samples_s, pool.max_num_samples),
        decode_attention_s=np.maximum.accumulate(decode_s),
        prefill_attention_s=np.maximum.accumulate(prefill_s),
        request_s=np.array([source.host.request_s, source.host.request_s]),
    )


def _bilinear(
    table: NDArray[np.float64], rows: NDArray[np.float64], context: NDArray[np.float64]
) -> NDArray[np.float64]:
    """A table of rows and mean contexts at pairs of them, in logarithms; beyond its end as the context."""
    log = np.log(table)
    by_context = np.stack([np.interp(np.log(context), np.log(CONTEXT_GRID), each) for each in log])
    place = np.interp(np.log(rows), np.log(BATCH_GRID), np.arange(len(BATCH_GRID)))
    low = np.minimum(place.astype(np.int64), len(BATCH_GRID) - 2)
    at, columns = place - low, np.arange(len(rows))
    inside = np.exp((1.0 - at) * by_context[low, columns] + at * by_context[low + 1, columns])
    return np.asarray(inside * np.maximum(1.0, context / CONTEXT_GRID[-1]), np.float64)


def _config(shape: ModelShape) -> Mapping[str, Any]:
    """What decoder_layout reads of a config.json."""
    if shape.sliding_window is not None or shape.ternary is not None:
        raise BadHardware("model", "a sliding window or ternary weights", "neither", "tables are not read for it")
    found: dict[str, Any] = {
        "model_type": shape.family,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "vocab_size": shape.vocab_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
    }
    if shape.experts is not None:
        if len(shape.experts.layers) != shape.num_layers or shape.experts.shared_intermediate_size:
            raise BadHardware("model", "dense layers or a shared expert", "experts in all layers", "not laid out")
        found |= {
            "num_experts": shape.experts.num_experts,
            "num_experts_per_tok": shape.experts.experts_per_token,
            "moe_intermediate_size": shape.experts.intermediate_size,
        }
    return found
