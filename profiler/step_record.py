"""The simulator with its eyes open: every step is written down, and every second of every request counted to a part.

One loop for plain decoding, pipelines and speculation, step by step, around the same compiled functions of the
scheduler. Its times are those of the fast loops (event_loop.py, speculative_loop.py), which it takes no part in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit
from ..runtime import kv_cache
from ..runtime.scheduler import commit
from ..runtime.scheduler_state import (
    NUM_RUNNING,
    NUM_WAITING,
    PLAN_PREEMPTED,
    PLAN_SIZE,
    PLAN_TOKENS,
    Plan,
    State,
)
from .loop_notes import (
    ARRIVED,
    BEGUN,
    DRAINED,
    ENDED,
    OUT_OF_SLOTS,
    PAUSED,
    QUEUED,
    STEPS,
    Bounds,
    Requests,
    Times,
    admit,
    awake_s,
    note_ended,
    note_token_times,
    schedule_carrying,
)
from .speculative_loop import Chances, accept, draft_time_s, propose
from .step_limits import RESOURCES, LimitTables
from .step_parts import (
    PARTS,
    RUNS,
    SCRATCH_ROWS,
    STEP_FLOATS,
    STEP_INTS,
    SUMS_ROWS,
    WAS_PREEMPTED,
    Record,
    ReplicaSums,
    count_arrivals,
    count_step,
    count_wait,
    why_they_queue,
)
from .step_time import StepTables, adapters_s, composed_time_s, composition, copies_s, fills_s

LOG_FULL = 5  # why the loop returned, beside event_loop's reasons

_FIRST_STEPS = 4096


@njit
def record_replica(
    state: State,
    plans: tuple[Plan, ...],
    tables: StepTables,
    draft_tables: StepTables,
    limits: LimitTables,
    draft_limits: LimitTables,
    requests: Requests,
    times: Times,
    bounds: Bounds,
    k: int,
    chances: Chances,
    record: Record,
    sums: ReplicaSums,
    queue: NDArray[np.int64],
    ended: NDArray[np.int64],
    cursor: NDArray[np.int64],
    clock: NDArray[np.float64],
    until_s: float,
    stop_at_end: bool,
) -> int:
    """`event_loop.run_pipeline`, of one stage or several, with proposals where `chances.most` has any, and recording.

    Returns: as there, and LOG_FULL: the step log needs room.
    """
    stages = len(plans)
    speculates = chances.most[0] > 0
    drafts = chances.most[1] > 0
    now_s = clock[0]
    client_s = tables.request_s[1]
    seen = cursor[ENDED]
    while True:
        if stop_at_end and cursor[ENDED] > seen:
            status = PAUSED
            break
        arrived = cursor[ARRIVED]
        now_s = awake_s(state, tables, requests, queue, cursor, now_s, clock[2])
        all_in = admit(state, requests, queue, cursor, now_s)
        idle_s = now_s - clock[2] if cursor[BEGUN] == cursor[STEPS] else 0.0
        count_arrivals(record, sums, requests, queue, arrived, cursor[ARRIVED], now_s, idle_s)
        if not all_in:
            status = OUT_OF_SLOTS
            break
        if now_s >= until_s:
            status = PAUSED
            break
        if record.counts[0] >= record.floats.shape[0]:
            status = LOG_FULL
            break
        began_s = now_s
        while cursor[BEGUN] - cursor[STEPS] < stages:
            number = cursor[BEGUN] % stages
            plan = plans[number]
            if speculates:
                propose(state, chances)
            schedule_carrying(state, plan, cursor)
            for i in range(plan.counts[PLAN_PREEMPTED]):
                request = state.request_id[plan.preempted[i]]
                count_wait(record, sums, stages, request, now_s)
                record.waits[request] = WAS_PREEMPTED
            size = plan.counts[PLAN_SIZE]
            if size == 0:
                break
            samples, context, pairs = composition(plan, tables.prompt_pairs)
            for row in range(size):
                slot = plan.slot[row]
                if state.in_flight[slot] == 1:  # this plan is the only one with a part of it
                    count_wait(record, sums, stages, state.request_id[slot], now_s)
                    record.waits[state.request_id[slot]] = RUNS
                samples += plan.num_drafts[row] * speculates
            step_s = composed_time_s(tables, plan.counts[PLAN_TOKENS], size, samples, context, pairs)
            sums.adapters_s[number] = adapters_s(tables, state, plan, 0)
            step_s += copies_s(tables, plan) + fills_s(tables, plan) + sums.adapters_s[number]
            if drafts:
                step_s += draft_time_s(draft_tables, plan)
            sums.reason[number] = why_they_queue(state, plan)
            sums.began_s[number] = now_s
            sums.stood[number, 0] = state.counts[NUM_RUNNING]
            sums.stood[number, 1] = state.counts[NUM_WAITING]
            sums.stood[number, 2] = kv_cache.num_blocks(state.blocks) - kv_cache.num_available(state.blocks)
            sums.stood[number, 3] = plan.counts[PLAN_PREEMPTED]
            clock[2] = max(now_s + step_s, clock[2] + step_s / stages)
            clock[3 + number] = clock[2]
            now_s += step_s / stages
            cursor[BEGUN] += 1
        if cursor[BEGUN] == cursor[STEPS]:
            if plan.counts[PLAN_PREEMPTED] > 0:
                continue
            if cursor[ARRIVED] == cursor[QUEUED]:
                status = DRAINED
                break
            now_s = requests.arrival_s[queue[cursor[ARRIVED]]]
            continue
        number = cursor[STEPS] % stages
        plan = plans[number]
        now_s = max(now_s, clock[3 + number])
        clock[1] += now_s - began_s
        if speculates:
            accept(state, plan, chances)
        beside = (copies_s(tables, plan), fills_s(tables, plan), sums.adapters_s[number])
        count_step(state, plan, limits, draft_limits, drafts, beside, record, sums, number, stages, k, now_s)
        note_token_times(state, plan, times, k, now_s + client_s)
        commit(state, plan)
        cursor[STEPS] += 1
        note_ended(state, plan, requests, times, bounds, k, ended, cursor, now_s + client_s)
    clock[0] = now_s
    return status


@dataclass(frozen=True)
class Gaps:
    """Which gaps between tokens are taken apart: those from low_s to high_s; every gap is collected."""

    low_s: float
    high_s: float


class Recorder:
    """Hand it to `simulate`, which fills it: parts by request, and the step log.

    record  what was written down so far (step_parts.Record)
    """

    def __init__(self, limits: LimitTables, draft_limits: LimitTables | None = None, gaps: Gaps | None = None) -> None:
        """
        Args:
            limits, draft_limits: of the tables that `simulate` is given (step_limits.limit_tables).
            gaps: take the time between tokens apart, too; left out: do not collect it.
        """
        self._limits = limits
        self._draft_limits = limits if draft_limits is None else draft_limits
        self._gaps = gaps
        self._replicas = 0
        self.record: Record | None = None

    def begin(self, n: int, output_tokens: int) -> None:
        """For a run of n requests that bring so many tokens."""
        parts = (n, len(PARTS), len(RESOURCES))
        gaps = self._gaps
        self._replicas = 0
        self.record = Record(
            parts=np.zeros(parts),
            at_first=np.full(parts, np.nan),
            at_kth=np.full(parts, np.nan),
            at_token=np.zeros(parts if gaps else (0, *parts[1:])),
            seen=np.zeros((n, SUMS_ROWS, len(RESOURCES))),
            last_s=np.zeros(n),
            token_s=np.zeros(n),
            waits=np.zeros(n, np.int64),
            computed=np.zeros(n, np.int64),
            gaps=np.zeros(output_tokens if gaps else 0),
            band=np.array([gaps.low_s, gaps.high_s] if gaps else [0.0, 0.0]),
            band_parts=np.zeros(parts[1:]),
            band_sum=np.zeros(2),
            floats=np.zeros((_FIRST_STEPS, len(STEP_FLOATS))),
            ints=np.zeros((_FIRST_STEPS, len(STEP_INTS)), np.int64),
            counts=np.zeros(2, np.int64),
            scratch=np.zeros((SCRATCH_ROWS, len(RESOURCES))),
        )

    def replica(self, stages: int) -> ReplicaSums:
        """The sums of one more replica."""
        number, self._replicas = self._replicas, self._replicas + 1
        return ReplicaSums(
            seconds=np.zeros((SUMS_ROWS, len(RESOURCES))),
            number=number,
            reason=np.zeros(stages, np.int64),
            began_s=np.zeros(stages),
            adapters_s=np.zeros(stages),
            stood=np.zeros((stages, 4), np.int64),
        )

    def run(
        self,
        sums: ReplicaSums,
        state: State,
        plans: tuple[Plan, ...],
        tables: StepTables,
        draft_tables: StepTables | None,
        requests: Requests,
        times: Times,
        bounds: Bounds,
        k: int,
        chances: Chances | None,
        queue: NDArray[np.int64],
        ended: NDArray[np.int64],
        cursor: NDArray[np.int64],
        clock: NDArray[np.float64],
        until_s: float,
        stop_at_end: bool,
    ) -> int:
        """Go on with a replica, as in `event_loop.run_replica`."""
        draft = tables if draft_tables is None else draft_tables
        if chances is None:
            nothing = np.zeros(0)
            chances = Chances(nothing, nothing, np.zeros(2, np.int64), np.zeros(3, np.int64))
        while True:
            assert self.record is not None, "begin comes first"
            status = record_replica(
                state, plans, tables, draft, self._limits, self._draft_limits, requests, times, bounds, k, chances,
                self.record, sums, queue, ended, cursor, clock, until_s, stop_at_end,
            )  # fmt: skip
            if status != LOG_FULL:
                return int(status)
            floats, ints = self.record.floats, self.record.ints
            self.record = self.record._replace(
                floats=np.concatenate([floats, np.zeros_like(floats)]), ints=np.concatenate([ints, np.zeros_like(ints)])
            )
