"""Serving requests that wait for others on several replicas' virtual clocks: a conservative discrete-event simulation.

A request that waits for another arrives when that one has ended: nobody knows the arrivals beforehand, and no replica
may run ahead of one that another could still bring. The replica whose clock is furthest back runs, until the next known
arrival or the clock of the next replica, and stops when a request of its own ends: what that brings cannot come before
the begin of a step that any other has computed (Misra, "Distributed discrete-event simulation", ACM Computing Surveys
18(1), 1986).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from ..traces.sessions import NOBODY, Dependencies


class Serving(Protocol):
    """One replica on its own virtual clock."""

    @property
    def clock_s(self) -> float: ...

    @property
    def has_work(self) -> bool:
        """A request that it was given has not ended."""
        ...

    def advance(self, until_s: float, *, stop_at_end: bool = False) -> int:
        """Compute the steps that begin before until_s; no further than one in which a request ends, where asked."""
        ...

    def take_ended(self) -> Sequence[int]:
        """Requests that have ended since this was asked last."""
        ...


def serve_dependent(
    replicas: Sequence[Serving],
    dependencies: Dependencies,
    *,
    sent_s: np.ndarray,
    end_s: np.ndarray,
    fits: np.ndarray,
    send: Callable[[int, float], None],
    gave_up: int,
) -> bool:
    """Serve all requests; False: it was given up.

    Args:
        sent_s: (n,) when each is sent that waits for nobody; of the others it is written here.
        end_s: (n,) when each has ended, as the replicas write it.
        fits: (n,) bool; what does not fit a replica is refused as it arrives, and who waits for it goes on.
        send: hands a request to the replica that the router says, given its row and when it is sent.
        gave_up: the status of `advance` for a run that was given up.
    """
    following = {int(after): row for row, after in enumerate(dependencies.after) if after != NOBODY}
    arrivals = [(float(sent_s[row]), row) for row in np.flatnonzero(dependencies.after == NOBODY).tolist()]
    heapq.heapify(arrivals)

    def let_follow(row: int, ended_s: float) -> None:
        later = following.get(row)
        if later is not None:
            heapq.heappush(arrivals, (ended_s + float(dependencies.pause_s[later]), later))

    while True:
        busy = sorted((replica for replica in replicas if replica.has_work), key=lambda replica: replica.clock_s)
        next_s = arrivals[0][0] if arrivals else math.inf
        if not busy and not arrivals:
            return True
        if not busy or busy[0].clock_s >= next_s:
            at_s, row = heapq.heappop(arrivals)
            sent_s[row] = at_s
            if fits[row]:
                send(row, at_s)
            else:
                let_follow(row, at_s)
            continue
        first = busy[0]
        until_s = min(next_s, busy[1].clock_s if len(busy) > 1 else math.inf)
        # of clocks that stand alike the first goes on by one step
        if first.advance(max(until_s, math.nextafter(first.clock_s, math.inf)), stop_at_end=True) == gave_up:
            return False
        for row in first.take_ended():
            let_follow(row, float(end_s[row]))
