"""What attention computes and reads in a step, of every kind: softmax, latent, with an indexer, linear."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..runtime.model_shape import DTYPE_BYTES, KV_SCALE_BYTES, ModelShape
from .composition import Attended, Composition, Rows, attended
from .operator_work import OperatorWork


class AttentionWork(NamedTuple):
    """Operators of all layers' attention, matrices left out.

    expanded_tokens  of latent attention: tokens that kv_b is applied to. Of decoding rows (absorbed) each token's
                     query and answer, of others (expanded) each cached token: as many FLOPs for either
    """

    operators: list[OperatorWork]
    expanded_tokens: float


def attention_work(
    shape: ModelShape,
    step: Composition | Rows,
    tensor_parallel_size: int,
    kv_dtype: str,
    activation_bytes: int,
    decode_tokens: int = 1,
    parts: int = 1,
) -> AttentionWork:
    """Of the layers of `shape`. Operators: decode_attention and prefill_attention; those of other kinds of attention
    than the first have the kind's window before their name.

    Args:
        parts: context-parallel ranks, which divide the queries of long prompts; each reads all of their keys.
    """
    tp, act, found = tensor_parallel_size, activation_bytes, []
    for kind in shape.attention_kinds():
        if not kind.layers:
            continue
        seen = _of_part(attended(step, kind.window, kind.chunk, decode_tokens=decode_tokens), parts)
        heads, layers = kind.num_heads // tp, len(kind.layers)
        element = kind.head_dim * DTYPE_BYTES[kv_dtype] + KV_SCALE_BYTES.get(kv_dtype, 0)
        named = "" if len(shape.attention) < 2 or kind is shape.attention[0] else _prefix(kind.window, kind.chunk)
        found += _softmax(
            named,
            seen,
            flops_per_pair=4.0 * heads * kind.head_dim * layers,
            key_bytes=2 * max(1, kind.num_kv_heads // tp) * element * layers,
            query_bytes=2.0 * heads * kind.head_dim * act * layers,
        )
    expanded = 0.0
    if shape.latent is not None:
        operators, expanded = _latent(shape, step, tp, kv_dtype, act, decode_tokens, parts)
        found += operators
    if shape.linear_attention is not None and shape.linear_attention.layers:
        found.append(_linear(shape, step, tp, act))
    return AttentionWork(found, expanded)


def _prefix(window: int | None, chunk: int | None) -> str:
    return f"window_{window}_" if window else f"chunk_{chunk}_" if chunk else "full_"


def _of_part(seen: Attended, parts: int) -> Attended:
    if parts == 1:
        return seen
    return seen._replace(prefill_pairs=seen.prefill_pairs / parts, prefill_queries=seen.prefill_queries / parts)


def _softmax(
    named: str, seen: Attended, *, flops_per_pair: float, key_bytes: float, query_bytes: float
) -> list[OperatorWork]:
    found = []
    for name, pairs, keys, queries in (
        ("decode_attention", seen.decode_pairs, seen.decode_keys, seen.decode_queries),
        ("prefill_attention", seen.prefill_pairs, seen.prefill_keys, seen.prefill_queries),
    ):
        if np.any(np.greater(pairs, 0)):
            read_written = queries * query_bytes
            found.append(
                OperatorWork(
                    f"{named}{name}", flops_per_pair * pairs, kv_bytes=key_bytes * keys, activation_bytes=read_written
                )
            )
    return found


def _latent(
    shape: ModelShape, step: Composition | Rows, tp: int, kv_dtype: str, act: int, decode_tokens: int, parts: int
) -> tuple[list[OperatorWork], float]:
    """MLA: decoding in the latent, all heads sharing one key of kv_lora_rank + qk_rope_head_dim (DeepSeek-V2,
    arXiv:2405.04434, appendix C); prompts with keys and values expanded for each head from all cached tokens."""
    latent = shape.latent
    assert latent is not None
    heads, layers = shape.num_heads // tp, shape.num_layers
    whole = _of_part(attended(step, decode_tokens=decode_tokens), parts)
    topk = latent.indexer.topk if latent.indexer else None
    seen = _of_part(attended(step, topk=topk, decode_tokens=decode_tokens), parts) if topk else whole
    key_bytes = layers * (latent.cached_dim * DTYPE_BYTES[kv_dtype] + KV_SCALE_BYTES.get(kv_dtype, 0))
    found = []
    if np.any(np.greater(seen.decode_pairs, 0)):
        found.append(
            OperatorWork(
                "decode_attention",
                flops=2.0 * heads * (latent.cached_dim + latent.kv_lora_rank) * layers * seen.decode_pairs,
                kv_bytes=key_bytes * seen.decode_keys,
                activation_bytes=act * layers * heads * (latent.cached_dim + latent.kv_lora_rank) * seen.decode_queries,
            )
        )
    if np.any(np.greater(seen.prefill_pairs, 0)):
        # each query chooses other keys, so that prompts, too, are computed in the latent where there is an indexer
        wide = heads * (latent.cached_dim + latent.kv_lora_rank if topk else latent.qk_head_dim + latent.v_head_dim)
        moved = seen.prefill_queries if topk else seen.prefill_queries + seen.prefill_keys
        found.append(
            OperatorWork(
                "prefill_attention",
                flops=2.0 * wide * layers * seen.prefill_pairs,
                kv_bytes=key_bytes * seen.prefill_keys,
                activation_bytes=act * layers * wide * moved,
            )
        )
    if latent.indexer is not None:
        index = latent.indexer
        scored, keys = whole.decode_pairs + whole.prefill_pairs, whole.decode_keys + whole.prefill_keys
        cached = index.head_dim + 4 * -(-index.head_dim // 128)
        queries = (whole.decode_queries + whole.prefill_queries) * index.num_heads * index.head_dim
        found.append(
            OperatorWork(
                "indexer",
                flops=2.0 * index.num_heads * index.head_dim * layers * scored,
                kv_bytes=layers * cached * keys * 1.0,
                activation_bytes=act * layers * queries * 1.0,
            )
        )
    return found, seen.decode_queries + (seen.prefill_queries if topk else seen.prefill_keys)


def _linear(shape: ModelShape, step: Composition | Rows, tp: int, act: int) -> OperatorWork:
    """Gated delta rule, token by token: of each value head k @ S, the update of S and q @ S, 2 * key_dim * value_dim
    FLOPs each, and the convolution. Chunks of long prompts compute more. States are read and written once."""
    linear = shape.linear_attention
    assert linear is not None
    layers = len(linear.layers)
    sums = step.composition() if isinstance(step, Rows) else step
    # what precedes a token is in its state: a prompt cannot be cut, so every context-parallel rank computes it whole
    tokens = sums.num_tokens
    state = 6 * linear.num_value_heads // tp * linear.key_head_dim * linear.value_head_dim
    conv = 2 * linear.conv_features // tp * linear.conv_kernel_size
    return OperatorWork(
        "linear_attention",
        flops=float(layers * (state + conv)) * tokens,
        kv_bytes=2.0 * layers * linear.state_bytes(act) / tp * sums.num_rows,
        activation_bytes=float(layers * 2 * (linear.conv_features + linear.value_features) // tp * act) * tokens,
    )
