"""Memory of one rank, to the byte: weights as a storage keeps them, KV cache and states, activations; KV blocks that
fit. Of the engines whose layout is known here: what the bundled engine itself needs is in runtime/memory.py."""

from __future__ import annotations

import math
from dataclasses import replace

from ..runtime.model_shape import ModelShape
from ..runtime.quantization import Storage
from .operators import Sharding, kv_bytes_per_token, linears, stage_shape


def weight_bytes(shape: ModelShape, sharding: Sharding, storage: Storage, stage: int = 0) -> int:
    """Weights of the rank of a stage that holds the most: matrices with all their scales, vectors, and its part of the
    embedding, which is never quantized.

    Vectors (norms, biases) are taken as whole on every rank: at most 0.01 % of a model's bytes. A tied head is the
    embedding itself; where both stages are on one rank it is held once.
    """
    sharding.check(shape)
    stages, tp = sharding.pipeline_parallel_size, sharding.tensor_parallel_size
    held = stage_shape(shape, stages, stage) if stages > 1 else shape
    first, last = stage == 0, stage == stages - 1
    total = 0
    for layer in linears(held, tp, sharding.expert_parallel, sharding.data_parallel_size):
        if layer.name == "head" and not (last and not (first and shape.tie_word_embeddings)):
            continue
        total += layer.count * storage.nbytes(layer.name, layer.out_features, layer.in_features)
    if first:
        itemsize = 4 if storage.plain_dtype == "fp32" or storage.weight_dtype == "fp32" else 2
        total += -(-shape.vocab_size // tp) * shape.hidden_size * itemsize
    vectors = held.vector_parameters()
    if not last:  # neither the last norm nor a bias of the head
        vectors = replace(held, vocab_size=0).vector_parameters() - held.hidden_size * (2 if held.norm_bias else 1)
    return total + storage.vector_bytes * vectors


def kv_bytes_of_request(
    shape: ModelShape, sharding: Sharding, kv_dtype: str, num_tokens: int, *, frees_windows: bool = False
) -> int:
    """What one request with `num_tokens` in its context holds on one rank of the first stage, states included.

    Args:
        frees_windows: layers with a window give back what lies before it, as vLLM's hybrid KV cache manager does;
            otherwise every layer keeps every token.
    """
    held = stage_shape(shape, sharding.pipeline_parallel_size, 0)
    tp, total = sharding.tensor_parallel_size, 0
    if frees_windows and held.attention:
        for kind in held.attention:
            alone = replace(held, attention=(kind,), linear_attention=None)
            kept = min(num_tokens, kind.window or kind.chunk or num_tokens)
            total += kept * kv_bytes_per_token(alone, tp, kv_dtype)
    else:
        total += num_tokens * kv_bytes_per_token(held, tp, kv_dtype)
    return total + state_bytes_of_request(held, sharding)


def state_bytes_of_request(shape: ModelShape, sharding: Sharding) -> int:
    """States of linear attention that one request holds on one rank, however long its context is."""
    linear = shape.linear_attention
    return 0 if linear is None else len(linear.layers) * linear.state_bytes() // sharding.tensor_parallel_size


def activation_bytes(
    shape: ModelShape, sharding: Sharding, num_tokens: int, num_samples: int, itemsize: int = 2
) -> int:
    """Most bytes that are alive at once in a step of so many tokens on one rank: the widest moment of a layer.

    Beside the residual and its norm live, of attention, q, k, v and the answer of the heads; of a dense MLP gate and
    up in one and their product; of experts, for each choice of a token, the same and the answer. Logits are fp32.
    Libraries' workspaces, graphs and the allocator's fragments are not in it.
    """
    tp, hidden = sharding.tensor_parallel_size, shape.hidden_size
    held = {layer.name: layer for layer in linears(shape, tp, sharding.expert_parallel, sharding.data_parallel_size)}
    widths = [held[name].out_features + held[of].in_features for name, of in _ATTENTION if name in held]
    widths += [3 * held["down"].in_features] if "down" in held else []
    if shape.experts is not None:
        chosen = shape.experts.experts_per_token * (3 * held["expert_down"].in_features + hidden)
        spread = sharding.expert_ranks if sharding.expert_parallel else 1
        everyone = chosen * sharding.data_parallel_size / spread
        shared = 3 * held["shared_down"].in_features if "shared_down" in held else 0
        widths.append(math.ceil(everyone) + shared + shape.experts.num_experts)
    logits = 4 * num_samples * held["head"].out_features
    return itemsize * num_tokens * (2 * hidden + max(widths)) + logits


_ATTENTION = (("qkv", "o"), ("global_qkv", "global_o"), ("q_b", "o"), ("q", "o"), ("linear_in", "linear_out"))


def num_kv_blocks(
    shape: ModelShape,
    sharding: Sharding,
    storage: Storage,
    kv_dtype: str,
    *,
    memory_bytes: float,
    block_size: int = 16,
    activations: int = 0,
    max_num_seqs: int = 0,
) -> int:
    """KV blocks of `block_size` tokens that fit into the memory of the rank that has the least left.

    Args:
        memory_bytes: of one device that the engine may take (GPU_MEMORY_SHARE of what it has).
        activations: bytes to be left for them.
        max_num_seqs: requests whose states of linear attention are kept; of other models it does not matter.
    """
    fewest = None
    for stage in range(sharding.pipeline_parallel_size):
        held = stage_shape(shape, sharding.pipeline_parallel_size, stage)
        states = max_num_seqs * state_bytes_of_request(held, sharding)
        left = memory_bytes - weight_bytes(shape, sharding, storage, stage) - activations - states
        block = block_size * kv_bytes_per_token(held, sharding.tensor_parallel_size, kv_dtype)
        if block == 0:
            continue
        blocks = math.floor(left / block)
        fewest = blocks if fewest is None else min(fewest, blocks)
    return max(0, fewest or 0)
