"""Bracketing a capacity with few, costly runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.optimizer import live_capacity
from paretune.optimizer.live_capacity import Bracket, bracket
from paretune.profiler.live import LiveServer
from paretune.runtime.spec import SMALL_MODEL, Deployment, Pool
from paretune.traces import Target
from paretune.traces.trace import Trace

from .test_replay import fake, steady


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


def test_no_run_finds_the_prompts_of_another_in_the_server_s_prefix_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Trace(np.arange(4) * 0.01, np.full(4, 32), np.full(4, 2))
    deployment = Deployment(model=SMALL_MODEL, pools=(Pool(),))
    with fake(steady(0.0, 0.0)) as server:

        @contextmanager
        def served(deployment: Deployment) -> Iterator[LiveServer]:
            yield LiveServer(server.url, "fake", 0)

        monkeypatch.setattr(live_capacity, "live_server", served)
        found = live_capacity.live_capacity(deployment, log, [Target.parse("ttft:p95<=10s")], guess=1.0, replays=3)
    assert len(found.runs) == 3
    # four of the warm-up, and four of each run; a block of 16 tokens is enough for a cache to find
    prefixes = {tuple(body["prompt"][:16]) for body in server.bodies}
    assert len(server.bodies) == len(prefixes) == 16
