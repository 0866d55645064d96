"""A planned step as tensors: which token stands where, which KV slot it fills, which blocks its request reads.

The plan of a step goes through one flat int32 array, the wire: `write_wire` fills it from the scheduler's state, tensor
parallel ranks receive it as it is, and `Batch.read` makes the same tensors of it on every rank. Layout:

    wire[0] requests S · wire[1] tokens T · wire[2] width B of the block tables · wire[3] what the head computes ·
    wire[4] blocks to copy C · wire[5] which model computes
    then  token ids (T) · tokens of each request (S) · tokens cached before (S) · of the last tokens those that sample
          (S) · adapter slot or -1 (S) · block tables (S, B) · copies (C, 2), as `Plan.copies` has them

The buffers are allocated once; a step only takes views of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.jit import bind, njit
from ..kernels.lora import AdapterRows, sort_by_slot
from .scheduler_state import BLOCK_SIZE, PLAN_COPIES, PLAN_SIZE, PREFIX_CACHING, Plan, State, new_plan
from .spec import Pool

ROWS = 0
TOKENS = 1
TABLE_WIDTH = 2
HEAD = 3
COPIES = 4
MODEL = 5
HEADER = 6

# wire[MODEL]
TARGET = 0
DRAFT = 1  # the model that proposes (draft_model.py)

# wire[HEAD]: what the last layer's rows are turned into
ARGMAX = 0  # the best token of each sampling row; ranks send one (logit, token) pair a row
LOGITS = 1  # the logits of each sampling row
ALL_LOGITS = 2  # the logits of every row, for tests and perplexity
FILL_SLOT = 3  # no step: put an adapter into a slot; see write_fill
_MOST_PATH_BYTES = 4096


def new_wire(pool: Pool) -> NDArray[np.int32]:
    """A wire that holds any step within the limits of `pool`."""
    tables = pool.max_num_seqs * -(-pool.max_model_len // pool.block_size)
    copies = new_plan(pool).copies.size
    tokens = most_tokens(pool)
    fill = HEADER + 3 + _MOST_PATH_BYTES // 4 if pool.max_loras else 0
    step = HEADER + tokens + 4 * pool.max_num_seqs + tables + copies
    return np.zeros(max(step, fill), np.int32)


def most_tokens(pool: Pool) -> int:
    """Most tokens of a step on the wire. A draft model may have to catch up with one token of each request besides."""
    return pool.max_num_batched_tokens + (pool.max_num_seqs if pool.draft_model else 0)


def used_places(header: Sequence[int]) -> int:
    """Places that a step takes of the wire, from its header."""
    rows = header[ROWS]
    return HEADER + header[TOKENS] + 4 * rows + rows * header[TABLE_WIDTH] + 2 * header[COPIES]


def write_fill(wire: NDArray[np.int32], slot: int, number: int, folder: Path) -> int:
    """Write that adapter `number`, which lies in `folder`, goes into a slot; returns the places it takes.

    In the place of token ids: slot, number, bytes of the path, and these, four a place.
    """
    path = os.fsencode(folder)
    packed = np.frombuffer(path + bytes(-len(path) % 4), np.int32)
    wire[:HEADER] = (0, 3 + len(packed), 0, FILL_SLOT, 0, TARGET)
    wire[HEADER : HEADER + 3] = (slot, number, len(path))
    wire[HEADER + 3 : HEADER + 3 + len(packed)] = packed
    return used_places(wire[:HEADER].tolist())


def read_fill(wire: NDArray[np.int32]) -> tuple[int, int, Path]:
    """Slot, number and folder that `write_fill` wrote."""
    slot, number, length = wire[HEADER : HEADER + 3].tolist()
    packed = wire[HEADER + 3 : HEADER + int(wire[TOKENS])]
    return slot, number, Path(os.fsdecode(packed.tobytes()[:length]))


@njit
def write_wire(
    state: State, plan: Plan, tokens: NDArray[np.int32], wire: NDArray[np.int32], head: int, model: int
) -> int:
    """Write a plan; returns how many places of the wire it takes.

    Args:
        tokens: arena of token ids; those of a request begin at its hash_start x block size, proposals behind them.
        head: ARGMAX, LOGITS or ALL_LOGITS.
        model: TARGET or DRAFT.
    """
    rows = plan.counts[PLAN_SIZE]
    block_size = state.limits[BLOCK_SIZE]
    place = HEADER
    width = 0
    for row in range(rows):
        slot = plan.slot[row]
        first = state.hash_start[slot] * block_size + plan.start[row]
        for i in range(plan.num_tokens[row]):
            wire[place + i] = tokens[first + i]
        place += plan.num_tokens[row]
        width = max(width, (plan.start[row] + plan.num_tokens[row] + block_size - 1) // block_size)
    wire[ROWS] = rows
    wire[TOKENS] = place - HEADER
    wire[TABLE_WIDTH] = width
    wire[HEAD] = head
    wire[COPIES] = plan.counts[PLAN_COPIES]
    wire[MODEL] = model
    for row in range(rows):
        wire[place + row] = plan.num_tokens[row]
        wire[place + rows + row] = plan.start[row]
        wire[place + 2 * rows + row] = 1 + plan.num_drafts[row] if plan.samples[row] else 0
        wire[place + 3 * rows + row] = state.adapter_slot[plan.slot[row]]
    place += 4 * rows
    for row in range(rows):
        slot = plan.slot[row]
        held = min(width, state.num_blocks[slot])
        table = state.block_table[state.lane[slot]]
        for i in range(held):
            wire[place + i] = table[i]
        for i in range(held, width):
            wire[place + i] = 0
        place += width
    for i in range(plan.counts[PLAN_COPIES]):
        wire[place] = plan.copies[i, 0]
        wire[place + 1] = plan.copies[i, 1]
        place += 2
    return int(place)


@njit
def _expand(
    wire: NDArray[np.int32],
    block_size: int,
    token_ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    slots: NDArray[np.int64],
    query_start: NDArray[np.int32],
    lengths: NDArray[np.int32],
    head_rows: NDArray[np.int64],
    adapter_slots: NDArray[np.int32],
) -> int:
    """Fill the arrays of a Batch from a wire; returns the number of head rows."""
    rows, tokens, width = wire[ROWS], wire[TOKENS], wire[TABLE_WIDTH]
    counts = HEADER + tokens
    tables = counts + 4 * rows
    place = 0
    heads = 0
    query_start[0] = 0
    for row in range(rows):
        n, start = wire[counts + row], wire[counts + rows + row]
        for i in range(n):
            position = np.int64(start) + i
            block = np.int64(wire[tables + row * width + position // block_size])
            token_ids[place + i] = wire[HEADER + place + i]
            positions[place + i] = position
            slots[place + i] = block * block_size + position % block_size
            adapter_slots[place + i] = wire[counts + 3 * rows + row]
        place += n
        query_start[row + 1] = place
        lengths[row] = start + n
        sampled = n if wire[HEAD] == ALL_LOGITS else wire[counts + 2 * rows + row]
        for i in range(sampled):
            head_rows[heads + i] = place - sampled + i
        heads += sampled
    return int(heads)


class Batch:
    """The tensors of one step: T tokens of S requests, those of a request one after the other.

    Views of buffers that the next `read` overwrites.

    token_ids, positions  (T,) int64
    slot_mapping          (T,) int64    block * block_size + offset in the KV cache
    query_start           (S + 1,) int32
    context_len           (S,) int32    tokens in the cache before the step
    length                (S,) int32    tokens in the cache after it
    block_tables          (S, B) int32
    head_rows             (H,) int64    tokens whose hidden state the head sees
    copies                (C, 2) int32  blocks to copy before anything is computed, from and to, in order
    head                  what it makes of them: ARGMAX, LOGITS or ALL_LOGITS
    model                 TARGET or DRAFT
    adapter_slots         (T,) int32    where each token's adapter lies, -1: it has none
    adapter_rows          which tokens have which adapter; None: none has one
    head_adapter_rows     the same of head_rows
    decode_only           every request computes one token
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    context_len: Tensor
    length: Tensor
    block_tables: Tensor
    head_rows: Tensor
    copies: Tensor
    head: int
    model: int
    adapter_slots: NDArray[np.int32]
    adapter_rows: AdapterRows | None
    head_adapter_rows: AdapterRows | None
    decode_only: bool

    def __init__(self, pool: Pool) -> None:
        self.wire = new_wire(pool)
        self.max_loras = pool.max_loras
        self._block_size = pool.block_size
        tokens, seqs = most_tokens(pool), pool.max_num_seqs
        self._arrays = (
            np.zeros(tokens, np.int64),
            np.zeros(tokens, np.int64),
            np.zeros(tokens, np.int64),
            np.zeros(seqs + 1, np.int32),
            np.zeros(seqs, np.int32),
            np.zeros(tokens, np.int64),
            np.zeros(tokens, np.int32),
        )
        self._sorted, self._head_sorted = _Sorted(tokens, pool.max_loras), _Sorted(tokens, pool.max_loras)
        self._tensors = tuple(torch.from_numpy(array) for array in self._arrays)
        self.wire_tensor = torch.from_numpy(self.wire)
        self._expand = bind(_expand, self.wire, self._block_size, *self._arrays)
        self._sizes: tuple[int, ...] = ()  # of the views there are

    def read(self) -> None:
        """Take the step that lies in `wire`."""
        rows, tokens, width, self.head, copies, self.model = self.wire[:HEADER].tolist()
        heads = self._expand()
        sizes = (rows, tokens, width, heads, copies)
        if sizes != self._sizes:  # of a step as large as the last one they are the same views: 30 us
            self._take_views(*sizes)
            self._sizes = sizes
        head_places, adapter_slots = self._arrays[-2:]
        self.adapter_slots = adapter_slots[:tokens]
        self.adapter_rows = self._sorted.read(self.adapter_slots)
        self.head_adapter_rows = None
        if self.adapter_rows is not None:
            self.head_adapter_rows = self._head_sorted.read(adapter_slots[head_places[:heads]])

    def _take_views(self, rows: int, tokens: int, width: int, heads: int, num_copies: int) -> None:
        token_ids, positions, slots, query_start, lengths, head_rows, _ = self._tensors
        counts = HEADER + tokens
        tables = counts + 4 * rows
        self.token_ids, self.positions, self.slot_mapping = token_ids[:tokens], positions[:tokens], slots[:tokens]
        self.query_start, self.length, self.head_rows = query_start[: rows + 1], lengths[:rows], head_rows[:heads]
        self.context_len = self.wire_tensor[counts + rows : counts + 2 * rows]
        self.block_tables = self.wire_tensor[tables : tables + rows * width].view(rows, width)
        copies = tables + rows * width
        self.copies = self.wire_tensor[copies : copies + 2 * num_copies].view(-1, 2)
        self.decode_only = rows == tokens


class _Sorted:
    """Buffers of AdapterRows."""

    def __init__(self, tokens: int, max_loras: int) -> None:
        sizes = (max_loras, tokens, max_loras + 1, max_loras)
        self._arrays = tuple(np.zeros(size, np.int32) for size in sizes)
        self._tensors = tuple(torch.from_numpy(array) for array in self._arrays[1:])

    def read(self, slot_of_row: NDArray[np.int32]) -> AdapterRows | None:
        if not len(self._arrays[0]):
            return None
        groups = sort_by_slot(slot_of_row, *self._arrays)
        row, start, slot = self._tensors
        return AdapterRows(row, start[: groups + 1], slot[:groups]) if groups else None


@njit
def append_tokens(
    state: State,
    plan: Plan,
    tokens: NDArray[np.int32],
    num_cached: NDArray[np.int64],
    full: NDArray[np.int64],
    new_tokens: NDArray[np.int64],
) -> int:
    """Between `schedule` and `commit`: put the tokens that are kept behind those of their requests.

    Args:
        tokens: the arena, as in write_wire.
        num_cached: (slots,) set for requests that get their first token.
        full: (max_num_seqs, 2) filled with the slots of requests whose tokens, the new ones too, fill blocks that have
            no hash yet, and how many these blocks are. The newest block may be computed only by the next step, which
            names it (policy vllm_v1).
        new_tokens: (sampled,) in the order of the plan, one of each sampling row and one for each of its proposals; of
            a row's the first `plan.accepted` are kept.
    Returns: how many of `full` there are.
    """
    block_size = state.limits[BLOCK_SIZE]
    caching = state.limits[PREFIX_CACHING] != 0
    sampled = 0
    found = 0
    for row in range(plan.counts[PLAN_SIZE]):
        slot = plan.slot[row]
        known = state.num_tokens[slot]
        if plan.samples[row]:
            first = state.hash_start[slot] * block_size + known
            for i in range(plan.accepted[row]):
                tokens[first + i] = new_tokens[sampled + i]
            known += plan.accepted[row]
            sampled += 1 + plan.num_drafts[row]
            if state.num_tokens[slot] == state.num_prompt_tokens[slot]:
                num_cached[slot] = state.num_cached_tokens[slot]
        if caching and known // block_size > state.num_hashes[slot]:
            full[found, 0] = slot
            full[found, 1] = known // block_size
            found += 1
    return found


@njit
def step_work(plan: Plan) -> tuple[float, float]:
    """What attention of a step reads and computes, as `profiler.step_time.composed_time_s` counts it.

    Returns: tokens whose KV the one-token rows read, their own included; query-key pairs of the other rows.
    """
    decode_context = 0.0
    prefill_pairs = 0.0
    for row in range(plan.counts[PLAN_SIZE]):
        start, tokens = plan.start[row], plan.num_tokens[row]
        if tokens == 1:
            decode_context += start + 1
        else:
            prefill_pairs += tokens * start + tokens * (tokens + 1) / 2
    return decode_context, prefill_pairs
