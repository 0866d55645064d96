"""Measured operator tables: exact where measured, shaped by physics elsewhere, never faster than the bound."""

from __future__ import annotations

import numpy as np
import pytest

from paretune.profiler.operator_tables import BadTable, Floats, OperatorTable, Origin

ORIGIN = Origin("h100_sxm", "vllm", "0.24.0", "gemm_perf.parquet")


def bound_s(points: Floats) -> Floats:
    m, n = points.T
    return np.asarray(np.maximum(m * n * 1e-12, n * 1e-11))


def table(points: Floats, seconds: Floats) -> OperatorTable:
    return OperatorTable("gemm", {"dtype": "bf16"}, ("m", "n"), points, seconds, bound_s, ORIGIN)


def grid(m: list[float], n: list[float]) -> Floats:
    return np.array([[a, b] for a in m for b in n], np.float64)


def test_lookup_returns_what_was_measured() -> None:
    points = grid([1, 3, 16, 4096], [64, 1000])
    seconds = bound_s(points) * np.linspace(1.1, 5, len(points)) + 1e-6
    np.testing.assert_allclose(table(points, seconds).lookup(points), seconds, rtol=1e-12)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_power_law_comes_back_between_the_points(power: float) -> None:
    points = grid([1, 16, 256], [256, 1024])  # the bound is a power law too from 16 rows on
    law = table(points, 1e-5 * points[:, 0] ** power)
    at = np.array([[16.0, 256.0], [40.0, 700.0], [200.0, 300.0]])
    np.testing.assert_allclose(law.lookup(at), 1e-5 * at[:, 0] ** power, rtol=1e-9)


def test_beyond_the_end_time_grows_as_the_bound_and_before_the_start_it_stands_still() -> None:
    points = grid([4, 256], [256, 1024])
    measured = table(points, 2 * bound_s(points) + 1e-6)
    at_edge = measured.lookup(np.array([[256.0, 1024.0]]))
    np.testing.assert_allclose(measured.lookup(np.array([[1024.0, 2048.0]])), 8 * at_edge)
    np.testing.assert_allclose(measured.lookup(np.array([[1.0, 256.0]])), measured.lookup(np.array([[4.0, 256.0]])))


def test_no_lookup_is_faster_than_the_bound() -> None:
    rng = np.random.default_rng(0)
    points = grid([1, 7, 64, 5000], [32, 512, 9000])
    measured = table(points, bound_s(points) * rng.uniform(1, 3, len(points)))
    at = np.exp(rng.uniform(-1, 12, (10_000, 2)))
    assert (measured.lookup(at) >= bound_s(at)).all()


def test_holes_take_the_ratio_of_their_neighbors_and_are_not_called_measured() -> None:
    points = grid([1, 4, 16], [64, 256])
    whole = np.delete(points, 3, axis=0)  # (4, 256) was not measured
    holed = table(whole, 3 * bound_s(whole))
    at = np.array([[4.0, 256.0], [1.0, 64.0], [2.0, 200.0], [99.0, 64.0]])
    np.testing.assert_allclose(holed.lookup(at), 3 * bound_s(at))
    assert holed.measured(at).tolist() == [False, True, False, False]


def test_impossible_and_repeated_points_are_refused() -> None:
    points = grid([1, 4], [64, 256])
    with pytest.raises(BadTable, match="below the bound"):
        table(points, 0.9 * bound_s(points))
    with pytest.raises(BadTable, match="more than once"):
        table(np.concatenate([points, points]), np.tile(2 * bound_s(points), 2))
