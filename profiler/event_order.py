"""What happens next, over all replicas: arrivals, ends that bring further arrivals, and changes of the fleet.

Each replica has a clock of its own and runs ahead through the compiled event loop. Where an end may bring a request
(sessions, closed loops), none may run past the earliest time at which another's end could: a conservative order of
events (Chandy and Misra, IEEE Transactions on Software Engineering SE-5(5), 1979), with bounds from the tokens that
live requests lack and the shortest step. So results are those of one clock, whatever the number of replicas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.router import new_router, num_prefix_hashes, route
from ..runtime.spec import Pool
from ..traces.sessions import SendOrder
from .loop_notes import DRAINED, GAVE_UP
from .replica import Replica, Run


@dataclass(frozen=True)
class Held:
    """A replica of a fleet that changes, and when: it is paid for from asked_s to gone_s.

    asked_s   the autoscaler asked for it: its devices are held, and it loads
    ready_s   it takes requests; infinite: it was let go before
    leaves_s  it takes no more, and finishes those that it has; infinite: it never left
    gone_s    its devices are given back; infinite: it never left
    """

    asked_s: float
    ready_s: float
    leaves_s: float
    gone_s: float


class Fleet:
    """Replicas behind a router, the same from the first request to the last.

    replicas  that may have requests
    """

    def __init__(self, pool: Pool, run: Run, prefix_block: int) -> None:
        """prefix_block: tokens that one of the trace's prefix hashes covers."""
        self.run = run
        self.replicas = [Replica(pool, run) for _ in range(pool.replicas)]
        self._router = new_router(pool)
        self._most_hashes = num_prefix_hashes(prefix_block)

    @property
    def held(self) -> tuple[Held, ...]:
        """From when to when each replica was held; empty: all of them, all the time."""
        return ()

    @property
    def next_change_s(self) -> float:
        """When the fleet may change by itself; infinite: never."""
        return math.inf

    def change(self, now_s: float) -> None:
        """Called at that time, when every replica has come there."""

    def takes_requests(self, now_s: float) -> NDArray[np.bool_] | None:
        """(replicas,) which may be sent a request now; None: all."""
        return None

    def send(self, row: int, arrival_s: float) -> Replica:
        """Hand a request to the replica that the router chooses; all of them have come to its arrival."""
        requests = self.run.requests
        outstanding = np.array([replica.outstanding_tokens(arrival_s) for replica in self.replicas], np.int64)
        first, hashes = requests.hash_start[row], min(self._most_hashes, requests.num_hashes[row])
        prefix = self.run.hashes[first : first + hashes]
        tokens = int(requests.max_num_tokens[row])
        chosen = self.replicas[route(self._router, outstanding, tokens, prefix, self.takes_requests(arrival_s))]
        chosen.add(row)
        return chosen


def serve_in_order(fleet: Fleet, sends: SendOrder, fits: NDArray[np.bool_]) -> int:
    """Serve every request of `sends`; returns why it ended, DRAINED or GAVE_UP.

    fits: (n,) which requests the server takes; the others end when they are sent.
    """
    run, replicas = fleet.run, fleet.replicas
    requests, times = run.requests, run.times
    to_scheduler_s, to_client_s = run.tables.request_s.tolist()
    order = _Order(to_client_s + sends.arrivals.least_pause_s + to_scheduler_s)
    while True:
        arrival_s = sends.next_s() + to_scheduler_s
        busy = [replica for replica in replicas if replica.num_requests]
        served_s = max((replica.now_s for replica in replicas), default=0.0)
        if not busy and math.isinf(arrival_s) and fleet.next_change_s >= served_s:
            return DRAINED
        event_s = min(arrival_s, fleet.next_change_s)
        behind = [replica for replica in busy if replica.now_s < event_s]
        if not behind and fleet.next_change_s <= arrival_s:
            fleet.change(event_s)
        elif not behind:
            row, sent_s = sends.take()
            if not fits[row]:
                sends.ended(row, sent_s)
                continue
            requests.scheduled_s[row], requests.arrival_s[row] = sends.scheduled_s[row], arrival_s
            order.changed(fleet.send(row, arrival_s))
        elif not sends.arrivals.waits:
            if GAVE_UP in [replica.advance(event_s) for replica in behind]:
                return GAVE_UP
        else:
            replica, until_s = order.next(busy, behind, event_s)
            status = replica.advance(until_s, stop_at_end=True)
            order.changed(replica)
            for row in replica.take_ended():
                sends.ended(row, float(times.end_s[row]))
            if status == GAVE_UP:
                return GAVE_UP


class _Order:
    """Who may run how far. lookahead_s: no end brings an arrival sooner than so much later."""

    def __init__(self, lookahead_s: float) -> None:
        self._lookahead_s = lookahead_s
        self._least_end_s: dict[int, float] = {}

    def changed(self, replica: Replica) -> None:
        self._least_end_s.pop(id(replica), None)

    def next(self, busy: Sequence[Replica], behind: Sequence[Replica], event_s: float) -> tuple[Replica, float]:
        """The replica that is furthest behind, and how far it may go."""
        chosen = min(behind, key=lambda replica: replica.now_s)
        others = (self._bound(replica) for replica in busy if replica is not chosen)
        until_s = min(event_s, min(others, default=math.inf) + self._lookahead_s)
        # two ends at one instant: the replica that stands first goes first
        return chosen, max(until_s, math.nextafter(chosen.now_s, math.inf))

    def _bound(self, replica: Replica) -> float:
        found = self._least_end_s.get(id(replica))
        if found is None:
            found = self._least_end_s[id(replica)] = replica.least_end_s()
        return found
