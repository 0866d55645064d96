"""Linear layers against float64, on sizes that fit no tile, for every precision and backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.kernels import BadTile, Tile, TileTable
from paretune.kernels.cpu.build import load
from paretune.kernels.linear import linear, pack, reference
from paretune.kernels.stored_weight import quantize_int8, store
from paretune.kernels.weight_formats import WEIGHT_FORMATS

BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(load() is None, reason="no C++ compiler"))]
PRECISIONS = list(WEIGHT_FORMATS)
# bf16 arithmetic rounds x to eight bits, unless the processor multiplies bf16 in fp32
TOLERANCE = {name: {"fp32": 1e-5, "bf16": 1e-2, "int8": 1e-6}[form.arithmetic] for name, form in WEIGHT_FORMATS.items()}


def expected(x, weight, precision, bias):
    """float64, of the numbers that the precision holds: only the arithmetic is left to be judged."""
    stored = store(weight, precision)
    if stored.format.arithmetic == "int8":
        quantized, scale = quantize_int8(x)
        x = quantized.double() * scale[:, None].double()
    return reference(x, stored.expanded(), bias)


def worst(result, oracle):
    """Largest error relative to the largest output; NaN counts as wrong."""
    error = (result.double() - oracle).abs().max() / oracle.abs().max().clamp(min=1e-30)
    return float(torch.nan_to_num(error, nan=float("inf")))


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 127, 17), (3, 17, 127), (13, 33, 65), (17, 64, 300), (127, 100, 127)]
)
def test_it_is_the_matrix_product(backend, precision, m, n, k):
    torch.manual_seed(m + n + k)
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    packed = pack(weight, precision, bias=bias, backends=(backend,))
    assert worst(linear(x, packed), expected(x, weight, precision, bias)) < TOLERANCE[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_number_of_rows_and_both_thread_counts_fill_the_whole_result(backend, precision, monkeypatch):
    """The result's memory is NaN before: a channel that nobody writes shows."""
    torch.manual_seed(0)
    x, weight = torch.randn(30, 200), torch.randn(70, 200)
    packed, oracle = pack(weight, precision, backends=(backend,)), expected(x, weight, precision, None)
    monkeypatch.setattr(torch, "empty", lambda *size, dtype=None: torch.full(*size, float("nan"), dtype=dtype))
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in range(1, 31):
            tile = Tile("linear", backend, (("serial_below_kmacs", 0),) if backend == "cpp" else ())
            # rows rounded to int8 are rounded each by itself, so a part has the part of the oracle
            assert worst(linear(x[:rows], packed, tile), oracle[:rows]) < TOLERANCE[precision]
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bf16_activations_come_back_as_bf16(backend, precision):
    torch.manual_seed(0)
    x, weight = torch.randn(9, 70).bfloat16(), torch.randn(45, 70)
    out = linear(x, pack(weight, precision, backends=(backend,)))
    assert out.dtype is torch.bfloat16
    assert worst(out, expected(x, weight, precision, None)) < 1e-2


@settings(max_examples=120, deadline=None)
@given(
    m=st.integers(1, 40), n=st.integers(1, 70), k=st.integers(1, 90), precision=st.sampled_from(PRECISIONS),
    row_tile=st.integers(0, 6), row_block=st.integers(0, 30), k_block=st.integers(0, 50),
    serial=st.sampled_from([0, 1 << 20]),
)  # fmt: skip
@pytest.mark.skipif(load() is None, reason="no C++ compiler")
def test_no_tile_changes_what_is_computed(m, n, k, precision, row_tile, row_block, k_block, serial):
    torch.manual_seed(0)
    x, weight = torch.randn(m, k), torch.randn(n, k)
    parameters = {"row_tile": row_tile, "row_block": row_block, "k_block": k_block, "serial_below_kmacs": serial}
    out = linear(x, pack(weight, precision, backends=("cpp",)), Tile("linear", "cpp", tuple(parameters.items())))
    assert worst(out, expected(x, weight, precision, None)) < TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["int8", "int4", "ternary"])
def test_integer_sums_do_not_saturate(backend, precision):
    """255 * 127 * 2 exceeds int16, where the byte instructions of AVX2 would clip; so would nine of 15 * 127 * 2."""
    x, weight = torch.ones(2, 4096), torch.ones(32, 4096)
    x[1] = -1
    out = linear(x, pack(weight, precision, backends=(backend,)))
    assert out[0].tolist() == pytest.approx([4096.0] * 32, rel=1e-6)
    assert out[1].tolist() == pytest.approx([-4096.0] * 32, rel=1e-6)


def test_a_row_of_zeros_gives_the_bias(backend):
    bias = torch.arange(5.0)  # whole numbers, which bf16 holds
    for precision in PRECISIONS:
        packed = pack(torch.randn(5, 8), precision, bias=bias, backends=(backend,))
        assert torch.equal(linear(torch.zeros(1, 8), packed)[0], bias)


def test_no_rows_give_no_rows(backend):
    assert linear(torch.empty(0, 8), pack(torch.randn(5, 8), "bf16", backends=(backend,))).shape == (0, 5)


def test_strided_rows_are_read_where_they_lie(backend):
    wide, weight = torch.randn(7, 50), torch.randn(20, 30)
    packed = pack(weight, "fp32", backends=(backend,))
    assert worst(linear(wide[:, 10:40], packed), reference(wide[:, 10:40], weight)) < 1e-5
    turned, narrow = torch.randn(30, 7).t(), pack(weight, "fp32", backends=(backend,))
    assert worst(linear(turned, narrow), reference(turned, weight)) < 1e-5


@pytest.mark.skipif(load() is None, reason="no C++ compiler")
def test_the_layouts_in_memory_are_those_the_table_names():
    weight = torch.randn(64, 64)
    only_cpp = pack(weight, "bf16")
    both = pack(weight, "bf16", backends=("cpp", "torch"))
    assert only_cpp.weight is None
    assert both.nbytes == only_cpp.nbytes + weight.numel() * 2
    table = TileTable(
        ((("linear", "bf16", 1), Tile("linear", "cpp")), (("linear", "bf16", 64), Tile("linear", "torch")))
    )
    mixed = pack(weight, "bf16", tiles=table)
    assert [tile.backend for tile in mixed.tiles[:3]] == ["cpp", "torch", "torch"]
    x = torch.randn(2, 64)
    assert worst(linear(x, mixed), reference(x.bfloat16(), weight.bfloat16())) < 1e-2


def test_a_backend_that_was_not_packed_is_refused():
    packed = pack(torch.randn(4, 4), "fp32", backends=("torch",))
    with pytest.raises(BadTile) as error:
        linear(torch.randn(1, 4), packed, Tile("linear", "cpp"))
    assert error.value.where == "linear: backend"


@pytest.mark.skipif(load() is None, reason="no C++ compiler")
def test_a_row_tile_beyond_the_registers_is_refused():
    library = load()
    tile = Tile("linear", "cpp", (("row_tile", library.max_row_tile + 1),))
    with pytest.raises(BadTile) as error:
        linear(torch.randn(20, 4), pack(torch.randn(4, 4), "fp32"), tile)
    assert error.value.where == "linear: row_tile"


@pytest.mark.parametrize(
    ("weight", "precision", "bias", "where"),
    [
        (torch.randn(4, 4), "fp6", None, "linear: precision"),
        (torch.full((4, 4), 7e4), "fp16", None, "linear: weight"),
        (torch.full((4, 4), float("nan")), "int4", None, "linear: weight"),
        (torch.randn(4), "fp32", None, "linear: weight"),
        (torch.zeros(4, 4, dtype=torch.int8), "int8", None, "linear: weight"),
        (torch.randn(4, 4), "fp32", torch.zeros(3), "linear: bias"),
        (torch.zeros(1, 65537), "int8", None, "linear: in_features"),
        (torch.zeros(1, 65537), "ternary", None, "linear: in_features"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(weight, precision, bias, where):
    with pytest.raises(BadTile) as error:
        pack(weight, precision, bias=bias)
    assert error.value.where == where


@pytest.mark.parametrize("x", [torch.zeros(2, 5), torch.zeros(4), torch.zeros(2, 4, dtype=torch.float64)])
def test_activations_that_do_not_fit_are_refused(x):
    with pytest.raises(ValueError, match="linear: x is"):
        linear(x, pack(torch.randn(3, 4), "fp32"))
