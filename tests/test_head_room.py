"""Head-room, survivors and knobs: what the simulator says of more traffic, fewer replicas and another spec."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paretune.optimizer.capacity import BadQuestion, broken, longest_answer_s
from paretune.optimizer.head_room import head_room, survivors
from paretune.optimizer.knobs import best, relieving
from paretune.profiler.explain import Explained, Part
from paretune.profiler.profile import BadProfile
from paretune.profiler.simulator import simulate
from paretune.profiler.step_limits import RESOURCES
from paretune.profiler.step_time import ModeledStep
from paretune.runtime.spec import Deployment, Pool
from paretune.traces.metrics import ITL, Target, percentile
from paretune.traces.trace import Trace

from .test_simulator import pool, tables, trace

TARGETS = (Target.parse("ttft:p95<=1s"),)


def modeled(limits: Pool) -> ModeledStep:
    return ModeledStep(tables(limits), True, 0.1, ())


def deployment(**changes: Any) -> Deployment:
    return Deployment(pools=(pool(num_kv_blocks=500, **changes),))


def test_the_targets_hold_at_the_head_room_and_break_a_little_above_it() -> None:
    asked = deployment(replicas=2)
    requests = trace(400, 4.0, 0, longest=64)
    found = head_room(requests, asked, modeled(asked.pool), TARGETS)
    assert found.low < found.rate < found.high
    assert found.tolerance <= 0.02 + 1e-9
    limits, steps = asked.pool, tables(asked.pool)
    slack_s = longest_answer_s(requests, steps, limits)
    held = simulate(requests, limits, steps, rate=found.rate)
    above = simulate(requests, limits, steps, rate=found.rate * (1 + found.tolerance))
    assert broken(held, requests, TARGETS, slack_s) == ""
    assert broken(above, requests, TARGETS, slack_s) != ""


def test_replicas_have_their_head_room_together() -> None:
    requests = trace(400, 4.0, 0, longest=64)
    one, two = (head_room(requests, d, modeled(d.pool), TARGETS) for d in (deployment(), deployment(replicas=2)))
    assert 1.7 < two.rate / one.rate < 2.4


@pytest.mark.parametrize("requests", [1, 3])
def test_arrivals_without_a_rate_have_no_head_room(requests: int) -> None:
    at_once = Trace([1.0] * requests, [10] * requests, [5] * requests)
    with pytest.raises(BadQuestion) as caught:
        head_room(at_once, deployment(), modeled(deployment().pool), TARGETS)
    assert caught.value.where == "memory: arrival_s"


def test_survivors_serve_what_a_smaller_deployment_would() -> None:
    asked = deployment(replicas=3)
    requests = trace(400, 40.0, 0, longest=64)
    found = survivors(requests, asked, modeled, TARGETS, lost=1)
    left = asked.with_pool(replicas=2).pool
    expected = simulate(requests, left, tables(left))
    assert found.replicas == 2
    value = float(np.percentile(expected.times.first_token_s - expected.times.scheduled_s, 95))
    assert found.values[str(TARGETS[0])] == pytest.approx(value)
    assert found.met[str(TARGETS[0])] == (value <= 1.0)
    assert "2 left" in found.words


def test_the_value_of_a_target_on_itl_is_the_one_that_is_judged_over_all_gaps() -> None:
    asked, target = deployment(replicas=2), Target.parse("itl:p50<=1s")
    requests = trace(100, 8.0, 0, longest=64)
    found = survivors(requests, asked, modeled, (target,), lost=1)
    left = asked.with_pool(replicas=1).pool
    gaps_s = simulate(requests, left, tables(left)).times.sample(ITL)
    assert found.values[str(target)] == pytest.approx(percentile(gaps_s, 50.0))


def test_with_nobody_left_nothing_holds() -> None:
    found = survivors(trace(10, 1.0, 0), deployment(), modeled, TARGETS, lost=1)
    assert (found.replicas, found.met) == (0, {})
    assert "nobody is left" in found.words


def explained(part: str, value: float) -> Explained:
    return Explained("ttft", 95.0, value, (Part(part, value, dict.fromkeys(RESOURCES, value / 4)),), 5, 1.0)


def test_more_seats_relieve_a_queue_for_seats_by_what_the_simulator_says() -> None:
    asked = deployment(max_num_seqs=2)
    requests = trace(200, 8.0, 0, longest=64)
    before = simulate(requests, asked.pool, tables(asked.pool))
    value = float(np.percentile(before.times.first_token_s - before.times.scheduled_s, 95))
    effects = relieving(explained("queue_seats", value), requests, asked, modeled)
    chosen = best(effects)
    assert chosen is not None
    assert chosen.change == {"max_num_seqs": 4}
    more = asked.with_pool(max_num_seqs=4).pool
    after = simulate(requests, more, tables(more))
    assert chosen.after == pytest.approx(np.percentile(after.times.first_token_s - after.times.scheduled_s, 95))
    assert chosen.gain == pytest.approx(1 - chosen.after / value)
    assert any(effect.change == {"replicas": 2} and effect.devices == 1 for effect in effects)


def test_a_change_that_nobody_measured_says_so_and_stands_last() -> None:
    def model(limits: Pool) -> ModeledStep:
        if limits.replicas > 1 or limits.weight_dtype != "bf16":
            raise BadProfile("profile", "no such", "another", "measure it")
        return modeled(limits)

    effects = relieving(explained("queue_seats", 1.0), trace(50, 2.0, 0, longest=64), deployment(), model)
    assert [effect.note.startswith("not predicted") for effect in effects] == [False, True, True]
    assert all(np.isnan(effect.after) for effect in effects[1:])


def test_smaller_weights_are_said_to_change_answers() -> None:
    effects = relieving(explained("decode", 1.0), Trace([0.0, 1.0], [10, 10], [5, 5]), deployment(), modeled)
    notes = {next(iter(effect.change)): effect.note for effect in effects}
    assert "answers change" in notes["weight_dtype"]
    assert notes["tensor_parallel_size"] == ""
