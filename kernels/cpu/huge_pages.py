"""Memory on 2 MB pages, where Linux gives them, for what decoding reads at every step.

Weights: with 4 KB pages the page walks cost 10 to 30 % of a step (201 M parameters, batch 1, Zen 4). Most matrices of a
small model are smaller than two such pages, so they share chunks. The KV cache, of which decoding reads a few KB here
and there in hundreds of MB: with 4 KB pages attention took 1.3 to 1.6 times as long (8 sequences of 200 tokens, heads
of 32 numbers, Zen 4).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import weakref

import torch
from torch import Tensor

_CHUNK_BYTES = 64 << 20
_ALIGNED = 64


class _Chunks:
    """The chunk that is being filled. Only the tensors in a chunk keep it alive."""

    def __init__(self) -> None:
        self._chunk: weakref.ref[mmap.mmap] | None = None
        self._used = 0

    def place(self, nbytes: int) -> tuple[mmap.mmap, int]:
        """A chunk with so many bytes left, and where in it they begin."""
        chunk = None if self._chunk is None else self._chunk()
        if chunk is None or self._used + nbytes > len(chunk):
            chunk = _huge_pages(max(_CHUNK_BYTES, nbytes))
            self._chunk, self._used = weakref.ref(chunk), 0
        begin = self._used
        self._used += -(-nbytes // _ALIGNED) * _ALIGNED
        return chunk, begin


_chunks = _Chunks()


def on_huge_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy, of the same dtype and shape."""
    if tensor.nbytes == 0:
        return tensor.contiguous()
    chunk, begin = _chunks.place(tensor.nbytes)
    copy = torch.frombuffer(chunk, dtype=tensor.dtype, count=tensor.numel(), offset=begin).view(tensor.shape)
    source = tensor.contiguous()
    ctypes.memmove(copy.data_ptr(), source.data_ptr(), tensor.nbytes)  # copy_() waits forever in a forked child: OpenMP
    return copy


def zeros_on_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros whose memory is taken only when it is first written, for itself."""
    count = math.prod(shape)
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(_huge_pages(count * dtype.itemsize), dtype=dtype, count=count).view(shape)


def _huge_pages(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
