"""Step times of an accelerator from measured operator tables: what the GPU does in a step, operator by operator.

Sum of the operators of one rank, each looked up in its table: linear layers by their shapes, attention of prompts and
of decode rows, all-reduce by size and ranks, experts, elementwise kernels by bandwidth. The host is not in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .decoder_layout import DecoderLayout, Fusion, Gemm
from .importers import OperatorTables
from .operator_tables import OperatorTable

Floats = NDArray[np.float64]

# What an elementwise kernel reaches of the memory's peak, and what it takes beside: aiconfigurator's systems/*.yaml,
# mem_bw_empirical_scaling_factor and mem_empirical_constant_latency (2026-07-25), there called corrections from
# observation. LLMServingSim's vLLM profile of an RTX PRO 6000 has 2.0 to 4.2 µs for the same kernels on one token.
ELEMENTWISE_BANDWIDTH_SHARE = 0.8
ELEMENTWISE_LATENCY_S = 3e-6

# Precisions of which the kernels that quantize activations are not taken as the matrices' tables have them: fp8 with
# the scales of the checkpoint, whose kernels decoder_layout.Fusion counts. Block scales and nvfp4 have own kernels.
FUSED_QUANTIZATION: dict[str, tuple[str, ...]] = {"trtllm": ("fp8",), "vllm": ("fp8",), "sglang": ()}
# Precisions of which an engine's tables hide the launch of the quantizing kernel behind the kernel before, so that they
# stand for no other engine. SGLang's nvfp4 is FlashInfer's, with programmatic dependent launch (enable_pdl, on by
# itself since sm90): 5 µs where TensorRT-LLM's and vLLM's tables have 8 to 9, and bf16 5.
_OVERLAPPED_QUANTIZATION = {"sglang": ("nvfp4",)}
# TensorRT-LLM's models whose all-reduce adds the residual, norms and quantizes (AllReduceFusionOp in modeling_llama.py
# and modeling_deepseekv3.py of 1.0; modeling_qwen3.py has none).
_NORMS_IN_ALL_REDUCE = {"trtllm": ("llama", "deepseek_v3")}

BATCH_GRID: Floats = np.unique(np.round(2.0 ** np.arange(0, 10.25, 0.25)))
POINTS_PER_OCTAVE = 4
CONTEXT_GRID: Floats = 2.0 ** (np.arange(17 * POINTS_PER_OCTAVE + 1) / POINTS_PER_OCTAVE)
TOKEN_GRID: Floats = np.unique(
    np.concatenate([np.arange(1, 17), np.arange(24, 513, 8), np.round(2.0 ** np.arange(9, 15.1, 0.125))])
)


class GpuStep(NamedTuple):
    """Seconds of the parts of a step, on grids that the event loop interpolates.

    decode_s            (len(TOKEN_GRID),)  linear layers, experts, elementwise, all-reduce of steps without prompts
    prefill_s           (len(TOKEN_GRID),)  the same of steps with prompts
    samples_s           (len(TOKEN_GRID),)  vocabulary projection by rows that sample
    decode_attention_s  (len(BATCH_GRID), len(CONTEXT_GRID))  by rows and mean context
    prefill_attention_s (len(BATCH_GRID), len(CONTEXT_GRID))  by prompts and tokens of each, from their start
    """

    decode_s: Floats
    prefill_s: Floats
    samples_s: Floats
    decode_attention_s: Floats
    prefill_attention_s: Floats


@dataclass(frozen=True)
class Precision:
    """Precisions of attention, as aiconfigurator names them: of the arithmetic over prompts, and of the cache."""

    prefill: str
    kv_cache: str

    @property
    def kv_bytes(self) -> int:
        return 1 if self.kv_cache == "fp8" else 2


def engine_fusion(engine: str, model_type: str, asked: bool = False) -> Fusion:
    """What an engine runs inside other kernels.

    TensorRT-LLM 1.0: attention writes fp8; norms quantize where they are inside the all-reduce; the activation of the
    MLP does not (gated_mlp.py). vLLM's passes fuse_norm_quant and fuse_act_quant leave the output of attention alone.

    Args:
        asked: norms inside the all-reduce were asked for (vLLM's fuse_allreduce_rms, SGLang's
            --enable-flashinfer-allreduce-fusion).
    """
    norms = asked or model_type in _NORMS_IN_ALL_REDUCE.get(engine, ())
    if engine != "trtllm":
        return Fusion(norms)
    return Fusion(norms, frozenset({"output", "qkv", "gate_up"} if norms else {"output"}))


def gpu_step(
    tables: OperatorTables,
    layout: DecoderLayout,
    precision: Precision,
    routing: str,
    beside: Sequence[OperatorTables] = (),
) -> GpuStep:
    """Parts of a step from the tables of an engine on an accelerator.

    Args:
        beside: tables of other engines on the same accelerator, for the matrices and all-reduces that norm inside.
        routing: how the experts' tables were measured: "balanced", "power_law_1.01", …
    Raises: BadTable: an operator of the layout was not measured, named with what was.
    """
    tokens = TOKEN_GRID
    common = np.zeros(len(tokens))
    prefill_only = np.zeros(len(tokens))
    samples = np.zeros(len(tokens))
    parts = {"tokens": common, "prefill": prefill_only, "samples": samples}
    for gemm in layout.gemms:
        parts[gemm.rows] += gemm.count * _gemm_s(tables, beside, gemm, tokens)
    common += _elementwise_s(tables, layout.elementwise, tokens)
    common += _elementwise_s(tables, layout.fused, tokens, 0.0)
    samples += _elementwise_s(tables, layout.sampling, tokens)
    if layout.all_reduces:
        common += layout.all_reduces * _all_reduce_s(tables, beside, layout, tokens)
    if layout.sparse:
        s = layout.sparse
        experts = tables.moe(
            s.dtype, s.hidden, s.inter, s.topk, s.experts, s.tensor_parallel, s.expert_parallel, routing
        )
        common += s.count * experts.lookup(tokens[:, None])
    decode_only = np.zeros(len(tokens))
    a = layout.attention
    if a.latent:
        at = np.stack([tokens, np.full(len(tokens), float(a.kv_heads))], axis=1)
        dtype = "bfloat16"
        decode_only += a.count * sum(tables.mla_bmm(name, dtype).lookup(at) for name in ("mla_gen_pre", "mla_gen_post"))
        prefill, decode = tables.mla(True, precision.kv_cache), tables.mla(False, precision.kv_cache)
    else:
        group, dim = a.heads_per_kv_head, a.head_dim
        prefill = tables.attention(True, group, dim, precision.prefill, precision.kv_cache)
        decode = tables.attention(False, group, dim, "bfloat16", precision.kv_cache)
    return GpuStep(
        common + decode_only,
        common + prefill_only,
        samples,
        a.count * _attention_s(decode, a.kv_heads),
        a.count * _attention_s(prefill, a.kv_heads),
    )


def _gemm_s(tables: OperatorTables, beside: Sequence[OperatorTables], gemm: Gemm, rows: Floats) -> Floats:
    """The least that any engine's table has: they call the same libraries, and what a table has above the others is its
    wrapper's (an activation scaled by slow kernels, weights packed in every call).

    Quantized matrices were measured with the kernels that scale and quantize the activation. Where the engine fuses
    them into the kernel before, their launches fall away, which is how much longer the smallest quantized matrix takes
    than the smallest bf16 one; the bytes they move stay.
    """
    points = np.stack([rows, np.full(len(rows), float(gemm.n)), np.full(len(rows), float(gemm.k))], axis=1)
    fused = gemm.dtype in FUSED_QUANTIZATION[tables.engine]
    least = np.full(len(rows), np.inf)
    for each in (tables, *beside):
        known = gemm.dtype in each.values("gemm_perf", "gemm_dtype")
        if each is not tables and (not known or gemm.dtype in _OVERLAPPED_QUANTIZATION.get(each.engine, ())):
            continue
        table = each.gemm(gemm.dtype)
        launches = float(table.seconds.min() - each.gemm("bfloat16").seconds.min()) if fused else 0.0
        seconds = np.maximum(table.lookup(points) - max(0.0, launches), table.bound_s(points))
        least = np.minimum(least, seconds)
    return least


def _all_reduce_s(
    tables: OperatorTables, beside: Sequence[OperatorTables], layout: DecoderLayout, rows: Floats
) -> Floats:
    """The engine's own; where it norms inside, FlashInfer's if those are faster, whose kernels are TensorRT-LLM's
    (flashinfer.comm.trtllm_allreduce_fusion; engines take it up to the size where their own is faster)."""
    moved = (rows * layout.hidden * 2.0)[:, None]
    seconds = tables.all_reduce(layout.ranks).lookup(moved)
    for each in beside if layout.fused else ():
        if each.engine == "trtllm":
            seconds = np.minimum(seconds, each.all_reduce(layout.ranks).lookup(moved))
    return seconds


def _elementwise_s(
    tables: OperatorTables,
    kernels: Sequence[tuple[float, int]],
    rows: Floats,
    latency_s: float = ELEMENTWISE_LATENCY_S,
) -> Floats:
    """Kernels that read and write so many bytes a row, so many of each."""
    rate = ELEMENTWISE_BANDWIDTH_SHARE * tables.accelerator.peak_bytes_per_s
    total = np.zeros(len(rows))
    for moved, count in kernels:
        total += count * (latency_s + rows * moved / rate)
    return total


def _attention_s(table: OperatorTable, kv_heads: int) -> Floats:
    batch, context = np.meshgrid(BATCH_GRID, CONTEXT_GRID, indexing="ij")
    points = np.stack([batch.ravel(), context.ravel(), np.full(batch.size, float(kv_heads))], axis=1)
    return table.lookup(points).reshape(batch.shape)
