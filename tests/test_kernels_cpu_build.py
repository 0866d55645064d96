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

from .conftest import missing

COMPILER = build._compiler()
SWEEP = Path(__file__).with_name("cpu_operator_sweep.py")


def run(program, *arguments, timeout=500, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments], env={**os.environ, **environment},
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def need_compiler():
    if COMPILER is None:
        missing("a C++ compiler", "apt-get install g++")


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
    printed = [process.communicate(timeout=500)[0] for process in racing]
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
    done = run(SWEEP.read_text(), str(library))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("all right")
    assert ("avx512" in done.stdout, "avx2" in done.stdout) == (cpu == "x86-64-v4", cpu == "x86-64-v3")


def test_every_operator_is_right_on_odd_sizes():
    need_compiler()
    done = run(SWEEP.read_text())
    assert done.returncode == 0, done.stderr[-4000:]


def test_no_operator_reads_or_writes_out_of_bounds(tmp_path):
    """Nor computes what C++ leaves undefined: all of kernels/cpu with both sanitizers, over the whole sweep."""
    need_compiler()
    assert COMPILER is not None
    library = tmp_path / "checked.so"
    extra = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    try:
        build.compile_library(COMPILER, library, extra=extra)
    except subprocess.CalledProcessError as error:
        missing(
            "a compiler with address and undefined-behavior sanitizers",
            f"install g++ or clang++; {error.stderr[-300:]}",
        )
    runtime = subprocess.run(
        [*COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_file():
        missing("libasan.so", "install the sanitizer library of the compiler, such as libasan8 (Debian 12)")
    options = {"ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = run(SWEEP.read_text(), str(library), LD_PRELOAD=runtime, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("all right")
