"""How many bytes a deployment takes, reckoned before anything is loaded, and whether this machine has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from .model_shape import ModelShape
from .spec import BadSpec, Pool

_GIB = 1 << 30
_PROCESS_BYTES = 300 << 20  # Python, torch and Numba of one rank, resident: measured with torch 2.13 CPU, 2026-11


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of all ranks of the replicas asked for."""

    weight_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    process_bytes: int
    adapter_bytes: int = 0  # slots and host memory, each full of adapters of max_lora_rank on every matrix

    @property
    def total_bytes(self) -> int:
        held = self.weight_bytes + self.kv_cache_bytes + self.activation_bytes
        return held + self.process_bytes + self.adapter_bytes


def memory_need(shape: ModelShape, pool: Pool, replicas: int | None = None) -> MemoryNeed:
    """What `replicas` of a pool take on the CPU; left out: all replicas of the pool."""
    replicas = pool.replicas if replicas is None else replicas
    ranks = pool.tensor_parallel_size
    weights = shape.weight_bytes(pool.weight_dtype) + ranks * shape.embedding_bytes(pool.weight_dtype)
    kv_cache = pool.num_kv_blocks * pool.block_size * shape.kv_bytes_per_token(pool.kv_cache_dtype)
    tokens = pool.max_num_batched_tokens
    # fp32, the widest moment of a layer: residual, its norm, then qkv or gate_up with their results beside them
    width = 2 * shape.hidden_size + max(2 * shape.qkv_features, 3 * shape.intermediate_size)
    logits = 2 * pool.max_num_seqs * shape.vocab_size
    angles = pool.max_model_len * shape.head_dim
    return MemoryNeed(
        weight_bytes=replicas * weights,
        kv_cache_bytes=replicas * kv_cache,
        activation_bytes=replicas * 4 * (tokens * width + logits + ranks * angles),
        process_bytes=replicas * ranks * _PROCESS_BYTES,
        adapter_bytes=replicas * _adapter_bytes(shape, pool),
    )


def _adapter_bytes(shape: ModelShape, pool: Pool) -> int:
    """A and B of q, k, v, gate, up, o and down. Each rank holds one of the two cut, which is not taken off here."""
    wide, hidden, inter = shape.num_heads * shape.head_dim, shape.hidden_size, shape.intermediate_size
    narrow = shape.num_kv_heads * shape.head_dim
    values = 7 * hidden + 2 * wide + 2 * narrow + 3 * inter
    itemsize = 4 if pool.weight_dtype == "fp32" else 2
    adapters = pool.max_loras + (pool.max_cpu_loras or pool.max_loras)
    return adapters * shape.num_layers * values * pool.max_lora_rank * itemsize * pool.tensor_parallel_size


def available_bytes() -> int:
    """Memory that can be taken without swapping, within the limit of the control group (Linux, version 2)."""
    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file():
        most = limit.read_text().strip()
        if most.isdigit():
            available = min(available, int(most) - int(used.read_text()))
    return max(0, available)


def check_memory(shape: ModelShape, pool: Pool, *, available: int | None = None, replicas: int | None = None) -> None:
    """Refuse a pool that does not fit, before a minute of loading ends in a killed process.

    Args:
        available: bytes; left out: what this machine has now.
        replicas: to start; left out: all of the pool.
    Raises: BadSpec, with the nearest setting that fits.
    """
    available = available_bytes() if available is None else available
    replicas = pool.replicas if replicas is None else replicas
    need = memory_need(shape, pool, replicas)
    if need.total_bytes <= available:
        return
    parts = f"weights {need.weight_bytes / _GIB:.2f}, KV {need.kv_cache_bytes / _GIB:.2f}"
    found = f"{need.total_bytes / _GIB:.2f} GiB ({parts})"
    allowed = f"{available / _GIB:.2f} GiB, the memory available here"
    raise BadSpec("num_kv_blocks, weight_dtype, replicas", found, allowed, _nearest(shape, pool, available, replicas))


def _nearest(shape: ModelShape, pool: Pool, available: int, replicas: int) -> str:
    """The smallest change that fits: a smaller KV cache, else smaller weights, else fewer replicas."""
    least_blocks = -(-pool.max_model_len // pool.block_size)
    block_bytes = pool.block_size * shape.kv_bytes_per_token(pool.kv_cache_dtype)
    for count in range(replicas, 0, -1):
        for dtype in dict.fromkeys((pool.weight_dtype, "bf16", "int8")):
            if shape.weight_bytes(dtype) > shape.weight_bytes(pool.weight_dtype):
                continue
            smaller = pool.model_copy(update={"weight_dtype": dtype, "num_kv_blocks": 0})
            blocks = (available - memory_need(shape, smaller, count).total_bytes) // (count * block_bytes)
            if blocks >= least_blocks:
                changes = [f"num_kv_blocks: {min(blocks, pool.num_kv_blocks)}"]
                changes += [f"weight_dtype: {dtype}"] if dtype != pool.weight_dtype else []
                changes += [f"replicas: {count}"] if count != replicas else []
                return f"set {', '.join(changes)}"
    return "use a smaller model, a shorter max_model_len, or a machine with more memory"
