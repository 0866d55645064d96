from dataclasses import replace

import numpy as np
import pytest

from paretune.optimizer.capacity import tokens_per_s
from paretune.optimizer.evaluate import Question, evaluate, sharpen
from paretune.optimizer.front import pareto
from paretune.optimizer.screen import MARGIN, alone_s, estimate, means_of, screen
from paretune.profiler.simulator import simulate
from paretune.traces.formats import read, sample_path
from paretune.traces.metrics import Metric, Target, percentile
from paretune.traces.transform import clip

from .optimizer_examples import ALL_KEPT, NGRAM, deployment, poisson_trace, price, small_space, step_model

TTF30 = Metric("ttf", 30)


@pytest.mark.parametrize("seed", range(20))
def test_the_mean_field_is_within_its_margin_of_the_simulated_saturation(seed):
    rng = np.random.default_rng(seed)
    trace = clip(read(sample_path()), 500) if seed % 2 else poisson_trace(600)
    pool = deployment(
        max_num_seqs=int(rng.choice([1, 4, 16, 64])),
        max_num_batched_tokens=int(rng.choice([64, 256, 1024])),
        num_threads=int(rng.choice([1, 2])),
        weight_dtype=str(rng.choice(["fp32", "bf16", "int8"])),
    ).pool
    tables = step_model(pool).tables
    found = estimate(means_of(trace, (), False), pool, tables, 30)
    flooded = simulate(trace, pool, tables, rate=10 * found.saturation_per_s / trace.rate_per_s)
    carried_per_s = tokens_per_s(flooded) / float(trace.output_tokens.mean())
    assert 1 / MARGIN < carried_per_s / found.saturation_per_s < MARGIN


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("seqs", [1, 16])
def test_a_pipeline_carries_no_more_than_its_screen_says(stages, seqs):
    trace, pool = poisson_trace(600), deployment(max_num_seqs=seqs, pipeline_parallel_size=stages).pool
    tables = step_model(pool).tables
    found = estimate(means_of(trace, (), False), pool, tables, 30)
    flooded = simulate(trace, pool, tables, rate=10 * found.saturation_per_s / trace.rate_per_s)
    carried_per_s = tokens_per_s(flooded) / float(trace.output_tokens.mean())
    # less where the steps of the stages differ in length, and one waits for the other
    assert 0.4 < carried_per_s / found.saturation_per_s < MARGIN


@pytest.mark.parametrize("stages", [1, 3])
def test_one_request_alone_waits_as_long_as_the_simulator_says(stages):
    trace = poisson_trace(200, rate_per_s=0.001)
    pool = deployment(max_num_batched_tokens=64, pipeline_parallel_size=stages).pool
    tables = step_model(pool).tables
    means = means_of(trace, (), False)
    found = estimate(means, pool, tables, 30)
    times = simulate(trace, pool, tables).times
    for metric in (Metric("ttft"), TTF30, Metric("tpot"), Metric("e2e")):
        for p in (50, 95):
            expected = percentile(times.values(metric), p)
            assert percentile(alone_s(metric, found.alone, means), p) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("targets", [("ttf30:p95<=1s",), ("ttft:p99<=300ms", "tpot:p50<=12ms"), ()])
def test_no_point_of_the_front_is_ever_dropped(targets):
    trace = poisson_trace(300, 6.0, targets=targets)
    space = small_space(max_num_seqs=(1, 8, 32), max_num_batched_tokens=(32, 512))
    question = Question(trace, trace.targets, TTF30, 95, "capacity", 30, 2, step_model, price)
    pools = [each.pool for each in space.candidates().deployments]
    means = means_of(trace, trace.targets, True)
    estimates = [estimate(means, pool, step_model(pool).tables, 30) for pool in pools]
    found = screen(
        estimates,
        pools,
        [means] * len(pools),
        [question.usd_per_hour(pool) / pool.replicas for pool in pools],
        targets=trace.targets,
        metric=TTF30,
        p=95,
        most_replicas=[pool.replicas for pool in pools],
    )
    assert found.dropped, "a screen that drops nothing proves nothing here"
    everything = []
    for i, (pool, each) in enumerate(zip(pools, estimates)):
        saturation = each.saturation_per_s / trace.rate_per_s
        for known in evaluate(question, space.with_pool(pool), saturation=saturation):
            sharp = sharpen(question, known, saturation=saturation) if targets else known
            everything.append((i, sharp))
    front = pareto([each for _, each in everything], TTF30, 95, "capacity")
    winners = {i for i, each in everything if any(each is point for point in front.points)}
    assert winners
    assert winners <= set(found.kept)


def test_what_is_dropped_is_told_why():
    trace = poisson_trace(300, 400.0)
    pool = deployment().pool
    for target, reason in [("ttf30:p95<=1ms", "misses a target even when idle"), ("ttft:p95<=9s", "carry")]:
        slow = poisson_trace(300, 0.1) if "idle" in reason else trace
        targets = [Target.parse(target)]
        means = means_of(slow, targets, True)
        each = estimate(means, pool, step_model(pool).tables, 30)
        found = screen([each], [pool], [means], [0.05], targets=targets, metric=TTF30, p=95, most_replicas=[1])
        assert found.kept == ()
        assert reason in next(iter(found.counts))
        assert found.dropped[0]


def test_who_speculates_is_not_dropped_for_what_it_would_do_without():
    trace = replace(poisson_trace(100, 0.5, targets=("tpot:p95<=3ms",)), acceptance=ALL_KEPT)
    pools = [deployment(max_num_seqs=1, **changes).pool for changes in ({}, NGRAM, {"num_threads": 2})]
    means = means_of(trace, trace.targets, False)
    estimates = [estimate(means, pool, step_model(pool).tables, 30) for pool in pools]
    found = screen(
        estimates, pools, [means] * 3, [0.05] * 3, targets=trace.targets, metric=TTF30, p=95, most_replicas=[1] * 3
    )
    assert found.kept == (1, 2)
    kept = simulate(trace, pools[1], step_model(pools[1]).tables)
    assert percentile(kept.times.values(Metric("tpot")), 95) < 0.003
