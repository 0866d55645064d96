"""Tiles and tile tables as data, and the search for them."""

import dataclasses
import json
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paretune.kernels import PRECISIONS, BadTile, Tile, TileTable, bucket
from paretune.kernels import linear as linear_module
from paretune.kernels.cpu.build import load
from paretune.kernels.tile_search import AttentionShape, search
from paretune.kernels.tiles import CACHE_PRECISIONS, PARAMETERS


@st.composite
def tiles(draw, operator=None):
    operator = operator or draw(st.sampled_from(sorted(PARAMETERS)))
    backend = draw(st.sampled_from(sorted(PARAMETERS[operator])))
    parameters = []
    for name, parameter in PARAMETERS[operator][backend].items():
        if draw(st.booleans()):
            allowed = st.integers(parameter.least, parameter.most)
            powers = st.sampled_from([1 << i for i in range(20) if parameter.least <= 1 << i <= parameter.most])
            parameters.append((name, draw(powers if parameter.power_of_two else allowed)))
    return Tile(operator, backend, tuple(draw(st.permutations(parameters))))


@st.composite
def tables(draw):
    precisions = {name: PRECISIONS if name == "linear" else CACHE_PRECISIONS for name in sorted(PARAMETERS)}
    named = [(name, precision) for name, known in precisions.items() for precision in known]
    keys = st.builds(lambda first, rows: (*first, rows), st.sampled_from(named), st.sampled_from([1, 2, 8, 64, 512]))
    return TileTable(tuple((key, draw(tiles(key[0]))) for key in draw(st.lists(keys, unique=True, max_size=6))))


@given(tables())
def test_a_table_survives_json(table):
    assert TileTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


@given(tables(), st.randoms())
def test_the_order_of_entries_does_not_matter(table, random):
    shuffled = list(table.entries)
    random.shuffle(shuffled)
    assert TileTable(tuple(shuffled)) == table
    assert hash(TileTable(tuple(shuffled))) == hash(table)


@given(tiles())
def test_the_order_of_parameters_does_not_matter_and_defaults_may_be_left_out(tile):
    defaults = {name: parameter.default for name, parameter in PARAMETERS[tile.operator][tile.backend].items()}
    own = tuple((name, value) for name, value in reversed(tile.parameters) if value != defaults[name])
    assert Tile(tile.operator, tile.backend, own) == tile
    assert tile.arguments == tuple(tile.get(name) for name in defaults)


@given(st.integers(1, 10**6))
def test_a_bucket_is_the_next_power_of_two(rows):
    assert bucket(rows) // 2 < rows <= bucket(rows)
    assert bin(bucket(rows)).count("1") == 1


def test_between_buckets_the_larger_counts_and_beyond_them_the_last():
    few, many = Tile("linear", "torch"), Tile("linear", "cpp")
    table = TileTable(((("linear", "bf16", 4), few), (("linear", "bf16", 64), many)))
    found = [table.lookup("linear", "bf16", rows) for rows in (1, 3, 4, 5, 64, 5000)]
    assert found == [few, few, few, many, many, many]
    assert table.lookup("linear", "int8", 4) is None
    assert TileTable.default().lookup("linear", "bf16", 1) is None
    assert table.backends("linear", "bf16") == ("cpp", "torch")
    assert table["linear", "bf16", 4] == few


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: Tile("matmul", "cpp"), "tile: operator"),
        (lambda: Tile("linear", "cuda"), "tile of linear: backend"),
        (lambda: Tile("linear", "cpp", (("rows", 4),)), "tile of linear (cpp): rows"),
        (lambda: Tile("linear", "cpp", (("row_tile", 99),)), "tile of linear (cpp): row_tile"),
        (lambda: Tile("linear", "cpp", (("row_tile", True),)), "tile of linear (cpp): row_tile"),
        (lambda: Tile("linear", "cpp", (("row_tile", "4"),)), "tile of linear (cpp): row_tile"),
        (lambda: Tile("linear", "triton", (("block_m", 48),)), "tile of linear (triton): block_m"),
        (lambda: Tile("linear", "cpp", (("row_tile", 4), ("row_tile", 5))), "tile of linear"),
        (lambda: TileTable(((("linear", "bf16", 3), Tile("linear", "cpp")),)), "tile table: linear, bf16, 3 rows"),
        (lambda: TileTable(((("linear", "fp4", 4), Tile("linear", "cpp")),)), "tile table: linear, fp4, 4 rows"),
        (lambda: TileTable(((("swiglu", "bf16", 4), Tile("linear", "cpp")),)), "tile table: swiglu, bf16, 4 rows"),
        (lambda: TileTable(2 * ((("linear", "bf16", 4), Tile("linear", "cpp")),)), "tile table: linear, bf16, 4 rows"),
        (lambda: TileTable.from_dict({"schema_version": 9}), "tile table: schema_version"),
        (lambda: TileTable.from_dict({"schema_version": 1, "tiles": [{"operator": "linear"}]}), "tile table: entry 0"),
        (lambda: bucket(0), "bucket"),
        (lambda: search([("decode_attention", "bf16", 8, 8)], [1], seconds=1), "tile search: operator"),
        (lambda: search([("linear", "fp4", 8, 8)], [1], seconds=1), "tile search: precision"),
        (lambda: search([("linear", "bf16", 8, 8)], [3], seconds=1), "tile search: bucket"),
    ],
)  # fmt: skip
def test_what_we_do_not_have_is_refused_by_name(make, where):
    with pytest.raises(BadTile) as error:
        make()
    assert error.value.where == where
    assert error.value.exit_code == 2
    assert error.value.args[0] == where


def test_tiles_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Tile("linear", "cpp").backend = "torch"


@pytest.fixture
def small_rotation(monkeypatch):
    monkeypatch.setattr("paretune.kernels.tile_search.MOST_COPIES", 2)


def test_a_search_ends_in_time_and_its_tiles_can_be_packed_and_run(small_rotation):
    begin, seen = time.perf_counter(), []
    result = search(
        [("linear", "fp32", 96, 64), ("linear", "int8", 33, 64)],
        [1, 16],
        seconds=10.0,
        progress=lambda *step: seen.append(step),
    )
    assert time.perf_counter() - begin < 90  # four buckets of some seconds, on a machine that may be busy
    assert [step[:2] for step in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert set(result.table) == {("linear", p, m) for p in ("fp32", "int8") for m in (1, 16)}
    assert all(gain.best_s <= gain.default_s for gain in result.gains)
    weight, x = torch.randn(33, 64), torch.randn(16, 64)
    packed = linear_module.pack(weight, "fp32", tiles=result.table)
    torch.testing.assert_close(linear_module.linear(x, packed), x @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(load() is None, reason="no C++ compiler")
def test_the_search_finds_the_tile_that_is_really_faster(small_rotation, monkeypatch):
    """A machine on which one prefetch distance wins by far: the search has to see it through."""

    now_s = 0.0

    def slow_but_for_4096(x, packed, tile):
        nonlocal now_s
        now_s += 0.0005 if tile.backend == "cpp" and tile.get("prefetch_bytes") == 4096 else 0.003
        return x

    monkeypatch.setattr("paretune.kernels.tile_search.linear", slow_but_for_4096)
    monkeypatch.setattr("paretune.kernels.tile_search.time", SimpleNamespace(perf_counter=lambda: now_s))
    result = search([("linear", "fp32", 64, 64)], [4], seconds=2.0)
    assert result.table["linear", "fp32", 4].get("prefetch_bytes") == 4096
    assert result.gains[0].speedup > 2


@pytest.mark.skipif(load() is None, reason="no C++ compiler")
def test_attention_gets_its_tile_too_and_the_search_finds_the_faster_one(small_rotation, monkeypatch):
    def slow_but_in_parts_of_64(q, cache, tables, lengths, scale, tile):
        time.sleep(0.0005 if tile.get("split_tokens") == 64 else 0.003)
        return q

    monkeypatch.setattr("paretune.kernels.tile_search.ROTATED_BYTES", 1 << 20)
    monkeypatch.setattr("paretune.kernels.tile_search.decode_attention", slow_but_in_parts_of_64)
    result = search([], [1, 4], seconds=2.0, attention=[AttentionShape("int8", 4, 2, 16, 16)])
    assert set(result.table) == {(f"{o}_attention", "int8", m) for o in ("decode", "prefill") for m in (1, 4)}
    assert result.table["decode_attention", "int8", 4].get("split_tokens") == 64
    assert all(gain.best_s <= gain.default_s for gain in result.gains)


def test_tiles_of_one_weight_precision_keep_those_of_attention():
    attention = ("decode_attention", "fp8", 1), Tile("decode_attention", "torch")
    linears = [(("linear", precision, 1), Tile("linear", "torch")) for precision in ("bf16", "int8")]
    assert TileTable((attention, *linears)).only("int8") == TileTable((attention, linears[1]))


def test_where_no_time_is_left_buckets_are_named_as_unsearched(small_rotation):
    result = search([("linear", "fp32", 16, 16)], [1, 2], seconds=0.0)
    assert result.unsearched == (("linear", "fp32", 1), ("linear", "fp32", 2))
    assert len(result.table) == 0
