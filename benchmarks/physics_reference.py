"""A step of a decoder computed by torch on meta tensors, rank by rank: what physics.py compares the operator list with.

Written from the published architectures and from nothing of paretune: attention query by query, so that a causal mask
costs what it lets through; latent attention both ways; experts one by one with the tokens that chose them. FLOPs are
what torch.utils.flop_counter.FlopCounterMode counts, bytes those of the tensors that are read and written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

Rows = Sequence[tuple[int, int]]  # (tokens in the cache, tokens to compute) of each request
ACTIVATION = torch.bfloat16


@dataclass
class Counted:
    """Of one operator, all layers together."""

    flops: int = 0
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    activation_bytes: int = 0
    messages: int = 0
    message_bytes: float = 0.0


@dataclass(frozen=True)
class Rank:
    """Which rank computes: `shard` of `tp`, `part` of `cp` divide long prompts, group `group` of `dp` has requests of
    its own, `stage` of `pp`. `ep`: experts are whole. transport: all_reduce, all_gather or all_to_all."""

    tp: int = 1
    shard: int = 0
    pp: int = 1
    stage: int = 0
    cp: int = 1
    part: int = 0
    dp: int = 1
    group: int = 0
    ep: bool = False
    transport: str = "all_reduce"


@dataclass
class Step:
    """One rank's step: counts by operator.

    stored_bytes  of a weight (matrix name, out_features, in_features)
    kv_dtype      of the cache
    chosen        (tokens of all groups, k) experts of each token, group after group; None: no experts
    """

    config: Mapping[str, Any]
    rank: Rank
    stored_bytes: Any
    kv_dtype: torch.dtype
    chosen: Tensor | None = None
    counts: dict[str, Counted] = field(default_factory=lambda: defaultdict(Counted))
    read: set[str] = field(default_factory=set)

    @contextmanager
    def operator(self, name: str) -> Iterator[Counted]:
        with FlopCounterMode(display=False) as counter:
            yield self.counts[name]
        self.counts[name].flops += counter.get_total_flops()

    def linear(self, name: str, x: Tensor, out_features: int, key: str) -> Tensor:
        """x @ W.T with a weight of this rank's size; `key` names the weight, which is read once a step."""
        weight = new(out_features, x.shape[-1])
        with self.operator(name) as count:
            y = x @ weight.T
        if key not in self.read:
            self.read.add(key)
            count.weight_bytes += self.stored_bytes(name, out_features, x.shape[-1])
        count.activation_bytes += x.nbytes + y.nbytes
        return y

    def send(self, name: str, tensor: Tensor, share: float = 1.0) -> None:
        self.counts[name].messages += 1
        self.counts[name].message_bytes += tensor.nbytes * share


def new(*sizes: int, dtype: torch.dtype = ACTIVATION) -> Tensor:
    return torch.empty(sizes, device="meta", dtype=dtype)


def span(total: int, index: int, parts: int) -> range:
    return range(total * index // parts, total * (index + 1) // parts)


def zigzag(start: int, tokens: int, part: int, parts: int) -> list[int]:
    """Positions of a long prompt that one of several parts computes: a piece from the front and one from the back."""
    piece = tokens // (2 * parts)
    places = [*range(part * piece, (part + 1) * piece)]
    places += range((2 * parts - 1 - part) * piece, (2 * parts - part) * piece)
    return [start + place for place in places]


def run(step: Step, rows: Rows, samples: int, decode_tokens: int = 1) -> dict[str, Counted]:
    """The counts of one rank's step."""
    config, rank = step.config, step.rank
    queries = [
        list(range(start, start + tokens))
        if tokens <= decode_tokens or rank.cp == 1
        else zigzag(start, tokens, rank.part, rank.cp)
        for start, tokens in rows
    ]
    tokens, hidden = sum(map(len, queries)), config["hidden_size"]
    x = new(tokens, hidden)
    if rank.stage == 0 and rank.tp > 1:
        step.send("embedding.all_reduce", x)
    for layer in span(config["num_hidden_layers"], rank.stage, rank.pp):
        attend = latent_attention if "kv_lora_rank" in config else attention
        attend(step, x, rows, queries, layer, decode_tokens)
        if is_sparse(config, layer):
            experts(step, x, layer)
        else:
            width = config.get("intermediate_size_mlp", config["intermediate_size"]) // rank.tp
            gate_up = step.linear("gate_up", x, 2 * width, f"gate_up {layer}")
            step.linear("down", gate_up[:, :width], hidden, f"down {layer}")
            if rank.tp > 1:
                step.send("down.all_reduce", x)
    if rank.stage < rank.pp - 1:
        step.send("stage.send", x)
    elif samples:
        logits = step.linear("head", new(samples, hidden), -(-config["vocab_size"] // rank.tp), "head")
        if rank.tp > 1:
            step.send("head.all_gather", logits, config["vocab_size"] / logits.shape[-1])
    return step.counts


def is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    if "n_routed_experts" in config:
        return bool(layer >= config["first_k_dense_replace"])
    if "interleave_moe_layer_step" in config:
        return bool((layer + 1) % config["interleave_moe_layer_step"] == 0)
    return "num_local_experts" in config or "num_experts" in config


def shared_width(config: Mapping[str, Any], width: int) -> int:
    """Channels of what every token takes beside the experts."""
    if config["model_type"] in ("llama4_text", "gemma4_text"):
        return int(config["intermediate_size"])
    return int(config.get("shared_expert_intermediate_size") or config.get("n_shared_experts", 0) * width)


@dataclass(frozen=True)
class Kind:
    """How one layer attends: heads, and what a query sees. `linears` and `products` stand before the operators' names,
    `features` are heads' worth of what the projection gives."""

    heads: int
    kv_heads: int
    dim: int
    window: int | None = None
    chunk: int | None = None
    query_parts: int = 1
    value_parts: int = 1
    linears: str = ""
    products: str = ""


def kind_of(config: Mapping[str, Any], layer: int) -> Kind:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    family = config["model_type"]
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    full = config["layer_types"][layer] == "full_attention" if "layer_types" in config else window is None
    if family == "gemma4_text":
        if not full:
            return Kind(heads, kv_heads, dim, window)
        wide, few = config["global_head_dim"], config["num_global_key_value_heads"]
        return Kind(heads, few, wide, value_parts=0, linears="global_", products="full_")
    if family == "llama4_text":
        chunk = config["attention_chunk_size"] if (layer + 1) % 4 else None
        return Kind(heads, kv_heads, dim, chunk=chunk, products=f"chunk_{chunk}_" if chunk else "")
    if family == "qwen3_5_moe_text":
        return Kind(heads, kv_heads, dim, query_parts=2)  # the gate of each head's answer beside its query
    products = f"window_{window}_" if "layer_types" in config and not full else ""
    return Kind(heads, kv_heads, dim, None if full else window, products=products)


def attention(
    step: Step, x: Tensor, rows: Rows, queries: Sequence[Sequence[int]], layer: int, decode_tokens: int
) -> None:
    config, rank = step.config, step.rank
    if config.get("layer_types", [""] * (layer + 1))[layer] == "linear_attention":
        return linear_attention(step, x, rows, layer)
    kind = kind_of(config, layer)
    dim, mine = kind.dim, len(span(kind.heads, rank.shard, rank.tp))
    # ranks that are more than the KV heads hold one each
    mine_kv = len(span(kind.kv_heads, rank.shard, rank.tp)) if rank.tp <= kind.kv_heads else 1
    projected = kind.query_parts * mine + mine_kv + kind.value_parts * mine_kv
    step.linear(f"{kind.linears}qkv", x, projected * dim, f"qkv {layer}")
    for (start, tokens), positions in zip(rows, queries):
        name = kind.products + ("decode_attention" if tokens <= decode_tokens else "prefill_attention")
        first_read = start + tokens
        with step.operator(name) as count:
            for position in positions:
                seen = position + 1
                if kind.window is not None:
                    seen = min(kind.window, seen)
                elif kind.chunk is not None:
                    seen = position % kind.chunk + 1
                keys, values = (new(mine_kv, seen, dim) for _ in range(2))
                q = new(mine_kv, mine // mine_kv, dim)
                weights = torch.bmm(q, keys.transpose(1, 2))
                torch.bmm(weights, values)
                first_read = min(first_read, position + 1 - seen)
        cached = new(2, mine_kv, start + tokens - first_read, dim, dtype=step.kv_dtype)
        count.kv_bytes += cached.nbytes
        count.activation_bytes += 2 * new(len(positions), mine, dim).nbytes
    if rank.cp > 1 and any(tokens > decode_tokens for _, tokens in rows):
        exchanged = new(2, sum(tokens for _, tokens in rows if tokens > decode_tokens), mine_kv, dim)
        step.send("kv.all_gather", exchanged)
    step.linear(f"{kind.linears}o", new(x.shape[0], mine * dim), config["hidden_size"], f"o {layer}")
    if rank.tp > 1:
        step.send(f"{kind.linears}o.all_reduce", x)


def linear_attention(step: Step, x: Tensor, rows: Rows, layer: int) -> None:
    """The gated delta rule, token by token, as transformers' torch_recurrent_gated_delta_rule computes it."""
    config, rank = step.config, step.rank
    key_heads = len(span(config["linear_num_key_heads"], rank.shard, rank.tp))
    heads = len(span(config["linear_num_value_heads"], rank.shard, rank.tp))
    key, value, kernel = (config[f"linear_{it}"] for it in ("key_head_dim", "value_head_dim", "conv_kernel_dim"))
    mixed = 2 * key_heads * key + heads * value
    step.linear("linear_in", x, mixed + heads * value, f"in {layer}")
    step.linear("linear_gates", x, 2 * heads, f"gates {layer}")
    for _, tokens in rows:
        with step.operator("linear_attention") as count:
            torch.conv1d(new(1, mixed, tokens + kernel - 1), new(mixed, 1, kernel), groups=mixed)
            for _ in range(tokens):
                state = new(heads, key, value)
                recalled = torch.bmm(new(heads, 1, key), state)
                torch.bmm(new(heads, key, 1), recalled)
                torch.bmm(new(heads, 1, key), state)
        kept = new(heads, key, value, dtype=torch.float32).nbytes + new(mixed, kernel - 1).nbytes
        count.kv_bytes += 2 * kept  # read and written
    step.linear("linear_out", new(x.shape[0], heads * value), config["hidden_size"], f"out {layer}")
    if rank.tp > 1:
        step.send("linear_out.all_reduce", x)


def latent_attention(
    step: Step, x: Tensor, rows: Rows, queries: Sequence[Sequence[int]], layer: int, decode_tokens: int
) -> None:
    """DeepSeek-V2's equations: absorbed where a row decodes, expanded where it is a prompt; with an indexer, which
    chooses other keys for each query, absorbed always."""
    config, rank = step.config, step.rank
    mine = len(span(config["num_attention_heads"], rank.shard, rank.tp))
    nope, rope, wide = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    latent, topk = config["kv_lora_rank"], config.get("index_topk")
    if config.get("q_lora_rank") is None:
        step.linear("q", x, mine * (nope + rope), f"q {layer}")
    else:
        compressed = step.linear("q_a", x, config["q_lora_rank"], f"q_a {layer}")
        step.linear("q_b", compressed, mine * (nope + rope), f"q_b {layer}")
    step.linear("kv_a", x, latent + rope, f"kv_a {layer}")
    if topk:
        indexer(step, x, rows, queries, layer)
    for (start, tokens), positions in zip(rows, queries):
        end, decodes = start + tokens, tokens <= decode_tokens
        absorbed = decodes or topk is not None
        with step.operator("kv_b") as count:
            if absorbed:
                torch.bmm(new(mine, len(positions), nope), new(mine, nope, latent))  # q into the latent
                torch.bmm(new(mine, len(positions), latent), new(mine, latent, wide))  # and the answer out of it
            else:
                new(end, latent) @ new(latent, mine * (nope + wide))
        if f"kv_b {layer}" not in step.read:
            step.read.add(f"kv_b {layer}")
            count.weight_bytes += step.stored_bytes("kv_b", mine * (nope + wide), latent)
        with step.operator("decode_attention" if decodes else "prefill_attention") as count:
            for position in positions:
                seen = min(position + 1, topk or position + 1)
                if absorbed:
                    weights = new(mine, latent + rope) @ new(latent + rope, seen)
                    weights @ new(seen, latent)
                else:
                    weights = torch.bmm(new(mine, 1, nope + rope), new(mine, nope + rope, seen))
                    torch.bmm(weights, new(mine, seen, wide))
        count.kv_bytes += new(min(end, topk or end), latent + rope, dtype=step.kv_dtype).nbytes
    step.linear("o", new(x.shape[0], mine * wide), config["hidden_size"], f"o {layer}")
    if rank.tp > 1:
        step.send("o.all_reduce", x)


def indexer(step: Step, x: Tensor, rows: Rows, queries: Sequence[Sequence[int]], layer: int) -> None:
    """DeepSeek sparse attention's: scores of every cached token for each query; keys in fp8, one scale for 128."""
    heads, dim = step.config["index_n_heads"], step.config["index_head_dim"]
    step.linear("index_q", new(x.shape[0], step.config["q_lora_rank"]), heads * dim, f"index_q {layer}")
    step.linear("index_k", x, dim, f"index_k {layer}")
    step.linear("index_weights", x, heads, f"index_weights {layer}")
    for (start, tokens), positions in zip(rows, queries):
        with step.operator("indexer") as count:
            for position in positions:
                new(heads, dim) @ new(dim, position + 1)
        keys = new(start + tokens, dim, dtype=torch.float8_e4m3fn)
        count.kv_bytes += keys.nbytes + new(start + tokens, -(-dim // 128), dtype=torch.float32).nbytes


def experts(step: Step, x: Tensor, layer: int) -> None:
    """A sparse layer: each rank computes the tokens that chose what it holds, or a part of every expert."""
    config, rank = step.config, step.rank
    count = config.get("n_routed_experts") or config.get("num_local_experts") or config["num_experts"]
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    hidden, ranks = config["hidden_size"], rank.tp * rank.dp
    number = rank.group * rank.tp + rank.shard
    step.linear("router", x, count, f"router {layer}")
    chosen = step.chosen
    assert chosen is not None
    if rank.tp == 1 and rank.dp == 1:
        held, inter = range(count), width
    elif rank.ep:
        held, inter = span(count, number, ranks), width
    else:
        held, inter = range(count), width // ranks
    for expert in held:
        tokens = int((chosen == expert).sum())
        if tokens:
            both = step.linear("expert_gate_up", new(tokens, hidden), 2 * inter, f"gate_up {layer} {expert}")
            step.linear("expert_down", both[:, :inter], hidden, f"down {layer} {expert}")
    shared = shared_width(config, width) // rank.tp
    if shared and config["model_type"] == "qwen3_5_moe_text":
        step.linear("shared_gate", x, 1, f"shared_gate {layer}")
    if shared:
        both = step.linear("shared_gate_up", x, 2 * shared, f"shared gate_up {layer}")
        step.linear("shared_down", both[:, :shared], hidden, f"shared down {layer}")
    travel(step, x, chosen, count)


def travel(step: Step, x: Tensor, chosen: Tensor, count: int) -> None:
    rank, ranks = step.rank, step.rank.tp * step.rank.dp
    if rank.transport == "all_reduce":
        if rank.tp > 1:
            step.send("expert_down.all_reduce", x)
    elif rank.transport == "all_gather":
        if rank.dp > 1:
            everyone = new(x.shape[0] * rank.dp, x.shape[1])
            step.send("dispatch.all_gather", everyone)
            step.send("combine.reduce_scatter", everyone)
        if rank.tp > 1:
            step.send("combine.all_reduce", x)
    elif ranks > 1:
        # this rank's part of its group's tokens, to every other rank that holds one of their experts
        number, first = rank.group * rank.tp + rank.shard, rank.group * x.shape[0]
        mine = [first + token for token in span(x.shape[0], rank.shard, rank.tp)]
        owner = torch.empty(count, dtype=torch.int64)
        for other in range(ranks):
            owner[list(span(count, other, ranks))] = other
        sent = sum(len(set(owner[chosen[token]].tolist()) - {number}) for token in mine)
        for name in ("dispatch.all_to_all", "combine.all_to_all"):
            step.send(name, new(sent, x.shape[1]))
        if rank.tp > 1:
            step.send("combine.all_gather", x)
