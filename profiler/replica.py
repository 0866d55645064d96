"""One replica of the simulator on its own virtual clock: the requests routed to it, run through the event loop."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..runtime.decode_runs import new_decode_run
from ..runtime.scheduler_state import (
    NUM_BLOCKS_FROM_HOST,
    NUM_BLOCKS_TO_HOST,
    NUM_HOST_HIT_TOKENS,
    NUM_PREEMPTIONS,
    NUM_PREFIX_HIT_TOKENS,
    NUM_RUNNING,
    NUM_SWAPPED,
    NUM_WAITING,
    WAITING_HEAD,
    grow,
    new_plan,
    new_state,
)
from ..runtime.spec import Pool
from .event_loop import run_pipeline, run_replica
from .loop_notes import (
    ARRIVED,
    BEGUN,
    DRAINED,
    ENDED,
    OUT_OF_ROOM,
    OUT_OF_SLOTS,
    QUEUED,
    RUNS,
    SINGLES,
    STEPS,
    Bounds,
    Gaps,
    Requests,
    Times,
)
from .speculative_loop import Chances, run_speculative
from .step_record import Recorder
from .step_time import StepTables
from .token_gaps import ReplicaGaps

_FIRST_PLACES = 1024  # of a queue that grows
# A bound on when something ends is a sum of many steps; their rounding must not make it a little too late.
_ROUNDING = 1.0 - 1e-9

# fields of SimulationResult that the scheduler counts
TOTALS = {
    "preemptions": NUM_PREEMPTIONS,
    "swaps": NUM_SWAPPED,
    "prefix_hit_tokens": NUM_PREFIX_HIT_TOKENS,
    "host_hit_tokens": NUM_HOST_HIT_TOKENS,
    "blocks_to_host": NUM_BLOCKS_TO_HOST,
    "blocks_from_host": NUM_BLOCKS_FROM_HOST,
}


class Totals(NamedTuple):
    """What one replica did, as in SimulationResult."""

    steps: int
    busy_s: float
    counted: NDArray[np.int64]  # the counts that TOTALS names
    gaps: ReplicaGaps | None  # None: not noted


class Run(NamedTuple):
    """What all replicas share."""

    policy: str
    hashes: NDArray[np.int64]
    blocks_per_hash: int
    tables: StepTables
    draft_tables: StepTables | None
    requests: Requests
    times: Times
    bounds: Bounds
    k: int
    jump: bool
    chances: Chances | None  # None: nothing is proposed
    recorder: Recorder | None = None  # None: nothing is written down


class Replica:
    """One replica on its own virtual clock.

    queue, ended, cursor, clock  as in `run_replica`
    """

    def __init__(self, pool: Pool, run: Run, queue: NDArray[np.int64] | None = None) -> None:
        """queue: rows of the requests that it gets, where that is known beforehand."""
        self.state = new_state(
            pool, policy=run.policy, hashes=run.hashes, blocks_per_hash=run.blocks_per_hash, own_content=True
        )
        self.queue = np.zeros(_FIRST_PLACES, np.int64) if queue is None else queue
        self.ended = np.zeros_like(self.queue)
        self.cursor = np.zeros(8, np.int64)
        self.cursor[QUEUED] = 0 if queue is None else len(queue)
        self.clock = np.zeros(3 + pool.pipeline_parallel_size)
        self._outstanding_tokens = 0
        self._plans = tuple(new_plan(pool) for _ in range(pool.pipeline_parallel_size))
        self._decode_run = new_decode_run(pool)
        self.run = run
        self._sums = None if run.recorder is None else run.recorder.replica(pool.pipeline_parallel_size)
        self._gone = 0
        self._taken = 0
        self._least_step_s = _least_step_s(run.tables)
        self._most_tokens = 1 if run.chances is None else 1 + int(run.chances.most[0])  # of a request in a step
        runs, singles = 1024 + 6 * len(self.queue), 2 * pool.max_num_seqs * self._most_tokens
        self.gaps = Gaps(
            np.zeros(len(self.state.request_id)),
            *(np.empty(runs), np.empty(runs), np.empty(runs, np.int64), np.empty(runs), np.empty(runs, np.int64)),
            *(np.empty(singles, np.int64), np.empty(singles), np.empty(singles)),
        )

    def add(self, request: int) -> None:
        if self.cursor[QUEUED] == len(self.queue):
            self.queue, self.ended = (np.concatenate([x, np.zeros_like(x)]) for x in (self.queue, self.ended))
        self.queue[self.cursor[QUEUED]] = request
        self.cursor[QUEUED] += 1
        self._outstanding_tokens += int(self.run.requests.max_num_tokens[request])

    @property
    def now_s(self) -> float:
        """Its clock, which stands still while it has nothing to do."""
        return float(self.clock[0])

    @property
    def num_requests(self) -> int:
        """Requests that it has and that have not ended on its clock: running, waiting, and not seen yet."""
        alive = self.state.counts[NUM_RUNNING] + self.state.counts[NUM_WAITING]
        return int(alive + self.cursor[QUEUED] - self.cursor[ARRIVED])

    def num_requests_at(self, now_s: float) -> int:
        """The same at a time that its clock may have passed, in the step under way: those that end in it count."""
        client_s = self.run.tables.request_s[1]
        number = self.num_requests
        for request in self.ended[: self.cursor[ENDED]][::-1]:
            if self.run.times.end_s[request] - client_s <= now_s:
                break
            number += 1
        return number

    @property
    def num_waiting(self) -> int:
        """Of its requests, those that no step has admitted."""
        return int(self.state.counts[NUM_WAITING] + self.cursor[QUEUED] - self.cursor[ARRIVED])

    def advance(self, until_s: float, stop_at_end: bool = False) -> int:
        """Compute every step that begins before until_s, or up to one with which a request ends; returns why it ended.

        A run of decode steps in which nobody could be admitted is computed to its end, which may be past until_s.
        """
        if self.clock[0] >= until_s or self.num_requests == 0:
            return DRAINED
        while (status := self._loop(until_s, stop_at_end)) in (OUT_OF_SLOTS, OUT_OF_ROOM):
            if status == OUT_OF_SLOTS:
                self.state = grow(self.state)
            self.gaps = self._grown_gaps()
        return int(status)

    def take_ended(self) -> list[int]:
        """Rows of the requests that have ended since this was last asked, in order."""
        taken, self._taken = self._taken, int(self.cursor[ENDED])
        found: list[int] = self.ended[taken : self._taken].tolist()
        return found

    def least_end_s(self) -> float:
        """A time before which none of its requests ends, on its clock; infinite where it has none.

        As many steps as the request that lacks the fewest tokens takes at least, each no shorter than the shortest.
        """
        if self.num_requests == 0:
            return math.inf
        state, queued = self.state, self.queue[self.cursor[ARRIVED] : self.cursor[QUEUED]]
        place = state.counts[WAITING_HEAD] + np.arange(state.counts[NUM_WAITING])
        slots = np.concatenate([state.running[: state.counts[NUM_RUNNING]], state.waiting[place % len(state.waiting)]])
        requests = self.run.requests
        lacks = np.concatenate(
            [
                state.max_num_tokens[slots] - state.num_tokens[slots],
                requests.max_num_tokens[queued] - requests.input_tokens[queued],
            ]
        )
        # steps of a pipeline that are under way end at a time that is known
        under_way = int(self.cursor[BEGUN] - self.cursor[STEPS]) if len(self._plans) > 1 else 0
        steps = max(0, -(-int(lacks.min()) // self._most_tokens) - (under_way > 0))
        from_s = float(self.clock[0])
        if not len(slots):
            from_s = max(from_s, float(requests.arrival_s[queued].min()))
        return from_s + steps * self._least_step_s * _ROUNDING

    def _grown_gaps(self) -> Gaps:
        """Room for the gaps of more steps, where there is little left, and for those of all slots."""
        runs, singles = self.cursor[RUNS], self.cursor[SINGLES]
        most_singles = self.state.running.shape[0] * self._most_tokens
        more_runs = len(self.gaps.run_steps) if 2 * runs > len(self.gaps.run_steps) else 0
        more_singles = len(self.gaps.request) if singles + most_singles > len(self.gaps.request) // 2 else 0
        more = {"last_s": len(self.state.request_id) - len(self.gaps.last_s)}
        more |= dict.fromkeys(("run_first_s", "run_growth_s", "run_steps", "run_end_s", "run_weight"), more_runs)
        more |= dict.fromkeys(("request", "from_s", "to_s"), more_singles)
        return Gaps(
            **{
                name: np.concatenate([array, np.zeros(more[name], array.dtype)]) if more[name] else array
                for name, array in self.gaps._asdict().items()
            }
        )

    def outstanding_tokens(self, now_s: float) -> int:
        """Tokens that its requests may take which have not ended; `advance` has brought it to now_s."""
        requests, times = self.run.requests, self.run.times
        client_s = self.run.tables.request_s[1]
        while self._gone < self.cursor[ENDED]:
            request = self.ended[self._gone]
            if times.end_s[request] - client_s > now_s:
                break
            self._outstanding_tokens -= int(requests.max_num_tokens[request])
            self._gone += 1
        return self._outstanding_tokens

    def _loop(self, until_s: float, stop_at_end: bool) -> int:
        run, own = self.run, (self.queue, self.ended, self.cursor, self.clock, until_s, stop_at_end)
        shared = (run.tables, run.requests, run.times, self.gaps, run.bounds, run.k)
        if run.recorder is not None and self._sums is not None:
            seen = (self._sums, self.state, self._plans, run.tables, run.draft_tables)
            asked = (run.requests, run.times, run.bounds, run.k, run.chances)
            places = (self.queue, self.ended, self.cursor, self.clock)
            return run.recorder.run(*seen, *asked, *places, until_s=until_s, stop_at_end=stop_at_end)
        if len(self._plans) > 1:
            return run_pipeline(self.state, self._plans, *shared, *own)
        if run.chances is not None:
            draft = run.tables if run.draft_tables is None else run.draft_tables
            first = (self.state, self._plans[0], run.tables, draft, *shared[1:])
            return run_speculative(*first, run.chances, *own)
        return run_replica(self.state, self._plans[0], self._decode_run, *shared, run.jump, *own)

    def totals(self) -> Totals:
        counted = self.state.counts[list(TOTALS.values())]
        gaps = None if self._sums is not None else self._noted_gaps()
        return Totals(int(self.cursor[STEPS]), float(self.clock[1]), counted, gaps)

    def _noted_gaps(self) -> ReplicaGaps:
        runs, singles, noted = self.cursor[RUNS], self.cursor[SINGLES], self.gaps
        return ReplicaGaps(
            noted.run_first_s[:runs],
            noted.run_growth_s[:runs],
            noted.run_steps[:runs],
            noted.run_end_s[:runs],
            noted.run_weight[:runs],
            noted.request[:singles],
            noted.from_s[:singles],
            noted.to_s[:singles],
            self.ended[: self.cursor[ENDED]],
            bool(self.cursor[ENDED] == self.cursor[QUEUED]),
        )


def _least_step_s(tables: StepTables) -> float:
    """No step is shorter: the least of each part that every step has."""
    return float(tables.tokens_s[1:].min() + tables.rows_s[1:].min() + tables.samples_s.min())
