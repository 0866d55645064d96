"""How many bytes a deployment takes, reckoned before anything is loaded, and whether this machine has them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from ..kernels.weight_formats import GPU_EXPANDED_BYTES, WEIGHT_FORMATS
from .device import gpus
from .draft_shape import draft_pool, draft_shape
from .model_shape import ModelShape
from .parallel import Layout, Share, held_shape, keeps_scales_whole, shares
from .spec import CPU, BadSpec, Pool

_GIB = 1 << 30
_SMALLER = ("bf16", "int8", "int4")  # weights to suggest, the least loss of quality first
_ROW_BLOCK = 256  # rows of one expert between its two products at a time, on each thread: kernels/cpu/moe.cpp
# Share of a GPU's memory that an engine may take: vLLM's --gpu-memory-utilization as of version 0.33. The rest is for
# the CUDA context, the libraries' workspaces, NCCL and captured graphs, which were not measured.
GPU_MEMORY_SHARE = 0.92
_PROCESS_BYTES = 300 << 20  # Python, torch and Numba of one rank, resident: measured with torch 2.13 CPU, 2026-11


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of all ranks of the replicas asked for."""

    weight_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    process_bytes: int
    draft_bytes: int = 0  # weights, KV cache and activations of a draft model
    adapter_bytes: int = 0  # slots and host memory, each full of adapters of max_lora_rank on every matrix

    @property
    def total_bytes(self) -> int:
        held = self.weight_bytes + self.kv_cache_bytes + self.activation_bytes
        return held + self.process_bytes + self.draft_bytes + self.adapter_bytes


def memory_need(
    shape: ModelShape, pool: Pool, replicas: int | None = None, ranks: Sequence[int] | None = None
) -> MemoryNeed:
    """What `replicas` of a pool take, on the CPU or, of the GPUs' memory, on GPUs; left out: all replicas of the pool.

    Args:
        ranks: of each replica, by number, that are on this machine; left out: all.
    """
    replicas = pool.replicas if replicas is None else replicas
    here = _shares(shape, pool, ranks)
    on_cpu = pool.accelerator == CPU
    host_blocks = pool.host_kv_blocks if on_cpu else 0
    adapters = pool.max_loras + (_host_adapters(pool) if on_cpu else 0)
    # the ranks in a GPU's slots are padded: kernels/gpu_lora.py
    lora_rank = pool.max_lora_rank if on_cpu else max(16, 1 << (pool.max_lora_rank - 1).bit_length())
    return MemoryNeed(
        weight_bytes=replicas * sum(rank_weight_bytes(shape, share, pool.weight_dtype) for share in here),
        kv_cache_bytes=replicas * (pool.num_kv_blocks + host_blocks) * _block_bytes(shape, pool, ranks),
        activation_bytes=replicas * sum(_activation_bytes(shape, pool, share) for share in here),
        process_bytes=replicas * len(here) * _PROCESS_BYTES if on_cpu else 0,
        draft_bytes=replicas * _draft_bytes(pool, ranks),
        adapter_bytes=replicas * len(here) * adapters * _adapter_bytes(shape, pool, lora_rank),
    )


def host_bytes_beside_gpus(
    shape: ModelShape, pool: Pool, replicas: int | None = None, ranks: Sequence[int] | None = None
) -> int:
    """What a pool on GPUs takes of the host's memory: processes, host blocks and adapters. Arguments as memory_need."""
    replicas = pool.replicas if replicas is None else replicas
    size = len(_shares(shape, pool, ranks))
    each = _PROCESS_BYTES + _host_adapters(pool) * _adapter_bytes(shape, pool, pool.max_lora_rank)
    return replicas * (size * each + pool.host_kv_blocks * _block_bytes(shape, pool, ranks))


def _draft_bytes(pool: Pool, ranks: Sequence[int] | None) -> int:
    """Of one replica: what the draft model takes as a model of its own, but for the processes, which it shares."""
    draft = draft_shape(pool)
    if draft is None:
        return 0
    need = memory_need(draft, draft_pool(pool), 1, ranks)
    return need.weight_bytes + need.kv_cache_bytes + need.activation_bytes


def memory_text(need: MemoryNeed, available: int) -> str:
    """What takes how many GiB, and how many there are, for people."""
    parts = {name.removesuffix("_bytes").replace("_", " "): value for name, value in asdict(need).items()}
    shown = ", ".join(f"{name} {value / _GIB:.2f}" for name, value in parts.items())
    return f"{need.total_bytes / _GIB:.2f} GiB ({shown}) of {available / _GIB:.2f} GiB available"


def rank_weight_bytes(shape: ModelShape, share: Share, weight_dtype: str) -> int:
    """Bytes of the weights that one rank holds: the embedding on the first stage, the head on the last.

    Norms are on every rank; the biases of o and down only on the first, because the ranks' products are added up.
    """
    held = held_shape(shape, share)
    embedding = held.embedding_bytes(weight_dtype) if share.is_first else 0
    held = held if share.has_head else replace(held, vocab_size=0)
    biases = 0 if share.rank == 0 else held.hidden_size * (int(held.o_bias) + int(held.mlp_bias)) * held.num_layers
    return held.weight_bytes(weight_dtype) + embedding - 4 * biases


def _shares(shape: ModelShape, pool: Pool, ranks: Sequence[int] | None) -> tuple[Share, ...]:
    found = shares(shape, Layout.of(pool), WEIGHT_FORMATS[pool.weight_dtype].sharded_by)
    return found if ranks is None else tuple(found[rank] for rank in ranks)


def _block_bytes(shape: ModelShape, pool: Pool, ranks: Sequence[int] | None) -> int:
    """Bytes of one block of the KV cache, these ranks of a replica together."""
    held = (held_shape(shape, share) for share in _shares(shape, pool, ranks))
    return pool.block_size * sum(part.kv_bytes_per_token(pool.kv_cache_dtype) for part in held)


def _all_block_bytes(shape: ModelShape, pool: Pool, ranks: Sequence[int] | None) -> int:
    """The same, with the draft model's block of this number."""
    draft = draft_shape(pool)
    return _block_bytes(shape, pool, ranks) + (0 if draft is None else _block_bytes(draft, pool, ranks))


def _activation_bytes(shape: ModelShape, pool: Pool, share: Share) -> int:
    held = held_shape(shape, share)
    # the widest moment of a layer: residual, its norm, then qkv or gate_up with their results beside them
    hidden, sparse, between = held.hidden_size, held.experts, 0
    dense = 0 if sparse and len(sparse.layers) == held.num_layers else 3 * held.intermediate_size
    width = max(2 * held.qkv_features, dense)
    itemsize = 4 if pool.accelerator == CPU or pool.weight_dtype == "fp32" else 2
    if sparse and pool.accelerator != CPU:
        # of each choice gate and up, their product, its answer where it was computed and in place, and that in fp32,
        # also times its weight
        chosen = sparse.experts_per_token * (3 * sparse.intermediate_size + 2 * hidden + 8 * hidden // itemsize)
        width = max(width, 3 * sparse.shared_intermediate_size, 2 * hidden + 2 * sparse.num_experts + chosen)
    elif sparse:
        # the shared expert's answer and the sum, the router's logits, and for each choice its answer and place
        chosen = 2 * hidden + sparse.num_experts + sparse.experts_per_token * (hidden + 4)
        width = max(width, 3 * sparse.shared_intermediate_size, chosen)
        between = pool.num_threads * _ROW_BLOCK * (hidden + 3 * sparse.intermediate_size)
    width += 2 * hidden
    logits = 2 * pool.max_num_samples * held.vocab_size if share.has_head else 0
    angles = pool.max_model_len * held.head_dim
    kept = expanded = rounded = 0
    if pool.accelerator == CPU and not sparse and (pool.max_loras or pool.context_parallel_size > 1):
        # steps without adapters, or undivided, are one call, whose workspace stays (kernels/cpu/decoder.cpp)
        kept = pool.max_num_batched_tokens * (hidden + 2 * max(hidden, held.qkv_features))
    if pool.accelerator != CPU and pool.weight_dtype in ("fp8", "int8"):
        # rows rounded to bytes, and of int8 the int32 sums beside the result
        sums = 4 * max(held.qkv_features, 2 * held.intermediate_size) if pool.weight_dtype == "int8" else 0
        rounded = pool.max_num_batched_tokens * (max(hidden, held.intermediate_size) + sums)
    if pool.accelerator != CPU and WEIGHT_FORMATS[pool.weight_dtype].bits <= 8:
        # the largest weight, or a part of it, for many rows: kernels/gpu_linear.py
        channels = max(held.qkv_features, 2 * held.intermediate_size, held.vocab_size if share.has_head else 0)
        expanded = min(GPU_EXPANDED_BYTES, itemsize * hidden * channels)
    between_operators = itemsize * (pool.max_num_batched_tokens * width + between + kept)
    return between_operators + 4 * (logits + angles) + expanded + rounded


def _adapter_bytes(shape: ModelShape, pool: Pool, rank: int) -> int:
    """Of one adapter: A and B, of rank `rank`, of q, k, v, gate, up, o and down. Tensor parallel ranks hold one of the
    two cut, which is not taken off here.

    Of a mixture of experts adapters change q, k, v and o alone.
    """
    wide, hidden, inter = shape.num_heads * shape.head_dim, shape.hidden_size, shape.intermediate_size
    narrow = shape.num_kv_heads * shape.head_dim
    values = 4 * hidden + 2 * wide + 2 * narrow + (0 if shape.experts else 3 * (hidden + inter))
    itemsize = 4 if pool.weight_dtype == "fp32" else 2
    return shape.num_layers * values * rank * itemsize


def _host_adapters(pool: Pool) -> int:
    return pool.max_cpu_loras or pool.max_loras


def available_for(pool: Pool, ranks: Sequence[int] | None = None, replicas: int | None = None) -> int:
    """Bytes that the ranks of a pool can take: of this machine's memory, or of the memory of its GPUs.

    On GPUs as many times what the fullest of them has left, as there are ranks: each has one, and they need alike.
    """
    if pool.accelerator == CPU:
        return available_bytes()
    count = (pool.replicas if replicas is None else replicas) * (Layout.of(pool).size if ranks is None else len(ranks))
    left = min(gpu.free_bytes - (1 - GPU_MEMORY_SHARE) * gpu.total_bytes for gpu in gpus()[:count])
    return count * max(0, int(left))


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


def give_back_freed_memory() -> None:
    """Let the C library return what this process has freed: glibc keeps for later what lies between the rest."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def give_back_compiler() -> None:
    """Let go of the pages that hold Numba's compiler, 50 MB, once all functions are compiled (Linux).

    They are clean pages of a file, which Linux would take when it needs memory, and which come back from the file if
    something is compiled after all.
    """
    maps = Path("/proc/self/smaps")
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if not maps.is_file() or advise is None:
        return
    code: tuple[int, int] | None = None
    for line in maps.read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            is_code = rest[0] == "r-xp" and "libllvmlite" in line
            code = (begin, end - begin) if is_code else None
        elif first == "Private_Dirty:" and code is not None and rest[0] == "0":
            advise(ctypes.c_void_p(code[0]), ctypes.c_size_t(code[1]), mmap.MADV_DONTNEED)


def check_memory(
    shape: ModelShape,
    pool: Pool,
    *,
    available: int | None = None,
    replicas: int | None = None,
    ranks: Sequence[int] | None = None,
) -> None:
    """Refuse a pool that does not fit, before a minute of loading ends in a killed process.

    Args:
        available: bytes; left out: what this machine has now.
        replicas: to start; left out: all of the pool.
        ranks: as in memory_need.
    Raises: BadSpec, with the nearest setting that fits.
    """
    replicas = pool.replicas if replicas is None else replicas
    if pool.accelerator != CPU:
        on_host, host = host_bytes_beside_gpus(shape, pool, replicas, ranks), available_bytes()
        if on_host > host:
            found, allowed = f"{on_host / _GIB:.2f} GiB", f"{host / _GIB:.2f} GiB, the host's memory available here"
            raise BadSpec("host_kv_blocks, max_cpu_loras, replicas", found, allowed, "lower one of them")
    available = available_for(pool, ranks, replicas) if available is None else available
    need = memory_need(shape, pool, replicas, ranks)
    if need.total_bytes <= available:
        return
    parts = f"weights {need.weight_bytes / _GIB:.2f}, KV {need.kv_cache_bytes / _GIB:.2f}"
    parts += f", activations {need.activation_bytes / _GIB:.2f}"
    found = f"{need.total_bytes / _GIB:.2f} GiB ({parts})"
    allowed = f"{available / _GIB:.2f} GiB, the memory available here"
    raise BadSpec(
        "num_kv_blocks, weight_dtype, replicas", found, allowed, _nearest(shape, pool, available, replicas, ranks)
    )


def _nearest(shape: ModelShape, pool: Pool, available: int, replicas: int, ranks: Sequence[int] | None) -> str:
    """The smallest change that fits: a smaller KV cache, else smaller weights, else fewer replicas."""
    least_blocks = -(-pool.max_model_len // pool.block_size)
    block_bytes = _all_block_bytes(shape, pool, ranks)
    for count in range(replicas, 0, -1):
        for dtype in dict.fromkeys((pool.weight_dtype, *_SMALLER)):
            if shape.weight_bytes(dtype) > shape.weight_bytes(pool.weight_dtype):
                continue
            if not keeps_scales_whole(shape, dtype, Layout.of(pool)):
                continue
            smaller = pool.model_copy(update={"weight_dtype": dtype, "num_kv_blocks": 0})
            blocks = (available - memory_need(shape, smaller, count, ranks).total_bytes) // (count * block_bytes)
            if blocks >= least_blocks:
                changes = [f"num_kv_blocks: {min(blocks, pool.num_kv_blocks)}"]
                changes += [f"weight_dtype: {dtype}"] if dtype != pool.weight_dtype else []
                changes += [f"replicas: {count}"] if count != replicas else []
                return f"set {', '.join(changes)}"
    return "use a smaller model, a shorter max_model_len, or a machine with more memory"
