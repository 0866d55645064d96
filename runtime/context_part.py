"""Context parallelism: the part of a step with a long prompt that one of several ranks computes.

Each long run of tokens is cut into twice as many pieces as there are parts, and part p gets piece p from the front and
piece p from the back: under the causal mask the query-key pairs of such a pair are the same for every part (as in the
zigzag form of ring attention, Liu et al., arXiv:2310.01889, and Llama 3's training, arXiv:2407.21783, 3.3.2). Each rank
computes q, k and v of its tokens, all of them exchange k and v, and each attends with its queries to the whole context
in its own cache.

What it saves is time: the linear layers and the attention of long prompts are divided among the ranks. It saves no
memory: every rank holds the layers and the KV cache whole. Steps without a long prompt are computed by every rank
alike, so that all caches stay complete; decoding is neither faster nor slower for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.lora import AdapterRows, adapter_rows
from .batch import Batch

# tokens of one request in one step from which the exchange of their keys and values, 0.2 to 0.4 ms a layer over gloo on
# loopback (2 ranks, two busy Zen 4 cores), is a tenth of the layer's work or less (hidden size 512)
LONG_PROMPT = 64


@dataclass(frozen=True, eq=False)
class ContextPart:
    """The tensors of one rank's part of a step, under the names of `Batch`; a piece of a request is a row of its own.

    part_slots   for each part the slots in the KV cache that its tokens fill
    head_places  (rows of head_rows,) which of the step's head rows they are
    num_heads    head rows of the whole step
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    context_len: Tensor
    length: Tensor
    block_tables: Tensor
    copies: Tensor
    head_rows: Tensor
    head: int
    adapter_rows: AdapterRows | None
    head_adapter_rows: AdapterRows | None
    decode_only: bool
    part_slots: tuple[Tensor, ...]
    head_places: Tensor
    num_heads: int


def context_part(batch: Batch, part: int, parts: int) -> ContextPart | None:
    """The part `part` of a step that is divided into `parts`; None: every rank computes the whole step."""
    query_start = batch.query_start.numpy()
    counts = np.diff(query_start)
    if len(counts) == 0 or counts.max() < max(LONG_PROMPT, 2 * parts):
        return None
    pieces = divided(counts, parts)
    tokens = [np.concatenate([query_start[row] + np.arange(a, b) for row, a, b in own]) for own in pieces]
    rows, first, last = np.array(pieces[part], np.int64).T
    own = torch.from_numpy(tokens[part].astype(np.int64))
    context = batch.context_len[rows] + torch.from_numpy(first.astype(np.int32))
    lengths = torch.from_numpy((last - first).astype(np.int32))
    place_of = torch.full(batch.token_ids.shape, -1, dtype=torch.int64)
    place_of[own] = torch.arange(len(own))
    head_places = (place_of[batch.head_rows] >= 0).nonzero()[:, 0]
    head_rows = batch.head_rows[head_places]
    return ContextPart(
        token_ids=batch.token_ids[own],
        positions=batch.positions[own],
        slot_mapping=batch.slot_mapping[own],
        query_start=torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)]),
        context_len=context,
        length=context + lengths,
        block_tables=batch.block_tables[rows],
        copies=batch.copies,
        head_rows=place_of[head_rows],
        head=batch.head,
        adapter_rows=adapter_rows(batch.adapter_slots[tokens[part]], batch.max_loras),
        head_adapter_rows=adapter_rows(batch.adapter_slots[head_rows.numpy()], batch.max_loras),
        decode_only=False,
        part_slots=tuple(batch.slot_mapping[torch.from_numpy(each)] for each in tokens),
        head_places=head_places,
        num_heads=batch.head_rows.shape[0],
    )


def divided(counts: NDArray[np.integer], parts: int) -> list[list[tuple[int, int, int]]]:
    """For each part its pieces (row, first token, token after the last), none of them empty.

    Args:
        counts: (S,) tokens of each row; rows of fewer than 2 * parts go whole to the part with the fewest tokens.
    """
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(parts)]
    load = [0] * parts
    short = []
    for row, count in enumerate(counts.tolist()):
        if count < 2 * parts:
            short.append((row, count))
            continue
        ends = [count * i // (2 * parts) for i in range(2 * parts + 1)]
        for part in range(parts):
            for piece in (part, 2 * parts - 1 - part):
                found[part].append((row, ends[piece], ends[piece + 1]))
                load[part] += ends[piece + 1] - ends[piece]
    for row, count in short:
        part = load.index(min(load))
        found[part].append((row, 0, count))
        load[part] += count
    return found
