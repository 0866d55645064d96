import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.optimizer.evaluate import Question, assess
from paretune.optimizer.front import pareto
from paretune.optimizer.pick import BadPick, NothingFeasible, cheapest, fastest, knee, make_spec, numbered, pick
from paretune.optimizer.search import tune
from paretune.runtime.spec import load_deployment, save_deployment
from paretune.traces.describe import fingerprint
from paretune.traces.metrics import Metric, Target

from .optimizer_examples import deployment, evaluation, poisson_trace, price, small_space, step_model

TTF30 = Metric("ttf", 30)


def front_of(*rows):
    """(cost, latency, upper end of its interval)"""
    known = [
        evaluation(cost, latency_s, i, intervals={"ttf30:p95": (latency_s / 2, high_s)})
        for i, (cost, latency_s, high_s) in enumerate(rows)
    ]
    return pareto(known, TTF30, 95, "capacity")


THREE = front_of((1, 0.5, 0.7), (2, 0.3, 0.45), (8, 0.2, 0.25))


def test_by_target_it_takes_the_cheapest_whose_whole_interval_holds():
    assert cheapest(THREE, [Target.parse("ttf30:p95<=700ms")]).trial == 0
    # 0.5 s would do, but up to 0.7 s are possible
    assert cheapest(THREE, [Target.parse("ttf30:p95<=600ms")]).trial == 1
    assert cheapest(THREE, [Target.parse("ttf30:p95<=300ms")]).trial == 2


def test_more_confidence_asks_for_more_room():
    target = [Target.parse("ttf30:p95<=450ms")]
    assert cheapest(THREE, target, confidence=0.9).trial == 1
    assert cheapest(THREE, target, confidence=0.99).trial == 2
    assert cheapest(THREE, [Target.parse("ttf30:p95<=600ms")], confidence=0.1).trial == 0


@given(st.floats(0.05, 1.0), st.floats(1.0, 3.0))
def test_a_looser_target_never_costs_more(limit_s, looser):
    def cost(limit):
        try:
            return cheapest(THREE, [Target(TTF30, 95, limit)]).cost("capacity")
        except NothingFeasible:
            return math.inf

    assert cost(limit_s * looser) <= cost(limit_s)


def test_when_nothing_holds_it_says_what_would_have_to_give():
    with pytest.raises(NothingFeasible) as caught:
        cheapest(THREE, [Target.parse("ttf30:p95<=240ms")])
    assert caught.value.exit_code == 3
    assert "allow 250 ms" in str(caught.value)
    assert "less confidence" in str(caught.value)
    with pytest.raises(NothingFeasible, match="less traffic"):
        cheapest(THREE, [Target.parse("ttf30:p95<=100ms")])
    with pytest.raises(NothingFeasible):
        cheapest(front_of(), [Target.parse("ttf30:p95<=100ms")])


def test_a_target_that_the_study_knows_nothing_about_is_refused():
    for text in ("voice/ttf30:p95<=1s", "itl:p95<=1s", "ttf30:p97<=1s"):
        with pytest.raises(BadPick) as caught:
            cheapest(THREE, [Target.parse(text)])
        assert caught.value.exit_code == 2


def test_a_candidate_that_is_not_feasible_is_never_picked():
    bad = evaluation(0.1, 0.1, 9, feasible=False, reason="breaks", intervals={"ttf30:p95": (0.1, 0.1)})
    front = pareto([bad, *THREE.evaluations], TTF30, 95, "capacity")
    assert cheapest(front, [Target.parse("ttf30:p95<=9s")]).trial == 0


def test_by_budget_it_takes_the_fastest_that_is_affordable():
    assert [fastest(THREE, budget).trial for budget in (1, 1.9, 2, 100)] == [0, 0, 1, 2]
    with pytest.raises(NothingFeasible, match=r"\$1"):
        fastest(THREE, 0.5)


def test_the_knee_is_where_paying_more_stops_buying_speed():
    # 1 -> 1.1 halves the wait three times over; from there on money buys next to nothing
    front = front_of((1, 1.0, 1), (1.1, 0.12, 1), (4, 0.11, 1), (10, 0.1, 1))
    assert knee(front).trial == 1
    assert knee(front_of((1, 1.0, 1))).trial == 0
    with pytest.raises(NothingFeasible):
        knee(front_of())


@given(st.floats(0.1, 1000), st.floats(0.001, 1000))
def test_the_knee_does_not_depend_on_units(dollars, seconds):
    rows = [(1, 1.0, 1), (1.2, 0.4, 1), (2, 0.2, 1), (10, 0.1, 1)]
    assert knee(front_of(*((c * dollars, t * seconds, 1) for c, t, _ in rows))).trial == knee(front_of(*rows)).trial


def test_points_are_numbered_from_one_at_the_cheapest():
    assert [numbered(THREE, n).trial for n in (1, 2, 3)] == [0, 1, 2]
    for n in (0, 4):
        with pytest.raises(BadPick, match="1 to 3"):
            numbered(THREE, n)


def test_there_is_one_way_to_choose_at_a_time():
    assert pick(THREE, point=3).trial == 2
    assert pick(THREE).trial == knee(THREE).trial
    with pytest.raises(BadPick):
        pick(THREE, point=1, budget_usd=1.0)


def test_a_spec_carries_targets_predictions_with_intervals_and_provenance(tmp_path):
    trace = poisson_trace(300, 3.0, targets=("ttf30:p95<=1s",))
    question = Question(trace, trace.targets, TTF30, 95, "capacity", 30, 2, step_model, price)
    chosen = assess(question, deployment())
    spec = make_spec(
        chosen,
        trace=trace,
        targets=trace.targets,
        study="night",
        profile="made up",
        profile_digest="abc",
        measured_steps=True,
        prices="made up",
        prices_as_of="2026-11-01",
        created_at="2026-11-23T00:00:00+00:00",
    )
    save_deployment(spec, tmp_path / "spec.yaml")
    again = load_deployment(tmp_path / "spec.yaml")
    assert again == spec
    assert again.digest() == chosen.deployment.digest()
    assert again.targets == ("ttf30:p95<=1s",)
    for metric in ("ttft", "ttf30", "tpot", "e2e"):
        for p in (50, 90, 95, 99):
            found = again.prediction(metric, p)
            assert found is not None
            assert found.low < found.value < found.high
            assert found.value == pytest.approx(chosen.predicted(Metric.parse(metric), p))
    capacity = again.prediction("requests_per_s", None)
    assert capacity is not None
    assert capacity.value == pytest.approx(chosen.capacity_rate * trace.rate_per_s)
    # what devices cost is known: it has no interval, and is not given one without width
    hour = again.prediction("usd_per_hour", None)
    assert hour is not None
    assert (hour.low, hour.high, hour.confidence) == (None, None, None)
    assert again.provenance is not None
    assert again.provenance.trace_digest == trace.digest()
    assert again.provenance.trace_fingerprint == fingerprint(trace)


@pytest.mark.parametrize("cost", ["capacity", "sizing"])
def test_no_interval_of_a_spec_is_without_width(cost):
    trace = poisson_trace(200, 3.0)
    options = {"metric": TTF30, "trials": 4, "cost": cost}
    found = tune(trace, small_space(), step_model, price, **options)
    for chosen in found.front.points:
        spec = make_spec(
            chosen, trace=trace, targets=(), study="night", profile="made up", profile_digest="abc",
            measured_steps=True, prices="made up", prices_as_of="2026-11-01",
        )  # fmt: skip
        assert spec.prediction("usd_per_hour", None) is not None
        assert (spec.prediction("usd_per_million_tokens", None) is not None) == (cost == "capacity")
        for each in spec.predicted:
            if each.low is not None:
                assert each.low < each.value < each.high
            else:
                assert each.metric == "usd_per_hour"
