import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.optimizer.front import Evaluation, Front, key_of, pareto
from paretune.traces.metrics import Metric, Target

from .optimizer_examples import evaluation

TTF30, TTFT = Metric("ttf", 30), Metric("ttft")

points = st.lists(
    st.tuples(st.sampled_from([0.5, 1, 2, 3, 4, math.inf]), st.sampled_from([0.1, 0.2, 0.3, 0.4]), st.booleans()),
    max_size=25,
)


def beats(a: Evaluation, b: Evaluation) -> bool:
    mine, others = ((each.cost("capacity"), round(each.value(TTF30, 95), 9)) for each in (a, b))
    return mine[0] <= others[0] and mine[1] <= others[1] and mine != others


@given(points)
def test_the_front_is_what_nobody_beats(rows):
    known = [evaluation(cost, latency_s, i, feasible=feasible) for i, (cost, latency_s, feasible) in enumerate(rows)]
    front = pareto(known, TTF30, 95, "capacity")
    fit = [each for each in known if each.feasible and math.isfinite(each.cost("capacity"))]
    unbeaten = {
        (each.cost("capacity"), round(each.value(TTF30, 95), 9)) for each in fit if not any(beats(o, each) for o in fit)
    }
    assert {(p.cost("capacity"), round(front.latency_s(p), 9)) for p in front.points} == unbeaten
    assert len(front.points) == len(unbeaten)
    costs = [point.cost("capacity") for point in front.points]
    latencies = [front.latency_s(point) for point in front.points]
    assert costs == sorted(costs)
    assert latencies == sorted(latencies, reverse=True)


def test_of_equal_points_the_earliest_trial_stays():
    front = pareto([evaluation(1, 0.2, 7), evaluation(1, 0.2, 3)], TTF30, 95, "capacity")
    assert [point.trial for point in front.points] == [3]


def test_the_highest_fidelity_of_a_candidate_counts():
    simulated = evaluation(1, 0.1, 4)
    from .optimizer_examples import summary

    measured = evaluation(1, 0.1, 4, fidelity="measured", measured=summary(0.3))
    other = evaluation(2, 0.2, 5)
    front = pareto([measured, simulated, other], TTF30, 95, "capacity")
    assert [round(front.latency_s(point), 9) for point in front.points] == [0.3, 0.2]
    assert measured.predicted(TTF30, 95) == pytest.approx(0.1)


def test_the_two_costs_are_two_axes():
    each = evaluation(1, 0.1)
    assert (each.cost("capacity"), each.cost("sizing")) == (1, 2)
    assert each.cost_interval("sizing") == (2, 2)


@given(points)
def test_a_front_survives_pandas_and_json(rows):
    known = [
        evaluation(cost, latency_s, i, feasible=ok, intervals={"ttf30:p95": (latency_s / 2, math.inf)})
        for i, (cost, latency_s, ok) in enumerate(rows)
    ]
    front = pareto(known, TTF30, 95, "sizing")
    again = Front.from_pandas(front.to_pandas())
    assert [each.to_dict() for each in again.evaluations] == [each.to_dict() for each in known]
    assert [each.trial for each in again.points] == [each.trial for each in front.points]
    for each in known:
        assert Evaluation.from_dict(json.loads(json.dumps(each.to_dict(), allow_nan=False))).to_dict() == each.to_dict()


def test_rows_taken_out_of_the_frame_are_out_of_the_front():
    front = pareto([evaluation(1, 0.3, 0), evaluation(2, 0.2, 1)], TTF30, 95, "capacity")
    frame = front.to_pandas()
    assert list(frame["on_front"]) == [True, True]
    assert [each.trial for each in Front.from_pandas(frame[frame["trial"] == 1]).points] == [1]


def test_a_correction_moves_predictions_and_not_measurements():
    from .optimizer_examples import summary

    each = evaluation(1, 0.2, correction={"ttf30": 1.5})
    assert each.value(TTF30, 95) == pytest.approx(0.3)
    assert each.value(TTFT, 95) == pytest.approx(0.2)
    assert evaluation(1, 0.2, correction={"ttf30": 1.5}, measured=summary(0.25)).value(TTF30, 95) == pytest.approx(0.25)


def test_a_target_of_one_application_is_known_only_from_the_study():
    voice = Target.parse("voice/ttf30:p95<=600ms")
    each = evaluation(1, 0.2, values={str(voice): 0.4}, intervals={str(voice): (0.3, 0.5)})
    assert each.of_target(voice) == (0.4, 0.3, 0.5)
    assert each.of_target(Target.parse("voice/ttf30:p95<=300ms")) == (0.4, 0.3, 0.5)
    assert math.isnan(each.of_target(Target.parse("batch/ttf30:p95<=600ms"))[0])
    assert each.of_target(Target.parse("ttf30:p95<=600ms"))[0] == pytest.approx(0.2)


@pytest.mark.parametrize("metric", ["ttft", "ttf30", "tpot", "e2e"])
@pytest.mark.parametrize("p", [50, 90, 95, 99])
def test_any_latency_can_be_an_axis(metric, p):
    front = pareto([evaluation(1, 0.2)], Metric.parse(metric), p, "capacity")
    assert [round(front.latency_s(point), 9) for point in front.points] == [0.0 if metric == "tpot" else 0.2]
    assert key_of(Metric.parse(metric), p) == f"{metric}:p{p}"
