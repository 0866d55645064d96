"""Mixtures of experts against float64: routing, odd sizes, experts without rows, every precision, both backends."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paretune.kernels import BadTile, Tile, TileTable
from paretune.kernels.cpu import build
from paretune.kernels.linear import pack
from paretune.kernels.moe import (
    PackedExperts,
    Routing,
    moe,
    pack_experts,
    reference,
    reference_route,
    retile_experts,
    route,
)
from paretune.kernels.stored_weight import store
from paretune.kernels.weight_formats import WEIGHT_FORMATS

TORCH = TileTable(tuple((("linear", p, 1), Tile("linear", "torch")) for p in WEIGHT_FORMATS))
# of the largest output; int8 arithmetic rounds x and what lies between the products, which the oracle does not
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "int8": 4e-2}


@pytest.fixture
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_attempt", lambda: build._Attempt(None, "none here"))


def weights(experts: int, hidden: int, inter: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    gate_up = [torch.randn(2 * inter, hidden) / hidden**0.5 for _ in range(experts)]
    return gate_up, [torch.randn(hidden, inter) / inter**0.5 for _ in range(experts)]


def packed(gate_up, down, precision: str = "fp32", tiles: TileTable | None = None) -> PackedExperts:
    return pack_experts(*([pack(each, precision, tiles=tiles) for each in part] for part in (gate_up, down)))


def error(found: torch.Tensor, oracle: torch.Tensor) -> float:
    """Relative to the largest; a NaN is infinitely wrong."""
    return float(torch.nan_to_num((found - oracle).abs(), nan=torch.inf).max() / oracle.abs().max())


@given(
    logits=st.lists(
        st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]), min_size=5, max_size=5), min_size=1, max_size=9
    ),
    k=st.integers(1, 5),
    renormalize=st.booleans(),
)
def test_of_equal_logits_the_lower_expert_is_chosen(logits, k: int, renormalize: bool) -> None:
    found = route(torch.tensor(logits), k, renormalize)
    expected = reference_route(torch.tensor(logits), k, renormalize)
    assert torch.equal(found.experts, expected.experts)
    for row, chosen in zip(logits, found.experts.tolist()):
        assert chosen == sorted(range(5), key=lambda expert: (-row[expert], expert))[:k]
    torch.testing.assert_close(found.weights.double(), expected.weights, atol=1e-6, rtol=0)


@pytest.mark.parametrize("experts", [1, 7, 8, 9, 60, 128])
def test_weights_are_probabilities_of_large_and_small_logits(experts: int) -> None:
    logits = torch.randn(33, experts) * torch.tensor([0.0, 1.0, 40.0]).repeat(11)[:, None]
    for k in {1, min(4, experts), experts}:
        found, expected = route(logits, k, False), reference_route(logits, k, False)
        torch.testing.assert_close(found.weights.double(), expected.weights, atol=1e-6, rtol=0)
        assert (found.weights.sum(dim=1) <= 1 + 1e-6).all()
        torch.testing.assert_close(route(logits, k, True).weights.sum(dim=1), torch.ones(33))
    strided = torch.empty(33, experts + 3)[:, :experts].copy_(logits)
    assert torch.equal(route(strided, 1, False).experts, route(logits, 1, False).experts)


def test_a_nan_among_the_logits_shows_in_every_weight_of_its_row() -> None:
    logits = torch.randn(3, 10)
    logits[1, 9] = torch.nan
    for renormalize in (False, True):
        found = route(logits, 3, renormalize)
        assert found.weights.isnan().tolist() == [[False] * 3, [True] * 3, [False] * 3]
        assert sorted(set(found.experts[1].tolist())) == sorted(found.experts[1].tolist())
        assert found.experts.min() >= 0
        assert found.experts.max() < 10


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "experts", "k", "hidden", "inter"),
    [(1, 4, 2, 17, 5), (17, 8, 2, 32, 24), (127, 60, 4, 33, 17), (700, 3, 1, 64, 48), (0, 4, 2, 16, 16)],
)
def test_every_token_gets_the_weighted_sum_of_its_experts(
    rows: int, experts: int, k: int, hidden: int, inter: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, empty = torch.get_num_threads(), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: poisoned(empty(*a, **kw)))
    torch.set_num_threads(threads)
    try:
        x, routing = torch.randn(rows, hidden), route(torch.randn(rows, experts), k, True)
        both = weights(experts, hidden, inter)
        found = moe(x, routing, packed(*both))
        by_itself = moe(x, routing, packed(*both, tiles=TORCH))
    finally:
        torch.set_num_threads(before)
    oracle = reference(x, routing, *both)
    assert found.shape == by_itself.shape == oracle.shape
    if rows:
        assert max(error(found, oracle), error(by_itself, oracle)) < 1e-5


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("precision", WEIGHT_FORMATS)
def test_experts_are_stored_and_multiplied_in_every_precision(precision: str) -> None:
    both = weights(6, 128, 64)
    stored = [[store(each, precision) for each in part] for part in both]
    x, routing = torch.randn(41, 128), route(torch.randn(41, 6), 2, True)
    oracle = reference(x, routing, *([each.expanded() for each in part] for part in stored))
    grouped = pack_experts(*([pack(each) for each in part] for part in stored))
    alone = pack_experts(*([pack(each, tiles=TORCH) for each in part] for part in stored))
    assert error(moe(x, routing, grouped), oracle) < TOLERANCE[WEIGHT_FORMATS[precision].arithmetic]
    assert error(moe(x, routing, alone), oracle) < TOLERANCE[WEIGHT_FORMATS[precision].arithmetic]


def test_experts_that_nobody_chose_change_nothing_and_those_of_others_add_nothing() -> None:
    gate_up, down = weights(5, 24, 16)
    for expert in (0, 2, 4):
        gate_up[expert].fill_(torch.nan)
    routing = Routing(torch.tensor([[1, 3]] * 9, dtype=torch.int32), torch.rand(9, 2))
    x = torch.randn(9, 24)
    for tiles in (None, TORCH):
        whole = packed(gate_up, down, tiles=tiles)
        assert error(moe(x, routing, whole), reference(x, routing, gate_up, down)) < 1e-5
        parts = [pack_experts(whole.gate_up[a:b], whole.down[a:b], a) for a, b in ((0, 2), (2, 4), (4, 5))]
        summed = sum((moe(x, routing, part) for part in parts), torch.zeros(9, 24))
        assert error(summed, reference(x, routing, gate_up, down)) < 1e-5
        assert moe(x, routing, parts[2]).eq(0).all()


def test_tokens_may_all_want_the_same_expert_and_a_row_does_not_feel_the_others() -> None:
    both = weights(4, 32, 16)
    experts = packed(*both)
    x = torch.randn(300, 32)
    routing = Routing(torch.full((300, 1), 2, dtype=torch.int32), torch.ones(300, 1))
    found = moe(x, routing, experts)
    assert error(found, reference(x, routing, *both)) < 1e-5
    alone = moe(x[7:8], Routing(routing.experts[7:8], routing.weights[7:8]), experts)
    torch.testing.assert_close(alone, found[7:8], atol=1e-5, rtol=1e-5)


def test_without_a_compiler_torch_does_the_work(without_a_compiler: None) -> None:
    both = weights(4, 32, 16)
    logits, x = torch.randn(19, 4), torch.randn(19, 32)
    routing = route(logits, 2, True)
    assert torch.equal(routing.experts, reference_route(logits, 2, True).experts)
    assert error(moe(x, routing, packed(*both)), reference(x, routing, *both)) < 1e-5


def test_other_tiles_compute_the_same_and_a_missing_layout_is_refused() -> None:
    both = weights(4, 32, 16)
    experts = packed(*both)
    other = TileTable(((("linear", "fp32", 1), Tile("linear", "cpp", (("row_tile", 2), ("k_block", 8)))),))
    x, routing = torch.randn(50, 32), route(torch.randn(50, 4), 2, True)
    assert error(moe(x, routing, retile_experts(experts, other)), reference(x, routing, *both)) < 1e-5
    with pytest.raises(BadTile):
        retile_experts(experts, TORCH)


def test_what_does_not_fit_together_is_refused() -> None:
    experts = packed(*weights(4, 32, 16))
    routing = route(torch.randn(5, 4), 2, True)
    with pytest.raises(ValueError, match="x is"):
        moe(torch.randn(5, 31), routing, experts)
    with pytest.raises(ValueError, match="x is"):
        moe(torch.randn(5, 32).bfloat16(), routing, experts)
    with pytest.raises(ValueError, match="of 6 tokens"):
        moe(torch.randn(6, 32), routing, experts)
    with pytest.raises(ValueError, match="5 experts of"):
        route(torch.randn(5, 4), 5, True)
    with pytest.raises(ValueError, match="float64"):
        route(torch.randn(5, 4).double(), 2, True)
