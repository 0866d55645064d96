"""Step tables of a pool: from a profile where one was measured, from a data sheet where none was.

What was measured is bounded by physics all the same: no table entry is below what the machine's own measured peaks
allow.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..runtime.draft_shape import draft_pool, draft_shape
from ..runtime.graph_sizes import captured_sizes
from ..runtime.model_shape import ModelShape
from ..runtime.spec import CPU, Pool
from .adapter_work import Adapters, adapter_work
from .collectives import latency_unknown
from .hardware import Accelerator, BadHardware
from .measured_step import bound_tables, measured_step
from .operator_source import RELATIVE_ERROR as OPERATOR_ERROR
from .operator_source import OperatorSource, operator_step_tables
from .operators import kv_bytes_per_token
from .profile import Profile
from .roofline import EFFICIENCY, LAYER_OVERHEAD_S, RELATIVE_ERROR, roofline_bounds, roofline_tables
from .step_time import AdapterTimes, ModeledStep, StepTables

Floats = NDArray[np.float64]
Source = Profile | Accelerator | OperatorSource

_SPECULATION_LEAVES_OUT = (
    "speculation: tokens are kept as often as when the log was written, by application, whatever proposed them then",
    "speculation: the time to look for n-grams; what is proposed beyond the end of an answer",
    "speculation: attention of rows that verify counts as that of prompts, by query-key pairs (from a data sheet: no "
    "less than to read their context)",
    "speculation: screening, and the loads that are tried where no target is given, know nothing of proposals",
)


def step_tables(source: Source, shape: ModelShape, pool: Pool) -> ModeledStep:
    """Step times of a pool.

    Args:
        source: a profile for accelerator "cpu"; any accelerator of the catalog else, or operators measured on it.
    Raises: BadProfile: the profile has another model's shape or lacks the pool's configuration; BadHardware: the
        accelerator is another than the pool's, lacks a peak rate, or does not hold the model, or experts are to be
        divided among more ranks than there are; BadTable: an operator was not measured.
    """
    found = _without_draft(source, shape, pool)
    found = with_block_copies(found, source, shape, pool)
    found = with_adapters(found, source, shape, pool)
    draft = draft_shape(pool)
    if draft is not None:
        own, notes = _draft_tables(source, shape, draft, pool, found.tables)
        found = replace(found, tables=found.tables._replace(draft=own), not_modeled=(*found.not_modeled, *notes))
    if pool.speculation != "none":
        found = replace(found, not_modeled=(*found.not_modeled, *_SPECULATION_LEAVES_OUT))
    return found


def with_block_copies(found: ModeledStep, source: Source, shape: ModelShape, pool: Pool) -> ModeledStep:
    """The steps with what moving KV blocks between device and host takes, where the pool has blocks there."""
    if not pool.host_kv_blocks:
        return found
    copy_s, note = _block_copy_s(source, shape, pool)
    return replace(found, tables=found.tables._replace(block_copy_s=copy_s), not_modeled=(*found.not_modeled, note))


def with_adapters(found: ModeledStep, source: Source, shape: ModelShape, pool: Pool) -> ModeledStep:
    """The steps with what LoRA adapters add to them, where the pool takes some."""
    if not pool.max_loras:
        return found
    times, note = _adapter_times(source, shape, pool)
    return replace(found, tables=found.tables._replace(adapters=times), not_modeled=(*found.not_modeled, note))


def _block_copy_s(source: Source, shape: ModelShape, pool: Pool) -> tuple[float, str]:
    """Least time to move a KV block of a rank between device and host, and what it leaves out."""
    block_bytes = pool.block_size * kv_bytes_per_token(shape, pool.tensor_parallel_size, pool.kv_cache_dtype)
    calls = "blocks to and from the host: what starting each copy takes"
    if isinstance(source, Profile):
        rates = source.peaks_of(pool.num_threads).read_bytes
        return 2 * block_bytes / max(rates)[1], f"{calls}; read and written as fast as memory was read"
    device = source.tables.accelerator if isinstance(source, OperatorSource) else source
    if device.host_link is None:
        return 0.0, f"blocks to and from the host: no source gives the link of {device.name} to its host"
    return block_bytes / device.host_link.bytes_per_s, calls


def _adapter_times(source: Source, shape: ModelShape, pool: Pool) -> tuple[AdapterTimes, str]:
    """Of adapters of the highest rank on every matrix: on a device by its data sheet, as far as operators reach it."""
    try:
        one_token, one_adapter = (
            adapter_work(shape, Adapters(pool.max_lora_rank, *what), tensor_parallel_size=pool.tensor_parallel_size)
            for what in ((1.0, 0.0), (0.0, 1.0))
        )
    except ValueError as unknown:
        return AdapterTimes(), f"{unknown}: what they add to a step, and the time to fill a slot"
    flops = sum(work.flops for work in one_token)
    moved = sum(work.activation_bytes for work in one_token)
    size = sum(work.weight_bytes for work in one_adapter)
    note = "LoRA adapters: inferred from FLOPs and bytes of rank max_lora_rank on every matrix, not measured"
    if isinstance(source, Profile):
        peaks = source.peaks_of(pool.num_threads)
        rate = peaks.bytes_per_s(size)
        token_s = max(flops / max(peaks.flops_per_s.values()), moved / max(rate for _, rate in peaks.read_bytes))
        return AdapterTimes(token_s, size / rate, 2 * size / max(peaks.read_bytes)[1]), note
    device = source.tables.accelerator if isinstance(source, OperatorSource) else source
    token_s = max(flops / device.peak_flops_per_s["bf16"], moved / device.peak_bytes_per_s) / EFFICIENCY
    read_s = size / device.peak_bytes_per_s / EFFICIENCY
    if device.host_link is None:
        return AdapterTimes(token_s, read_s), f"{note}; slots fill in no time: no source gives the link to the host"
    return AdapterTimes(token_s, read_s, size / device.host_link.bytes_per_s), note


def step_bounds(source: Profile | Accelerator, shape: ModelShape, pool: Pool) -> StepTables:
    """The least step times that physics allows, by part: of measured peaks, or of the data sheet's."""
    if isinstance(source, Profile):
        return bound_tables(shape, pool, source.peaks_of(pool.num_threads))
    return roofline_bounds(source, shape, pool)


def _without_draft(source: Source, shape: ModelShape, pool: Pool) -> ModeledStep:
    if isinstance(source, Profile):
        if pool.accelerator != CPU:
            todo = "give the accelerator of the catalog, or tune for 'cpu'"
            raise BadHardware("pool.accelerator", pool.accelerator, f"{CPU!r}, which the profile measured", todo)
        return measured_step(source, shape, pool)
    if isinstance(source, Accelerator) and pool.accelerator != source.name:
        raise BadHardware("pool.accelerator", pool.accelerator, source.name, "give the accelerator of the pool")
    for field in ("pipeline_parallel_size", "context_parallel_size"):
        if getattr(pool, field) > 1:
            allowed = "1: what more of them bring on an accelerator is not modeled"
            raise BadHardware(f"pool.{field}", getattr(pool, field), allowed, "leave it out")
    if pool.enable_expert_parallel:
        most = shape.experts.num_experts if shape.experts else 0
        if pool.tensor_parallel_size > most:
            allowed = f"tensor_parallel_size of at most {most}, the model's experts" if most else "false: it has none"
            raise BadHardware("pool.enable_expert_parallel", True, allowed, "leave it out")
    if isinstance(source, OperatorSource):
        tables = operator_step_tables(source, shape, pool)
        return ModeledStep(tables, False, OPERATOR_ERROR, source.not_modeled, source.host.step_s)
    left_out = [
        *_left_out_of_experts(shape, pool),
        *_left_out_of_attention(shape),
        f"step times are roofline estimates from the data sheet of {source.name} ({source.as_of}), not measured",
        "time outside the steps (HTTP, tokenizer), contention of replicas",
        "tiles: every operator is taken to reach the same share of its bound",
    ]
    for link in latency_unknown(source, pool.tensor_parallel_size):
        left_out.append(f"latency of {link} of {source.name}: no source gives one, none is counted in bounds")
    if pool.enforce_eager:
        left_out.append("enforce_eager: what launching the operators one by one costs the host")
    else:
        left_out.append("CUDA graphs: their memory; steps with prompts are padded like decode steps of as many tokens")
    tables = _padded(roofline_tables(source, shape, pool), pool)
    host_step_s = shape.num_layers * LAYER_OVERHEAD_S
    # all that a row takes on the data sheet is the device's
    return ModeledStep(tables, False, RELATIVE_ERROR, tuple(left_out), host_step_s, float(tables.rows_s[1]))


def _padded(tables: StepTables, pool: Pool) -> StepTables:
    """The tables with a step of each size taking what the captured step that it is padded to takes."""
    sizes = np.array((0, *captured_sizes(pool)))

    def stretched(table: Floats) -> Floats:
        captured = sizes[np.searchsorted(sizes, np.arange(sizes[-1] + 1))]
        return np.concatenate([table[captured], table[len(captured) :]])

    return tables._replace(tokens_s=stretched(tables.tokens_s), samples_s=stretched(tables.samples_s))


def _left_out_of_experts(shape: ModelShape, pool: Pool) -> tuple[str, ...]:
    if shape.experts is None:
        return ()
    left_out = [
        "experts: routing is taken as uniform (one that prefers some reads fewer weights and loads ranks unevenly)",
        "efficiency and error of the roofline were fitted to dense models, none with experts",
    ]
    if pool.enable_expert_parallel:
        left_out.append("expert parallel: partial sums are all-reduced, no token travels (no all-to-all)")
    return tuple(left_out)


def _left_out_of_attention(shape: ModelShape) -> tuple[str, ...]:
    left_out = []
    if any(kind.window or kind.chunk for kind in shape.attention_kinds()):
        left_out.append(
            "layers with a window or chunks: taken to see all of a short one, and the whole context in a wide one "
            "(more than an eighth of max_model_len): at most what they read; all layers keep every token's KV"
        )
    if shape.latent is not None and shape.latent.indexer is not None:
        left_out.append("indexer: each query is taken to choose as many tokens as it may, however short its context")
    if shape.linear_attention is not None:
        left_out.append("linear attention: prompts computed token by token; in chunks they take more arithmetic")
    return tuple(left_out)


def _draft_tables(
    source: Source, shape: ModelShape, draft: ModelShape, pool: Pool, tables: StepTables
) -> tuple[StepTables, tuple[str, ...]]:
    """Of a draft model's passes: from the data sheet like the model's own; on a measured machine the model's times in
    proportion to the bounds of both, because a profile measures one model."""
    alone = draft_pool(pool)
    catching_up = "a draft model's catching up by one token, where a whole draft was kept"
    if isinstance(source, Accelerator):
        return roofline_tables(source, draft, alone), (catching_up,)
    if isinstance(source, OperatorSource):
        return operator_step_tables(source, draft, alone), (catching_up,)
    peaks = source.peaks_of(pool.num_threads)
    mine, its = (bound_tables(each, pool, peaks) for each in (shape, draft))

    def in_proportion(name: str) -> Floats:
        least = getattr(mine, name)
        ratio = np.divide(getattr(its, name), least, out=np.zeros_like(least), where=least > 0)
        return np.asarray(getattr(tables, name) * ratio, np.float64)

    own = StepTables(
        tokens_s=in_proportion("tokens_s"),
        rows_s=np.zeros_like(tables.rows_s),
        samples_s=in_proportion("samples_s"),
        decode_attention_s=in_proportion("decode_attention_s"),
        prefill_attention_s=in_proportion("prefill_attention_s"),
        request_s=np.zeros(2),
    )
    inferred = "draft model: its passes are taken in proportion to the model's by what bounds both, not measured"
    return own, (inferred, catching_up)
