"""Bracketing a capacity with few, costly runs."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from paretune.optimizer.live_capacity import Bracket, bracket


@given(truth=st.floats(0.3, 3.0), guess=st.floats(0.3, 3.0), runs=st.integers(1, 8))
def test_the_truth_lies_in_the_bracket(truth: float, guess: float, runs: int) -> None:
    asked = []

    def holds(rate: float) -> bool:
        asked.append(rate)
        return rate <= truth

    found = bracket(holds, guess=guess, runs=runs)
    assert found.low <= truth <= found.high
    assert len(asked) == runs
    assert found.low == 0.0 or found.low in asked
    assert math.isinf(found.high) or found.high in asked


@given(truth=st.floats(0.9, 1.1))
def test_a_good_guess_is_narrowed_to_a_few_percent_in_six_runs(truth: float) -> None:
    found = bracket(lambda rate: rate <= truth, guess=1.0, runs=6)
    assert found.high / found.low < 1.05


def test_an_open_bracket_says_what_is_known() -> None:
    assert Bracket(0.0, 2.0).rate == 2.0
    assert Bracket(2.0, math.inf).rate == 2.0
    assert math.isclose(Bracket(1.0, 4.0).rate, 2.0)
