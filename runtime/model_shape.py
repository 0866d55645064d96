"""What a model is made of, read from a Hugging Face `config.json`: sizes, rotary embedding, biases, bytes. No tensors.

Decoders of the Llama family: Llama, Mistral, Qwen2 and Qwen3, also those trained ternary, and the mixtures of experts
Mixtral, Qwen2-MoE and Qwen3-MoE. What this code does not compute (another activation, another rotary scaling, other
quantized checkpoints) is refused by name rather than left out. The families of modeled_families.py, and checkpoints
in fp8 and mxfp4, have a shape, so that they can be modeled; the bundled engine refuses them (`check_served`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .attention_shape import Attention, LatentAttention, LinearAttention
from .config_fields import BadModel, read_json, size, token_ids
from .model_parts import Experts, Rope
from .modeled_families import MODELED_FAMILIES, parts_of
from .quantization import ALWAYS_FP32, Quantization, Storage, quantization_of
from .small_model import MODEL_DIR, TERNARY_MODEL_DIR
from .spec import SMALL_MODEL, SMALL_TERNARY_MODEL

__all__ = [
    "DTYPE_BYTES",
    "EXPERT_NAMES",
    "FAMILIES",
    "KV_SCALE_BYTES",
    "MLP_NAMES",
    "SPARSE_FAMILIES",
    "BadModel",
    "Experts",
    "ModelShape",
    "Rope",
    "matrix_dtype",
    "read_json",
    "resolve_model",
]

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

    What only modeled families have:
    latent                multi-head latent attention in every layer, with num_heads; None: other attention
    attention             kinds of softmax attention by layer, the first with num_heads, num_kv_heads and head_dim;
                          empty: one kind, in every layer
    linear_attention      of the layers that have it instead
    quantization          of the checkpoint; None: it is not quantized, or trained ternary
    norms_per_layer       of hidden_size
    norm_bias             the norms have biases (LayerNorm)
    qk_norm_of_all_heads  qk_norm is over all heads of a token at once, not over each
    sinks                 one number a head and layer that takes part in the softmax (gpt-oss)
    layer_scalar          one number a layer
    head_bias             of the vocabulary projection
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
    latent: LatentAttention | None = None
    attention: tuple[Attention, ...] = ()
    linear_attention: LinearAttention | None = None
    quantization: Quantization | None = None
    norms_per_layer: int = 2
    norm_bias: bool = False
    qk_norm_of_all_heads: bool = False
    sinks: bool = False
    layer_scalar: bool = False
    head_bias: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "config.json") -> ModelShape:
        """From the content of a config.json; of one with an encoder beside it, the decoder's.

        Raises: BadModel, naming the field.
        """
        if isinstance(config.get("text_config"), Mapping):
            outer = {key: config[key] for key in ("tie_word_embeddings", "quantization_config") if key in config}
            config = {**outer, **config["text_config"]}
        family = config.get("model_type")
        if family in MODELED_FAMILIES:
            return cls._of_modeled_family(config, str(family), name)
        if family not in FAMILIES:
            allowed = f"{', '.join(FAMILIES)}; to model but not to serve: {', '.join(MODELED_FAMILIES)}"
            raise BadModel(f"{name}: model_type", family, allowed, "take a model of these families")
        if config.get("hidden_act", "silu") != "silu":
            raise BadModel(f"{name}: hidden_act", config["hidden_act"], "silu", "serve a model with this activation")
        if config.get("partial_rotary_factor", 1.0) != 1.0:
            raise BadModel(
                f"{name}: partial_rotary_factor", config["partial_rotary_factor"], "1", "serve another model"
            )
        heads = size(config, "num_attention_heads", name)
        hidden = size(config, "hidden_size", name)
        kv_heads = size(config, "num_key_value_heads", name, heads)
        head_dim = size(config, "head_dim", name, _DEFAULT_HEAD_DIM.get(family, hidden // heads))
        if heads % kv_heads:
            raise BadModel(
                f"{name}: num_key_value_heads", kv_heads, f"a divisor of {heads} heads", "correct the config"
            )
        if head_dim % 2:
            raise BadModel(f"{name}: head_dim", head_dim, "an even number (rotary pairs)", "correct the config")
        attention_bias = bool(config.get("attention_bias", False)) and family in ("llama", "qwen3", "qwen3_moe")
        qkv_bias = attention_bias or family == "qwen2" or (family == "qwen2_moe" and bool(config.get("qkv_bias", True)))
        positions = size(config, "max_position_embeddings", name)
        quantization = quantization_of(config.get("quantization_config"), f"{name}: quantization_config")
        if family in SPARSE_FAMILIES and config.get("quantization_config") and quantization is None:
            found, allowed = config["quantization_config"], "none, or fp8: a mixture of experts in fp32, bf16 or fp16"
            raise BadModel(f"{name}: quantization_config", found, allowed, "use the original model")
        layers = size(config, "num_hidden_layers", name)
        return cls(
            family=family,
            vocab_size=size(config, "vocab_size", name),
            hidden_size=hidden,
            intermediate_size=size(config, "intermediate_size", name),
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
            eos_token_ids=token_ids(config.get("eos_token_id"), f"{name}: eos_token_id"),
            ternary=None
            if quantization
            else _ternary(config.get("quantization_config"), f"{name}: quantization_config"),
            experts=_experts(config, family, layers, name) if family in SPARSE_FAMILIES else None,
            quantization=quantization,
        )

    @classmethod
    def _of_modeled_family(cls, config: Mapping[str, Any], family: str, name: str) -> ModelShape:
        parts = parts_of(config, family, name)
        heads, hidden = size(config, "num_attention_heads", name), size(config, "hidden_size", name)
        attention = parts.get("attention", ())
        rope = config.get("rope_parameters") or {}
        plain = {
            "num_kv_heads": attention[0].num_kv_heads
            if attention
            else size(config, "num_key_value_heads", name, heads),
            "head_dim": attention[0].head_dim if attention else size(config, "head_dim", name, hidden // heads),
            "intermediate_size": size(config, "intermediate_size", name, 1),
        }
        return cls(
            family=family,
            vocab_size=size(config, "vocab_size", name),
            hidden_size=hidden,
            num_layers=size(config, "num_hidden_layers", name),
            num_heads=heads,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=size(config, "max_position_embeddings", name),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=Rope(float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))),
            eos_token_ids=token_ids(config.get("eos_token_id"), f"{name}: eos_token_id"),
            quantization=quantization_of(config.get("quantization_config"), f"{name}: quantization_config"),
            **{**plain, **parts},
        )

    def check_served(self) -> None:
        """Raises: BadModel: the bundled engine does not compute this model, or does not read its checkpoint."""
        if self.family not in FAMILIES:
            todo = "model it, or serve a model of these families"
            raise BadModel("config.json: model_type", self.family, ", ".join(FAMILIES), todo)
        if self.quantization is not None:
            found, allowed = self.quantization.weight_dtype, "fp32, bf16 or fp16 weights, or bitnet (trained ternary)"
            raise BadModel("config.json: quantization_config", found, allowed, "serve the original model")

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

    def attention_kinds(self) -> tuple[Attention, ...]:
        """Softmax attention with keys and values of its own, by kind; none where it is latent."""
        if self.latent is not None:
            return ()
        if self.attention:
            return self.attention
        every = tuple(range(self.num_layers))
        return (Attention(every, self.num_heads, self.num_kv_heads, self.head_dim, self.sliding_window),)

    def matrices(self) -> tuple[tuple[str, int, int, int], ...]:
        """Every kind of weight matrix that a token is multiplied with: (name, out_features, in_features, how many)."""
        hidden, layers, experts = self.hidden_size, self.num_layers, self.experts
        dense = layers - (len(experts.layers) if experts else 0)
        found = [
            *attention_matrices(self, 1),
            ("gate_up", 2 * self.intermediate_size, hidden, dense),
            ("down", hidden, self.intermediate_size, dense),
        ]
        if experts:
            sparse, inter, shared = len(experts.layers), experts.intermediate_size, experts.shared_intermediate_size
            found += [
                ("router", experts.num_experts, hidden, sparse),
                ("expert_gate_up", 2 * inter, hidden, sparse * experts.num_local_experts),
                ("expert_down", hidden, inter, sparse * experts.num_local_experts),
                ("shared_gate", 1, hidden, sparse if shared and experts.shared_gated else 0),
                ("shared_gate_up", 2 * shared, hidden, sparse if shared else 0),
                ("shared_down", hidden, shared, sparse if shared else 0),
            ]
        found.append(("head", self.vocab_size, hidden, 1))
        return tuple(matrix for matrix in found if matrix[3])

    def num_parameters(self) -> int:
        """Parameters of the checkpoint; a tied head counts once."""
        matrices = sum(out * into * count for _, out, into, count in self.matrices())
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return matrices + embedding + self.vector_parameters()

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of keys and values that one token of context holds, all layers together, scales with them.

        Layers with a window are counted, though they need no more than the window.
        """
        return kv_bytes(self, dtype, 1)

    def embedding_bytes(self, dtype: str) -> int:
        """Bytes of the embedding table: fp32 where the weights are fp32, else bf16; rows are looked up only."""
        return self.vocab_size * self.hidden_size * (4 if dtype == "fp32" else 2)

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of the weights that a step reads, the head with them and the embedding table without.

        Scales are counted, the padding of the last panel of output channels is not; norms and biases are fp32.
        """
        return self.stored_bytes(Storage.bundled(dtype))

    def stored_bytes(self, storage: Storage) -> int:
        """The same under any storage of the weights."""
        matrices = sum(count * storage.nbytes(name, out, into) for name, out, into, count in self.matrices())
        return matrices + storage.vector_bytes * self.vector_parameters()

    def checkpoint_bytes(self, plain_dtype: str = "bf16") -> int:
        """Bytes of the tensors of the checkpoint that this shape was read from, a tied head once."""
        storage = Storage.of_checkpoint(self.quantization, plain_dtype)
        embedding = 0 if self.tie_word_embeddings else self.embedding_bytes(plain_dtype)
        return self.stored_bytes(storage) + embedding

    def vector_parameters(self) -> int:
        """Numbers in norms, biases and other vectors, of the layers and beside them."""
        norm = self.hidden_size * (2 if self.norm_bias else 1)
        per_layer = self.norms_per_layer * norm + int(self.layer_scalar)
        per_layer += 2 * self.intermediate_size + self.hidden_size if self.mlp_bias else 0
        total = self.num_layers * per_layer + norm + (self.vocab_size if self.head_bias else 0)
        for kind in self.attention_kinds():
            if self.qk_norm_of_all_heads:
                each = (kind.num_heads + kind.num_kv_heads) * kind.head_dim
            else:
                each = 2 * kind.head_dim if self.qk_norm else 0
            each += (kind.num_heads + 2 * kind.num_kv_heads) * kind.head_dim if self.qkv_bias else 0
            each += self.hidden_size if self.o_bias else 0
            each += kind.num_heads if self.sinks else 0
            total += len(kind.layers) * each
        if self.latent is not None:
            each = (self.latent.q_lora_rank or 0) + self.latent.kv_lora_rank
            each += 2 * self.latent.indexer.head_dim if self.latent.indexer else 0  # a LayerNorm of its keys
            total += self.num_layers * each
        if self.linear_attention is not None:
            linear = self.linear_attention
            each = linear.conv_features * linear.conv_kernel_size + 2 * linear.num_value_heads + linear.value_head_dim
            total += len(linear.layers) * each
        if self.experts is not None:
            experts = self.experts
            each = experts.num_experts if experts.router_bias else 0
            wide = 2 * experts.intermediate_size + self.hidden_size
            each += experts.num_local_experts * wide if experts.expert_bias else 0
            each += self.hidden_size + experts.num_experts if experts.router_scales else 0
            total += len(experts.layers) * each
        return total


def attention_matrices(shape: ModelShape, ranks: int) -> list[tuple[str, int, int, int]]:
    """The matrices of attention, as `ModelShape.matrices` names them, as each of `ranks` holds them.

    Heads are divided; a key-value head, a latent and an indexer that cannot be are held by every rank. Matrices of
    layers whose heads differ from the first kind's are called global_qkv and global_o.
    """
    hidden = shape.hidden_size
    found: dict[tuple[str, int, int], int] = {}
    for kind in shape.attention_kinds():
        prefix = "" if (kind.num_heads, kind.head_dim) == (shape.num_heads, shape.head_dim) else "global_"
        heads, kv_heads = kind.num_heads // ranks, max(1, kind.num_kv_heads // ranks)
        features = heads * (2 if kind.output_gate else 1) + kv_heads * (1 if kind.keys_are_values else 2)
        for matrix in (
            (f"{prefix}qkv", features * kind.head_dim, hidden),
            (f"{prefix}o", hidden, heads * kind.head_dim),
        ):
            found[matrix] = found.get(matrix, 0) + len(kind.layers)
    latent, layers = shape.latent, shape.num_layers
    if latent is not None:
        heads = shape.num_heads // ranks
        queries, rank = heads * latent.qk_head_dim, latent.q_lora_rank
        if rank is None:
            found["q", queries, hidden] = layers
        else:
            found["q_a", rank, hidden] = layers
            found["q_b", queries, rank] = layers
        found["kv_a", latent.cached_dim, hidden] = layers
        found["kv_b", heads * (latent.qk_nope_head_dim + latent.v_head_dim), latent.kv_lora_rank] = layers
        found["o", hidden, heads * latent.v_head_dim] = layers
        if latent.indexer is not None:
            index = latent.indexer
            found["index_q", index.num_heads * index.head_dim, rank or hidden] = layers
            found["index_k", index.head_dim, hidden] = layers
            found["index_weights", index.num_heads, hidden] = layers
    linear = shape.linear_attention
    if linear is not None:
        count, values = len(linear.layers), linear.value_features // ranks
        found["linear_in", linear.conv_features // ranks + values, hidden] = count
        found["linear_gates", 2 * linear.num_value_heads // ranks, hidden] = count
        found["linear_out", hidden, values] = count
    return [(name, out, into, count) for (name, out, into), count in found.items()]


def kv_bytes(shape: ModelShape, dtype: str, ranks: int) -> int:
    """Bytes that one token of context holds on each of `ranks` that divide the key-value heads, all layers together.

    A latent has no heads, so each rank holds it whole. An indexer's keys are fp8 with one fp32 scale for 128 of them,
    as vLLM caches them whatever the cache's dtype.
    """
    if shape.latent is not None:
        latent = shape.latent
        each = latent.cached_dim * DTYPE_BYTES[dtype] + KV_SCALE_BYTES.get(dtype, 0)
        each += 0 if latent.indexer is None else latent.indexer.head_dim + 4 * -(-latent.indexer.head_dim // 128)
        return shape.num_layers * each
    return sum(
        2
        * len(kind.layers)
        * max(1, kind.num_kv_heads // ranks)
        * (kind.head_dim * DTYPE_BYTES[dtype] + KV_SCALE_BYTES.get(dtype, 0))
        for kind in shape.attention_kinds()
    )


def matrix_dtype(name: str, weight_dtype: str) -> str:
    """How the bundled engine stores a matrix of `ModelShape.matrices`: as the weights, but the head of a ternary model
    is bf16, and the router and the shared expert's gate stay fp32."""
    if name in ALWAYS_FP32:
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
    count = size(config, field, name, default.get(field))
    chosen = size(config, "num_experts_per_tok", name, default["num_experts_per_tok"])
    if chosen > count:
        raise BadModel(f"{name}: num_experts_per_tok", chosen, f"at most {count} experts", "correct the config")
    if family == "mixtral":
        inter = size(config, "intermediate_size", name)
        return Experts(count, count, chosen, inter, True, 0, tuple(range(num_layers)))
    renormalize = config.get("norm_topk_prob", False)
    if not isinstance(renormalize, bool):
        raise BadModel(f"{name}: norm_topk_prob", renormalize, "true or false", "correct the config")
    inter = size(config, "moe_intermediate_size", name, default["moe_intermediate_size"])
    shared = "shared_expert_intermediate_size"
    shared_inter = size(config, shared, name, default[shared]) if family == "qwen2_moe" else 0
    step = size(config, "decoder_sparse_step", name, 1)
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
