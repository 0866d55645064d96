"""A trace on a prefill and a decode pool, on one virtual clock: prompts, the way of their KV, answers.

Arrivals do not wait for answers (an open loop), so the prefill pool does not depend on the decode pool: it is simulated
first, with one token a request. That gives when each prompt is computed, and on which replica; from there KV goes over
the links, and its requests arrive at the decode pool when it is there. Both pools run the scheduler of the engine.

A transfer holds the link of the replica that sends and of the replica that receives, and waits for both, in the order
in which prompts were handed over. By default it goes as in vLLM with its NixlConnector and proxy: the prefill replica
answers one token, the proxy sends the request on, the decode replica pulls the KV, computes the prompt's last token
once more and sends the first token that the client sees. What stands for other ways is in runtime.phases.KvTransfer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..runtime.model_shape import ModelShape
from ..runtime.router import new_router, route
from ..runtime.scheduler_state import (
    NUM_BLOCKS_FROM_HOST,
    NUM_BLOCKS_TO_HOST,
    NUM_HOST_HIT_TOKENS,
    NUM_PREEMPTIONS,
    NUM_PREFIX_HIT_TOKENS,
    NUM_SWAPPED,
)
from ..runtime.spec import BadSpec, Deployment, KvTransfer, Pool
from ..runtime.speculated import Speculated
from ..traces.metrics import RequestTimes
from ..traces.trace import Trace
from .kv_transfer import TransferLink, TransferTime, transfer_time
from .loop_notes import Bounds, Requests, Times
from .replica import Replica, Run
from .simulator import SimulationResult, chances_of, simulate
from .step_record import Recorder
from .step_time import StepTables, check_sums
from .token_gaps import ReplicaGaps, StepGaps

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NOT_MODELED = (
    "blocks that a prefill replica keeps until its KV has been read, and that a decode replica holds while it reads",
    "prefixes that a decode replica still has: each prompt's KV travels whole, no two requests share it there, and the "
    "decode pool's router finds no prefix, so that prefix_affinity goes by load there",
    "the router before both pools, beside the HTTP and text of a request to each of them",
)

# where the time until the decode pool's first token goes, in order; their sum is that time
PARTS = ("prefill", "to_decode_pool", "link_queue", "transfer", "decode")
WORDS = {
    "prefill": "prompt: before the scheduler, queue, prefill",
    "to_decode_pool": "from the prefill to the decode pool (HTTP, text)",
    "link_queue": "waiting for a link",
    "transfer": "KV on its way",
    "decode": "decode pool: queue and first step",
}


@dataclass(frozen=True)
class Prefilled:
    """What the prefill pool did with a trace; (n,) arrays by request, NaN or -1 where it did not fit.

    computed_s   end of the step that computed the last of the prompt
    last_step_s  how long that step took; NaN in a pipeline, where steps overlap
    replica      that computed it
    result       of a run of those that fit, with one token each
    """

    computed_s: Floats
    last_step_s: Floats
    replica: Ints
    result: SimulationResult


@dataclass(frozen=True)
class Transfers:
    """How each request's KV came to the decode pool; (n,) arrays, NaN or -1 for requests without a transfer.

    handed_s  when the decode pool gets the request
    began_s   when its first byte leaves
    here_s    when the decode replica has all of it, and the request's scheduler sees it: no earlier than handed_s
    replica   that receives it
    sent_bytes  over all links together
    """

    handed_s: Floats
    began_s: Floats
    here_s: Floats
    replica: Ints
    sent_bytes: Floats


@dataclass(frozen=True)
class DisaggregatedResult:
    """A run of both pools.

    result   as of one pool: times at the client, and counts of both pools together
    prefill_busy_s, decode_busy_s  seconds of computing, summed over replicas
    parts    of PARTS, (n,) seconds each: where the time until the decode pool's first token goes; NaN without any
    """

    result: SimulationResult
    prefilled: Prefilled
    transfers: Transfers
    prefill_busy_s: float
    decode_busy_s: float
    parts: dict[str, Floats]


def simulate_disaggregated(
    trace: Trace,
    deployment: Deployment,
    shape: ModelShape,
    link: TransferLink,
    prefill_tables: StepTables,
    decode_tables: StepTables,
    *,
    k: int = 30,
    rate: float = 1.0,
    jump: bool = True,
    prefilled: Prefilled | None = None,
    recorder: Recorder | None = None,
) -> DisaggregatedResult:
    """Serve a trace with a prefill and a decode pool on a virtual clock.

    Args:
        link: between the pools (kv_transfer.transfer_link).
        prefill_tables, decode_tables: step times of one replica of each pool.
        k, rate, jump: as in `simulate`.
        prefilled: of the same trace, prefill pool and rate, where it is known.
        recorder: is told of every step of the decode pool, and where its requests' time goes from when their KV is
            there; gaps between tokens are then not noted.
    Raises: BadSpec: no request fits into max_model_len, step times by the whole batch, KV that leaves layer by layer
        from a pipeline, a decode pool that speculates in several stages. BadTrace: as `simulate`.
    """
    prefill, decode = deployment.phases
    check_sums("for a prefill and a decode pool", prefill_tables, decode_tables)
    decode_tables = decode_tables._replace(wake_s=0.0)  # known of steps with prompts alone
    if prefilled is None:
        prefilled = prefill_trace(trace, deployment, prefill_tables, rate=rate)
    transfer = deployment.kv_transfer or KvTransfer()
    by_layer_s = _last_steps(prefilled, shape, transfer, prefill)
    early = transfer.first_token == "prefill"
    between_s = 0.0 if early else float(prefill_tables.request_s[1] + decode_tables.request_s[0])
    fits = prefilled.replica >= 0
    goes_on = fits & (trace.output_tokens > 1) if early else fits
    n = len(trace)
    scheduled_s = trace.arrival_s / rate
    inputs = trace.input_tokens.astype(np.int64)
    handed_s = np.where(goes_on, prefilled.computed_s + between_s, np.nan)
    links = _Links(
        transfer_time(shape, prefill, decode, link), prefilled, inputs, handed_s, by_layer_s, prefill, decode
    )
    here_s = np.full(n, np.inf)  # filled as KV comes
    requests = Requests(
        arrival_s=here_s,
        scheduled_s=here_s,  # of the decode pool: all before lies in other parts
        input_tokens=inputs + early,  # the first token of the answer comes with the prompt
        max_num_tokens=inputs + trace.output_tokens,
        hash_start=np.zeros(n, np.int64),
        num_hashes=np.zeros(n, np.int64),
        priority=np.zeros(n, np.int64),
        adapter=_adapters(trace, decode),
    )
    answers = Times(np.full(n, np.nan), np.full(n, np.nan), np.full(n, np.nan))
    own_k = max(1, k - early)
    if recorder is not None:
        recorder.begin(n, int(trace.output_tokens.sum()))
    replicas, chances = _decode(
        trace, deployment, decode_tables, requests, answers, goes_on, links, own_k, jump, recorder
    )
    sent_s = prefilled.computed_s + prefill_tables.request_s[1] if early else None
    noted = tuple(each.gaps for each in replicas if each.gaps is not None)
    gaps = noted if len(noted) == len(replicas) else None
    times = _client_times(trace, scheduled_s, sent_s, answers, gaps, k)
    before, decode_busy_s = prefilled.result, sum(each.busy_s for each in replicas)
    result = replace(
        before,
        times=times,
        steps=before.steps + sum(each.steps for each in replicas),
        busy_s=before.busy_s + decode_busy_s,
        **{name: getattr(before, name) + sum(each.counted[name] for each in replicas) for name in _COUNTED},
        **Speculated(*([] if chances is None else chances))._asdict(),
        rejected=int((~fits).sum()),
    )
    moved = links.transfers
    after_s = [scheduled_s, prefilled.computed_s, moved.handed_s, moved.began_s, moved.here_s, answers.first_s]
    if transfer.overlap == "layers":  # what leaves before its prompt is whole takes time from then on alone
        after_s[3] = np.maximum(moved.began_s, moved.handed_s)
    parts = {name: after_s[i + 1] - after_s[i] for i, name in enumerate(PARTS)}
    return DisaggregatedResult(result, prefilled, moved, before.busy_s, decode_busy_s, parts)


def _client_times(
    trace: Trace,
    scheduled_s: Floats,
    sent_s: Floats | None,
    answers: Times,
    gaps: tuple[ReplicaGaps, ...] | None,
    k: int,
) -> RequestTimes:
    """When tokens reach the client.

    Args:
        sent_s: first tokens that the prefill pool sends; None: the client gets the decode pool's alone.
        answers: of the decode pool, whose first token is then the second one, and whose k-th is the one behind it.
        gaps: as the decode replicas noted them; None: they did not.
    """
    first_s, kth_s, end_s = answers.first_s, answers.kth_s, answers.end_s
    if sent_s is not None:
        if gaps is not None:
            rows = np.flatnonzero(~np.isnan(answers.end_s))
            nothing, none = np.zeros(0), np.zeros(0, np.int64)
            # from the prefill pool's token to the decode pool's first one
            singles = (rows, sent_s[rows], answers.first_s[rows])
            gaps = (*gaps, ReplicaGaps(nothing, nothing, none, nothing, none, *singles, rows, True))
        first_s, end_s = sent_s, np.where(trace.output_tokens > 1, answers.end_s, sent_s)
        kth_s = sent_s if k == 1 else answers.kth_s
    finished = ~np.isnan(end_s)
    return RequestTimes(
        scheduled_s=scheduled_s,
        sent_s=scheduled_s,
        first_token_s=first_s,
        kth_token_s=kth_s,
        end_s=end_s,
        output_tokens=np.where(finished, trace.output_tokens, 0).astype(np.int64),
        finished=finished,
        k=k,
        gaps=None if gaps is None else StepGaps(gaps, answers.first_s, end_s, finished),
    )


def prefill_trace(
    trace: Trace, deployment: Deployment, tables: StepTables, *, rate: float = 1.0, recorder: Recorder | None = None
) -> Prefilled:
    """Compute the prompts of a trace on the prefill pool, which is asked for one token of each.

    Requests that are longer than max_model_len, which is the same in both pools, reach neither.

    Args:
        recorder: is told of every step; who computed what, and how long the steps took, is then not noted.
    """
    pool, _ = deployment.phases
    n = len(trace)
    total_tokens = trace.input_tokens.astype(np.int64) + trace.output_tokens
    fits = total_tokens <= pool.max_model_len
    rows = np.flatnonzero(fits)
    if not len(rows):
        allowed = f"at least {total_tokens.min()}, the shortest request of the log"
        raise BadSpec("max_model_len", pool.max_model_len, allowed)
    prompts = replace(trace.select(fits), output_tokens=np.ones(len(rows), np.int32))
    result = simulate(prompts, pool, tables, policy=deployment.scheduler_policy, k=1, rate=rate, recorder=recorder)
    computed_s, last_step_s = np.full(n, np.nan), np.full(n, np.nan)
    replica = np.full(n, -1, np.int64)
    computed_s[rows] = result.times.first_token_s - tables.request_s[1]
    gaps = result.times.gaps
    for number, noted in enumerate(gaps.replicas if isinstance(gaps, StepGaps) else ()):
        replica[rows[noted.served]] = number
        if pool.pipeline_parallel_size == 1:
            step = np.searchsorted(noted.run_end_s, result.times.first_token_s[noted.served])
            last_step_s[rows[noted.served]] = noted.run_first_s[step]
    return Prefilled(computed_s, last_step_s, replica, result)


def _last_steps(prefilled: Prefilled, shape: ModelShape, transfer: KvTransfer, pool: Pool) -> tuple[Floats, int] | None:
    """Where KV leaves layer by layer: how long the step took that computed the layers, and how many layers; else None.

    Raises: BadSpec: layers of a pipeline, whose stages compute several steps at a time.
    """
    if transfer.overlap == "none":
        return None
    if pool.pipeline_parallel_size > 1:
        found = f"layers with pipeline_parallel_size {pool.pipeline_parallel_size} in the prefill pool"
        raise BadSpec("kv_transfer.overlap", found, "none, where the prefill pool has several stages")
    return prefilled.last_step_s, shape.num_layers


def _adapters(trace: Trace, pool: Pool) -> Ints:
    if trace.adapter is None or pool.max_loras == 0:
        return np.zeros(len(trace), np.int64)
    return trace.adapter.codes.astype(np.int64) + 1


class _Links:
    """The links of all replicas: who sends to whom, and until when each is taken."""

    def __init__(
        self,
        time: TransferTime,
        prefilled: Prefilled,
        input_tokens: Ints,
        handed_s: Floats,
        by_layer: tuple[Floats, int] | None,
        prefill: Pool,
        decode: Pool,
    ) -> None:
        n = len(handed_s)
        self._time, self._prefilled, self._inputs, self._by_layer = time, prefilled, input_tokens, by_layer
        self._sends_until_s, self._receives_until_s = np.zeros(prefill.replicas), np.zeros(decode.replicas)
        self._sends_until_s[:], self._receives_until_s[:] = -math.inf, -math.inf
        self.transfers = Transfers(
            handed_s, np.full(n, np.nan), np.full(n, np.nan), np.full(n, -1, np.int64), np.full(n, np.nan)
        )

    def send(self, row: int, receiver: int) -> float:
        """Take a request's KV to a decode replica, once both links are free; returns when it is there."""
        time, moved, sender = self._time, self.transfers, self._prefilled.replica[row]
        tokens = time.tokens(int(self._inputs[row]))
        link_s = time.fixed_s + time.s_per_token * tokens
        handed_s = float(moved.handed_s[row])
        free_s = max(self._sends_until_s[sender], self._receives_until_s[receiver])
        if self._by_layer is None:
            began_s = max(handed_s, free_s)
            done_s = began_s + link_s
        else:
            # L layers, computed one after the other, equally long: the first may leave after 1 / L of the step, the
            # last one at its end. Of a prompt of several steps all is taken as computed in the last.
            step_s, layers = float(self._by_layer[0][row]), self._by_layer[1]
            computed_s = float(self._prefilled.computed_s[row])
            began_s = max(computed_s - step_s * (1 - 1 / layers), free_s)
            done_s = max(began_s + link_s, computed_s + link_s / layers)
        self._sends_until_s[sender] = self._receives_until_s[receiver] = done_s
        moved.began_s[row] = began_s
        moved.here_s[row] = max(handed_s, done_s + time.latency_s)
        moved.replica[row] = receiver
        moved.sent_bytes[row] = time.fixed_bytes + float(time.bytes_per_token) * tokens
        return float(moved.here_s[row])


class _Decoded(NamedTuple):
    """What one decode replica did."""

    steps: int
    busy_s: float
    counted: dict[str, int]
    gaps: ReplicaGaps | None


_COUNTED = {
    "preemptions": NUM_PREEMPTIONS,
    "swaps": NUM_SWAPPED,
    "prefix_hit_tokens": NUM_PREFIX_HIT_TOKENS,
    "host_hit_tokens": NUM_HOST_HIT_TOKENS,
    "blocks_to_host": NUM_BLOCKS_TO_HOST,
    "blocks_from_host": NUM_BLOCKS_FROM_HOST,
}


def _decode(
    trace: Trace,
    deployment: Deployment,
    tables: StepTables,
    requests: Requests,
    times: Times,
    goes_on: NDArray[np.bool_],
    links: _Links,
    k: int,
    jump: bool,
    recorder: Recorder | None,
) -> tuple[list[_Decoded], Sequence[int] | None]:
    """Serve the answers, routed when they are handed over; fills `times` and the arrivals of `requests`."""
    _, pool = deployment.phases
    rows = np.flatnonzero(goes_on)
    # blocks beyond those of every request together are never touched, as in `simulate`
    touched = max(1, int((-(-requests.max_num_tokens[rows] // pool.block_size)).sum()))
    if pool.admission != "watermark":
        pool = pool.model_copy(update={"num_kv_blocks": min(pool.num_kv_blocks, touched)})
    pool = pool.model_copy(update={"host_kv_blocks": min(pool.host_kv_blocks, 2 * touched)})
    nobody, nothing = np.zeros(0, np.int64), np.zeros(0)
    bounds = Bounds(nobody, nothing, nobody.copy(), nobody.copy(), np.zeros((0, len(trace)), np.bool_))
    chances = chances_of(trace, pool)
    whole = tables._replace(draft=None, batch=None)
    run = Run(
        deployment.scheduler_policy,
        nobody.copy(),
        1,
        whole,
        tables.draft,
        requests,
        times,
        bounds,
        k,
        jump,
        chances,
        recorder,
    )
    replicas = [Replica(pool, run) for _ in range(pool.replicas)]
    router = new_router(pool)
    by_load = pool.router != "round_robin"
    outstanding = np.zeros(pool.replicas, np.int64)
    handed_s = links.transfers.handed_s
    for row in rows[np.argsort(handed_s[rows], kind="stable")].tolist():
        if by_load:
            at_s = float(handed_s[row])
            for number, replica in enumerate(replicas):
                replica.advance(at_s)
                outstanding[number] = replica.outstanding_tokens(at_s)
        chosen = route(router, outstanding, int(requests.max_num_tokens[row]), nobody)
        requests.arrival_s[row] = links.send(row, chosen)
        replicas[chosen].add(row)
    done = []
    for replica in replicas:
        replica.advance(math.inf)
        totals, counts = replica.totals(), replica.state.counts
        counted = {name: int(counts[place]) for name, place in _COUNTED.items()}
        done.append(_Decoded(totals.steps, totals.busy_s, counted, totals.gaps))
    return done, None if chances is None else chances.totals.tolist()
