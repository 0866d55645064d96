"""A mixture of experts as its papers and checkpoints say, token by token in float64, from config.json and safetensors.

Nothing of the runtime is used. test_moe_logits.py holds it to Hugging Face transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

Round = Callable[[str, Tensor], Tensor]


def forward(folder: Path, tokens: Tensor, rounded: Round = lambda name, weight: weight) -> Tensor:
    """(T,) int64 -> (T, vocab) float64 logits.

    Args:
        rounded: what is made of each tensor, by its name, before it is used.
    """
    config = json.loads((folder / "config.json").read_text())
    model = {n: rounded(n, w).double() for n, w in load_file(folder / "model.safetensors").items()}
    eps = config["rms_norm_eps"]
    x = model["model.embed_tokens.weight"][tokens]
    for index in range(config["num_hidden_layers"]):
        name = f"model.layers.{index}."
        layer = {key.removeprefix(name): weight for key, weight in model.items() if key.startswith(name)}
        x = x + _attention(layer, _norm(x, layer["input_layernorm.weight"], eps), config)
        x = x + _mlp(layer, _norm(x, layer["post_attention_layernorm.weight"], eps), config)
    head = model.get("lm_head.weight", model["model.embed_tokens.weight"])
    return _norm(x, model["model.norm.weight"], eps) @ head.T


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def _attention(layer: Mapping[str, Tensor], x: Tensor, config: Mapping[str, Any]) -> Tensor:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    length = len(x)

    def projected(name: str, count: int) -> Tensor:
        y = x @ layer[f"self_attn.{name}_proj.weight"].T + layer.get(f"self_attn.{name}_proj.bias", 0)
        y = y.view(length, count, -1)
        norm = layer.get(f"self_attn.{name}_norm.weight")
        return y if norm is None else _norm(y, norm, config["rms_norm_eps"])

    q, k, v = projected("q", heads), projected("k", kv_heads), projected("v", kv_heads)
    half = q.shape[2] // 2
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    angles = torch.arange(length)[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    q, k = (
        torch.cat((y[..., :half] * cos - y[..., half:] * sin, y[..., half:] * cos + y[..., :half] * sin), -1)
        for y in (q, k)
    )
    k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / (2 * half) ** 0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v).reshape(length, -1)
    return out @ layer["self_attn.o_proj.weight"].T + layer.get("self_attn.o_proj.bias", 0)


def _mlp(layer: Mapping[str, Tensor], x: Tensor, config: Mapping[str, Any]) -> Tensor:
    block = "block_sparse_moe" if config["model_type"] == "mixtral" else "mlp"
    gate, up, down = ("w1", "w3", "w2") if block != "mlp" else ("gate_proj", "up_proj", "down_proj")

    def gated(module: str, row: Tensor) -> Tensor:
        inner = functional.silu(row @ layer[f"{module}.{gate}.weight"].T) * (row @ layer[f"{module}.{up}.weight"].T)
        return inner @ layer[f"{module}.{down}.weight"].T

    if f"{block}.gate.weight" not in layer:
        return gated("mlp", x)
    rows = []
    for row in x:
        probabilities = (layer[f"{block}.gate.weight"] @ row).softmax(dim=0)
        weights, chosen = probabilities.topk(config["num_experts_per_tok"])
        if block != "mlp" or config["norm_topk_prob"]:
            weights = weights / weights.sum()
        y = sum(w * gated(f"{block}.experts.{e}", row) for w, e in zip(weights, chosen.tolist()))
        if "mlp.shared_expert_gate.weight" in layer:
            y = y + (layer["mlp.shared_expert_gate.weight"] @ row).sigmoid() * gated("mlp.shared_expert", row)
        rows.append(y)
    return torch.stack(rows)
