import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.kernels.tiles import Tile, TileTable
from paretune.optimizer.capacity import (
    TOLERANCE,
    BadQuestion,
    broken,
    capacity,
    check_question,
    longest_answer_s,
    sizing,
)
from paretune.optimizer.evaluate import Question, assess, evaluate
from paretune.optimizer.screen import estimate, means_of
from paretune.profiler.simulator import simulate
from paretune.profiler.step_time import scaled
from paretune.traces.metrics import Metric, Target
from paretune.traces.transform import scale

from .optimizer_examples import ALL_KEPT, NGRAM, deployment, poisson_trace, price, step_model

TTF30 = Metric("ttf", 30)
TARGET = Target.parse("ttf30:p95<=1s")


def of(trace, pool, target=TARGET, tables=None, **options):
    tables = tables or step_model(pool).tables
    saturation = estimate(means_of(trace, [target], False), pool, tables, 30).saturation_per_s / trace.rate_per_s
    return capacity(trace, pool, tables, [target], saturation=saturation, **options)


def holds(trace, pool, rate, target=TARGET):
    tables = step_model(pool).tables
    result = simulate(trace, pool, tables, rate=rate)
    return not broken(result, trace, [target], longest_answer_s(trace, tables, pool))


@pytest.mark.parametrize("max_num_seqs", [1, 4, 32])
@pytest.mark.parametrize("target", ["ttf30:p95<=1s", "ttft:p50<=100ms", "e2e:p99<=3s", "tpot:p90<=40ms"])
def test_capacity_holds_and_two_percent_more_does_not(max_num_seqs, target):
    trace, target = poisson_trace(600), Target.parse(target)
    pool = deployment(max_num_seqs=max_num_seqs).pool
    found = of(trace, pool, target)
    if found.rate == 0:
        assert not holds(trace, pool, 0.001, target)
        return
    assert holds(trace, pool, found.rate, target)
    assert found.tolerance <= TOLERANCE * (1 + 1e-6)
    assert not holds(trace, pool, found.rate * (1 + found.tolerance), target)


@given(st.floats(0.1, 3.0))
@settings(max_examples=15)
def test_the_answer_hardly_depends_on_the_guess(guess):
    trace, pool = poisson_trace(400), deployment().pool
    best = of(trace, pool)
    other = of(trace, pool, guess=best.rate * guess)
    # both are brackets of 2 %, and the percentile of a finite trace is not quite monotone in the rate
    assert other.rate == pytest.approx(best.rate, rel=0.06)


def test_proposals_that_are_kept_raise_the_capacity_beyond_what_the_mean_field_knows_of():
    trace = replace(poisson_trace(600), acceptance=ALL_KEPT)
    plain, speculating = (of(trace, deployment(max_num_seqs=1, **changes).pool) for changes in ({}, NGRAM))
    assert speculating.rate > 2 * plain.rate
    assert speculating.tolerance <= TOLERANCE * (1 + 1e-6), "a run failed above it: no ceiling cut it off"


def test_a_good_guess_takes_two_runs():
    trace, pool = poisson_trace(400), deployment().pool
    best = of(trace, pool)
    assert of(trace, pool, guess=best.rate).simulations == 2


def test_faster_steps_carry_exactly_as_much_more_under_a_limit_as_much_tighter():
    """Time scales: steps f times as long serve rate r as steps serve rate r * f, f times as slowly."""
    trace, pool = poisson_trace(500), deployment().pool
    tables = step_model(pool).tables._replace(request_s=np.zeros(2))
    plain = of(trace, pool, TARGET, tables)
    slow = of(trace, pool, Target(TTF30, 95, 2.0), scaled(tables, 2.0), guess=None)
    assert slow.rate == pytest.approx(plain.rate / 2, rel=1e-6)


def test_a_target_on_tpot_alone_does_not_let_the_queue_grow_for_ever():
    trace, pool = poisson_trace(600, rate_per_s=2.0), deployment(max_num_seqs=2).pool
    found = of(trace, pool, Target.parse("tpot:p95<=10s"))
    saturated = simulate(trace, pool, step_model(pool).tables, rate=50.0)
    per_s = 600 / float(np.nanmax(saturated.times.end_s)) / trace.rate_per_s
    assert 0.8 * per_s < found.rate < 1.2 * per_s


def test_nothing_is_carried_where_one_request_alone_is_too_slow():
    found = of(poisson_trace(200), deployment().pool, Target.parse("ttft:p50<=1ms"))
    assert (found.rate, found.tokens_per_s, found.result) == (0.0, 0.0, None)
    assert found.simulations < 20


@pytest.mark.parametrize("rate_per_s", [1.0, 6.0, 15.0])
def test_sizing_finds_the_fewest_replicas_that_a_walk_finds(rate_per_s):
    trace, pool = poisson_trace(400, rate_per_s), deployment(max_num_seqs=8).pool
    walked = next(n for n in range(1, 60) if holds(trace, pool.model_copy(update={"replicas": n}), 1.0))
    for guess in (1, walked, 3 * walked):
        found = sizing(trace, pool, step_model, [TARGET], most=64, guess=guess)
        assert found.replicas == walked
        assert found.result is not None
        assert found.result.times.finished.all()


def test_sizing_says_what_the_largest_number_still_breaks():
    found = sizing(poisson_trace(400, 40.0), deployment().pool, step_model, [TARGET], most=2, guess=1)
    assert (found.replicas, found.result) == (0, None)
    assert "ttf30:p95<=1s" in found.reason


@pytest.mark.parametrize(
    ("trace", "targets", "metric", "where"),
    [
        (poisson_trace(1), (), TTF30, "made up: arrival_s"),
        (poisson_trace(9), (), Metric("itl"), "metric"),
        (poisson_trace(9), ("ttf20:p95<=1s",), TTF30, "metric"),
        (poisson_trace(9), ("voice/ttft:p95<=1s",), TTF30, "target voice/ttft:p95<=1s"),
    ],
)
def test_questions_without_an_answer_are_refused(trace, targets, metric, where):
    with pytest.raises(BadQuestion) as caught:
        check_question(trace, [Target.parse(text) for text in targets], metric)
    assert (caught.value.where, caught.value.exit_code) == (where, 2)


def test_the_curve_has_the_percentiles_that_every_run_keeps():
    for percentile in (50, 90, 95, 99):
        check_question(poisson_trace(9), (), TTF30, percentile)
    with pytest.raises(BadQuestion) as caught:
        check_question(poisson_trace(9), (), TTF30, 75)
    assert (caught.value.where, caught.value.exit_code) == ("metric ttf30", 2)


def question(trace, targets, cost="capacity", max_devices=None):
    return Question(trace, tuple(targets), TTF30, 95, cost, 30, max_devices, step_model, price)


TILES = TileTable(((("linear", "bf16", 8), Tile("linear", "cpp", (("row_tile", 4),))),))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_seqs": 2},
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 32},
        {"weight_dtype": "int8"},
        {"weight_dtype": "fp32"},
        {"tensor_parallel_size": 2},
        {"num_threads": 2},
        {"tiles": TILES},
    ],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items())[:30],
)
def test_batch_limit_precision_shard_degree_and_tile_each_move_cost_at_a_fixed_target(changes):
    trace = poisson_trace(500, targets=("ttf30:p95<=1s",))
    base = deployment()
    ask = question(trace, trace.targets)
    before, after = (assess(ask, each) for each in (base, base.with_pool(**changes)))
    change = after.usd_per_million_tokens / before.usd_per_million_tokens - 1
    assert abs(change) > 2 * TOLERANCE
    assert after.capacity_rate > 0


def test_a_wider_batch_is_cheaper_until_the_target_binds():
    trace = poisson_trace(500, targets=("ttf30:p95<=1s",))
    ask = question(trace, trace.targets)
    costs = [assess(ask, deployment(max_num_seqs=n)).usd_per_million_tokens for n in (1, 2, 4)]
    assert costs == sorted(costs, reverse=True)


def test_sizing_costs_whole_replicas_at_the_price_of_their_devices():
    trace = poisson_trace(400, 60.0, targets=("ttf30:p95<=1s",))
    each = evaluate(question(trace, trace.targets, "sizing"), deployment(num_threads=2), saturation=0.5)[0]
    assert each.feasible
    assert each.deployment.pool.replicas == each.replicas_needed > 1
    assert each.usd_per_hour == pytest.approx(each.replicas_needed * 2 * 0.05)


def test_sizing_that_must_survive_buys_as_many_more_and_waits_no_longer():
    trace = poisson_trace(400, 60.0, targets=("ttf30:p95<=1s",))
    plain = question(trace, trace.targets, "sizing")
    least, spared = (evaluate(replace(plain, survive=lost), deployment(), saturation=0.5)[0] for lost in (0, 2))
    assert spared.replicas_needed == spared.deployment.pool.replicas == least.replicas_needed + 2
    assert spared.usd_per_hour == pytest.approx(spared.replicas_needed * 0.05)
    assert spared.value(TTF30, 95) <= least.value(TTF30, 95)
    left = spared.deployment.with_pool(replicas=spared.replicas_needed - 2)
    assert assess(plain, left).feasible
    assert not assess(plain, left.with_pool(replicas=left.pool.replicas - 1)).feasible


def test_where_none_would_be_left_the_reason_says_so():
    trace = poisson_trace(400, 60.0, targets=("ttf30:p95<=1s",))
    ask = replace(question(trace, trace.targets, "sizing", max_devices=2), survive=2)
    found = evaluate(ask, deployment(), saturation=0.5)[0]
    assert not found.feasible
    assert "none is left when 2 are lost" in found.reason


def test_without_targets_every_load_is_a_point_with_its_label():
    trace = poisson_trace(400)
    found = evaluate(question(trace, ()), deployment(), saturation=2.0)
    assert [each.load for each in found] == pytest.approx([0.6, 1.2, 1.7])
    costs = [each.usd_per_million_tokens for each in found]
    waits = [each.value(TTF30, 95) for each in found]
    assert costs == sorted(costs, reverse=True)
    assert waits == sorted(waits)
    sized = evaluate(question(trace, (), "sizing"), deployment(), saturation=0.2)
    assert [each.deployment.pool.replicas for each in sized] == [6, 9, 17][: len(sized)]
    assert all(each.load == 1 / each.deployment.pool.replicas for each in sized)


def test_an_assessment_has_intervals_around_everything():
    trace = poisson_trace(500, apps=True, targets=("voice/ttf30:p95<=1s",))
    each = assess(question(trace, trace.targets), deployment())
    for metric in ("ttft", "ttf30", "tpot", "e2e"):
        for p in (50, 90, 95, 99):
            low, high = each.interval(Metric.parse(metric), p)
            assert low < each.value(Metric.parse(metric), p) < high
    value, low, high = each.of_target(trace.targets[0])
    assert low < value < high
    low, high = each.cost_interval("capacity")
    assert low < each.usd_per_million_tokens < high < math.inf


def test_a_target_of_one_application_looks_at_its_requests_only():
    trace = poisson_trace(500, apps=True)
    fast = scale(trace, rate=1.0)
    assert trace.app is not None
    voice = trace.app.codes == 1
    each = assess(question(fast, [Target.parse("voice/e2e:p95<=9s")]), deployment())
    result = simulate(trace, deployment().pool, step_model(deployment().pool).tables)
    expected = np.percentile(result.times.values(Metric("e2e"))[voice], 95)
    assert each.values["voice/e2e:p95<=9s"] == pytest.approx(expected)
