"""What the bundled engine can start; what it cannot is refused by the field's name. No torch: a search asks often."""

from __future__ import annotations

from ..kernels.weight_formats import WEIGHT_FORMATS
from .draft_shape import check_draft
from .model_shape import BadModel, ModelShape
from .parallel import Layout, keeps_scales_whole, tensor_parallel_sizes
from .spec import CPU, BadSpec, Deployment, Pool

# the arrays of a batch are as large as the limits that the engine was built with
GPU_EXPERT_DTYPES = ("fp32", "bf16", "fp16")  # kernels/triton_moe.py multiplies weights as they are stored
MAX_GPU_RANK = 256  # of an adapter: A and B of one program then take no more than 64 KB of shared memory
_LIMITS_CHANGED_WHILE_RUNNING = ("max_num_seqs", "max_num_batched_tokens")
WEIGHT_DTYPES = tuple(WEIGHT_FORMATS)
USUAL_WEIGHT_DTYPES = ("fp32", "bf16", "int8")  # profiled and searched where nobody says otherwise
KV_CACHE_DTYPES = ("fp32", "bf16", "fp8", "int8")


def check_runnable(deployment: Deployment, shape: ModelShape | None = None) -> None:
    """Raises: BadSpec or (a context beyond the model's window) BadModel.

    Args:
        shape: of the deployment's model; left out: only what does not depend on it is checked.
    """
    if deployment.engine != "paretune":
        todo = "export the spec and start that server"
        raise BadSpec("engine", deployment.engine, "paretune, for the bundled engine", todo)
    if deployment.is_disaggregated:
        found = ", ".join(pool.role for pool in deployment.pools)
        raise BadSpec("pools", found, "one pool of role 'mixed': the bundled engine transfers no KV between pools")
    if len(deployment.pools) != 1:
        raise BadSpec("pools", f"{len(deployment.pools)} pools", "one pool of role 'mixed', for the bundled engine")
    pool = deployment.pool
    for field, value, allowed in (
        ("weight_dtype", pool.weight_dtype, WEIGHT_DTYPES),
        ("kv_cache_dtype", pool.kv_cache_dtype, KV_CACHE_DTYPES),
    ):
        if value not in allowed:
            raise BadSpec(f"pools.0.{field}", value, f"{', '.join(allowed)}, for the bundled engine")
    if pool.host_kv_blocks and pool.pipeline_parallel_size > 1:
        found = f"{pool.host_kv_blocks} with pipeline_parallel_size {pool.pipeline_parallel_size}"
        raise BadSpec("pools.0.host_kv_blocks", found, "0 with several stages, for the bundled engine")
    if pool.max_loras and pool.pipeline_parallel_size > 1:
        found = f"{pool.max_loras} with pipeline_parallel_size {pool.pipeline_parallel_size}"
        raise BadSpec("pools.0.max_loras", found, "0 with several stages, for the bundled engine")
    if pool.accelerator != CPU:
        _check_on_gpu(pool)
    if pool.speculation != "none" and pool.pipeline_parallel_size > 1:
        found = f"{pool.speculation} with pipeline_parallel_size {pool.pipeline_parallel_size}"
        raise BadSpec("pools.0.speculation", found, "none with several stages, for the bundled engine")
    if pool.draft_model and pool.context_parallel_size > 1:
        found = f"{pool.speculation} with context_parallel_size {pool.context_parallel_size}"
        raise BadSpec("pools.0.speculation", found, "none or ngram with context parallelism, for the bundled engine")
    if shape is None:
        return
    shape.check_served()
    check_draft(pool, shape)
    if pool.max_model_len > shape.max_position_embeddings:
        allowed_len = f"at most {shape.max_position_embeddings}, the model's max_position_embeddings"
        raise BadSpec("pools.0.max_model_len", pool.max_model_len, allowed_len)
    if shape.sliding_window is not None and pool.max_model_len > shape.sliding_window:
        found = f"{shape.sliding_window} tokens, below max_model_len {pool.max_model_len}"
        todo = f"set max_model_len to at most {shape.sliding_window}: up to there the window changes nothing"
        raise BadModel("config.json: sliding_window", found, "no window that is active", todo)
    if pool.weight_dtype == "ternary" and shape.ternary is None:
        others = "another precision, as this model was not trained ternary (bitnet in its config.json)"
        raise BadSpec("pools.0.weight_dtype", pool.weight_dtype, others)
    if pool.pipeline_parallel_size > shape.num_layers:
        most = f"at most {shape.num_layers}, the model's layers"
        raise BadSpec("pools.0.pipeline_parallel_size", pool.pipeline_parallel_size, most)
    sizes = tensor_parallel_sizes(shape)
    if pool.tensor_parallel_size not in sizes:
        fit = f"{', '.join(map(str, sizes))}, which divide the KV heads, or their groups of heads"
        raise BadSpec("pools.0.tensor_parallel_size", pool.tensor_parallel_size, fit)
    if shape.experts is not None and pool.accelerator != CPU and pool.weight_dtype not in GPU_EXPERT_DTYPES:
        precisions = f"{', '.join(GPU_EXPERT_DTYPES)} for a mixture of experts on a GPU, for the bundled engine"
        raise BadSpec("pools.0.weight_dtype", pool.weight_dtype, precisions)
    _check_experts(pool, shape)
    if not keeps_scales_whole(shape, pool.weight_dtype, Layout.of(pool)):
        group = WEIGHT_FORMATS[pool.weight_dtype].sharded_by
        found = f"{pool.tensor_parallel_size}, which cuts within {group} input channels that share a scale"
        fit = f"ranks with a multiple of {group} input channels of o_proj and down_proj, for {pool.weight_dtype}"
        raise BadSpec("pools.0.tensor_parallel_size", found, fit)


def _check_experts(pool: Pool, shape: ModelShape) -> None:
    if not pool.enable_expert_parallel:
        return
    if shape.experts is None:
        allowed = "false: the model has no experts (it is no mixture of experts)"
        raise BadSpec("pools.0.enable_expert_parallel", True, allowed)
    if pool.tensor_parallel_size > shape.experts.num_experts:
        most = f"at most {shape.experts.num_experts}, the model's experts, with enable_expert_parallel"
        raise BadSpec("pools.0.tensor_parallel_size", pool.tensor_parallel_size, most)


def _check_on_gpu(pool: Pool) -> None:
    """Raises: BadSpec: what the engine does on the CPU alone. Whether the GPUs are here, device.check_gpus says."""
    for name in ("pipeline_parallel_size", "context_parallel_size"):
        if getattr(pool, name) > 1:
            allowed = "1 on GPUs, for the bundled engine; tensor_parallel_size shards there"
            raise BadSpec(f"pools.0.{name}", getattr(pool, name), allowed)
    if pool.speculation != "none":
        raise BadSpec("pools.0.speculation", pool.speculation, "none on GPUs, for the bundled engine")
    if pool.num_kv_blocks * pool.block_size >= 1 << 31:
        found = f"{pool.num_kv_blocks} of {pool.block_size} tokens"
        raise BadSpec("pools.0.num_kv_blocks", found, "fewer than 2**31 tokens on a GPU, whose slots are int32")
    if pool.max_loras and pool.max_lora_rank > MAX_GPU_RANK:
        raise BadSpec("pools.0.max_lora_rank", pool.max_lora_rank, f"at most {MAX_GPU_RANK} on a GPU")


def fields_that_need_new_replicas(built: Pool, pool: Pool) -> tuple[str, ...]:
    """Fields of `pool` that replicas started with `built` cannot take on; empty: they can change while they run.

    Tiles may still want the weights in another layout, which only the engine knows (kernels.tiles.BadTile).
    """
    differing = (name for name in Pool.model_fields if getattr(pool, name) != getattr(built, name))
    return tuple(name for name in differing if not _changes_while_running(name, built, pool))


def _changes_while_running(name: str, built: Pool, pool: Pool) -> bool:
    if name in _LIMITS_CHANGED_WHILE_RUNNING:
        return bool(getattr(pool, name) <= getattr(built, name))
    # the ranks of a sharded replica are not told of tiles, and CUDA graphs hold those they were captured with
    if name == "tiles":
        return Layout.of(pool).size == 1 and pool.accelerator == CPU
    return name in ("max_queued_requests", "long_prefill_token_threshold")
