"""Replay a trace on a virtual clock, with the runtime's own scheduler and a step-time model.

Requests go to replicas as the server's router sends them; each replica runs through the event loop (event_loop.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.router import new_router, num_prefix_hashes, route
from ..runtime.scheduler_state import grow, new_plan, new_state
from ..runtime.spec import BadSpec, Pool
from ..runtime.speculated import Speculated
from ..traces.acceptance import by_request, total
from ..traces.metrics import RequestTimes, Target
from ..traces.prefix import blocks_per_hash
from ..traces.sessions import DependentArrivals, SendOrder, open_loop
from ..traces.trace import BadTrace, Trace
from .ahead_loop import run_ahead
from .autoscale import Autoscaler, ElasticFleet
from .batch_time import BatchTables
from .event_order import Fleet, Held, serve_in_order
from .loop_notes import DRAINED, GAVE_UP, METRIC_CODE, OUT_OF_SLOTS, Bounds, Requests, Times
from .replica import TOTALS, Replica, Run, Totals
from .speculative_loop import Chances
from .step_record import Recorder
from .step_time import StepTables
from .token_gaps import StepGaps


@dataclass(frozen=True)
class SimulationResult:
    """What a deployment did with a trace, on a virtual clock.

    times              when each request's tokens reached the client; a request longer than max_model_len never finishes
    steps              steps computed, all replicas together
    busy_s             seconds of computing, summed over replicas
    preemptions        times that a request gave its blocks back
    swaps              of these, times that its blocks went to the host; the others are computed again
    prefix_hit_tokens  tokens that were found in the prefix cache, on the device
    host_hit_tokens    tokens that were found in the prefix cache, on the host only
    blocks_to_host, blocks_from_host  blocks copied, which steps wait for
    drafts, draft_tokens, accepted_tokens  of speculation, as in runtime.speculated
    rejected           requests longer than max_model_len
    gave_up            stopped early, because a target could no longer be met: the times are incomplete
    held               replicas that were held, and from when to when; empty: all of the pool, all the time
    """

    times: RequestTimes
    steps: int
    busy_s: float
    preemptions: int
    swaps: int
    prefix_hit_tokens: int
    host_hit_tokens: int
    blocks_to_host: int
    blocks_from_host: int
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    rejected: int
    gave_up: bool
    held: tuple[Held, ...] = ()


def _bounds(trace: Trace, targets: Sequence[Target], k: int) -> Bounds:
    """Targets as arrays; those in metrics the event loop does not see (ITL, other k) are left to the caller."""
    seen = [t for t in targets if t.metric.name in METRIC_CODE and t.metric.k in (0, k)]
    governs = np.zeros((len(seen), len(trace)), np.bool_)
    for i, target in enumerate(seen):
        governs[i] = governed_rows(trace, target)
    # the percentile interpolates between ranks: with this many late requests both neighbors are late
    allowed = [math.ceil((1 - t.percentile / 100) * (int(rows.sum()) - 1)) + 1 for t, rows in zip(seen, governs)]
    return Bounds(
        metric=np.array([METRIC_CODE[t.metric.name] for t in seen], np.int64),
        limit_s=np.array([t.limit_s for t in seen], np.float64),
        allowed_late=np.array(allowed, np.int64),
        late=np.zeros(len(seen), np.int64),
        governs=governs,
    )


def governed_rows(trace: Trace, target: Target) -> NDArray[np.bool_]:
    """The requests a target speaks about: as the trace says for its own targets, else those of the target's app."""
    if target in trace.targets:
        return trace.rows(target)
    if target.app is None:
        return np.ones(len(trace), np.bool_)
    if trace.app is None or target.app not in trace.app.names:
        return np.zeros(len(trace), np.bool_)
    return np.asarray(trace.app.codes == trace.app.names.index(target.app), np.bool_)


def _serve_in_turn(pool: Pool, run: Run, rows: NDArray[np.int64]) -> tuple[int, list[Totals]]:
    """Round robin: who gets what is known beforehand, so that one replica after the other runs through."""
    totals = []
    status = DRAINED
    for index in range(pool.replicas):
        replica = Replica(pool, run, rows[index :: pool.replicas].copy())
        status = replica.advance(math.inf)
        totals.append(replica.totals())
        if status == GAVE_UP:
            break
    return status, totals


def _serve_routed(pool: Pool, run: Run, rows: NDArray[np.int64], most_hashes: int) -> tuple[int, list[Totals]]:
    """Route each request by how the replicas stand when it arrives, which takes all of them there first."""
    replicas = [Replica(pool, run) for _ in range(pool.replicas)]
    router = new_router(pool)
    requests = run.requests
    status = DRAINED
    for row in rows.tolist():
        arrival_s = float(requests.arrival_s[row])
        if GAVE_UP in [replica.advance(arrival_s) for replica in replicas]:
            status = GAVE_UP
            break
        outstanding = np.array([replica.outstanding_tokens(arrival_s) for replica in replicas], np.int64)
        first, hashes = requests.hash_start[row], min(most_hashes, requests.num_hashes[row])
        prefix = run.hashes[first : first + hashes]
        replicas[route(router, outstanding, int(requests.max_num_tokens[row]), prefix)].add(row)
    else:
        if GAVE_UP in [replica.advance(math.inf) for replica in replicas]:
            status = GAVE_UP
    return status, [replica.totals() for replica in replicas]


def _serve_in_time(pool: Pool, run: Run, rows: NDArray[np.int64], batch: BatchTables) -> tuple[int, list[Totals]]:
    """Step times by the batch: groups of `batch.ranks` replicas that step together, requests to them in turn."""
    groups = pool.replicas // batch.ranks
    totals = []
    for index in range(groups):
        queue = rows[index::groups].copy()
        states = tuple(
            new_state(pool, policy=run.policy, hashes=run.hashes, blocks_per_hash=run.blocks_per_hash, own_content=True)
            for _ in range(batch.ranks)
        )
        plans = tuple(new_plan(pool) for _ in range(batch.ranks))
        cursor, clock = np.zeros(2, np.int64), np.array([0.0, 0.0, -1.0, -math.inf])
        counts, ended = np.zeros(batch.ranks, np.int64), np.zeros(batch.ranks, np.int64)
        own = (queue, cursor, clock, counts, ended)
        while run_ahead(states, plans, batch, run.requests, run.times, run.k, *own) == OUT_OF_SLOTS:
            states = tuple(grow(state) for state in states)
        counted = np.sum([state.counts[list(TOTALS.values())] for state in states], axis=0)
        totals.append(Totals(int(cursor[1]), float(clock[1]), counted, None))
    return DRAINED, totals


def _check_in_time(
    pool: Pool, batch: BatchTables, arrivals: DependentArrivals | None, autoscaler: Autoscaler | None
) -> None:
    """Raises: BadSpec: step times by the batch do not hold for such a pool, or such a run."""
    if arrivals is not None or autoscaler is not None:
        found = "requests that wait for others" if autoscaler is None else "autoscaling"
        allowed = "recorded arrivals and a fixed number of replicas, where step times are known by the batch"
        raise BadSpec("step times", found, f"{allowed}; or step times of a profile or a data sheet")
    todo = "1, where step times are known by the batch"
    if pool.pipeline_parallel_size > 1:
        raise BadSpec("pools.0.pipeline_parallel_size", pool.pipeline_parallel_size, todo)
    if pool.speculation != "none":
        raise BadSpec("pools.0.speculation", pool.speculation, "none, where step times are known by the batch")
    if pool.router != "round_robin":
        raise BadSpec("pools.0.router", pool.router, "round_robin, where step times are known by the batch")
    if pool.replicas % batch.ranks:
        raise BadSpec("pools.0.replicas", pool.replicas, f"a multiple of {batch.ranks}, which step together")


def chances_of(trace: Trace, pool: Pool) -> Chances | None:
    """What speculation brings each request, as the trace recorded it; None: the pool does not speculate."""
    if pool.speculation == "none":
        return None
    if pool.pipeline_parallel_size > 1:
        found = f"{pool.speculation} with pipeline_parallel_size {pool.pipeline_parallel_size}"
        raise BadSpec("pools.0.speculation", found, "none with several stages")
    # where n-grams found nothing to propose, that says something of n-grams, and nothing of a draft model
    if not trace.acceptance or (pool.draft_model and total(trace.acceptance).drafts == 0):
        todo = "serve some of this traffic with speculation on, and take that server's request log"
        raise BadTrace(f"{trace.source}: speculation", "not recorded", "how often proposals were kept", todo)
    drafted, probability = by_request(trace.acceptance, trace.app, len(trace))
    if pool.draft_model:  # it has something to say in every step
        drafted = np.ones(len(trace))
    most = np.array([pool.num_speculative_tokens, int(bool(pool.draft_model))], np.int64)
    return Chances(drafted, probability, most, np.zeros(3, np.int64))


def simulate(
    trace: Trace,
    pool: Pool,
    tables: StepTables,
    *,
    policy: str = "paretune",
    k: int = 30,
    rate: float = 1.0,
    priority: Sequence[int] | None = None,
    give_up: Sequence[Target] = (),
    jump: bool = True,
    recorder: Recorder | None = None,
    arrivals: DependentArrivals | None = None,
    autoscaler: Autoscaler | None = None,
) -> SimulationResult:
    """Serve a trace on a virtual clock.

    Requests go to the pool's replicas as the server's router sends them (runtime/router.py). With max_loras they wait
    for their adapters' slots and share prefixes with those of their adapter alone, as in the engine; a pool that takes
    no adapters serves them on the base.

    Args:
        trace: the requests; their recorded output lengths are taken as known to the client, not to the scheduler.
        pool: limits, cache and number of replicas.
        tables: step times of one replica.
        policy: `Deployment.scheduler_policy`.
        k: of TTF-k.
        rate: arrivals are that many times as fast as recorded.
        priority: of each request, where the pool schedules by it, lower first; left out (a log has none): all equal.
        give_up: stop as soon as one of these can no longer be met (for searches, which need no exact figure then).
        jump: take runs of equal decode steps at once; False steps one by one, to check the jumps.
        recorder: is told of every step, one by one, and where the time of every request goes; no run is given up then.
        arrivals: which requests wait for others' ends (traces/sessions.py); left out: an open loop, as recorded.
        autoscaler: how many replicas there are, from time to time, in place of the pool's number.
    Returns: times by request in trace order, and what it took.
    Raises: BadTrace: the trace's prefix blocks do not cover whole KV blocks, or it does not say how often proposals
        are kept, and the pool speculates. BadSpec: a pool that speculates in several stages, or step times by the batch
        where requests wait for others or replicas come and go. ValueError: no positive rate.
    """
    if not 0 < rate < math.inf:
        raise ValueError(f"rate must be a positive number, not {rate}")
    n = len(trace)
    times = Times(np.full(n, np.nan), np.full(n, np.nan), np.full(n, np.nan))
    scheduled_s = trace.arrival_s / rate
    input_tokens = trace.input_tokens.astype(np.int64)
    max_num_tokens = input_tokens + trace.output_tokens
    fits = max_num_tokens <= pool.max_model_len
    offsets = np.zeros(n + 1, np.int64) if trace.prefix is None else trace.prefix.offsets
    # a trace's arrays are read-only, which is another type to Numba: without the copy everything compiles twice
    hashes = np.zeros(0, np.int64) if trace.prefix is None else trace.prefix.hashes.copy()
    per_hash = 1 if trace.prefix is None else blocks_per_hash(trace.prefix.block_size, pool.block_size)
    priorities = np.zeros(n, np.int64) if priority is None else np.array(priority, np.int64)
    if priorities.shape != (n,):
        raise ValueError(f"priority must have one number for each of {n} requests, not shape {priorities.shape}")
    adapters = np.zeros(n, np.int64)
    if trace.adapter is not None and pool.max_loras > 0:
        adapters = trace.adapter.codes.astype(np.int64) + 1  # a request without one has the code -1
    bounds = _bounds(trace, give_up, k)
    # blocks beyond those of every request together are never touched: a huge cache costs no memory here
    touched = max(1, int((-(-max_num_tokens[fits] // pool.block_size)).sum()))
    if pool.admission != "watermark":  # which is a share of all of them
        pool = pool.model_copy(update={"num_kv_blocks": min(pool.num_kv_blocks, touched)})
    pool = pool.model_copy(update={"host_kv_blocks": min(pool.host_kv_blocks, 2 * touched)})
    requests = Requests(
        arrival_s=scheduled_s + tables.request_s[0],
        scheduled_s=scheduled_s,
        input_tokens=input_tokens,
        max_num_tokens=max_num_tokens,
        hash_start=offsets[:-1].copy(),
        num_hashes=np.diff(offsets),
        priority=priorities,
        adapter=adapters,
    )
    chances = chances_of(trace, pool)
    whole = tables._replace(draft=None, batch=None)  # with these in it, it would be another type to Numba
    run = Run(policy, hashes, per_hash, whole, tables.draft, requests, times, bounds, k, jump, chances, recorder)
    if recorder is not None:
        recorder.begin(n, int(trace.output_tokens.sum()))
    if autoscaler is not None and arrivals is None:
        arrivals = open_loop(n)
    sends = None if arrivals is None else SendOrder(arrivals, scheduled_s.copy())
    if sends is not None:  # they are written when they are known
        requests.scheduled_s[:], requests.arrival_s[:] = np.nan, np.nan
    # the server counts the requests that it takes, so those that are too long take no turn
    rows = np.flatnonzero(fits)
    held: tuple[Held, ...] = ()
    prefix_block = pool.block_size if trace.prefix is None else trace.prefix.block_size
    if tables.batch is not None:
        _check_in_time(pool, tables.batch, arrivals, autoscaler)
        if recorder is not None:
            allowed = "step times as sums of their parts, which alone can be explained"
            raise BadSpec("step times", "known by the whole batch", allowed)
        status, totals = _serve_in_time(pool, run, rows, tables.batch)
    elif sends is not None:
        fleet: Fleet = Fleet(pool, run, prefix_block)
        if autoscaler is not None:
            fleet = ElasticFleet(pool, run, prefix_block, autoscaler, sends.next_s())
        status = serve_in_order(fleet, sends, fits)
        totals, held = [replica.totals() for replica in fleet.replicas], fleet.held
    elif pool.router == "round_robin":
        status, totals = _serve_in_turn(pool, run, rows)
    else:
        status, totals = _serve_routed(pool, run, rows, num_prefix_hashes(prefix_block))
    counted = np.sum([each.counted for each in totals], axis=0)
    finished = ~np.isnan(times.end_s)
    noted = tuple(each.gaps for each in totals if each.gaps is not None)
    return SimulationResult(
        times=RequestTimes(
            scheduled_s=scheduled_s if sends is None else sends.scheduled_s,
            sent_s=scheduled_s if sends is None else sends.sent_s,
            first_token_s=times.first_s,
            kth_token_s=times.kth_s,
            end_s=times.end_s,
            output_tokens=np.where(finished, trace.output_tokens, 0).astype(np.int64),
            finished=finished,
            k=k,
            gaps=StepGaps(noted, times.first_s, times.end_s, finished) if len(noted) == len(totals) else None,
        ),
        steps=sum(each.steps for each in totals),
        busy_s=sum(each.busy_s for each in totals),
        **dict(zip(TOTALS, counted.tolist())),
        **Speculated(*([] if chances is None else chances.totals.tolist()))._asdict(),
        rejected=int((~fits).sum()),
        gave_up=status == GAVE_UP,
        held=held,
    )
