"""Requests that wait for others: who waits for whom, how long, and what is refused."""

import numpy as np
import pytest

from paretune.traces import BadTrace, Trace
from paretune.traces.columns import Labels
from paretune.traces.sessions import NOBODY, Dependencies, by_session, closed_loop


def trace(arrivals: list[float], sessions: list[str | None] | None) -> Trace:
    n = len(arrivals)
    labels = None if sessions is None else Labels.of(sessions)
    return Trace(np.array(arrivals), np.full(n, 10), np.full(n, 5), session=labels)


def test_a_turn_waits_for_the_one_before_it_and_then_for_the_recorded_pause() -> None:
    found = by_session(trace([0, 1, 5, 6, 20], ["a", "b", "a", None, "a"]), np.array([2.0, 1.0, 3.0, 1.0, 1.0]))
    assert found.after.tolist() == [NOBODY, NOBODY, 0, NOBODY, 2]
    assert found.pause_s[[2, 4]].tolist() == [3.0, 12.0]  # 5 - (0 + 2), 20 - (5 + 3)


def test_a_turn_that_came_before_the_answer_ended_has_no_pause() -> None:
    found = by_session(trace([0, 1], ["a", "a"]), np.array([10.0, 1.0]))
    assert found.pause_s[1] == 0.0


def test_without_sessions_or_with_other_answers_it_is_refused() -> None:
    with pytest.raises(BadTrace, match="session"):
        by_session(trace([0, 1], None), np.ones(2))
    with pytest.raises(BadTrace, match="answer times"):
        by_session(trace([0, 1], ["a", "a"]), np.ones(3))


def test_in_a_closed_loop_as_many_wait_for_nobody_as_there_are_users() -> None:
    found = closed_loop(10, 3, 0.5)
    assert found.after.tolist() == [NOBODY] * 3 + list(range(7))
    assert (found.pause_s[3:] == 0.5).all()
    with pytest.raises(BadTrace, match="users"):
        closed_loop(10, 0)


@pytest.mark.parametrize(
    ("after", "pause_s"),
    [([0], [0.0]), ([NOBODY, 2, 0], [0.0] * 3), ([NOBODY, 0, 0], [0.0] * 3), ([NOBODY, 0], [0.0, -1.0]), ([-2], [0.0])],
)
def test_impossible_dependencies_are_refused(after: list[int], pause_s: list[float]) -> None:
    with pytest.raises(BadTrace):
        Dependencies(np.array(after), np.array(pause_s))
