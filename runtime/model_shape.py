"""What a model is made of, read from a Hugging Face `config.json`: sizes, rotary embedding, biases, bytes. No tensors.

Decoders of the Llama family: Llama, Mistral, Qwen2 and Qwen3, also those trained ternary, and the mixtures of experts
Mixtral, Qwen2-MoE and Qwen3-MoE. What this code does not compute (another activation, another rotary scaling, other
quantized checkpoints) is refused by name rather than left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..kernels.weight_formats import WEIGHT_FORMATS
from .small_model import MODEL_DIR, TERNARY_MODEL_DIR
from .spec import SMALL_MODEL, SMALL_TERNARY_MODEL

SPARSE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", *SPARSE_FAMILIES)
# Tensor names: of a gated MLP, and of a sparse layer the module and its experts' gate, up and down.
MLP_NAMES = ("gate_proj", "up_proj", "down_proj")
EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen2_moe": ("mlp", MLP_NAMES),
    "qwen3_moe": ("mlp", MLP_NAMES),
}
KV_SCALE_BYTES = {"int8": 4}  # beside each token's keys, and values, of a KV head: kernels/paged_cache.py
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}

# What transformers takes where config.json is silent (its configuration classes, version 5.17).
_DEFAULT_HEAD_DIM = {"qwen3": 128}
_DEFAULT_SLIDING_WINDOW = {"mistral": 4096}
_DEFAULT_RMS_NORM_EPS = {"mixtral": 1e-5}
_DEFAULT_ROPE_THETA = {"mixtral": 1000000.0}
_DEFAULT_EXPERTS = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen3_moe": {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
}  # fmt: skip


class BadModel(Exception):
    """A model directory that cannot be served: where (file, field or tensor), what was found, what is allowed."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:120]}; allowed: {self.allowed}; {self.todo}"


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
    shared_intermediate_size  of an expert beside them that every token takes, weighted by a sigmoid; 0: there is none
    layers                    with experts, by number; the others are dense
    """

    num_experts: int
    num_local_experts: int
    experts_per_token: int
    intermediate_size: int
    renormalize: bool
    shared_intermediate_size: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one decoder.

    intermediate_size  of the dense layers' MLP
    sliding_window  tokens of context a layer sees, None = all of them; contexts up to it are computed exactly
    eos_token_ids   tokens that end an answer
    ternary         how a checkpoint that was trained ternary keeps the matrices of its layers, in the words of
                    transformers' BitNetConfig: "bitlinear" (packed, with the reciprocal of the scale), "autobitlinear"
                    (packed, with the scale) or "online" (floats, to be rounded); None: it was not
    experts         of a mixture of experts; None: every layer is dense
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    ternary: Literal["bitlinear", "autobitlinear", "online"] | None = None
    experts: Experts | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "config.json") -> ModelShape:
        """From the content of a config.json. Raises: BadModel, naming the field."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise BadModel(f"{name}: model_type", family, ", ".join(FAMILIES), "serve a model of these families")
        if config.get("hidden_act", "silu") != "silu":
            raise BadModel(f"{name}: hidden_act", config["hidden_act"], "silu", "serve a model with this activation")
        if config.get("partial_rotary_factor", 1.0) != 1.0:
            raise BadModel(
                f"{name}: partial_rotary_factor", config["partial_rotary_factor"], "1", "serve another model"
            )
        heads = _size(config, "num_attention_heads", name)
        hidden = _size(config, "hidden_size", name)
        kv_heads = _size(config, "num_key_value_heads", name, heads)
        head_dim = _size(config, "head_dim", name, _DEFAULT_HEAD_DIM.get(family, hidden // heads))
        if heads % kv_heads:
            raise BadModel(
                f"{name}: num_key_value_heads", kv_heads, f"a divisor of {heads} heads", "correct the config"
            )
        if head_dim % 2:
            raise BadModel(f"{name}: head_dim", head_dim, "an even number (rotary pairs)", "correct the config")
        attention_bias = bool(config.get("attention_bias", False)) and family in ("llama", "qwen3", "qwen3_moe")
        qkv_bias = attention_bias or family == "qwen2" or (family == "qwen2_moe" and bool(config.get("qkv_bias", True)))
        positions = _size(config, "max_position_embeddings", name)
        if family in SPARSE_FAMILIES and config.get("quantization_config"):
            found, allowed = config["quantization_config"], "none: a mixture of experts in fp32, bf16 or fp16"
            raise BadModel(f"{name}: quantization_config", found, allowed, "use the original model")
        layers = _size(config, "num_hidden_layers", name)
        return cls(
            family=family,
            vocab_size=_size(config, "vocab_size", name),
            hidden_size=hidden,
            intermediate_size=_size(config, "intermediate_size", name),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=positions,
            rms_norm_eps=float(config.get("rms_norm_eps", _DEFAULT_RMS_NORM_EPS.get(family, 1e-6))),
            rope=_rope(config, name, _DEFAULT_ROPE_THETA.get(family, 10000.0)),
            qkv_bias=qkv_bias,
            o_bias=attention_bias,
            mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=family in ("qwen3", "qwen3_moe"),
            sliding_window=_sliding_window(config, family, positions),
            eos_token_ids=_token_ids(config.get("eos_token_id"), f"{name}: eos_token_id"),
            ternary=_ternary(config.get("quantization_config"), f"{name}: quantization_config"),
            experts=_experts(config, family, layers, name) if family in SPARSE_FAMILIES else None,
        )

    @classmethod
    def load(cls, model_dir: str | Path) -> ModelShape:
        """From a model directory; `generation_config.json`, where there is one, has the last word on eos_token_id.

        Raises: BadModel: no config.json, not JSON, or a model that is not supported.
        """
        folder = Path(model_dir)
        config = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        if generation.is_file():
            eos = read_json(generation).get("eos_token_id")
            if eos is not None:
                config = {**config, "eos_token_id": eos}
        return cls.from_config(config, str(folder / "config.json"))

    @property
    def qkv_features(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def matrices(self) -> tuple[tuple[str, int, int, int], ...]:
        """Every kind of weight matrix that a token is multiplied with: (name, out_features, in_features, how many)."""
        hidden, layers, experts = self.hidden_size, self.num_layers, self.experts
        dense = layers - (len(experts.layers) if experts else 0)
        found = [
            ("qkv", self.qkv_features, hidden, layers),
            ("o", hidden, self.num_heads * self.head_dim, layers),
            ("gate_up", 2 * self.intermediate_size, hidden, dense),
            ("down", hidden, self.intermediate_size, dense),
        ]
        if experts:
            sparse, inter, shared = len(experts.layers), experts.intermediate_size, experts.shared_intermediate_size
            found += [
                ("router", experts.num_experts, hidden, sparse),
                ("expert_gate_up", 2 * inter, hidden, sparse * experts.num_local_experts),
                ("expert_down", hidden, inter, sparse * experts.num_local_experts),
                ("shared_gate", 1, hidden, sparse if shared else 0),
                ("shared_gate_up", 2 * shared, hidden, sparse if shared else 0),
                ("shared_down", hidden, shared, sparse if shared else 0),
            ]
        found.append(("head", self.vocab_size, hidden, 1))
        return tuple(matrix for matrix in found if matrix[3])

    def num_parameters(self) -> int:
        """Parameters of the checkpoint; a tied head counts once."""
        matrices = sum(out * into * count for _, out, into, count in self.matrices())
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return matrices + embedding + self._vector_parameters()

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of keys and values that one token of context holds, all layers together, scales with them."""
        head = self.head_dim * DTYPE_BYTES[dtype] + KV_SCALE_BYTES.get(dtype, 0)
        return 2 * self.num_layers * self.num_kv_heads * head

    def embedding_bytes(self, dtype: str) -> int:
        """Bytes of the embedding table: fp32 where the weights are fp32, else bf16; rows are looked up only."""
        return self.vocab_size * self.hidden_size * (4 if dtype == "fp32" else 2)

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of the weights that a step reads, the head with them and the embedding table without.

        Scales are counted, the padding of the last panel of output channels is not; norms and biases are fp32.
        """
        matrices = sum(
            count * WEIGHT_FORMATS[matrix_dtype(name, dtype)].nbytes(out, into)
            for name, out, into, count in self.matrices()
        )
        return matrices + 4 * self._vector_parameters()

    def _vector_parameters(self) -> int:
        per_layer = 2 * self.hidden_size
        per_layer += 2 * self.head_dim if self.qk_norm else 0
        per_layer += self.qkv_features if self.qkv_bias else 0
        per_layer += self.hidden_size if self.o_bias else 0
        per_layer += 2 * self.intermediate_size + self.hidden_size if self.mlp_bias else 0
        return self.num_layers * per_layer + self.hidden_size


def matrix_dtype(name: str, weight_dtype: str) -> str:
    """How a matrix of `ModelShape.matrices` is stored: as the weights, but the head of a ternary model is bf16.

    The router and the shared expert's gate stay fp32: they are small, and a rounded router takes tokens elsewhere.
    """
    if name in ("router", "shared_gate"):
        return "fp32"
    return "bf16" if weight_dtype == "ternary" and name == "head" else weight_dtype


def resolve_model(model: str) -> Path:
    """The directory of a deployment's model: "paretune/small" and its ternary twin ship with the package.

    Raises: BadModel: no such directory, or one without config.json.
    """
    folder = {SMALL_MODEL: MODEL_DIR, SMALL_TERNARY_MODEL: TERNARY_MODEL_DIR}.get(model) or Path(model)
    if not folder.is_dir():
        todo = "download the model first and give the path of its directory"
        raise BadModel(
            f"model {model!r}", "no such directory", f"a directory, {SMALL_MODEL!r} or {SMALL_TERNARY_MODEL!r}", todo
        )
    if not (folder / "config.json").is_file():
        todo = "give the directory that Hugging Face's save_pretrained wrote"
        raise BadModel(str(folder / "config.json"), "no such file", "config.json beside the safetensors", todo)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model directory. Raises: BadModel."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise BadModel(str(path), error.strerror or error, "a readable file", "copy the model again") from None
    except ValueError as error:
        raise BadModel(str(path), f"no JSON ({error})", "a JSON object", "copy the model again") from None
    if not isinstance(content, dict):
        raise BadModel(str(path), type(content).__name__, "a JSON object", "copy the model again")
    return content


def _size(config: Mapping[str, Any], field: str, name: str, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadModel(f"{name}: {field}", value, "an integer >= 1", "correct the config")
    return value


def _token_ids(value: Any, where: str) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise BadModel(where, value, "a token id, or a list of them", "correct the config")
    return ids


def _sliding_window(config: Mapping[str, Any], family: str, positions: int) -> int | None:
    window = config.get("sliding_window", _DEFAULT_SLIDING_WINDOW.get(family))
    if family.startswith("qwen") and not config.get("use_sliding_window", False):
        window = None
    if family == "llama" or window is None or window >= positions:
        return None
    return int(window)


def _ternary(given: Any, where: str) -> Literal["bitlinear", "autobitlinear", "online"] | None:
    """Of `quantization_config`, what BitNet checkpoints have (transformers' BitNetConfig, version 5.23)."""
    if not given:
        return None
    method = given.get("quant_method", "quantized weights") if isinstance(given, Mapping) else given
    if method != "bitnet":
        allowed = "fp32, bf16 or fp16 weights, or bitnet (trained ternary)"
        raise BadModel(where, method, allowed, "use the original model")
    if given.get("use_rms_norm"):
        raise BadModel(f"{where}.use_rms_norm", True, "false", "serve a model without norms within its linear layers")
    if given.get("modules_to_not_convert") not in (None, [], ["lm_head"]):
        allowed = "null, or lm_head: all matrices of the layers are ternary"
        raise BadModel(
            f"{where}.modules_to_not_convert", given["modules_to_not_convert"], allowed, "serve another model"
        )
    if given.get("linear_class", "bitlinear") == "bitlinear":
        return "bitlinear"
    return "online" if given.get("quantization_mode", "offline") == "online" else "autobitlinear"


def _experts(config: Mapping[str, Any], family: str, num_layers: int, name: str) -> Experts:
    """As transformers' MixtralConfig, Qwen2MoeConfig and Qwen3MoeConfig have it (version 5.23), defaults with it."""
    default = _DEFAULT_EXPERTS[family]
    # transformers 5 writes Qwen3-MoE's num_experts as num_local_experts
    other = "num_local_experts" in config and "num_experts" not in config
    field = "num_local_experts" if family == "mixtral" or (family == "qwen3_moe" and other) else "num_experts"
    count = _size(config, field, name, default.get(field))
    chosen = _size(config, "num_experts_per_tok", name, default["num_experts_per_tok"])
    if chosen > count:
        raise BadModel(f"{name}: num_experts_per_tok", chosen, f"at most {count} experts", "correct the config")
    if family == "mixtral":
        inter = _size(config, "intermediate_size", name)
        return Experts(count, count, chosen, inter, True, 0, tuple(range(num_layers)))
    renormalize = config.get("norm_topk_prob", False)
    if not isinstance(renormalize, bool):
        raise BadModel(f"{name}: norm_topk_prob", renormalize, "true or false", "correct the config")
    inter = _size(config, "moe_intermediate_size", name, default["moe_intermediate_size"])
    shared = "shared_expert_intermediate_size"
    shared_inter = _size(config, shared, name, default[shared]) if family == "qwen2_moe" else 0
    step = _size(config, "decoder_sparse_step", name, 1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int and 0 <= layer < num_layers for layer in dense):
        allowed = f"a list of layers, 0 to {num_layers - 1}"
        raise BadModel(f"{name}: mlp_only_layers", dense, allowed, "correct the config")
    sparse = tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0)
    return Experts(count, count, chosen, inter, renormalize, shared_inter, sparse)


def _rope(config: Mapping[str, Any], name: str, default_theta: float) -> Rope:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    given = config.get(field) or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise BadModel(f"{name}: {field}", given, "one rotary embedding for all layers", "serve another model")
    theta = given.get("rope_theta", config.get("rope_theta", default_theta))
    kind = given.get("rope_type", given.get("type", "default"))
    numbers = {"factor": given.get("factor", 1.0)}
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            numbers[key] = given.get(key)
    elif kind not in ("default", "linear"):
        raise BadModel(f"{name}: {field}", kind, "default, linear, llama3", "serve a model with one of these")
    for key, value in {"rope_theta": theta, **numbers}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise BadModel(f"{name}: {field}.{key}", value, "a number > 0", "correct the config")
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        found = f"{numbers['low_freq_factor']} and {numbers['high_freq_factor']}"
        raise BadModel(f"{name}: {field}", found, "low_freq_factor < high_freq_factor", "correct the config")
    return Rope(float(theta), kind, **(numbers if kind != "default" else {}))
