"""Profiles of several hours as one: nothing is lost, differences show in the error, strangers are refused."""

import pytest

from paretune.kernels.tiles import Tile, TileTable
from paretune.profiler.merged_profile import merged
from paretune.profiler.profile import BadProfile, Profile
from paretune.profiler.step_fit import fit_steps

from .profiler_examples import profile, serving, several_precisions


def at_speed(factor: float):
    """The made-up machine in an hour in which everything takes `factor` times as long."""
    usual = profile()
    slower = tuple(
        each.model_copy(
            update={"steps": tuple(s.model_copy(update={"median_s": s.median_s * factor}) for s in each.steps)}
        )
        for each in usual.configurations
    )
    return usual.model_copy(update={"configurations": slower, "serving": (serving(factor, factor),)})


def test_of_one_profile_nothing_changes() -> None:
    one = at_speed(1.0)
    assert merged([one]).configurations == one.configurations
    assert merged([one]).serving == one.serving
    assert merged([one]).peaks == one.peaks


def test_steps_of_all_are_kept_and_their_distance_is_an_error() -> None:
    hours = [at_speed(1.0), at_speed(1.2)]
    together = merged(hours)
    assert [len(c.steps) for c in together.configurations] == [2 * len(c.steps) for c in hours[0].configurations]
    alone = fit_steps(hours[0].configurations[0].steps)
    both = fit_steps(together.configurations[0].steps)
    assert both.relative_error > alone.relative_error + 0.05


def test_all_live_steps_are_kept_and_their_spread_has_the_range_added() -> None:
    hours = [at_speed(1.0), at_speed(1.0), at_speed(1.2)]
    found = merged(hours).serving[0]
    assert sum(point.count for point in found.points) == found.steps == 3 * hours[0].serving[0].steps
    assert found.spread == pytest.approx((0.1**2 + 0.2**2) ** 0.5)
    assert found.requests == 30


def test_steps_that_one_of_them_has_besides_are_no_distance() -> None:
    one, other = at_speed(1.0), at_speed(1.0)
    live = other.serving[0]
    longer = [
        point.model_copy(
            update={"decode_context": 1.05 * point.decode_context, "mean_s": 1.02 * point.mean_s, "count": 1}
        )
        for point in live.points
    ]
    more = live.model_copy(update={"points": (*live.points, *longer)})
    found = merged([one, other.model_copy(update={"serving": (more,)})]).serving[0]
    assert found.spread == pytest.approx(live.spread, rel=0.01)


def test_servers_of_different_configurations_are_not_one() -> None:
    one, other = at_speed(1.0), at_speed(1.0)
    elsewhere = other.serving[0].model_copy(update={"measured_on": "TP 1 x 1 threads int8/bf16"})
    with pytest.raises(BadProfile):
        merged([one, other.model_copy(update={"serving": (elsewhere,)})])


def test_steps_of_other_tiles_are_not_merged() -> None:
    one, other = at_speed(1.0), at_speed(1.0)
    tiles = TileTable(((("linear", "bf16", 16), Tile("linear", "torch")),))
    tiled = other.configurations[0].model_copy(update={"tiles": tiles})
    with pytest.raises(BadProfile, match="configurations"):
        merged([one, other.model_copy(update={"configurations": (tiled, *other.configurations[1:])})])


def in_two_precisions(slower: dict[str, float]) -> Profile:
    live = tuple(serving(f, f, measured_on=f"TP 1 x 1 threads {dtype}/bf16") for dtype, f in slower.items())
    return several_precisions("bf16", "int8", serving=live)


def test_live_servers_are_merged_weights_by_weights() -> None:
    together = merged([in_two_precisions({"bf16": 1.5, "int8": 1.1}), in_two_precisions({"bf16": 1.5, "int8": 1.3})])
    assert [together.served_by(live).weight_dtype for live in together.serving] == ["bf16", "int8"]
    assert together.serving[0].spread == pytest.approx(0.2)
    # the range of int8, 1.1 to 1.3, is that of int8 alone
    assert together.serving[1].spread == pytest.approx((0.2**2 + (0.1 / 1.2) ** 2) ** 0.5)


def test_a_profile_with_fewer_precisions_served_is_no_other_hour_of_the_same() -> None:
    with pytest.raises(BadProfile):
        merged([in_two_precisions({"bf16": 1.5, "int8": 1.1}), in_two_precisions({"bf16": 1.5})])


def test_of_different_machines_none_is_made() -> None:
    other = at_speed(1.0)
    other = other.model_copy(update={"machine": other.machine.model_copy(update={"cores": 99})})
    with pytest.raises(BadProfile, match="different machines"):
        merged([at_speed(1.0), other])
