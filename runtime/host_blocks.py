"""The second tier of the KV cache: blocks in host memory, which keep what the device has no room for.

Two uses, of one pool: blocks of the prefix cache that the device gives away stay here until nobody has asked for them
for longest, and the blocks of a request preempted by swap stay here until it goes on.

Nothing is moved here: a plan lists the copies, in their order, as pairs of blocks; host block i has the number
num_kv_blocks + i. They are to be made, one after the other, before the plan's tokens are computed.
"""

from __future__ import annotations

from ..kernels.jit import njit
from . import kv_cache
from .kv_cache import CACHED, FREE
from .scheduler_state import (
    NUM_BLOCKS_FROM_HOST,
    NUM_BLOCKS_TO_HOST,
    NUM_SWAPPED,
    PLAN_COPIES,
    Plan,
    State,
)


@njit
def _copy(state: State, plan: Plan, source: int, destination: int) -> None:
    place = plan.counts[PLAN_COPIES]
    plan.copies[place, 0] = source
    plan.copies[place, 1] = destination
    plan.counts[PLAN_COPIES] += 1
    direction = NUM_BLOCKS_TO_HOST if source < kv_cache.num_blocks(state.blocks) else NUM_BLOCKS_FROM_HOST
    state.counts[direction] += 1


@njit
def _room(state: State, plan: Plan) -> int:
    """Copies to the host that still fit into the plan; as many as there are blocks may yet come back in it."""
    return int(plan.copies.shape[0] - kv_cache.num_blocks(state.blocks) - plan.counts[PLAN_COPIES])


@njit
def take_block(state: State, plan: Plan) -> int:
    """A device block to write into. If it is one of the prefix cache, its content goes to the host first."""
    blocks, host = state.blocks, state.host_blocks
    evicts = blocks.counts[FREE] == 0 and blocks.counts[CACHED] > 0
    if evicts and kv_cache.num_blocks(host) > 0 and _room(state, plan) > 0:
        block = kv_cache.oldest(blocks)
        content_hash, at = kv_cache.name_of(blocks, block)
        place = kv_cache.find(host, content_hash, at)
        if place < 0:
            place = kv_cache.take(host)
            if place >= 0:
                kv_cache.remember(host, place, content_hash, at)
                _copy(state, plan, block, kv_cache.num_blocks(blocks) + place)
                kv_cache.release(host, place)
        elif kv_cache.is_cached(host, place):  # it is there already, and was asked for later than the others
            kv_cache.claim(host, place)
            kv_cache.release(host, place)
    return kv_cache.take(blocks)


@njit
def fetch_block(state: State, plan: Plan, content_hash: int, at: int) -> int:
    """A device block with the content of a host block that is held, and then let go: it stays cached there, too."""
    place = kv_cache.find(state.host_blocks, content_hash, at)
    block = take_block(state, plan)
    _copy(state, plan, kv_cache.num_blocks(state.blocks) + place, block)
    kv_cache.remember(state.blocks, block, content_hash, at)
    kv_cache.release(state.host_blocks, place)
    return block


@njit
def swap_out(state: State, plan: Plan, slot: int, num_blocks: int) -> bool:
    """Keep a running request's first blocks on the host; False, and nothing done, where it has no room for them."""
    host = state.host_blocks
    if num_blocks == 0 or num_blocks > kv_cache.num_available(host) or num_blocks > _room(state, plan):
        return False
    row = state.block_table[state.lane[slot]]
    following = -1
    for i in range(num_blocks - 1, -1, -1):
        place = kv_cache.take(host)
        _copy(state, plan, row[i], kv_cache.num_blocks(state.blocks) + place)
        state.next_swapped[place] = following
        following = place
    state.first_swapped[slot] = following
    state.num_swapped_blocks[slot] = num_blocks
    state.counts[NUM_SWAPPED] += 1
    return True


@njit
def swap_in(state: State, plan: Plan, slot: int) -> None:
    """Bring a request's blocks back to the device, where there is room for them; it has a lane."""
    row = state.block_table[state.lane[slot]]
    place = state.first_swapped[slot]
    for i in range(state.num_swapped_blocks[slot]):
        row[i] = take_block(state, plan)
        _copy(state, plan, kv_cache.num_blocks(state.blocks) + place, row[i])
        kv_cache.release(state.host_blocks, place)
        place = state.next_swapped[place]
    state.num_blocks[slot] = state.num_swapped_blocks[slot]
    state.num_swapped_blocks[slot] = 0


@njit
def drop_swapped(state: State, slot: int) -> None:
    """Give back the host blocks of a request that nobody wants any more."""
    place = state.first_swapped[slot]
    for _ in range(state.num_swapped_blocks[slot]):
        kv_cache.release(state.host_blocks, place)
        place = state.next_swapped[place]
    state.num_swapped_blocks[slot] = 0
