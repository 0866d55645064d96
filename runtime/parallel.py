"""Tensor parallelism: which rank computes what, and with which threads. No torch.

The split is Megatron's (Shoeybi et al., arXiv:1909.08053): attention by KV heads, the MLP by intermediate channels, the
embedding and the head by vocabulary; the embedding's rows, o and down are then partial sums, added up over the ranks:
two all-reduces a layer and one more a step. Where there are more ranks than KV heads each head is held by several
ranks, which share its query heads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from .model_shape import ModelShape
from .spec import Pool


class RankFailed(RuntimeError):
    """A rank of this replica has died or stopped answering; the engine is of no more use."""

    exit_code: ClassVar[int] = 1


@dataclass(frozen=True)
class Share:
    """One rank's part of the model: ranges of heads, KV heads, intermediate channels and vocabulary."""

    rank: int
    size: int
    heads: range
    kv_heads: range
    intermediate: range
    vocab: range


def share_of(shape: ModelShape, rank: int, size: int) -> Share:
    """The part of rank `rank` of `size`, which is one of `tensor_parallel_sizes`."""
    copies = max(1, size // shape.num_kv_heads)
    return Share(
        rank=rank,
        size=size,
        heads=_part(shape.num_heads, rank, size),
        kv_heads=_part(shape.num_kv_heads, rank // copies, size // copies),
        intermediate=_part(shape.intermediate_size, rank, size),
        vocab=_part(shape.vocab_size, rank, size),
    )


def tensor_parallel_sizes(shape: ModelShape) -> tuple[int, ...]:
    """How many ranks can share a layer: a divisor of the KV heads, or a multiple of them that divides the heads."""
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    return tuple(n for n in range(1, heads + 1) if kv_heads % n == 0 or (n % kv_heads == 0 and heads % n == 0))


def held_shape(shape: ModelShape, share: Share) -> ModelShape:
    """The model that one rank holds: fewer heads, channels and rows of the vocabulary."""
    return replace(
        shape,
        num_heads=len(share.heads),
        num_kv_heads=len(share.kv_heads),
        intermediate_size=len(share.intermediate),
        vocab_size=len(share.vocab),
    )


def _part(total: int, rank: int, size: int) -> range:
    """Part `rank` of range(total) cut into `size` parts whose lengths differ by at most one."""
    return range(total * rank // size, total * (rank + 1) // size)


def usable_cores() -> int:
    """Cores that this process may run on, by its affinity and by the quota of its container (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        most, _, period = quota.read_text().strip().partition(" ")
        if most != "max":
            cores = max(1, min(cores, int(most) // int(period)))
    return cores


def thread_environment(pool: Pool, replicas: int | None = None) -> Mapping[str, str]:
    """Environment for the processes of a deployment, to be set before they load torch.

    OpenMP threads spin for a while after their work, which saves a wake-up per operator where each has a core of its
    own, and takes the core from the others where they have not. What the user has set already stays as it is.

    Args:
        replicas: that share this machine; left out: those of the pool.
    """
    threads = pool.num_threads * pool.tensor_parallel_size * (pool.replicas if replicas is None else replicas)
    wanted = {"OMP_NUM_THREADS": str(pool.num_threads)}
    if threads > usable_cores():
        wanted |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
    return {name: value for name, value in wanted.items() if name not in os.environ}
