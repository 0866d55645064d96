"""Which replica a request goes to: one rule for the server and the simulator. NumPy only, no clock, no randomness.

round_robin               in turn, in order of arrival
least_outstanding_tokens  to the replica whose unfinished requests may take the fewest tokens, prompts and answers
                          together (max_tokens where the client gives it); of equals the next in turn
prefix_affinity           to the replica that had the longest known beginning of the prompt last, because its prefix
                          cache may still hold it; where that one is overloaded, or the beginning is unknown, to the
                          one with the fewest outstanding tokens

Overloaded is meant as in consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, arXiv:1608.01350).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .spec import Pool

PREFIX_TOKENS = 512  # of a prompt are looked at: what sessions and system prompts share begins there
OVERLOAD = 1.5  # times the mean load of all replicas
_PLACES = 1 << 16
_NOBODY = -1


class Router(NamedTuple):
    """What routing remembers.

    policy   of the spec
    turn     (1,) int64                the next replica in turn
    known    (places,) int64           hash of a prompt's beginning, at its value modulo the places: the newest stays
    replica  (places,) int64           that had it last; -1: none
    """

    policy: str
    turn: NDArray[np.int64]
    known: NDArray[np.int64]
    replica: NDArray[np.int64]


def new_router(pool: Pool) -> Router:
    """Nothing routed yet."""
    places = _PLACES if pool.router == "prefix_affinity" else 0
    return Router(
        pool.router, np.zeros(1, np.int64), np.zeros(places, np.int64), np.full(places, _NOBODY, dtype=np.int64)
    )


def num_prefix_hashes(block_size: int) -> int:
    """How many hashes, each of block_size more tokens, `route` looks at."""
    return max(1, PREFIX_TOKENS // block_size)


def route(
    router: Router,
    outstanding: NDArray[np.int64],
    num_tokens: int,
    prefix: NDArray[np.int64],
    takes: NDArray[np.bool_] | None = None,
) -> int:
    """The replica for a request, which the router remembers.

    Args:
        outstanding: (replicas,) tokens that each replica's unfinished requests may take.
        num_tokens: that this request may take.
        prefix: (n,) chained hashes of the prompt's first whole blocks, at most num_prefix_hashes; may be empty.
        takes: (replicas,) those that take requests, one at least (others start, or drain); None: all.
    """
    if takes is not None and not takes.all():
        return _route_to_some(router, outstanding, num_tokens, prefix, takes)
    chosen = _NOBODY
    if router.policy == "prefix_affinity":
        chosen = _had_it_last(router, prefix)
        if chosen != _NOBODY and _is_overloaded(outstanding, chosen, num_tokens):
            chosen = _NOBODY
    if chosen == _NOBODY:
        chosen = _next(router, outstanding)
        router.turn[0] = (chosen + 1) % len(outstanding)
    if router.policy == "prefix_affinity":
        places = prefix % _PLACES
        router.known[places] = prefix
        router.replica[places] = chosen
    return chosen


def _route_to_some(
    router: Router,
    outstanding: NDArray[np.int64],
    num_tokens: int,
    prefix: NDArray[np.int64],
    takes: NDArray[np.bool_],
) -> int:
    """`route` among the replicas that take requests: the others are passed over in turn, and forgotten as owners."""
    some = np.flatnonzero(takes)
    place = np.full(len(takes) + 1, _NOBODY, np.int64)  # the last one is that of _NOBODY
    place[some] = np.arange(len(some))
    known = router.replica
    turn = np.array([int(np.searchsorted(some, router.turn[0])) % len(some)], np.int64)
    among = router._replace(turn=turn, replica=place[known])
    chosen = int(some[route(among, outstanding[some], num_tokens, prefix)])
    if router.policy == "prefix_affinity":
        known[prefix % _PLACES] = chosen
    router.turn[0] = some[turn[0]]
    return chosen


def _next(router: Router, outstanding: NDArray[np.int64]) -> int:
    """The next in turn (round robin), or the next in turn of those with the fewest tokens."""
    turn, size = int(router.turn[0]), len(outstanding)
    if router.policy == "round_robin":
        return turn
    return (turn + int(np.roll(outstanding, -turn).argmin())) % size


def _had_it_last(router: Router, prefix: NDArray[np.int64]) -> int:
    places = prefix % _PLACES
    found = np.flatnonzero((router.known[places] == prefix) & (router.replica[places] != _NOBODY))
    return int(router.replica[places[found[-1]]]) if len(found) else _NOBODY


def _is_overloaded(outstanding: NDArray[np.int64], replica: int, num_tokens: int) -> bool:
    return bool(outstanding[replica] > OVERLOAD * (outstanding.sum() + num_tokens) / len(outstanding))
