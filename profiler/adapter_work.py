"""LoRA adapters: what they add to a step. y += B (A x), rank r (Hu et al., arXiv:2106.09685)."""

from __future__ import annotations

from typing import NamedTuple

from ..runtime.model_shape import ModelShape
from .operator_work import OperatorWork

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


class Adapters(NamedTuple):
    """Adapters in one step.

    rank        of each; kernels that pad it are given the padded one
    num_tokens  tokens that have an adapter
    distinct    adapters that these tokens have, whose matrices are read
    """

    rank: int
    num_tokens: float
    distinct: float


def adapted_matrices(shape: ModelShape, ranks: int = 1) -> tuple[tuple[str, int, int, int], ...]:
    """(name, inputs of A, outputs of B, how many) on each rank: A of q, k, v, gate and up is whole on every rank and B
    cut; A of o and down is cut and B whole, as vLLM and the bundled engine shard them.

    Of a mixture of experts adapters change q, k, v and o alone.
    """
    if shape.latent is not None or shape.linear_attention is not None or len(shape.attention) > 1:
        raise ValueError(f"LoRA adapters of {shape.family}: which matrices they change is not modeled")
    hidden, layers, inter = shape.hidden_size, shape.num_layers, shape.intermediate_size // ranks
    wide = shape.num_heads // ranks * shape.head_dim
    narrow = max(1, shape.num_kv_heads // ranks) * shape.head_dim
    found = (
        ("q", hidden, wide, layers),
        ("k", hidden, narrow, layers),
        ("v", hidden, narrow, layers),
        ("o", wide, hidden, layers),
        ("gate", hidden, inter, layers),
        ("up", hidden, inter, layers),
        ("down", inter, hidden, layers),
    )
    return found[:4] if shape.experts is not None else found


def adapter_work(
    shape: ModelShape, adapters: Adapters, *, tensor_parallel_size: int = 1, activation_bytes: int = 2
) -> tuple[OperatorWork, ...]:
    """lora_a (shrink) and lora_b (expand) of all layers on one rank; the all-reduces of o and down add them up, too."""
    r, tokens, act = adapters.rank, adapters.num_tokens, activation_bytes
    sizes = adapted_matrices(shape, tensor_parallel_size)
    into = sum(features * count for _, features, _, count in sizes)
    out = sum(features * count for _, _, features, count in sizes)
    between = r * sum(count for *_, count in sizes)
    return (
        OperatorWork(
            "lora_a", 2.0 * tokens * r * into, adapters.distinct * r * into * 2, 0.0, act * tokens * (into + between)
        ),
        OperatorWork(
            "lora_b", 2.0 * tokens * r * out, adapters.distinct * r * out * 2, 0.0, act * tokens * (between + 2 * out)
        ),
    )
