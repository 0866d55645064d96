"""Many adapters in one call against float64."""

import numpy as np
import pytest
import torch

from paretune.kernels.cpu.build import load
from paretune.kernels.lora import Delta, LoraSlots, Matrix, adapter_rows, pack_adapter, reference, slot_bytes

BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(load() is None, reason="no C++ compiler"))]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def draw_deltas(matrix, ranks, dtype):
    """A delta of every part that has a rank; None leaves the part alone."""
    return {
        part: Delta(torch.randn(rank, matrix.in_features).to(dtype), torch.randn(channels, rank).to(dtype), 0.3 + part)
        for part, (rank, channels) in enumerate(zip(ranks, matrix.parts))
        if rank is not None
    }


def filled(matrix, adapters, precision, backend, max_rank=64):
    slots = LoraSlots([matrix], len(adapters), max_rank, precision, backend=backend)
    for slot, deltas in enumerate(adapters):
        packed = pack_adapter(
            {(0, part): delta for part, delta in deltas.items()}, [matrix], precision, backend=backend
        )
        slots.put(slot, packed)
    return slots


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("in_features", [1, 17, 127, 256])
@pytest.mark.parametrize("parts", [(1,), (17, 127), (64, 3, 33)])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_row_gets_the_delta_of_its_own_adapter(backend, precision, in_features, parts, threads):
    torch.manual_seed(0)
    matrix = Matrix(in_features, parts)
    ranks = [(1, 64, None), (16, None, 7), (None, None, None), (3, 2, 5), (64, 8, 1)]
    adapters = [draw_deltas(matrix, its, DTYPES[precision]) for its in ranks]
    slots = filled(matrix, adapters, precision, backend)
    rng = np.random.default_rng(1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for slot_of_row in ([4], [-1, 0, 0, 3, -1, 1, 0], rng.integers(-1, 5, 127), np.zeros(33), [2, 2]):
            slot_of_row = np.array(slot_of_row, np.int32)
            x, y = torch.randn(len(slot_of_row), in_features), torch.randn(len(slot_of_row), sum(parts))
            oracle = reference(x, y, slot_of_row, adapters, parts)
            slots.add(0, x, y, adapter_rows(slot_of_row, len(adapters)))
            assert (y.double() - oracle).abs().max() < 1e-5 * oracle.abs().max()
    finally:
        torch.set_num_threads(before)


def test_rows_and_parts_without_an_adapter_are_neither_read_nor_written(backend):
    matrix = Matrix(40, (24, 40, 8))
    adapters = [draw_deltas(matrix, (4, None, 4), torch.float32), draw_deltas(matrix, (None, 9, None), torch.float32)]
    slots = filled(matrix, adapters, "fp32", backend)
    slot_of_row = np.array([-1, 0, -1, 1, 0, -1], np.int32)
    x, y = torch.randn(6, 40), torch.zeros(6, 72)
    x[slot_of_row < 0] = float("nan")
    y[slot_of_row < 0] = float("nan")
    y[slot_of_row == 0, 24:64] = float("nan")
    y[slot_of_row == 1, :24] = float("nan")
    y[slot_of_row == 1, 64:] = float("nan")
    oracle = reference(x, y, slot_of_row, adapters, matrix.parts)
    poisoned = y.isnan()
    slots.add(0, x, y, adapter_rows(slot_of_row, 2))
    assert torch.equal(y.isnan(), poisoned)
    torch.testing.assert_close(y.double(), oracle, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_strided_rows_are_taken_as_they_lie(backend):
    matrix = Matrix(20, (12,))
    adapters = [draw_deltas(matrix, (5,), torch.float32)]
    slots = filled(matrix, adapters, "fp32", backend)
    wide_x, wide_y = torch.randn(9, 33), torch.zeros(9, 50)
    x, y = wide_x[:, 3:23], wide_y[:, 7:19]
    slot_of_row = np.zeros(9, np.int32)
    oracle = reference(x, y, slot_of_row, adapters, matrix.parts)
    slots.add(0, x, y, adapter_rows(slot_of_row, 1))
    torch.testing.assert_close(y.double(), oracle, rtol=1e-5, atol=1e-5)
    assert (wide_y[:, :7] == 0).all()
    assert (wide_y[:, 19:] == 0).all()


@pytest.mark.skipif(load() is None, reason="no C++ compiler")
def test_a_row_gets_the_same_bits_whatever_rows_stand_beside_it():
    matrix = Matrix(100, (70,))
    adapters = [draw_deltas(matrix, (6,), torch.float32), draw_deltas(matrix, (16,), torch.float32)]
    slots = filled(matrix, adapters, "fp32", "cpp")
    x = torch.randn(23, 100)
    slot_of_row = np.array([0, 1] * 11 + [0], np.int32)
    together = torch.zeros(23, 70)
    slots.add(0, x, together, adapter_rows(slot_of_row, 2))
    for row in range(23):
        alone = torch.zeros(1, 70)
        slots.add(0, x[row : row + 1], alone, adapter_rows(slot_of_row[row : row + 1], 2))
        assert torch.equal(alone[0], together[row])


def test_a_slot_holds_what_was_put_there_last(backend):
    matrices = [Matrix(24, (16,)), Matrix(16, (8, 8))]
    slots = LoraSlots(matrices, 2, 8, "fp32", backend=backend)
    first = {(0, 0): Delta(torch.randn(8, 24), torch.randn(16, 8), 1.0)}
    second = {(1, 1): Delta(torch.randn(2, 16), torch.randn(8, 2), 2.0)}
    rows = adapter_rows(np.array([1], np.int32), 2)
    for deltas in (first, second):
        slots.put(1, pack_adapter(deltas, matrices, "fp32", backend=backend))
        for matrix, (in_features, parts) in enumerate(matrices):
            x, y = torch.randn(1, in_features), torch.zeros(1, sum(parts))
            its = {part: delta for (of, part), delta in deltas.items() if of == matrix}
            oracle = reference(x, y, [0], [its], parts)
            slots.add(matrix, x, y, rows)
            torch.testing.assert_close(y.double(), oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", DTYPES)
def test_an_adapter_of_full_rank_on_everything_fits_its_slot(backend, precision):
    matrices = [Matrix(17, (33, 1)), Matrix(127, (65,))]
    for rank in (1, 3, 64):
        deltas = {
            (index, part): Delta(torch.randn(rank, matrix.in_features), torch.randn(channels, rank), 1.0)
            for index, matrix in enumerate(matrices)
            for part, channels in enumerate(matrix.parts)
        }
        packed = pack_adapter(deltas, matrices, precision, backend=backend)
        assert packed.nbytes <= slot_bytes(matrices, rank, precision)


def test_no_row_with_an_adapter_is_no_work():
    assert adapter_rows(np.full(5, -1, np.int32), 3) is None


def test_what_does_not_fit_is_refused(backend):
    matrix = Matrix(8, (4,))
    with pytest.raises(ValueError, match="lora: A"):
        pack_adapter({(0, 0): Delta(torch.randn(2, 9), torch.randn(4, 2), 1.0)}, [matrix], "fp32", backend=backend)
    with pytest.raises(ValueError, match="lora: A"):
        pack_adapter({(0, 0): Delta(torch.randn(513, 8), torch.randn(4, 513), 1.0)}, [matrix], "fp32", backend=backend)
    slots = filled(matrix, [draw_deltas(matrix, (2,), torch.float32)], "fp32", backend)
    rows = adapter_rows(np.zeros(1, np.int32), 1)
    with pytest.raises(ValueError, match="lora: x"):
        slots.add(0, torch.zeros(1, 7), torch.zeros(1, 4), rows)
    with pytest.raises(ValueError, match="lora: x"):
        slots.add(0, torch.zeros(1, 8).bfloat16(), torch.zeros(1, 4), rows)
    with pytest.raises(ValueError, match="lora: y"):
        slots.add(0, torch.zeros(1, 8), torch.zeros(1, 4).bfloat16(), rows)
    with pytest.raises(ValueError, match="an adapter packed for"):
        slots.put(0, pack_adapter({}, [matrix], "bf16", backend=backend))
    big = {(0, 0): Delta(torch.randn(200, 8), torch.randn(4, 200), 1.0)}
    with pytest.raises(ValueError, match="of rank 200, slots of rank 64"):
        slots.put(0, pack_adapter(big, [matrix], "fp32", backend=backend))
    with pytest.raises(ValueError, match="backend"):
        LoraSlots([matrix], 1, 1, "fp32", backend="cuda")
