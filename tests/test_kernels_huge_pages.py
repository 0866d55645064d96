"""Weights side by side in chunks of memory, which live as long as one of them."""

import gc
import sys
import weakref
from pathlib import Path

import numba
import pytest
import torch

from paretune.kernels.cpu import huge_pages
from paretune.kernels.cpu.huge_pages import on_huge_pages, zeros_on_huge_pages
from paretune.runtime.memory import give_back_compiler


def test_tensors_share_chunks_and_keep_what_is_theirs() -> None:
    chunks = huge_pages._Chunks()
    huge_pages._chunks, before = chunks, huge_pages._chunks
    try:
        originals = [torch.randn(3, 5), torch.arange(7), torch.zeros(0, 4), torch.randn(65, 1024).bfloat16()]
        copies = [on_huge_pages(each) for each in originals]
        for original, copy in zip(originals, copies):
            assert copy.dtype == original.dtype
            assert copy.data_ptr() % 64 == 0
            assert torch.equal(copy, original)
        assert copies[1].data_ptr() - copies[0].data_ptr() == 64  # 60 bytes, rounded up
        large = on_huge_pages(torch.ones(huge_pages._CHUNK_BYTES + 1, dtype=torch.uint8))
        assert bool(large.all())
        assert chunks._chunk is not None
        chunk = chunks._chunk()
        assert chunk is not None
        gone = weakref.ref(chunk)
        del chunk, large, copy, original
        gc.collect()
        assert gone() is None  # its one tensor is gone
        assert all(torch.equal(copy, original) for original, copy in zip(originals, copies))
        assert torch.equal(on_huge_pages(originals[0]), originals[0])
    finally:
        huge_pages._chunks = before


def test_zeros_are_zeros_of_any_shape() -> None:
    assert not zeros_on_huge_pages((3, 0, 2), torch.float32).numel()
    zeros = zeros_on_huge_pages((2, 3), torch.float32)
    assert zeros.tolist() == [[0.0] * 3] * 2


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="Linux alone says which pages hold what")
def test_a_compiler_that_was_let_go_compiles_again() -> None:
    def code_kb() -> int:
        of_compiler, total = False, 0
        for line in Path("/proc/self/smaps").read_text().splitlines():
            first, *rest = line.split()
            if not first.endswith(":"):
                of_compiler = "libllvmlite" in line and rest[0] == "r-xp"
            elif first == "Rss:" and of_compiler:
                total += int(rest[0])
        return total

    compiled = numba.njit(lambda x: x + sys.maxsize % 7)
    assert compiled(1) == 1 + sys.maxsize % 7
    held = code_kb()
    assert held > 1000
    give_back_compiler()
    assert code_kb() < held / 2
    assert numba.njit(lambda x: 3 * x)(2.5) == 7.5
