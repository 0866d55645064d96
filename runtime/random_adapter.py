"""LoRA adapters with random weights, for tests and benchmarks: what PEFT's `save_pretrained` writes, without it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .model_shape import ModelShape
from .small_model.folder import json_bytes

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def write_random_adapter(
    out_dir: str | os.PathLike[str],
    shape: ModelShape,
    *,
    rank: int,
    alpha: float | None = None,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    rank_pattern: Mapping[str, int] | None = None,
    std: float = 0.02,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors for a base of this shape.

    Args:
        out_dir: made if it is not there; an adapter in it is replaced.
        alpha: left out: 2 x rank.
        rank_pattern: ranks of modules by their last name, as PEFT's field.
        std: of every value of A and B.
        seed: of every tensor, together with its name.
        config: further fields of adapter_config.json.
    Returns: `out_dir` as a Path.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    wide, narrow = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    hidden, inter = shape.hidden_size, shape.intermediate_size
    sizes = {
        "q_proj": (hidden, wide), "k_proj": (hidden, narrow), "v_proj": (hidden, narrow), "o_proj": (wide, hidden),
        "gate_proj": (hidden, inter), "up_proj": (hidden, inter), "down_proj": (inter, hidden),
    }  # fmt: skip
    tensors = {}
    for layer in range(shape.num_layers):
        for module in target_modules:
            block = "self_attn" if module in ATTENTION else "mlp"
            r = (rank_pattern or {}).get(module, rank)
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            tensors[f"{name}.lora_A.weight"] = _draw(f"{name}.A", (r, sizes[module][0]), std, seed).to(dtype)
            tensors[f"{name}.lora_B.weight"] = _draw(f"{name}.B", (sizes[module][1], r), std, seed).to(dtype)
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "target_modules": list(target_modules),
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": {},
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **config,
    }
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_bytes(json_bytes(written))
    return out


def _draw(name: str, shape: tuple[int, int], std: float, seed: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return std * torch.randn(shape, generator=generator)
