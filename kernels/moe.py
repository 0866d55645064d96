"""Mixtures of experts: which experts a token goes to, and the sum of their gated MLPs.

The router's logits become probabilities (softmax, fp32); the k largest choose the experts, of equal ones the lower, and
are their weights, divided by their sum where the model was trained so. The rows of a step are then sorted by expert
(counting sort), each expert with rows multiplies its own, and every token adds up what its experts answered, the most
probable first. The experts' products are those of linear.py, in any of its precisions, in one call from Python.

Experts that are not held here add nothing: ranks that divide them among themselves add up their results.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import placement
from .cpu.build import load
from .cpu.workspace import WORKSPACE
from .fused import swiglu
from .linear import PackedLinear, descriptors, linear, retile
from .tiles import TileTable


class Routing(NamedTuple):
    """Where the tokens go: experts (T, k) int32, the most probable first, and their weights (T, k) fp32."""

    experts: Tensor
    weights: Tensor


def reference_route(logits: Tensor, k: int, renormalize: bool) -> Routing:
    """The oracle, in float64: logits (T, experts)."""
    logits = logits.double()
    chosen = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    weights = logits.softmax(dim=1).gather(1, chosen)
    return Routing(chosen.int(), weights / weights.sum(dim=1, keepdim=True) if renormalize else weights)


def reference(x: Tensor, routing: Routing, gate_up: Sequence[Tensor], down: Sequence[Tensor]) -> Tensor:
    """x (T, hidden) through the experts that `routing` chose, in float64: the oracle.

    Args:
        gate_up, down: of every expert (2 * inter, hidden), gate first, and (hidden, inter).
    """
    x = x.double()
    rows = []
    for row, chosen, weights in zip(x, routing.experts.tolist(), routing.weights.double()):
        answers = []
        for expert in chosen:
            gate, up = functional.linear(row, gate_up[expert].double()).chunk(2)
            answers.append(functional.linear(functional.silu(gate) * up, down[expert].double()))
        rows.append(weights @ torch.stack(answers))
    return torch.stack(rows) if rows else x.new_zeros(x.shape)


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """Experts `first`, `first + 1`, ... of a layer; immutable. `pack_experts` makes it.

    stacks  on a GPU: the weights of all of them, of gate_up and of down, (experts, out, in); theirs are views of these
    """

    first: int
    gate_up: tuple[PackedLinear, ...]
    down: tuple[PackedLinear, ...]
    stacks: tuple[Tensor, Tensor] | None
    _descriptors: ctypes.Array[Any] | None = field(repr=False)
    _tiles: Tensor | None = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of their weights in memory."""
        return sum(packed.nbytes for packed in (*self.gate_up, *self.down))


def pack_experts(gate_up: Sequence[PackedLinear], down: Sequence[PackedLinear], first: int = 0) -> PackedExperts:
    """Experts of one size, precision and tile table, at least one.

    One call computes them all where every tile is the C++ one; where some are torch's, each expert is called by itself.
    Raises ValueError: on a GPU, a precision other than fp32, bf16 and fp16.
    """
    weight = gate_up[0].weight
    if weight is not None and placement.on_gpu(weight):
        from . import gpu_moe

        (first_stack, first_layer), (last_stack, last_layer) = gpu_moe.stacked(gate_up), gpu_moe.stacked(down)
        return PackedExperts(first, first_layer, last_layer, (first_stack, last_stack), None, None)
    tiles = gate_up[0].tiles
    if any(tile.backend != "cpp" for tile in (*tiles, *down[0].tiles)):
        return PackedExperts(first, tuple(gate_up), tuple(down), None, None, None)
    numbers = torch.tensor([tile.arguments for tile in tiles], dtype=torch.int32)
    pairs = [packed for pair in zip(gate_up, down, strict=True) for packed in pair]
    return PackedExperts(first, tuple(gate_up), tuple(down), None, descriptors(pairs), numbers)


def retile_experts(packed: PackedExperts, tiles: TileTable) -> PackedExperts:
    """The same weights, computed with other tiles. Raises BadTile: a layout that is not there."""
    gate_up, down = (tuple(retile(each, tiles) for each in part) for part in (packed.gate_up, packed.down))
    if packed.stacks is not None:
        return replace(packed, gate_up=gate_up, down=down)
    return pack_experts(gate_up, down, packed.first)


def route(logits: Tensor, k: int, renormalize: bool) -> Routing:
    """The experts of each token, by the router's logits.

    Args:
        logits: (T, experts) fp32, rows contiguous. NaN makes all weights of its row NaN.
        k: experts of a token, at most all of them.
        renormalize: the weights of the chosen are divided by their sum.
    Weights within 1e-6 of reference_route(). Raises ValueError: another dtype or shape, or more than there are.
    """
    if logits.ndim != 2 or logits.dtype != torch.float32 or not 1 <= k <= logits.shape[1]:
        raise ValueError(f"route: {k} experts of logits {tuple(logits.shape)} {logits.dtype}")
    library = None if placement.on_gpu(logits) else load()
    if library is None:
        chosen = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
        weights = logits.softmax(dim=1).gather(1, chosen)
        return Routing(chosen.int(), weights / weights.sum(dim=1, keepdim=True) if renormalize else weights)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, experts = logits.shape
    routing = Routing(torch.empty((rows, k), dtype=torch.int32), torch.empty((rows, k)))
    library.route(
        logits.data_ptr(), logits.stride(0), rows, experts, k, renormalize, routing.experts.data_ptr(),
        routing.weights.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return routing


def moe(x: Tensor, routing: Routing, packed: PackedExperts) -> Tensor:
    """Sum over each token's experts of weight * down(silu(gate(x)) * up(x)); x (T, hidden) fp32 -> (T, hidden) fp32.

    Experts that are not in `packed` add nothing. Within 1e-5 (fp32), 2e-2 (bf16) of reference() relative to the largest
    output for N(0, 1) inputs. On a GPU x is fp32, bf16 or fp16, as the weights are, and so is the result.
    Raises ValueError: x or the routing has another shape or dtype.
    """
    if packed.stacks is not None:
        from . import gpu_moe

        return gpu_moe.moe(x, routing, packed)
    rows, hidden = x.shape
    k = routing.experts.shape[1]
    if hidden != packed.gate_up[0].in_features or x.dtype != torch.float32:
        raise ValueError(f"moe: x is {tuple(x.shape)} {x.dtype}, not (T, {packed.gate_up[0].in_features}) float32")
    if routing.experts.shape != (rows, k) or routing.weights.shape != (rows, k):
        found = f"{tuple(routing.experts.shape)} experts and {tuple(routing.weights.shape)} weights"
        raise ValueError(f"moe: {found} of {rows} tokens")
    library = load()
    if packed._descriptors is None or packed._tiles is None or library is None:
        return _expert_by_expert(x, routing, packed)
    if x.stride(1) != 1:
        x = x.contiguous()
    chosen, weights = routing.experts.contiguous(), routing.weights.contiguous()
    out = torch.empty((rows, hidden))
    arguments = (
        ctypes.addressof(packed._descriptors), packed.first, len(packed.gate_up), x.data_ptr(), x.stride(0), rows,
        chosen.data_ptr(), weights.data_ptr(), k, out.data_ptr(), packed._tiles.data_ptr(),
    )  # fmt: skip
    threads = torch.get_num_threads()
    while needed := library.experts(*arguments, WORKSPACE.address, WORKSPACE.nbytes, threads):
        WORKSPACE.grow(needed)
    return out


def _expert_by_expert(x: Tensor, routing: Routing, packed: PackedExperts) -> Tensor:
    answers = x.new_zeros((*routing.experts.shape, x.shape[1]))
    held = torch.zeros(routing.experts.shape, dtype=torch.bool)
    for expert, (gate_up, down) in enumerate(zip(packed.gate_up, packed.down), start=packed.first):
        token, place = (routing.experts == expert).nonzero(as_tuple=True)
        if len(token):
            answers[token, place] = linear(swiglu(linear(x[token], gate_up)), down)
            held[token, place] = True
    return (answers * routing.weights.where(held, 0.0)[:, :, None]).sum(dim=1)
