"""Sharding: which rank of a replica computes what, and with which threads. No torch.

The ranks stand in pipeline stages of consecutive layers; those of one stage divide the tokens of long prompts among
them by context parallelism (context_part.py), and share every layer by tensor parallelism,
split as Megatron does (Shoeybi et al., arXiv:1909.08053): attention by KV heads, the MLP by intermediate channels, the
embedding and the head by vocabulary; the embedding's rows, o and down are then partial sums, added up over the ranks:
two all-reduces a layer and one more a step. Where there are more ranks than KV heads each head is held by several
ranks, which share its query heads.

Experts are shared among the ranks of a layer in one of two ways: each rank has some channels of every expert, or, by
expert parallelism, some experts whole (Lepikhin et al., arXiv:2006.16668). The ranks have the same tokens, so either
way what they add up is a partial sum, and the layer's all-reduce is that of a dense one: no token travels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

from ..kernels.weight_formats import WEIGHT_FORMATS
from .model_shape import ModelShape
from .spec import Pool


class RankFailed(RuntimeError):
    """A rank of this replica has died or stopped answering; the engine is of no more use."""

    exit_code: ClassVar[int] = 1


class Place(NamedTuple):
    """Where a rank stands: its pipeline stage, its part of a long prompt, and its share of every layer of the stage."""

    stage: int
    part: int
    shard: int


class Layout(NamedTuple):
    """How the ranks of a replica are arranged: stages x parts x shards, the shards in a row. Rank 0 leads.

    expert_parallel  the shards divide the experts among them, not the channels of each
    """

    stages: int = 1
    parts: int = 1
    shards: int = 1
    expert_parallel: bool = False

    @classmethod
    def of(cls, pool: Pool) -> Layout:
        sizes = (pool.pipeline_parallel_size, pool.context_parallel_size, pool.tensor_parallel_size)
        return cls(*sizes, pool.enable_expert_parallel)

    @property
    def size(self) -> int:
        return self.stages * self.parts * self.shards

    def place(self, rank: int) -> Place:
        stage, rest = divmod(rank, self.parts * self.shards)
        return Place(stage, *divmod(rest, self.shards))

    def rank(self, place: Place) -> int:
        return (place.stage * self.parts + place.part) * self.shards + place.shard

    def stage(self, stage: int) -> tuple[int, ...]:
        """The ranks of a stage."""
        first = stage * self.parts * self.shards
        return tuple(range(first, first + self.parts * self.shards))

    def shards_of(self, place: Place) -> tuple[int, ...]:
        """The ranks that share a layer on the same tokens."""
        return tuple(self.rank(place._replace(shard=shard)) for shard in range(self.shards))

    def parts_of(self, place: Place) -> tuple[int, ...]:
        """The ranks that hold the same weights and divide the tokens of long prompts."""
        return tuple(self.rank(place._replace(part=part)) for part in range(self.parts))


@dataclass(frozen=True)
class Share:
    """One rank's part of the model: ranges of layers, heads, KV heads, intermediate channels and vocabulary; of a
    mixture of experts those of experts, and of intermediate channels of each and of the shared one.

    rank, size   among the ranks that share these layers
    is_first     of the pipeline's stages: it embeds
    is_last      of the pipeline's stages
    has_head     it computes logits; of the last stage's ranks those of the first part do
    """

    rank: int
    size: int
    layers: range
    is_first: bool
    is_last: bool
    has_head: bool
    heads: range
    kv_heads: range
    intermediate: range
    vocab: range
    experts: range = range(0)
    expert_intermediate: range = range(0)
    shared_intermediate: range = range(0)


def share_of(shape: ModelShape, layout: Layout, number: int, group: int = 1) -> Share:
    """The share of rank `number`; the layout's shards are one of `tensor_parallel_sizes`.

    Args:
        group: intermediate channels that stay together, as one scale of the weights belongs to all of them.
    """
    stage, part, rank = layout.place(number)
    size = layout.shards
    copies = max(1, size // shape.num_kv_heads)
    sparse, cut, whole = shape.experts, (rank, size), (0, 1)
    experts, channels = (cut, whole) if layout.expert_parallel else (whole, cut)
    return Share(
        rank=rank,
        size=size,
        layers=_part(shape.num_layers, stage, layout.stages),
        is_first=stage == 0,
        is_last=stage == layout.stages - 1,
        has_head=stage == layout.stages - 1 and part == 0,
        heads=_part(shape.num_heads, rank, size),
        kv_heads=_part(shape.num_kv_heads, rank // copies, size // copies),
        intermediate=_grouped_part(shape.intermediate_size, rank, size, group),
        vocab=_part(shape.vocab_size, rank, size),
        experts=_part(sparse.num_experts if sparse else 0, *experts),
        expert_intermediate=_grouped_part(sparse.intermediate_size if sparse else 0, *channels, group),
        shared_intermediate=_grouped_part(sparse.shared_intermediate_size if sparse else 0, *cut, group),
    )


def shares(shape: ModelShape, layout: Layout, group: int = 1) -> tuple[Share, ...]:
    """Those of all ranks of a replica; `group` as in `share_of`."""
    return tuple(share_of(shape, layout, number, group) for number in range(layout.size))


def tensor_parallel_sizes(shape: ModelShape) -> tuple[int, ...]:
    """How many ranks can share a layer: a divisor of the KV heads, or a multiple of them that divides the heads."""
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    return tuple(n for n in range(1, heads + 1) if kv_heads % n == 0 or (n % kv_heads == 0 and heads % n == 0))


def held_shape(shape: ModelShape, share: Share) -> ModelShape:
    """The model that one rank holds: fewer layers, heads, channels, experts and rows of the vocabulary."""
    experts = shape.experts and replace(
        shape.experts,
        num_local_experts=len(share.experts),
        intermediate_size=len(share.expert_intermediate),
        shared_intermediate_size=len(share.shared_intermediate),
        layers=tuple(layer - share.layers.start for layer in shape.experts.layers if layer in share.layers),
    )
    return replace(
        shape,
        num_layers=len(share.layers),
        num_heads=len(share.heads),
        num_kv_heads=len(share.kv_heads),
        intermediate_size=len(share.intermediate),
        vocab_size=len(share.vocab),
        experts=experts,
    )


def keeps_scales_whole(shape: ModelShape, weight_dtype: str, layout: Layout) -> bool:
    """Whether the shards can share the weights with every group of input channels of one scale on one rank.

    o is cut by whole heads; down anywhere, so between groups, of which each rank needs one.
    """
    group, size = WEIGHT_FORMATS[weight_dtype].sharded_by, layout.shards
    heads_fit = shape.num_heads // size * shape.head_dim % group == 0
    return size == 1 or (heads_fit and all(size <= -(-width // group) for width in _cut_widths(shape, layout)))


def _cut_widths(shape: ModelShape, layout: Layout) -> list[int]:
    """Intermediate channels of every MLP that the shards share by channels."""
    sparse = shape.experts
    widths = [shape.intermediate_size] if sparse is None or len(sparse.layers) < shape.num_layers else []
    if sparse is not None:
        widths += [sparse.shared_intermediate_size] if sparse.shared_intermediate_size else []
        widths += [] if layout.expert_parallel else [sparse.intermediate_size]
    return widths


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
    threads = pool.num_threads * Layout.of(pool).size * (pool.replicas if replicas is None else replicas)
    wanted = {"OMP_NUM_THREADS": str(pool.num_threads)}
    if threads > usable_cores():
        wanted |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
    return {name: value for name, value in wanted.items() if name not in os.environ}
