"""Requests that wait for others: the turns of a session, and clients that send one request when the last has ended.

A log of arrivals says when requests came. In an open loop they come then, however slow the server is; people and
agents instead wait for an answer, read it or run a tool, and send the next. `DependentArrivals` says who waits for
whom, and `SendOrder` who is sent when, as answers end: the simulator asks it on its virtual clock, the replay on the
wall clock, so that both send by the same rules.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .columns import BadTrace, frozen
from .metrics import percentiles
from .trace import Trace

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NOBODY = -1


@dataclass(frozen=True)
class RecordedService:
    """How fast the server was that wrote a log without end times: an assumption, which is named in every result.

    An answer of n tokens is taken to have ended ttft_s + (n - 1) * tpot_s after its arrival.
    """

    ttft_s: float
    tpot_s: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise BadTrace(f"recorded service: {name}", value, "seconds >= 0", "correct it")

    def seconds(self, output_tokens: Ints) -> Floats:
        """Of answers of so many tokens."""
        return np.asarray(self.ttft_s + (output_tokens - 1) * self.tpot_s, np.float64)


@dataclass(frozen=True, eq=False)
class DependentArrivals:
    """When requests are sent that wait for others; n rows, as the trace has.

    A request that waits for nobody begins a chain; the requests behind it follow one after the other.

    after          (n,) int64    the row, an earlier one, whose end a request waits for; -1: it begins a chain
    pause_s        (n,) float64  from that end until it is sent, >= 0; of the first of a chain 0
    clients        chains open at once at most, begun in order of the log by whoever is free first; 0: any number
    think_s        from the end of a chain until its client begins another
    at_arrival     a chain begins no sooner than its first request's recorded arrival; False: as soon as a client is
                   free, and recorded arrivals play no part
    words          what was done, and what was assumed, for people
    """

    after: Ints
    pause_s: Floats
    clients: int = 0
    think_s: float = 0.0
    at_arrival: bool = True
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "after", frozen(np.asarray(self.after, np.int64)))
        object.__setattr__(self, "pause_s", frozen(np.asarray(self.pause_s, np.float64)))
        rows = np.arange(len(self))
        if self.pause_s.shape != self.after.shape or not ((self.after >= NOBODY) & (self.after < rows)).all():
            raise BadTrace("after", self.after, "the row above that a request waits for, or -1", "correct it")
        followed = self.after[self.after >= 0]
        if len(np.unique(followed)) != len(followed):
            raise BadTrace("after", "two requests behind one", "one request behind another", "correct it")
        if not ((self.pause_s >= 0) & (self.pause_s < math.inf)).all():
            raise BadTrace("pause_s", self.pause_s, "seconds >= 0", "correct it")
        if self.clients < 0 or not 0 <= self.think_s < math.inf or not (self.at_arrival or self.clients):
            raise BadTrace("clients", self.clients, "at least 1, where chains do not begin as recorded", "say how many")

    def __len__(self) -> int:
        return len(self.after)

    @property
    def waits(self) -> bool:
        """Whether any request waits for an end; else this is an open loop."""
        return bool(self.clients) or bool((self.after >= 0).any())

    @property
    def least_pause_s(self) -> float:
        """No end is followed sooner than this by the request that waits for it."""
        pauses = self.pause_s[self.after >= 0]
        least = float(pauses.min()) if len(pauses) else math.inf
        return min(least, self.think_s) if self.clients else least


def open_loop(n: int) -> DependentArrivals:
    """Nobody waits for anybody: n requests at their recorded arrivals."""
    return DependentArrivals(np.full(n, NOBODY), np.zeros(n))


def closed_loop(trace: Trace, clients: int, think_s: float = 0.0) -> DependentArrivals:
    """So many clients, each sending the log's next request when its last has ended and it has thought; arrivals unused.

    Requests are dealt in the order of the log to whoever is free first. All clients begin at second 0.
    """
    n = len(trace)
    words = (f"closed loop: {clients} clients, {_thinking(think_s)}; recorded arrivals are not used",)
    return DependentArrivals(np.full(n, NOBODY), np.zeros(n), _positive(clients), think_s, False, words)


def limited(trace: Trace, max_concurrency: int) -> DependentArrivals:
    """Requests at their recorded arrivals, but never more than so many open: the others wait at the client, in order.

    What `--max-concurrency` of vLLM's benchmark does beside a request rate (a semaphore around each request,
    vllm/benchmarks/serve.py): the next is sent as soon as fewer are open, and not before its own arrival. Latencies
    count from that arrival; from the send they stand beside it (`ttft_from_send`), which is what that tool prints.
    """
    n = len(trace)
    words = (
        f"at most {max_concurrency} requests open at once; those that wait at the client count from their arrival",
    )
    return DependentArrivals(np.full(n, NOBODY), np.zeros(n), _positive(max_concurrency), 0.0, True, words)


def sessions(
    trace: Trace,
    *,
    pause_s: float | None = None,
    recorded: RecordedService | None = None,
    clients: int = 0,
    think_s: float = 0.0,
) -> DependentArrivals:
    """Recorded sessions: the first turn arrives as recorded, each other follows the end of the turn before it.

    The pause between them is, of what is given, the first: `pause_s`, the same for all; the pause that the log records;
    where it records none, the gap between the two arrivals less what `recorded` says that the first one's answer took,
    and at least 0. Requests without a session are chains of their own.

    Args:
        clients: so many clients work through the sessions, each beginning the next one `think_s` after its last ended;
            recorded arrivals are then not used. 0: sessions begin as recorded.
    Raises: BadTrace: no sessions, or pauses that nobody knows.
    """
    if trace.session is None:
        todo = "leave --sessions out, or take a log whose requests name their session"
        raise BadTrace(f"{trace.source}: session", "none", "requests of sessions", todo)
    after = turns_before(trace.session.codes)
    follows = after >= 0
    pauses, words = _pauses(trace, after, pause_s, recorded)
    single = int((~follows).sum())
    begin = "begin at their recorded arrivals"
    if clients:
        begin = f"are worked through by {clients} clients, {_thinking(think_s)}; recorded arrivals are not used"
    waiting = f"{int(follows.sum()):,} of {len(trace):,} requests wait for the turn before them"
    clients = _positive(clients) if clients else 0
    words = (f"sessions: {waiting}; {single:,} {begin}", *words)
    return DependentArrivals(after, pauses, clients, think_s, not clients, words)


def _positive(clients: int) -> int:
    if clients < 1:
        raise BadTrace("clients", clients, "an integer >= 1", "say how many requests may be open at once")
    return clients


def _thinking(think_s: float) -> str:
    return f"{think_s:g} s from an end until the next begins" if think_s else "each sending the next at once"


def turns_before(codes: npt.NDArray[np.int32]) -> Ints:
    """(n,) the row of the same session before each row, -1 where there is none."""
    after = np.full(len(codes), NOBODY, np.int64)
    order = np.argsort(codes, kind="stable")
    same = (np.diff(codes[order]) == 0) & (codes[order][1:] >= 0)
    after[order[1:][same]] = order[:-1][same]
    return after


def _pauses(
    trace: Trace, after: Ints, pause_s: float | None, recorded: RecordedService | None
) -> tuple[Floats, tuple[str, ...]]:
    follows = np.flatnonzero(after >= 0)
    pauses = np.zeros(len(after))
    if pause_s is not None:
        pauses[follows] = pause_s
        return pauses, (f"pauses between turns: {pause_s:g} s each, as asked",)
    known = np.zeros(len(after), np.bool_)
    if trace.pause_s is not None:
        known = ~np.isnan(trace.pause_s)
        pauses[follows] = np.where(known[follows], trace.pause_s[follows], 0.0)
    words = []
    unknown = follows[~known[follows]]
    if len(unknown) < len(follows):
        words.append(f"pauses between turns: recorded for {len(follows) - len(unknown):,} of {len(follows):,}")
    if len(unknown):
        if recorded is None:
            raise BadTrace(
                f"{trace.source}: pauses between turns",
                f"{len(unknown)} of {len(follows)} not recorded",
                "a pause, or how fast the recorded server was",
                "give --pause, or --recorded-ttft and --recorded-tpot: gaps between arrivals less the answers' time",
            )
        before = after[unknown]
        gap_s = trace.arrival_s[unknown] - trace.arrival_s[before]
        took_s = recorded.seconds(trace.output_tokens[before].astype(np.int64))
        pauses[unknown] = np.maximum(0.0, gap_s - took_s)
        share = float((gap_s < took_s).mean())
        words.append(
            f"pauses between turns: assumed for {len(unknown):,} of {len(follows):,}: the recorded gap less "
            f"{recorded.ttft_s:g} s and {recorded.tpot_s:g} s for each further token of the answer before it; "
            f"{share:.0%} of the gaps are shorter than that, and pauses there 0"
        )
    elif recorded is not None:
        words.append("the recorded server's TTFT and TPOT are not used: every pause is recorded")
    if len(follows):
        p50, p95 = percentiles(pauses[follows], (50, 95))
        words.append(f"their p50 is {p50:.3g} s, their p95 {p95:.3g} s")
    return pauses, tuple(words)


class SendOrder:
    """Which request is sent next, and when, as ends become known.

    Whoever asks takes requests in order of their times, each when no end before that time is to come (`take`), and
    tells every end (`ended`), in any order. Then every request is taken once.

    arrivals             who waits for whom
    scheduled_s, sent_s  (n,) when a request should be sent by the log or by what it waits for, and when it is; NaN
                         until it was taken. They differ where a recorded arrival waits for a client.
    """

    def __init__(self, arrivals: DependentArrivals, arrival_s: Floats) -> None:
        """arrival_s: (n,) recorded arrivals, ascending; a chain's first one is asked for where `at_arrival`."""
        n = len(arrivals)
        self.arrivals = arrivals
        self._arrival_s = arrival_s if arrivals.at_arrival else np.zeros(n)
        self._next = np.full(n, NOBODY, np.int64)
        follows = np.flatnonzero(arrivals.after >= 0)
        self._next[arrivals.after[follows]] = follows
        self._firsts: list[int] = np.flatnonzero(arrivals.after < 0).tolist()
        self._begun = 0  # of these
        self._known: list[tuple[float, int]] = []  # a heap: followers of what has ended
        self._free_s = [0.0] * (arrivals.clients or len(self._firsts))  # a heap: when clients are free that wait
        self.scheduled_s, self.sent_s = np.full(n, np.nan), np.full(n, np.nan)

    def next_s(self) -> float:
        """When the next request is sent, by the ends that are known; infinite: none is, before another end."""
        return min(self._first()[0], self._known[0][0] if self._known else math.inf)

    def take(self) -> tuple[int, float]:
        """The next request, and when it is sent."""
        first = self._first()
        if not self._known or first < self._known[0]:
            sent_s, row = first
            heapq.heappop(self._free_s)
            self._begun += 1
            self.scheduled_s[row] = self._arrival_s[row] if self.arrivals.at_arrival else sent_s
        else:
            sent_s, row = heapq.heappop(self._known)
            self.scheduled_s[row] = sent_s
        self.sent_s[row] = sent_s
        return row, sent_s

    def ended(self, row: int, at_s: float) -> None:
        """A request has ended, or was refused: its client goes on."""
        follower = int(self._next[row])
        if follower >= 0:
            heapq.heappush(self._known, (at_s + float(self.arrivals.pause_s[follower]), follower))
        elif self.arrivals.clients:
            heapq.heappush(self._free_s, at_s + self.arrivals.think_s)

    def _first(self) -> tuple[float, int]:
        """When the next chain begins, and with which request; infinite where none is left, or no client is free."""
        if self._begun == len(self._firsts) or not self._free_s:
            return math.inf, len(self._next)
        row = self._firsts[self._begun]
        return max(self._free_s[0], float(self._arrival_s[row])), row
