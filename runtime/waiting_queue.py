"""The queue of those that wait: by priority, then by arrival. Without priorities that is first come, first served.

Who waits for an adapter's slot keeps its place, and others pass it.
"""

from __future__ import annotations

from ..kernels.jit import njit
from .adapter_slots import NO_ADAPTER, has_slot
from .scheduler_state import NUM_WAITING, WAITING_HEAD, State, slot_at


@njit
def goes_before(state: State, slot: int, other: int) -> bool:
    """Whether a request is served before another: the lower priority number, of equal ones the earlier arrival."""
    if state.priority[slot] != state.priority[other]:
        return bool(state.priority[slot] < state.priority[other])
    return bool(state.arrival[slot] < state.arrival[other])


@njit
def _ring(state: State, place: int) -> int:
    """Where in `waiting` a place of the queue lies, from one before its head to one behind its end."""
    index, size = state.counts[WAITING_HEAD] + place, state.waiting.shape[0]
    if index >= size:  # a remainder would take as long as all the rest
        return int(index - size)
    return int(index + size if index < 0 else index)


@njit
def put(state: State, slot: int) -> None:
    """Queue a newcomer; it passes those behind whom it may not stand."""
    waiting = state.waiting
    place = state.counts[NUM_WAITING]
    while place > 0 and goes_before(state, slot, waiting[_ring(state, place - 1)]):
        waiting[_ring(state, place)] = waiting[_ring(state, place - 1)]
        place -= 1
    waiting[_ring(state, place)] = slot
    state.counts[NUM_WAITING] += 1


@njit
def put_back(state: State, slot: int) -> None:
    """Queue a preempted request, mostly at the head: it came before those that wait."""
    waiting = state.waiting
    state.counts[WAITING_HEAD] = _ring(state, -1)
    place = 0
    while place < state.counts[NUM_WAITING] and goes_before(state, waiting[_ring(state, place + 1)], slot):
        waiting[_ring(state, place)] = waiting[_ring(state, place + 1)]
        place += 1
    waiting[_ring(state, place)] = slot
    state.counts[NUM_WAITING] += 1


@njit
def at(state: State, place: int) -> int:
    """The slot of who stands at a place."""
    return slot_at(state.waiting, _ring(state, place))


@njit
def first_place(state: State) -> int:
    """Place in the queue, which is not empty, of the first whose adapter finds a slot; -1: there is none."""
    if state.adapter[at(state, 0)] == NO_ADAPTER:
        return 0  # mostly, and then what follows shall not be called: it takes all these arrays
    return _first_place_with_slot(state)


@njit
def _first_place_with_slot(state: State) -> int:
    for place in range(state.counts[NUM_WAITING]):
        if has_slot(state.adapter_slots, state.adapter[at(state, place)]):
            return place
    return -1


@njit
def take(state: State, place: int) -> None:
    """Take out who stands at a place; those before it keep their order."""
    waiting = state.waiting
    for i in range(place, 0, -1):
        waiting[_ring(state, i)] = waiting[_ring(state, i - 1)]
    state.counts[WAITING_HEAD] = _ring(state, 1)
    state.counts[NUM_WAITING] -= 1


@njit
def remove(state: State, slot: int) -> None:
    """Take a request out from wherever it stands."""
    waiting = state.waiting
    kept = 0
    for i in range(state.counts[NUM_WAITING]):
        other = waiting[_ring(state, i)]
        if other != slot:
            waiting[_ring(state, kept)] = other
            kept += 1
    state.counts[NUM_WAITING] = kept
