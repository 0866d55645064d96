"""Scratch memory that the C++ operators are handed: they allocate nothing themselves."""

from __future__ import annotations

import ctypes
import mmap
import threading


class Workspace(threading.local):
    """One growing buffer per calling thread, page-aligned. `address` and `nbytes` are plain integers for ctypes."""

    def __init__(self) -> None:
        self.address = 0
        self.nbytes = 0
        self._memory: mmap.mmap | None = None

    def grow(self, nbytes: int) -> None:
        """Hold at least so many bytes. What was in the buffer is gone."""
        self.nbytes = 1 << max(16, (nbytes - 1).bit_length())
        self._memory = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))


WORKSPACE = Workspace()
