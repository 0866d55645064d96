"""Step time by what stands in the batch: attention of rows together, experts, and ranks that step in time.

On a GPU the attention of a step is one kernel over all rows, and no sum over them: how long it takes depends on how
many rows there are and how long each is, prompts beside decode rows make it another kernel, and one row much longer
than the others keeps it waiting. Compiled together with the event loop, as step_time.py is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit
from ..runtime.scheduler_state import PLAN_SIZE, PLAN_TOKENS, Plan


class AttentionTimes(NamedTuple):
    """Attention of one step, all layers, in seconds, at the points of ascending axes; linear between them.

    prompt          (p,) float64  tokens of the row with the longest chunk; the first point is the smallest chunk
    cached          (c,) float64  tokens before this chunk
    rows            (n,) float64  decode rows, from 1
    context         (m,) float64  mean context of the decode rows
    prefill_s       (p, c, 1, 1)  a chunk alone
    decode_s        (1, 1, n, m)  decode rows alone
    mixed_s         (p, c, n, m)  a chunk beside decode rows

    One decode row longer than the others holds the step up. Of the way from the time at the mean context to the time at
    the longest it takes the share `skew`, by
    skew_prompt (q,), with 0 for none; skew_rows (k,), longest (l,) tokens of the longest row, and
    spread (r,): v / (1 + v) of the variance v of contexts over the squared distance of the longest from the mean, which
    is the share of long rows where there are but two lengths.
    skew            (q, k, l, r)
    split_rows      decode rows from which the kernel no longer divides a context among blocks: between two points of
                    skew_rows the share of the lower holds below it, that of the higher from there; 0 where that is not
                    known, and the share is interpolated
    """

    prompt: NDArray[np.float64]
    cached: NDArray[np.float64]
    rows: NDArray[np.float64]
    context: NDArray[np.float64]
    prefill_s: NDArray[np.float64]
    decode_s: NDArray[np.float64]
    mixed_s: NDArray[np.float64]
    skew_prompt: NDArray[np.float64]
    skew_rows: NDArray[np.float64]
    longest: NDArray[np.float64]
    spread: NDArray[np.float64]
    skew: NDArray[np.float64]
    split_rows: float


class BatchTables(NamedTuple):
    """Step time of ranks that step in time (data parallel, experts divided among them); seconds.

    tokens_s       (t + 1,)      by tokens of a rank's step as padded: its layers but for attention and experts,
                                 embedding and last norm, collectives of tensor parallelism
    samples_s      (s + 1,)      by rows that sample: vocabulary projection, sampling
    experts_s      (r * t + 1,)  by tokens of all ranks together; zeros without experts
    exchange_s     (r * t + 1,)  by tokens of all ranks together: of all to each rank, and back
    captured_tokens              steps of up to so many tokens a rank are captured as a CUDA graph, padded alike on all
    padded         (captured_tokens + 1,) int64  to how many tokens
    attention
    request_s      (2,)          as in StepTables
    ranks                        that step in time; 1: each replica by itself
    ahead                        steps are composed while the one before still computes (vLLM's async scheduling)
    """

    tokens_s: NDArray[np.float64]
    samples_s: NDArray[np.float64]
    experts_s: NDArray[np.float64]
    exchange_s: NDArray[np.float64]
    captured_tokens: int
    padded: NDArray[np.int64]
    attention: AttentionTimes
    request_s: NDArray[np.float64]
    ranks: int
    ahead: bool


@njit
def place(axis: NDArray[np.float64], value: float) -> float:
    """Where a value lies on an ascending axis: index of the point below, and the share of the way to the next; the
    first point before the axis, the last segment goes on beyond it."""
    if axis.shape[0] == 1 or value <= axis[0]:
        return 0.0
    below = min(int(np.searchsorted(axis, value, side="right")) - 1, axis.shape[0] - 2)
    return float(below + (value - axis[below]) / (axis[below + 1] - axis[below]))


@njit
def _point(at: float, points: int, upper: int) -> tuple[int, float]:
    """One of the two points around a place, the lower or the upper, and its weight."""
    below = max(0, min(int(at), points - 2))
    if upper == 0:
        return below, 1.0 - (at - below)
    return min(below + 1, points - 1), at - below


@njit
def _between(table: NDArray[np.float64], a: float, b: float, c: float, d: float) -> float:
    """A table of four axes at a place on each of them: multilinear between the 16 points around it."""
    total = 0.0
    for corner in range(16):
        i, in_a = _point(a, table.shape[0], corner & 1)
        j, in_b = _point(b, table.shape[1], corner >> 1 & 1)
        k, in_c = _point(c, table.shape[2], corner >> 2 & 1)
        m, in_d = _point(d, table.shape[3], corner >> 3)
        weight = in_a * in_b * in_c * in_d
        if weight != 0.0:
            total += weight * table[i, j, k, m]
    return float(total)


@njit
def skew_share(times: AttentionTimes, chunk: float, rows: int, mean: float, longest: float, variance: float) -> float:
    """The share `AttentionTimes.skew` of decode rows with this mean, longest and variance of contexts."""
    if rows < 2 or longest - mean < 1.0:
        return 0.0
    v = variance / (longest - mean) ** 2
    by_prompt = min(place(times.skew_prompt, chunk), times.skew_prompt.shape[0] - 1.0)
    by_rows = min(place(times.skew_rows, float(rows)), times.skew_rows.shape[0] - 1.0)
    by_longest = min(place(times.longest, longest), times.longest.shape[0] - 1.0)
    by_spread = min(place(times.spread, v / (1.0 + v)), times.spread.shape[0] - 1.0)
    low = min(int(by_rows), times.skew_rows.shape[0] - 2)
    if chunk == 0.0 and low >= 0 and times.skew_rows[low] < times.split_rows <= times.skew_rows[low + 1]:
        by_rows = low + 1.0 if rows >= times.split_rows else float(low)
    return _between(times.skew, by_prompt, by_rows, by_longest, by_spread)


@njit
def attention_s(
    times: AttentionTimes, chunk: float, cached: float, rows: int, mean: float, longest: float, variance: float
) -> float:
    """Attention of decode rows, of a chunk of a prompt (chunk > 0), or of both."""
    table = times.mixed_s
    if chunk == 0.0:
        table = times.decode_s
    elif rows == 0:
        table = times.prefill_s
    by_chunk = place(times.prompt, chunk) if chunk > 0.0 else 0.0
    by_cached = place(times.cached, cached) if chunk > 0.0 else 0.0
    by_rows = place(times.rows, float(rows)) if rows > 0 else 0.0
    share = skew_share(times, chunk, rows, mean, longest, variance)
    seconds = 0.0
    for side in range(2):
        weight = share if side == 1 else 1.0 - share
        if weight != 0.0:
            by_context = place(times.context, longest if side == 1 else mean) if rows > 0 else 0.0
            seconds += weight * _between(table, by_chunk, by_cached, by_rows, by_context)
    return float(seconds)


@njit
def rank_time_s(tables: BatchTables, plan: Plan, tokens: int) -> float:
    """Seconds of one rank's part of a step but for what all ranks do together, padded to `tokens`.

    Several chunks of prompts: the longest stands beside the decode rows, each other one adds what it takes by itself.
    """
    decode_rows, samples, main = 0, 0, -1
    total, squares, longest = 0.0, 0.0, 0.0
    for row in range(plan.counts[PLAN_SIZE]):
        if plan.samples[row]:
            samples += 1
        if plan.num_tokens[row] > 1:
            if main < 0 or plan.num_tokens[row] > plan.num_tokens[main]:
                main = row
        else:
            context = plan.start[row] + 1.0
            decode_rows += 1
            total += context
            squares += context * context
            longest = max(longest, context)
    mean = total / max(1, decode_rows)
    variance = max(0.0, squares / max(1, decode_rows) - mean * mean)
    seconds = tables.tokens_s[tokens] + tables.samples_s[samples]
    for row in range(-1, plan.counts[PLAN_SIZE]):
        beside = row == -1  # the decode rows, and the longest chunk
        if beside:
            if main < 0 and decode_rows == 0:
                continue
        elif row == main or plan.num_tokens[row] == 1:
            continue
        of = main if beside else row
        chunk = float(plan.num_tokens[of]) if of >= 0 else 0.0
        cached = float(plan.start[of]) if of >= 0 else 0.0
        rows = decode_rows if beside else 0
        seconds += attention_s(tables.attention, chunk, cached, rows, mean, longest, variance)
    return float(seconds)


@njit
def step_time_s(tables: BatchTables, plans: tuple[Plan, ...]) -> float:
    """Seconds of one step of all ranks: the slowest rank, and what they do together.

    A rank that has nothing to compute takes part with one token, as in vLLM.
    """
    most, everybody = 1, 0
    for plan in plans:
        most = max(most, plan.counts[PLAN_TOKENS])
    captured = most <= tables.captured_tokens
    slowest_s = 0.0
    for plan in plans:
        tokens = int(tables.padded[most]) if captured else int(max(1, plan.counts[PLAN_TOKENS]))
        everybody += tokens
        slowest_s = max(slowest_s, rank_time_s(tables, plan, tokens))
    return float(slowest_s + tables.experts_s[everybody] + tables.exchange_s[everybody])
