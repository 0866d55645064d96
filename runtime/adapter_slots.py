"""Which adapters lie in the replica's slots: a part of the scheduler's state, so that engine and simulator agree on it.

A request with an adapter runs only while the adapter has a slot; at most max_loras distinct ones run in one step
(vLLM's `--max-loras`). A slot that no running request uses keeps its adapter until another needs the place: the one
used least recently goes first. Adapters are numbers >= 1, given by the caller and never used again; 0 is none.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit

NO_ADAPTER = 0

# places in AdapterSlots.counts
NUM_HOLDS = 0
NUM_FILLS = 1


class AdapterSlots(NamedTuple):
    """The slots of one replica; none where the deployment takes no adapters.

    number       (max_loras,) int64  the adapter in each slot, or NO_ADAPTER
    num_running  (max_loras,) int64  running requests that use it
    last_use     (max_loras,) int64  counts[NUM_HOLDS] when a request was last admitted with it
    counts       (2,) int64          running totals, in the places named above
    """

    number: NDArray[np.int64]
    num_running: NDArray[np.int64]
    last_use: NDArray[np.int64]
    counts: NDArray[np.int64]


def new_adapter_slots(max_loras: int) -> AdapterSlots:
    """Empty slots."""
    return AdapterSlots(
        number=np.zeros(max_loras, np.int64),
        num_running=np.zeros(max_loras, np.int64),
        last_use=np.zeros(max_loras, np.int64),
        counts=np.zeros(2, np.int64),
    )


@njit
def _best_slot(slots: AdapterSlots, number: int) -> int:
    """The slot that holds the adapter, else the idle one used least recently, else -1."""
    best = -1
    for slot in range(slots.number.shape[0]):
        if slots.number[slot] == number:
            return slot
        if slots.num_running[slot] == 0 and (best < 0 or slots.last_use[slot] < slots.last_use[best]):
            best = slot
    return best


@njit
def has_slot(slots: AdapterSlots, number: int) -> bool:
    """Could a request with this adapter run now?"""
    return number == NO_ADAPTER or _best_slot(slots, number) >= 0


@njit
def hold_slot(slots: AdapterSlots, number: int) -> int:
    """One more running request uses the adapter; its slot, -1 without an adapter. Only after `has_slot`."""
    if number == NO_ADAPTER:
        return -1
    slot = _best_slot(slots, number)
    if slots.number[slot] != number:
        slots.number[slot] = number
        slots.counts[NUM_FILLS] += 1
    slots.counts[NUM_HOLDS] += 1
    slots.last_use[slot] = slots.counts[NUM_HOLDS]
    slots.num_running[slot] += 1
    return slot


@njit
def release_slot(slots: AdapterSlots, slot: int) -> None:
    """A request that used the slot (-1: none) does not run any more."""
    if slot >= 0:
        slots.num_running[slot] -= 1
