"""How a run was made of a trace: what is sent before anything counts, how the rate rises, how lengths are varied.

All three are off unless asked for, and what was done is said with every result: a run from an empty server is quick
at first, and a p95 over it is not that of the steady state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .metrics import Mask, RequestTimes
from .trace import Trace


@dataclass(frozen=True)
class RunProtocol:
    """
    warm_up_s      requests that arrive in the first so many seconds are served and not counted
    ramp_s         over the first so many seconds the rate rises evenly from 0 to the recorded one, by arriving later
    length_jitter  lengths are multiplied by exp(length_jitter * z), z normal: a relative spread of so much
    seed           of the jitter
    """

    warm_up_s: float = 0.0
    ramp_s: float = 0.0
    length_jitter: float = 0.0
    seed: int = 0

    def applied(self, trace: Trace) -> Trace:
        """The trace as it is sent: later at first with a ramp, with other lengths with jitter.

        In a ramp of r seconds an arrival at t < r / 2 moves to sqrt(2 r t), so that the rate at u < r is u / r of the
        recorded one; all others come r / 2 later. With jitter prefixes are dropped, since prompts change.
        """
        if self.ramp_s > 0:
            since_s = trace.arrival_s - trace.arrival_s[0]
            r = self.ramp_s
            moved = np.where(since_s < r / 2, np.sqrt(2 * r * np.minimum(since_s, r / 2)), since_s + r / 2)
            trace = replace(trace, arrival_s=trace.arrival_s[0] + moved)
        if self.length_jitter > 0:
            rng = np.random.default_rng(self.seed)

            def varied(lengths: NDArray[np.int32]) -> NDArray[np.int32]:
                factor = np.exp(self.length_jitter * rng.normal(size=len(lengths)))
                return np.maximum(1, np.rint(lengths * factor)).astype(np.int32)

            inputs, outputs = varied(trace.input_tokens), varied(trace.output_tokens)
            trace = replace(trace, input_tokens=inputs, output_tokens=outputs, prefix=None)
        return trace

    def counted(self, times: RequestTimes) -> Mask:
        """(n,) which requests count."""
        if not len(times):
            return np.zeros(0, np.bool_)
        return np.asarray(times.scheduled_s >= np.nanmin(times.scheduled_s) + self.warm_up_s, np.bool_)

    def words(self, times: RequestTimes) -> str:
        """What was done, for people; said also where nothing was."""
        left_out = int((~self.counted(times)).sum())
        warm_up = f"{self.warm_up_s:g} s ({left_out:,} requests not counted)" if self.warm_up_s else "none"
        ramp = f"{self.ramp_s:g} s" if self.ramp_s else "none"
        jitter = f"{self.length_jitter:.0%} (seed {self.seed})" if self.length_jitter else "none"
        return f"warm-up {warm_up}, ramp {ramp}, length jitter {jitter}"


def counted_part(protocol: RunProtocol, trace: Trace, times: RequestTimes) -> tuple[Trace, RequestTimes]:
    """What counts of a run: the requests after the warm-up, and their times."""
    if not protocol.warm_up_s:
        return trace, times
    rows = protocol.counted(times)
    return trace.select(rows), counted_times(times, rows)


def counted_times(times: RequestTimes, rows: Mask) -> RequestTimes:
    """The times of some requests alone."""
    gaps, offsets = times.token_gap_s, times.gap_offsets
    if gaps is not None and offsets is not None:
        lengths = np.diff(offsets)
        gaps = gaps[np.repeat(rows, lengths)]
        offsets = np.concatenate([[0], np.cumsum(lengths[rows])]).astype(np.int64)
    return RequestTimes(
        scheduled_s=times.scheduled_s[rows],
        sent_s=times.sent_s[rows],
        first_token_s=times.first_token_s[rows],
        kth_token_s=times.kth_token_s[rows],
        end_s=times.end_s[rows],
        output_tokens=times.output_tokens[rows],
        finished=times.finished[rows],
        k=times.k,
        token_gap_s=gaps,
        gap_offsets=offsets,
    )
