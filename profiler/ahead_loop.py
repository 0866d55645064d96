"""The event loop of engines that compose a step while the one before still computes, on one rank or on several in time.

vLLM does so by default since 0.14 (async scheduling, vllm/v1/engine/core.py: step_with_batch_queue). Step n + 1 is
composed when step n - 1 has ended, so a request that arrives while n computes is first computed in step n + 2: it
waits for the rest of a step and for a whole one. Seats of requests that end with step n are free from n + 2 on.

With data parallelism and experts divided among the ranks every rank has its own scheduler and cache, and all of them
step together. A new request goes to the rank with the least 4 x waiting + running, by counts that a coordinator brings
up to date every 100 ms, to which the front adds 4 for each one that it sent since (vllm/v1/engine/core_client.py:
DPLBAsyncMPClient).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..kernels.jit import njit
from ..runtime.scheduler import add_request, commit, schedule
from ..runtime.scheduler_state import (
    MAX_NUM_SEQS,
    NUM_FREE_SLOTS,
    NUM_RUNNING,
    NUM_WAITING,
    PLAN_FINISHED,
    PLAN_PREEMPTED,
    PLAN_SIZE,
    Plan,
    State,
)
from .batch_time import BatchTables, step_time_s
from .loop_notes import DRAINED, OUT_OF_SLOTS, Requests, Times

COUNTS_EVERY_S = 0.1  # vllm/v1/engine/coordinator.py: min_stats_update_interval_ms
WAITING_WEIGHT = 4

# places in the cursor
ARRIVED = 0  # rows of the queue that have a rank
STEPS = 1

# places in the clock
NOW = 0
BUSY = 1
BEGAN = 2  # the step computed last; -1 where none follows upon it
COUNTED = 3  # when the counts were taken


@njit
def _rank(states: tuple[State, ...], counts: NDArray[np.int64], clock: NDArray[np.float64], arrival_s: float) -> int:
    """Where a request goes that arrives now."""
    if len(states) == 1:
        return 0
    if arrival_s >= clock[COUNTED] + COUNTS_EVERY_S:
        for rank in range(len(states)):
            state = states[rank]
            counts[rank] = WAITING_WEIGHT * state.counts[NUM_WAITING] + state.counts[NUM_RUNNING]
        clock[COUNTED] = arrival_s
    best = 0
    for rank in range(1, len(states)):
        if counts[rank] < counts[best]:
            best = rank
    counts[best] += WAITING_WEIGHT
    return best


@njit
def run_ahead(
    states: tuple[State, ...],
    plans: tuple[Plan, ...],
    tables: BatchTables,
    requests: Requests,
    times: Times,
    k: int,
    queue: NDArray[np.int64],
    cursor: NDArray[np.int64],
    clock: NDArray[np.float64],
    counts: NDArray[np.int64],
    ended: NDArray[np.int64],
) -> int:
    """Serve the queue to its end on ranks that step together; returns why the loop ended.

    queue (m,) int64: rows of `requests` in order; cursor (2,) int64, clock (4,) float64: in the places named above;
    counts, ended (ranks,) int64: who waits and runs by the last count, and who ended with the last step. All are read
    and written, so that a run that was out of slots goes on where it stopped.
    """
    client_s = tables.request_s[1]
    while True:
        now_s = clock[NOW]
        seen_s = clock[BEGAN] if tables.ahead and clock[BEGAN] >= 0.0 else now_s
        while cursor[ARRIVED] < queue.shape[0] and requests.arrival_s[queue[cursor[ARRIVED]]] <= seen_s:
            for state in states:
                if state.counts[NUM_FREE_SLOTS] == 0:
                    return OUT_OF_SLOTS
            request = queue[cursor[ARRIVED]]
            rank = _rank(states, counts, clock, requests.arrival_s[request])
            add_request(
                states[rank],
                request,
                requests.input_tokens[request],
                requests.max_num_tokens[request],
                requests.hash_start[request],
                requests.num_hashes[request],
                requests.priority[request],
                requests.adapter[request],
            )
            cursor[ARRIVED] += 1
        rows, preempted = 0, 0
        for rank in range(len(states)):
            state, plan = states[rank], plans[rank]
            taken = ended[rank] if tables.ahead else 0
            state.limits[MAX_NUM_SEQS] -= taken
            schedule(state, plan)
            state.limits[MAX_NUM_SEQS] += taken
            rows += plan.counts[PLAN_SIZE]
            preempted += plan.counts[PLAN_PREEMPTED]
        if rows == 0:
            ended[:] = 0
            if preempted > 0:
                continue
            if clock[BEGAN] >= 0.0:  # nothing follows: what has come meanwhile is seen at the end of the step
                clock[BEGAN] = -1.0
                continue
            if cursor[ARRIVED] == queue.shape[0]:
                return DRAINED
            clock[NOW] = max(now_s, requests.arrival_s[queue[cursor[ARRIVED]]])
            continue
        step_s = step_time_s(tables, plans)
        clock[BEGAN] = now_s
        now_s += step_s
        clock[NOW] = now_s
        clock[BUSY] += step_s
        cursor[STEPS] += 1
        for rank in range(len(states)):
            state, plan = states[rank], plans[rank]
            for row in range(plan.counts[PLAN_SIZE]):
                if plan.samples[row]:
                    slot = plan.slot[row]
                    before = state.num_tokens[slot] - state.num_prompt_tokens[slot]
                    request = state.request_id[slot]
                    if before == 0:
                        times.first_s[request] = now_s + client_s
                    if before + 1 == k:
                        times.kth_s[request] = now_s + client_s
            commit(state, plan)
            ended[rank] = plan.counts[PLAN_FINISHED]
            for i in range(plan.counts[PLAN_FINISHED]):
                times.end_s[state.request_id[plan.finished[i]]] = now_s + client_s
