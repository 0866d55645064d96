"""Parts of a model that its shape is put together from: rotary embedding and experts. No tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv:2104.09864) and how its frequencies are stretched.

    linear: all frequencies / factor (Chen et al., arXiv:2306.15595). llama3: low frequencies / factor, high ones as
    they are, those between interpolated (Llama 3.1's `rope_scaling`; what is low is measured against
    original_max_position_embeddings).
    """

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Experts:
    """The sparse MLP of a mixture of experts (Shazeer et al., arXiv:1701.06538): a router takes each token to a few
    experts, each a gated MLP of its own, and adds up their answers by its probabilities.

    num_experts               that the router chooses among
    num_local_experts         of them held: all, except in the shape that one rank of several holds
    experts_per_token         of highest probability, whose answers are added up
    intermediate_size         of each expert
    renormalize               the probabilities of the chosen are divided by their sum
    shared_intermediate_size  of an expert beside them that every token takes; 0: there is none
    layers                    with experts, by number; the others are dense
    shared_gated              a sigmoid weights the shared expert's answer (Qwen2-MoE); it is added as it is otherwise
    router_bias               the router has one number more for each expert
    expert_bias               gate, up and down of each expert have biases (gpt-oss)
    router_scales             the router scales what it reads, and each expert's answer (Gemma 4)
    """

    num_experts: int
    num_local_experts: int
    experts_per_token: int
    intermediate_size: int
    renormalize: bool
    shared_intermediate_size: int
    layers: tuple[int, ...]
    shared_gated: bool = True
    router_bias: bool = False
    expert_bias: bool = False
    router_scales: bool = False
