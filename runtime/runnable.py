"""What the bundled engine can start; what it cannot is refused by the field's name. No torch: a search asks often."""

from __future__ import annotations

from .model_shape import BadModel, ModelShape
from .spec import CPU, BadSpec, Deployment

WEIGHT_DTYPES = ("fp32", "bf16", "int8")
KV_CACHE_DTYPES = ("fp32", "bf16", "fp8", "int8")


def check_runnable(deployment: Deployment, shape: ModelShape | None = None) -> None:
    """Raises: BadSpec or (a context beyond the model's window) BadModel.

    Args:
        shape: of the deployment's model; left out: only what does not depend on it is checked.
    """
    if deployment.engine != "paretune":
        todo = "export the spec and start that server"
        raise BadSpec("engine", deployment.engine, "paretune, for the bundled engine", todo)
    if len(deployment.pools) != 1:
        raise BadSpec("pools", f"{len(deployment.pools)} pools", "one pool of role 'mixed', for the bundled engine")
    pool = deployment.pool
    for field, value, allowed in (
        ("role", pool.role, ("mixed",)),
        ("accelerator", pool.accelerator, (CPU,)),
        ("weight_dtype", pool.weight_dtype, WEIGHT_DTYPES),
        ("kv_cache_dtype", pool.kv_cache_dtype, KV_CACHE_DTYPES),
    ):
        if value not in allowed:
            raise BadSpec(f"pools.0.{field}", value, f"{', '.join(allowed)}, for the bundled engine")
    if shape is None:
        return
    if pool.max_model_len > shape.max_position_embeddings:
        allowed_len = f"at most {shape.max_position_embeddings}, the model's max_position_embeddings"
        raise BadSpec("pools.0.max_model_len", pool.max_model_len, allowed_len)
    if shape.sliding_window is not None and pool.max_model_len > shape.sliding_window:
        found = f"{shape.sliding_window} tokens, below max_model_len {pool.max_model_len}"
        todo = f"set max_model_len to at most {shape.sliding_window}: up to there the window changes nothing"
        raise BadModel("config.json: sliding_window", found, "no window that is active", todo)
    if shape.num_kv_heads % pool.tensor_parallel_size:
        divisors = ", ".join(str(n) for n in range(1, shape.num_kv_heads + 1) if shape.num_kv_heads % n == 0)
        raise BadSpec(
            "pools.0.tensor_parallel_size", pool.tensor_parallel_size, f"{divisors}, which divide the KV heads"
        )
