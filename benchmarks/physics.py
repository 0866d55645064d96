"""Physics: the operator list against torch, and every prediction against the bound that follows from it.

    python benchmarks/physics.py [--points 1000000] [--seed 0] [--data ../shared/data]

1. FLOPs of every operator against torch.utils.flop_counter.FlopCounterMode on meta tensors, bytes and messages against
   the sizes of the tensors that a reference reads, writes and exchanges (physics_reference.py): published models of
   every kind with a few layers, under every sharding, rank by rank. Whatever differs at all counts.
2. Bytes of the 34 published configurations against the tensors that transformers makes of them (no weights are loaded),
   and of quantized checkpoints against their published sizes.
3. Step times that paretune predicts from data sheets, at random (model, accelerator, candidate, batch), against the
   bound: for each operator the longer of FLOPs over the peak rate and compulsory bytes (weights and cached KV) over the
   peak bandwidth, and the links' share of collectives.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from physics_reference import Counted, Rank, Step, run

from bars import Bar, finish, needed_data
from paretune.kernels.jit import njit
from paretune.profiler.collectives import collective_bound_s
from paretune.profiler.hardware import BadHardware, accelerators
from paretune.profiler.operators import Routing, Rows, Sharding, rank_work
from paretune.profiler.rank_memory import weight_bytes
from paretune.profiler.roofline import arithmetic_of, kv_blocks, roofline_tables, storage_of
from paretune.profiler.step_time import StepTables, composed_time_s, row_pairs
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.quantization import Storage
from paretune.runtime.spec import Pool

KV_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp32": torch.float32}
QUANTITIES = ("flops", "weight_bytes", "kv_bytes", "activation_bytes", "messages", "message_bytes")
# of attention in the latent, and of states, what is read and written between its products depends on the kernel
NOT_COMPARED = {(name, "activation_bytes") for name in ("kv_b", "latent", "indexer", "linear_attention")}

# published configurations by kind, and how many of their layers are computed (both kinds of a model that has two)
KINDS = {
    "dense": ("inference-sim--llama-2-7b-hf.json", 2),
    "GQA": ("meta-llama--Meta-Llama-3.1-8B.json", 3),
    "GQA, few KV heads": ("inference-sim--qwen2.5-7b-instruct.json", 2),
    "GQA with windows": ("openai--gpt-oss-20b.json", 2),
    "MLA": ("deepseek-ai--DeepSeek-V3.json", 3),
    "MLA and MoE": ("inference-sim--deepseek-v2-lite.json", 2),
    "MoE": ("mistralai--Mixtral-8x7B-v0.1.json", 2),
    "MoE, many experts": ("Qwen--Qwen3-30B-A3B.json", 1),
    "chunks and MoE": ("meta-llama--Llama-4-Scout-17B-16E-Instruct.json", 4),
    "two kinds of heads and MoE": ("google--gemma-4-26B-A4B.json", 6),
    "linear attention and MoE": ("Qwen--Qwen3.5-397B-A17B.json", 4),
    "MLA with an indexer": ("zai-org--GLM-5.json", 2),
}
_KINDS_OF_THE_BAR = 8  # the first ones; the others with one batch and fewer precisions
# so small that rows of a few hundred tokens go beyond them
LIMITS = {"sliding_window": 64, "attention_chunk_size": 48, "index_topk": 40}
BATCHES = (
    [(0, 16)],  # a prompt
    [(40, 1), (7, 1), (200, 1)],  # decoding
    [(300, 1), (0, 32), (100, 16)],  # both, one prompt with a prefix in the cache
)


def shardings(kind: str) -> Iterator[Rank]:
    """One rank of every way to share the model; the first shard, part and group, and where it matters the last."""
    for tp in (1, 2, 4, 8):
        yield from (Rank(tp=tp), Rank(tp=tp, shard=tp - 1))
    yield from (Rank(pp=2, stage=0), Rank(pp=2, stage=1), Rank(tp=2, pp=2, stage=1))
    if kind.split(",")[0] in ("dense", "GQA"):
        yield from (Rank(cp=2), Rank(cp=2, part=1), Rank(cp=4, part=2, tp=2))
    if kind in ("MLA and MoE", "MoE", "MoE, many experts"):
        yield from (Rank(tp=tp, ep=True, shard=shard) for tp in (2, 4, 8) for shard in range(0, tp, 3))
        yield from (Rank(dp=2, tp=tp, ep=ep, transport="all_gather") for tp in (1, 2) for ep in (False, True))
        yield from (Rank(dp=dp, tp=tp, ep=True, transport="all_to_all") for dp, tp in ((2, 1), (4, 1), (2, 2)))


def sharding_of(rank: Rank) -> Sharding:
    return Sharding(rank.tp, rank.pp, rank.cp, rank.dp, rank.ep, rank.transport)


def stored(layout: str) -> Any:
    """Bytes of the tensors that hold a weight: (matrix, out_features, in_features) -> bytes."""

    def size(*sizes: int, dtype: torch.dtype) -> int:
        return torch.empty(sizes, device="meta", dtype=dtype).nbytes

    def nbytes(matrix: str, out: int, into: int) -> int:
        small = layout != "fp8 blocks" and matrix in ("router", "shared_gate")
        name = "fp32" if small else "bf16" if layout == "fp8 blocks" and matrix in ("router", "head") else layout
        if name in ("fp32", "bf16"):
            return size(out, into, dtype=torch.float32 if name == "fp32" else torch.bfloat16)
        if name == "fp8 blocks":
            scales = size(math.ceil(out / 128), math.ceil(into / 128), dtype=torch.float32)
            return size(out, into, dtype=torch.float8_e4m3fn) + scales
        if name in ("fp8", "int8"):
            return size(out, into, dtype=torch.float8_e4m3fn if name == "fp8" else torch.int8)
        packed, group, scale = {
            "int4": (2, 64, torch.bfloat16),
            "nvfp4": (2, 16, torch.float8_e4m3fn),
            "mxfp4": (2, 32, torch.uint8),
        }[name]
        groups = math.ceil(into / group)  # the last one is padded
        return size(out, groups * group // packed, dtype=torch.uint8) + size(out, groups, dtype=scale)

    return nbytes


def compare(
    config: dict[str, Any], shape: ModelShape, rank: Rank, rows: Any, layout: str, kv_dtype: str, seed: int
) -> tuple[int, list[str]]:
    """Quantities compared, and those that differ, of one rank's step."""
    tokens, chosen, routing = sum(n for _, n in rows), None, Routing()
    if shape.experts is not None:
        count, k = shape.experts.num_experts, shape.experts.experts_per_token
        drawn = torch.rand(tokens * rank.dp, count, generator=torch.Generator().manual_seed(seed))
        chosen = drawn.topk(k).indices
        routing = counted_routing(chosen, count, rank)
    samples = len(rows)
    storage = Storage.of_checkpoint(shape.quantization) if layout == "fp8 blocks" else Storage.bundled(layout)
    reference = run(Step(config, rank, stored(layout), KV_DTYPES[kv_dtype], chosen), rows, samples)
    found = {
        work.name: work
        for work in rank_work(
            shape, Rows.of(*zip(*rows)), sharding_of(rank), storage, kv_dtype, routing=routing, stage=rank.stage
        )
        if work.name != "elementwise"
    }
    compared, differing = 0, []
    for name in sorted({*reference, *found}):
        want = reference.get(name, Counted())
        for quantity in QUANTITIES:
            kind = "latent" if shape.latent is not None and name.endswith("attention") else name
            if (kind, quantity) in NOT_COMPARED or (name.endswith("all_to_all") and quantity == "message_bytes"):
                continue
            got = getattr(found[name], quantity) if name in found else 0
            compared += 1
            # sums of several thousand floats, of which each is exact, in another order
            if not math.isclose(got, getattr(want, quantity), rel_tol=1e-12):
                differing.append(f"{name}: {quantity} {got} where torch has {getattr(want, quantity)} ({rank}, {rows})")
    return compared, differing


def counted_routing(chosen: torch.Tensor, count: int, rank: Rank) -> Routing:
    """The load of a rank over the mean, and the share of its experts touched, of tokens that chose so."""
    ranks, number = rank.tp * rank.dp, rank.group * rank.tp + rank.shard
    held = range(count * number // ranks, count * (number + 1) // ranks) if rank.ep else range(count)
    here = torch.tensor([int((chosen == expert).sum()) for expert in held])
    imbalance = float(here.sum()) / (chosen.numel() / ranks) if rank.ep else 1.0
    return Routing(imbalance, float((here > 0).float().sum()) / len(held))


def shortened(config: dict[str, Any], layers: int, dense: bool) -> dict[str, Any]:
    """The decoder with a few layers, and with LIMITS where it has such."""
    few = {**config.get("text_config", config), "num_hidden_layers": layers}
    few.update({name: limit for name, limit in LIMITS.items() if few.get(name)})
    if "layer_types" in few:
        few["layer_types"] = few["layer_types"][:layers]
    if dense:
        few["first_k_dense_replace"] = layers
    return few


def operators(configs: Path) -> tuple[int, list[str]]:
    compared, differing, seed = 0, [], 0
    for kind, (name, layers) in KINDS.items():
        config = shortened(
            json.loads((configs / name).read_text()), layers, dense=kind.startswith("MLA") and "MoE" not in kind
        )
        shape = ModelShape.from_config(config)
        before, wrong = compared, len(differing)
        bar = list(KINDS).index(kind) < _KINDS_OF_THE_BAR
        for rank, rows in itertools.product(shardings(kind), BATCHES if bar else BATCHES[2:]):
            heads, kv_heads = shape.num_heads, shape.num_kv_heads
            whole = kv_heads % rank.tp == 0 or rank.tp % kv_heads == 0
            if heads % rank.tp or (shape.latent is None and not whole):
                continue  # ranks that cannot share the heads
            layout = "fp8 blocks" if shape.quantization and shape.quantization.weight_dtype == "fp8" else "bf16"
            done = compare(config, shape, rank, rows, layout, "bf16", seed := seed + 1)
            compared, differing = compared + done[0], differing + done[1]
        layouts = ("fp32", "fp8", "int8", "int4", "nvfp4", "mxfp4") if bar else ("int8",)
        for layout, kv_dtype in itertools.product(layouts, ("bf16", "fp8")):
            done = compare(config, shape, Rank(tp=2), BATCHES[2], layout, kv_dtype, seed := seed + 1)
            compared, differing = compared + done[0], differing + done[1]
        print(f"{kind} ({name.removesuffix('.json')}): {compared - before} quantities, {len(differing) - wrong} differ")
    return compared, differing


def all_to_all(configs: Path) -> float:
    """Largest relative difference of an all-to-all's bytes from what the ranks send, on average, where the tokens
    choose every pair of experts equally often: there uniform routing is no expectation, but what happens."""
    config = {**json.loads((configs / KINDS["MoE"][0]).read_text()), "num_hidden_layers": 1}
    shape, worst = ModelShape.from_config(config), 0.0
    pairs = torch.tensor(list(itertools.combinations(range(8), 2)))
    for dp, tp in ((2, 1), (4, 1), (8, 1), (2, 2), (4, 2)):
        chosen, rows = pairs.repeat(dp * tp, 1), [(0, 28 * tp)]
        sent = []
        for group, shard in itertools.product(range(dp), range(tp)):
            rank = Rank(tp=tp, dp=dp, group=group, shard=shard, ep=True, transport="all_to_all")
            step = Step(config, rank, stored("bf16"), torch.bfloat16, chosen)
            sent.append(run(step, rows, 1)["dispatch.all_to_all"].message_bytes)
        work = rank_work(
            shape, Rows.of([0], [28 * tp]), sharding_of(rank), Storage.bundled("bf16"), "bf16", routing=Routing(1.0)
        )
        got = next(one.message_bytes for one in work if one.name == "dispatch.all_to_all")
        worst = max(worst, abs(got / float(np.mean(sent)) - 1))
    return worst


# tensors of the published checkpoints, bytes (model.safetensors.index.json, metadata.total_size)
PUBLISHED_BYTES = {"openai--gpt-oss-120b.json": 65_248_815_744, "openai--gpt-oss-20b.json": 13_761_264_768}


def checkpoints(configs: Path) -> tuple[int, list[str]]:
    """Configurations compared, and those whose tensors do not add up."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    differing, files = [], sorted(configs.glob("*.json"))
    for file in files:
        given = json.loads(file.read_text())
        text = {key: value for key, value in given.get("text_config", given).items() if key != "quantization_config"}
        text["tie_word_embeddings"] = given.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        text.pop("auto_map", None)
        if text["model_type"] == "kimi_k2":  # the architecture of DeepSeek-V3, as its config.json says
            text["model_type"] = "deepseek_v3"
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[text["model_type"]].from_dict(text))
        model.tie_weights()
        tensors = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}
        shape = ModelShape.from_config(given)
        plain = replace(shape, quantization=None)
        if 2 * sum(tensors.values()) != plain.checkpoint_bytes():
            differing.append(
                f"{file.name}: {plain.checkpoint_bytes()} where transformers has {2 * sum(tensors.values())}"
            )
        if weight_bytes(shape, Sharding(), Storage.of_checkpoint(shape.quantization)) != shape.checkpoint_bytes():
            differing.append(f"{file.name}: one rank does not hold the checkpoint")
        if shape.checkpoint_bytes() != PUBLISHED_BYTES.get(file.name, shape.checkpoint_bytes()):
            differing.append(
                f"{file.name}: {shape.checkpoint_bytes()} where {PUBLISHED_BYTES[file.name]} are published"
            )
    return len(files), differing


def predictions(configs: Path, points: int, seed: int) -> tuple[int, int, tuple[float, str], dict[str, int]]:
    """Points predicted, those below the bound, the least ratio of both and where, and points by what was drawn."""
    rng = np.random.default_rng(seed)
    shapes = {
        file.stem: ModelShape.from_config(json.loads(file.read_text())) for file in sorted(configs.glob("*.json"))
    }
    known = [each for each in accelerators().values() if each.peak_flops_per_s and each.peak_bytes_per_s]
    done, below, least, tally, each = 0, 0, (math.inf, ""), dict[str, int](), 400
    while done < points:
        name, accelerator = str(rng.choice(list(shapes))), known[rng.integers(len(known))]
        pool, shape = candidate(rng, shapes[name], accelerator.name), shapes[name]
        try:
            if pool is None or kv_blocks(accelerator, shape, pool) < pool.num_kv_blocks:
                continue
            tables = roofline_tables(accelerator, shape, pool)
        except BadHardware:  # a precision without a rate, or no link for so many
            continue
        rows = batches(rng, pool, min(each, points - done))
        ratio = predicted_s(tables, rows) / bound_s(accelerator, shape, pool, rows)
        done, below, at = done + len(ratio), below + int((ratio < 1).sum()), int(ratio.argmin())
        sharded = f"TP {pool.tensor_parallel_size}{' EP' if pool.enable_expert_parallel else ''}"
        where = f"{name} on {accelerator.name}, {sharded}, {pool.weight_dtype}, {int(rows.num_tokens[at].sum())} tokens"
        least = min(least, (float(ratio[at]), where))
        for drawn in (name, accelerator.name, f"TP {pool.tensor_parallel_size}", pool.weight_dtype):
            tally[drawn] = tally.get(drawn, 0) + len(ratio)
    return done, below, least, tally


def candidate(rng: np.random.Generator, shape: ModelShape, accelerator: str) -> Pool | None:
    tp = int(rng.choice([1, 2, 4, 8]))
    if shape.num_heads % tp or (shape.experts is not None and shape.experts.num_experts % tp):
        return None
    longest, block = int(rng.choice([4096, 32768, 131072])), 16
    own = [shape.quantization.weight_dtype] if shape.quantization else []
    return Pool(
        accelerator=accelerator,
        tensor_parallel_size=tp,
        enable_expert_parallel=bool(shape.experts) and tp > 1 and bool(rng.integers(2)),
        weight_dtype=str(rng.choice(["bf16", "fp8", "int8", "int4", "nvfp4", *own])),
        kv_cache_dtype=str(rng.choice(["bf16", "fp8"])),
        max_model_len=longest,
        max_num_batched_tokens=int(rng.choice([2048, 8192])),
        max_num_seqs=int(rng.choice([32, 256])),
        num_kv_blocks=longest // block,
        block_size=block,
    )


def batches(rng: np.random.Generator, pool: Pool, count: int) -> Rows:
    """(count, rows) of random steps: decoding or verifying rows and chunks of prompts with prefixes, within limits."""
    width, longest = 32, pool.max_model_len
    decoding = rng.integers(0, width + 1, (count, 1)) > np.arange(width)
    context = np.exp(rng.uniform(0, math.log(longest - 1), (count, width))).astype(np.int64)
    verifying = rng.integers(2, 9, (count, width)) * (rng.random((count, 1)) < 0.2)
    tokens = np.where(decoding, np.maximum(1, verifying), 0)
    prompts = rng.integers(0, 5, (count, 1)) > np.arange(4)
    size = np.exp(rng.uniform(math.log(2), math.log(pool.max_num_batched_tokens / 8), (count, 4))).astype(np.int64)
    before = np.where(rng.random((count, 4)) < 0.5, 0, rng.integers(0, longest, (count, 4)))
    start, tokens = np.concatenate([context, before], 1), np.concatenate([tokens, np.where(prompts, size, 0)], 1)
    empty = tokens.sum(1) == 0
    tokens[empty, 0] = 1
    tokens = np.minimum(tokens, np.maximum(1, longest - start)) * (tokens > 0)
    samples = np.minimum(tokens, np.where(np.arange(tokens.shape[1]) < width, tokens, 1))
    fits = (samples.cumsum(1) <= pool.max_num_samples) & (tokens.cumsum(1) <= pool.max_num_batched_tokens)
    return Rows.of(np.minimum(start, longest - 1), tokens * fits, samples * fits)


def predicted_s(tables: StepTables, rows: Rows) -> np.ndarray:
    """As the simulator composes the time of each step."""
    found = np.empty(len(rows.start))
    _compose(tables, *rows, found)
    return found


@njit
def _compose(
    tables: StepTables, start: np.ndarray, num_tokens: np.ndarray, num_samples: np.ndarray, found: np.ndarray
) -> None:
    for step in range(len(found)):
        tokens, rows, samples, context, pairs = 0, 0, 0, 0.0, 0.0
        for row in range(start.shape[1]):
            computed = num_tokens[step, row]
            if computed == 1:
                context += start[step, row] + 1
            elif computed:
                pairs += row_pairs(computed, start[step, row], tables.prompt_pairs)
            tokens += computed
            rows += min(computed, 1)
            samples += num_samples[step, row]
        found[step] = composed_time_s(tables, tokens, rows, samples, context, pairs)


def bound_s(accelerator: Any, shape: ModelShape, pool: Pool, rows: Rows) -> np.ndarray:
    """Least time of each step: of every operator its FLOPs or its compulsory bytes, and of collectives the links."""
    storage, tp = storage_of(shape, pool.weight_dtype), pool.tensor_parallel_size
    sharding = Sharding(tp, expert_parallel=pool.enable_expert_parallel)

    def work(of: Rows, decode_tokens: int = 1) -> Any:
        return rank_work(shape, of, sharding, storage, pool.kv_cache_dtype, decode_tokens=decode_tokens)

    def least_s(name: str, flops: Any, nbytes: Any) -> Any:
        rate = accelerator.flops_per_s(arithmetic_of(name, storage, accelerator))
        return np.maximum(flops / rate, nbytes / accelerator.peak_bytes_per_s)

    total_s = np.zeros(len(rows.start))
    in_latent = set()
    if shape.latent is not None:  # either form may be taken, row by row: the faster one bounds
        in_latent = {"kv_b", "decode_attention", "prefill_attention"}
        rates = (accelerator.flops_per_s(arithmetic_of(name, storage, accelerator)) for name in ("attention", "kv_b"))
        total_s += latent_s(shape, rows, work, least_s, *rates)
    for one in work(rows):
        if one.collective is not None:
            latency = collective_bound_s(one.collective, accelerator, one.ranks, 0.0, one.messages)
            slope = collective_bound_s(one.collective, accelerator, one.ranks, 1e9, one.messages) - latency
            total_s += latency + slope / 1e9 * one.message_bytes
        elif one.name not in in_latent and one.name != "elementwise":
            total_s += least_s(one.name, one.flops, one.weight_bytes + one.kv_bytes)
    return total_s


def latent_s(shape: ModelShape, rows: Rows, work: Any, least_s: Any, rate: float, expand_rate: float) -> np.ndarray:
    """kv_b and attention of MLA, each row in the form whose arithmetic takes less time."""
    latent = shape.latent
    assert latent is not None
    pairs = rows.num_tokens * rows.start + rows.num_tokens * (rows.num_tokens + 1) // 2
    more = 2 * latent.kv_lora_rank + latent.qk_rope_head_dim - latent.qk_head_dim - latent.v_head_dim
    expand = latent.kv_lora_rank * (latent.qk_nope_head_dim + latent.v_head_dim)
    absorbed = pairs * more / rate < rows.start * expand / expand_rate
    total_s = 0.0
    for chosen, decode_tokens in ((absorbed, 1 << 30), (~absorbed, 1)):
        some = Rows(rows.start, rows.num_tokens * chosen, rows.num_samples * chosen)
        for one in work(some, decode_tokens):
            if one.name in ("decode_attention", "prefill_attention"):
                total_s = total_s + least_s(one.name, one.flops, one.kv_bytes)
            elif one.name == "kv_b":
                total_s = total_s + least_s(one.name, one.flops, 0.0)
    return np.asarray(total_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data")
    arguments = parser.parse_args()
    configs = needed_data("models", "hf_configs")

    compared, differing = operators(configs)
    print("\n".join(differing[:20]))
    worst = all_to_all(configs)
    print(f"{compared} quantities of operators against torch: {len(differing)} differ; all-to-all off by {worst:.1e}")
    count, wrong = checkpoints(configs)
    print("\n".join(wrong))
    print(f"{count} configurations: {len(wrong)} differ from the tensors that transformers makes of them")
    done, below, least, tally = predictions(configs, arguments.points, arguments.seed)
    print(", ".join(f"{name} {points}" for name, points in sorted(tally.items())))
    print(f"{done} predictions: {below} below their bound; the closest is {least[0]:.3f} times its bound ({least[1]})")
    finish(
        [
            Bar("operator quantities that differ from torch", float(len(differing)), 0, at_least=False),
            Bar("relative difference of all-to-all bytes", worst, 1e-12, at_least=False),
            Bar("configurations whose bytes differ from transformers' tensors", float(len(wrong)), 0, at_least=False),
            Bar("operator quantities compared", float(compared), 10_000),
            Bar("predictions below the bound", float(below), 0, at_least=False),
            Bar("predictions compared with the bound", float(done), arguments.points),
        ],
        {
            "quantities": compared,
            "configurations": count,
            "least_ratio": least[0],
            "points": tally,
            "seed": arguments.seed,
        },
        "physics",
    )


if __name__ == "__main__":
    main()
