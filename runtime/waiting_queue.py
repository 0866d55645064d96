"""The queue of those that wait: by priority, then by arrival. Without priorities that is first come, first served.

Who waits for an adapter's slot keeps its place, and others pass it.
"""

from __future__ import annotations

from ..kernels.jit import njit
from .adapter_slots import NO_ADAPTER, has_slot
from .scheduler_state import NUM_WAITING, WAITING_HEAD, State


@njit
def goes_before(state: State, slot: int, other: int) -> bool:
    """Whether a request is served before another: the lower priority number, of equal ones the earlier arrival."""
    if state.priority[slot] != state.priority[other]:
        return bool(state.priority[slot] < state.priority[other])
    return bool(state.arrival[slot] < state.arrival[other])


@njit
def put(state: State, slot: int) -> None:
    """Queue a newcomer; it passes those behind whom it may not stand."""
    waiting, head, size = state.waiting, state.counts[WAITING_HEAD], state.waiting.shape[0]
    place = state.counts[NUM_WAITING]
    while place > 0 and goes_before(state, slot, waiting[(head + place - 1) % size]):
        waiting[(head + place) % size] = waiting[(head + place - 1) % size]
        place -= 1
    waiting[(head + place) % size] = slot
    state.counts[NUM_WAITING] += 1


@njit
def put_back(state: State, slot: int) -> None:
    """Queue a preempted request, mostly at the head: it came before those that wait."""
    waiting, size = state.waiting, state.waiting.shape[0]
    head = (state.counts[WAITING_HEAD] - 1) % size
    place = 0
    while place < state.counts[NUM_WAITING] and goes_before(state, waiting[(head + place + 1) % size], slot):
        waiting[(head + place) % size] = waiting[(head + place + 1) % size]
        place += 1
    waiting[(head + place) % size] = slot
    state.counts[WAITING_HEAD] = head
    state.counts[NUM_WAITING] += 1


@njit
def at(state: State, place: int) -> int:
    """The slot of who stands at a place."""
    return int(state.waiting[(state.counts[WAITING_HEAD] + place) % state.waiting.shape[0]])


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
    waiting, head, size = state.waiting, state.counts[WAITING_HEAD], state.waiting.shape[0]
    for i in range(place, 0, -1):
        waiting[(head + i) % size] = waiting[(head + i - 1) % size]
    state.counts[WAITING_HEAD] = (head + 1) % size
    state.counts[NUM_WAITING] -= 1


@njit
def remove(state: State, slot: int) -> None:
    """Take a request out from wherever it stands."""
    waiting, head, size = state.waiting, state.counts[WAITING_HEAD], state.waiting.shape[0]
    kept = 0
    for i in range(state.counts[NUM_WAITING]):
        other = waiting[(head + i) % size]
        if other != slot:
            waiting[(head + kept) % size] = other
            kept += 1
    state.counts[NUM_WAITING] = kept
