"""Model folders with random weights of any shape, for speed tests: `write_random_model(out, **SHAPES["llama200m"])`.

What Hugging Face transformers reads (config.json, safetensors, tokenizer.json), written without it. Every tensor has
a seed of its own, made of `seed` and its name: neither the number of shards nor the order of writing changes a weight.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from .model_shape import EXPERT_NAMES, MLP_NAMES, SPARSE_FAMILIES, Experts, ModelShape
from .small_model.folder import SPECIAL_TOKENS, byte_level, json_bytes, text_files, token_ids

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# What a family's config.json says beyond the sizes; every family has no window here and no bias but Qwen2's on q, k, v.
FAMILY_CONFIG: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False, "rope_scaling": None},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "sliding_window": None},
    "qwen3": {"use_sliding_window": False, "sliding_window": None, "attention_bias": False},
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {"use_sliding_window": False, "sliding_window": None, "qkv_bias": True},
    "qwen3_moe": {"use_sliding_window": False, "sliding_window": None, "attention_bias": False},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256
WEIGHT_STD = 0.02
NORM_STD = 0.05

SHAPES: dict[str, dict[str, Any]] = {
    # 201 M parameters, GQA 16/4, untied head: the model of benchmarks/runtime_peers.py
    "llama200m": {
        "family": "llama",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    # 2.1 M parameters, most of them in the embeddings: for tests
    "llama2m": {
        "family": "llama",
        "vocab_size": 32000,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # 236 M parameters, of which a token takes 67 M: 32 experts, 4 a token, shaped as Qwen3-30B-A3B is
    "moe236m": {
        "family": "qwen3_moe",
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "experts": {
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 512,
            "norm_topk_prob": True,
        },
    },
    # 2.2 M parameters, most of them in the embeddings: for tests
    "moe2m": {
        "family": "qwen2_moe",
        "vocab_size": 32000,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "experts": {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
    },
}


class BadRandomModel(ValueError):
    """A random model that cannot be written as asked."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {self.found!r:.60}; allowed: {self.allowed}; {self.todo}"


@dataclass(frozen=True)
class _Request:
    """A checked request: sizes under the names of config.json, all given."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    dtype: torch.dtype
    seed: int
    experts: Mapping[str, Any]

    def config(self) -> dict[str, Any]:
        return {
            "architectures": [ARCHITECTURES[self.family]],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": WEIGHT_STD,
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "use_cache": True,
            **token_ids(),
            **FAMILY_CONFIG[self.family],
            **self.experts,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by its Hugging Face name, in the order of the forward pass."""
        hidden, wide = self.hidden_size, self.num_attention_heads * self.head_dim
        narrow = self.num_key_value_heads * self.head_dim
        sparse = ModelShape.from_config(self.config()).experts
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for index in range(self.num_hidden_layers):
            layer = f"model.layers.{index}"
            shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
            for name, rows in (("q_proj", wide), ("k_proj", narrow), ("v_proj", narrow)):
                shapes[f"{layer}.self_attn.{name}.weight"] = (rows, hidden)
                if self.family in ("qwen2", "qwen2_moe"):
                    shapes[f"{layer}.self_attn.{name}.bias"] = (rows,)
            if self.family in ("qwen3", "qwen3_moe"):
                shapes[f"{layer}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{layer}.self_attn.k_norm.weight"] = (self.head_dim,)
            shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, wide)
            shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
            if sparse is not None and index in sparse.layers:
                shapes |= _expert_tensors(sparse, layer, self.family, hidden)
            else:
                shapes |= _mlp_tensors(f"{layer}.mlp", MLP_NAMES, self.intermediate_size, hidden)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def draw(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """N(0, WEIGHT_STD) for matrices and biases, 1 + N(0, NORM_STD) for norms; drawn in fp32, then rounded."""
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        noise = torch.randn(shape, generator=generator)
        drawn = 1 + NORM_STD * noise if name.endswith("norm.weight") else WEIGHT_STD * noise
        return drawn.to(self.dtype)


def _mlp_tensors(
    module: str, names: tuple[str, str, str], intermediate_size: int, hidden: int
) -> dict[str, tuple[int, ...]]:
    gate, up, down = (f"{module}.{name}.weight" for name in names)
    return {gate: (intermediate_size, hidden), up: (intermediate_size, hidden), down: (hidden, intermediate_size)}


def _expert_tensors(sparse: Experts, layer: str, family: str, hidden: int) -> dict[str, tuple[int, ...]]:
    module, names = EXPERT_NAMES[family]
    block = f"{layer}.{module}"
    shapes: dict[str, tuple[int, ...]] = {f"{block}.gate.weight": (sparse.num_experts, hidden)}
    for expert in range(sparse.num_experts):
        shapes |= _mlp_tensors(f"{block}.experts.{expert}", names, sparse.intermediate_size, hidden)
    if sparse.shared_intermediate_size:
        shapes |= _mlp_tensors(f"{block}.shared_expert", MLP_NAMES, sparse.shared_intermediate_size, hidden)
        shapes[f"{block}.shared_expert_gate.weight"] = (1, hidden)
    return shapes


def write_random_model(
    out_dir: str | os.PathLike[str],
    *,
    family: str = "llama",
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int | None = None,
    tie_word_embeddings: bool = False,
    max_position_embeddings: int = 4096,
    rope_theta: float = 10000.0,
    rms_norm_eps: float = 1e-5,
    dtype: torch.dtype | str = "bfloat16",
    seed: int = 0,
    shards: int = 1,
    experts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model folder with random weights; it appears whole or not at all.

    Args:
        out_dir: must not exist yet, or be empty.
        family: "llama", "mistral", "qwen2" (biases on q, k, v), "qwen3" (norms on q and k per head), or a mixture of
            experts: "mixtral", "qwen2_moe", "qwen3_moe".
        vocab_size: from 259 (3 special tokens and 256 bytes) on, tokenizer.json has exactly so many entries; below, the
            folder has no tokenizer and takes token ids only.
        head_dim: default hidden_size // num_attention_heads.
        dtype: "float32", "bfloat16" or "float16", or the torch dtype.
        seed: of every weight; the same weights whatever `shards` is.
        shards: safetensors files, of about equal size; more than one come with an index.
        experts: of a mixture what config.json says of them, by its names ("num_experts", "moe_intermediate_size", ...);
            left out: what transformers takes where it is silent.
    Returns: `out_dir` as a Path.
    Raises: BadRandomModel: sizes that make no model, or an `out_dir` with something in it; BadModel: such experts.
    """
    out = Path(out_dir)
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "max_position_embeddings": max_position_embeddings,
        "shards": shards,
    }
    for name, size in sizes.items():
        if size < 1:
            raise BadRandomModel(name, size, "an integer >= 1", "give a larger one")
    if vocab_size < len(SPECIAL_TOKENS):
        raise BadRandomModel("vocab_size", vocab_size, "room for <pad>, <s>, </s>", "give at least 3")
    if family not in ARCHITECTURES:
        raise BadRandomModel("family", family, ", ".join(ARCHITECTURES), "choose one of these")
    if experts and family not in SPARSE_FAMILIES:
        raise BadRandomModel("experts", dict(experts), f"none, as {family} is dense", "leave it out")
    if str(dtype).removeprefix("torch.") not in DTYPES:
        raise BadRandomModel("dtype", dtype, ", ".join(DTYPES), "choose one of these")
    if num_attention_heads % num_key_value_heads:
        todo = f"num_attention_heads is {num_attention_heads}: give a divisor of it"
        raise BadRandomModel("num_key_value_heads", num_key_value_heads, "a divisor of num_attention_heads", todo)
    if head_dim is None and hidden_size % num_attention_heads:
        todo = f"hidden_size is {hidden_size}: give a divisor of it, or head_dim"
        raise BadRandomModel("num_attention_heads", num_attention_heads, "a divisor of hidden_size", todo)
    head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
    if head_dim < 2 or head_dim % 2:
        raise BadRandomModel("head_dim", head_dim, "an even number >= 2 (rotary pairs)", "give head_dim")
    request = _Request(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        tie_word_embeddings=tie_word_embeddings,
        max_position_embeddings=max_position_embeddings,
        rope_theta=rope_theta,
        rms_norm_eps=rms_norm_eps,
        dtype=DTYPES[str(dtype).removeprefix("torch.")],
        seed=seed,
        experts=experts or {},
    )
    if shards > len(request.tensors()):
        todo = "give fewer shards"
        raise BadRandomModel("shards", shards, f"at most {len(request.tensors())}, the number of tensors", todo)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadRandomModel(str(out), "something there already", "a new or empty folder", "choose another")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        _write(request, aside, shards)
        aside.chmod(0o755)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def _write(request: _Request, folder: Path, shards: int) -> None:
    (folder / "config.json").write_bytes(json_bytes(request.config()))
    if request.vocab_size >= SMALLEST_VOCABULARY:
        for name, content in text_files(_tokenizer(request.vocab_size), request.max_position_embeddings).items():
            (folder / name).write_bytes(content)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, names in enumerate(_cut(request.tensors(), shards), start=1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"
        tensors = {name: request.draw(name, shape) for name, shape in names.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if shards > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_bytes(json_bytes(index))


def _cut(tensors: dict[str, tuple[int, ...]], shards: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """`tensors` in `shards` consecutive parts, none empty, each closed once it holds its share of the elements left."""
    remaining = list(tensors.items())
    for left in range(shards, 0, -1):
        share = sum(torch.Size(shape).numel() for _, shape in remaining) / left
        part: dict[str, tuple[int, ...]] = {}
        taken = 0
        while remaining and (not part or left == 1 or (taken < share and len(remaining) >= left)):
            name, shape = remaining.pop(0)
            part[name] = shape
            taken += torch.Size(shape).numel()
        yield part


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Special tokens, the 256 bytes, then all pairs of bytes, all triples and so on, until there are `vocab_size`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*SPECIAL_TOKENS, *alphabet]
    merges = list(itertools.islice(_merges(alphabet), vocab_size - len(entries)))
    entries += [left + right for left, right in merges]
    tokenizer = byte_level(models.BPE(vocab={entry: index for index, entry in enumerate(entries)}, merges=merges))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _merges(alphabet: list[str]) -> Iterator[tuple[str, str]]:
    """Each longer entry is a shorter one and one byte more, so every merge builds on entries that stand before it."""
    for length in itertools.count(1):
        for letters in itertools.product(alphabet, repeat=length):
            for last in alphabet:
                yield "".join(letters), last
