"""Where the time of every request goes: each second between its scheduled arrival and its last token in one part.

Counted while the simulator steps (step_record.py), compiled with it:

- before its first step it queues, for the reason that the scheduler had in each step meanwhile;
- a step of its own divides into what it would take alone, what others' decodes add, and what others' prompts add to
  that: differences of the step's time without them, so that they add up to the step;
- between its steps it waits for the steps of others, or for blocks after it was preempted.

Each part stands in seconds by resource (step_limits.RESOURCES); a difference counts to the resources that grew.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit, njit_called
from ..runtime import kv_cache, waiting_queue
from ..runtime.request_blocks import blocks_of
from ..runtime.scheduler_state import (
    CHUNKED_PREFILL,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    NUM_RUNNING,
    NUM_WAITING,
    PLAN_PREEMPTED,
    PLAN_SIZE,
    PLAN_TOKENS,
    Plan,
    State,
)
from .loop_notes import Requests
from .step_limits import BANDWIDTH, HOST, LINKS, RESOURCES, LimitTables
from .step_time import WORK_GRID, composition, grid_place, row_pairs

PARTS = (
    "to_scheduler",
    "queue_seats",
    "queue_tokens",
    "queue_blocks",
    "queue_adapters",
    "queue_step",
    "prefill",
    "decode",
    "others_prefill",
    "others_decode",
    "recompute",
    "preempted",
    "draft",
    "copies",
    "adapters",
    "pipeline",
    "to_client",
)
(
    TO_SCHEDULER,
    QUEUE_SEATS,
    QUEUE_TOKENS,
    QUEUE_BLOCKS,
    QUEUE_ADAPTERS,
    QUEUE_STEP,
    PREFILL,
    DECODE,
    OTHERS_PREFILL,
    OTHERS_DECODE,
    RECOMPUTE,
    PREEMPTED,
    DRAFT,
    COPIES,
    ADAPTERS,
    PIPELINE,
    TO_CLIENT,
) = range(len(PARTS))

_REASONS = 4  # to queue, in the order of the parts from QUEUE_SEATS on
_BY_PREFILL, _BY_DECODE = 4, 5  # places in a replica's sums, behind the reasons
_LAST = 6  # of the last step alone
SUMS_ROWS = 7

# what a request waits for between its steps
QUEUES, WAS_PREEMPTED, RUNS = 0, 1, 2

# rows of the scratch
_FULL, _DECODES, _WITH, _ALONE, _DRAFT, _COPIES, _ADAPTERS = range(7)
SCRATCH_ROWS = 7

# columns of the step log
STEP_FLOATS = ("started_s", "ended_s", "decode_context", "prefill_pairs", *RESOURCES)
STEP_INTS = (
    "replica", "num_tokens", "num_rows", "num_samples", "prefill_tokens", "running", "waiting", "kv_blocks_used",
    "preempted",
)  # fmt: skip


class Record(NamedTuple):
    """What is written down, n requests.

    parts     (n, len(PARTS), 4) float64  seconds so far
    at_first, at_kth  the same when the first and the k-th token came
    at_token  the same at the last token so far; of no request where no gaps are asked for
    seen      (n, SUMS_ROWS, 4) float64  the sums of its replica when it was last counted
    last_s    (n,) float64  until when its time is counted
    token_s   (n,) float64  its last token so far
    waits     (n,) int64    what it waits for
    computed  (n,) int64    tokens whose KV was computed once
    gaps      (g,) float64  time between two tokens, all requests together
    band      (2,) float64  gaps from the one to the other are taken apart
    band_parts (len(PARTS), 4) float64 their parts, summed;  band_sum (2,) float64 how many, and their seconds
    floats, ints  (m, ...)  the step log: STEP_FLOATS and STEP_INTS by step
    counts    (2,) int64    steps and gaps written
    scratch   (SCRATCH_ROWS, 4) float64
    """

    parts: NDArray[np.float64]
    at_first: NDArray[np.float64]
    at_kth: NDArray[np.float64]
    at_token: NDArray[np.float64]
    seen: NDArray[np.float64]
    last_s: NDArray[np.float64]
    token_s: NDArray[np.float64]
    waits: NDArray[np.int64]
    computed: NDArray[np.int64]
    gaps: NDArray[np.float64]
    band: NDArray[np.float64]
    band_parts: NDArray[np.float64]
    band_sum: NDArray[np.float64]
    floats: NDArray[np.float64]
    ints: NDArray[np.int64]
    counts: NDArray[np.int64]
    scratch: NDArray[np.float64]


class ReplicaSums(NamedTuple):
    """What a replica's steps took so far, by resource, and how it stood when its steps under way were planned.

    seconds  (7, 4) float64: by the reason that others queued for (4), what prompts took of the steps, what decodes
             took of them, and the last step
    """

    seconds: NDArray[np.float64]
    number: int
    reason: NDArray[np.int64]  # (stages,)
    began_s: NDArray[np.float64]  # (stages,)
    adapters_s: NDArray[np.float64]  # (stages,)
    stood: NDArray[np.int64]  # (stages, 4): running, waiting, KV blocks used, preempted


@njit
def _at(table: NDArray[np.float64], resource: int, work: float) -> float:
    """`step_time.interpolate` of one row."""
    if work <= 0.0:
        return 0.0
    if work <= 1.0:
        return float(table[resource, 0] * work)
    place = grid_place(work)
    low, high = WORK_GRID[place], WORK_GRID[place + 1]
    step = table[resource, place + 1] - table[resource, place]
    return float(table[resource, place] + step * (work - low) / (high - low))


@njit_called
def _split(
    limits: LimitTables,
    scratch: NDArray[np.float64],
    row: int,
    tokens: int,
    rows: int,
    samples: int,
    context: float,
    pairs: float,
) -> float:
    """`composed_time_s` by resource into a row of the scratch; returns the sum. A step of no rows takes no time."""
    resources = scratch.shape[1]
    total = 0.0
    for r in range(resources):
        scratch[row, r] = 0.0
        if rows > 0:
            scratch[row, r] = (
                limits.tokens_s[r, tokens]
                + limits.rows_s[r, rows]
                + limits.samples_s[r, samples]
                + _at(limits.decode_attention_s, r, context)
                + _at(limits.prefill_attention_s, r, pairs)
            )
        total += scratch[row, r]
    return total


@njit_called
def _add_change(
    parts: NDArray[np.float64],
    scratch: NDArray[np.float64],
    request: int,
    part: int,
    more: int,
    more_s: float,
    less: int,
    less_s: float,
    factor: float,
) -> None:
    """Count what a composition takes beyond another to a part of a request, on the resources that grew."""
    resources = scratch.shape[1]
    grown = 0.0
    for r in range(resources):
        grown += max(0.0, scratch[more, r] - scratch[less, r])
    change_s = (more_s - less_s) * factor
    for r in range(resources):
        if grown > 0.0:
            share = max(0.0, scratch[more, r] - scratch[less, r]) / grown
        else:
            share = scratch[more, r] / more_s if more_s > 0.0 else 0.25
        parts[request, part, r] += change_s * share


@njit_called
def _see(
    seen: NDArray[np.float64], last_s: NDArray[np.float64], seconds: NDArray[np.float64], request: int, now_s: float
) -> None:
    last_s[request] = now_s
    for i in range(seconds.shape[0]):
        for r in range(seconds.shape[1]):
            seen[request, i, r] = seconds[i, r]


@njit_called
def count_wait(record: Record, sums: ReplicaSums, stages: int, request: int, now_s: float) -> None:
    """Count the time since a request was last counted to what it waited for."""
    resources = sums.seconds.shape[1]
    wait_s = now_s - record.last_s[request]
    if wait_s > 0.0:
        waits = record.waits[request]
        first, last = (_BY_PREFILL, _BY_DECODE + 1) if waits == RUNS else (0, _REASONS)
        total = 0.0
        for i in range(first, last):
            for r in range(resources):
                total += sums.seconds[i, r] - record.seen[request, i, r]
        for i in range(first, last):
            if waits == QUEUES:
                part = QUEUE_SEATS + i
            elif waits == WAS_PREEMPTED:
                part = PREEMPTED
            elif stages > 1:
                part = PIPELINE
            else:
                part = OTHERS_PREFILL if i == _BY_PREFILL else OTHERS_DECODE
            for r in range(resources):
                if total > 0.0:
                    # steps of a pipeline overlap: they add up to more than the time that passed
                    taken_s = (sums.seconds[i, r] - record.seen[request, i, r]) * wait_s / total
                    record.parts[request, part, r] += taken_s
        if total <= 0.0:
            part = QUEUE_STEP if waits == QUEUES else PREEMPTED if waits == WAS_PREEMPTED else PIPELINE
            record.parts[request, part, HOST] += wait_s
    _see(record.seen, record.last_s, sums.seconds, request, now_s)


@njit_called
def count_arrivals(
    record: Record,
    sums: ReplicaSums,
    requests: Requests,
    queue: NDArray[np.int64],
    first: int,
    behind: int,
    now_s: float,
    idle_s: float,
) -> None:
    """Count what lies before the scheduler saw newcomers: the way to it, and the rest of the step under way. Where no
    step was for the last idle_s seconds the replica woke up meanwhile."""
    resources = sums.seconds.shape[1]
    last_s = 0.0
    for r in range(resources):
        last_s += sums.seconds[_LAST, r]
    for place in range(first, behind):
        request = queue[place]
        arrival_s = requests.arrival_s[request]
        waking_s = min(idle_s, now_s - arrival_s)
        record.parts[request, TO_SCHEDULER, HOST] += arrival_s - requests.scheduled_s[request] + waking_s
        for r in range(resources):
            share = sums.seconds[_LAST, r] / last_s if last_s > 0.0 else 0.25
            record.parts[request, QUEUE_STEP, r] += (now_s - arrival_s - waking_s) * share
        record.waits[request] = QUEUES
        _see(record.seen, record.last_s, sums.seconds, request, now_s)


@njit
def why_they_queue(state: State, plan: Plan) -> int:
    """What keeps the first of those that wait out of the step just planned, as a place among the reasons."""
    if state.counts[NUM_WAITING] == 0 or state.counts[NUM_RUNNING] >= state.limits[MAX_NUM_SEQS]:
        return QUEUE_SEATS - QUEUE_SEATS
    place = waiting_queue.first_place(state)
    if place < 0:
        return QUEUE_ADAPTERS - QUEUE_SEATS
    if plan.counts[PLAN_PREEMPTED] > 0:
        return QUEUE_BLOCKS - QUEUE_SEATS
    if plan.counts[PLAN_TOKENS] >= state.limits[MAX_NUM_BATCHED_TOKENS]:
        return QUEUE_TOKENS - QUEUE_SEATS
    slot = waiting_queue.at(state, place)
    lacking = blocks_of(state, state.num_tokens[slot]) > kv_cache.num_available(state.blocks)
    if not lacking and state.limits[CHUNKED_PREFILL] == 0:
        return QUEUE_TOKENS - QUEUE_SEATS
    return QUEUE_BLOCKS - QUEUE_SEATS


@njit
def _generates(state: State, plan: Plan, row: int) -> bool:
    """Whether a row brings the next token of an answer that has begun; any other computes a prompt, perhaps again."""
    slot = plan.slot[row]
    own = plan.num_tokens[row] - plan.num_drafts[row]
    return bool(plan.samples[row] and own == 1 and state.num_tokens[slot] > state.num_prompt_tokens[slot])


@njit_called
def count_step(
    state: State,
    plan: Plan,
    limits: LimitTables,
    draft_limits: LimitTables,
    drafts: bool,
    beside: tuple[float, float, float],
    record: Record,
    sums: ReplicaSums,
    number: int,
    stages: int,
    k: int,
    now_s: float,
) -> None:
    """Count a step that has been computed, before it is committed, to the parts of those in it; and write it down.

    beside: seconds of copying blocks, of filling adapters' slots, and of the adapters' products.
    """
    copied_s, filled_s, adapters_s = beside
    scratch = record.scratch
    resources = scratch.shape[1]
    size = plan.counts[PLAN_SIZE]
    tokens = plan.counts[PLAN_TOKENS]
    samples, context, pairs = composition(plan, limits.prompt_pairs)
    prefill_tokens = 0
    d_tokens, d_rows, d_samples, d_context, d_pairs = 0, 0, 0, 0.0, 0.0
    for row in range(size):
        samples += plan.num_drafts[row] * plan.samples[row]
        if _generates(state, plan, row):
            own = plan.num_tokens[row]
            d_tokens += own
            d_rows += 1
            d_samples += 1 + plan.num_drafts[row]
            if own == 1:
                d_context += plan.start[row] + 1
            else:
                d_pairs += row_pairs(own, plan.start[row], limits.prompt_pairs)
        else:
            prefill_tokens += plan.num_tokens[row]
    full_s = _split(limits, scratch, _FULL, tokens, size, samples, context, pairs)
    decodes_s = _split(limits, scratch, _DECODES, d_tokens, d_rows, d_samples, d_context, d_pairs)
    draft_s = 0.0
    for r in range(resources):
        scratch[_DRAFT, r] = 0.0
        scratch[_COPIES, r] = copied_s if r == LINKS else 0.0
        scratch[_ADAPTERS, r] = filled_s if r == LINKS else adapters_s if r == BANDWIDTH else 0.0
    if drafts:
        for r in range(resources):
            scratch[_DRAFT, r] = _draft_s(draft_limits, plan, r)
            draft_s += scratch[_DRAFT, r]
    step_s = full_s + draft_s + copied_s + filled_s + adapters_s
    began_s = sums.began_s[number]

    grown = 0.0
    for r in range(resources):
        grown += max(0.0, scratch[_FULL, r] - scratch[_DECODES, r])
    for r in range(resources):
        beside_s = scratch[_DRAFT, r] + scratch[_COPIES, r] + scratch[_ADAPTERS, r]
        sums.seconds[sums.reason[number], r] += scratch[_FULL, r] + beside_s
        sums.seconds[_BY_DECODE, r] += scratch[_DECODES, r] + beside_s
        if grown > 0.0:
            share = max(0.0, scratch[_FULL, r] - scratch[_DECODES, r]) / grown
            sums.seconds[_BY_PREFILL, r] += (full_s - decodes_s) * share
        sums.seconds[_LAST, r] = scratch[_FULL, r] + beside_s

    for row in range(size):
        slot = plan.slot[row]
        request = state.request_id[slot]
        own, drafted, start = plan.num_tokens[row], plan.num_drafts[row], plan.start[row]
        own_samples = (1 + drafted) * plan.samples[row]
        own_context = start + 1.0 if own == 1 else 0.0
        own_pairs = 0.0 if own == 1 else row_pairs(own, start, limits.prompt_pairs)
        alone_s = _split(limits, scratch, _ALONE, own, 1, own_samples, own_context, own_pairs)
        # in a pipeline a step waits for those begun before it, and a prompt may have a part in several at once
        span_s = now_s - record.last_s[request] if stages > 1 else step_s
        factor = min(1.0, span_s / step_s) if stages > 1 else 1.0
        if _generates(state, plan, row):
            for r in range(resources):
                record.parts[request, DECODE, r] += scratch[_ALONE, r] * factor
            _add_change(record.parts, scratch, request, OTHERS_DECODE, _DECODES, decodes_s, _ALONE, alone_s, factor)
            _add_change(record.parts, scratch, request, OTHERS_PREFILL, _FULL, full_s, _DECODES, decodes_s, factor)
        else:
            known = min(max(0, record.computed[request] - start), own)
            again = known / own
            # who was preempted computes its prompt and answer again, and with the last of them the next token
            fresh = DECODE if state.num_tokens[slot] > state.num_prompt_tokens[slot] else PREFILL
            for r in range(resources):
                record.parts[request, fresh, r] += scratch[_ALONE, r] * (1.0 - again) * factor
                record.parts[request, RECOMPUTE, r] += scratch[_ALONE, r] * again * factor
            with_s = _split(
                limits,
                scratch,
                _WITH,
                d_tokens + own,
                d_rows + 1,
                d_samples + own_samples,
                d_context + own_context,
                d_pairs + own_pairs,
            )
            _add_change(record.parts, scratch, request, OTHERS_DECODE, _WITH, with_s, _ALONE, alone_s, factor)
            _add_change(record.parts, scratch, request, OTHERS_PREFILL, _FULL, full_s, _WITH, with_s, factor)
        for r in range(resources):
            record.parts[request, DRAFT, r] += scratch[_DRAFT, r] * factor
            record.parts[request, COPIES, r] += scratch[_COPIES, r] * factor
            record.parts[request, ADAPTERS, r] += scratch[_ADAPTERS, r] * factor
            if span_s > step_s:
                record.parts[request, PIPELINE, r] += (span_s - step_s) * sums.seconds[_LAST, r] / step_s
        _see(record.seen, record.last_s, sums.seconds, request, now_s)
        kept = state.num_tokens[slot] + plan.accepted[row] - 1 if plan.samples[row] else start + own
        record.computed[request] = max(record.computed[request], kept)
        if plan.samples[row]:
            before = state.num_tokens[slot] - state.num_prompt_tokens[slot]
            _note_parts(record, request, before, plan.accepted[row], k, now_s)
    line = record.counts[0]
    record.counts[0] += 1
    record.floats[line, 0] = began_s
    record.floats[line, 1] = now_s
    record.floats[line, 2] = context
    record.floats[line, 3] = pairs
    for r in range(resources):
        record.floats[line, 4 + r] = sums.seconds[_LAST, r]
    record.ints[line, 0] = sums.number
    record.ints[line, 1] = tokens
    record.ints[line, 2] = size
    record.ints[line, 3] = samples
    record.ints[line, 4] = prefill_tokens
    for i in range(4):
        record.ints[line, 5 + i] = sums.stood[number, i]


@njit_called
def _draft_s(limits: LimitTables, plan: Plan, resource: int) -> float:
    """`speculative_loop.draft_time_s` of one resource."""
    tokens, samples, deepest = 0, 0, 0
    context = pairs = 0.0
    for row in range(plan.counts[PLAN_SIZE]):
        drafted = plan.num_drafts[row]
        own = plan.num_tokens[row] - drafted
        tokens += own
        samples += drafted > 0
        deepest = max(deepest, drafted)
        if own == 1:
            context += plan.start[row] + 1
        else:
            pairs += own * (plan.start[row] + 0.5 * (own + 1))
    total_s = _one(limits, resource, tokens, plan.counts[PLAN_SIZE], samples, context, pairs)
    for done in range(1, deepest):
        rows, context = 0, 0.0
        for row in range(plan.counts[PLAN_SIZE]):
            if plan.num_drafts[row] > done:
                rows += 1
                context += plan.start[row] + 1 + done
        total_s += _one(limits, resource, rows, rows, rows, context, 0.0)
    return total_s


@njit
def _one(limits: LimitTables, r: int, tokens: int, rows: int, samples: int, context: float, pairs: float) -> float:
    return float(
        limits.tokens_s[r, tokens]
        + limits.rows_s[r, rows]
        + limits.samples_s[r, samples]
        + _at(limits.decode_attention_s, r, context)
        + _at(limits.prefill_attention_s, r, pairs)
    )


@njit_called
def _note_parts(record: Record, request: int, before: int, accepted: int, k: int, now_s: float) -> None:
    """Keep the parts where a metric ends: at the first, at the k-th token, and at every token where gaps are asked."""
    resources = record.scratch.shape[1]
    for part in range(record.parts.shape[1]):
        for r in range(resources):
            if before == 0:
                record.at_first[request, part, r] = record.parts[request, part, r]
            if before < k <= before + accepted:
                record.at_kth[request, part, r] = record.parts[request, part, r]
    if record.at_token.shape[0] == 0:
        return
    for more in range(accepted):
        if before + more > 0:
            gap_s = now_s - record.token_s[request] if more == 0 else 0.0
            record.gaps[record.counts[1]] = gap_s
            record.counts[1] += 1
            if record.band[0] <= gap_s <= record.band[1]:
                record.band_sum[0] += 1.0
                record.band_sum[1] += gap_s
                for part in range(record.parts.shape[1]):
                    for r in range(resources):
                        if more == 0:
                            change_s = record.parts[request, part, r] - record.at_token[request, part, r]
                            record.band_parts[part, r] += change_s
    record.token_s[request] = now_s
    for part in range(record.parts.shape[1]):
        for r in range(resources):
            record.at_token[request, part, r] = record.parts[request, part, r]
