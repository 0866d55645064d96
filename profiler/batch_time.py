"""Step time by what stands in the batch: attention of rows together, experts, and ranks that step in time.

On a GPU the attention of a step is one kernel over all rows, and no sum over them: how long it takes depends on how many
rows there are and how long each is, prompts beside decode rows make it another kernel, and one row much longer than the
others keeps it waiting. Compiled together with the event loop, as step_time.py is.
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
    prefill_s       (p, c)        a chunk alone
    decode_s        (n, m)        decode rows alone
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

    tokens_s       (t + 1,)      by tokens of a rank's step, padding counted in the table: its layers but for attention and
                                 experts, embedding and last norm, collectives of tensor parallelism
    samples_s      (s + 1,)      by rows that sample: vocabulary projection, sampling
    experts_s      (r * t + 1,)  by tokens of all ranks together; zeros without experts
    exchange_s     (t + 1,)      by the tokens of the rank with the most: of all to each rank, and back
    captured_tokens              steps of up to so many tokens a rank are captured as a CUDA graph, padded alike on all
    padded         (captured_tokens + 1,) int64  to how many tokens
    launched_s                   least time of a step that is not captured: the host launches it kernel by kernel
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
    launched_s: float
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
def _part(at: float, points: int) -> tuple[int, int, float]:
    """Of a place: the points on both sides, and the share of the upper one (above 1 beyond the last point)."""
    below = max(0, min(int(at), points - 2))
    return below, min(below + 1, points - 1), at - below


@njit
def _on_plane(table: NDArray[np.float64], x: float, y: float) -> float:
    x0, x1, fx = _part(x, table.shape[0])
    y0, y1, fy = _part(y, table.shape[1])
    low = table[x0, y0] + fy * (table[x0, y1] - table[x0, y0])
    high = table[x1, y0] + fy * (table[x1, y1] - table[x1, y0])
    return float(low + fx * (high - low))


@njit
def _in_space(table: NDArray[np.float64], w: float, x: float, y: float, z: float) -> float:
    """A table of four axes at a place."""
    w0, w1, fw = _part(w, table.shape[0])
    x0, x1, fx = _part(x, table.shape[1])
    total = (1.0 - fw) * (1.0 - fx) * _on_plane(table[w0, x0], y, z)
    total += (1.0 - fw) * fx * _on_plane(table[w0, x1], y, z)
    total += fw * (1.0 - fx) * _on_plane(table[w1, x0], y, z)
    return float(total + fw * fx * _on_plane(table[w1, x1], y, z))


@njit
def skew_share(times: AttentionTimes, chunk: float, rows: int, mean: float, longest: float, variance: float) -> float:
    """The share `AttentionTimes.skew` of decode rows with this mean, longest and variance of contexts."""
    if rows < 2 or longest - mean < 1.0:
        return 0.0
    v = variance / (longest - mean) ** 2
    at_spread = min(place(times.spread, v / (1.0 + v)), times.spread.shape[0] - 1.0)
    at_longest = min(place(times.longest, longest), times.longest.shape[0] - 1.0)
    at_prompt = min(place(times.skew_prompt, chunk), times.skew_prompt.shape[0] - 1.0)
    at_rows = min(place(times.skew_rows, float(rows)), times.skew_rows.shape[0] - 1.0)
    if chunk == 0 and times.split_rows > 0:
        low, high, _ = _part(at_rows, times.skew_rows.shape[0])
        if times.skew_rows[low] < times.split_rows <= times.skew_rows[high]:
            at_rows = float(high if rows >= times.split_rows else low)
    return _in_space(times.skew, at_prompt, at_rows, at_longest, at_spread)


@njit
def attention_s(
    times: AttentionTimes, chunk: float, cached: float, rows: int, mean: float, longest: float, variance: float
) -> float:
    """Attention of decode rows, beside a chunk of a prompt where there is one (chunk > 0)."""
    if rows == 0:
        return _on_plane(times.prefill_s, place(times.prompt, chunk), place(times.cached, cached))
    share = skew_share(times, chunk, rows, mean, longest, variance)
    by_rows = place(times.rows, float(rows))
    at_mean, at_longest = place(times.context, mean), place(times.context, longest)
    if chunk == 0.0:
        even = _on_plane(times.decode_s, by_rows, at_mean)
        return float(even + share * (_on_plane(times.decode_s, by_rows, at_longest) - even))
    by_chunk, by_cached = place(times.prompt, chunk), place(times.cached, cached)
    even = _in_space(times.mixed_s, by_chunk, by_cached, by_rows, at_mean)
    return float(even + share * (_in_space(times.mixed_s, by_chunk, by_cached, by_rows, at_longest) - even))


@njit
def rank_time_s(tables: BatchTables, plan: Plan, tokens: int) -> float:
    """Seconds of one rank's part of a step but for what all ranks do together, padded to `tokens`.

    Several chunks of prompts: the longest stands beside the decode rows, each other one adds what it takes by itself.
    """
    decode_rows, samples = 0, 0
    total, squares, longest = 0.0, 0.0, 0.0
    chunk, cached = 0.0, 0.0
    others_s = 0.0
    times = tables.attention
    for row in range(plan.counts[PLAN_SIZE]):
        if plan.samples[row]:
            samples += 1
        if plan.num_tokens[row] == 1:
            context = plan.start[row] + 1.0
            decode_rows += 1
            total += context
            squares += context * context
            longest = max(longest, context)
        else:
            other, before = float(plan.num_tokens[row]), float(plan.start[row])
            if other > chunk:
                other, chunk = chunk, other
                before, cached = cached, before
            if other > 0.0:
                others_s += attention_s(times, other, before, 0, 0.0, 0.0, 0.0)
    seconds = tables.tokens_s[tokens] + tables.samples_s[samples] + others_s
    if decode_rows > 0:
        mean = total / decode_rows
        variance = max(0.0, squares / decode_rows - mean * mean)
        seconds += attention_s(times, chunk, cached, decode_rows, mean, longest, variance)
    elif chunk > 0.0:
        seconds += attention_s(times, chunk, cached, 0, 0.0, 0.0, 0.0)
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
    if captured:
        most = int(tables.padded[most])
    together_s = tables.experts_s[everybody] + tables.exchange_s[most]
    if captured:
        return float(slowest_s + together_s)
    return float(max(slowest_s + together_s, tables.launched_s))
