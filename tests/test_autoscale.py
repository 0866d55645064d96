"""Replicas that come and go: the rule as a pure function, and the fleet that follows it on the virtual clock."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.profiler.autoscale import (
    Autoscaler,
    BadAutoscaler,
    ElasticFleet,
    Past,
    default_target,
    desired_replicas,
    replica_hours,
    replicas_over_time,
)
from paretune.profiler.event_order import Held
from paretune.profiler.simulator import SimulationResult, simulate
from paretune.runtime.router import new_router, route
from paretune.runtime.spec import Pool
from paretune.traces.sessions import closed_loop
from paretune.traces.trace import Trace

from .test_simulator import pool, tables, trace

ROUTERS = ("round_robin", "least_outstanding_tokens", "prefix_affinity")


def scaler(**changes: Any) -> Autoscaler:
    return Autoscaler(**{"min_replicas": 1, "max_replicas": 10, "target": 10.0, **changes})


def asked(autoscaler: Autoscaler, totals: list[float], replicas: int = 1) -> list[int]:
    """Replicas after each sync, a sync period apart."""
    past, found = Past(((0.0, replicas),)), []
    for i, total in enumerate(totals, start=1):
        replicas, past = desired_replicas(autoscaler, i * autoscaler.sync_period_s, replicas, total, past)
        found.append(replicas)
    return found


@settings(max_examples=200)
@given(
    least=st.integers(1, 5),
    more=st.integers(0, 10),
    totals=st.lists(st.floats(0, 1e4), min_size=1, max_size=50),
    window_s=st.sampled_from([0.0, 40.0, 300.0]),
    tolerance=st.sampled_from([0.0, 0.1]),
)
def test_never_fewer_than_min_nor_more_than_max(
    least: int, more: int, totals: list[float], window_s: float, tolerance: float
) -> None:
    autoscaler = scaler(
        min_replicas=least, max_replicas=least + more, scale_down_stabilization_s=window_s, tolerance=tolerance
    )
    assert all(least <= each <= least + more for each in asked(autoscaler, totals, least))


def test_as_many_as_the_target_asks_for_come_at_once_within_the_rate() -> None:
    # ceil(35 / 10); a step of 4 more in a period, or twice as many
    assert asked(scaler(), [35.0]) == [4]
    assert asked(scaler(), [95.0, 95.0]) == [5, 10]
    assert asked(scaler(max_replicas=40), [400.0] * 4) == [5, 10, 20, 40]


def test_within_the_tolerance_nothing_changes() -> None:
    assert asked(scaler(), [43.9, 36.1], replicas=4) == [4, 4]
    assert asked(scaler(), [44.1], replicas=4) == [5]


def test_fewer_come_only_when_nobody_has_wanted_more_for_the_window() -> None:
    autoscaler = scaler(scale_down_stabilization_s=60.0)
    # 4 wanted at 15 s; until 60 s after that they stay
    assert asked(autoscaler, [40.0, 5, 5, 5, 5, 5], replicas=4) == [4, 4, 4, 4, 1, 1]
    # of the recommendations in the window the largest
    assert asked(autoscaler, [40.0, 25, 5, 5, 5, 5, 5], replicas=4) == [4, 4, 4, 4, 3, 1, 1]


@pytest.mark.parametrize(
    ("bad", "where"),
    [
        ({"min_replicas": 0}, "min_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas"),
        ({"metric": "cpu"}, "metric"),
        ({"target": 0.0}, "target"),
        ({"target": math.nan}, "target"),
        ({"sync_period_s": math.inf}, "sync_period_s"),
        ({"cold_start_s": -1.0}, "cold_start_s"),
    ],
)
def test_an_autoscaler_that_cannot_be_is_refused_by_its_field(bad: dict[str, Any], where: str) -> None:
    with pytest.raises(BadAutoscaler) as raised:
        scaler(**bad)
    assert raised.value.where == f"autoscaler: {where}"
    assert raised.value.exit_code == 2


def test_targets_that_nobody_gives_are_those_that_others_documented() -> None:
    assert default_target("num_requests", Pool(max_num_seqs=20)) == 14.0
    assert default_target("num_requests_waiting", Pool()) == 5.0
    with pytest.raises(BadAutoscaler):
        default_target("outstanding_tokens", Pool())


def step_load(before: int, after: int, at_s: float, every_s: float) -> Trace:
    """A trickle, then a flood, then a trickle again."""
    arrivals = np.concatenate(
        [
            np.linspace(0.0, at_s, before, endpoint=False),
            at_s + every_s * np.arange(after),
            at_s + every_s * after + 20.0 * np.arange(1, 40),
        ]
    )
    n = len(arrivals)
    return Trace(arrivals, np.full(n, 60), np.full(n, 100))


def run(requests: Trace, autoscaler: Autoscaler, **changes: Any) -> SimulationResult:
    limits = pool(**{"router": "least_outstanding_tokens", **changes})
    return simulate(requests, limits, tables(limits), autoscaler=autoscaler)


def test_a_flood_is_answered_within_a_sync_period_and_a_cold_start() -> None:
    requests = step_load(10, 2000, 100.0, 0.05)
    autoscaler = scaler(max_replicas=4, target=6.0, cold_start_s=40.0)
    result = run(requests, autoscaler)
    assert result.times.finished.all()
    more = [each for each in result.held if each.asked_s > 0]
    assert 100.0 < min(each.asked_s for each in more) <= 100.0 + 2 * autoscaler.sync_period_s
    assert all(each.ready_s == each.asked_s + 40.0 for each in more if math.isfinite(each.ready_s))
    slow = run(requests, scaler(max_replicas=1, target=6.0))
    assert np.mean(result.times.end_s) < np.mean(slow.times.end_s)


def test_who_leaves_finishes_its_requests_and_no_sooner_than_after_the_window() -> None:
    requests = step_load(10, 2000, 100.0, 0.05)
    result = run(requests, scaler(max_replicas=4, target=6.0, cold_start_s=10.0))
    left = [each for each in result.held if math.isfinite(each.leaves_s)]
    assert left
    assert all(each.gone_s >= each.leaves_s for each in left)
    assert result.times.finished.all()
    busiest_s = max(each.asked_s for each in result.held)
    assert min(each.leaves_s for each in left) >= busiest_s + 300.0 - 15.0


def test_replicas_that_never_get_ready_change_nothing_but_the_bill() -> None:
    limits, requests = pool(router="least_outstanding_tokens"), trace(150, 10.0, 4)
    step = tables(limits)
    alone = simulate(requests, limits, step)
    result = simulate(requests, limits, step, autoscaler=scaler(target=1.0, sync_period_s=1.0, cold_start_s=1e9))
    np.testing.assert_allclose(result.times.end_s, alone.times.end_s, rtol=1e-12)
    assert len(result.held) > 1
    assert all(math.isinf(each.ready_s) or each.ready_s >= 1e9 for each in result.held[1:])


def test_requests_go_to_replicas_that_are_ready_and_do_not_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, float]] = []
    send = ElasticFleet.send

    def noted(self: ElasticFleet, row: int, arrival_s: float) -> Any:
        chosen = send(self, row, arrival_s)
        sent.append((self.replicas.index(chosen), arrival_s))
        return chosen

    monkeypatch.setattr(ElasticFleet, "send", noted)
    result = run(step_load(10, 2000, 100.0, 0.05), scaler(max_replicas=4, target=6.0, cold_start_s=20.0))
    assert len(sent) == len(result.times)
    assert all(result.held[i].ready_s <= at_s < result.held[i].leaves_s for i, at_s in sent)
    assert {i for i, _ in sent} == set(range(len(result.held)))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    router=st.sampled_from(ROUTERS),
    metric=st.sampled_from(["num_requests", "num_requests_waiting", "outstanding_tokens"]),
    cold_start_s=st.sampled_from([0.0, 1.0, 20.0]),
    clients=st.sampled_from([0, 7]),
)
def test_every_request_is_served_whole_however_the_fleet_changes(
    seed: int, router: str, metric: str, cold_start_s: float, clients: int
) -> None:
    limits = pool(router=router, num_kv_blocks=40)
    requests = trace(120, 8.0, seed)
    autoscaler = scaler(
        max_replicas=5, target={"num_requests": 3.0, "num_requests_waiting": 1.0, "outstanding_tokens": 900.0}[metric],
        metric=metric, cold_start_s=cold_start_s, sync_period_s=1.0, scale_down_stabilization_s=2.0,
        scale_up_period_s=1.0,
    )  # fmt: skip
    arrivals = closed_loop(requests, clients) if clients else None
    result = simulate(requests, limits, tables(limits), autoscaler=autoscaler, arrivals=arrivals)
    assert result.times.finished.all()
    assert (result.times.output_tokens == requests.output_tokens).all()
    end_s = float(np.nanmax(result.times.end_s))
    over_time = replicas_over_time(result.held, end_s)
    assert all(ready >= 1 and held >= ready for _, held, ready in over_time)
    assert all(ready <= 5 for _, _, ready in over_time)
    # replicas that drain are held besides
    staying = [sum(e.asked_s <= at_s < e.leaves_s for e in result.held) for at_s, _, _ in over_time]
    assert all(1 <= each <= 5 for each in staying)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_fleet_that_may_not_change_is_the_fixed_one(router: str) -> None:
    limits = pool(replicas=3, router=router, num_kv_blocks=40)
    requests, step = trace(150, 10.0, 3), tables(limits)
    fixed = simulate(requests, limits, step)
    result = simulate(requests, limits, step, autoscaler=scaler(min_replicas=3, max_replicas=3))
    for name in ("first_token_s", "kth_token_s", "end_s"):
        np.testing.assert_allclose(getattr(result.times, name), getattr(fixed.times, name), rtol=1e-12)
    assert (result.steps, result.preemptions) == (fixed.steps, fixed.preemptions)
    end_s = float(np.nanmax(fixed.times.end_s))
    span_s = end_s - requests.arrival_s[0]
    assert replica_hours(result.held, end_s) == pytest.approx(3 * span_s / 3600)
    assert len(replicas_over_time(result.held, end_s)) == 1


def test_an_elastic_run_gives_the_same_bytes_again() -> None:
    requests = step_load(10, 400, 100.0, 0.05)
    first, again = (run(requests, scaler(max_replicas=4, target=6.0, cold_start_s=3.0)) for _ in range(2))
    assert first.times.end_s.tobytes() == again.times.end_s.tobytes()
    assert first.held == again.held


def test_hours_and_changes_are_counted_from_asking_to_giving_back() -> None:
    held = (
        Held(0.0, 0.0, math.inf, math.inf),
        Held(600.0, 660.0, 1800.0, 1900.0),
        Held(700.0, math.inf, 720.0, 720.0),  # let go before it was ready
    )
    assert replica_hours(held, 3600.0) == pytest.approx((3600 + 1300 + 20) / 3600)
    assert replicas_over_time(held, 3600.0) == [
        (0.0, 1, 1), (600.0, 2, 1), (660.0, 2, 2), (700.0, 3, 2), (720.0, 2, 2), (1800.0, 2, 1), (1900.0, 1, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("policy", ROUTERS)
@given(data=st.data())
def test_no_request_goes_to_a_replica_that_takes_none(policy: str, data: st.DataObject) -> None:
    router = new_router(Pool(router=policy))
    for _ in range(data.draw(st.integers(1, 30))):
        takes = data.draw(st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
        outstanding = np.array(data.draw(st.lists(st.integers(0, 99), min_size=4, max_size=4)), np.int64)
        prefix = np.array([data.draw(st.integers(0, 3))], np.int64)
        assert takes[route(router, outstanding, 5, prefix, np.array(takes))]


def test_round_robin_passes_over_those_that_take_none() -> None:
    router = new_router(Pool(router="round_robin"))
    none, takes = np.zeros(4, np.int64), np.array([True, False, True, True])
    assert [route(router, none, 5, none[:0], takes) for _ in range(5)] == [0, 2, 3, 0, 2]
