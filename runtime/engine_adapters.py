"""The adapters of an engine: which names requests may use, and what lies in the slots of its ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .adapter_slots import NO_ADAPTER
from .adapters import AdapterNames, BadAdapter
from .rank import Rank
from .scheduler_state import State


class EngineAdapters:
    """Adapters by name. A request that names one has it in host memory from `begin` to `end`."""

    def __init__(self, rank: Rank, max_loras: int) -> None:
        self._rank = rank
        self._names = AdapterNames()
        self._in_slot = np.zeros(max_loras, np.int64)

    def load(self, name: str, folder: Path) -> None:
        """Let requests name an adapter.

        Raises: BadAdapter: it does not fit this base, the name is taken, or the deployment takes no adapters.
        """
        names = self._names
        if self._rank.adapters is None:
            raise BadAdapter("max_loras", 0, "at least 1", "set it to the most adapters in one step")
        if name in names:
            raise BadAdapter("adapter", name, "a name that no adapter has", "unload it, or choose another name")
        folder = folder.resolve()
        self._rank.adapters.read(names.next_number(), folder, keep=names.live)
        names.add(name, folder)

    def unload(self, name: str) -> bool:
        """Let no more requests name it; those that do go on. False: there is no such adapter."""
        if name not in self._names:
            return False
        self._names.remove(name)
        return True

    def number(self, name: str | None) -> int:
        """Number of a request's adapter, which lies in host memory from here on until no live request names it.

        Raises: BadAdapter: it is not loaded, or its files are no longer what they were when it was.
        """
        if name is None:
            return NO_ADAPTER
        names = self._names
        if name not in names or self._rank.adapters is None:
            allowed = ", ".join(names.names()[:20]) or "none: no adapter is loaded"
            raise BadAdapter("adapter", name, allowed, "load it, or name another")
        number = names.number(name)
        self._rank.adapters.read(number, names.folder(number), keep=names.live)
        return number

    def begin(self, number: int) -> None:
        """A request is queued that names this adapter, or none."""
        if number != NO_ADAPTER:
            self._names.begin(number)

    def end(self, number: int) -> None:
        """A request has ended that named this adapter, or none."""
        if number != NO_ADAPTER:
            self._names.end(number)

    def fill_slots(self, state: State) -> None:
        """Put the adapters into their slots that the plan's newcomers need."""
        wanted = state.adapter_slots.number
        for slot in np.flatnonzero(wanted != self._in_slot).tolist():
            number = int(wanted[slot])
            self._rank.fill_slot(slot, number, self._names.folder(number), self._names.live)
            self._in_slot[slot] = number
