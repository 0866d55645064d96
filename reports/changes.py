"""What changes from one deployment to another: field by field, in plain words, and as a diff."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from ..runtime.spec import Deployment, Pool

# A sentence for each field of a Pool, about its value afterwards.
WORDS = {
    "role": "This pool computes the {after} part of requests.",
    "replicas": "Run {after} copies of the model, each with its own queue, instead of {before}.",
    "router": "Send each request to a copy by {after} (was {before}).",
    "accelerator": "Run on {after} instead of {before}.",
    "tensor_parallel_size": "Share each copy's layers among {after} workers that compute together (was {before}).",
    "pipeline_parallel_size": "Cut each copy's layers into {after} stages that work on other steps (was {before}).",
    "context_parallel_size": "Divide long prompts among {after} workers (was {before}).",
    "enable_expert_parallel": "Divide the model's experts among these workers, each whole: {after} (was {before}).",
    "num_threads": "Let each worker compute with {after} CPU threads instead of {before}.",
    "weight_dtype": "Store the model's weights in {after} instead of {before}.",
    "kv_cache_dtype": "Store the memory of past tokens in {after} instead of {before}.",
    "max_model_len": "Accept requests of up to {after} tokens, prompt and answer together, instead of {before}.",
    "max_num_seqs": "Work on at most {after} requests at once instead of {before}; the others wait their turn.",
    "max_num_batched_tokens": "Compute at most {after} tokens in one step instead of {before}.",
    "block_size": "Give out cache memory in pieces of {after} tokens instead of {before}.",
    "num_kv_blocks": "Reserve cache memory for {after} blocks instead of {before}.",
    "enable_chunked_prefill": "Long prompts in several steps, so that answers do not stall: {after} (was {before}).",
    "enable_prefix_caching": "Compute equal beginnings of prompts once: {after} (was {before}).",
    "max_queued_requests": "Let {after} requests wait before more are refused, instead of {before} (0: no limit).",
    "scheduling": "Decide who goes first by {after} (was {before}).",
    "admission": "Start a waiting request by the rule {after} (was {before}).",
    "watermark": "Keep {after} of the cache memory free for requests that run (was {before}).",
    "preemption": "When cache memory runs out, {after} (was {before}).",
    "host_kv_blocks": "Keep {after} more blocks of cache memory behind the first, instead of {before}.",
    "long_prefill_token_threshold": "Compute at most {after} tokens of a prompt in a step (was {before}; 0: no limit).",
    "speculation": "Propose tokens ahead and check several at once, by {after} (was {before}).",
    "num_speculative_tokens": "Propose at most {after} tokens ahead for each request (was {before}).",
    "prompt_lookup_max": "Look for up to {after} last tokens in the text before (was {before}).",
    "prompt_lookup_min": "Take {after} equal tokens for a match (was {before}).",
    "draft_model": "Let the model in {after!r} propose tokens (was {before!r}).",
    "max_loras": "Compute with at most {after} adapters in one step instead of {before}.",
    "max_cpu_loras": "Keep {after} adapters in memory instead of {before} (0: as many as one step takes).",
    "max_lora_rank": "Accept adapters of rank {after} at most (was {before}).",
    "enforce_eager": "Start each operator of a decode step by itself: {after} (was {before}).",
    "cuda_graph_sizes": "Record decode steps of {after} requests beforehand, instead of {before} (empty: the usual).",
    "tiles": "Cut the operators' work into blocks as this machine does best: {after} tuned tiles instead of {before}.",
}


@dataclass(frozen=True)
class Change:
    """One field that differs."""

    field: str
    before: str
    after: str
    words: str


def changes(before: Deployment, after: Deployment) -> tuple[Change, ...]:
    """Fields of what runs (`Deployment.signature`) that differ; empty where both run alike."""
    found = [
        Change(name, str(old), str(new), f"The {name.replace('_', ' ')} becomes {new} (was {old}).")
        for name in ("model", "engine", "scheduler_policy")
        if (old := getattr(before, name)) != (new := getattr(after, name))
    ]
    if before.adapters != after.adapters:
        old, new = (", ".join(each.name for each in spec.adapters) or "none" for spec in (before, after))
        found.append(Change("adapters", old, new, f"The adapters are {new} (before: {old})."))
    if len(before.pools) != len(after.pools):
        old_pools, new_pools = str(len(before.pools)), str(len(after.pools))
        return (*found, Change("pools", old_pools, new_pools, f"{new_pools} pools of replicas instead of {old_pools}."))
    for i, (old_pool, new_pool) in enumerate(zip(before.pools, after.pools, strict=True)):
        place = f"pools.{i}." if len(after.pools) > 1 else ""
        for name, sentence in WORDS.items():
            if getattr(old_pool, name) != getattr(new_pool, name):
                old, new = _shown(old_pool, name), _shown(new_pool, name)
                found.append(Change(f"{place}{name}", old, new, sentence.format(before=old, after=new)))
    return tuple(found)


def diff(found: tuple[Change, ...]) -> tuple[str, ...]:
    """Lines as of a diff of two specs."""
    return tuple(line for each in found for line in (f"- {each.field}: {each.before}", f"+ {each.field}: {each.after}"))


def short(pool: Pool) -> str:
    """What tells the candidates of a study apart, such as "2 × 1 × 1, int8, 64 requests, 512 tokens, chunked"."""
    switches = [("chunked", pool.enable_chunked_prefill), ("prefix", pool.enable_prefix_caching)]
    sizes = (pool.pipeline_parallel_size, pool.context_parallel_size)
    ranks = "".join(f"{name} {size} × " for name, size in zip(("PP", "CP"), sizes) if size > 1)
    ranks += "EP " if pool.enable_expert_parallel else ""
    shards = f"{pool.replicas} × {ranks}{pool.tensor_parallel_size} × {pool.num_threads}"
    limits = f"{pool.max_num_seqs} requests, {pool.max_num_batched_tokens} tokens"
    return ", ".join([shards, pool.weight_dtype, limits, *(name for name, on in switches if on)])


def spec_yaml(deployment: Deployment) -> str:
    """The spec as `runtime.spec.save_deployment` writes it."""
    return yaml.safe_dump(deployment.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def _shown(pool: Pool, name: str) -> str:
    value: Any = getattr(pool, name)
    if name == "tiles":
        return f"{len(value)}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value}"
