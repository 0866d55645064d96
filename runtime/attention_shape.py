"""What attention of a layer is made of: kinds beside the one that all layers of a Llama have alike. No tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """Softmax attention over cached keys and values, as some layers have it.

    layers           that have it, by number
    window           tokens that a query sees at most, its own included; None: all before it
    chunk            queries see the tokens of their own chunk of so many only (Llama 4); None: there are no chunks
    output_gate      the query projection gives a gate beside each query, which its answer is multiplied with (Qwen3.5)
    keys_are_values  values come from the key projection, there is none of their own; both are cached (Gemma 4)
    """

    layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    chunk: int | None = None
    output_gate: bool = False
    keys_are_values: bool = False


@dataclass(frozen=True)
class Indexer:
    """The indexer of DeepSeek sparse attention (DeepSeek-V3.2): a small attention that chooses, for each query, the
    `topk` cached tokens which it may attend to. It caches one key of head_dim for each token and layer."""

    num_heads: int
    head_dim: int
    topk: int


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention, MLA (DeepSeek-V2, arXiv:2405.04434, 2.1): keys and values of all heads are expanded
    from one latent vector of kv_lora_rank, which is cached with one rotary key of qk_rope_head_dim for all heads.

    q_lora_rank  of the compressed queries; None: they are not compressed
    indexer      that chooses the tokens attended to; None: all
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    indexer: Indexer | None = None

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cached_dim(self) -> int:
        """Numbers that one token of context caches in one layer, the indexer's key left out."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class LinearAttention:
    """Gated delta rule (Yang et al., arXiv:2412.06464), as Qwen3-Next and Qwen3.5 have it: each value head keeps a
    matrix of key_head_dim x value_head_dim, in fp32, instead of a cache that grows.

    layers            that have it, by number; the others attend
    conv_kernel_size  of the causal convolution over q, k and v, whose last inputs are kept, too
    """

    layers: tuple[int, ...]
    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel_size: int

    @property
    def conv_features(self) -> int:
        return 2 * self.num_key_heads * self.key_head_dim + self.num_value_heads * self.value_head_dim

    @property
    def value_features(self) -> int:
        return self.num_value_heads * self.value_head_dim

    def state_bytes(self, itemsize: int = 2) -> int:
        """Of one request in one layer: the matrices in fp32, and the convolution's inputs."""
        matrices = 4 * self.num_value_heads * self.key_head_dim * self.value_head_dim
        return matrices + itemsize * self.conv_features * (self.conv_kernel_size - 1)
