"""The forward pass of one rank: hidden states through the layers, keys and values into the paged cache, logits out.

Activations are fp32 between operators on the CPU, whatever the weights are (see kernels/linear.py), and on a GPU in the
dtype that the weights are multiplied in (kernels/gpu_linear.py). Attention takes mixed steps in one call; a step of
pure decoding takes the decode kernel.

Where nothing must happen between the operators (`_whole`), the CPU computes a step in one call: kernels/cpu/decoder.cpp
does what `forward` does here, and changes with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels import placement
from ..kernels.cpu.build import load
from ..kernels.cpu.huge_pages import zeros_on_huge_pages
from ..kernels.decode_attention import decode_attention
from ..kernels.decoder import Decoder, DecoderLayer, computes
from ..kernels.fused import add_rms_norm, rms_norm, rope_and_cache, swiglu
from ..kernels.gpu_lora import RowTiles
from ..kernels.linear import PackedLinear, linear
from ..kernels.lora import AdapterRows
from ..kernels.moe import moe, route
from ..kernels.paged_cache import PagedCache, block_bytes
from ..kernels.prefill_attention import prefill_attention
from ..kernels.tiles import BadTile, Tile, TileTable
from .adapters import DOWN, GATE_UP, MATRICES, O_PROJ, QKV
from .batch import Batch
from .context_part import ContextPart
from .device_batch import DeviceBatch
from .model_shape import ModelShape, Rope
from .parallel import Share
from .weights import LayerWeights, Weights, retiled

_BUCKETS = 33


def rope_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position of each rotary pair: theta ** (-2 i / head_dim), stretched as `rope` says.

    Returns: (head_dim / 2,) fp32; in fp32 because the models were trained with what that rounds to.
    """
    frequency = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = kept.clamp(0, 1)
        return frequency * kept + frequency / rope.factor * (1 - kept)
    return frequency


def rope_tables(shape: ModelShape, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin for positions 0 .. positions - 1: (positions, head_dim / 2) fp32."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), rope_frequencies(shape.rope, shape.head_dim))
    return angles.cos(), angles.sin()


class ContextPeers(Protocol):
    """The ranks that hold the same weights and divide the tokens of long prompts."""

    def gather_parts(self, x: Tensor) -> list[Tensor]: ...
    def reduce_parts(self, x: Tensor) -> None: ...


class Adapters(Protocol):
    """The adapters that lie in slots, on this rank's device."""

    def add(self, matrix: int, x: Tensor, y: Tensor, rows: Any) -> None: ...


class Transformer:
    """One rank's model and its KV cache. `reduce` adds a tensor up over the ranks, in place; None: there is one.

    cache_blocks  (layers, num_kv_blocks, bytes) uint8: `cache_blocks[layer][block]` is all there is of a block in a
                  layer, its scales with it (kernels/paged_cache.py)
    host_blocks   the same of the host's blocks, where they are memory of another kind
    """

    def __init__(
        self,
        shape: ModelShape,
        weights: Weights,
        share: Share,
        *,
        num_kv_blocks: int,
        host_kv_blocks: int,
        block_size: int,
        kv_cache_dtype: str,
        max_model_len: int,
        tiles: TileTable,
        reduce: Callable[[Tensor], None] | None,
        parts: ContextPeers | None = None,
        adapters: Adapters | None = None,
        device: torch.device,
        activations: torch.dtype = torch.float32,
    ) -> None:
        self._is_last = share.is_last
        self._parts = parts
        self._shape = shape
        self._weights = weights
        self._reduce = reduce
        self._vocab = share.vocab
        self._adapters = adapters
        self._heads, self._kv_heads = len(share.heads), len(share.kv_heads)
        self._scale = shape.head_dim**-0.5
        self._on_gpu = placement.on_gpu(device)
        self._activations = activations
        self._cos, self._sin = (table.to(device) for table in rope_tables(shape, max_model_len))
        sizes = (kv_cache_dtype, block_size, self._kv_heads, shape.head_dim)
        layers, width = len(share.layers), block_bytes(*sizes)
        if self._on_gpu:
            self.cache_blocks = torch.zeros((layers, num_kv_blocks, width), dtype=torch.uint8, device=device)
            pinned = device.type == "cuda"
            self.host_blocks = torch.zeros((layers, host_kv_blocks, width), dtype=torch.uint8, pin_memory=pinned)
        else:
            # host blocks come behind those of the device, and no attention reads them: both are memory of this machine
            self.cache_blocks = zeros_on_huge_pages((layers, num_kv_blocks + host_kv_blocks, width), torch.uint8)
            self.host_blocks = self.cache_blocks[:, :0]
        self._cache = [PagedCache(layer, *sizes) for layer in self.cache_blocks]
        self._kv_cache_dtype = kv_cache_dtype
        self._decode_tiles = _by_bucket(tiles, "decode_attention", kv_cache_dtype, on_gpu=self._on_gpu)
        self._prefill_tiles = _by_bucket(tiles, "prefill_attention", kv_cache_dtype, on_gpu=self._on_gpu)
        self._decoder = self._whole()

    def _whole(self) -> Decoder | None:
        """The layers as one call, where nothing has to be done between their operators but on this rank's CPU."""
        shape, weights = self._shape, self._weights
        if self._on_gpu or self._reduce is not None or shape.experts is not None:
            return None
        layers = []
        for layer, cache in zip(weights.layers, self._cache):
            assert layer.gate_up is not None
            assert layer.down is not None
            norms = (layer.input_norm, layer.qkv, layer.q_norm, layer.k_norm, layer.o, layer.post_norm)
            layers.append(DecoderLayer(*norms, layer.gate_up, layer.down, cache))
        head = weights.head if self._is_last else None
        if not computes(layers, weights.embedding, head):
            return None
        angles, eps = (self._cos, self._sin), shape.rms_norm_eps
        return Decoder(layers, weights.embedding, weights.norm, head, *angles, self._heads, eps, self._scale)

    def use_tiles(self, tiles: TileTable) -> None:
        """Compute with other tiles from now on. Raises: BadTile, and nothing changed: the weights lack their layout."""
        decode = _by_bucket(tiles, "decode_attention", self._kv_cache_dtype, on_gpu=self._on_gpu)
        prefill = _by_bucket(tiles, "prefill_attention", self._kv_cache_dtype, on_gpu=self._on_gpu)
        self._weights = retiled(self._weights, tiles)
        self._decode_tiles, self._prefill_tiles = decode, prefill
        self._decoder = self._whole()

    def copy_blocks(self, copies: Tensor) -> None:
        """Copy whole blocks, one pair after the other: what one reads, a later one may overwrite.

        Args:
            copies: (C, 2) int32, from and to; from num_kv_blocks on they are host blocks.
        """
        for source, destination in copies.tolist():
            self._block(destination).copy_(self._block(source), non_blocking=True)

    def _block(self, number: int) -> Tensor:
        """(layers, bytes), on the device or, from its blocks on, on the host."""
        on_device = self.cache_blocks.shape[1]
        if number < on_device:
            return self.cache_blocks.select(1, number)
        return self.host_blocks.select(1, number - on_device)

    def forward(self, batch: Batch | ContextPart | DeviceBatch, hidden: Tensor | None = None) -> Tensor:
        """The step's keys and values into the cache, and the logits (head rows, this rank's vocabulary) fp32.

        After `copy_blocks`. On a GPU nothing in it waits for the GPU, so that a CUDA graph can hold a decode step.

        Args:
            hidden: (T, hidden) fp32, what the pipeline stage before gave; None on the first stage. Overwritten.
        Returns: the logits where this rank has the head; before the last stage what the next one takes as `hidden`.
        """
        weights, eps = self._weights, self._shape.rms_norm_eps
        if self._decoder is not None and isinstance(batch, Batch) and batch.adapter_rows is None:
            tokens = batch.token_ids.shape[0]
            tile = self._attention_tile(batch.decode_only, tokens)
            if tokens <= self._decoder.most_tokens and (tile is None or tile.backend == "cpp"):
                return self._decoder(batch, hidden, tile)
        residual = self._embedded(batch.token_ids) if hidden is None else hidden
        x = rms_norm(residual, weights.layers[0].input_norm, eps)
        last = len(weights.layers) - 1
        rows = batch.adapter_rows
        for index, layer in enumerate(weights.layers):
            x = self._attention(x, layer, index, batch)
            if index == last and self._is_last:  # of the last layer only the head's rows are ever read
                x, residual = x.index_select(0, batch.head_rows), residual.index_select(0, batch.head_rows)
                rows = batch.head_adapter_rows
            x = self._summed(self._adapted(x, layer.o, index, O_PROJ, rows))
            x = add_rms_norm(x, residual, layer.post_norm, eps)
            x = self._summed(self._mlp(x, layer, index, rows))
            norm = weights.norm if index == last else weights.layers[index + 1].input_norm
            x = add_rms_norm(x, residual, norm, eps)
        if not self._is_last:
            return residual
        if isinstance(batch, ContextPart):
            x = self._whole_head_rows(x, batch)
        return x if weights.head is None else linear(x, weights.head).float()

    def _mlp(self, x: Tensor, layer: LayerWeights, index: int, rows: AdapterRows | RowTiles | None) -> Tensor:
        """x (T, hidden) -> what this rank adds to (T, hidden): by its experts, its channels, or both."""
        experts, dense = layer.experts, None
        if layer.gate_up is not None and layer.down is not None:
            dense = swiglu(self._adapted(x, layer.gate_up, index, GATE_UP, rows))
            dense = self._adapted(dense, layer.down, index, DOWN, rows)
        if experts is None:
            assert dense is not None
            return dense
        shape = self._shape.experts
        assert shape is not None
        logits = linear(x.float(), experts.router)
        routing = route(logits[:, : shape.num_experts], shape.experts_per_token, shape.renormalize)
        out = moe(x, routing, experts.packed)
        return out if dense is None else out.addcmul_(dense, logits[:, shape.num_experts :].sigmoid())

    def _embedded(self, token_ids: Tensor) -> Tensor:
        """(T,) -> (T, hidden), summed over the ranks, of which one has the row of a token and the others add 0."""
        embedding = self._weights.embedding
        assert embedding is not None, "only the first stage embeds"
        if self._reduce is None:
            return embedding.index_select(0, token_ids).to(self._activations)
        own = (token_ids >= self._vocab.start) & (token_ids < self._vocab.stop)
        rows = embedding.index_select(0, (token_ids - self._vocab.start).where(own, 0)).to(self._activations)
        return self._summed(rows.where(own.unsqueeze(1), 0.0))

    def _attention(
        self, x: Tensor, layer: LayerWeights, index: int, batch: Batch | ContextPart | DeviceBatch
    ) -> Tensor:
        """x (T, hidden) -> what the heads of this rank read, (T, heads * head_dim)."""
        tokens, heads, kv_heads, head_dim = x.shape[0], self._heads, self._kv_heads, self._shape.head_dim
        qkv = self._adapted(x, layer.qkv, index, QKV, batch.adapter_rows).view(tokens, heads + 2 * kv_heads, head_dim)
        q, k, v = qkv.split_with_sizes((heads, kv_heads, kv_heads), 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            eps = self._shape.rms_norm_eps
            q = rms_norm(q.reshape(-1, head_dim), layer.q_norm, eps).view(tokens, heads, head_dim)
            k = rms_norm(k.reshape(-1, head_dim), layer.k_norm, eps).view(tokens, kv_heads, head_dim)
        cache = self._cache[index]
        rope_and_cache(q, k, v, batch.positions, self._cos, self._sin, cache, batch.slot_mapping)
        if isinstance(batch, ContextPart):
            self._exchange(index, batch)
        tile = self._attention_tile(batch.decode_only, tokens)
        if batch.decode_only:
            out = decode_attention(q, cache, batch.block_tables, batch.length, self._scale, tile)
        else:
            most = batch.max_query_rows if isinstance(batch, DeviceBatch) else None
            out = prefill_attention(
                q, cache, batch.block_tables, batch.query_start, batch.context_len, self._scale, tile,
                max_query_rows=most,
            )  # fmt: skip
        return out.view(tokens, heads * head_dim)

    def _attention_tile(self, decode_only: bool, tokens: int) -> Tile | None:
        tiles = self._decode_tiles if decode_only else self._prefill_tiles
        return tiles[(tokens - 1).bit_length() if tokens else 0]

    def _adapted(
        self, x: Tensor, weight: PackedLinear, layer: int, matrix: int, rows: AdapterRows | RowTiles | None
    ) -> Tensor:
        """The product with the base's weight, and what the adapters of some rows add to it."""
        y = linear(x, weight)
        if self._adapters is not None and rows is not None:
            self._adapters.add(layer * MATRICES + matrix, x, y, rows)
        return y

    def _exchange(self, index: int, batch: ContextPart) -> None:
        """The keys and values of the other parts' tokens into this rank's cache, as they lie in theirs."""
        assert self._parts is not None
        cache = self._cache[index]
        own = cache.stored(batch.slot_mapping)
        most = max(slots.shape[0] for slots in batch.part_slots)
        padded = torch.nn.functional.pad(own, (0, 0, 0, most - own.shape[0])).contiguous()
        for slots, part in zip(batch.part_slots, self._parts.gather_parts(padded)):
            cache.put_stored(slots, part[: slots.shape[0]])

    def _whole_head_rows(self, x: Tensor, batch: ContextPart) -> Tensor:
        """All head rows of the step, (num_heads, hidden), of which each part has computed some."""
        assert self._parts is not None
        rows = torch.zeros(batch.num_heads, x.shape[1])
        rows[batch.head_places] = x
        if batch.num_heads > 0:
            self._parts.reduce_parts(rows)
        return rows

    def _summed(self, x: Tensor) -> Tensor:
        if self._reduce is not None and x.shape[0] > 0:
            self._reduce(x)
        return x


def _by_bucket(tiles: TileTable, operator: str, precision: str, *, on_gpu: bool) -> tuple[Tile | None, ...]:
    """The table's tile for each power-of-two number of rows, index = exponent. Raises: BadTile: not for here."""
    having = ("cpp", "torch") if load() is not None else ("torch",)
    having = ("triton",) if on_gpu else having
    for backend in tiles.backends(operator, precision):
        if backend not in having:
            raise BadTile(f"{operator}: backend", backend, ", ".join(having), "run `paretune doctor` for the reason")
    return tuple(tiles.lookup(operator, precision, 1 << exponent) for exponent in range(_BUCKETS))
