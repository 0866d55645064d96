"""The gaps between tokens of simulated requests: exact, without a number for each token.

Requests that decode together wait equally long for their next tokens. So the event loop notes runs of steps, and how
many requests were there at each (Gaps in loop_notes.py). How many of some requests were there is counted here: when a
request got its first and its last token is known. Gaps that a request has for itself, because it was preempted or
passed over, stand beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit
from ..traces.metrics import percentiles

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_BINS = 1 << 11
_MOST_ENTRIES = 1 << 12  # that are sorted


@dataclass(frozen=True)
class ReplicaGaps:
    """What one replica's event loop noted, as in `loop_notes.Gaps`, and which requests it served.

    run_first_s, run_growth_s, run_end_s (m,) float64, run_steps, run_weight (m,) int64; single_request (g,) int64,
    single_from_s, single_to_s (g,) float64; served (r,) int64 rows of the requests that ended; all_ended: nobody else
    has gaps
    """

    run_first_s: Floats
    run_growth_s: Floats
    run_steps: Ints
    run_end_s: Floats
    run_weight: Ints
    single_request: Ints
    single_from_s: Floats
    single_to_s: Floats
    served: Ints
    all_ended: bool

    def last_step_s(self) -> Floats:
        return self.run_first_s + (self.run_steps - 1) * self.run_growth_s


@dataclass(frozen=True)
class StepGaps:
    """Inter-token latencies of n requests, of whom some finished; `traces.metrics.TokenGaps`.

    first_s, end_s  (n,) float64  first and last token at the client
    finished        (n,) bool     the others have no gaps here
    """

    replicas: tuple[ReplicaGaps, ...]
    first_s: Floats
    end_s: Floats
    finished: NDArray[np.bool_]

    def sample(self, rows: NDArray[np.bool_] | None = None) -> Floats:
        """Every gap, in no order: as many numbers as tokens."""
        parts = []
        for replica in self.replicas:
            weight, single_s = self._weights(replica, rows)
            steps = np.repeat(np.arange(len(weight)), replica.run_steps)
            starts = np.cumsum(replica.run_steps) - replica.run_steps
            number = np.arange(len(steps)) - starts[steps]
            step_s = replica.run_first_s[steps] + number * replica.run_growth_s[steps]
            parts += [np.repeat(step_s, weight[steps]), single_s]
        return np.concatenate(parts) if parts else np.zeros(0)

    def mean(self, rows: NDArray[np.bool_] | None = None) -> float:
        """Mean gap, seconds; NaN without any."""
        total_s, count = 0.0, 0
        for replica in self.replicas:
            weight, single_s = self._weights(replica, rows)
            run_s = replica.run_steps * (replica.run_first_s + 0.5 * (replica.run_steps - 1) * replica.run_growth_s)
            total_s += float((weight * run_s).sum()) + float(
                single_s.sum()
            )  # `@` wakes the threads of BLAS, which spin
            count += int(weight @ replica.run_steps) + len(single_s)
        return total_s / count if count else np.nan

    def percentiles(self, ps: Sequence[float], rows: NDArray[np.bool_] | None = None, infinite: int = 0) -> list[float]:
        """Percentiles of all gaps as `traces.metrics.percentiles` defines them; `infinite` values beside them."""
        parts = []
        for replica in self.replicas:
            weight, single_s = self._weights(replica, rows)
            parts.append((replica.run_first_s, replica.run_growth_s, replica.run_steps, weight))
            if len(single_s):
                ones = np.ones(len(single_s), np.int64)
                parts.append((single_s, np.zeros(len(single_s)), ones, ones))
        runs = Runs(*(np.concatenate(arrays) if len(arrays) > 1 else arrays[0] for arrays in zip(*parts)))
        count = int(runs.steps @ runs.weight)
        ranks = [p / 100 * (count + infinite - 1) for p in ps]
        if count == 0:
            return [np.inf if infinite else np.nan] * len(ps)
        found = runs.order_statistics(sorted({min(int(rank) + i, count - 1) for rank in ranks for i in (0, 1)}))
        # what `percentiles` makes of the two values beside a rank
        ends = [[found[i] if i < count else np.inf for i in (int(rank), int(rank) + 1)] for rank in ranks]
        ends = [[low, high if int(rank) + 1 < count + infinite else low] for rank, (low, high) in zip(ranks, ends)]
        return [percentiles(pair, (100 * (rank - int(rank)),))[0] for rank, pair in zip(ranks, ends)]

    def longest_s(self) -> Floats:
        """The longest gap of each request, (n,) seconds; NaN where it has none."""
        longest_s = np.full(len(self.first_s), np.nan)
        for replica in self.replicas:
            request, begin, end = self._pieces(replica, None)
            piece_s = _range_max(np.maximum(replica.run_first_s, replica.last_step_s()), begin, end)
            np.fmax.at(longest_s, request, piece_s)
            mine = self.finished[replica.single_request]
            gap_s = (replica.single_to_s - replica.single_from_s)[mine]
            np.fmax.at(longest_s, replica.single_request[mine], gap_s)
        return longest_s

    def _pieces(self, replica: ReplicaGaps, rows: NDArray[np.bool_] | None) -> tuple[Ints, Ints, Ints]:
        """Stretches over which a request got a token at every step: request, first run, and the run behind the last."""
        chosen = self.finished if rows is None else self.finished & rows
        served = replica.served[chosen[replica.served]]
        single = chosen[replica.single_request]
        # from the first token to the first gap of its own, from there to the next, ..., to the last token
        begin_s = np.concatenate([self.first_s[served], replica.single_to_s[single]])
        end_s = np.concatenate([self.end_s[served], replica.single_from_s[single]])
        request = np.concatenate([served, replica.single_request[single]])
        begin, end = (np.searchsorted(replica.run_end_s, at_s, "right") for at_s in (begin_s, end_s))
        if single.any():  # otherwise each request has one begin and one end already
            begin = begin[np.lexsort((begin_s, request))]
            order = np.lexsort((end_s, request))
            request, end = request[order], end[order]
        return request, begin, end

    def _weights(self, replica: ReplicaGaps, rows: NDArray[np.bool_] | None) -> tuple[Ints, Floats]:
        """How many of the chosen requests have a gap as long as each run's steps; and their single gaps."""
        chosen = self.finished if rows is None else self.finished & rows
        if replica.all_ended and chosen[replica.served].all():
            return replica.run_weight, replica.single_to_s - replica.single_from_s
        _, begin, end = self._pieces(replica, rows)
        most = len(replica.run_steps) + 1
        change = np.bincount(begin, minlength=most) - np.bincount(end, minlength=most)
        single_s = (replica.single_to_s - replica.single_from_s)[chosen[replica.single_request]]
        return np.cumsum(change)[:-1], single_s


def _range_max(values: Floats, begin: Ints, end: Ints) -> Floats:
    """max(values[begin[i]:end[i]]) of each i, NaN where that is empty; by a sparse table of maxima over 2**k values."""
    found = np.full(len(begin), np.nan)
    width, table = 1, values
    length = end - begin
    while width <= length.max(initial=0):
        at = np.flatnonzero((length >= width) & (length < 2 * width))
        found[at] = np.maximum(table[begin[at]], table[end[at] - width])
        table = np.maximum(table[:-width], table[width:]) if len(table) > width else table[:0]
        width *= 2
    return found


@dataclass(frozen=True)
class Runs:
    """Values first_s, first_s + growth_s, ... (steps of them), each `weight` times; (m,) all. Positive or 0."""

    first_s: Floats
    growth_s: Floats
    steps: Ints
    weight: Ints

    def order_statistics(self, ranks: Sequence[int]) -> dict[int, float]:
        """The values at these places, ascending, of all values in order.

        The order of such floats is that of their bits: what falls among equal parts of these is counted, and only the
        parts that hold a place are looked at again, value by value or (of many) part by part.
        """
        last_s = self.first_s + (self.steps - 1) * self.growth_s
        ends = np.minimum(self.first_s, last_s).view(np.int64), np.maximum(self.first_s, last_s).view(np.int64)
        found: dict[int, float] = {}
        self._search(*ends, int(ends[0].min()), int(ends[1].max()), list(ranks), 0, found)
        return found

    def _search(
        self, least: Ints, most: Ints, low: int, high: int, ranks: list[int], before: int, found: dict[int, float]
    ) -> None:
        """Find the ranks whose values have bits from low to high; `before` values have less.

        least, most: bits of each run's least and largest value.
        """
        shift = max(0, int(high - low).bit_length() - _BINS.bit_length() + 1)
        counts, entries = (np.zeros(((high - low) >> shift) + 1, np.int64) for _ in range(2))
        count_runs(*self._arrays(), low, high, shift, counts, entries)
        upto = before + np.cumsum(counts)
        bins = np.searchsorted(upto, ranks, "right")
        if shift == 0:  # a part is one value
            found.update(zip(ranks, (low + bins).view(np.float64).tolist()))
            return
        for number in np.unique(bins).tolist():
            first, last = low + (number << shift), low + ((number + 1) << shift) - 1
            inside = [rank for rank, bin_ in zip(ranks, bins) if bin_ == number]
            below = int(upto[number] - counts[number])
            at = np.flatnonzero((least <= last) & (most >= first))
            part = Runs(self.first_s[at], self.growth_s[at], self.steps[at], self.weight[at])
            if entries[number] > _MOST_ENTRIES:
                part._search(least[at], most[at], first, last, inside, below, found)
                continue
            values, weights = np.empty(entries[number]), np.empty(entries[number], np.int64)
            values_between(*part._arrays(), first, last, values, weights)
            order = np.argsort(values)
            place = np.searchsorted(below + np.cumsum(weights[order]), inside, "right")
            found.update(zip(inside, values[order][place].tolist()))

    def _arrays(self) -> tuple[Floats, Floats, Ints, Ints]:
        return self.first_s, self.growth_s, self.steps, self.weight


@njit
def _bits(value: float) -> int:
    return int(np.float64(value).view(np.int64))


@njit
def count_runs(
    first_s: Floats,
    growth_s: Floats,
    steps: Ints,
    weight: Ints,
    low: int,
    high: int,
    shift: int,
    counts: Ints,
    entries: Ints,
) -> None:
    """Add to `counts` how many values there are in each part of the bits from low to high, of 2**shift bit patterns.

    entries: how many of them are written down apart: of a run without growth one, of others each step.
    """
    for run in range(first_s.shape[0]):
        if weight[run] == 0:
            continue
        begin = _bits(first_s[run])
        end = _bits(first_s[run] + (steps[run] - 1) * growth_s[run])
        if max(begin, end) < low or min(begin, end) > high:
            continue
        if min(begin, end) >= low and max(begin, end) <= high and (begin - low) >> shift == (end - low) >> shift:
            counts[(begin - low) >> shift] += steps[run] * weight[run]
            entries[(begin - low) >> shift] += 1 if begin == end else steps[run]
            continue
        for step in range(steps[run]):
            value = _bits(first_s[run] + step * growth_s[run])
            if low <= value <= high:
                counts[(value - low) >> shift] += weight[run]
                entries[(value - low) >> shift] += 1


@njit
def values_between(
    first_s: Floats, growth_s: Floats, steps: Ints, weight: Ints, low: int, high: int, values: Floats, weights: Ints
) -> None:
    """The values whose bits lie from low to high, and how often each is there; as many as `entries` of count_runs."""
    size = 0
    for run in range(first_s.shape[0]):
        if weight[run] == 0:
            continue
        begin = _bits(first_s[run])
        if begin == _bits(first_s[run] + (steps[run] - 1) * growth_s[run]):
            if low <= begin <= high:
                values[size] = first_s[run]
                weights[size] = steps[run] * weight[run]
                size += 1
            continue
        for step in range(steps[run]):
            value_s = first_s[run] + step * growth_s[run]
            if low <= _bits(value_s) <= high:
                values[size] = value_s
                weights[size] = weight[run]
                size += 1
