"""What the GPU path does by torch alone, here with its tensors on the CPU: products, a step's one buffer, graphs."""

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from paretune.kernels import gpu_moe, placement
from paretune.kernels.gpu_lora import GpuLoraSlots
from paretune.kernels.linear import linear, pack, reference
from paretune.kernels.moe import pack_experts
from paretune.kernels.stored_weight import store
from paretune.kernels.weight_formats import GPU_EXPANDED_BYTES
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

from .triton_program import run

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no triton here: pip install triton (Linux)"
)


def test_a_device_in_the_place_of_a_tensor_says_the_same() -> None:
    assert placement.on_gpu(torch.device("cuda", 1))
    assert not placement.on_gpu(torch.zeros(1))


@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_the_libraries_multiply_is_the_product_of_what_is_stored(
    monkeypatch: pytest.MonkeyPatch, precision: str, rows: int
) -> None:
    monkeypatch.setattr(placement, "on_gpu", lambda where: True)
    torch.manual_seed(rows)
    stored = store(torch.randn(48, 32), precision)
    x, bias = torch.randn(rows, 32), torch.randn(48)
    packed = pack(stored, bias=bias, device=CPU)
    assert {tile.backend for tile in packed.tiles} == {"torch"}
    oracle = reference(x.double(), stored.expanded(), bias)
    found = linear(x, packed)
    assert found.dtype == torch.float32
    assert found.shape == (rows, 48)
    tolerance = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1e-2}[precision]
    assert (found - oracle).abs().max() < tolerance * oracle.abs().max() if rows else found.numel() == 0


@needs_triton
def test_every_backend_multiplies_what_is_stored_with_rows_as_they_are_or_rounded() -> None:
    run("""
        from paretune.kernels import gpu_linear, placement
        from paretune.kernels.linear import linear, pack, reference
        from paretune.kernels.stored_weight import store
        from paretune.kernels.triton_rounding import rounded_rows
        placement.on_gpu = lambda where: True
        for capability in ((9, 0), (8, 0)):
            placement.capability = lambda device: capability
            for precision in ("fp8", "int8", "int4", "ternary", "nvfp4", "mxfp4"):
                for out, inside in ((48, 64), (37, 50)):
                    stored, bias = store(torch.randn(out, inside), precision), torch.randn(out)
                    packed = pack(stored, bias=bias, device=torch.device("cpu"))
                    rounds = precision == "int8" or precision == "fp8" and capability == (9, 0) and out == 48
                    assert gpu_linear.rounds_rows(packed) == rounds
                    for rows in (1, 5, 40):
                        x = torch.randn(rows, 2 * inside)[:, ::2] if rows == 5 else torch.randn(rows, inside)
                        x[rows // 2 :: 5] = 0
                        rounded = x.double()
                        if rounds:
                            values, scale = rounded_rows(x.contiguous(), precision)
                            rounded = values.double() * scale[:, None].double()
                        oracle = reference(rounded, stored.expanded(), packed.bias.float())
                        for backend in gpu_linear.backends(precision, out, inside):
                            tile = gpu_linear.default_tile(precision, rows, backend)
                            assert tile.backend == backend
                            # torch._scaled_mm answers in bf16
                            tolerance = 1e-2 if (precision, backend) == ("fp8", "torch") and rounds else 1e-5
                            check(linear(x, packed, tile), oracle, tolerance * oracle.abs().max().item())
                    assert linear(x[:0], packed).shape == (0, out)
    """)


@needs_triton
def test_weights_are_expanded_in_parts_that_hold_every_channel_once() -> None:
    run("""
        from paretune.kernels import gpu_linear, placement
        from paretune.kernels.linear import linear, pack, reference
        from paretune.kernels.stored_weight import store
        placement.on_gpu = lambda where: True
        gpu_linear.GPU_EXPANDED_BYTES = 60_000
        stored, x = store(torch.randn(300, 70), "int4"), torch.randn(2, 70)
        assert gpu_linear.channels_at_a_time(300, 70, 4) == 128
        packed = pack(stored, bias=torch.randn(300), device=torch.device("cpu"))
        out = linear(x, packed, Tile("linear", "torch"))
        check(out, reference(x.double(), stored.expanded(), packed.bias), 2e-2)
    """)


@needs_triton
def test_few_rows_are_triton_s_by_default_and_many_the_libraries() -> None:
    run("""
        from paretune.kernels import gpu_linear, placement
        from paretune.kernels.linear import pack
        placement.on_gpu = lambda where: True
        for precision, few in (("int4", 128), ("nvfp4", 128), ("int8", 256), ("fp8", 64)):
            packed = pack(torch.randn(16, 32), precision, device=torch.device("cpu"))
            for exponent in range(13):
                assert packed.tiles[exponent].backend == ("triton" if 1 << exponent <= few else "torch")
        odd = pack(torch.randn(17, 30), "int8", device=torch.device("cpu"))
        assert {each.backend for each in odd.tiles} == {"triton"}
    """)


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


@needs_triton
def test_rows_are_rounded_as_the_formula_has_it_bit_by_bit() -> None:
    run("""
        from paretune.kernels.stored_weight import quantize_int8
        from paretune.kernels.triton_rounding import rounded_rows
        for width, dtype in ((40, torch.float32), (300, torch.float16), (20000, torch.float32)):
            x = torch.randn(7, width) * torch.tensor([1e-4, 1e-3, 1.0, 1e1, 1e2, 0.0, 1.0])[:, None]
            whole = torch.cat([x, x], 1).to(dtype)
            x = whole[:, width:]
            for ours, theirs in zip(rounded_rows(x, "int8"), quantize_int8(x)):
                assert torch.equal(ours, theirs)
            values, scale = rounded_rows(x, "fp8")
            largest = x.float().abs().amax(dim=1)
            assert torch.equal(scale, torch.where(largest > 0, largest / 448, 1.0))
            wanted = (x.float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(values.view(torch.uint8), wanted.view(torch.uint8))
        x[0, 7], x[1, 3] = float("nan"), float("inf")
        for precision in ("int8", "fp8"):
            values, scale = rounded_rows(x, precision)
            assert scale[:2].tolist() == [float("inf")] * 2 and scale[2:].isfinite().all()
    """)


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


def test_memory_holds_what_a_weight_of_fewer_bits_is_expanded_to() -> None:
    shape = ModelShape.load(MODEL_DIR)
    plain, packed = (
        memory_need(shape, Pool(accelerator="H100", weight_dtype=dtype)).activation_bytes for dtype in ("bf16", "int4")
    )
    widest = max(shape.qkv_features, 2 * shape.intermediate_size, shape.vocab_size)
    assert packed - plain == min(GPU_EXPANDED_BYTES, 2 * shape.hidden_size * widest)
