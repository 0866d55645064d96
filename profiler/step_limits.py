"""What bounds a step: its seconds by resource (arithmetic, memory bandwidth, links, host), to the table entry.

Where a table says how long something takes, the bounds of its operators say why: each operator counts to what binds it
(Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009), and the table's seconds are divided among operators in
proportion to their bounds. The host has what the model of the step gives it. So the parts add up to the table, and
how far an operator stays behind its bound counts to what binds it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.weight_formats import WEIGHT_FORMATS
from ..runtime.draft_shape import draft_pool, draft_shape
from ..runtime.model_shape import ModelShape, matrix_dtype
from ..runtime.spec import Pool
from .hardware import Accelerator
from .operators import Composition, OperatorWork, linears, rank_weight_bytes, step_work
from .profile import Profile
from .roofline import usual_work
from .step_time import WORK_GRID, ModeledStep, PromptPairs, StepTables

Floats = NDArray[np.float64]

RESOURCES = ("compute", "bandwidth", "links", "host")
COMPUTE, BANDWIDTH, LINKS, HOST = range(4)

LABELS_ARE_INFERRED = "compute- or bandwidth-bound: inferred from FLOPs, bytes and peak rates, not measured"


class LimitTables(NamedTuple):
    """StepTables with the seconds of each resource in a row of its own: RESOURCES come first in every shape.

    tokens_s (4, max_num_batched_tokens + 1); rows_s (4, max_num_seqs + 1); samples_s (4, max_num_samples + 1);
    decode_attention_s, prefill_attention_s (4, len(WORK_GRID)); prompt_pairs as in StepTables
    """

    tokens_s: Floats
    rows_s: Floats
    samples_s: Floats
    decode_attention_s: Floats
    prefill_attention_s: Floats
    prompt_pairs: PromptPairs


def limit_tables(source: Profile | Accelerator, shape: ModelShape, pool: Pool, modeled: ModeledStep) -> LimitTables:
    """The step tables of a pool, divided by what bounds them; the four rows add up to each table.

    Args:
        source, shape, pool: as in `tables.step_tables`, which made `modeled` of them.
    """
    return _divided(source, shape, pool, modeled.tables, modeled.host_step_s, modeled.device_row_s)


def draft_limit_tables(source: Profile | Accelerator, pool: Pool, modeled: ModeledStep) -> LimitTables | None:
    """The same of the passes of the pool's draft model; None where it has none."""
    shape = draft_shape(pool)
    if shape is None or modeled.tables.draft is None:
        return None
    return _divided(source, shape, draft_pool(pool), modeled.tables.draft, 0.0, 0.0)


def _divided(
    source: Profile | Accelerator,
    shape: ModelShape,
    pool: Pool,
    tables: StepTables,
    host_step_s: float,
    device_row_s: float,
) -> LimitTables:
    def shares(step: Composition, wanted: str) -> Floats:
        found = np.zeros(len(RESOURCES))
        for name, (resource, seconds) in _bounds(source, shape, step, pool).items():
            kind = "head" if name.startswith("head") else name if "attention" in name else "tokens"
            if kind == wanted:
                found[resource] += seconds
        return np.asarray(found / found.sum(), np.float64)

    def curve(table: Floats, wanted: str) -> Floats:
        """(4, len(table)) shares at each number of tokens or samples."""
        most = len(table) - 1
        at = np.unique(np.concatenate([[1, max(1, most)], np.round(WORK_GRID[most >= WORK_GRID])])).astype(np.int64)
        steps = [Composition(1, 1, n, 0.0, 0.0) if wanted == "head" else Composition(n, 1, 0, 0.0, 0.0) for n in at]
        points = np.array([shares(step, wanted) for step in steps])
        return np.array([np.interp(np.arange(most + 1), at, points[:, r]) for r in range(len(RESOURCES))])

    host_s = np.minimum(host_step_s, tables.tokens_s)
    tokens_s = curve(tables.tokens_s, "tokens") * (tables.tokens_s - host_s)
    tokens_s[HOST] += host_s
    device_s = np.minimum(device_row_s * np.arange(len(tables.rows_s)), tables.rows_s)
    rows_s = np.zeros((len(RESOURCES), len(tables.rows_s)))
    rows_s[BANDWIDTH], rows_s[HOST] = device_s, tables.rows_s - device_s
    # of attention the shares hardly depend on the amount: both sides of its bound grow with it
    decode = shares(Composition(1, 1, 0, 1024.0, 0.0), "decode_attention")
    prefill = shares(Composition(1024, 1, 0, 0.0, 512.0 * 1025.0), "prefill_attention")
    return LimitTables(
        tokens_s=tokens_s,
        rows_s=rows_s,
        samples_s=curve(tables.samples_s, "head") * tables.samples_s,
        decode_attention_s=decode[:, None] * tables.decode_attention_s,
        prefill_attention_s=prefill[:, None] * tables.prefill_attention_s,
        prompt_pairs=tables.prompt_pairs,
    )


def _bounds(
    source: Profile | Accelerator, shape: ModelShape, step: Composition, pool: Pool
) -> dict[str, tuple[int, float]]:
    """What binds each operator of a step, and its least seconds."""
    if isinstance(source, Profile):
        work = step_work(
            shape,
            step,
            tensor_parallel_size=pool.tensor_parallel_size,
            weight_dtype=pool.weight_dtype,
            kv_dtype=pool.kv_cache_dtype,
            expert_parallel=pool.enable_expert_parallel,
            activation_bytes=4,
        )
        return {each.name: _measured_bound(source, shape, pool, each) for each in work}
    found = {}
    for each, bound_s in usual_work(source, shape, step, pool):
        moved_s = (each.weight_bytes + each.kv_bytes + each.activation_bytes) / source.peak_bytes_per_s
        limit = LINKS if each.messages else COMPUTE if bound_s > moved_s * (1 + 1e-9) else BANDWIDTH
        found[each.name] = limit, bound_s
    return found


def _measured_bound(profile: Profile, shape: ModelShape, pool: Pool, work: OperatorWork) -> tuple[int, float]:
    """By the peaks that this machine showed: weights from memory, all else from where it comes fastest."""
    peaks = profile.peaks_of(pool.num_threads)
    fastest = max(rate for _, rate in peaks.read_bytes)
    if work.messages:
        return LINKS, work.message_bytes / fastest
    weight_rate = peaks.bytes_per_s(rank_weight_bytes(shape, pool.tensor_parallel_size, pool.weight_dtype))
    moved_s = work.weight_bytes / weight_rate + (work.kv_bytes + work.activation_bytes) / fastest
    if not work.flops:
        return BANDWIDTH, moved_s
    rate = max(peaks.flops_per_s.values())
    if any(work.name == layer.name for layer in linears(shape, pool.tensor_parallel_size, pool.enable_expert_parallel)):
        arithmetic = WEIGHT_FORMATS[matrix_dtype(work.name, pool.weight_dtype)].arithmetic
        rate = peaks.flops_per_s.get(arithmetic, rate)
    computed_s = work.flops / rate
    return (COMPUTE, computed_s) if computed_s > moved_s else (BANDWIDTH, moved_s)
