"""What a measuring process believes where a hypervisor takes the core away and takes the time off late."""

from __future__ import annotations

import pytest
import torch

from paretune.profiler import measure_worker
from paretune.runtime.engine import StepRecord


class Clocks:
    """A wall clock and the CPU clock of one thread; each call of `work` moves both by the next of `steps`."""

    def __init__(self, steps: list[tuple[float, float]]) -> None:
        self.wall_s = self.cpu_s = 0.0
        self._steps = [(0.0, 0.0), *steps]

    def perf_counter(self) -> float:
        return self.wall_s

    def thread_time(self) -> float:
        return self.cpu_s

    def work(self) -> None:
        wall_s, cpu_s = self._steps.pop(0)
        self.wall_s += wall_s
        self.cpu_s += cpu_s


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def timed(monkeypatch: pytest.MonkeyPatch, steps: list[tuple[float, float]], least: int) -> list[float]:
    clocks = Clocks(steps)
    monkeypatch.setattr(measure_worker, "time", clocks)
    return measure_worker._call_times(clocks.work, least_s=0.0, least=least)


@pytest.mark.usefixtures("one_thread")
def test_a_call_without_cpu_time_is_not_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    # the second call lost its core for 4 ms, and the third one's CPU time was eaten by what was taken off late
    steps = [(10e-6, 10e-6), (4010e-6, 4010e-6 - 4000e-6), (11e-6, 0.0), (12e-6, 12e-6)]
    assert timed(monkeypatch, steps, least=4) == pytest.approx([10e-6, 12e-6])


@pytest.mark.usefixtures("one_thread")
def test_calls_that_always_share_their_core_count_by_the_sum_of_their_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [(60e-3, 0.0), (60e-3, 50e-3), (60e-3, 55e-3)]
    assert timed(monkeypatch, steps, least=3) == pytest.approx([35e-3])
    # all that was stolen has been taken off within these calls: at least one of them was not that fast
    assert timed(monkeypatch, [(60e-3, 0.0), (50e-3, 0.0)], least=2) == pytest.approx([25e-3])


def step(seconds: float) -> StepRecord:
    return StepRecord(
        seconds=seconds, num_tokens=1, num_rows=1, num_samples=1, decode_context=16, prefill_pairs=0, started_s=0.0
    )


def test_disturbed_steps_count_only_where_there_are_no_others() -> None:
    mixed = measure_worker._point([(step(0.0), False), (step(2e-3), True), (step(0.5e-3), False)])
    assert (mixed["median_s"], mixed["count"]) == (pytest.approx(2e-3), 1)
    alone = measure_worker._point([(step(0.0), False), (step(3e-3), False), (step(3e-3), False)])
    assert (alone["median_s"], alone["count"]) == (pytest.approx(2e-3), 3)
