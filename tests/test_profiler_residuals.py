"""Residuals of predictions: learned by group, uncertain where nothing was measured, with bands that cover."""

from __future__ import annotations

import numpy as np

from paretune.profiler.residuals import Alike, Features, conformal_quantile, learn, left_out_scores

ALIKE = Alike((0.1, 0.1), length=2.0, noise=0.02)


def points(groups: list[str], load: list[float]) -> Features:
    return Features(np.array([["all"] * len(groups), groups], dtype=object), np.array(load)[:, None])


def test_a_group_that_is_slower_than_predicted_is_predicted_slower() -> None:
    seen = points(["a"] * 6 + ["b"] * 6, [1, 2, 3, 4, 5, 6] * 2)
    residual = np.array([0.3] * 6 + [0.0] * 6)
    mean, deviation = learn(seen, residual, ALIKE).at(points(["a", "b", "c"], [2.5, 2.5, 2.5]))
    assert abs(mean[0] - 0.3) < 0.03
    assert abs(mean[1]) < 0.03
    assert mean[1] < mean[2] < mean[0]  # of an unknown group, what all have in common
    assert deviation[2] > 3 * deviation[0]


def test_scores_of_points_left_out_equal_those_of_fits_without_them() -> None:
    rng = np.random.default_rng(1)
    seen = points(["a"] * 8 + ["b"] * 8, list(rng.uniform(0, 6, 16)))
    residual = rng.normal(0, 0.05, 16)
    folds = list(range(4)) * 4
    scores = left_out_scores(learn(seen, residual, ALIKE, robust=np.inf), folds)
    for fold in range(4):
        out = np.array(folds) == fold
        mean, deviation = learn(seen.take(~out), residual[~out], ALIKE, robust=np.inf).at(seen.take(out))
        np.testing.assert_allclose(scores[out], np.abs(residual[out] - mean) / deviation, rtol=1e-6)


def test_one_outlier_does_not_move_its_neighbors() -> None:
    seen = points(["a"] * 9, list(range(9)))
    residual = np.zeros(9)
    residual[4] = 2.0
    mean, _ = learn(seen, residual, ALIKE).at(points(["a"], [4.5]))
    assert abs(mean[0]) < 0.1


def test_a_group_that_is_off_as_a_whole_does_not_move_the_other_groups() -> None:
    names = [name for name in "abcdef" for _ in range(4)]
    seen = points(names, [1, 2, 3, 4] * 6)
    residual = np.array([1.5 if name == "f" else 0.0 for name in names])
    unseen = points(["g"], [2.5])
    by_points, _ = learn(seen, residual, ALIKE).at(unseen)
    by_groups, _ = learn(seen, residual, ALIKE, groups=names).at(unseen)
    assert abs(by_groups[0]) < 0.3 * abs(by_points[0])
    assert abs(by_groups[0]) < 0.03
    # the score of that group, left out, hides nothing
    scores = left_out_scores(learn(seen, residual, ALIKE, groups=names), names)
    assert min(scores[-4:]) > 5 > max(scores[:-4])


def test_the_conformal_quantile_covers_new_scores() -> None:
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(400):
        scores = rng.exponential(size=40)
        covered.append(rng.exponential() <= conformal_quantile(scores[:39], 0.9))
    assert 0.86 < np.mean(covered) < 0.94
    # of eight scores the largest is below a new one in one of nine cases: that is no 90 %
    assert conformal_quantile(np.arange(8.0), 0.9) == np.inf
    assert conformal_quantile(np.arange(9.0), 0.9) == 8.0
