"""What a step computes and moves: FLOPs and bytes of every operator of a dense decoder under a sharding.

Per rank of a tensor-parallel group, cut as Megatron-LM cuts it (Shoeybi et al., arXiv:1909.08053): q, k, v, gate and up
by output channels, o and down by input channels, each of these two followed by an all-reduce; the vocabulary projection
by vocabulary. Where there are fewer KV heads than ranks each rank holds one (replicated). A multiply-add is two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..kernels.weight_formats import WEIGHT_FORMATS
from ..runtime.model_shape import ModelShape, matrix_dtype


class Composition(NamedTuple):
    """What stands in one step, whatever requests it belongs to.

    num_tokens      tokens computed
    num_rows        requests that compute some
    num_samples     rows whose last token gets a successor
    decode_context  tokens whose KV the one-token rows read, their own included, summed over these rows
    prefill_pairs   query-key pairs of the other rows: n * start + n * (n + 1) / 2 for n tokens after `start` others
    """

    num_tokens: int
    num_rows: int
    num_samples: int
    decode_context: float
    prefill_pairs: float


@dataclass(frozen=True)
class Linear:
    """One kind of linear layer: (out_features, in_features) on each rank, `count` of them in the model."""

    name: str
    out_features: int
    in_features: int
    count: int
    all_reduce: bool


@dataclass(frozen=True)
class OperatorWork:
    """Work of one kind of operator in one step on one rank, all layers together.

    flops                floating-point (or integer) operations
    weight_bytes         read once a step
    kv_bytes             of cached keys and values, read once
    activation_bytes     read and written, each operator by itself; caches and fusion may save them
    messages             collectives
    message_bytes        of all of them together, as the operator sees them (before any algorithm's factor)
    """

    name: str
    flops: float = 0.0
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    activation_bytes: float = 0.0
    messages: int = 0
    message_bytes: float = 0.0


def linears(shape: ModelShape, tensor_parallel_size: int) -> tuple[Linear, ...]:
    """The linear layers as each rank holds them, under ModelShape's names; the vocabulary projection last."""
    tp = tensor_parallel_size
    key_value = max(1, shape.num_kv_heads // tp) * shape.head_dim
    cut = {
        "qkv": (shape.num_heads // tp * shape.head_dim + 2 * key_value, shape.hidden_size),
        "o": (shape.hidden_size, shape.num_heads // tp * shape.head_dim),
        "gate_up": (2 * (shape.intermediate_size // tp), shape.hidden_size),
        "down": (shape.hidden_size, shape.intermediate_size // tp),
        "head": (-(-shape.vocab_size // tp), shape.hidden_size),
    }
    return tuple(
        Linear(name, *cut[name], count, tp > 1 and name in ("o", "down")) for name, _, _, count in shape.matrices()
    )


def kv_bytes_per_token(shape: ModelShape, tensor_parallel_size: int, kv_dtype: str) -> int:
    """Keys and values of one token, all layers, on one rank."""
    heads = max(1, shape.num_kv_heads // tensor_parallel_size)
    return shape.kv_bytes_per_token(kv_dtype) // shape.num_kv_heads * heads


def rank_weight_bytes(shape: ModelShape, tensor_parallel_size: int, weight_dtype: str) -> float:
    """Memory that the weights of one rank take: matrices, and its part of an embedding table that is not tied."""
    matrices = sum(
        x.count * x.out_features * x.in_features * _bytes_per_weight(x.name, weight_dtype)
        for x in linears(shape, tensor_parallel_size)
    )
    table = 0.0 if shape.tie_word_embeddings else shape.embedding_bytes(weight_dtype) / tensor_parallel_size
    return matrices + table


def _bytes_per_weight(matrix: str, weight_dtype: str) -> float:
    return WEIGHT_FORMATS[matrix_dtype(matrix, weight_dtype)].bytes_per_weight()


def step_work(
    shape: ModelShape,
    step: Composition,
    *,
    tensor_parallel_size: int,
    weight_dtype: str,
    kv_dtype: str,
    activation_bytes: int = 2,
) -> tuple[OperatorWork, ...]:
    """Work of one rank in one step, by operator; operators without work are left out.

    Attention: 4 * heads * head_dim FLOPs a query-key pair and layer (q @ k and weights @ v). A decode row reads the
    KV of its whole context; a prefill row at least that of its mean context, prefill_pairs / num_tokens.

    Args:
        activation_bytes: of one number between operators: 2 on GPUs, 4 in the bundled CPU engine.
    """
    if step.num_tokens == 0:
        return ()
    tp, act = tensor_parallel_size, activation_bytes
    hidden, tokens = shape.hidden_size, step.num_tokens
    heads = shape.num_heads // tp
    work = []
    for layer in linears(shape, tp):
        rows = step.num_samples if layer.name == "head" else tokens
        if rows == 0:
            continue
        count, elements = layer.count, layer.out_features * layer.in_features
        work.append(
            OperatorWork(
                layer.name,
                flops=2.0 * rows * elements * count,
                weight_bytes=float(elements * _bytes_per_weight(layer.name, weight_dtype) * count),
                activation_bytes=float(rows * (layer.out_features + layer.in_features) * act * count),
            )
        )
        if layer.all_reduce:
            size = float(tokens * hidden * act * count)
            work.append(OperatorWork(f"{layer.name}.all_reduce", messages=count, message_bytes=size))
    per_token = kv_bytes_per_token(shape, tp, kv_dtype)
    per_pair = 4.0 * heads * shape.head_dim * shape.num_layers
    query_bytes = 2.0 * heads * shape.head_dim * act * shape.num_layers
    for name, pairs, context, queries in (
        ("decode_attention", step.decode_context, step.decode_context, step.num_rows),
        ("prefill_attention", step.prefill_pairs, step.prefill_pairs / tokens, tokens),
    ):
        if pairs > 0:
            work.append(
                OperatorWork(
                    name, per_pair * pairs, kv_bytes=per_token * context, activation_bytes=queries * query_bytes
                )
            )
    # two norms, rotary embedding and cache write, SwiGLU: read and written once each; and the embedding rows
    elementwise = shape.num_layers * (6 * hidden + 4 * heads * shape.head_dim + 3 * shape.intermediate_size // tp)
    work.append(OperatorWork("elementwise", activation_bytes=float(tokens * act * (elementwise + 2 * hidden))))
    if tp > 1 and step.num_samples:
        logits = float(step.num_samples * shape.vocab_size * act)
        work.append(OperatorWork("head.all_gather", messages=1, message_bytes=logits))
    return tuple(work)
