"""Step times of a configuration that a profile measured: what physics allows at least, what was measured beyond it,
and what a live server adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.tiles import Tile, TileTable
from ..kernels.weight_formats import WEIGHT_FORMATS
from ..runtime.model_shape import ModelShape, matrix_dtype
from ..runtime.spec import Pool
from .operators import UNTILED, Linear, kv_bytes_per_token, linears, rank_weight_bytes
from .profile import Configuration, Key, LivePoint, Peaks, Profile, Serving, StepPoint
from .step_fit import StepFit, fit_steps, non_negative_least_squares
from .step_time import NO_STEP_TIMES, WORK_GRID, ModeledStep, StepTables, composed_time_s, scaled

Floats = NDArray[np.float64]

# Of what a live server slows decode steps down, so much is uncertain where it was measured with other weights
# (docs/notes/prediction.md).
_BORROWED = 0.5


def measured_step(profile: Profile, shape: ModelShape, pool: Pool) -> ModeledStep:
    """Step times of a pool of the machine that a profile measured.

    Raises: BadProfile: it has another model's shape or lacks the pool's configuration.
    """
    profile.check_shape(shape)
    configuration = profile.configuration(pool)
    peaks = profile.peaks_of(pool.num_threads)
    fit = _fit(configuration.steps, _least_s(configuration.steps, shape, pool, peaks))
    bound = bound_tables(shape, pool, peaks)
    tables = fitted_tables(fit, bound)
    notes = []
    for table, head in ((tables.tokens_s, False), (tables.samples_s, True)):
        delta_s, unknown = _tile_difference(shape, pool, configuration, len(table) - 1, head=head)
        table[1:] += delta_s[1:]
        notes += unknown
    for operator in ("decode_attention", "prefill_attention"):
        if _tiles_of(pool.tiles, operator) != _tiles_of(configuration.tiles, operator):
            notes.append(f"tiles of {operator}: taken as those of the profile")
    if shape.experts and pool.tiles != configuration.tiles:
        notes.append("tiles of the experts: taken as those of the profile")
    if shape.experts:
        notes.append("experts: taken as touched by the profile's random prompts, not by the trace's")
    error = fit.relative_error
    if not profile.serving:
        notes.append("serving over HTTP: time outside the steps and its share of the cores were not measured")
    else:
        cores = configuration.replicas * pool.devices_per_replica
        ranks = configuration.key.ranks
        serving = _serving_like(profile, cores, ranks, pool.weight_dtype)
        for what, measured, asked in (("cores", serving.cores, cores), ("ranks", serving.ranks, ranks)):
            if measured != asked:
                notes.append(f"serving over HTTP: taken as measured with {measured} {what}, not {asked}")
        slowing, alone = _slowing(profile, serving, shape, pool), tables
        tables = _served(tables, serving, slowing)
        # independent causes: what the fit misses, and how unevenly the server and its clients take the cores
        error = float(np.hypot(error, serving.spread))
        if slowing.measured_on.weight_dtype != pool.weight_dtype:
            notes.append(f"serving over HTTP: slowed down as measured with {slowing.measured_on.weight_dtype} weights")
            error = float(np.hypot(error, _BORROWED * abs(_slower(alone, tables, serving, slowing.usual_rows))))
    # serving may take less time than the profile's steps did, and other tiles may: never less than physics
    tables = not_faster(tables, bound)
    notes += extrapolated(fit, pool)
    beside = profile.replicas_beside(pool)
    if configuration.replicas > beside:
        notes.append(f"{beside} replicas on one machine: taken as {configuration.replicas}, so too slow")
    if pool.replicas > configuration.replicas:
        notes.append(f"replicas beyond {configuration.replicas}: on further machines like the measured one")
    host_step_s = _host_step_s(shape, configuration, tables, float(bound.tokens_s[1]))
    return ModeledStep(tables, True, error, tuple(dict.fromkeys(notes)), host_step_s)


def _serving_like(profile: Profile, cores: int, ranks: int, weight_dtype: str) -> Serving:
    """What was measured with as many cores and ranks, or the nearest; of those with the same weights, else with bf16.

    How many cores compute counts for more than which weights: whether the server has a core of its own.
    """

    def far(serving: Serving) -> tuple[int, int]:
        return abs(serving.cores - cores), abs(serving.ranks - ranks)

    def unlike(serving: Serving) -> tuple[bool, bool, int, int]:
        found = profile.served_by(serving).weight_dtype
        return found != weight_dtype, found != "bf16", serving.cores, serving.ranks

    nearest = min(map(far, profile.serving))
    return min((each for each in profile.serving if far(each) == nearest), key=unlike)


def _host_step_s(shape: ModelShape, configuration: Configuration, tables: StepTables, bound_s: float) -> float:
    """Of a step of one token: what its linear layers, measured by themselves, do not explain.

    Where they were not (experts, an imported profile) what the machine's peaks do not explain, which is more.
    """
    tile = configuration.tiles.lookup("linear", configuration.weight_dtype, 1)
    curve = _linear_curve(shape, configuration, tile, head=False)
    linear_s = (
        bound_s if curve is None or shape.experts else max(bound_s, float(_interpolated(curve, np.array([1]))[0]))
    )
    return max(0.0, float(tables.tokens_s[1]) - linear_s)


def not_faster(tables: StepTables, bound: StepTables) -> StepTables:
    """The tables with no step faster than the bound, part by part; a step of no tokens takes no time."""
    least = {name: table for name, table in bound._asdict().items() if name not in NO_STEP_TIMES}
    found = tables._replace(**{name: np.maximum(getattr(tables, name), table) for name, table in least.items()})
    found.tokens_s[0] = 0.0
    return found


def extrapolated(fit: StepFit, pool: Pool) -> list[str]:
    """Which steps of a pool are larger than any that was measured, for people."""
    most_of = {"num_tokens": pool.max_num_batched_tokens, "num_rows": pool.max_num_seqs}
    if pool.speculation != "none":
        most_of["num_samples"] = pool.max_num_samples
    return [
        f"steps of {part} > {fit.largest[part]:.0f}: extrapolated, not measured"
        for part, most in most_of.items()
        if most > fit.largest[part]
    ]


@lru_cache(maxsize=256)
def _fit(steps: tuple[StepPoint, ...], least_s: tuple[float, ...]) -> StepFit:
    return fit_steps(steps, least_s)


def fitted_tables(fit: StepFit, bound: StepTables) -> StepTables:
    """What physics allows at least, and what was measured beyond it."""
    tokens, seqs, samples = (
        np.arange(len(table), dtype=np.float64) for table in (bound.tokens_s, bound.rows_s, bound.samples_s)
    )
    return bound._replace(
        tokens_s=bound.tokens_s + fit.step_s + fit.tokens(tokens),
        rows_s=bound.rows_s + fit.rows(seqs),
        samples_s=bound.samples_s + fit.samples(samples),
        decode_attention_s=bound.decode_attention_s + fit.decode(WORK_GRID),
        prefill_attention_s=bound.prefill_attention_s + fit.prefill(WORK_GRID),
    )


def large_enough(pool: Pool, steps: Sequence[StepPoint | LivePoint]) -> Pool:
    """The pool with limits that let such steps be, and without speculation."""
    return pool.model_copy(
        update={
            "max_num_batched_tokens": max(step.num_tokens for step in steps),
            "max_num_seqs": max(max(step.num_rows, step.num_samples) for step in steps),
            "num_speculative_tokens": 0,
        }
    )


def seconds_of(tables: StepTables, steps: Sequence[StepPoint | LivePoint]) -> tuple[float, ...]:
    """Of each step by the tables, which must be large enough for it."""
    return tuple(
        composed_time_s(tables, s.num_tokens, s.num_rows, s.num_samples, s.decode_context, s.prefill_pairs)
        for s in steps
    )


def _least_s(steps: tuple[StepPoint, ...], shape: ModelShape, pool: Pool, peaks: Peaks) -> tuple[float, ...]:
    """Of each measured step what the machine's peaks allow at least."""
    return seconds_of(bound_tables(shape, large_enough(pool, steps), peaks), steps)


def _most_rows(serving: Serving) -> int:
    """Of a live step; decode steps have no more tokens, so what lies beyond as many is that of prompts."""
    return max(point.num_rows for point in serving.points)


class _Slowing(NamedTuple):
    """What a live server does to the steps of a configuration.

    decode       ratio of decode steps to the same steps alone
    row_s        seconds more for every request in a step: its token's way to the client takes the cores that compute
    prompts      ratio of what prompts add to a step
    usual_rows   requests in a decode step, on average
    measured_on  the configuration that served
    """

    decode: float
    row_s: float
    prompts: float
    usual_rows: int
    measured_on: Key


def _slowing(profile: Profile, serving: Serving, shape: ModelShape, pool: Pool) -> _Slowing:
    """Of the configuration that served, by least squares over its live steps, weighted so that their sum is right.

    Steps without prompts give the first two, or where all of them have as many rows the ratio alone; what steps with
    prompts take beyond them the third.

    Raises: BadProfile: the configuration that served is not in the profile.
    """
    key = profile.served_by(serving)
    alone = large_enough(pool.model_copy(update=key._asdict()), serving.points)
    steps = profile.configuration(alone).steps
    peaks = profile.peaks_of(alone.num_threads)
    fit = _fit(steps, _least_s(steps, shape, alone, peaks))
    tables = fitted_tables(fit, bound_tables(shape, alone, peaks))
    few = _most_rows(serving)
    of_prompts = tables._replace(
        tokens_s=np.maximum(0.0, tables.tokens_s - tables.tokens_s[min(few, len(tables.tokens_s) - 1)]),
        rows_s=np.zeros_like(tables.rows_s),
        samples_s=np.zeros_like(tables.samples_s),
        decode_attention_s=np.zeros_like(tables.decode_attention_s),
    )
    count = np.array([point.count for point in serving.points], np.float64)
    measured_s = np.array([point.mean_s + _longer_pause_s(serving, point) for point in serving.points])
    prompts_s = np.array(seconds_of(of_prompts, serving.points))
    decode_s = np.array(seconds_of(tables, serving.points)) - prompts_s
    rows = np.array([point.num_rows for point in serving.points], np.float64)
    decodes = np.array([point.prefill_pairs == 0 for point in serving.points])
    if not decodes.any():
        whole = float(count @ measured_s / (count @ (decode_s + prompts_s)))
        return _Slowing(whole, 0.0, whole, 1, key)
    usual_rows = round(float(np.average(rows[decodes], weights=count[decodes])))
    weight = np.sqrt(count[decodes] / decode_s[decodes])
    sides = np.column_stack([decode_s[decodes], rows[decodes]]) * weight[:, None]
    sides[:, 1] *= len(np.unique(rows[decodes])) > 1
    decode, row_s = map(float, non_negative_least_squares(sides, measured_s[decodes] * weight))
    if not prompts_s.any():
        return _Slowing(decode, row_s, decode, usual_rows, key)
    beyond_s = (count * (measured_s - decode * decode_s - row_s * rows))[~decodes]
    prompts = max(0.0, float(beyond_s.sum() / (count * prompts_s).sum()))
    return _Slowing(decode, row_s, prompts, usual_rows, key)


def _slower(alone: StepTables, served: StepTables, serving: Serving, usual_rows: int) -> float:
    """By which share decode steps of about so many rows take longer on the live server, beside the pauses."""
    rows = min(usual_rows, len(alone.rows_s) - 1, len(alone.tokens_s) - 1)
    alone_s, served_s = (each.tokens_s[rows] + each.rows_s[rows] + each.samples_s[rows] for each in (alone, served))
    return float((served_s - serving.between_steps_s) / alone_s - 1)


def _longer_pause_s(serving: Serving, point: LivePoint) -> float:
    """After a step, beyond the usual one: the more tokens are on their way, the longer."""
    return 0.0 if point.pause_s is None else point.pause_s - serving.between_steps_s


def _served(tables: StepTables, serving: Serving, slowing: _Slowing) -> StepTables:
    busy = scaled(tables, slowing.decode)
    few = tables.tokens_s[: _most_rows(serving) + 1]
    busy.tokens_s[len(few) :] = slowing.decode * few[-1] + slowing.prompts * (tables.tokens_s[len(few) :] - few[-1])
    busy.tokens_s[1:] += serving.between_steps_s
    busy.rows_s[:] += slowing.row_s * np.arange(len(busy.rows_s))
    request_s = np.array([serving.to_scheduler_s, serving.to_client_s])
    prefill_attention_s = slowing.prompts * tables.prefill_attention_s
    wake_s = serving.after_idle_s
    return busy._replace(request_s=request_s, prefill_attention_s=prefill_attention_s, wake_s=wake_s)


def bound_tables(shape: ModelShape, pool: Pool, peaks: Peaks) -> StepTables:
    """The least step times that the measured peaks allow; weights and cached KV count, activations do not.

    Weights come at the rate of an array as large as all of a rank's weights; KV and arithmetic of attention at the best
    rate of any size and of any precision. Of experts the least counts: all tokens choose the same ones, and ranks that
    divide them have as much to do as the mean.
    """
    tp = pool.tensor_parallel_size
    weight_rate = peaks.bytes_per_s(rank_weight_bytes(shape, tp, pool.weight_dtype))
    cache_rate = max(rate for _, rate in peaks.read_bytes)
    attention_rate = max(peaks.flops_per_s.values())
    parts = pool.context_parallel_size  # that long prompts are divided into; weights are read whole by each

    def linear_s(size: int, head: bool) -> Floats:
        rows = np.arange(size + 1, dtype=np.float64)
        total = np.zeros(size + 1)
        for layer in linears(shape, tp):
            elements = layer.out_features * layer.in_features
            stored_as = matrix_dtype(layer.name, pool.weight_dtype)
            linear_rate = _linear_rate(peaks, stored_as)
            weights_s = elements * WEIGHT_FORMATS[stored_as].bytes_per_weight() / weight_rate
            least_s = np.maximum(2.0 * elements * rows / (parts * linear_rate), weights_s)
            total += linear_count(layer, head) * layer.chosen * least_s
        total[0] = 0.0
        return total

    per_pair = 4.0 * (shape.num_heads // tp) * shape.head_dim * shape.num_layers / attention_rate
    per_token = kv_bytes_per_token(shape, tp, pool.kv_cache_dtype) / cache_rate
    return StepTables(
        tokens_s=linear_s(pool.max_num_batched_tokens, head=False),
        rows_s=np.zeros(pool.max_num_seqs + 1),
        samples_s=linear_s(pool.max_num_samples, head=True),
        decode_attention_s=WORK_GRID * max(per_pair, per_token),
        prefill_attention_s=WORK_GRID * per_pair / parts,
        request_s=np.zeros(2),
    )


def _linear_rate(peaks: Peaks, weight_dtype: str) -> float:
    """The best rate of the arithmetic that these weights are multiplied in, or of themselves where it was higher."""
    arithmetic = peaks.flops_per_s[WEIGHT_FORMATS[weight_dtype].arithmetic]
    return max(arithmetic, peaks.flops_per_s.get(weight_dtype, 0.0))


def linear_count(layer: Linear, sampled: bool) -> int:
    """How many of a kind of linear layer the bundled engine computes for all tokens, or for the samples alone.

    Of the last layer only the rows that sample go through what follows attention (runtime/transformer.py).
    """
    if layer.name == "head":
        return layer.count if sampled else 0
    if layer.name == "qkv":
        return 0 if sampled else layer.count
    return layer.in_last if sampled else layer.count - layer.in_last


def _tiles_of(table: TileTable, operator: str) -> dict[tuple[str, str, int], Tile]:
    return {key: tile for key, tile in table.items() if key[0] == operator}


def _tile_difference(
    shape: ModelShape, pool: Pool, configuration: Configuration, size: int, *, head: bool
) -> tuple[Floats, list[str]]:
    """By rows: time of the linear layers with the pool's tiles less that with the tiles of the measured steps, seconds.

    Both from the operator points, where each tile was measured by itself; 0 where a tile was not, which is said.
    """
    delta_s = np.zeros(size + 1)
    if pool.tiles == configuration.tiles:
        return delta_s, []
    notes = []
    curves: dict[Tile | None, tuple[Floats, Floats] | None] = {}
    rows = 1
    while rows < 2 * size:
        mine, measured = (t.lookup("linear", pool.weight_dtype, rows) for t in (pool.tiles, configuration.tiles))
        if mine != measured:
            for tile in (mine, measured):
                if tile not in curves:
                    curves[tile] = _linear_curve(shape, configuration, tile, head)
            new, old = curves[mine], curves[measured]
            if new is None or old is None:
                notes.append(f"tiles of linear layers up to {rows} rows: not measured, taken as those of the profile")
            else:
                at = np.arange(rows // 2 + 1, min(rows, size) + 1)
                delta_s[at] = _interpolated(new, at) - _interpolated(old, at)
        rows *= 2
    return delta_s, notes


def _linear_curve(
    shape: ModelShape, configuration: Configuration, tile: Tile | None, head: bool
) -> tuple[Floats, Floats] | None:
    """(rows, seconds) of all linear layers of a step with one tile, at the rows at which all were measured."""
    layers = [
        x
        for x in linears(shape, configuration.tensor_parallel_size)
        if linear_count(x, head) and x.chosen == 1 and x.name not in UNTILED
    ]
    by_rows: dict[int, dict[str, float]] = {}
    for point in configuration.operators:
        if point.operator != "linear" or point.precision != configuration.weight_dtype:
            continue
        if tile is None:
            same = point.default
        else:
            same = point.backend == tile.backend and point.parameters == dict(tile.parameters)
        if same:
            by_rows.setdefault(point.rows, {})[point.name] = point.median_s
    whole = {r: s for r, s in sorted(by_rows.items()) if all(x.name in s for x in layers)}
    if not whole:
        return None
    seconds = [sum(linear_count(x, head) * s[x.name] for x in layers) for s in whole.values()]
    return np.array(list(whole), np.float64), np.array(seconds)


def _interpolated(curve: tuple[Floats, Floats], rows: NDArray[np.int64]) -> Floats:
    """Between measured rows linear in the logarithms; beyond them in proportion to the rows."""
    at, seconds = curve
    inside = np.exp(np.interp(np.log(rows), np.log(at), np.log(seconds)))
    return np.asarray(inside * np.maximum(1.0, rows / at[-1]), np.float64)
