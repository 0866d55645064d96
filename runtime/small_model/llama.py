"""The small model as plain PyTorch: a Llama whose `state_dict` has Hugging Face's names, and its loss on text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .folder import token_ids


@dataclass(frozen=True)
class Shape:
    """Sizes of the Llama, under the names of Hugging Face's config.json."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def config(self) -> dict[str, Any]:
        """config.json as transformers' LlamaForCausalLM reads it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_scaling": None,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            **token_ids(),
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions in the two-halves layout of Hugging Face."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        wide, narrow = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, wide, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(wide, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, future: Tensor) -> Tensor:
        """x: (batch, length, hidden_size); cos, sin: (length, head_dim); future: (length, length), -inf where j > i."""
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        # Written out: torch's fused attention makes a step 1.25x slower (4 x 512 tokens, bf16, one AVX-512 core).
        scores = torch.matmul(q * self.shape.head_dim**-0.5, k.transpose(-1, -2)) + future.to(q.dtype)
        mixed = torch.matmul(scores.softmax(-1, dtype=q.dtype), v)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length, hidden_size)."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = Mlp(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, future: Tensor) -> Tensor:
        """x: (batch, length, hidden_size); cos, sin: (length, head_dim); future: (length, length), -inf where j > i."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, future)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Embedding, layers and final norm; apart from Llama because Hugging Face names these tensors `model.…`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)


class Llama(nn.Module):
    """Llama with tied embeddings; `state_dict` has Hugging Face's names."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        # Output projections start smaller by sqrt(2 layers): the residual stream keeps its size (GPT-2, section 2.3).
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.num_hidden_layers) if last else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (batch, length) int64; returns logits (batch, length, vocab_size)."""
        cos, sin = _rotary(self.shape, tokens.shape[1])
        future = torch.full((tokens.shape[1], tokens.shape[1]), -math.inf).triu(1)
        x: Tensor = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin, future)
        return functional.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean negative log-likelihood (nats a token) of each row's tokens after its first; tokens: (batch, length)."""
        logits = self(tokens)[:, :-1].float()
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


def _rotary(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (batch, heads, length, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


def rows(token_ids: Sequence[int], length: int) -> Tensor:
    """(n // length, length) int64: the stream in consecutive rows, what does not fill the last one left out."""
    whole = len(token_ids) // length * length
    return torch.tensor(token_ids[:whole], dtype=torch.int64).view(-1, length)


@torch.no_grad()
def mean_loss(model: Llama, tokens: Tensor, batch: int) -> float:
    """Nats a token over (rows, length) `tokens`, each row on its own; exp of it is the perplexity."""
    model.eval()
    total = sum(model.loss(part).item() * len(part) for part in torch.split(tokens, batch))
    model.train()
    return total / len(tokens)
