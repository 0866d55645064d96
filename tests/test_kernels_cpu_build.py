"""Compiling the C++ operators: cache, races, no compiler, other instruction sets, sanitizers."""

import os
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from paretune.kernels.cpu import build

COMPILER = build._compiler()
OPERATORS = """
import sys, torch
from paretune.kernels.cpu import build
if len(sys.argv) > 1:
    library = build.Library(__import__("pathlib").Path(sys.argv[1]))
    build._attempt = lambda: build._Attempt(library, None)
from paretune.kernels import Tile, fused
from paretune.kernels.decode_attention import decode_attention, reference as decode_reference
from paretune.kernels.linear import linear, pack, quantize_int8, reference
from paretune.kernels.prefill_attention import prefill_attention, reference as prefill_reference
torch.manual_seed(0)
torch.set_num_threads(2)

def check(result, oracle, tolerance=1e-4):
    error = torch.nan_to_num((result.double() - oracle).abs(), nan=float("inf")).max() / oracle.abs().max()
    assert error < tolerance, error

for m, n, k in ((1, 1, 1), (3, 33, 17), (29, 70, 131), (300, 40, 64)):
    x, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    for k_block, serial in ((0, 0), (40, 0), (0, 1 << 20)):
        tile = Tile("linear", "cpp", (("k_block", k_block), ("serial_below_kmacs", serial)))
        check(linear(x, pack(weight, "fp32", bias=bias), tile), reference(x, weight, bias))
        check(linear(x, pack(weight, "bf16", bias=bias), tile), reference(x, weight.bfloat16(), bias), 2e-2)
        check(linear(x.bfloat16(), pack(weight, "bf16"), tile), reference(x.bfloat16(), weight.bfloat16()), 2e-2)
        (q, s), (qx, sx) = quantize_int8(weight), quantize_int8(x)
        exact = reference(qx.double() * sx[:, None].double(), q.double() * s[:, None].double(), bias)
        check(linear(x, pack(weight, "int8", bias=bias), tile), exact)
for heads, kv_heads, head_dim in ((4, 1, 24), (3, 3, 7), (14, 2, 64)):
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        k_cache, v_cache = (torch.randn(12, 16, kv_heads, head_dim).to(dtype) for _ in range(2))
        tables = torch.randperm(12).int().view(3, 4)
        lengths = torch.tensor([64, 1, 33], dtype=torch.int32)
        q = torch.randn(3, heads, head_dim)
        tile = Tile("decode_attention", "cpp", (("split_tokens", 16), ("serial_below_tokens", 0)))
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = decode_attention(q, k_cache, v_cache, tables, lengths, 0.3, tile)
            check(out, decode_reference(q, k_cache, v_cache, tables, lengths, 0.3))
        q, starts = torch.randn(40 + 1 + 9, heads, head_dim), torch.tensor([0, 40, 41, 50], dtype=torch.int32)
        context = torch.tensor([24, 0, 5], dtype=torch.int32)
        tile = Tile("prefill_attention", "cpp", (("serial_below_kmacs", 0),))
        out = prefill_attention(q, k_cache, v_cache, tables, starts, context, 0.3, tile)
        check(out, prefill_reference(q, k_cache, v_cache, tables, starts, context, 0.3), tolerance)
for rows, width in ((1, 1), (5, 37), (300, 130)):
    x, weight = torch.randn(rows, width), torch.randn(width)
    check(fused.rms_norm(x, weight, 1e-5), fused.reference_rms_norm(x, weight, 1e-5))
    residual = x.clone()
    check(fused.add_rms_norm(x, residual, weight, 1e-5), fused.reference_rms_norm(2 * x, weight, 1e-5))
    gate_up = torch.randn(rows, 2 * width)
    check(fused.swiglu(gate_up), fused.reference_swiglu(gate_up))
q, k, v = torch.randn(5, 4, 6), torch.randn(5, 2, 6), torch.randn(5, 2, 6)
cos, sin, positions = torch.rand(9, 3), torch.rand(9, 3), torch.tensor([0, 8, 3, 3, 1])
oracle = fused.reference_rope(q, positions, cos, sin)
k_cache, v_cache = torch.zeros(2, 4, 2, 6), torch.zeros(2, 4, 2, 6)
fused.rope_and_cache(q, k, v, positions, cos, sin, k_cache, v_cache, torch.tensor([0, 7, -1, 3, 4]))
check(q, oracle)
check(k_cache.view(8, 2, 6)[7], fused.reference_rope(k, positions, cos, sin)[1])
import numpy
from paretune.kernels.lora import Delta, LoraSlots, Matrix, adapter_rows, pack_adapter, reference as lora_reference
for in_features, parts, ranks in ((1, (1,), (1,)), (37, (33, 70), (7, 64))):
    matrix = Matrix(in_features, parts)
    adapters = [
        {p: Delta(torch.randn(r, in_features), torch.randn(n, r), 0.5) for p, (r, n) in enumerate(zip(ranks, parts))}
        for _ in range(3)
    ]
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 2e-2)):
        slots = LoraSlots([matrix], 3, 64, precision)
        for slot, deltas in enumerate(adapters):
            slots.put(slot, pack_adapter({(0, p): delta for p, delta in deltas.items()}, [matrix], precision))
        slot_of_row = numpy.array([2, -1, 0] + [1] * 40, numpy.int32)
        x, y = torch.randn(43, in_features), torch.zeros(43, sum(parts))
        oracle = lora_reference(x, y, slot_of_row, adapters, parts)
        slots.add(0, x, y, adapter_rows(slot_of_row, 3))
        check(y, oracle, tolerance)
print("all right", build.load().instructions)
"""


def run(program, *arguments, timeout=240, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments], env={**os.environ, **environment},
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def need_compiler():
    if COMPILER is None:
        if os.environ.get("CI"):
            pytest.fail("no C++ compiler: apt-get install g++")
        pytest.skip("no C++ compiler: apt-get install g++")


def runs_here(flag):
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and flag in cpu.read_text().split()


def test_what_was_compiled_once_is_loaded_by_all_who_come_later(tmp_path):
    need_compiler()
    program = "from paretune.kernels.cpu import build; print(build.load().path, build.why_missing())"
    racing = [
        subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PARETUNE_CACHE_DIR": str(tmp_path)},
                         stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    printed = [process.communicate(timeout=240)[0] for process in racing]
    assert printed[0] == printed[1]
    (built,) = (tmp_path / "cpu").glob("*.so")
    assert printed[0] == f"{built} None\n"
    assert stat.S_IMODE((tmp_path / "cpu").stat().st_mode) & 0o077 == 0
    before = built.stat().st_mtime_ns
    assert run(program, PARETUNE_CACHE_DIR=str(tmp_path)).stdout == printed[0]
    assert built.stat().st_mtime_ns == before
    assert not [path for path in (tmp_path / "cpu").iterdir() if path.is_dir()]


def test_another_source_flag_or_compiler_gets_another_file(monkeypatch, tmp_path):
    keys = {build._key(["c++"], "12.2"), build._key(["c++"], "13.1"), build._key(["clang++"], "12.2")}
    monkeypatch.setattr(build, "flags", lambda: ["-O2"])
    keys.add(build._key(["c++"], "12.2"))
    for source in build.SOURCE_FOLDER.glob("*.[ch]*"):
        shutil.copy(source, tmp_path)
    (tmp_path / "simd.h").write_text((tmp_path / "simd.h").read_text() + "\n")
    monkeypatch.setattr(build, "SOURCE_FOLDER", tmp_path)
    keys.add(build._key(["c++"], "12.2"))
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("/nowhere/c++", "no C++ compiler"), (f"{sys.executable} -c raise(SystemExit(3)) #", "failed")],
)
def test_without_a_compiler_torch_does_the_work(tmp_path, compiler, reason):
    done = run(
        """
        import torch
        from paretune.kernels import Tile, BadTile
        from paretune.kernels.cpu.build import load, why_missing
        from paretune.kernels.linear import linear, pack
        from paretune.kernels.fused import swiglu
        assert load() is None
        print(why_missing())
        weight, x = torch.randn(5, 7), torch.randn(3, 7)
        torch.testing.assert_close(linear(x, pack(weight, "fp32")), x @ weight.t())
        assert swiglu(x[:, :4]).shape == (3, 2)
        try:
            pack(weight, "fp32", backends=("cpp",))
        except BadTile as error:
            assert error.allowed == "torch"
        else:
            raise AssertionError("packed for a library that is not there")
        """,
        CXX=compiler, PARETUNE_CACHE_DIR=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert reason in done.stdout


def test_a_compiler_that_hangs_is_stopped(monkeypatch, tmp_path):
    slow = tmp_path / "slow-c++"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\nexec sleep 60\n')
    slow.chmod(0o700)
    monkeypatch.setattr(build, "COMPILE_LIMIT_S", 1)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setenv("PARETUNE_CACHE_DIR", str(tmp_path / "cache"))
    attempt = build._attempt.__wrapped__()
    assert attempt.library is None
    assert "took longer than 1 s" in attempt.why_missing
    assert not list((tmp_path / "cache" / "cpu").glob("*.so"))


def test_a_cache_folder_that_others_may_write_is_not_used(tmp_path):
    need_compiler()
    tmp_path.chmod(0o777)
    done = run(
        "from paretune.kernels.cpu import build; print(build.load().instructions)", PARETUNE_CACHE_DIR=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "cpu",
    [pytest.param("x86-64-v4", marks=pytest.mark.slow), "x86-64-v3", pytest.param("x86-64", marks=pytest.mark.slow)],
)
def test_every_instruction_set_computes_the_same(tmp_path, cpu):
    """AVX-512 without dot products, AVX2, and plain vectors: what other machines will run."""
    need_compiler()
    needed = {"x86-64-v4": "avx512bw", "x86-64-v3": "avx2", "x86-64": "sse2"}[cpu]
    if not runs_here(needed):
        pytest.skip(f"this processor has no {needed}")
    library = tmp_path / "other.so"
    assert COMPILER is not None
    build.compile_library(COMPILER, library, extra=(f"-march={cpu}",))
    done = run(OPERATORS, str(library))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("all right")
    assert ("avx512" in done.stdout, "avx2" in done.stdout) == (cpu == "x86-64-v4", cpu == "x86-64-v3")


def test_no_operator_reads_or_writes_out_of_bounds(tmp_path):
    need_compiler()
    assert COMPILER is not None
    library = tmp_path / "checked.so"
    extra = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    build.compile_library(COMPILER, library, extra=extra)
    runtime = subprocess.run(
        [*COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    done = run(OPERATORS, str(library), LD_PRELOAD=runtime, ASAN_OPTIONS="detect_leaks=0:verify_asan_link_order=0")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("all right")
