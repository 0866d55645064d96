import json
import math
import threading
from dataclasses import replace

import numpy as np
import pytest

from paretune.optimizer.capacity import PART_SLACK, BadQuestion
from paretune.optimizer.evaluate import evaluate
from paretune.optimizer.front import pareto
from paretune.optimizer.sampler import ENUMERATION, TPE, Outcome, TpeAndNeighbors
from paretune.optimizer.search import tune
from paretune.optimizer.space import SearchSpace
from paretune.optimizer.store import Ledger, NoSuchStudy
from paretune.optimizer.study import Interrupted, Study, load_study
from paretune.profiler.hardware import BadHardware
from paretune.profiler.simulator import simulate
from paretune.profiler.step_time import scaled
from paretune.profiler.tables import step_tables
from paretune.traces.metrics import Metric, Target

from .optimizer_examples import deployment, poisson_trace, price, small_space, step_model
from .profiler_examples import SMALL, four_cores

TTF30 = Metric("ttf", 30)
TARGETS = ("ttf30:p95<=1s",)


def study(trace=None, space=None, **options):
    trace = trace or poisson_trace(200, 3.0, targets=TARGETS)
    options = {"metric": TTF30, "trials": 100, "seed": 1, "jobs": 1, **options}
    return tune(trace, space or small_space(), options.pop("model", step_model), price, **options)


def text(found):
    return json.dumps(found.to_dict(), sort_keys=True)


def test_trial_zero_is_the_plain_default_even_where_it_lies_outside_the_space():
    odd = replace(small_space(), default=deployment(max_num_seqs=7))
    found = study(space=odd)
    assert found.default.trial == 0
    assert found.default.deployment.pool.max_num_seqs == 7
    assert found.sampler == ENUMERATION
    assert [each.trial for each in found.front.evaluations].count(0) == 1


def test_a_small_space_is_simulated_whole_and_every_point_is_accounted_for():
    found = study()
    counts = found.screened
    # the default lies outside this space
    assert counts.points == sum(counts.invalid.values()) + sum(counts.dropped.values()) + counts.simulated - 1
    assert counts.failed == 0
    assert found.complete
    assert found.not_modeled == ("the weather",)


@pytest.mark.parametrize("cost", ["capacity", "sizing"])
@pytest.mark.parametrize("targets", [TARGETS, ()])
def test_the_front_has_intervals_and_falls_with_cost(cost, targets):
    found = study(poisson_trace(200, 3.0, targets=targets), cost=cost)
    assert len(found.front.points) > 1
    for point in found.front.points:
        low, high = point.interval(TTF30, 95)
        assert low < found.front.latency_s(point) < high
        assert point.feasible
        if targets:
            assert point.replicas_needed >= 1
            assert point.capacity_rate > 0
    assert found.default.intervals


@pytest.mark.parametrize(("cost", "targets"), [("capacity", TARGETS), ("sizing", ())])
def test_surviving_asks_for_sizing_and_for_something_to_hold(cost, targets):
    with pytest.raises(BadQuestion) as raised:
        study(poisson_trace(200, 3.0, targets=targets), cost=cost, survive=1)
    assert raised.value.where == "survive 1"


def test_a_study_that_must_survive_is_another_study(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    study(cost="sizing", ledger=ledger, study="one")
    with pytest.raises(NoSuchStudy, match="survive"):
        study(cost="sizing", ledger=ledger, study="one", survive=1)


@pytest.mark.parametrize("trials", [100, 14])
def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_threads(trials):
    one, three = study(trials=trials), study(trials=trials, jobs=3)
    assert text(one) == text(three)
    assert [each.to_dict() for each in one.front.evaluations] == [each.to_dict() for each in three.front.evaluations]


def test_a_large_space_is_sampled_and_another_seed_samples_others():
    one, two = study(trials=14), study(trials=14, seed=2)
    assert one.sampler == TPE
    assert one.screened.simulated == 14
    assert len({each.candidate for each in one.front.evaluations}) == 14
    assert {each.candidate for each in one.front.evaluations} != {each.candidate for each in two.front.evaluations}


class Stop:
    """Raises KeyboardInterrupt, as Ctrl-C does, once so many trials are done."""

    def __init__(self, after):
        self.after = after

    def __call__(self, progress):
        if progress.stage == "simulate" and progress.done >= self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("trials", [100, 14])
def test_an_interrupted_study_goes_on_to_the_same_bytes(tmp_path, trials):
    whole = study(trials=trials)
    with Ledger(tmp_path / "ledger.db") as ledger:
        with pytest.raises(Interrupted) as caught:
            study(trials=trials, ledger=ledger, progress=Stop(9))
        assert caught.value.exit_code == 75
        assert "type the same command again to go on" in str(caught.value)
        kept = len(ledger.records("default"))
        assert kept >= 9
        again = study(trials=trials, ledger=ledger)
        assert text(again) == text(whole)
        assert len(ledger.records("default")) == whole.screened.simulated


def test_a_resumed_study_simulates_nothing_twice(tmp_path):
    with Ledger(tmp_path / "ledger.db") as ledger:
        study(ledger=ledger)
        before = [record.trial for record in ledger.records("default")]
        seen = []
        trace = poisson_trace(200, 3.0, targets=TARGETS)
        study(trace, ledger=ledger, model=lambda pool: (seen.append(threading.get_ident()), step_model(pool))[1])
        assert [record.trial for record in ledger.records("default")] == before
        assert len(set(before)) == len(before)


def test_ctrl_c_in_a_worker_thread_run_keeps_what_was_finished(tmp_path):
    calls = []

    def model(pool):
        calls.append(pool)
        return step_model(pool)

    with Ledger(tmp_path / "ledger.db") as ledger:
        with pytest.raises(Interrupted):
            study(ledger=ledger, model=model, jobs=2, progress=Stop(1))
        assert [record.trial for record in ledger.records("default")] == [0]
        assert load_study(ledger, "default").complete is False


def test_ctrl_c_in_the_middle_of_a_batch_keeps_the_trials_of_it_that_were_done(tmp_path, monkeypatch):
    calls = []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    with Ledger(tmp_path / "ledger.db") as ledger:
        monkeypatch.setattr("paretune.optimizer.search.evaluate", interrupted)
        with pytest.raises(Interrupted) as caught:
            study(ledger=ledger)
        trials = [record.trial for record in ledger.records("default")]
        # trial 0, and of the first batch those before the fifth call at least
        assert {0, 1, 2, 3} <= set(trials)
        assert len(set(trials)) == len(trials) == caught.value.kept
        monkeypatch.undo()
        assert text(study(ledger=ledger)) == text(study())


def test_a_study_with_other_settings_does_not_go_on_under_the_same_name(tmp_path):
    with Ledger(tmp_path / "ledger.db") as ledger:
        study(ledger=ledger)
        with pytest.raises(NoSuchStudy, match="seed") as caught:
            study(ledger=ledger, seed=9)
        assert caught.value.exit_code == 2
        with pytest.raises(NoSuchStudy, match="profile"):
            study(ledger=ledger, profile="another")


def test_a_study_is_read_back_as_it_was(tmp_path):
    with Ledger(tmp_path / "ledger.db") as ledger:
        found = study(ledger=ledger, measure=lambda deployment, rate: measured(deployment, rate, 1.3), finalists=4)
        again = load_study(ledger, "default")
    assert text(again) == text(found)
    known = sorted(
        (each.to_dict() for each in found.front.evaluations), key=lambda each: json.dumps(each, sort_keys=True)
    )
    read = sorted(
        (each.to_dict() for each in again.front.evaluations), key=lambda each: json.dumps(each, sort_keys=True)
    )
    assert read == known


@pytest.mark.parametrize("targets", [TARGETS, ()])
def test_a_study_survives_pandas(targets):
    trace = poisson_trace(200, 3.0, targets=targets)
    found = study(trace, measure=lambda deployment, rate: measured(deployment, rate, 1.3), finalists=4, study="night")
    again = Study.from_pandas(found.to_pandas())
    assert again.name == "night"
    assert text(again) == text(found)
    assert [each.to_dict() for each in again.front.evaluations] == [each.to_dict() for each in found.front.evaluations]


def test_a_study_to_be_renewed_goes_on_only_if_it_was_interrupted_and_has_the_same_settings(tmp_path):
    with Ledger(tmp_path / "ledger.db") as ledger:
        for seed in (1, 2):
            with pytest.raises(Interrupted) as caught:
                study(ledger=ledger, seed=seed, renew=True, progress=Stop(9))
            assert caught.value.kept == len(ledger.records("default"))
            assert ledger.study("default").settings["seed"] == seed
        begun = ledger.records("default")
        whole = study(ledger=ledger, seed=2, renew=True)
        assert text(whole) == text(study(seed=2))
        assert [each.digest for each in ledger.records("default")][: len(begun)] == [each.digest for each in begun]
        with pytest.raises(Interrupted):
            study(ledger=ledger, seed=2, renew=True, progress=Stop(1))
        assert len(ledger.records("default")) == 1


def test_a_time_budget_ends_a_study_early_and_says_so():
    found = study(time_budget_s=0.0)
    assert not found.complete
    assert found.screened.simulated == 1
    assert found.front.evaluations[0].trial == 0


def test_candidates_without_step_times_are_left_out_and_counted():
    def model(pool):
        if pool.weight_dtype == "int8":
            raise BadHardware("pool.weight_dtype", "int8", "bf16", "measure int8 too")
        return step_model(pool)

    found = study(model=model)
    kinds = [kind for kind in found.screened.dropped if kind.startswith("no step times")]
    assert len(kinds) == 1
    assert {each.deployment.pool.weight_dtype for each in found.front.evaluations} == {"bf16"}


def test_a_default_without_step_times_ends_the_study_with_the_reason():
    def model(pool):
        raise BadHardware("pool.weight_dtype", "bf16", "fp32", "measure bf16 too")

    with pytest.raises(BadHardware):
        study(model=model)


def test_a_bug_in_a_step_model_is_not_taken_for_a_failed_candidate():
    def model(pool):
        if pool.weight_dtype == "int8":
            raise ZeroDivisionError
        return step_model(pool)

    with pytest.raises(ZeroDivisionError):
        study(model=model)


def test_nothing_feasible_gives_an_empty_front_and_reasons():
    found = study(poisson_trace(200, 300.0, targets=("ttf30:p95<=300ms",)))
    assert found.front.points == ()
    assert not found.default.feasible
    assert found.default.reason


TRACE = poisson_trace(200, 3.0, targets=TARGETS)


def measured(deployment, rate, slower, only=None):
    pool = deployment.pool
    factor = slower if only is None or pool.max_num_seqs in only else 1.0
    return simulate(TRACE, pool, scaled(step_model(pool).tables, factor), rate=rate).times


def test_finalists_are_the_default_and_the_fronts_ends_and_their_bias_moves_all_others():
    runs = []

    def measure(deployment, rate):
        runs.append((deployment.digest(), rate))
        return measured(deployment, rate, 1.3)

    plain = study(TRACE)
    found = study(TRACE, measure=measure, finalists=5)
    assert len(runs) == len(set(runs)) == 5
    assert {rate for _, rate in runs} == {1.0}
    assert runs[0][0] == found.default.deployment.digest()
    assert found.default.fidelity == "measured"
    by_metric = {each.metric: each for each in found.corrections}
    assert by_metric["tpot"].ratio == pytest.approx(1.3, rel=0.1)
    assert by_metric["tpot"].spread < 0.05
    assert by_metric["tpot"].number == 5
    before = {each.candidate: each.value(TTF30, 95) for each in plain.front.evaluations}
    for each in found.front.evaluations:
        if each.fidelity == "simulated":
            ratio = by_metric["ttf30"].ratio
            assert each.value(TTF30, 95) == pytest.approx(before[each.candidate] * ratio)
    for each in found.finalists:
        assert each.measured is not None
        # the prediction of a finalist is corrected by the others, never by its own measurement
        assert each.predicted(TTF30, 95) == pytest.approx(each.value(TTF30, 95), rel=0.15)
        assert each.interval(TTF30, 95) != each.intervals["ttf30:p95"]


def test_a_finalists_own_measurement_never_corrects_its_prediction():
    odd = [study(TRACE).default.deployment.pool.max_num_seqs]
    found = study(TRACE, measure=lambda d, rate: measured(d, rate, 3.0, odd), finalists=5)
    plain = study(TRACE)
    before = {each.candidate: each.predicted(TTF30, 95) for each in plain.front.evaluations}
    for each in found.finalists:
        if each.deployment.pool.max_num_seqs in odd:
            assert each.value(TTF30, 95) > 1.5 * each.predicted(TTF30, 95)
            assert each.predicted(TTF30, 95) == pytest.approx(before[each.candidate], rel=0.05)


def test_the_front_is_made_anew_from_what_was_measured():
    plain = study(TRACE)
    fastest = plain.front.points[-1]
    slow = [fastest.deployment.pool.max_num_seqs]
    found = study(TRACE, measure=lambda d, rate: measured(d, rate, 4.0, slow), finalists=6)
    assert fastest.candidate not in {point.candidate for point in found.front.points if point.fidelity == "simulated"}
    truth = {each.candidate: each for each in found.finalists}
    for point in found.front.points:
        if point.candidate in truth:
            assert point.fidelity == "measured"
    assert [p.to_dict() for p in pareto(found.front.evaluations, TTF30, 95, "capacity").points] == [
        p.to_dict() for p in found.front.points
    ]


def test_a_finalist_that_cannot_be_measured_cannot_win_and_is_tried_again(tmp_path):
    plain = study(TRACE)
    victim = plain.front.points[0].deployment.digest()
    broken = True

    def measure(deployment, rate):
        if broken and deployment.digest() == victim:
            raise BadHardware("memory", "3 GB", "2 GB", "take a smaller model")
        return measured(deployment, rate, 1.0)

    with Ledger(tmp_path / "ledger.db") as ledger:
        found = study(TRACE, measure=measure, finalists=4, ledger=ledger)
        assert victim not in {record.digest for record in ledger.records("default") if record.fidelity == "measured"}
        broken = False
        again = study(TRACE, measure=measure, finalists=4, ledger=ledger)
    failed = [each for each in found.finalists if each.measured is None]
    assert [each.candidate for each in failed] == [victim]
    assert "3 GB" in failed[0].reason
    assert found.screened.measurements_failed == 1
    assert victim not in {point.candidate for point in found.front.points}
    assert again.screened.measurements_failed == 0


def test_a_finalist_that_does_not_fit_the_machine_is_not_measured():
    asked = []

    def measure(deployment, rate):
        asked.append(deployment)
        return measured(deployment, rate, 1.0)

    found = study(TRACE, measure=measure, finalists=4, measurable=lambda deployment: deployment.pool.replicas == 1)
    assert asked
    assert all(each.pool.replicas == 1 for each in asked)
    assert found.screened.measured == len(asked)


def test_without_targets_finalists_are_measured_at_the_load_of_their_label():
    trace = poisson_trace(200, 3.0)
    rates = []

    def measure(deployment, rate):
        rates.append((deployment.pool.replicas, rate))
        return measured(deployment, rate, 1.0)

    found = study(trace, measure=measure, finalists=4)
    expected = [(each.deployment.pool.replicas, each.load * each.deployment.pool.replicas) for each in found.finalists]
    assert np.array(rates) == pytest.approx(np.array(expected))


def test_the_sampler_proposes_each_candidate_once_and_then_none():
    space = small_space()
    points = space.candidates().points
    sampler = TpeAndNeighbors(space, points, seed=3)
    seen = []
    while batch := sampler.ask(5):
        seen += batch
        for index in batch:
            sampler.tell(index, Outcome(float(index % 7) or float("inf"), float(index % 5), float(index % 3 - 1)))
    assert sorted(seen) == list(range(len(points)))


def test_the_sampler_finds_more_of_a_known_front_than_chance():
    """Latency and cost pull in opposite directions on a grid; hypervolume against the mean of random draws."""
    space = small_space(
        max_num_seqs=(1, 2, 4, 8, 16, 32),
        max_num_batched_tokens=(32, 64, 128, 256, 512),
        num_threads=(1,),
        replicas=(1,),
    )
    points = space.candidates().points
    sizes = [len(values) for _, values in space.fields]

    def outcome(index):
        x = np.array(points[index]) / np.maximum(1, np.array(sizes) - 1)
        return Outcome(1 + 9 * (x[3] - 0.3) ** 2 + x[2], 1 + 5 * (x[4] - 0.8) ** 2 + (1 - x[2]) + x[3], 0.0)

    def volume(indices):
        reached = sorted((outcome(i).cost, outcome(i).latency_s) for i in indices)
        total, best = 0.0, 12.0
        for cost, latency in reached:
            if latency < best:
                total += (best - latency) * (9.0 - cost)
                best = latency
        return total

    found = []
    for seed in range(5):
        sampler = TpeAndNeighbors(space, points, seed)
        tried = []
        while len(tried) < 20:
            batch = sampler.ask(5)
            tried += batch
            for index in batch:
                sampler.tell(index, outcome(index))
        found.append(volume(tried))
    rng = np.random.default_rng(0)
    chance = [volume(rng.choice(len(points), 20, replace=False)) for _ in range(200)]
    assert np.mean(found) > np.mean(chance)


def test_a_long_trace_is_compared_on_its_busiest_part_and_its_front_on_the_whole():
    trace = poisson_trace(4000, 3.0, targets=TARGETS)
    space = small_space(num_threads=(1,), replicas=(1,), max_num_batched_tokens=(512,))
    found = study(trace, space)
    for each in (*found.front.points, found.default):
        assert each.capacity_tolerance <= 0.0201
        assert each.candidate
    others = [each for each in found.front.evaluations if math.isinf(each.capacity_tolerance)]
    assert others
    for each in others:
        # even if the whole trace were as much easier as it ever was, another candidate would be better in both
        least = each.cost("capacity") / (1 + PART_SLACK)
        latency_s = found.front.latency_s(each)
        assert any(p.cost("capacity") <= least and found.front.latency_s(p) <= latency_s for p in found.front.points)


def test_targets_given_to_tune_take_the_place_of_the_traces():
    found = study(TRACE, targets=[Target.parse("e2e:p50<=9s")])
    assert [str(target) for target in found.targets] == ["e2e:p50<=9s"]


@pytest.mark.parametrize("cost", ["capacity", "sizing"])
@pytest.mark.parametrize("targets", [("ttf30:p95<=1s",), ()])
@pytest.mark.parametrize("measured", [(1, 2, 4), (1, 2)])
def test_a_machine_of_four_cores_is_tuned_for_though_three_replicas_were_not_measured(cost, targets, measured):
    profile = four_cores(*measured)
    # two replicas are too few for it
    trace = poisson_trace(1500, 450.0, targets=targets)
    space = SearchSpace((("replicas", (1, 2, 4)), ("max_num_seqs", (8, 16))), deployment(), 4)
    found = study(trace, space, cost=cost, model=lambda pool: step_tables(profile, SMALL, pool))
    assert found.complete
    assert found.front.points or measured == (1, 2)
    if 4 in measured and targets:
        assert 3 in {point.replicas_needed for point in found.front.points}
        assert cost == "capacity" or any("3 replicas" in note for note in found.not_modeled)
