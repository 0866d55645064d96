"""Triton kernels where there is no GPU: results under the interpreter, and machine code for GPUs compiled ahead of
time.

Each runs in a process of its own: TRITON_INTERPRET counts when triton is imported, and this process stays without
triton."""

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no triton here: pip install triton (Linux)"
)

PREAMBLE = """
import torch
from paretune.kernels import BadTile, Tile
from paretune.kernels.paged_cache import PagedCache
torch.manual_seed(0)

def tile(operator, **parameters):
    return Tile(operator, "triton", tuple(parameters.items()))

def check(result, oracle, tolerance):
    error = torch.nan_to_num((result.double() - oracle).abs(), nan=float("inf")).max().item()
    assert error < tolerance, error

def paged(lengths, kv_heads, head_dim, block_size, dtype):
    blocks = [-(-length // block_size) for length in lengths]
    order, taken = torch.randperm(sum(blocks) + 2).int(), 0
    tables = torch.zeros(len(lengths), max(blocks) + 1, dtype=torch.int32)
    cache = PagedCache.zeros(len(order), dtype, block_size, kv_heads, head_dim)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    for s, length in enumerate(lengths):
        tables[s, : blocks[s]] = order[taken : taken + blocks[s]]
        taken += blocks[s]
        for p in range(length):
            slot = tables[s, p // block_size] * block_size + p % block_size
            cache.write(slot[None], *torch.randn(2, 1, kv_heads, head_dim))
    return cache, tables
"""


def run(program, interpret=True):
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    code = textwrap.dedent(PREAMBLE) + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_matmul_is_the_matrix_product():
    run("""
        from paretune.kernels.linear import reference
        from paretune.kernels.triton_matmul import matmul
        for m, n, k, dtype, tolerance in ((70, 90, 100, torch.float32, 1e-4), (1, 33, 17, torch.float16, 1e-2)):
            x, weight, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
            chosen = tile("linear", block_m=32, block_n=64, block_k=64, group_m=2)
            check(matmul(x, weight, chosen, bias), reference(x, weight, bias), tolerance)
            check(matmul(x, weight, chosen), reference(x, weight), tolerance)
        try:
            matmul(x, weight, Tile("linear", "torch"))
        except BadTile as error:
            assert error.where == "matmul: tile"
        else:
            raise AssertionError("took a tile of another backend")
    """)


def test_every_row_gets_the_delta_of_its_own_adapter():
    run("""
        import numpy
        from paretune.kernels.lora import Delta, adapter_rows, reference
        from paretune.kernels.triton_lora import lora
        slot_of_row = numpy.array([2, -1, 0, 2] + [1] * 20 + [-1, 0], numpy.int32)
        for in_features, channels, dtype, tolerance in ((70, 90, torch.float32, 1e-4), (33, 17, torch.float16, 5e-2)):
            a, b = torch.randn(3, 16, in_features).to(dtype), torch.randn(3, channels, 16).to(dtype)
            a[0, 5:], b[0, :, 5:] = 0, 0  # a rank of 5, padded
            scale = torch.tensor([0.5, 0.25, 0.125])
            x, y = 0.3 * torch.randn(26, in_features).to(dtype), torch.full((26, 7 + channels + 3), float("nan"))
            y[:, 7 : 7 + channels] = torch.randn(26, channels)
            deltas = [{0: Delta(a[s], b[s], float(scale[s]))} for s in range(3)]
            oracle = reference(x, y[:, 7 : 7 + channels], slot_of_row, deltas, (channels,))
            lora(x, y, a, b, scale, adapter_rows(slot_of_row, 3), first=7)
            check(y[:, 7 : 7 + channels], oracle, tolerance)
            assert y[:, :7].isnan().all() and y[:, 7 + channels :].isnan().all()
        for wrong in (a[:, :8].contiguous(), a.float()):
            try:
                lora(x, y, wrong, b, scale, adapter_rows(slot_of_row, 3))
            except ValueError as error:
                assert "lora: " in str(error)
            else:
                raise AssertionError("took shapes that do not fit")
    """)


def test_prefill_attention_is_causal_softmax_attention():
    run("""
        from paretune.kernels.prefill_attention import reference
        from paretune.kernels.triton_prefill_attention import prefill_attention
        rows, contexts = [40, 1, 0, 7], [0, 20, 0, 30]
        cases = ((4, 1, 24, torch.float32, 1e-4), (2, 2, 16, torch.float16, 1e-2))
        for heads, kv_heads, head_dim, dtype, tolerance in cases:
            cache, tables = paged([r + c for r, c in zip(rows, contexts)], kv_heads, head_dim, 8, "fp32")
            q = torch.randn(sum(rows), heads, head_dim).to(dtype)
            starts = torch.tensor([0, 40, 41, 41, 48], dtype=torch.int32)
            context = torch.tensor(contexts, dtype=torch.int32)
            chosen = tile("prefill_attention", block_m=32, block_n=32)
            out = prefill_attention(q, cache, tables, starts, context, 0.2, chosen, max(rows))
            check(out, reference(q, cache, tables, starts, context, 0.2), tolerance)
    """)


@pytest.mark.parametrize("splits", [1, 4])
def test_decode_attention_is_softmax_attention(splits):
    run(f"""
        from paretune.kernels.decode_attention import reference
        from paretune.kernels.triton_decode_attention import decode_attention
        lengths = [1, 70, 0, 33]
        cases = ((8, 2, 24, torch.float32, 1e-4), (2, 2, 16, torch.float16, 1e-2))
        for heads, kv_heads, head_dim, dtype, tolerance in cases:
            cache, tables = paged(lengths, kv_heads, head_dim, 8, "fp32")
            q, context = torch.randn(4, heads, head_dim).to(dtype), torch.tensor(lengths, dtype=torch.int32)
            chosen = tile("decode_attention", block_n=32, splits={splits})
            out = decode_attention(q, cache, tables, context, 0.2, chosen)
            check(out, reference(q, cache, tables, context, 0.2), tolerance)
    """)


@pytest.mark.parametrize(("arch", "instruction"), [(80, "mma.sync"), (90, "wgmma")])
def test_matmul_becomes_tensor_core_code_for_gpus_that_are_not_here(arch, instruction):
    run(
        f"""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from paretune.kernels.triton_matmul import matmul_kernel
        pointers = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*bf16")
        numbers = ("rows", "out_features", "in_features", "x_stride", "weight_stride", "out_stride")
        constants = dict(HAS_BIAS=False, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8)
        source = ASTSource(
            fn=matmul_kernel, constexprs=constants,
            signature=pointers | dict.fromkeys(numbers, "i32") | dict.fromkeys(constants, "constexpr"),
            attrs={{(i,): [["tt.divisibility", 16]] for i in range(10)}},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", {arch}, 32), options=dict(num_warps=8, num_stages=3))
        assert "{instruction}" in compiled.asm["ptx"]
        assert len(compiled.asm["cubin"]) > 1000
        assert compiled.metadata.shared <= 227 * 1024
    """,
        interpret=False,
    )


def test_decode_attention_compiles_for_a_gpu_that_is_not_here():
    run(
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from paretune.kernels.triton_decode_attention import decode_attention_kernel
        names = decode_attention_kernel.arg_names
        kinds = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*bf16") | dict(scale="fp32")
        kinds |= dict.fromkeys(("tables_ptr", "context_ptr"), "*i32")
        kinds |= dict.fromkeys(("mixed_ptr", "largest_ptr", "total_ptr"), "*fp32")
        constants = dict(GROUP=4, PADDED_GROUP=16, HEAD_DIM=128, PADDED_DIM=128, SPLITS=4, BLOCK_N=64)
        signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
        source = ASTSource(fn=decode_attention_kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, num_stages=2))
        assert ".target sm_90" in compiled.asm["ptx"]
    """,
        interpret=False,
    )


def test_both_halves_of_an_adapter_compile_for_a_gpu_that_is_not_here():
    run(
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from paretune.kernels.triton_lora import expand_kernel, shrink_kernel
        kinds = dict.fromkeys(("x_ptr", "a_ptr", "b_ptr"), "*bf16")
        kinds |= dict.fromkeys(("h_ptr", "scale_ptr", "y_ptr"), "*fp32")
        tables = ("row_ptr", "tile_start_ptr", "tile_end_ptr", "tile_slot_ptr")
        kinds |= dict.fromkeys(tables, "*i32")
        for kernel, constants in (
            (shrink_kernel, dict(RANK=16, BLOCK_M=16, BLOCK_K=64)),
            (expand_kernel, dict(RANK=16, BLOCK_M=16, BLOCK_N=64)),
        ):
            signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in kernel.arg_names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, num_stages=2))
            assert ".target sm_90" in compiled.asm["ptx"]
    """,
        interpret=False,
    )


def test_the_search_space_holds_only_tiles_that_fit():
    run("""
        from paretune.kernels.triton_decode_attention import tiles as decode_tiles
        from paretune.kernels.triton_matmul import tiles
        from paretune.kernels.triton_prefill_attention import tiles as prefill_tiles
        small, large = tiles((1, 4096, 4096), 227 * 1024), tiles((512, 4096, 4096), 227 * 1024)
        assert small and {t.get("block_m") for t in small} == {16}
        assert {t.get("block_m") for t in large} == {16, 32, 64, 128, 256}
        for shared in (64 * 1024, 227 * 1024):
            for t in tiles((512, 4096, 4096), shared):
                assert (t.get("block_m") + t.get("block_n")) * t.get("block_k") * 2 * t.get("num_stages") <= shared
        assert len(tiles((512, 4096, 4096), 64 * 1024)) < len(large)
        assert {t.get("splits") for t in decode_tiles(16, 64, 227 * 1024)} == {1}
        assert all(t.get("block_m") <= 32 for t in prefill_tiles(20, 64, 227 * 1024))
    """)
