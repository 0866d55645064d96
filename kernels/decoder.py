"""All layers of a dense decoder and its head in one C++ call: what runtime/transformer.py does operator by operator.

The operators are the same, and so are the numbers, but for the last bit where more than 128 rows of an MLP are
multiplied in pieces. What it saves is Python between them, and memory: nothing but what the widest moment of attention
takes is held, and 128 rows of the MLP (kernels/cpu/decoder.cpp). Its reference is the transformer without it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cpu.build import load
from .cpu.workspace import WORKSPACE
from .linear import ACTIVATION_DTYPES, PackedLinear
from .paged_cache import PagedCache
from .tiles import Tile

_MOST_HEAD_DIM = 1024  # of rope_and_cache


class DecoderLayer(NamedTuple):
    """One layer; norms (hidden,), q_norm and k_norm (head_dim,) fp32, the cache's blocks never move."""

    input_norm: Tensor
    qkv: PackedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: PackedLinear
    post_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear
    cache: PagedCache


class StepTensors(Protocol):
    """What it reads of a runtime.batch.Batch, whose meanings these are; all contiguous but for block_tables' rows."""

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    query_start: Tensor
    context_len: Tensor
    length: Tensor
    head_rows: Tensor
    decode_only: bool


_LAYER = ("qkv", "o", "gate_up", "down", "input_norm", "post_norm", "q_norm", "k_norm", "cache_blocks")
_POINTERS = ("layers", "tiles", "head_tiles", "embedding", "norm", "head", "cosine", "sine")
_SIZES = (
    "embedding_is_bf16", "num_layers", "hidden", "inter", "heads", "kv_heads", "head_dim", "cache_type", "block_size",
)  # fmt: skip


class _Layer(ctypes.Structure):
    """What decoder.cpp's `Layer` holds, field by field."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in _LAYER)


class _Model(ctypes.Structure):
    """What decoder.cpp's `Model` holds, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("eps", ctypes.c_double),
        ("scale", ctypes.c_double),
    )


_STEP_NUMBERS = 15  # of decoder.cpp's `Step`


class Decoder:
    """The layers of one pipeline stage, none of which is shared out among ranks, where `computes` says yes.

    Args:
        layers: of equal shapes, precisions and tiles.
        embedding: (vocabulary, hidden) fp32 or bf16; None: an earlier stage has it.
        norm: (hidden,) fp32, before the head.
        head: None: another rank has it.
        cos, sin: (positions, head_dim / 2) fp32.
        heads: query heads.

    most_tokens  of a step: with more rows some matrix has a tile of another library
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        embedding: Tensor | None,
        norm: Tensor,
        head: PackedLinear | None,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        eps: float,
        scale: float,
    ) -> None:
        first, cache = layers[0], layers[0].cache
        weights = [weight for layer in layers for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        for place in range(4):  # one layer's workspace, and one table of tiles, stand for all
            assert len({(each.out_features, each.in_features, each.precision) for each in weights[place::4]}) == 1
        assert all(weight.tiles == first.qkv.tiles for weight in weights)
        self._layers = (_Layer * len(layers))(*map(_layer, layers))
        self._tiles = _tile_numbers(first.qkv.tiles)
        self._head_tiles = self._tiles if head is None else _tile_numbers(head.tiles)
        pointers = (
            ctypes.addressof(self._layers), self._tiles.ctypes.data, self._head_tiles.ctypes.data, _address(embedding),
            norm.data_ptr(), None if head is None else head.descriptor_address, cos.data_ptr(), sin.data_ptr(),
        )  # fmt: skip
        is_bf16 = embedding is not None and embedding.dtype is torch.bfloat16
        hidden, inter = len(first.input_norm), first.down.in_features
        sizes = (is_bf16, len(layers), hidden, inter, heads, cache.kv_heads, cache.head_dim, cache.code)
        self._model = _Model(*pointers, *sizes, cache.block_size, eps, scale)
        self._held = (tuple(layers), embedding, norm, head, cos, sin)  # what the addresses point into
        self._address = ctypes.addressof(self._model)
        self._step = np.zeros(_STEP_NUMBERS, np.int64)
        self._step_address = self._step.ctypes.data
        self._vocabulary = None if head is None else head.out_features
        tables = [first.qkv.tiles] if head is None else [first.qkv.tiles, head.tiles]
        self.most_tokens = min(_most_rows(tiles) for tiles in tables)

    def __call__(self, batch: StepTensors, hidden: Tensor | None, tile: Tile | None) -> Tensor:
        """One step of at most `most_tokens` tokens.

        Args:
            hidden: (T, hidden) fp32, contiguous: what the stage before gave; None on the first. Overwritten.
            tile: of the attention that the step takes, for C++; None: its default.
        Returns: logits (H, vocabulary) fp32; where there is no head (T, hidden) for the stage behind.
        """
        library = load()
        assert library is not None
        if tile is None:
            tile = _DECODE if batch.decode_only else _PREFILL
        tables = batch.block_tables
        tokens, heads = batch.positions.shape[0], batch.head_rows.shape[0]
        if self._vocabulary is None:
            out = hidden = torch.empty((tokens, self._model.hidden)) if hidden is None else hidden
        else:
            out = torch.empty((heads, self._vocabulary))
        self._step[:] = (
            batch.token_ids.data_ptr(), batch.positions.data_ptr(), batch.slot_mapping.data_ptr(), tables.data_ptr(),
            batch.query_start.data_ptr(), batch.context_len.data_ptr(), batch.length.data_ptr(),
            batch.head_rows.data_ptr(), tables.stride(0), tokens, batch.length.shape[0], heads, batch.decode_only,
            *tile.arguments,
        )  # fmt: skip
        arguments = (self._address, self._step_address, _address(hidden), out.data_ptr())
        threads = torch.get_num_threads()
        needed = library.decoder(*arguments, WORKSPACE.address, WORKSPACE.nbytes, threads)
        if needed > 0:
            WORKSPACE.grow(needed)
            needed = library.decoder(*arguments, WORKSPACE.address, WORKSPACE.nbytes, threads)
        if needed != 0:
            raise RuntimeError("decoder: an operator found less workspace than it asked for")
        return out


def computes(layers: Sequence[DecoderLayer], embedding: Tensor | None, head: PackedLinear | None) -> bool:
    """Whether a `Decoder` can be made of these: there are layers, and C++ has every weight."""
    if load() is None or not layers or layers[0].cache.head_dim > _MOST_HEAD_DIM:
        return False
    if embedding is not None and (embedding.dtype not in ACTIVATION_DTYPES or not embedding.is_contiguous()):
        return False
    weights = [weight for layer in layers for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return all(weight.panels is not None for weight in (*weights, *([] if head is None else [head])))


_DECODE, _PREFILL = Tile("decode_attention", "cpp"), Tile("prefill_attention", "cpp")


def _layer(layer: DecoderLayer) -> _Layer:
    weights = (each.descriptor_address for each in (layer.qkv, layer.o, layer.gate_up, layer.down))
    norms = (_address(each) for each in (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm))
    return _Layer(*weights, *norms, layer.cache.blocks.data_ptr())


def _tile_numbers(tiles: Sequence[Tile]) -> NDArray[np.int32]:
    width = len(Tile("linear", "cpp").arguments)
    return np.array([tile.arguments if tile.backend == "cpp" else (0,) * width for tile in tiles], np.int32)


def _most_rows(tiles: Sequence[Tile]) -> int:
    """Up to how many rows every tile is a C++ one; 0: not even of one row."""
    exponent = next((at for at, tile in enumerate(tiles) if tile.backend != "cpp"), len(tiles))
    return 0 if exponent == 0 else 1 << (exponent - 1)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
