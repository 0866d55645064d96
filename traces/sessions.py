"""Requests that wait for others: the turns of a session, and users who ask again when they have their answer.

A log says when each turn came, and a simulation at other speeds must not take these times as given: the next turn of a
chat or an agent comes a pause after the last answer ended, however long that answer took. The pause is the person's
reading and typing, or the tool's run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .columns import BadTrace
from .trace import Trace

NOBODY = -1


@dataclass(frozen=True)
class Dependencies:
    """Of n requests, which one each waits for.

    after    (n,) int64 row of the request that must have ended first, a smaller one; NOBODY: it comes at its own time
    pause_s  (n,) float64 seconds from that end until it is sent; of the others nothing

    Raises: BadTrace: a request that waits for itself or a later one, two that wait for the same, or a negative pause.
    """

    after: NDArray[np.int64]
    pause_s: NDArray[np.float64]

    def __post_init__(self) -> None:
        rows = np.arange(len(self.after))
        waits = self.after != NOBODY
        wrong = np.flatnonzero((self.after >= rows) | (self.after < NOBODY))
        if len(wrong):
            raise BadTrace(
                "after", f"row {wrong[0]} after row {self.after[wrong[0]]}", "an earlier row", "sort by time"
            )
        named = self.after[waits]
        if len(np.unique(named)) < len(named):
            raise BadTrace("after", "two requests after the same one", "one each", "let one wait for the other")
        if self.pause_s.shape != self.after.shape or not (self.pause_s[waits] >= 0).all():
            raise BadTrace("pause_s", "missing, negative or NaN", "seconds >= 0 of each that waits", "correct it")


def by_session(trace: Trace, answer_s: NDArray[np.float64]) -> Dependencies:
    """Every turn waits for the one before it in its session, and then as long as the log says.

    The pause is the time from the recorded end of the last answer to the turn's arrival; 0 where the turn came before
    that end, as the calls of an agent that works in parallel do.

    Args:
        answer_s: (n,) seconds that each answer took when the log was written, arrival to end (`timings.e2e_s` of a
            server's request log).
    Raises: BadTrace: no sessions in the trace, or another number of answers.
    """
    if trace.session is None:
        raise BadTrace(
            f"{trace.source}: session", "not recorded", "a session for each request", "log it: docs/serving.md"
        )
    if answer_s.shape != (len(trace),):
        raise BadTrace(trace.source, f"{len(answer_s)} answer times", f"{len(trace)}, one a request", "correct it")
    after = np.full(len(trace), NOBODY, np.int64)
    last: dict[int, int] = {}
    for row, session in enumerate(trace.session.codes.tolist()):
        if session >= 0:
            after[row] = last.get(session, NOBODY)
            last[session] = row
    waits = after != NOBODY
    pause_s = np.zeros(len(trace))
    ended_s = trace.arrival_s[after[waits]] + answer_s[after[waits]]
    pause_s[waits] = np.maximum(0.0, trace.arrival_s[waits] - ended_s)
    return Dependencies(after, pause_s)


def closed_loop(count: int, users: int, pause_s: float = 0.0) -> Dependencies:
    """So many users share `count` requests in order; each sends the next one a pause after its answer has ended."""
    if users < 1:
        raise BadTrace("users", users, "at least 1", "give how many requests are under way at once")
    rows = np.arange(count, dtype=np.int64)
    return Dependencies(np.where(rows >= users, rows - users, NOBODY), np.full(count, float(pause_s)))
