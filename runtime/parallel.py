"""Tensor parallelism: which rank computes what, and with which threads. No torch.

The split is Megatron's (Shoeybi et al., arXiv:1909.08053): attention by KV heads, the MLP by intermediate channels, the
head by vocabulary; o and down are then partial sums, added up over the ranks, two all-reduces a layer. The embedding is
whole on every rank: that costs memory and saves a third all-reduce.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..kernels.weight_formats import WEIGHT_FORMATS
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


def share_of(shape: ModelShape, rank: int, size: int, group: int = 1) -> Share:
    """The part of rank `rank` of `size`, which divides the KV heads (`runnable.check_runnable`).

    Args:
        group: intermediate channels that stay together, as one scale of the weights belongs to all of them.
    """
    return Share(
        rank=rank,
        size=size,
        heads=_part(shape.num_heads, rank, size),
        kv_heads=_part(shape.num_kv_heads, rank, size),
        intermediate=_grouped_part(shape.intermediate_size, rank, size, group),
        vocab=_part(shape.vocab_size, rank, size),
    )


def keeps_scales_whole(shape: ModelShape, weight_dtype: str, size: int) -> bool:
    """Whether `size` ranks can share the weights with every group of input channels of one scale on one rank.

    o is cut by whole heads; down anywhere, so between groups, of which each rank needs one.
    """
    group = WEIGHT_FORMATS[weight_dtype].sharded_by
    heads_fit = shape.num_heads // size * shape.head_dim % group == 0
    return size == 1 or (heads_fit and size <= -(-shape.intermediate_size // group))


def _part(total: int, rank: int, size: int) -> range:
    """Part `rank` of range(total) cut into `size` parts whose lengths differ by at most one."""
    return range(total * rank // size, total * (rank + 1) // size)


def _grouped_part(total: int, rank: int, size: int, group: int) -> range:
    part = _part(-(-total // group), rank, size)
    return range(part.start * group, min(part.stop * group, total))


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
