"""What the GPU path does by torch alone, here with its tensors on the CPU: products, a step's one buffer, graphs."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from paretune.kernels import gpu_moe, placement
from paretune.kernels.gpu_linear import quantize_e4m3
from paretune.kernels.gpu_lora import GpuLoraSlots
from paretune.kernels.linear import linear, pack, reference
from paretune.kernels.moe import pack_experts
from paretune.kernels.stored_weight import quantize_int8, store
from paretune.runtime.adapters import matrices
from paretune.runtime.batch import HEADER, LOGITS, TARGET, Batch
from paretune.runtime.decode_graphs import DecodeGraphs, Recorded
from paretune.runtime.device_batch import DeviceBatch
from paretune.runtime.memory import memory_need
from paretune.runtime.model_shape import ModelShape
from paretune.runtime.parallel import Layout, share_of
from paretune.runtime.runnable import GPU_EXPERT_DTYPES
from paretune.runtime.small_model import MODEL_DIR
from paretune.runtime.spec import Pool

CPU = torch.device("cpu")


def test_a_device_in_the_place_of_a_tensor_says_the_same() -> None:
    assert placement.on_gpu(torch.device("cuda", 1))
    assert not placement.on_gpu(torch.zeros(1))


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 40])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8", "int8"])
def test_what_the_libraries_multiply_is_the_product_of_what_is_stored(
    monkeypatch: pytest.MonkeyPatch, precision: str, rows: int
) -> None:
    monkeypatch.setattr(placement, "on_gpu", lambda where: True)
    monkeypatch.setattr(placement, "capability", lambda device: (9, 0))
    torch.manual_seed(rows)
    stored = store(torch.randn(48, 32), precision)
    x, bias = torch.randn(rows, 32), torch.randn(48)
    x[rows // 2 :: 5] = 0
    packed = pack(stored, bias=bias, device=CPU)
    assert {tile.backend for tile in packed.tiles} == {"torch"}
    rounded, tolerance = x.double(), {"fp32": 1e-6, "int8": 1e-2, "fp16": 2e-3}.get(precision, 1e-2)
    if precision in ("fp8", "int8"):
        values, scale = (quantize_e4m3 if precision == "fp8" else quantize_int8)(x)
        rounded = values.double() * scale[:, None].double()
    oracle = reference(rounded, stored.expanded(), bias)
    found = linear(x, packed)
    assert found.dtype == torch.float32
    assert found.shape == (rows, 48)
    assert (found - oracle).abs().max() < tolerance * oracle.abs().max() if rows else found.numel() == 0


def test_experts_are_stacked_without_a_copy_of_each_and_only_in_what_the_kernel_multiplies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "on_gpu", lambda where: True)
    monkeypatch.setattr(placement, "capability", lambda device: (9, 0))
    weights = torch.randn(3, 32, 16)
    packed = pack_experts(*([pack(weight, "bf16", device=CPU) for weight in weights] for _ in range(2)), first=4)
    assert packed.stacks is not None
    assert torch.equal(packed.stacks[0], weights.bfloat16())
    assert packed.nbytes == sum(stack.nbytes for stack in packed.stacks)
    for stack, layer in zip(packed.stacks, (packed.gate_up, packed.down)):
        for row, each in zip(stack, layer):
            assert each.weight is not None
            assert each.weight.data_ptr() == row.data_ptr()
    eight_bits = [pack(weight, "int8", device=CPU) for weight in weights]
    with pytest.raises(ValueError, match="int8"):
        pack_experts(eight_bits, eight_bits)
    assert gpu_moe.PRECISIONS == GPU_EXPERT_DTYPES


def test_rows_of_e4m3_keep_three_bits_and_their_largest_number() -> None:
    x = torch.randn(7, 64) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6, 0.0, 1.0])[:, None]
    values, scale = quantize_e4m3(x)
    back = values.float() * scale[:, None]
    largest = x.abs().amax(dim=1, keepdim=True)
    assert ((back - x).abs() <= x.abs() / 16 + largest * 2.0**-17).all()
    assert torch.allclose(back.abs().amax(dim=1), largest[:, 0], rtol=1e-6)


def test_the_parts_of_a_step_lie_on_16_bytes_and_hold_what_the_batch_has() -> None:
    pool = Pool(
        accelerator="H100", max_model_len=64, max_num_seqs=5, max_num_batched_tokens=16, block_size=4, max_loras=2,
        num_kv_blocks=32,
    )  # fmt: skip
    batch, there = Batch(pool), DeviceBatch(pool, CPU)
    for counts, padded in (((1, 1, 1), 5), ((7, 2, 5), None), ((1,), 1)):
        rows, tokens = len(counts), sum(counts)
        adapters = [1] + [0] * (rows - 1)
        places = [*range(10, 10 + tokens), *counts, *range(3, 3 + rows), *[1] * rows, *adapters, *range(rows * 4)]
        batch.wire[: HEADER + len(places)] = [rows, tokens, 4, LOGITS, 0, TARGET, *places]
        batch.read()
        there.take(batch, padded)
        names = ("token_ids", "positions", "slot_mapping", "context_len", "length", "head_rows", "query_start")
        assert batch.adapter_rows is not None
        for name in names:
            ours, theirs = getattr(there, name), getattr(batch, name)
            assert ours.data_ptr() % 16 == 0, name
            assert torch.equal(ours[: len(theirs)], theirs.int()), name
        assert torch.equal(there.block_tables[:rows, :4], batch.block_tables)
        assert there.adapter_rows is not None
        assert torch.equal(there.adapter_rows.row, batch.adapter_rows.row)
        for part in (there.block_tables, *there.adapter_rows):
            assert part.data_ptr() % 16 == 0
        missing = 0 if padded is None else padded - rows
        assert there.slot_mapping.tolist()[tokens:] == [-1] * missing
        assert there.length.tolist()[rows:] == [0] * missing


def test_captured_steps_of_all_sizes_have_one_memory_for_their_logits() -> None:
    batch = SimpleNamespace(rows=0)
    batch.take = lambda empty, size: setattr(batch, "rows", size)

    def record(compute: Callable[[], Tensor]) -> Recorded:
        return Recorded(lambda: None, compute())

    graphs = DecodeGraphs((1, 3, 8), cast(Any, batch), lambda its: torch.full((its.rows, 5), float(its.rows)))  # type: ignore[attr-defined]
    graphs.capture(cast(Any, None), record)
    results = {size: recorded.result for size, recorded in graphs._recorded.items()}
    assert {size: tuple(result.shape) for size, result in results.items()} == {8: (8, 5), 3: (3, 5), 1: (1, 5)}
    assert len({result.data_ptr() for result in results.values()}) == 1
    assert results[8][:, 0].tolist() == [1, 3, 3, 8, 8, 8, 8, 8]


@pytest.mark.parametrize("rank", [8, 16, 17, 33])
def test_slots_for_adapters_take_what_was_reckoned(rank: int) -> None:
    shape = ModelShape.load(MODEL_DIR)
    pool = Pool(accelerator="H100", max_loras=3, max_lora_rank=rank)
    slots = GpuLoraSlots(matrices(shape, share_of(shape, Layout(), 0)), 3, rank, torch.bfloat16, CPU)
    held = sum(part.nbytes for matrix in (*slots._a, *slots._b) for part in matrix)
    assert memory_need(shape, pool).adapter_bytes == held
