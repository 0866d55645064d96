"""What a step computes and moves: FLOPs and bytes of every operator of a decoder under a sharding.

Per rank of a tensor-parallel group, cut as Megatron-LM cuts it (Shoeybi et al., arXiv:1909.08053): q, k, v, gate and up
by output channels, o and down by input channels, each of these two followed by an all-reduce; the vocabulary projection
by vocabulary. Where there are fewer KV heads than ranks each rank holds one (replicated). A multiply-add is two FLOPs.

Of a mixture of experts the ranks hold some channels of every expert, or (expert parallel) some experts whole; either
way their answers are partial sums, and one all-reduce follows a layer, as in the bundled engine. Routing is taken as
uniform: each token chooses any k of the E experts alike, so T tokens touch E (1 - (1 - k / E)^T) of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from ..kernels.weight_formats import WEIGHT_FORMATS
from ..runtime.model_shape import Experts, ModelShape, matrix_dtype

UNTILED = ("router", "shared_gate")
"""Matrices, fp32 in every format, that are too small to measure by themselves or to search tiles for."""


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
    """One kind of linear layer: (out_features, in_features) on each rank, `count` of them in the model.

    in_last      of them in the model's last layer
    all_reduces  that follow in a step; of a sparse layer one, behind all its experts
    chosen       share of the tokens that each of them multiplies: k / E of an expert, 1 of any other
    divided      ranks that experts are divided among, each whole; 1 of any other layer
    """

    name: str
    out_features: int
    in_features: int
    count: int
    in_last: int
    all_reduces: int = 0
    chosen: float = 1.0
    divided: int = 1


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


def linears(shape: ModelShape, tensor_parallel_size: int, expert_parallel: bool = False) -> tuple[Linear, ...]:
    """The linear layers as each rank holds them, under ModelShape's names; the vocabulary projection last.

    Args:
        expert_parallel: the ranks divide the experts, not the channels of each; the rank with the most is meant.
    """
    tp, hidden, layers = tensor_parallel_size, shape.hidden_size, shape.num_layers
    sparse = shape.experts.layers if shape.experts else ()
    dense, last = layers - len(sparse), int(layers - 1 not in sparse)
    heads = shape.num_heads // tp * shape.head_dim
    key_value = max(1, shape.num_kv_heads // tp) * shape.head_dim
    inter = shape.intermediate_size // tp
    found = [
        Linear("qkv", heads + 2 * key_value, hidden, layers, 1),
        Linear("o", hidden, heads, layers, 1, layers if tp > 1 else 0),
        Linear("gate_up", 2 * inter, hidden, dense, last),
        Linear("down", hidden, inter, dense, last, dense if tp > 1 else 0),
        *(_expert_linears(shape.experts, hidden, tp, expert_parallel, 1 - last) if shape.experts else ()),
        Linear("head", -(-shape.vocab_size // tp), hidden, 1, 0),
    ]
    return tuple(layer for layer in found if layer.count)


def _expert_linears(experts: Experts, hidden: int, tp: int, expert_parallel: bool, last: int) -> tuple[Linear, ...]:
    layers, held, inter = len(experts.layers), experts.num_experts, experts.intermediate_size // tp
    if expert_parallel:
        held, inter = -(-held // tp), experts.intermediate_size
    chosen, divided = experts.experts_per_token / experts.num_experts, tp if expert_parallel else 1
    shared = experts.shared_intermediate_size // tp
    with_shared = layers if shared else 0
    return (
        Linear("router", experts.num_experts, hidden, layers, last),
        Linear("expert_gate_up", 2 * inter, hidden, layers * held, last * held, 0, chosen, divided),
        Linear("expert_down", hidden, inter, layers * held, last * held, layers if tp > 1 else 0, chosen, divided),
        Linear("shared_gate", 1, hidden, with_shared, last),
        Linear("shared_gate_up", 2 * shared, hidden, with_shared, last),
        Linear("shared_down", hidden, shared, with_shared, last),
    )


def touched(chosen: float, tokens: int) -> float:
    """Expected share of the experts that at least one of so many tokens chooses, each with probability `chosen`.

    >>> round(touched(8 / 128, 16), 3)
    0.644
    """
    return 1.0 - (1.0 - chosen) ** tokens


def load_imbalance(experts: Experts, tokens: int, ranks: int) -> float:
    """Expected load of the rank with the most (token, expert) pairs over the mean, under uniform routing.

    A rank's load is a sum of draws without replacement, one for each token, taken as normal; the expected largest of n
    normal numbers is Blom's (Statistical Estimates and Transformed Beta-Variables, 1958), and since the loads add up to
    a constant they lie sqrt(n / (n - 1)) further apart. At most what the experts of a rank can take.
    """
    if ranks == 1:
        return 1.0
    count, k = experts.num_experts, experts.experts_per_token
    mean = tokens * k / ranks
    variance = mean * (1 - 1 / ranks) * (count - k) / (count - 1)
    most = NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) * math.sqrt(ranks / (ranks - 1))
    return min(mean + most * math.sqrt(variance), tokens * min(k, -(-count // ranks))) / mean


def kv_bytes_per_token(shape: ModelShape, tensor_parallel_size: int, kv_dtype: str) -> int:
    """Keys and values of one token, all layers, on one rank."""
    heads = max(1, shape.num_kv_heads // tensor_parallel_size)
    return shape.kv_bytes_per_token(kv_dtype) // shape.num_kv_heads * heads


def rank_weight_bytes(
    shape: ModelShape, tensor_parallel_size: int, weight_dtype: str, expert_parallel: bool = False
) -> float:
    """Memory that the weights of one rank take: matrices, and its part of an embedding table that is not tied."""
    matrices = sum(
        x.count * x.out_features * x.in_features * _bytes_per_weight(x.name, weight_dtype)
        for x in linears(shape, tensor_parallel_size, expert_parallel)
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
    expert_parallel: bool = False,
    activation_bytes: int = 2,
) -> tuple[OperatorWork, ...]:
    """Work of one rank in one step, by operator; operators without work are left out.

    Attention: 4 * heads * head_dim FLOPs a query-key pair and layer (q @ k and weights @ v). A decode row reads the
    KV of its whole context; a prefill row at least that of its mean context, prefill_pairs / num_tokens.

    Experts: FLOPs by the tokens that choose them, weights by the experts that any token chooses (`touched`). Where
    ranks divide the experts the one with the most of either counts (`load_imbalance`).

    Args:
        expert_parallel: as in `linears`.
        activation_bytes: of one number between operators: 2 on GPUs, 4 in the bundled CPU engine.
    """
    if step.num_tokens == 0:
        return ()
    tp, act = tensor_parallel_size, activation_bytes
    hidden, tokens, sparse = shape.hidden_size, step.num_tokens, shape.experts
    heads = shape.num_heads // tp
    work = []
    for layer in linears(shape, tp, expert_parallel):
        rows = step.num_samples if layer.name == "head" else tokens
        if rows == 0:
            continue
        count, elements, multiplied, read = layer.count, layer.out_features * layer.in_features, float(rows), 1.0
        if shape.experts and layer.chosen < 1:
            load = load_imbalance(shape.experts, rows, layer.divided)
            multiplied, read = rows * layer.chosen * load, min(1.0, touched(layer.chosen, rows) * load)
        work.append(
            OperatorWork(
                layer.name,
                flops=2.0 * multiplied * elements * count,
                weight_bytes=float(elements * _bytes_per_weight(layer.name, weight_dtype) * count * read),
                activation_bytes=float(multiplied * (layer.out_features + layer.in_features) * act * count),
            )
        )
        if layer.all_reduces:
            size = float(tokens * hidden * act * layer.all_reduces)
            work.append(OperatorWork(f"{layer.name}.all_reduce", messages=layer.all_reduces, message_bytes=size))
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
    elementwise = shape.num_layers * (6 * hidden + 4 * heads * shape.head_dim)
    elementwise += (shape.num_layers - len(sparse.layers if sparse else ())) * 3 * shape.intermediate_size // tp
    if sparse:  # SwiGLU of the chosen and of the shared expert, and the weighted sum of what the chosen answered
        chosen = sparse.experts_per_token * (3 * sparse.intermediate_size // tp + hidden) + 2 * hidden
        elementwise += len(sparse.layers) * (chosen + 3 * sparse.shared_intermediate_size // tp)
    work.append(OperatorWork("elementwise", activation_bytes=float(tokens * act * (elementwise + 2 * hidden))))
    if tp > 1 and step.num_samples:
        logits = float(step.num_samples * shape.vocab_size * act)
        work.append(OperatorWork("head.all_gather", messages=1, message_bytes=logits))
    return tuple(work)
