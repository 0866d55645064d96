"""Tables from measured steps: they give back what was measured, rise, never beat physics, say how wrong they are."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.kernels.tiles import Tile, TileTable
from paretune.profiler.hardware import BadHardware
from paretune.profiler.measured_step import bound_tables
from paretune.profiler.operators import Composition, linears, step_work
from paretune.profiler.profile import BadProfile, Peaks, Serving, StepPoint
from paretune.profiler.step_fit import fit_all_steps, fit_steps, non_negative_least_squares
from paretune.profiler.step_time import ModeledStep, composed_time_s, scaled
from paretune.profiler.tables import step_tables
from paretune.runtime.spec import Pool

from .profiler_examples import (
    FAST,
    SMALL,
    compositions,
    formula_s,
    four_cores,
    operator_points,
    points,
    profile,
    serving,
    several_precisions,
)

POOL = Pool(max_num_batched_tokens=1024, max_num_seqs=64)
SERVING = serving()


def test_tables_give_back_the_steps_they_were_fitted_to() -> None:
    tables = step_tables(profile(), SMALL, POOL).tables
    for step in compositions():
        assert composed_time_s(tables, *step) == pytest.approx(formula_s(step), rel=0.03), step


@given(
    tokens=st.integers(8, 900), rows=st.integers(1, 64), all_sample=st.booleans(), context=st.floats(0, 3e4),
    start=st.floats(0, 1000),
)  # fmt: skip
def test_tables_predict_steps_that_were_not_measured(
    tokens: int, rows: int, all_sample: bool, context: float, start: float
) -> None:
    rows = min(rows, tokens)
    step = Composition(tokens, rows, rows - (not all_sample), context, tokens * start)
    assert composed_time_s(EXACT, *step) == pytest.approx(formula_s(step), rel=0.08)


EXACT = step_tables(profile(), SMALL, POOL).tables


def test_held_out_points_say_how_wrong_the_fit_is() -> None:
    exact, noisy = fit_steps(points()), fit_steps(points(noise=0.1))
    assert exact.relative_error < 0.02
    # log-normal noise of 10 %: of means of five, nine in ten lie within 1.645 of it divided by the root of five
    assert noisy.relative_error == pytest.approx(0.1645 / 5**0.5, rel=0.5)
    assert len(noisy.errors) == len(points()) // 4


def test_where_there_are_few_points_each_is_predicted_from_the_others() -> None:
    # a prompt an octave, with tokens and pairs that grow together: a knot for each would only repeat it
    steps = [Composition(n, 1, 1, 0.0, n * (n + 1) / 2) for n in (128, 256, 512, 1024, 2048, 4096, 8192)]
    steps += [Composition(512 * b, b, b, 0.0, b * 512 * 513 / 2) for b in (2, 4, 8, 16)]
    steps += [Composition(b, b, b, b * 600.0, 0.0) for b in (1, 2, 4, 8, 16)]
    few = [StepPoint(**s._asdict(), median_s=0.04 + 1e-4 * s.num_tokens, iqr_s=0.0, count=5) for s in steps]
    fit = fit_all_steps(few)
    assert len(fit.errors) == len(few)
    assert fit.relative_error < 0.12
    values = np.array(steps, np.float64)
    np.testing.assert_allclose(fit.seconds(values), 0.04 + 1e-4 * values[:, 0], rtol=0.05)
    assert fit.largest["num_tokens"] == 8192


def test_a_few_disturbed_steps_do_not_bend_the_fit() -> None:
    found = [
        point.model_copy(update={"median_s": point.median_s * (20 if i % 17 == 0 else 1)})
        for i, point in enumerate(points())
    ]
    fit = fit_steps(found)
    assert abs(np.median(fit.errors)) < 0.05


def test_too_few_points_are_refused() -> None:
    with pytest.raises(BadProfile):
        fit_steps(points()[:8])


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_every_table_rises_and_starts_where_nothing_is_done(noise: float) -> None:
    tables = step_tables(profile(noise=noise), SMALL, POOL).tables
    for name in ("tokens_s", "rows_s", "samples_s", "decode_attention_s", "prefill_attention_s"):
        table = getattr(tables, name)
        assert (np.diff(table[1:]) >= -1e-15).all(), name
        assert (table >= 0).all(), name
    assert tables.tokens_s[0] == tables.rows_s[0] == tables.samples_s[0] == 0
    assert len(tables.tokens_s) == POOL.max_num_batched_tokens + 1
    assert len(tables.rows_s) == len(tables.samples_s) == POOL.max_num_seqs + 1


@settings(max_examples=50)
@given(
    tokens=st.integers(1, 1024), rows=st.integers(1, 64), samples=st.integers(0, 64), context=st.floats(0, 1e6),
    pairs=st.floats(0, 1e7),
)  # fmt: skip
def test_no_prediction_is_faster_than_the_measured_peaks_allow(
    tokens: int, rows: int, samples: int, context: float, pairs: float
) -> None:
    # peaks so slow that the measured steps would beat them
    rows = min(rows, tokens)
    step = Composition(tokens, rows, min(samples, rows), context, pairs)
    seconds = composed_time_s(SLOW_TABLES, *step)
    flops = {
        w.name: w.flops for w in step_work(SMALL, step, tensor_parallel_size=1, weight_dtype="bf16", kv_dtype="bf16")
    }
    # of the last layer only sampled rows go through o, gate_up and down
    layers = SMALL.num_layers
    linear = flops["qkv"] + sum(flops[n] * (layers - 1) / layers for n in ("o", "gate_up", "down"))
    everything = linear + flops.get("head", 0) + flops.get("decode_attention", 0) + flops.get("prefill_attention", 0)
    assert seconds >= everything / 1e9 * (1 - 1e-9)
    elements = {x.name: x.count * x.out_features * x.in_features for x in linears(SMALL, 1)}
    read = 2 * (elements["qkv"] + sum(elements[n] * (layers - 1) / layers for n in ("o", "gate_up", "down")))
    assert seconds >= read / 1e9 * (1 - 1e-9)


SLOW = Peaks(num_threads=1, flops_per_s={"bf16": 1e9}, read_bytes=((1 << 20, 1e9),))
SLOW_TABLES = step_tables(profile(peaks=SLOW), SMALL, POOL).tables


def test_the_bound_is_below_what_the_made_up_machine_takes() -> None:
    peaks = Peaks(num_threads=1, flops_per_s={"bf16": 5e11}, read_bytes=((1 << 20, 1e11),))
    bound = bound_tables(SMALL, POOL, peaks)
    assert all(composed_time_s(bound, *step) < formula_s(step) for step in compositions())


def test_beyond_the_largest_measured_step_time_goes_on_rising_and_that_is_said() -> None:
    large = Pool(max_num_batched_tokens=8192, max_num_seqs=256, max_model_len=2048)
    modeled = step_tables(profile(), SMALL, large)
    assert modeled.tables.tokens_s[8192] == pytest.approx(formula_s(Composition(8192, 0, 0, 0.0, 0.0)), rel=0.1)
    assert any("num_tokens > 1024: extrapolated" in note for note in modeled.not_modeled)
    assert not any("extrapolated" in note for note in step_tables(profile(), SMALL, POOL).not_modeled)


def test_a_faster_tile_makes_steps_faster_by_what_it_saves() -> None:
    operators = tuple(operator_points({"default": 2e-12, "512": 1e-12}))
    measured = profile(operators=operators)
    tile = Tile("linear", "cpp", (("prefetch_bytes", 512),))
    tiles = TileTable(((("linear", "bf16", 256), tile),))
    plain = step_tables(measured, SMALL, POOL).tables
    tuned = step_tables(measured, SMALL, POOL.model_copy(update={"tiles": tiles})).tables
    layers = SMALL.num_layers
    count = {"qkv": layers, "o": layers - 1, "gate_up": layers - 1, "down": layers - 1}
    elements = sum(count[x.name] * x.out_features * x.in_features for x in linears(SMALL, 1) if x.name in count)
    for tokens in (1, 16, 256, 1024):
        assert plain.tokens_s[tokens] - tuned.tokens_s[tokens] == pytest.approx(tokens * elements * 1e-12, rel=1e-6)
    assert (tuned.samples_s[1:] < plain.samples_s[1:]).all()


def test_a_tile_that_was_not_measured_changes_nothing_and_that_is_said() -> None:
    tiles = TileTable(((("linear", "bf16", 16), Tile("linear", "torch")),))
    modeled = step_tables(profile(), SMALL, POOL.model_copy(update={"tiles": tiles}))
    assert (modeled.tables.tokens_s == step_tables(profile(), SMALL, POOL).tables.tokens_s).all()
    assert any("tiles" in note and "not measured" in note for note in modeled.not_modeled)


def test_serving_stretches_steps_and_adds_time_before_and_after() -> None:
    bare = step_tables(profile(), SMALL, POOL)
    served = step_tables(profile(serving=(SERVING,)), SMALL, POOL)
    assert served.tables.tokens_s[16] == pytest.approx(1.5 * bare.tables.tokens_s[16] + 1e-4, rel=0.01)
    assert served.tables.request_s.tolist() == [2e-3, 3e-3]
    assert served.relative_error == pytest.approx(np.hypot(bare.relative_error, 0.2))
    assert any("serving over HTTP" in note for note in bare.not_modeled)
    assert not any("serving over HTTP" in note for note in served.not_modeled)


def test_serving_may_slow_prompts_down_more_than_decoding() -> None:
    served = step_tables(profile(serving=(serving(1.1, 1.4),)), SMALL, POOL).tables
    for step in compositions():
        slower = 1.4 if step.num_tokens > POOL.max_num_seqs else 1.1
        decodes = step.prefill_pairs == 0 and step.num_rows <= max(point.num_rows for point in SERVING.points)
        if decodes or step.num_tokens > 4 * POOL.max_num_seqs:
            assert composed_time_s(served, *step) == pytest.approx(slower * formula_s(step) + 1e-4, rel=0.08), step


def test_a_live_server_s_own_steps_are_given_back_with_prompts_and_without() -> None:
    live = serving(1.1, 1.4)
    tables = step_tables(profile(serving=(live,)), SMALL, POOL).tables
    for with_prompts in (False, True):
        points = [point for point in live.points if (point.prefill_pairs > 0) == with_prompts]
        steps = [
            Composition(p.num_tokens, p.num_rows, p.num_samples, p.decode_context, p.prefill_pairs) for p in points
        ]
        modeled_s = sum(composed_time_s(tables, *step) - live.between_steps_s for step in steps)
        assert modeled_s == pytest.approx(sum(point.mean_s for point in points), rel=0.01)


def test_what_a_token_s_way_to_the_client_takes_from_the_cores_is_the_same_for_every_precision() -> None:
    plain = serving(1.0, 1.0)
    sent = [point.model_copy(update={"mean_s": point.mean_s + 5e-5 * point.num_rows}) for point in plain.points]
    live = plain.model_copy(update={"points": tuple(sent)})
    before, after = (step_tables(profile(serving=(each,)), SMALL, POOL).tables for each in (plain, live))
    for step in compositions(most_rows=16):
        more_s = composed_time_s(after, *step) - composed_time_s(before, *step)
        assert more_s == pytest.approx(5e-5 * step.num_rows, rel=0.05, abs=2e-5), step


def test_pauses_that_grow_with_the_tokens_sent_count_too() -> None:
    plain = serving(1.0, 1.0)
    paused = [p.model_copy(update={"pause_s": plain.between_steps_s + 5e-5 * p.num_rows}) for p in plain.points]
    live = plain.model_copy(update={"points": tuple(paused), "after_idle_s": 3e-4})
    before, after = (step_tables(profile(serving=(each,)), SMALL, POOL).tables for each in (plain, live))
    step = Composition(12, 12, 12, 12 * 128.0, 0.0)
    more_s = composed_time_s(after, *step) - composed_time_s(before, *step)
    assert more_s == pytest.approx(5e-5 * 12, rel=0.05)
    assert (before.wake_s, after.wake_s) == (0.0, 3e-4)


def test_how_much_a_server_slows_a_step_does_not_depend_on_the_seats() -> None:
    few, many = (
        step_tables(
            profile(serving=(serving(1.1, 1.4),)), SMALL, POOL.model_copy(update={"max_num_seqs": seats})
        ).tables
        for seats in (16, 64)
    )
    for step in compositions(most_rows=16):
        if step.num_rows <= 16:
            assert composed_time_s(few, *step) == pytest.approx(composed_time_s(many, *step)), step


def test_a_server_that_was_measured_on_no_configuration_of_the_profile_is_refused() -> None:
    with pytest.raises(BadProfile, match="measured_on"):
        step_tables(profile(serving=(serving(measured_on="TP 9 x 1 threads bf16/bf16"),)), SMALL, POOL)


def test_what_physics_asks_for_is_counted_once() -> None:
    """Steps that take little more than to read the weights: a part raised to its bound would count them twice."""
    close = FAST.model_copy(update={"read_bytes": ((1 << 20, 1e15), (1 << 22, 2.2e10))})

    def step_s(step: Composition) -> float:
        return formula_s(step) - 0.69e-3

    steps = tuple(point.model_copy(update={"median_s": step_s(step)}) for point, step in zip(points(), compositions()))
    measured = profile(peaks=close)
    configuration = measured.configurations[0].model_copy(update={"steps": steps})
    tables = step_tables(measured.model_copy(update={"configurations": (configuration,)}), SMALL, POOL).tables
    assert bound_tables(SMALL, POOL, close).tokens_s[1] > 0.5 * tables.tokens_s[1]
    for step in compositions():
        if step.prefill_pairs == 0:
            assert composed_time_s(tables, *step) == pytest.approx(step_s(step), rel=0.03), step


def test_serving_is_taken_where_as_many_cores_compute_and_else_from_the_nearest_which_is_said() -> None:
    other = serving(9.0, 9.0, cores=2)
    both = step_tables(profile(serving=(SERVING, other)), SMALL, POOL)
    assert both.tables.request_s.tolist() == [2e-3, 3e-3]
    assert both.tables.tokens_s[16] < 2 * step_tables(profile(), SMALL, POOL).tables.tokens_s[16]
    modeled = step_tables(profile(serving=(other,)), SMALL, POOL)
    assert any("taken as measured with 2 cores, not 1" in note for note in modeled.not_modeled)


def served_with(weight_dtype: str, slower: float, *, cores: int = 1) -> Serving:
    return serving(slower, slower, cores=cores, measured_on=f"TP 1 x 1 threads {weight_dtype}/bf16")


def int8_step(*live: Serving) -> tuple[float, ModeledStep]:
    """How many times as long as alone an int8 step of 16 tokens takes with such live servers, and its model."""
    modeled = step_tables(several_precisions("bf16", "fp32", "int8", serving=live), SMALL, INT8)
    return float((modeled.tables.tokens_s[16] - 1e-4) / ALONE.tables.tokens_s[16]), modeled


INT8 = POOL.model_copy(update={"weight_dtype": "int8"})
ALONE = step_tables(several_precisions("int8"), SMALL, INT8)


def test_a_live_server_of_the_same_weights_is_taken_before_others_and_nothing_is_borrowed() -> None:
    slower, modeled = int8_step(served_with("bf16", 1.5), served_with("fp32", 1.7), served_with("int8", 1.1))
    assert slower == pytest.approx(1.1, rel=0.01)
    assert not any("serving over HTTP" in note for note in modeled.not_modeled)
    assert modeled.relative_error == pytest.approx(np.hypot(ALONE.relative_error, 0.2))


def test_a_profile_with_bf16_live_alone_lends_its_slowing_which_is_said_and_widens_the_interval() -> None:
    slower, modeled = int8_step(served_with("bf16", 1.5))
    assert slower == pytest.approx(1.5, rel=0.01)
    assert "serving over HTTP: slowed down as measured with bf16 weights" in modeled.not_modeled
    assert modeled.relative_error > np.hypot(ALONE.relative_error, 0.2) + 0.05


def test_of_other_weights_those_of_bf16_are_borrowed() -> None:
    assert int8_step(served_with("fp32", 1.7), served_with("bf16", 1.5))[0] == pytest.approx(1.5, rel=0.01)
    assert int8_step(served_with("fp32", 1.7))[0] == pytest.approx(1.7, rel=0.01)


def test_how_many_cores_compute_counts_for_more_than_the_weights() -> None:
    slower, modeled = int8_step(served_with("bf16", 1.5), served_with("int8", 1.1, cores=2))
    assert slower == pytest.approx(1.5, rel=0.01)
    assert not any("cores" in note for note in modeled.not_modeled)


def test_replicas_taken_as_more_of_them_are_named() -> None:
    def notes(replicas: int) -> str:
        pool = POOL.model_copy(update={"replicas": replicas})
        return "; ".join(step_tables(four_cores(1, 2, 4), SMALL, pool).not_modeled)

    assert "3 replicas on one machine: taken as 4" in notes(3)
    assert "taken as" not in notes(2).replace("taken as measured", "")


def test_scaling_leaves_what_happens_outside_the_steps() -> None:
    tables = step_tables(profile(serving=(SERVING,)), SMALL, POOL).tables
    slower = scaled(tables, 1.25)
    assert (slower.tokens_s == 1.25 * tables.tokens_s).all()
    assert (slower.request_s == tables.request_s).all()


def test_a_profile_speaks_for_this_machine_and_its_model_only() -> None:
    with pytest.raises(BadHardware):
        step_tables(profile(), SMALL, Pool(accelerator="H100"))
    with pytest.raises(BadProfile):
        step_tables(profile(), dataclasses.replace(SMALL, hidden_size=512), POOL)


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(3, 30), columns=st.integers(1, 12))
def test_non_negative_least_squares_meets_the_conditions_of_an_optimum(seed: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(rows, columns)), rng.normal(size=rows)
    x = non_negative_least_squares(matrix, target)
    gradient = matrix.T @ (matrix @ x - target)
    # Karush, Kuhn and Tucker: x >= 0, no descent left, and none at all where x > 0
    assert (x >= 0).all()
    assert (gradient >= -1e-6).all()
    assert np.abs(gradient[x > 0]).max(initial=0.0) < 1e-6
