"""Rounding, cutting and counting the weights of every format, against definitions written down elsewhere."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.kernels import BadTile
from paretune.kernels.cpu.build import load
from paretune.kernels.linear import linear, pack
from paretune.kernels.stored_weight import E2M1, e2m1_values, stack, store
from paretune.kernels.weight_formats import WEIGHT_FORMATS
from paretune.kernels.weight_layout import rows_of, stored_rows

from .conftest import missing

FORMATS = list(WEIGHT_FORMATS)
# Root mean square error of N(0, 1) weights, that of the weights being 1: what the formats can do, with a tenth of room.
MOST_ERROR = {
    "fp32": 1e-7, "bf16": 2e-3, "fp16": 3e-4, "fp8": 0.03, "int8": 0.009, "int4": 0.10, "nvfp4": 0.105, "mxfp4": 0.127,
    "ternary": 0.57,
}  # fmt: skip


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(64, 320)


@pytest.mark.parametrize("precision", FORMATS)
def test_a_format_loses_no_more_than_it_must(precision, weight):
    error = (store(weight, precision).expanded() - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    assert error < MOST_ERROR[precision]


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("factor", [1e-2, 1.0, 100.0])
def test_the_size_of_the_weights_does_not_matter(precision, factor, weight):
    error = (store(weight * factor, precision).expanded() / factor - weight).square().mean().sqrt()
    assert error < MOST_ERROR[precision]


@pytest.mark.parametrize("precision", FORMATS)
def test_what_a_format_holds_it_keeps(precision, weight):
    """Rounded numbers are not rounded again, up to the rounding of the scale itself."""
    once = store(weight, precision).expanded()
    twice = store(once.float(), precision).expanded()
    if precision == "ternary":  # the mean magnitude of the rounded is another
        assert torch.equal(once.sign(), twice.sign())
    else:
        assert (twice - once).square().mean().sqrt() < 0.02 * once.square().mean().sqrt()


def test_e2m1_has_the_sixteen_numbers_of_the_ocp_specification():
    """OCP Microscaling Formats 1.0, table 5."""
    assert e2m1_values(torch.arange(16, dtype=torch.uint8)).tolist() == [
        0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0
    ]  # fmt: skip


@settings(deadline=None)
@given(st.lists(st.floats(-6, 6, width=32), min_size=31, max_size=31))
def test_mxfp4_rounds_to_the_nearest_and_halfway_to_even(numbers):
    """With 4 as the largest of a block the block's scale is 1, so the elements are e2m1 numbers themselves."""
    block = [4.0, *(number if abs(number) <= 4 else number / 2 for number in numbers)]
    found = store(torch.tensor([block]), "mxfp4").expanded()[0].tolist()
    for number, rounded in zip(block, found):
        distances = [abs(abs(number) - each) for each in E2M1]
        nearest = min(distances)
        choices = [index for index, distance in enumerate(distances) if distance == nearest]
        best = choices[0] if len(choices) == 1 else next(index for index in choices if index % 2 == 0)
        assert abs(rounded) == E2M1[best]
        assert rounded == 0 or math.copysign(1, rounded) == math.copysign(1, number)


def test_ternary_is_that_of_bitnet(weight):
    """BitNet b1.58, equations 1 to 3: RoundClip(W / mean(|W|), -1, 1)."""
    stored = store(weight, "ternary")
    gamma = weight.abs().mean()
    assert torch.equal(stored.values.float(), (weight / (gamma + 1e-8)).round().clamp(-1, 1))
    assert torch.allclose(stored.channel_scale, gamma)


def test_nvfp4_uses_the_whole_range_of_its_block_scales(weight):
    assert store(weight, "nvfp4").group_scale.float().max() == 448


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("in_features", [1, 17, 64, 127, 320])
def test_the_rows_for_torch_hold_every_number(precision, in_features, weight):
    stored = store(weight[:, :in_features], precision)
    again = stored_rows(precision, rows_of(stored), stored.group_scale, in_features)
    assert torch.equal(again.values.float(), stored.values.float())


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("backends", [("torch",), ("cpp",)])
def test_memory_is_that_of_the_format(precision, backends):
    if backends == ("cpp",) and load() is None:
        missing("a C++ compiler", "install g++ or clang++")
    for out_features, in_features in ((64, 320), (32, 64), (128, 1024)):
        packed = pack(torch.randn(out_features, in_features), precision, backends=backends)
        counted = WEIGHT_FORMATS[precision].nbytes(out_features, in_features)
        # the sums that int8 keeps beside are C++'s
        assert packed.nbytes == counted - (4 * out_features if precision == "int8" and backends == ("torch",) else 0)
        nominal = WEIGHT_FORMATS[precision].bytes_per_weight() * out_features * in_features
        assert 0 <= packed.nbytes - nominal <= 8 * out_features


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("ranks", [2, 5])
def test_the_ranks_together_hold_what_one_rank_holds(precision, ranks, weight):
    whole = store(weight, precision)
    rows = [whole.rows(range(64 * rank // ranks, 64 * (rank + 1) // ranks)) for rank in range(ranks)]
    assert torch.equal(stack(rows).expanded(), whole.expanded())
    columns = [range(320 * rank // ranks // 64 * 64, 320 * (rank + 1) // ranks // 64 * 64) for rank in range(ranks)]
    assert torch.equal(torch.cat([whole.columns(part).expanded() for part in columns], dim=1), whole.expanded())


@pytest.mark.parametrize("precision", FORMATS)
def test_partial_products_of_column_shards_add_up(precision, weight):
    x = torch.randn(3, 320)
    whole = store(weight, precision)
    parts = [range(128), range(128, 320)]
    total = sum(linear(x[:, part.start : part.stop], pack(whole.columns(part))) for part in parts)
    # each rank rounds its part of a row of x by itself
    tolerance = {"fp32": 1e-5, "bf16": 1e-2, "int8": 2e-2}[whole.format.arithmetic]
    assert (total - linear(x, pack(whole))).abs().max() < tolerance * total.abs().max()


@pytest.mark.parametrize(("precision", "group"), [("int4", 64), ("nvfp4", 16), ("mxfp4", 32)])
def test_a_cut_within_a_scale_group_is_refused(precision, group, weight):
    stored = store(weight, precision)
    assert stored.columns(range(group, 2 * group)).values.shape == (64, group)
    for part in (range(group // 2, 320), range(group + 1)):
        with pytest.raises(BadTile) as error:
            stored.columns(part)
        assert error.value.where == "linear: shard"
        assert str(group) in error.value.allowed
