"""A deployment as vLLM's command line: an argument list and the YAML that `vllm serve --config` reads.

What vLLM cannot do is refused by the field's name; what it does in its own way is named beside the result. Names and
defaults: research of the wheels of vLLM 0.32 and 0.33; flags are checked against the list in vllm_flags.py.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import ClassVar

import yaml

from ...runtime.small_model import MODEL_DIR
from ...runtime.spec import CPU, SMALL_MODEL, Deployment, Pool
from .vllm_flags import FLAGS

TESTED_VERSIONS = tuple(FLAGS)

# vLLM's own words for how weights are stored; int8 needs a checkpoint that was quantized beforehand.
_DTYPE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_KV_DTYPE = {"bf16": "bfloat16", "fp8": "fp8"}

# vLLM 0.32's own configuration takes any positive number; its attention kernels are built for powers of two of these
# sizes. Not confirmed for every back end: a size that one lacks is refused by vLLM at its start.
_BLOCK_SIZES = (8, 16, 32, 64, 128, 256)

# MaxLoRARanks of vllm/config/lora.py, 0.32
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

Value = str | int | float | bool | list[str]


class CannotExport(Exception):
    """A deployment that an engine cannot run as it is: the field, what it asks, what the engine can do, what to do."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {self.found}; allowed: {self.allowed}; {self.todo}"


@dataclass(frozen=True)
class Export:
    """What to start.

    argv            the command, one element an argument; never a shell string
    env             environment variables that it needs
    config          the same flags as YAML, for `vllm serve --config FILE`
    engine_version  that the flags are of
    not_translated  what vLLM does in its own way, or not at all, in words
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    config: str
    engine_version: str
    not_translated: tuple[str, ...]


def export(deployment: Deployment, *, engine_version: str | None = None, allow_untested: bool = False) -> Export:
    """Translate a deployment for `vllm serve`.

    Args:
        engine_version: of the vLLM that will run, such as "0.32" or "0.32.1"; the newest tested one if left out.
        allow_untested: emit the flags of the newest tested version for one that was not tested.
    Raises: CannotExport: an untested version, or a field that vLLM cannot honor.
    """
    engine_version = engine_version or TESTED_VERSIONS[-1]
    version = _version(engine_version, allow_untested)
    pool = _checked(deployment)
    flags = _flags(pool) + _speculation_flags(pool) + _lora_flags(deployment)
    model = _folder(deployment.model)
    unknown = [name for name, _ in flags if f"--{name}" not in FLAGS[version]]
    if unknown:
        raise CannotExport(
            "flags", ", ".join(unknown), f"the flags of vLLM {version}", "report this: our list is wrong"
        )
    argv = ["vllm", "serve", model]
    for name, value in flags:
        argv += _arguments(name, value)
    config = yaml.safe_dump({"model": model, **dict(flags)}, sort_keys=False)
    return Export(
        tuple(argv), _environment(pool), config, version, _not_translated(deployment, engine_version, version)
    )


def _folder(model: str) -> str:
    return str(MODEL_DIR) if model == SMALL_MODEL else model


def _version(asked: str, allow_untested: bool) -> str:
    minor = re.match(r"\d+\.\d+", asked)
    if minor is not None and minor[0] in FLAGS:
        return minor[0]
    if allow_untested:
        return TESTED_VERSIONS[-1]
    raise CannotExport(
        "engine version", asked, ", ".join(TESTED_VERSIONS), "export for a tested version, or give --allow-untested"
    )


def _checked(deployment: Deployment) -> Pool:
    if deployment.engine not in ("paretune", "vllm"):
        raise CannotExport("engine", deployment.engine, "paretune, vllm", "export for the engine that the spec names")
    if deployment.is_disaggregated:
        found = ", ".join(pool.role for pool in deployment.pools)
        raise CannotExport("pools", found, "one pool of role mixed: one command", "use vllm_phases.export_phases")
    if len(deployment.pools) != 1:
        found = ", ".join(pool.role for pool in deployment.pools)
        raise CannotExport(
            "pools", found, "one pool of role mixed", "export each pool on its own, or pick another point"
        )
    pool = deployment.pools[0]
    if pool.weight_dtype in ("int8", "int4", "nvfp4", "mxfp4", "ternary"):
        todo = "quantize the checkpoint (vLLM then reads that from it) and set weight_dtype to its computing type"
        raise CannotExport("pools.0.weight_dtype", pool.weight_dtype, "fp32, bf16, fp16, fp8", todo)
    if pool.weight_dtype == "fp8" and pool.accelerator == CPU:
        raise CannotExport("pools.0.weight_dtype", "fp8", "fp32, bf16, fp16 on cpu", "pick another precision")
    if pool.kv_cache_dtype == "int8":
        todo = "set kv_cache_dtype to fp8, which takes as many bytes"
        raise CannotExport("pools.0.kv_cache_dtype", "int8", "bf16, fp8", todo)
    if pool.kv_cache_dtype == "fp32" and pool.weight_dtype != "fp32":
        todo = "set kv_cache_dtype to bf16, or weight_dtype to fp32"
        raise CannotExport("pools.0.kv_cache_dtype", "fp32", "bf16, fp8; fp32 only with weight_dtype fp32", todo)
    if pool.preemption == "swap":
        todo = "set preemption to recompute"
        raise CannotExport("pools.0.preemption", "swap", "recompute: vLLM's V1 has no swap", todo)
    if pool.host_kv_blocks:
        todo = "set it to 0, or give vLLM --kv-offloading-size by hand: its tier holds other blocks than ours"
        raise CannotExport("pools.0.host_kv_blocks", pool.host_kv_blocks, "0", todo)
    if pool.admission == "estimated_peak":
        todo = "pick one of these"
        raise CannotExport("pools.0.admission", "estimated_peak", "on_demand, first_chunk, watermark", todo)
    if pool.enable_expert_parallel and pool.replicas > 1:
        allowed = "1 with enable_expert_parallel: vLLM divides the experts among the ranks of all replicas"
        raise CannotExport("pools.0.replicas", pool.replicas, allowed, "export one replica, and start it several times")
    for index, adapter in enumerate(deployment.adapters):
        if "=" in adapter.name or adapter.name.startswith(("-", "{")):
            todo = "give it a name without"
            raise CannotExport(f"adapters.{index}.name", adapter.name, "no '=', and no '-' or '{' in front", todo)
    if pool.block_size not in _BLOCK_SIZES:
        allowed = ", ".join(map(str, _BLOCK_SIZES))
        raise CannotExport("pools.0.block_size", pool.block_size, allowed, "tune with one of these")
    return pool


def _flags(pool: Pool) -> list[tuple[str, Value]]:
    flags: list[tuple[str, Value]] = [("dtype", _DTYPE.get(pool.weight_dtype, "bfloat16"))]
    if pool.weight_dtype == "fp8":
        flags.append(("quantization", "fp8"))
    # "auto" is the weights' own type, the only way to a float32 cache
    flags.append(("kv-cache-dtype", _KV_DTYPE.get(pool.kv_cache_dtype, "auto")))
    flags.append(("tensor-parallel-size", pool.tensor_parallel_size))
    if pool.enable_expert_parallel:
        flags.append(("enable-expert-parallel", True))
    if pool.pipeline_parallel_size > 1:
        flags.append(("pipeline-parallel-size", pool.pipeline_parallel_size))
    if pool.context_parallel_size > 1:
        flags.append(("prefill-context-parallel-size", pool.context_parallel_size))
    if pool.replicas > 1:
        flags.append(("data-parallel-size", pool.replicas))
    if pool.max_queued_requests:
        flags.append(("max-num-queued-reqs", pool.max_queued_requests))
    if pool.scheduling == "priority":
        flags.append(("scheduling-policy", "priority"))
    if pool.long_prefill_token_threshold:
        flags.append(("long-prefill-token-threshold", pool.long_prefill_token_threshold))
    if pool.admission == "first_chunk":
        flags.append(("scheduler-reserve-full-isl", False))
    if pool.enforce_eager:
        flags.append(("enforce-eager", True))
    if pool.cuda_graph_sizes:
        flags.append(("cudagraph-capture-sizes", [str(size) for size in pool.cuda_graph_sizes]))
    if pool.admission == "watermark":
        flags.append(("watermark", pool.watermark))
    return [
        *flags,
        ("max-model-len", pool.max_model_len),
        ("max-num-seqs", pool.max_num_seqs),
        ("max-num-batched-tokens", pool.max_num_batched_tokens),
        ("block-size", pool.block_size),
        ("num-gpu-blocks-override", pool.num_kv_blocks),
        ("enable-chunked-prefill", pool.enable_chunked_prefill),
        ("enable-prefix-caching", pool.enable_prefix_caching),
    ]


def _speculation_flags(pool: Pool) -> list[tuple[str, Value]]:
    """vLLM's SpeculativeConfig as JSON; the method's name and the fields' are its own."""
    if pool.speculation == "none":
        return []
    config: dict[str, str | int] = {
        "method": pool.speculation,
        "num_speculative_tokens": pool.num_speculative_tokens,
    }
    if pool.speculation == "ngram":
        config |= {"prompt_lookup_max": pool.prompt_lookup_max, "prompt_lookup_min": pool.prompt_lookup_min}
    else:
        config["model"] = _folder(pool.draft_model)
    return [("speculative-config", json.dumps(config))]


def _lora_flags(deployment: Deployment) -> list[tuple[str, Value]]:
    pool = deployment.pool
    if pool.max_loras == 0:
        return []
    flags: list[tuple[str, Value]] = [
        ("enable-lora", True),
        ("max-loras", pool.max_loras),
        ("max-cpu-loras", pool.max_cpu_loras or pool.max_loras),
        ("max-lora-rank", min(rank for rank in _LORA_RANKS if rank >= pool.max_lora_rank)),
    ]
    if deployment.adapters:
        flags.append(("lora-modules", [f"{adapter.name}={adapter.path}" for adapter in deployment.adapters]))
    return flags


def _arguments(name: str, value: Value) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}", *value]
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def _environment(pool: Pool) -> dict[str, str]:
    """Cores of each rank, as VLLM_CPU_OMP_THREADS_BIND wants them: ranks apart by "|"."""
    if pool.accelerator != CPU:
        return {}
    ranks = pool.devices_per_replica // pool.num_threads * pool.replicas
    spans = [(rank * pool.num_threads, (rank + 1) * pool.num_threads - 1) for rank in range(ranks)]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(
            f"{first}-{last}" if last > first else f"{first}" for first, last in spans
        )
    }


def _not_translated(deployment: Deployment, asked: str, version: str) -> tuple[str, ...]:
    pool = deployment.pool
    notes = ["predictions in the spec are of the bundled runtime and its scheduler, not of vLLM's"]
    if deployment.scheduler_policy == "vllm_v1":
        notes = ["predictions in the spec are of the bundled runtime, with vLLM's rules but no asynchronous scheduling"]
    if len(pool.tiles):
        notes.append(f"{len(pool.tiles)} tiles: vLLM has kernels and tuned configurations of its own")
    if pool.speculation == "ngram":
        notes.append("n-grams: of equally long matches vLLM takes the earliest, ours the latest")
    if pool.speculation == "draft_model":
        notes.append("the draft model's proposals: vLLM keeps sampled ones by another rule, so acceptance differs")
    if pool.max_loras and pool.max_lora_rank not in _LORA_RANKS:
        notes.append(f"max_lora_rank {pool.max_lora_rank} is the next that vLLM has: {_LORA_RANKS}")
    if pool.replicas > 1 or pool.router != "round_robin":
        notes.append(f"replicas are vLLM's data-parallel ranks, which it feeds by queue length; ours: {pool.router}")
    if pool.max_queued_requests:
        notes.append("max_queued_requests: vLLM answers 503 where ours answers 429")
    if pool.accelerator == CPU:
        notes.append("threads are bound to cores counted from 0: change VLLM_CPU_OMP_THREADS_BIND for others")
    else:
        notes.append(f"the flags say nothing of the accelerator: start it where {pool.accelerator} is")
    if not asked.startswith(version):
        notes.append(f"vLLM {asked} was not tested: these are the flags of {version}")
    return tuple(notes)
