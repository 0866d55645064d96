"""Triton kernels where there is no GPU: results under the interpreter, and machine code for GPUs compiled ahead of
time."""

import importlib.util
import textwrap

import pytest

from .triton_program import run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no triton here: pip install triton (Linux)"
)


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
        from paretune.kernels.gpu_lora import tile_rows
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
            lora(x, y, a, b, scale, tile_rows(adapter_rows(slot_of_row, 3)), first=7)
            check(y[:, 7 : 7 + channels], oracle, tolerance)
            assert y[:, :7].isnan().all() and y[:, 7 + channels :].isnan().all()
        for wrong in (a[:, :8].contiguous(), a.float()):
            try:
                lora(x, y, wrong, b, scale, tile_rows(adapter_rows(slot_of_row, 3)))
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
        for cached_as, heads, kv_heads, head_dim, dtype, tolerance in (
            ("fp32", 4, 1, 24, torch.float32, 1e-4), ("fp32", 2, 2, 16, torch.float16, 1e-2),
            ("bf16", 8, 1, 16, torch.float32, 1e-4), ("fp8", 2, 1, 24, torch.float32, 1e-4),
            ("int8", 2, 2, 24, torch.float32, 1e-4),
        ):
            cache, tables = paged([r + c for r, c in zip(rows, contexts)], kv_heads, head_dim, 8, cached_as)
            q = torch.randn(sum(rows), heads, head_dim).to(dtype)
            starts = torch.tensor([0, 40, 41, 41, 48], dtype=torch.int32)
            context = torch.tensor(contexts, dtype=torch.int32)
            chosen = tile("prefill_attention", block_m=32, block_n=32)
            out = prefill_attention(q, cache, tables, starts, context, 0.2, chosen, max(rows))
            check(out, reference(q, cache, tables, starts, context, 0.2), tolerance)
    """)


def test_decode_attention_is_softmax_attention():
    run("""
        from paretune.kernels.decode_attention import reference
        from paretune.kernels.triton_decode_attention import decode_attention
        lengths = [1, 40, 0, 70]
        fp32, fp16 = (torch.float32, 1e-4), (torch.float16, 1e-2)
        for splits, cached_as, heads, kv_heads, head_dim, (dtype, tolerance) in (
            (1, "fp32", 8, 2, 24, fp32), (4, "fp32", 2, 2, 16, fp16), (2, "fp32", 8, 1, 16, fp32),
            (2, "bf16", 4, 1, 16, fp32), (4, "fp8", 4, 1, 24, fp32), (2, "int8", 2, 1, 24, fp32),
        ):
            cache, tables = paged(lengths, kv_heads, head_dim, 8, cached_as)
            q, context = torch.randn(4, heads, head_dim).to(dtype), torch.tensor(lengths, dtype=torch.int32)
            chosen = tile("decode_attention", block_n=32, splits=splits)
            out = decode_attention(q, cache, tables, context, 0.2, chosen)
            check(out, reference(q, cache, tables, context, 0.2), tolerance)
    """)


def test_e4m3_goes_both_ways_as_torch_rounds_it():
    run("""
        import triton, triton.language as tl
        from paretune.kernels.triton_formats import e2m1_value, e4m3_code, e4m3_value
        from paretune.kernels.stored_weight import e2m1_values

        @triton.jit
        def both(code_ptr, value_ptr, number_ptr, back_ptr, two_ptr, CODES: tl.constexpr, NUMBERS: tl.constexpr):
            at = tl.arange(0, CODES)
            tl.store(value_ptr + at, e4m3_value(tl.load(code_ptr + at)))
            tl.store(two_ptr + at, e2m1_value(tl.load(code_ptr + at).to(tl.int32) & 15))
            at = tl.arange(0, NUMBERS)
            tl.store(back_ptr + at, e4m3_code(tl.load(number_ptr + at)))

        codes = torch.arange(256, dtype=torch.uint8)
        exact = codes.view(torch.float8_e4m3fn).float()
        order = exact[~exact.isnan()].sort().values
        halfway = (order[1:] + order[:-1]) / 2
        near = torch.cat([halfway * (1 + 2.0**-20), halfway * (1 - 2.0**-20)])
        special = torch.tensor([0.0, -0.0, 1e9, -1e9, float("inf"), float("-inf"), 2.0**-10, 2.0**-11, 449.0, 1e-40])
        numbers = torch.cat([order, halfway, near, special, torch.randn(200) * 3])
        numbers = torch.cat([numbers, torch.full((2048 - len(numbers),), float("nan"))])
        value, two = torch.empty(256), torch.empty(256)
        back = torch.empty(2048, dtype=torch.uint8)
        both[(1,)](codes, value, numbers, back, two, 256, 2048)
        assert torch.equal(value.nan_to_num(7777.0), exact.nan_to_num(7777.0))
        assert torch.equal(two, e2m1_values(codes & 15))
        wanted = numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        nan = numbers.isnan()
        assert nan.any() and ((back & 0x7F) == 0x7F)[nan].all()
        assert torch.equal(back[~nan], wanted[~nan])
    """)


def test_a_stored_weight_is_expanded_to_what_it_stands_for():
    run("""
        from paretune.kernels import placement
        from paretune.kernels.stored_weight import store
        from paretune.kernels.triton_rounding import expanded
        from paretune.kernels.triton_stored_matmul import stored_matmul
        from paretune.kernels.weight_layout import rows_of
        for precision in ("fp8", "int4", "ternary", "nvfp4", "mxfp4"):
            for block_k, splits, (m, n, k), dtype, tolerance in (
                (64, 0, (19, 70, 150), torch.float32, 2e-5), (16, 1, (1, 33, 40), torch.float16, 5e-3),
                (128, 3, (3, 40, 600), torch.float32, 2e-5), (64, 2, (3, 40, 256), torch.float32, 2e-5),
            ):
                chosen = tile("linear", block_m=16, block_n=64, block_k=block_k, group_m=2, splits=splits)
                stored = store(torch.randn(n, k), precision)
                x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
                oracle = x.double() @ stored.expanded().T + bias.double()
                parts = stored.precision, rows_of(stored), stored.group_scale, stored.channel_scale
                check(stored_matmul(x, *parts, chosen, bias), oracle, tolerance * oracle.abs().max().item())
                check(stored_matmul(x, *parts, chosen), oracle - bias.double(), tolerance * oracle.abs().max().item())
                check(expanded(*parts, k, torch.float32), stored.expanded(), 1e-6)
    """)


def test_rounded_rows_are_multiplied_as_they_are_and_splits_change_no_integer():
    run("""
        from paretune.kernels.stored_weight import store
        from paretune.kernels.triton_rounding import rounded_rows
        from paretune.kernels.triton_stored_matmul import scaled, stored_matmul
        from paretune.kernels.weight_layout import rows_of
        for precision in ("int8", "fp8"):
            for (m, n, k), splits in (((5, 70, 150), (1, 2)), ((17, 33, 512), (1, 4, 0))):
                stored, bias = store(torch.randn(n, k), precision), torch.randn(n)
                values, scale = rounded_rows(torch.randn(m, k), precision)
                weight, channels = rows_of(stored), stored.channel_scale
                oracle = values.double() * scale[:, None].double() @ stored.expanded().double().T + bias.double()
                found = []
                for parts in splits:
                    chosen = tile("linear", block_m=16, block_n=64, block_k=64, splits=parts)
                    arguments = values, precision, weight, None, channels, chosen, bias, scale, torch.float32
                    found.append(stored_matmul(*arguments))
                    check(found[-1], oracle, 1e-5 * oracle.abs().max().item())
                if precision == "int8":
                    sums = (values.int() @ weight.int().T).contiguous()
                    found.append(scaled(sums, scale, channels, bias, torch.float32))
                    assert all(torch.equal(found[0], other) for other in found[1:])
    """)


def test_tiles_enough_for_every_multiprocessor_are_not_split():
    run("""
        from paretune.kernels.triton_stored_matmul import enough_splits
        assert [enough_splits(programs, 112, 132) for programs in (8, 64, 264, 400, 10000)] == [16, 8, 2, 1, 1]
        assert enough_splits(1, 3, 132) == 1 and enough_splits(1, 8, 132) == 2
    """)


def test_norms_and_swiglu_are_their_references_in_float64():
    run("""
        from paretune.kernels import triton_fused as fused
        from paretune.kernels.fused import reference_rms_norm, reference_swiglu
        for rows, width, dtype, tolerance in ((3, 37, torch.float32, 1e-5), (2, 1100, torch.float16, 1e-2)):
            whole = torch.randn(rows, width + 5).to(dtype)
            x, weight = whole[:, 5:], torch.randn(width)
            check(fused.rms_norm(x, weight, 1e-5), reference_rms_norm(x, weight, 1e-5), tolerance)
            residual = torch.randn(rows, width).to(dtype)
            added = (residual.float() + x.float()).to(dtype)
            check(fused.add_rms_norm(x, residual, weight, 1e-5), reference_rms_norm(added, weight, 1e-5), tolerance)
            assert torch.equal(residual, added)
            gate_up = 3 * torch.randn(rows, 2 * width).to(dtype)
            check(fused.swiglu(gate_up), reference_swiglu(gate_up), tolerance * 3)
    """)


def test_rope_rotates_and_the_cache_holds_what_the_cpu_would_store():
    run("""
        from paretune.kernels.fused import reference_rope
        from paretune.kernels import triton_fused
        from paretune.kernels.triton_fused import rope_and_cache
        for cached_as in ("fp32", "bf16", "fp8", "int8"):
            cases = ((4, 1, 24, torch.float32, 1e-5), (2, 2, 8, torch.float16, 1e-2), (18, 5, 8, torch.float32, 1e-5))
            for heads, kv_heads, head_dim, dtype, tolerance in cases:
                triton_fused._FEW_TOKENS = 0 if heads == 2 else 128  # as of a prompt, and of decoding
                tokens, block_size = 5, 4
                qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim).to(dtype)
                q, k, v = qkv.split_with_sizes((heads, kv_heads, kv_heads), 1)
                v[2, 0, 1] = float("inf")
                v[3] = 0
                before = qkv.clone()
                positions = torch.tensor([0, 7, 3, 30, 9], dtype=torch.int32)
                slots = torch.tensor([9, -1, 0, 6, 11], dtype=torch.int32)
                angles = torch.outer(torch.arange(31.0), torch.rand(head_dim // 2))
                cache, wanted = (PagedCache.zeros(3, cached_as, block_size, kv_heads, head_dim) for _ in range(2))
                for each in (cache, wanted):
                    each.blocks.fill_(3)
                rope_and_cache(q, k, v, positions, angles.cos(), angles.sin(), cache, slots)
                cosine, sine = angles.cos(), angles.sin()
                check(q, reference_rope(before[:, :heads], positions, cosine, sine), tolerance)
                assert torch.equal(k, before[:, heads : heads + kv_heads])
                # rounded from the very fp32 products of this order of operations
                first, second = k.float().chunk(2, -1)
                c, s = cosine[positions.long()][:, None], sine[positions.long()][:, None]
                turned = torch.cat((first * c - second * s, second * c + first * s), -1)
                kept = slots >= 0
                wanted.write(slots[kept], turned[kept], v[kept])
                # the interpreter cuts bf16 off where a GPU rounds it: there the last bit may differ
                apart = {"int8": (1.0, 0.0), "bf16": (0.0, 2.0**-7)}.get(cached_as, (0.0, 0.0))
                for ours, theirs in ((cache.keys, wanted.keys), (cache.values, wanted.values)):
                    ours, theirs = ours.float().nan_to_num(5e6), theirs.float().nan_to_num(5e6)
                    assert torch.allclose(ours, theirs, atol=apart[0], rtol=apart[1])
                if cache.key_scales is not None:
                    assert torch.allclose(cache.key_scales, wanted.key_scales, rtol=1e-6, atol=0)
                    assert torch.allclose(cache.value_scales, wanted.value_scales, rtol=1e-6, atol=0, equal_nan=True)
                    assert cache.value_scales[0, 0, 0].isnan()
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


AHEAD_OF_TIME = """
from paretune.kernels import gpu_linear, triton_fused, triton_lora, triton_stored_matmul as stored
from paretune.kernels import triton_rounding as rounding
from paretune.kernels.triton_formats import FORMAT_CODES
from paretune.kernels import triton_decode_attention as decode, triton_prefill_attention as prefill
TYPES = dict.fromkeys(("x_ptr", "q_ptr", "k_ptr", "v_ptr", "out_ptr", "bias_ptr", "gate_up_ptr"), "*bf16")
TYPES |= dict.fromkeys(("residual_ptr", "a_ptr", "b_ptr", "y_ptr"), "*bf16")
TYPES |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr", "mixed_ptr", "largest_ptr", "total_ptr", "h_ptr"), "*fp32")
TYPES |= dict.fromkeys(("cos_ptr", "sin_ptr", "key_scale_ptr", "value_scale_ptr", "channel_scale_ptr"), "*fp32")
TYPES |= dict.fromkeys(("scale_ptr", "row_scale_ptr"), "*fp32") | dict(scale="fp32", eps="fp32")
TYPES |= dict.fromkeys(("tables_ptr", "context_ptr", "query_start_ptr", "position_ptr", "slot_ptr", "row_ptr"), "*i32")
TYPES |= dict.fromkeys(("tile_start_ptr", "tile_end_ptr", "tile_slot_ptr"), "*i32")

def code(kernel, arch, constants, chosen=None, num_warps=4, **types):
    types = {name: kind for name, kind in (TYPES | types).items() if name in kernel.arg_names}
    options = (chosen.get("num_warps"), chosen.get("num_stages")) if chosen else (num_warps, 2)
    code, stack = compiled(kernel, arch, types, constants, *options)
    assert f".target sm_{arch}" in code.asm["ptx"]
    # up to 16 bytes the assembler of some versions takes for one more program on a multiprocessor
    assert stack <= 16, (kernel.__name__, arch, types, stack)
    # sm_86, sm_89 and sm_120 have 99 KB
    assert code.metadata.shared <= (227 if arch == 90 else 99) * 1024, (kernel.__name__, code.metadata.shared)

def attention(arch, cached_as, kind, activations="*bf16"):
    types = dict.fromkeys(("k_ptr", "v_ptr"), kind) | dict.fromkeys(("q_ptr", "out_ptr"), activations)
    sizes = dict(HEAD_DIM=128, PADDED_DIM=128, BLOCK_SIZE=16, FORMAT=cached_as, NATIVE_E4M3=arch >= 89)
    wide = activations == "*fp32"
    for pairs in (64, 1000):
        t = decode.default_tile(pairs, 132, wide, cached_as == 1 and arch >= 89)
        grouped = dict(GROUP=4, PADDED_GROUP=16, SPLITS=t.get("splits"), BLOCK_N=t.get("block_n"))
        code(decode.decode_attention_kernel, arch, sizes | grouped, t, **types)
    for rows in (16, 64, 512):
        t = prefill.default_tile(rows, 128, 4 if wide else 2, arch == 90, cached_as)
        tiled = dict(BLOCK_M=t.get("block_m"), BLOCK_N=t.get("block_n"))
        code(prefill.prefill_attention_kernel, arch, sizes | tiled, t, **types)

def linear(arch, precision, weight="*u8", group="*u8", rounds=False, rows=(1, 32, 64, 128, 2048)):
    form, native = stored.WEIGHT_FORMATS[precision], arch >= 89
    for number in rows:
        t = gpu_linear.default_tile(precision, number, "triton")
        splits = 8 if number <= 64 else 1
        constants = {name.upper(): t.get(name) for name in ("block_m", "block_n", "block_k", "group_m")}
        constants |= dict(FORMAT=FORMAT_CODES[precision], BITS=form.bits, GROUP=form.group, HAS_BIAS=True)
        constants |= dict(HAS_CHANNEL_SCALE=form.channel_bytes > 0, HAS_ROW_SCALE=rounds, NATIVE_E4M3=native)
        constants |= dict(EVEN=number != 32, SPLITS=splits)
        types = dict(weight_ptr=weight, group_scale_ptr=group) | (dict(x_ptr=weight) if rounds else {})
        types |= dict(out_ptr="*i32" if weight == "*i8" else "*fp32") if splits > 1 else {}
        code(stored.stored_matmul_kernel, arch, constants, t, **types)

def around_linears(arch):
    for to_int8 in (False, True):
        kinds = dict(out_ptr="*i8" if to_int8 else "*u8", scale_ptr="*fp32")
        for block, once in ((8192, True), (8192, False)):
            constants = dict(TO_INT8=to_int8, NATIVE_E4M3=arch >= 89, ONCE=once, BLOCK=block)
            code(rounding.round_rows_kernel, arch, constants, num_warps=16, **kinds)
    has = dict(HAS_ROW_SCALE=True, HAS_CHANNEL_SCALE=True, HAS_BIAS=True, BLOCK_N=512)
    code(stored.finish_kernel, arch, has | dict(SPLITS=1), sums_ptr="*i32")
    code(stored.finish_kernel, arch, has | dict(SPLITS=8), sums_ptr="*fp32")
    for precision in ("int4", "ternary", "nvfp4", "mxfp4", "fp8"):
        form = stored.WEIGHT_FORMATS[precision]
        constants = dict(FORMAT=FORMAT_CODES[precision], BITS=form.bits, GROUP=form.group, NATIVE_E4M3=arch >= 89)
        constants |= dict(HAS_CHANNEL_SCALE=form.channel_bytes > 0, BLOCK_N=16, BLOCK_K=256)
        group = "*bf16" if precision == "int4" else "*u8"
        code(rounding.expand_kernel, arch, constants, weight_ptr="*u8", group_scale_ptr=group)

def between(arch):
    code(decode.merge_kernel, arch, dict(HEAD_DIM=128, PADDED_DIM=128, SPLITS=32))
    code(triton_fused.rms_norm_kernel, arch, dict(ADDS=True, BLOCK=4096), num_warps=16, weight_ptr="*fp32")
    code(triton_fused.swiglu_kernel, arch, dict(BLOCK=1024))
    for cached_as, kind in ((0, "*bf16"), (1, "*u8"), (2, "*i8")):
        types = dict.fromkeys(("keys_ptr", "values_ptr"), kind)
        sizes = dict(HALF=64, PADDED_HALF=64, BLOCK_SIZE=16, FORMAT=cached_as, NATIVE_E4M3=arch >= 89)
        for block_heads in (4, 16):
            sizes["BLOCK_HEADS"] = block_heads
            code(triton_fused.rope_and_cache_kernel, arch, sizes, num_warps=block_heads // 4, **types)
    code(triton_lora.shrink_kernel, arch, dict(RANK=64, BLOCK_M=16, BLOCK_K=64))
    code(triton_lora.expand_kernel, arch, dict(RANK=64, BLOCK_M=16, BLOCK_N=64))
"""


def test_the_kernels_of_decoding_compile_for_a_gpu_that_is_not_here_and_no_default_tile_spills():
    program = "between(90); attention(90, 0, '*bf16'); linear(90, 'int4', group='*bf16', rows=(1,))\n"
    run(AHEAD_OF_TIME + program, interpret=False)


@pytest.mark.slow
def test_every_kernel_and_format_compiles_for_two_kinds_of_gpus_and_no_default_tile_spills():
    run(
        AHEAD_OF_TIME
        + textwrap.dedent("""
        for arch in (80, 90):
            between(arch)
            for cached_as, kind in ((0, "*bf16"), (1, "*u8"), (2, "*i8")):
                attention(arch, cached_as, kind)
            attention(arch, 0, "*fp32", "*fp32")
            around_linears(arch)
            for precision in ("nvfp4", "mxfp4", "ternary"):
                linear(arch, precision)
            linear(arch, "fp8", **(dict(weight="*fp8e4nv", rounds=True) if arch == 90 else {}))
            linear(arch, "int8", weight="*i8", rounds=True)
            linear(arch, "int4", group="*bf16")
        attention(89, 1, "*u8")  # converts e4m3 by an instruction, and has 99 KB
        linear(89, "fp8", weight="*fp8e4nv", rounds=True, rows=(1, 32, 64))
        """),
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
