"""Step tables of a pool from an engine's own layer times (importers/llmservingsim.py): summed, padded, joined by links.

What a profile of single layers does not hold comes from elsewhere, and is said: collectives by a latency and a
bandwidth, how many experts a step touches by uniform routing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.model_shape import Experts, ModelShape
from ..runtime.spec import Pool
from .batch_time import AttentionTimes, BatchTables
from .hardware import Accelerator
from .importers.llmservingsim import LAYERS, ONCE, SAMPLED, EngineProfile, Skew
from .operator_tables import BadTable, OperatorTable
from .operators import load_imbalance, touched
from .step_time import WORK_GRID, ModeledStep, StepTables

Floats = NDArray[np.float64]

# vLLM captures steps of up to twice max_num_seqs tokens, at most 512, also those with prompts (vllm/config/vllm.py:
# _set_cudagraph_sizes): 1, 2, 4, every 8 up to 256, every 16 beyond.
_MOST_CAPTURED = 512

# Streaming multiprocessors, from NVIDIA's data sheets and architecture papers of each: FlashAttention-2 divides the
# contexts of decode rows among blocks while rows x KV heads fill less than 80 % of two blocks on each
# (csrc/flash_attn/flash_api.cpp: num_splits_heuristic).
_MULTIPROCESSORS = {
    "A100": 108, "A10G": 80, "B200": 148, "H100": 132, "H200": 132, "L4": 58, "L40S": 142, "RTX4090": 128,
    "RTXPRO6000": 188,
}  # fmt: skip

# Between the kernels of a layer where the host launches them one by one (steps that are not captured as a CUDA graph).
# Fitted to the mean TTFT of the two dense runs in the public data (benchmarks/per_request.py): each alone gives 70 µs
# (Llama-3.1-8B, one GPU) and 55 µs (Qwen3-32B, two), which keep the other within 1 %. The run with experts was not
# used.
_BETWEEN_KERNELS_S = 60e-6

_ASYNC_SINCE = (0, 14)  # vLLM composes steps ahead by default
_SCREENED_CONTEXT = 1024.0  # tokens of a decode row where only their sum is known


@dataclass(frozen=True)
class Link:
    """Between the devices of a replica: one message's latency, and what each sends in a second in one direction."""

    latency_s: float
    bytes_per_s: float


def engine_step(
    profile: EngineProfile,
    shape: ModelShape,
    pool: Pool,
    *,
    link: Link | None = None,
    ranks: int = 1,
    async_scheduling: bool | None = None,
) -> ModeledStep:
    """Step times of a pool on the engine that was profiled.

    Args:
        shape: of the model; the profile holds one layer of it.
        link: between all ranks; without it what the catalog has for so many of the accelerator.
        ranks: of data parallelism, which step together: so many replicas of the pool share one copy of the experts,
            divided among them. 1: each replica by itself.
        async_scheduling: as the engine's flag of that name; without it what the profile's version of vLLM does.
    Raises: BadTable: the profile is of another tensor_parallel_size, or there is no link to join its ranks;
        BadHardware: no link of the catalog joins so many.
    """
    tp = pool.tensor_parallel_size
    if profile.tensor_parallel_size != tp:
        raise BadTable(profile.name, f"tensor_parallel_size {profile.tensor_parallel_size}", str(tp), "read that one")
    if ranks > 1 and (shape.experts is None or shape.experts.num_experts % ranks or pool.replicas % ranks):
        todo = "let it divide the replicas and the experts, or let replicas run by themselves"
        raise BadTable("ranks in time", ranks, "a divisor of replicas and of a mixture's experts", todo)
    within = (link or _own_link(profile.accelerator, tp)) if tp > 1 else None
    across = (link or _own_link(profile.accelerator, tp * ranks)) if ranks > 1 else None
    if (tp > 1 and within is None) or (ranks > 1 and across is None):
        raise BadTable(profile.name, "several ranks and no link", "a link", "give its latency and bandwidth")
    ahead = profile.vllm_version >= _ASYNC_SINCE if async_scheduling is None else async_scheduling
    batch = _batch_tables(profile, shape, pool, within, across, ranks, ahead)
    notes = [
        "a host that is slower than the device; between kernels, in steps that are not captured as CUDA graphs, "
        f"{_BETWEEN_KERNELS_S * 1e6:.0f} µs a layer are taken (fitted, benchmarks/per_request.py), none in others",
        "time outside the steps (HTTP, tokenizer, between processes)",
        f"the scheduler of vLLM {profile.meta['vllm_version']}: by the rules of 0.32, "
        + ("steps composed ahead (async_scheduling)" if ahead else "without async_scheduling"),
        "screening knows nothing of the batch: attention by summed work, decode rows of "
        f"{_SCREENED_CONTEXT:.0f} tokens, steps not composed ahead, ranks not in time",
    ]
    if profile.accelerator is None:
        notes.append(f"{profile.meta['hardware']} is not in the catalog: times not checked against physics")
    if profile.skew is None:
        notes.append("decode rows of unequal context: not measured, taken as all of their mean")
    elif batch.attention.split_rows == 0:
        notes.append("from how many rows attention divides no context: interpolated (multiprocessors not known)")
    used = dict.fromkeys(each for each in (within, across) if each is not None)
    if used:
        source = "as given" if link else f"of the catalog's {pool.accelerator}"
        figures = ", ".join(f"{each.latency_s * 1e6:.0f} µs and {each.bytes_per_s / 1e9:.0f} GB/s" for each in used)
        notes.append(f"collectives by a latency and a bandwidth ({figures} {source}), not measured")
    if shape.experts:
        notes.append("experts: touched as by uniform routing")
    if ranks > 1:
        notes.append("tokens between ranks: both directions share the link's two-way bandwidth, whoever has how many")
    return ModeledStep(_summed(batch, pool), True, _RELATIVE_ERROR, tuple(notes))


# Half width of the 90 % interval of a step's time: of the run that a profile was never fitted to, decode steps of known
# composition lay up to 12 % beside it (docs/notes/per-request.md).
_RELATIVE_ERROR = 0.12


def _own_link(device: Accelerator | None, devices: int) -> Link | None:
    """Of a ring through so many devices, as the catalog joins them; None: it does not know the accelerator, or no link.

    The slowest of the levels that the ring spans bounds it; over one beyond the nearest all devices of a domain send
    together. The latencies of all levels add up.

    Raises: BadHardware: no level joins so many.
    """
    if device is None or not device.levels:
        return None
    latency_s, bytes_per_s, domain = 0.0, np.inf, 1
    for level, size in device.spans(devices):
        latency_s += level.latency_s or 0.0
        bytes_per_s = min(bytes_per_s, domain * level.bytes_per_s_among(size))
        domain *= size
    return Link(latency_s, bytes_per_s)


def _batch_tables(
    profile: EngineProfile,
    shape: ModelShape,
    pool: Pool,
    within: Link | None,
    across: Link | None,
    ranks: int,
    ahead: bool,
) -> BatchTables:
    """within, across: what joins the ranks of one replica, and all replicas that step together; None: one alone."""
    most = pool.max_num_batched_tokens
    padded = _padded(pool)
    tokens = np.arange(1, most + 1, dtype=np.float64)[:, None]
    per_layer = np.zeros(most)
    for name, calls in LAYERS.items():
        if name in profile.dense:
            per_layer += calls * profile.dense[name].lookup(tokens)
    per_layer[len(padded) - 1 :] += _BETWEEN_KERNELS_S
    tokens_s = shape.num_layers * per_layer + sum(profile.dense[name].lookup(tokens) for name in ONCE)
    tp, hidden_bytes = pool.tensor_parallel_size, 2.0 * shape.hidden_size
    everybody = np.arange(1, ranks * most + 1, dtype=np.float64)
    exchange_s = np.zeros(ranks * most + 1)
    if within is not None:  # a ring, after attention and after the MLP
        moved = 2 * (tp - 1) / tp * tokens[:, 0] * hidden_bytes
        tokens_s += 2 * shape.num_layers * (within.latency_s + moved / within.bytes_per_s)
    sparse = len(shape.experts.layers) if shape.experts else 0
    if across is not None:  # all tokens to every rank, and the sums back: the two halves of an all-reduce
        moved = 2 * (ranks - 1) / ranks * everybody * hidden_bytes
        exchange_s[1:] = sparse * (across.latency_s + moved / across.bytes_per_s)
    experts_s = np.zeros(ranks * most + 1)
    if profile.experts is not None and shape.experts is not None:
        experts_s[1:] = sparse * _experts_s(profile.experts, shape.experts, ranks, ranks * most)
    rows = np.arange(1, pool.max_num_samples + 1, dtype=np.float64)[:, None]
    samples_s = sum(profile.per_sequence[name].lookup(rows) for name in SAMPLED)
    return BatchTables(
        tokens_s=np.concatenate([[0.0], tokens_s]),
        samples_s=np.concatenate([[0.0], samples_s]),
        experts_s=experts_s,
        exchange_s=exchange_s,
        captured_tokens=len(padded) - 1,
        padded=padded,
        attention=_attention(profile, shape, pool),
        request_s=np.zeros(2),
        ranks=ranks,
        ahead=ahead,
    )


def _padded(pool: Pool) -> NDArray[np.int64]:
    """To how many tokens a captured step of 0, 1, ... is padded."""
    if pool.enforce_eager:
        return np.zeros(1, np.int64)
    most = min(2 * pool.max_num_seqs, _MOST_CAPTURED, pool.max_num_batched_tokens)
    usual = (0, 1, 2, 4, *range(8, 256, 8), *range(256, _MOST_CAPTURED + 1, 16))
    chosen = (0, *pool.cuda_graph_sizes) if pool.cuda_graph_sizes else (*(s for s in usual if s < most), most)
    sizes = np.array(chosen)
    return np.asarray(sizes[np.searchsorted(sizes, np.arange(sizes[-1] + 1))], np.int64)


def _experts_s(table: OperatorTable, experts: Experts, ranks: int, most: int) -> Floats:
    """One layer's experts by tokens of all ranks, 1 to `most`: the busiest rank, with its share of the experts.

    The table holds all experts on one device; a rank that holds some of them has the work of its share of the tokens.
    """
    chosen = experts.experts_per_token / experts.num_experts
    points = []
    for n in range(1, most + 1):
        load = load_imbalance(experts, n, ranks)
        active = min(experts.num_experts / ranks, touched(chosen, n) * experts.num_experts / ranks * load)
        points.append((n / ranks * load, active))
    return table.lookup(np.array(points))


def _attention(profile: EngineProfile, shape: ModelShape, pool: Pool) -> AttentionTimes:
    longest = float(pool.max_model_len)
    chunk = _axis(16.0, max(32.0, float(pool.max_num_batched_tokens)))
    cached = np.concatenate([[0.0], _axis(16.0, max(32.0, longest), 1)])
    rows = _axis(1.0, max(2.0, float(pool.max_num_seqs)))
    context = _axis(16.0, max(32.0, longest))
    layers = float(shape.num_layers)

    def grid(table: OperatorTable, *axes: Floats) -> Floats:
        points = np.stack([each.ravel() for each in np.meshgrid(*axes, indexing="ij")], axis=1)
        return layers * table.lookup(points).reshape([len(axis) for axis in axes])

    one = np.ones(1)
    measured = profile.skew or Skew(one, one, one, one, np.zeros((1, 1, 1, 1)))
    heads = max(1, shape.num_kv_heads // profile.tensor_parallel_size)
    device = str(profile.meta["hardware"]).replace(" ", "").upper()
    return AttentionTimes(
        prompt=chunk,
        cached=cached,
        rows=rows,
        context=context,
        prefill_s=grid(profile.prefill, chunk, cached)[:, :, None, None],
        decode_s=grid(profile.decode, rows, context)[None, None],
        mixed_s=grid(profile.mixed, chunk, cached, rows, context),
        skew_prompt=measured.prompt,
        skew_rows=measured.rows,
        longest=measured.longest,
        spread=measured.spread,
        skew=measured.share,
        split_rows=0.8 * 2 * _MULTIPROCESSORS.get(device, 0) / heads,
    )


def _axis(low: float, high: float, per_octave: int = 2) -> Floats:
    """Powers of 2 from `low` to at least `high`, whole octaves."""
    octaves = int(np.ceil(np.log2(high / low)))
    return np.asarray(low * 2.0 ** (np.arange(octaves * per_octave + 1) / per_octave))


def _summed(batch: BatchTables, pool: Pool) -> StepTables:
    """The same as sums over rows, for those that do not know the batch (screening)."""
    times = batch.attention
    rows = np.clip(WORK_GRID / _SCREENED_CONTEXT, 1.0, float(pool.max_num_seqs))
    by_rows = np.array([np.interp(_SCREENED_CONTEXT, times.context, row) for row in times.decode_s[0, 0]])
    decode_s = np.interp(rows, times.rows, by_rows) * np.maximum(WORK_GRID / rows / _SCREENED_CONTEXT, 1e-9)
    chunk = np.clip(np.sqrt(2.0 * WORK_GRID), times.prompt[0], float(pool.max_num_batched_tokens))
    cached = np.maximum(0.0, WORK_GRID / chunk - chunk / 2)
    alone = np.interp(chunk, times.prompt, times.prefill_s[:, 0, 0, 0])
    per_cached = (times.prefill_s[:, -1, 0, 0] - times.prefill_s[:, 0, 0, 0]) / times.cached[-1]
    prefill_s = alone + cached * np.interp(chunk, times.prompt, per_cached)
    tokens = np.arange(len(batch.tokens_s))
    padded = np.where(tokens <= batch.captured_tokens, batch.padded[np.minimum(tokens, batch.captured_tokens)], tokens)
    together_s = batch.experts_s[padded * batch.ranks] + batch.exchange_s[padded * batch.ranks]
    return StepTables(
        tokens_s=batch.tokens_s[padded] + together_s,
        rows_s=np.zeros(pool.max_num_seqs + 1),
        samples_s=batch.samples_s.copy(),
        decode_attention_s=np.maximum.accumulate(decode_s),
        prefill_attention_s=np.maximum.accumulate(prefill_s),
        request_s=batch.request_s.copy(),
        batch=batch,
    )
