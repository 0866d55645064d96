"""Mixtures of experts on an NVIDIA GPU: what `moe.py` does, for experts whose weights lie there.

The experts of a layer are stacked, and two launches of the kernel in triton_moe.py multiply them all. Nothing waits for
the GPU, so that a CUDA graph can hold it. Imported only where it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .gpu_linear import default_tile
from .linear import PackedLinear

if TYPE_CHECKING:
    from .moe import PackedExperts, Routing

PRECISIONS = ("fp32", "bf16", "fp16")


def stacked(experts: Sequence[PackedLinear]) -> tuple[Tensor, tuple[PackedLinear, ...]]:
    """Their weights (experts, out, in), and the same experts with views of it; both layouts exist for a moment.

    Raises ValueError: another precision than PRECISIONS.
    """
    if experts[0].precision not in PRECISIONS:
        raise ValueError(f"moe: experts in {experts[0].precision} on a GPU, not {', '.join(PRECISIONS)}")
    whole = torch.stack([each.weight for each in experts if each.weight is not None])
    return whole, tuple(replace(each, weight=weight) for each, weight in zip(experts, whole.unbind()))


def moe(x: Tensor, routing: Routing, packed: PackedExperts) -> Tensor:
    """As kernels/moe.py, in the dtype of x, which is that of the weights.

    The tile is that of the experts' rows if all have alike; one for another backend means the default one here.
    """
    from . import triton_moe

    assert packed.stacks is not None
    gate_up, down = packed.stacks
    if not len(x):
        return torch.zeros_like(x)
    rows = -(-routing.experts.numel() // len(packed.gate_up))
    tile = packed.gate_up[0].tiles[(rows - 1).bit_length()]
    tile = tile if tile.backend == "triton" else default_tile(packed.gate_up[0].precision, rows, "triton")
    return triton_moe.moe(x, routing, gate_up, down, tile, first=packed.first)
