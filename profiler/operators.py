"""What a step computes and moves: FLOPs and bytes of every operator of a decoder under a sharding.

Per rank of a tensor-parallel group, cut as Megatron-LM cuts it (Shoeybi et al., arXiv:1909.08053): q, k, v, gate and up
by output channels, o and down by input channels, each of these two followed by an all-reduce; the embedding and the
vocabulary projection by vocabulary. Where there are fewer KV heads than ranks each rank holds one (replicated), and
each holds a latent whole. A multiply-add is two FLOPs. Sequence parallelism of norms (a reduce-scatter and an
all-gather instead of each all-reduce) moves as many bytes.

Of a mixture of experts the ranks hold some channels of every expert, or (expert parallel) some experts whole. Where
they have the same tokens their answers are partial sums, and one all-reduce follows a layer, as in the bundled engine.
Where attention is data parallel the tokens travel: all of them to all ranks, or each to those that hold its experts.
Routing is taken as uniform unless it is given: each token chooses any k of the E experts alike, so T tokens touch
E (1 - (1 - k / E)^T) of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from ..runtime.attention_shape import Attention
from ..runtime.model_parts import Experts
from ..runtime.model_shape import ModelShape, attention_matrices, kv_bytes
from ..runtime.quantization import Storage
from ..runtime.spec import Pool
from .attention_work import attention_work
from .composition import Composition, Rows, attended
from .operator_work import OperatorWork
from .routing import UNIFORM, Routing, load_imbalance, ranks_chosen, touched

__all__ = [
    "UNIFORM",
    "UNTILED",
    "Composition",
    "Linear",
    "OperatorWork",
    "Routing",
    "Rows",
    "Sharding",
    "kv_bytes_per_token",
    "linears",
    "load_imbalance",
    "rank_weight_bytes",
    "rank_work",
    "stage_shape",
    "step_work",
    "touched",
]

UNTILED = ("router", "shared_gate")
"""Matrices, fp32 in every format, that are too small to measure by themselves or to search tiles for."""

Transport = Literal["all_reduce", "all_gather", "all_to_all"]


class Sharding(NamedTuple):
    """How the devices of one replica share the model.

    tensor_parallel_size    ranks that share every layer's weights
    pipeline_parallel_size  stages of consecutive layers
    context_parallel_size   ranks that divide the tokens of long prompts; each holds all weights and KV
    data_parallel_size      groups of tensor-parallel ranks with requests of their own, each with the whole attention;
                            all of them together share the experts (data-parallel attention)
    expert_parallel         the ranks divide the experts, not the channels of each
    expert_transport        how tokens and answers travel: "all_reduce" (the ranks have the same tokens, their partial
                            sums are added: the bundled engine); "all_gather" (every rank gets all tokens, answers are
                            reduce-scattered: vLLM's allgather_reducescatter); "all_to_all" (a token goes once to each
                            rank that holds one of its experts, and its answer back: DeepEP, TensorRT-LLM)
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_parallel: bool = False
    expert_transport: Transport = "all_reduce"

    @classmethod
    def of(cls, pool: Pool) -> Sharding:
        return cls(
            pool.tensor_parallel_size,
            pool.pipeline_parallel_size,
            pool.context_parallel_size,
            expert_parallel=pool.enable_expert_parallel,
        )

    @property
    def devices(self) -> int:
        shared = self.tensor_parallel_size * self.pipeline_parallel_size
        return shared * self.context_parallel_size * self.data_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks that share the experts of a layer."""
        return self.tensor_parallel_size * self.data_parallel_size

    def check(self, shape: ModelShape) -> None:
        """Raises: ValueError: tokens do not travel as this sharding says."""
        if shape.experts is None:
            return
        if self.data_parallel_size > 1 and self.expert_transport == "all_reduce":
            raise ValueError("data-parallel ranks have other tokens: their experts need all_gather or all_to_all")
        if self.expert_transport == "all_to_all" and not self.expert_parallel:
            raise ValueError("all_to_all takes tokens to whole experts: it needs expert_parallel")


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


def stage_shape(shape: ModelShape, stages: int, stage: int) -> ModelShape:
    """The layers of one pipeline stage, as the bundled engine divides them; embedding and head as they were."""
    first, last = shape.num_layers * stage // stages, shape.num_layers * (stage + 1) // stages
    return _layers(shape, range(first, last))


def _layers(shape: ModelShape, held: range) -> ModelShape:
    def here(layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(layer - held.start for layer in layers if layer in held)

    def attention(kind: Attention) -> Attention:
        return replace(kind, layers=here(kind.layers))

    linear, experts = shape.linear_attention, shape.experts
    return replace(
        shape,
        num_layers=len(held),
        experts=experts and replace(experts, layers=here(experts.layers)),
        attention=tuple(attention(kind) for kind in shape.attention),
        linear_attention=linear and replace(linear, layers=here(linear.layers)),
    )


def linears(
    shape: ModelShape, tensor_parallel_size: int, expert_parallel: bool = False, data_parallel_size: int = 1
) -> tuple[Linear, ...]:
    """The linear layers as each rank holds them, under ModelShape's names; the vocabulary projection last.

    Args:
        expert_parallel: the ranks divide the experts, not the channels of each; the rank with the most is meant.
        data_parallel_size: as in `Sharding`.
    """
    tp, hidden, layers = tensor_parallel_size, shape.hidden_size, shape.num_layers
    sparse = shape.experts.layers if shape.experts else ()
    dense, last = layers - len(sparse), int(layers - 1 not in sparse)
    inter = shape.intermediate_size // tp
    of_last = {name for name, _, _, count in attention_matrices(_layers(shape, range(layers - 1, layers)), tp) if count}
    ranks = tp * data_parallel_size
    found = [
        *(
            Linear(name, out, into, count, int(name in of_last), count if tp > 1 and name in _SUMMED else 0)
            for name, out, into, count in attention_matrices(shape, tp)
        ),
        Linear("gate_up", 2 * inter, hidden, dense, last),
        Linear("down", hidden, inter, dense, last, dense if tp > 1 else 0),
        *(_expert_linears(shape.experts, hidden, tp, expert_parallel, 1 - last, ranks) if shape.experts else ()),
        Linear("head", -(-shape.vocab_size // tp), hidden, 1, 0),
    ]
    return tuple(layer for layer in found if layer.count)


_SUMMED = ("o", "global_o", "linear_out")  # what ranks that divide the heads add up


def _expert_linears(
    experts: Experts, hidden: int, tp: int, expert_parallel: bool, last: int, ranks: int
) -> tuple[Linear, ...]:
    layers, held, inter = len(experts.layers), experts.num_experts, experts.intermediate_size // ranks
    if expert_parallel:
        held, inter = -(-held // ranks), experts.intermediate_size
    chosen, divided = experts.experts_per_token / experts.num_experts, ranks if expert_parallel else 1
    shared = experts.shared_intermediate_size // tp
    with_shared = layers if shared else 0
    return (
        Linear("router", experts.num_experts, hidden, layers, last),
        Linear("expert_gate_up", 2 * inter, hidden, layers * held, last * held, 0, chosen, divided),
        Linear("expert_down", hidden, inter, layers * held, last * held, layers if tp > 1 else 0, chosen, divided),
        Linear("shared_gate", 1, hidden, with_shared if experts.shared_gated else 0, last),
        Linear("shared_gate_up", 2 * shared, hidden, with_shared, last),
        Linear("shared_down", hidden, shared, with_shared, last),
    )


def kv_bytes_per_token(shape: ModelShape, tensor_parallel_size: int, kv_dtype: str) -> int:
    """Keys and values of one token, all layers, on one rank."""
    return kv_bytes(shape, kv_dtype, tensor_parallel_size)


def rank_weight_bytes(
    shape: ModelShape, tensor_parallel_size: int, weight_dtype: str, expert_parallel: bool = False
) -> float:
    """Memory that the weights of one rank take in the bundled engine: matrices, without scales of channels, and its
    part of an embedding table that is not tied. To the byte, and of checkpoints: rank_memory.py."""
    storage = Storage.bundled(weight_dtype)
    matrices = sum(
        x.count * x.out_features * x.in_features * storage.bytes_per_weight(x.name)
        for x in linears(shape, tensor_parallel_size, expert_parallel)
    )
    table = 0.0 if shape.tie_word_embeddings else shape.embedding_bytes(weight_dtype) / tensor_parallel_size
    return matrices + table


def step_work(
    shape: ModelShape,
    step: Composition | Rows,
    *,
    tensor_parallel_size: int,
    weight_dtype: str,
    kv_dtype: str,
    expert_parallel: bool = False,
    activation_bytes: int = 2,
) -> tuple[OperatorWork, ...]:
    """As `rank_work`, of tensor-parallel ranks with the weights stored as in the bundled engine."""
    sharding = Sharding(tensor_parallel_size, expert_parallel=expert_parallel)
    return rank_work(shape, step, sharding, Storage.bundled(weight_dtype), kv_dtype, activation_bytes=activation_bytes)


def rank_work(
    shape: ModelShape,
    step: Composition | Rows,
    sharding: Sharding,
    storage: Storage,
    kv_dtype: str,
    *,
    activation_bytes: int = 2,
    dispatch_bytes: float | None = None,
    routing: Routing = UNIFORM,
    stage: int = 0,
    decode_tokens: int = 1,
) -> tuple[OperatorWork, ...]:
    """Work of one rank in one step, by operator; operators without work are left out.

    Attention: 4 * heads * head_dim FLOPs a query-key pair and layer (q @ k and weights @ v). A row reads the KV of its
    whole context once. From a `Composition` a prefill row reads at least that of its mean context, prefill_pairs /
    num_tokens; from `Rows` all is exact.

    Experts: FLOPs by the tokens that choose them, weights by the experts that any token chooses (`touched`). Where
    ranks divide the experts the one with the most of either counts (`load_imbalance`).

    Args:
        step: of one data-parallel group; the others are taken as alike. Long prompts whole: context parallelism
            divides them here.
        activation_bytes: of one number between operators: 2 on GPUs, 4 in the bundled CPU engine.
        dispatch_bytes: of one number of a token on its way to experts, with its share of scales; left out: as between
            operators. The way back always takes activation_bytes.
        stage: of the pipeline, counted from 0.
        decode_tokens: rows of up to so many tokens are computed as decoding is: in one pass over the cache, and of MLA
            in the latent (absorbed); speculation verifies so.
    Raises: ValueError: experts whose tokens do not travel as the sharding says.
    """
    sharding.check(shape)
    stages, tp, act = sharding.pipeline_parallel_size, sharding.tensor_parallel_size, activation_bytes
    held = stage_shape(shape, stages, stage) if stages > 1 else shape
    sums = step.composition() if isinstance(step, Rows) else step
    if not np.any(sums.num_tokens):
        return ()
    parts = sharding.context_parallel_size
    tokens, exchanged = _tokens_here(step, parts, decode_tokens)
    hidden, work = shape.hidden_size, []
    if stage == 0 and tp > 1:
        size = tokens * hidden * act
        work.append(OperatorWork("embedding.all_reduce", messages=1, message_bytes=size, ranks=tp))
    samples = sums.num_samples if stage == stages - 1 else 0
    attention = attention_work(held, step, tp, kv_dtype, act, decode_tokens, parts)
    expanded = attention.expanded_tokens
    for layer in linears(held, tp, sharding.expert_parallel, sharding.data_parallel_size):
        rows = {"head": samples, "kv_b": expanded}.get(layer.name, tokens)
        if not np.any(rows):
            continue
        count, elements, multiplied, read = layer.count, layer.out_features * layer.in_features, rows, 1.0
        if held.experts and layer.chosen < 1:
            here = rows * sharding.data_parallel_size
            load = 1.0 if layer.divided == 1 else _load(held.experts, here, layer.divided, routing)
            share = touched(layer.chosen, here) * load if routing.touched is None else routing.touched
            multiplied, read = here * layer.chosen * load, np.minimum(1.0, share)
        work.append(
            OperatorWork(
                layer.name,
                flops=2.0 * multiplied * elements * count,
                weight_bytes=storage.read_bytes(layer.name, layer.out_features, layer.in_features) * count * read,
                activation_bytes=multiplied * (layer.out_features + layer.in_features) * act * count * 1.0,
            )
        )
        travels = held.experts is not None and layer.name == "expert_down" and sharding.expert_transport != "all_reduce"
        if travels:
            work += _expert_messages(held, tokens, sharding, act, dispatch_bytes or act, routing)
        elif layer.all_reduces:
            size = tokens * hidden * act * layer.all_reduces * 1.0
            work.append(
                OperatorWork(f"{layer.name}.all_reduce", messages=layer.all_reduces, message_bytes=size, ranks=tp)
            )
    work += attention.operators
    if np.any(exchanged):
        size = exchanged * kv_bytes_per_token(held, tp, "fp32") / 4 * act
        work.append(OperatorWork("kv.all_gather", messages=held.num_layers, message_bytes=size, ranks=parts))
    work.append(OperatorWork("elementwise", activation_bytes=tokens * act * _elementwise(held, tp) * 1.0))
    if tp > 1 and np.any(samples):
        logits = samples * shape.vocab_size * act * 1.0
        work.append(OperatorWork("head.all_gather", messages=1, message_bytes=logits, ranks=tp))
    if stage < stages - 1:
        work.append(OperatorWork("stage.send", messages=1, message_bytes=tokens * hidden * act * 1.0, ranks=2))
    return tuple(work)


def _tokens_here(step: Composition | Rows, parts: int, decode_tokens: int) -> tuple[float, float]:
    """Tokens that one context-parallel rank computes, and those whose keys and values the ranks exchange.

    Long prompts are cut in zigzag, so that each part has as many query-key pairs (runtime/context_part.py); rows of
    few tokens are computed by every rank.
    """
    if parts == 1:
        return (step.composition() if isinstance(step, Rows) else step).num_tokens, 0.0
    if isinstance(step, Rows):
        whole = attended(step, decode_tokens=decode_tokens)
        return whole.decode_queries + -(-whole.prefill_queries // parts), whole.prefill_queries
    divided = np.where(np.greater(step.prefill_pairs, 0), -(-step.num_tokens // parts), step.num_tokens)
    exchanged = np.where(np.greater(step.prefill_pairs, 0), step.num_tokens, 0)
    return (divided, exchanged) if np.ndim(divided) else (divided.item(), exchanged.item())  # type: ignore[return-value]


def _load(experts: Experts, tokens: float, ranks: int, routing: Routing) -> float:
    return load_imbalance(experts, tokens, ranks) if routing.imbalance is None else routing.imbalance


def _expert_messages(
    shape: ModelShape, tokens: float, sharding: Sharding, act: float, dispatch: float, routing: Routing
) -> list[OperatorWork]:
    """How tokens get to the experts and their answers back, where not every rank has all of them."""
    experts, tp, groups = shape.experts, sharding.tensor_parallel_size, sharding.data_parallel_size
    assert experts is not None
    layers, numbers = len(experts.layers), tokens * shape.hidden_size * len(experts.layers)
    if sharding.expert_transport == "all_gather":
        # the ranks of each place in their groups gather and scatter; then those of a group add up
        everyone = numbers * groups
        found = [
            OperatorWork("dispatch.all_gather", messages=layers, message_bytes=everyone * dispatch, ranks=groups),
            OperatorWork("combine.reduce_scatter", messages=layers, message_bytes=everyone * act, ranks=groups),
            OperatorWork("combine.all_reduce", messages=layers, message_bytes=numbers * act, ranks=tp),
        ]
        return [each for each in found if each.ranks > 1]
    ranks = sharding.expert_ranks
    if ranks == 1:
        return []
    # a rank sends its part of its group's tokens to those of the other ranks that each token chose
    load = _load(experts, tokens * groups, ranks, routing)
    sent = numbers / tp * ranks_chosen(experts, ranks) * (ranks - 1) / ranks * load
    found = [
        OperatorWork("dispatch.all_to_all", messages=layers, message_bytes=sent * dispatch, ranks=ranks),
        OperatorWork("combine.all_to_all", messages=layers, message_bytes=sent * act, ranks=ranks),
        OperatorWork("combine.all_gather", messages=layers, message_bytes=numbers * act * 1.0, ranks=tp),
    ]
    return [each for each in found if each.ranks > 1]


def _elementwise(shape: ModelShape, tp: int) -> int:
    """Numbers read and written for each token, each once: norms, rotary embedding and cache write, SwiGLU, the sum of
    what experts answered, and the embedding's rows."""
    hidden, sparse, latent = shape.hidden_size, shape.experts, shape.latent
    total = shape.num_layers * 6 * hidden + 2 * hidden
    total += sum(len(kind.layers) * 4 * (kind.num_heads // tp) * kind.head_dim for kind in shape.attention_kinds())
    if latent is not None:
        total += shape.num_layers * 2 * (shape.num_heads // tp * latent.qk_head_dim + latent.cached_dim)
    if shape.linear_attention is not None:
        linear = shape.linear_attention
        total += len(linear.layers) * 2 * (linear.conv_features + 2 * linear.value_features) // tp
    total += (shape.num_layers - len(sparse.layers if sparse else ())) * 3 * shape.intermediate_size // tp
    if sparse:
        chosen = sparse.experts_per_token * (3 * sparse.intermediate_size // tp + hidden) + 2 * hidden
        total += len(sparse.layers) * (chosen + 3 * sparse.shared_intermediate_size // tp)
    return total
