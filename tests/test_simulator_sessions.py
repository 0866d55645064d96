"""Requests that wait for others on the virtual clock: closed loops, sessions, and theory where it has a closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.profiler.autoscale import Autoscaler
from paretune.profiler.simulator import SimulationResult, simulate
from paretune.profiler.step_record import Recorder
from paretune.profiler.step_time import WORK_GRID, StepTables
from paretune.runtime.spec import BadSpec, Pool
from paretune.traces.columns import Labels, PrefixHashes
from paretune.traces.metrics import TTFT
from paretune.traces.sessions import DependentArrivals, closed_loop, limited, open_loop, sessions
from paretune.traces.trace import Trace

from .test_explain import limits_of
from .test_profiler_batch_time import POOL, batch
from .test_simulator import pool, tables, trace
from .test_simulator_speculation import NGRAM, kept
from .test_simulator_speculation import pool as speculating_pool
from .test_simulator_speculation import tables as sampled_tables

ROUTERS = ("round_robin", "least_outstanding_tokens", "prefix_affinity")


def talks(n: int, seed: int, *, names: int = 12, longest: int = 120, rate: float = 4.0) -> Trace:
    """Requests of sessions, whose prompts share their beginnings."""
    rng = np.random.default_rng(seed)
    session = rng.integers(0, names, n)
    inputs = rng.integers(1, longest, n)
    hashes = [[int(each) * 100 + i for i in range(length // 16)] for each, length in zip(session, inputs)]
    return Trace(
        np.cumsum(rng.exponential(1 / rate, n)),
        inputs,
        rng.integers(1, longest, n),
        session=Labels.of([str(each) for each in session]),
        prefix=PrefixHashes.of(hashes, 16),
    )


def with_pauses(requests: Trace, seed: int, mean_s: float) -> DependentArrivals:
    found = sessions(requests, pause_s=0.0)
    pauses = np.random.default_rng((seed, 1)).exponential(mean_s, len(requests)) * (found.after >= 0)
    return DependentArrivals(found.after, pauses)


def sent_again(requests: Trace, result: SimulationResult, limits: Pool, step: StepTables, **options: Any) -> Any:
    """The same requests in an open loop, at the times at which they were sent; in the order of `requests`."""
    times = result.times
    order = np.argsort(times.sent_s, kind="stable")
    prefix = requests.prefix
    again = Trace(
        times.sent_s[order],
        requests.input_tokens[order],
        requests.output_tokens[order],
        prefix=None if prefix is None else PrefixHashes.of([prefix.row(int(i)) for i in order], prefix.block_size),
        acceptance=requests.acceptance,
    )
    found = simulate(again, limits, step, **options).times
    back = np.argsort(order)
    return found.first_token_s[back], found.end_s[back]


def test_one_client_takes_the_sum_of_what_its_requests_take_alone() -> None:
    limits, requests = pool(), trace(40, 3.0, seed=1)
    step = tables(limits, request_s=(0.25, 0.5))
    alone_s = [
        simulate(Trace([0.0], [inputs], [outputs]), limits, step).times.end_s[0]
        for inputs, outputs in zip(requests.input_tokens, requests.output_tokens)
    ]
    times = simulate(requests, limits, step, arrivals=closed_loop(requests, 1, think_s=2.0)).times
    np.testing.assert_allclose(times.end_s, np.cumsum(alone_s) + 2.0 * np.arange(40), rtol=1e-12)
    np.testing.assert_allclose(times.sent_s[1:], times.end_s[:-1] + 2.0)
    assert (times.scheduled_s == times.sent_s).all()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    clients=st.integers(1, 12),
    think_s=st.sampled_from([0.0, 0.3]),
    replicas=st.integers(1, 3),
    router=st.sampled_from(ROUTERS),
    blocks=st.sampled_from([32, 100]),
)
def test_so_many_clients_have_no_more_requests_open_and_serve_all(
    seed: int, clients: int, think_s: float, replicas: int, router: str, blocks: int
) -> None:
    limits = pool(replicas=replicas, router=router, num_kv_blocks=blocks, max_model_len=400)
    requests = trace(60, 3.0, seed)
    fits = requests.input_tokens + requests.output_tokens <= 400
    step = tables(limits)._replace(wake_s=0.004 * (seed % 2))
    result = simulate(requests, limits, step, arrivals=closed_loop(requests, clients, think_s))
    times = result.times
    assert times.finished.tolist() == fits.tolist()
    assert (times.output_tokens == np.where(fits, requests.output_tokens, 0)).all()
    end_s = np.where(fits, times.end_s, times.sent_s)  # who is refused is answered at once
    for at_s in times.sent_s:
        assert ((times.sent_s <= at_s) & (end_s > at_s)).sum() <= clients
    assert (np.diff(times.sent_s) >= 0).all()  # dealt in the order of the log


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    pauses=st.sampled_from([(0.0, (0.01, 0.02)), (0.01, (0.0, 0.0)), (0.05, (0.01, 0.02)), (2.0, (0.0, 0.0))]),
    replicas=st.integers(1, 4),
    router=st.sampled_from(ROUTERS),
    stages=st.sampled_from([1, 1, 2]),
    jump=st.booleans(),
    blocks=st.sampled_from([32, 100]),
    seqs=st.sampled_from([2, 8]),
    wake_s=st.sampled_from([0.0, 0.007]),
)
def test_sessions_are_served_as_an_open_loop_of_the_times_at_which_they_were_sent(
    seed: int,
    pauses: tuple[float, tuple[float, float]],
    replicas: int,
    router: str,
    stages: int,
    jump: bool,
    blocks: int,
    seqs: int,
    wake_s: float,
) -> None:
    # without any time between, a request comes at the very end of a step: rounding decides whether the next takes it
    mean_s, request_s = pauses
    limits = pool(
        replicas=replicas, router=router, pipeline_parallel_size=stages, block_size=16, num_kv_blocks=blocks,
        max_num_seqs=seqs,
    )  # fmt: skip
    requests, step = talks(60, seed), tables(limits, request_s=request_s)._replace(wake_s=wake_s)
    arrivals = with_pauses(requests, seed, mean_s)
    result = simulate(requests, limits, step, arrivals=arrivals, jump=jump)
    times, follows = result.times, arrivals.after >= 0
    assert times.finished.all()
    expected_s = times.end_s[arrivals.after[follows]] + arrivals.pause_s[follows]
    assert (times.sent_s[follows] == expected_s).all()
    assert (times.sent_s[~follows] == requests.arrival_s[~follows]).all()
    if len(np.unique(times.sent_s)) == len(
        times.sent_s
    ):  # of two sent at one time the open loop may take the other first
        first_s, end_s = sent_again(requests, result, limits, step, jump=jump)
        np.testing.assert_allclose(times.first_token_s, first_s, rtol=1e-9)
        np.testing.assert_allclose(times.end_s, end_s, rtol=1e-9)


def test_sessions_speculate_as_in_an_open_loop() -> None:
    limits = speculating_pool(replicas=2, router="least_outstanding_tokens", **NGRAM)
    step = sampled_tables(limits)
    talk = talks(40, 3, longest=50)
    requests = Trace(
        talk.arrival_s, talk.input_tokens, talk.output_tokens, session=talk.session,
        acceptance=kept(None, 100, 60, 180, 90),
    )  # fmt: skip
    result = simulate(requests, limits, step, arrivals=with_pauses(requests, 3, 0.01))
    assert result.times.finished.all()
    assert result.draft_tokens > 0
    follows = sessions(requests, pause_s=0.0).after
    late = follows >= 0
    assert (result.times.sent_s[late] >= result.times.end_s[follows[late]]).all()


def test_a_recorded_run_of_sessions_has_the_same_times() -> None:
    limits = pool(replicas=2, router="least_outstanding_tokens")
    requests, step = talks(50, 5), tables(limits)._replace(wake_s=0.03)
    arrivals = with_pauses(requests, 5, 0.1)
    recorder = Recorder(limits_of(step))
    seen = simulate(requests, limits, step, arrivals=arrivals, recorder=recorder).times
    plain = simulate(requests, limits, step, arrivals=arrivals).times
    np.testing.assert_allclose(seen.end_s, plain.end_s, rtol=1e-9)
    assert recorder.record is not None
    np.testing.assert_allclose(recorder.record.parts.sum(axis=(1, 2)), seen.end_s - seen.scheduled_s, rtol=1e-6)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("replicas", [1, 3])
def test_where_nobody_waits_for_anybody_it_is_the_open_loop(router: str, replicas: int) -> None:
    limits = pool(replicas=replicas, router=router, block_size=16)
    requests, step = talks(80, 7), tables(limits)
    plain = simulate(requests, limits, step)
    for arrivals in (open_loop(80), limited(requests, 80)):
        found = simulate(requests, limits, step, arrivals=arrivals)
        np.testing.assert_allclose(found.times.end_s, plain.times.end_s, rtol=1e-12)
        assert (found.steps, found.preemptions) == (plain.steps, plain.preemptions)


def test_pauses_in_which_nothing_overlaps_give_each_request_the_machine_alone() -> None:
    limits = pool()
    requests, step = talks(30, 9, names=1), tables(limits)
    requests = Trace(requests.arrival_s, requests.input_tokens, requests.output_tokens, session=requests.session)
    times = simulate(requests, limits, step, arrivals=sessions(requests, pause_s=1000.0)).times
    apart = Trace(1e5 * np.arange(30), requests.input_tokens, requests.output_tokens)
    alone = simulate(apart, limits, step).times
    np.testing.assert_allclose(times.values(TTFT), alone.values(TTFT), rtol=1e-6)
    np.testing.assert_allclose(times.end_s - times.sent_s, alone.end_s - alone.sent_s, rtol=1e-6)


def test_a_limit_of_open_requests_counts_from_the_arrival() -> None:
    limits, requests = pool(), trace(60, 50.0, seed=2)
    step = tables(limits)
    open_s = simulate(requests, limits, step).times
    times = simulate(requests, limits, step, arrivals=limited(requests, 2)).times
    assert (times.scheduled_s == open_s.scheduled_s).all()
    assert (times.sent_s > times.scheduled_s).any()
    assert np.mean(times.ttft_from_send()) < np.mean(times.values(TTFT))
    for at_s in times.sent_s:
        assert ((times.sent_s <= at_s) & (times.end_s > at_s)).sum() <= 2


def test_the_same_run_gives_the_same_bytes() -> None:
    limits = pool(replicas=3, router="least_outstanding_tokens", num_kv_blocks=40)
    requests, step = talks(60, 11), tables(limits)
    runs = [simulate(requests, limits, step, arrivals=with_pauses(requests, 11, 0.02)).times for _ in range(2)]
    for name in ("scheduled_s", "sent_s", "first_token_s", "kth_token_s", "end_s"):
        assert getattr(runs[0], name).tobytes() == getattr(runs[1], name).tobytes()


def test_step_times_by_the_batch_are_refused_where_requests_wait() -> None:
    requests = Trace([0.0, 1.0], [9, 9], [9, 9])
    by_batch = tables(POOL)._replace(batch=batch(seconds=0.01))
    for asked in ({"arrivals": closed_loop(requests, 2)}, {"autoscaler": Autoscaler(1, 2, target=5.0)}):
        with pytest.raises(BadSpec) as raised:
            simulate(requests, POOL, by_batch, **asked)
        assert raised.value.where == "step times"


def machine_repair_per_s(clients: int, service_s: float, think_s: float) -> float:
    """Throughput of a closed loop with one server, M/M/1//N: (1 - p0) / service time.

    Kleinrock, Queueing Systems 1, 1975, section 3.8. Of the time between, only the mean matters (an infinite server;
    Baskett, Chandy, Muntz and Palacios, Journal of the ACM 22(2), 1975).

    >>> round(machine_repair_per_s(1, 1.0, 3.0), 6)  # one client: once in service and thinking
    0.25
    """
    terms = [math.perm(clients, k) * (service_s / think_s) ** k for k in range(clients + 1)]
    return (1 - 1 / sum(terms)) / service_s


def mean_value_analysis_per_s(clients: int, service_s: float, think_s: float) -> float:
    """The same by mean value analysis (Reiser and Lavenberg, Journal of the ACM 27(2), 1980)."""
    queue, per_s = 0.0, 0.0
    for n in range(1, clients + 1):
        response_s = service_s * (1 + queue)
        per_s = n / (think_s + response_s)
        queue = per_s * response_s
    return per_s


MEAN_S = 0.1
TICKS = 200


def single_server() -> tuple[Pool, StepTables]:
    """One request at a time; an answer of n tokens takes n ticks."""
    longest = 40 * TICKS
    limits = Pool.model_validate(
        {
            "max_model_len": longest, "max_num_seqs": 1, "max_num_batched_tokens": 1, "block_size": 128,
            "num_kv_blocks": -(-longest // 128),
        }
    )  # fmt: skip
    nothing = np.zeros(len(WORK_GRID))
    step = StepTables(
        tokens_s=np.full(2, MEAN_S / TICKS), rows_s=np.zeros(2), samples_s=np.zeros(limits.max_num_samples + 1),
        decode_attention_s=nothing, prefill_attention_s=nothing.copy(), request_s=np.zeros(2),
    )  # fmt: skip
    return limits, step


@pytest.mark.parametrize(("clients", "think_s"), [(1, 0.3), (4, 0.3), (8, 1.0)])
@pytest.mark.parametrize("thinking", ["equal", "exponential"])
def test_a_closed_loop_has_the_throughput_of_theory(clients: int, think_s: float, thinking: str) -> None:
    assert machine_repair_per_s(clients, MEAN_S, think_s) == pytest.approx(
        mean_value_analysis_per_s(clients, MEAN_S, think_s)
    )
    limits, step = single_server()
    n, found = 12_000, []
    for seed in range(3):
        rng = np.random.default_rng((seed, 4))
        answers = np.ceil(rng.exponential(TICKS - 0.5, n)).astype(np.int64)
        requests = Trace(np.zeros(n), np.ones(n, np.int64), answers)
        if thinking == "equal":
            arrivals = closed_loop(requests, clients, think_s)
        else:  # a chain for each client, with pauses of its own
            after = np.arange(n) - clients
            arrivals = DependentArrivals(np.maximum(after, -1), rng.exponential(think_s, n) * (after >= 0))
        times = simulate(requests, limits, step, arrivals=arrivals).times
        ordered = np.sort(times.end_s)
        found.append((0.8 * n) / (ordered[int(0.9 * n)] - ordered[int(0.1 * n)]))
    assert np.mean(found) == pytest.approx(machine_repair_per_s(clients, MEAN_S, think_s), rel=0.02)
