"""Weights from safetensors into the layout the operators want: read, checked, cut to one rank's share, packed.

Only safetensors are read: a pickle can run any code when it is opened. What is cut where comes in as a `Share`; nothing
here knows of processes. q, k and v lie in one matrix, gate and up in another: one product each, not three and two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels.linear import PackedLinear, pack, retile
from ..kernels.moe import PackedExperts, pack_experts, retile_experts
from ..kernels.stored_weight import StoredWeight, stack, store, stored_ternary
from ..kernels.tiles import TileTable
from ..kernels.weight_formats import WEIGHT_FORMATS
from .model_shape import EXPERT_NAMES, MLP_NAMES, BadModel, Experts, ModelShape, matrix_dtype, read_json
from .parallel import Share

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CPU = torch.device("cpu")
_FLOATS = {"F32", "BF16", "F16", "F64"}
_Mlp = tuple[PackedLinear, PackedLinear]


class Checkpoint:
    """The safetensors of a model directory. Every tensor is read at most once, and `check_all_read` names what is left.

    Raises: BadModel, naming file and tensor.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self._unread: set[str] = set()
        index = model_dir / INDEX_FILE
        if index.is_file():
            self._read_index(index)
        elif (model_dir / SINGLE_FILE).is_file():
            path = model_dir / SINGLE_FILE
            self._file_of = dict.fromkeys(self._opened(path).keys(), path)
        else:
            raise self._no_weights()
        self._unread = set(self._file_of)

    def _read_index(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise BadModel(f"{index}: weight_map", weight_map, "tensor names and their files", "copy the model again")
        for file in sorted(set(weight_map.values())):
            path = self.model_dir / file
            if path.name != file or not file.endswith(".safetensors"):
                raise BadModel(f"{index}: weight_map", file, "safetensors in this directory", "copy the model again")
            if not path.is_file():
                tensor = next(name for name, its_file in weight_map.items() if its_file == file)
                raise BadModel(str(path), f"no such shard (tensor {tensor} is in it)", "all shards", "copy it as well")
            missing = {name for name, its_file in weight_map.items() if its_file == file} - set(
                self._opened(path).keys()
            )
            if missing:
                raise BadModel(
                    f"{path}: {min(missing)}", "no such tensor", "what the index says", "copy the shard again"
                )
        self._file_of = {name: self.model_dir / file for name, file in weight_map.items()}

    def _no_weights(self) -> BadModel:
        pickles = sorted(path.name for pattern in _PICKLES for path in self.model_dir.glob(pattern))
        if pickles:
            todo = (
                "convert them where you trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
            )
            return BadModel(f"{self.model_dir / pickles[0]}", "pickled weights", "safetensors (pickles run code)", todo)
        todo = "copy the weights beside config.json"
        return BadModel(str(self.model_dir), "no weights", f"{SINGLE_FILE}, or shards and {INDEX_FILE}", todo)

    def _opened(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(str(path), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise BadModel(str(path), error, "whole safetensors", "copy the file again") from None
        return self._open[path]

    def read(
        self, name: str, shape: tuple[int, ...], *, rows: range | None = None, columns: range | None = None
    ) -> Tensor:
        """A float tensor that must have this whole shape, or the given rows or columns of it, as stored.

        It lies in the mapped file: whoever keeps it copies it, or the pages of all that was read count as this
        process's memory for as long as it lives.
        """
        return self._read(name, shape, _FLOATS, "fp32, bf16 or fp16", rows=rows, columns=columns)

    def read_ternary(self, name: str, shape: tuple[int, int], *, reciprocal: bool) -> StoredWeight:
        """A matrix as transformers' BitLinear packs it: rows r, r + out / 4, ... in bits 0-1, 2-3, ... of one row of
        bytes, as value + 1, and `name`_scale, of the whole tensor, or its reciprocal."""
        out_features, in_features = shape
        if out_features % 4:
            raise BadModel(f"{self.model_dir}: {name}", f"{out_features} rows", "a multiple of 4", "use other weights")
        packed = self._read(name, (out_features // 4, in_features), {"U8"}, "uint8, four ternary weights a byte")
        scale = float(self.read(f"{name}_scale", (1,)))
        codes = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)])
        if int(codes.max()) > 2 or not 0 < scale < float("inf"):
            found = f"code {int(codes.max())}, scale {scale}"
            raise BadModel(f"{self.model_dir}: {name}", found, "codes 0, 1, 2 and a scale > 0", "copy the file again")
        return stored_ternary(codes.to(torch.int8) - 1, 1 / scale if reciprocal else scale)

    def _read(
        self,
        name: str,
        shape: tuple[int, ...],
        dtypes: set[str],
        allowed: str,
        *,
        rows: range | None = None,
        columns: range | None = None,
    ) -> Tensor:
        if name not in self._file_of:
            where = f"{self.model_dir / (INDEX_FILE if len(self._open) > 1 else SINGLE_FILE)}: {name}"
            raise BadModel(where, "no such tensor", "every weight that config.json asks for", "copy the model again")
        path = self._file_of[name]
        stored = self._opened(path).get_slice(name)
        found = tuple(stored.get_shape())
        if found != shape:
            raise BadModel(
                f"{path}: {name}", f"shape {found}", f"{shape} (from config.json)", "match config and weights"
            )
        if stored.get_dtype() not in dtypes:
            todo = "use the model before it was quantized; weight_dtype in the spec quantizes it"
            raise BadModel(f"{path}: {name}", stored.get_dtype(), allowed, todo)
        self._unread.discard(name)
        if rows is not None:
            return torch.as_tensor(stored[rows.start : rows.stop])
        if columns is not None:
            return torch.as_tensor(stored[:, columns.start : columns.stop])
        return torch.as_tensor(stored[:])

    def leave_to_others(self, *beginnings: str) -> None:
        """Tensors whose names begin so need not be read here: other ranks do."""
        self._unread = {name for name in self._unread if not name.startswith(beginnings)}

    def check_all_read(self, *, ignored: tuple[str, ...]) -> None:
        """Refuse tensors that the model has and nothing read: they would silently be left out of every answer."""
        for name in sorted(self._unread):
            if not name.endswith(ignored):
                todo = "serve a model whose config.json says what its weights are"
                raise BadModel(f"{self._file_of[name]}: {name}", "an extra tensor", "the weights of config.json", todo)


@dataclass(frozen=True, eq=False)
class SparseMlp:
    """A router and the experts of one rank.

    router  all experts from hidden, and behind them the gate of the shared expert, where there is one; on every rank,
            fp32 whatever the weights are (see `matrix_dtype`)
    packed  this rank's experts, or its channels of each
    """

    router: PackedLinear
    packed: PackedExperts

    @property
    def nbytes(self) -> int:
        return self.router.nbytes + self.packed.nbytes


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer of one rank; norms (hidden,) or (head_dim,) fp32.

    qkv      (heads + 2 * kv_heads) * head_dim from hidden, this rank's heads
    o        hidden from heads * head_dim
    gate_up  2 * intermediate from hidden, gate first; of a sparse layer the shared expert's, None: it has none
    down     hidden from intermediate; likewise
    experts  of a sparse layer, None: it is dense
    """

    input_norm: Tensor
    qkv: PackedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: PackedLinear
    post_norm: Tensor
    gate_up: PackedLinear | None
    down: PackedLinear | None
    experts: SparseMlp | None = None


@dataclass(frozen=True, eq=False)
class Weights:
    """One rank's share of a model.

    embedding  (vocab, hidden) fp32 or bf16, this rank's rows; None but on the first pipeline stage
    norm       (hidden,) fp32, the last before the head
    head       this rank's rows; None but on the last stage, and there on ranks that leave the logits to others
    """

    embedding: Tensor | None
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: PackedLinear | None


def load_weights(
    shape: ModelShape, model_dir: Path, share: Share, weight_dtype: str, tiles: TileTable, device: torch.device = _CPU
) -> Weights:
    """Read, cut and pack the weights of one rank.

    Args:
        weight_dtype: of the matrices (but see `matrix_dtype`); the embedding is fp32 beside fp32 and else bf16.
        tiles: of the deployment; a backend that it names and this machine lacks raises kernels.tiles.BadTile.
        device: where they are to lie; each matrix is cut and rounded on the host and moved by itself.
    Raises: BadModel: a missing or truncated file, a missing, extra or wrongly shaped tensor.
    """
    checkpoint = Checkpoint(model_dir)
    table = (shape.vocab_size, shape.hidden_size)
    embedding = head = None
    if share.is_first:
        embedding = checkpoint.read("model.embed_tokens.weight", table, rows=share.vocab)
        stored = torch.float32 if weight_dtype == "fp32" else torch.bfloat16
        embedding = embedding.to(device, stored, copy=True)
    if share.has_head:
        name = "model.embed_tokens.weight" if shape.tie_word_embeddings else "lm_head.weight"
        dtype = matrix_dtype("head", weight_dtype)
        head = pack(_matrix(checkpoint, shape, name, table, dtype, rows=share.vocab), tiles=tiles, device=device)
    weights = Weights(
        embedding=embedding,
        layers=tuple(_layer(checkpoint, shape, index, share, weight_dtype, tiles, device) for index in share.layers),
        norm=checkpoint.read("model.norm.weight", (shape.hidden_size,)).to(device, torch.float32, copy=True),
        head=head,
    )
    elsewhere = [f"model.layers.{index}." for index in range(shape.num_layers) if index not in share.layers]
    elsewhere += _experts_of_others(shape, share)
    checkpoint.leave_to_others("model.embed_tokens.weight", "lm_head.weight", *elsewhere)
    checkpoint.check_all_read(ignored=("rotary_emb.inv_freq",))
    return weights


def retiled(weights: Weights, tiles: TileTable) -> Weights:
    """The same weights, computed with other tiles; nothing is copied. Raises: BadTile: a layout that is not there."""
    layers = tuple(
        replace(
            layer,
            qkv=retile(layer.qkv, tiles),
            o=retile(layer.o, tiles),
            gate_up=layer.gate_up and retile(layer.gate_up, tiles),
            down=layer.down and retile(layer.down, tiles),
            experts=layer.experts and _retiled_experts(layer.experts, tiles),
        )
        for layer in weights.layers
    )
    head = None if weights.head is None else retile(weights.head, tiles)
    return replace(weights, layers=layers, head=head)


def _retiled_experts(experts: SparseMlp, tiles: TileTable) -> SparseMlp:
    return SparseMlp(retile(experts.router, tiles), retile_experts(experts.packed, tiles))


def _layer(
    checkpoint: Checkpoint,
    shape: ModelShape,
    index: int,
    share: Share,
    weight_dtype: str,
    tiles: TileTable,
    device: torch.device,
) -> LayerWeights:
    layer = f"model.layers.{index}"
    hidden, wide = shape.hidden_size, shape.num_heads * shape.head_dim
    narrow, inter = shape.num_kv_heads * shape.head_dim, shape.intermediate_size
    heads, kv_heads = _spread(share.heads, shape.head_dim), _spread(share.kv_heads, shape.head_dim)

    def stacked(parts: tuple[tuple[str, int, range], ...], has_bias: bool) -> PackedLinear:
        weight = stack(
            [
                _matrix(checkpoint, shape, f"{layer}.{name}.weight", (out, hidden), weight_dtype, rows=rows)
                for name, out, rows in parts
            ]
        )
        bias = None
        if has_bias:
            bias = torch.cat([checkpoint.read(f"{layer}.{name}.bias", (out,), rows=rows) for name, out, rows in parts])
        return pack(weight, bias=bias, tiles=tiles, device=device)

    def summed(name: str, into: int, columns: range, has_bias: bool) -> PackedLinear:
        weight = _matrix(checkpoint, shape, f"{layer}.{name}.weight", (hidden, into), weight_dtype, columns=columns)
        bias = None
        if has_bias:
            bias = checkpoint.read(f"{layer}.{name}.bias", (hidden,)).clone()
            if share.rank != 0:  # the ranks' products are added up, and the bias belongs into the sum once
                bias = None
        return pack(weight, bias=bias, tiles=tiles, device=device)

    def norm(name: str, width: int) -> Tensor:
        return checkpoint.read(f"{layer}.{name}.weight", (width,)).to(device, torch.float32, copy=True)

    def mlp(names: tuple[str, str, str], width: int, part: range, has_bias: bool = False) -> _Mlp:
        gate, up, down = names
        return stacked(((gate, width, part), (up, width, part)), has_bias), summed(down, width, part, has_bias)

    def experts(sparse: Experts) -> SparseMlp:
        block, names = EXPERT_NAMES[shape.family]
        width, part = sparse.intermediate_size, share.expert_intermediate
        each = [mlp(_named(f"{block}.experts.{expert}", names), width, part) for expert in share.experts]
        router = [checkpoint.read(f"{layer}.{block}.gate.weight", (sparse.num_experts, hidden)).float()]
        if sparse.shared_intermediate_size:
            router.append(checkpoint.read(f"{layer}.{block}.shared_expert_gate.weight", (1, hidden)).float())
        packed = pack_experts([first for first, _ in each], [last for _, last in each], share.experts.start)
        dtype = matrix_dtype("router", weight_dtype)
        return SparseMlp(pack(torch.cat(router), dtype, tiles=tiles, device=device), packed)

    sparse = shape.experts if shape.experts and index in shape.experts.layers else None
    gate_up: PackedLinear | None
    down: PackedLinear | None
    gate_up = down = None
    if sparse is None:
        gate_up, down = mlp(_named("mlp", MLP_NAMES), inter, share.intermediate, shape.mlp_bias)
    elif sparse.shared_intermediate_size:
        shared = _named("mlp.shared_expert", MLP_NAMES)
        gate_up, down = mlp(shared, sparse.shared_intermediate_size, share.shared_intermediate)
    return LayerWeights(
        input_norm=norm("input_layernorm", hidden),
        qkv=stacked(
            (
                ("self_attn.q_proj", wide, heads),
                ("self_attn.k_proj", narrow, kv_heads),
                ("self_attn.v_proj", narrow, kv_heads),
            ),
            shape.qkv_bias,
        ),
        q_norm=norm("self_attn.q_norm", shape.head_dim) if shape.qk_norm else None,
        k_norm=norm("self_attn.k_norm", shape.head_dim) if shape.qk_norm else None,
        o=summed("self_attn.o_proj", wide, heads, shape.o_bias),
        post_norm=norm("post_attention_layernorm", hidden),
        gate_up=gate_up,
        down=down,
        experts=None if sparse is None else experts(sparse),
    )


def _experts_of_others(shape: ModelShape, share: Share) -> list[str]:
    """Beginnings of the names of the experts' tensors that other ranks hold."""
    if shape.experts is None:
        return []
    block, _ = EXPERT_NAMES[shape.family]
    others = [expert for expert in range(shape.experts.num_experts) if expert not in share.experts]
    return [f"model.layers.{layer}.{block}.experts.{expert}." for layer in share.layers for expert in others]


def _named(module: str, names: tuple[str, str, str]) -> tuple[str, str, str]:
    gate, up, down = names
    return f"{module}.{gate}", f"{module}.{up}", f"{module}.{down}"


def _matrix(
    checkpoint: Checkpoint,
    shape: ModelShape,
    name: str,
    size: tuple[int, int],
    dtype: str,
    *,
    rows: range | None = None,
    columns: range | None = None,
) -> StoredWeight:
    """Rows or columns of a matrix in `dtype`, scaled as the whole is; more is read only where that asks for it."""
    wanted = WEIGHT_FORMATS[dtype]
    packed_ternary = shape.ternary in ("bitlinear", "autobitlinear") and name.endswith("_proj.weight")
    if packed_ternary or (shape.ternary == "online" and name.endswith("_proj.weight")):
        if packed_ternary:
            whole = checkpoint.read_ternary(name, size, reciprocal=shape.ternary == "bitlinear")
        else:
            whole = store(checkpoint.read(name, size), "ternary")
        whole = whole if dtype == "ternary" else store(whole.expanded(torch.float32), dtype)
    elif rows is not None and not wanted.tensor_scale:
        return store(checkpoint.read(name, size, rows=rows), dtype)
    elif columns is not None and not wanted.channel_bytes and not wanted.group_bytes:
        return store(checkpoint.read(name, size, columns=columns), dtype)
    else:
        whole = store(checkpoint.read(name, size), dtype)
    if rows is not None:
        return whole.rows(rows)
    return whole if columns is None else whole.columns(columns)


def _spread(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
