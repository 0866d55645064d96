"""Replay a trace of any length chunk by chunk, in memory that does not grow with it.

The same event loop as `simulate`; what a request has taken is counted when it ended, and forgotten. Percentiles come
from counts of values by their leading bits: of every percentile the relative error is at most RELATIVE_ERROR; means,
counts and totals are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.scheduler_state import NUM_PREEMPTIONS
from ..runtime.spec import BadSpec, Pool
from ..traces.metrics import PERCENTILES, Summary
from ..traces.trace import BadTrace, Trace
from .loop_notes import ARRIVED, ENDED, QUEUED, RUNS, SINGLES, STEPS, Bounds, Requests, Times
from .replica import Replica, Run
from .step_time import StepTables, check_sums
from .token_gaps import count_runs

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Of a float the sign, the exponent and 10 bits of the mantissa are told apart; a value stands in the middle of its bin.
_SHIFT = 42
RELATIVE_ERROR = 2.0**-11
_LEAST_S, _MOST_S = 2.0**-30, 2.0**40
_LOW, _HIGH = (int(np.float64(value).view(np.int64)) for value in (_LEAST_S, _MOST_S))


class Histogram:
    """Counts of positive times by their leading bits. What is below a nanosecond counts as 0."""

    def __init__(self) -> None:
        self.counts = np.zeros(((_HIGH - _LOW) >> _SHIFT) + 1, np.int64)
        self._entries = np.zeros_like(self.counts)
        self.zeros = 0
        self.total_s = 0.0

    def add(self, values: Floats) -> None:
        """Count values, each of them once; NaN is left out."""
        values = values[~np.isnan(values)]
        ones = np.ones(len(values), np.int64)
        self.add_runs(values, np.zeros(len(values)), ones, ones)

    def add_runs(self, first_s: Floats, growth_s: Floats, steps: Ints, weight: Ints) -> None:
        """Count first_s, first_s + growth_s, ... (steps of them) of each run, each `weight` times."""
        before = int(self.counts.sum())
        count_runs(first_s, growth_s, steps, weight, _LOW, _HIGH, _SHIFT, self.counts, self._entries)
        self.zeros += int(steps @ weight) - (int(self.counts.sum()) - before)
        self.total_s += float((weight * steps * (first_s + 0.5 * (steps - 1) * growth_s)).sum())

    def distribution(self) -> dict[str, float]:
        """Mean and percentiles, as `traces.metrics.Summary` has them; the percentile is the value at the lower rank."""
        count = int(self.counts.sum()) + self.zeros
        if count == 0:
            return {"mean": math.nan} | {f"p{p:g}": math.nan for p in PERCENTILES}
        upto = np.cumsum(np.concatenate([[self.zeros], self.counts]))
        found = {"mean": self.total_s / count}
        for p in PERCENTILES:
            place = int(np.searchsorted(upto, int(p / 100 * (count - 1)), "right"))
            middle = _LOW + ((place - 1) << _SHIFT) + (1 << (_SHIFT - 1))
            found[f"p{p:g}"] = float(np.int64(middle).view(np.float64)) if place else 0.0
        return found


@dataclass(frozen=True)
class StreamResult:
    """What a deployment did with a stream of requests. rejected: requests longer than max_model_len."""

    summary: Summary
    steps: int
    busy_s: float
    preemptions: int
    rejected: int


def simulate_stream(
    chunks: Iterable[Trace], pool: Pool, tables: StepTables, *, policy: str = "paretune", k: int = 30
) -> StreamResult:
    """Serve the requests of all chunks, one after the other; each chunk begins where the one before ended, or later.

    Memory: that of a chunk and of the requests that live. Requests have no prefixes here, adapters or proposals.

    Raises: BadTrace: a chunk with prefixes or adapters, or one that begins before the last one ended. BadSpec: a pool
        that speculates, or routes by what its replicas hold; step times by the whole batch.
    """
    check_sums("where requests are streamed", tables)
    if pool.speculation != "none":
        raise BadSpec("pools.0.speculation", pool.speculation, "none where requests are streamed")
    if pool.router != "round_robin" and pool.replicas > 1:
        raise BadSpec("pools.0.router", pool.router, "round_robin where requests are streamed")
    return _Stream(pool, tables, policy, k).serve(chunks)


class _Stream:
    """The live requests, each in a row that another gets when it has ended, and the counts of those that have."""

    def __init__(self, pool: Pool, tables: StepTables, policy: str, k: int) -> None:
        self._pool, self._k, self._policy = pool, k, policy
        self._tables = tables._replace(draft=None)
        self._requests = Requests(np.zeros(0), np.zeros(0), *(np.zeros(0, np.int64) for _ in range(6)))
        self._times = Times(np.zeros(0), np.zeros(0), np.zeros(0))
        self._free = np.zeros(0, np.int64)
        self._replicas = [Replica(pool, self._run()) for _ in range(pool.replicas)]
        self._live = [0] * len(self._replicas)
        self._histograms = {name: Histogram() for name in ("ttft", f"ttf{k}", "tpot", "e2e", "itl")}
        self._counted = dict.fromkeys(("requests", "finished", "rejected", "short", "single", "tokens"), 0)
        self._span_s = [math.inf, -math.inf]

    def serve(self, chunks: Iterable[Trace]) -> StreamResult:
        last_s = -math.inf
        for chunk, until_s in _with_next_begin(chunks):
            if chunk.arrival_s[0] < last_s:
                raise BadTrace(f"{chunk.source}: arrival", chunk.arrival_s[0], f"at least {last_s}", "sort the chunks")
            if chunk.prefix is not None or (chunk.adapter is not None and self._pool.max_loras > 0):
                raise BadTrace(f"{chunk.source}", "prefixes or adapters", "neither, streamed", "simulate it whole")
            last_s = float(chunk.arrival_s[-1])
            self._take(chunk)
            for replica in self._replicas:
                replica.advance(until_s + self._tables.request_s[0])
                self._count_gaps(replica)
            self._forget_ended()
        return self._result()

    def _run(self) -> Run:
        none = np.zeros(0, np.int64)
        bounds = Bounds(none, np.zeros(0), none, none.copy(), np.zeros((0, len(self._times.end_s)), np.bool_))
        shared = (self._tables, None, self._requests, self._times, bounds)
        return Run(self._policy, none, 1, *shared, self._k, True, None)

    def _take(self, chunk: Trace) -> None:
        """Give each request a row, and each replica in turn its requests."""
        total = chunk.input_tokens.astype(np.int64) + chunk.output_tokens
        fits = total <= self._pool.max_model_len
        number = int(fits.sum())
        self._span_s[0] = min(self._span_s[0], float(chunk.arrival_s[0]))
        served = self._counted["requests"] - self._counted["rejected"]
        self._counted["requests"] += len(chunk)
        self._counted["rejected"] += len(chunk) - number
        if number > len(self._free):
            self._make_room(number - len(self._free))
        rows, self._free = self._free[:number], self._free[number:]
        requests, times = self._requests, self._times
        requests.scheduled_s[rows] = chunk.arrival_s[fits]
        requests.arrival_s[rows] = chunk.arrival_s[fits] + self._tables.request_s[0]
        requests.input_tokens[rows] = chunk.input_tokens[fits]
        requests.max_num_tokens[rows] = total[fits]
        for array in times:
            array[rows] = np.nan
        for index, replica in enumerate(self._replicas):
            first = (index - served) % len(self._replicas)
            mine = rows[first :: len(self._replicas)]
            waiting = replica.queue[replica.cursor[ARRIVED] : replica.cursor[QUEUED]]
            replica.queue = np.concatenate([waiting, mine])
            self._live[index] += len(mine)
            replica.ended = np.zeros(self._live[index], np.int64)
            replica.cursor[[ARRIVED, ENDED, RUNS, SINGLES]] = 0
            replica.cursor[QUEUED] = len(replica.queue)

    def _make_room(self, more: int) -> None:
        old = len(self._times.end_s)
        more = max(more, old)
        self._requests = Requests(*(np.concatenate([x, np.zeros(more, x.dtype)]) for x in self._requests))
        self._times = Times(*(np.concatenate([x, np.full(more, np.nan)]) for x in self._times))
        self._free = np.concatenate([self._free, np.arange(old, old + more)])
        for replica in self._replicas:
            replica.run = self._run()

    def _count_gaps(self, replica: Replica) -> None:
        """How long the steps were that this chunk took, each for as many requests as got a token before and after."""
        noted, runs, singles = replica.gaps, replica.cursor[RUNS], replica.cursor[SINGLES]
        itl = self._histograms["itl"]
        steps, weight = noted.run_steps[:runs], noted.run_weight[:runs]
        itl.add_runs(noted.run_first_s[:runs], noted.run_growth_s[:runs], steps, weight)
        itl.add(noted.to_s[:singles] - noted.from_s[:singles])

    def _forget_ended(self) -> None:
        requests, times, k = self._requests, self._times, self._k
        for index, replica in enumerate(self._replicas):
            rows = replica.ended[: replica.cursor[ENDED]]
            self._live[index] -= len(rows)
            self._free = np.concatenate([self._free, rows])
            scheduled_s, first_s, end_s = requests.scheduled_s[rows], times.first_s[rows], times.end_s[rows]
            answer = requests.max_num_tokens[rows] - requests.input_tokens[rows]
            several = answer > 1
            self._histograms["ttft"].add(first_s - scheduled_s)
            self._histograms["e2e"].add(end_s - scheduled_s)
            self._histograms[f"ttf{k}"].add(np.where(answer >= k, times.kth_s[rows], end_s) - scheduled_s)
            self._histograms["tpot"].add((end_s - first_s)[several] / (answer[several] - 1))
            self._counted["finished"] += len(rows)
            self._counted["short"] += int((answer < k).sum())
            self._counted["single"] += int((~several).sum())
            self._counted["tokens"] += int(answer.sum())
            if len(rows):
                self._span_s[1] = max(self._span_s[1], float(end_s.max()))

    def _result(self) -> StreamResult:
        counted, finished = self._counted, self._counted["finished"]
        duration_s = max(0.0, self._span_s[1] - self._span_s[0])
        values = {name: histogram.distribution() for name, histogram in self._histograms.items()}
        summary = Summary(
            requests=counted["requests"],
            finished=finished,
            short_of_k_share=counted["short"] / finished if finished else math.nan,
            tpot_undefined=counted["single"],
            duration_s=duration_s,
            output_tokens_per_s=counted["tokens"] / duration_s if duration_s > 0 else 0.0,
            values=values | {"ttft_from_send": values["ttft"]},
        )
        return StreamResult(
            summary=summary,
            steps=sum(int(each.cursor[STEPS]) for each in self._replicas),
            busy_s=sum(float(each.clock[1]) for each in self._replicas),
            preemptions=sum(int(each.state.counts[NUM_PREEMPTIONS]) for each in self._replicas),
            rejected=counted["rejected"],
        )


def _with_next_begin(chunks: Iterable[Trace]) -> Iterator[tuple[Trace, float]]:
    """Each chunk with the first arrival of the one that follows; infinity behind the last."""
    before: Trace | None = None
    for chunk in chunks:
        if before is not None:
            yield before, float(chunk.arrival_s[0])
        before = chunk
    if before is not None:
        yield before, math.inf
