"""Who waits for whom: the turns of sessions, pauses that are recorded or assumed, and clients of a closed loop."""

from __future__ import annotations

import heapq
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune.traces.agent_formats import read_llmservingsim
from paretune.traces.columns import BadTrace, Labels
from paretune.traces.formats import read, write
from paretune.traces.jsonl_formats import read_mooncake, read_openai
from paretune.traces.sessions import (
    DependentArrivals,
    RecordedService,
    SendOrder,
    closed_loop,
    limited,
    open_loop,
    sessions,
)
from paretune.traces.trace import Trace
from paretune.traces.transform import window


def log(arrivals: list[float], names: list[str | None] | None = None, **more: Any) -> Trace:
    n = len(arrivals)
    session = None if names is None else Labels.of(names)
    return Trace(np.array(arrivals, float), np.full(n, 9), np.full(n, 11), session=session, **more)


def served(arrivals: DependentArrivals, recorded_s: list[float], took_s: list[float]) -> SendOrder:
    """Every request takes a time of its own, however many are open."""
    sends, open_ = SendOrder(arrivals, np.array(recorded_s, float)), []
    while open_ or not math.isinf(sends.next_s()):
        if open_ and open_[0][0] <= sends.next_s():
            at_s, row = heapq.heappop(open_)
            sends.ended(row, at_s)
        else:
            row, sent_s = sends.take()
            heapq.heappush(open_, (sent_s + took_s[row], row))
    return sends


def test_a_turn_follows_the_end_of_the_turn_before_it_after_the_pause() -> None:
    trace = log([0, 1, 2, 3, 9], ["a", None, "a", "b", "a"])
    found = sessions(trace, pause_s=2.0)
    assert found.after.tolist() == [-1, -1, 0, -1, 2]
    assert served(found, trace.arrival_s.tolist(), [5, 1, 4, 1, 1]).sent_s.tolist() == [0, 1, 7, 3, 13]


def test_a_pause_that_the_log_records_is_taken_before_one_that_is_assumed() -> None:
    trace = log([0, 10, 30], ["a", "a", "a"], pause_s=np.array([np.nan, 0.5, np.nan]))
    found = sessions(trace, recorded=RecordedService(1.0, 0.2))
    # 20 s of gap less 1 s for the first of 11 tokens and 0.2 s for each of the others
    assert found.pause_s.tolist() == [0.0, 0.5, pytest.approx(17.0)]
    assert any("recorded for 1 of 2" in words for words in found.words)
    assert any("assumed for 1 of 2" in words for words in found.words)


def test_an_assumed_pause_is_never_negative_and_how_many_gaps_are_too_short_is_said() -> None:
    found = sessions(log([0, 1, 100], ["a", "a", "a"]), recorded=RecordedService(10.0, 0.0))
    assert found.pause_s.tolist() == [0, 0, 89]
    assert any("50% of the gaps are shorter" in words for words in found.words)


def test_pauses_that_nobody_knows_are_refused_with_what_to_give() -> None:
    with pytest.raises(BadTrace) as raised:
        sessions(log([0, 1], ["a", "a"]))
    assert "pauses" in raised.value.where
    assert "--recorded-ttft" in raised.value.todo
    with pytest.raises(BadTrace) as raised:
        sessions(log([0, 1]))
    assert "session" in raised.value.where


def test_clients_take_the_next_request_when_they_are_free() -> None:
    trace = log([0, 0, 0, 100, 100])
    sends = served(closed_loop(trace, 2, think_s=1.0), trace.arrival_s.tolist(), [5, 2, 9, 1, 1])
    assert sends.sent_s.tolist() == [0, 0, 3, 6, 8]
    assert (sends.scheduled_s == sends.sent_s).all()


def test_a_limit_of_open_requests_is_a_semaphore_around_recorded_arrivals() -> None:
    trace = log([0, 1, 2, 20])
    sends = served(limited(trace, 2), trace.arrival_s.tolist(), [10, 3, 1, 1])
    assert sends.sent_s.tolist() == [0, 1, 4, 20]
    assert sends.scheduled_s.tolist() == [0, 1, 2, 20]  # latencies count from the arrival


def test_clients_work_through_sessions_one_after_the_other() -> None:
    trace = log([0, 50, 60, 70], ["a", "b", "a", "c"])
    sends = served(sessions(trace, pause_s=1.0, clients=1, think_s=2.0), trace.arrival_s.tolist(), [4, 5, 6, 7])
    # a: 0 to 4, 5 to 11; b from 13 to 18; c from 20
    assert sends.sent_s.tolist() == [0, 13, 5, 20]


@settings(max_examples=60)
@given(
    names=st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=30),
    clients=st.integers(0, 4),
    data=st.data(),
)
def test_every_request_is_sent_once_and_no_more_chains_are_open_than_clients(
    names: list[str | None], clients: int, data: st.DataObject
) -> None:
    n = len(names)
    seconds = st.lists(st.floats(0, 10), min_size=n, max_size=n)
    recorded_s, took_s = sorted(data.draw(seconds)), data.draw(seconds)
    trace = log(recorded_s, names)
    arrivals = open_loop(n) if trace.session is None else sessions(trace, pause_s=0.5, clients=clients)
    sends = served(arrivals, recorded_s, took_s)
    assert not np.isnan(sends.sent_s).any()
    ends_s = sends.sent_s + took_s
    follows = arrivals.after >= 0
    assert (sends.sent_s[follows] == ends_s[arrivals.after[follows]] + 0.5).all()
    first = np.flatnonzero(~follows)
    if not arrivals.clients:
        assert (sends.sent_s[first] == np.array(recorded_s)[first]).all()
        return
    last = {int(row): int(row) for row in first}
    for row in np.flatnonzero(follows):
        begin = int(row)
        while arrivals.after[begin] >= 0:
            begin = int(arrivals.after[begin])
        last[begin] = max(last[begin], int(row))
    begins = sends.sent_s[first]
    closes = np.array([ends_s[last[int(row)]] for row in first])
    for at_s in begins:
        # one that closes at the very time makes room
        assert ((begins <= at_s) & (closes > at_s)).sum() <= clients
    assert (np.diff(begins) >= 0).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"after": [-1, 1]},  # itself
        {"after": [1, -1]},  # a later one
        {"after": [-1, 0, 0]},  # two behind one
        {"after": [-1], "pause_s": [-1.0]},
        {"after": [-1], "at_arrival": False},
        {"after": [-1], "clients": -1},
        {"after": [-1], "clients": 1, "think_s": math.inf},
    ],
)
def test_arrivals_that_cannot_be_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(BadTrace):
        DependentArrivals(**{"pause_s": np.zeros(len(bad["after"])), **bad})


def test_the_sessions_of_aiperf_are_read_with_their_delays() -> None:
    lines = [
        {"session_id": "s", "timestamp": 1000, "input_length": 10, "output_length": 5},
        {"session_id": "t", "timestamp": 1500, "input_length": 10, "output_length": 5, "hash_ids": [1]},
        {"session_id": "s", "delay": 2000, "input_length": 20, "output_length": 6},
        {"timestamp": 2500, "input_length": 9, "output_length": 5, "hash_ids": [1]},
    ]
    trace = read_mooncake(b"".join(json.dumps(line).encode() + b"\n" for line in lines), "log")
    assert trace.session is not None
    assert trace.pause_s is not None
    assert trace.session.values() == ["s", "t", None, "s"]
    assert trace.arrival_s.tolist() == [0.0, 0.5, 1.5, 2.0]
    np.testing.assert_array_equal(trace.pause_s, [np.nan, np.nan, np.nan, 2.0])
    assert any("have no time" in note for note in trace.notes)
    assert sessions(trace).pause_s.tolist() == [0, 0, 0, 2]


def test_the_sessions_of_llmservingsim_are_read_with_the_time_of_their_tools(tmp_path: Any) -> None:
    ids = list(range(32))
    lines = [
        {
            "session_id": "s",
            "arrival_time_ns": 1_000_000_000,
            "sub_requests": [
                {"input_toks": 32, "output_toks": 5, "tool_duration_ns": 500_000_000, "input_tok_ids": ids},
                {"input_toks": 9, "output_toks": 0, "tool_duration_ns": 250_000_000},
                {"input_toks": 48, "output_toks": 7, "tool_duration_ns": 0, "input_tok_ids": [*ids, *range(16)]},
            ],
        },
        {"input_toks": 10, "output_toks": 3, "arrival_time_ns": 1_200_000_000},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace = read(tmp_path / "log.jsonl")
    assert trace.session is not None
    assert trace.prefix is not None
    assert trace.session.values() == ["s", None, "s"]
    np.testing.assert_allclose(trace.arrival_s, [0.0, 0.2, 0.75])
    np.testing.assert_allclose(sessions(trace).pause_s, [0.0, 0.0, 0.75])  # with that of the call without an answer
    assert trace.prefix.counts.tolist() == [2, 0, 3]
    assert (trace.prefix.row(2)[:2] == trace.prefix.row(0)).all()
    assert any("1 of 4 requests left out" in note for note in trace.notes)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ({"input_toks": -1, "output_toks": 3, "arrival_time_ns": 0}, "input_toks"),
        ({"input_toks": 2, "output_toks": 3}, "arrival_time_ns"),
        ({"session_id": "s", "arrival_time_ns": 0, "sub_requests": 3}, "sub_requests"),
        ({"input_toks": 2, "output_toks": 3, "arrival_time_ns": 0, "input_tok_ids": [1]}, "input_tok_ids"),
        ({"session_id": "s", "arrival_time_ns": 0, "sub_requests": [
            {"input_toks": 2, "output_toks": 3, "tool_duration_ns": "soon"}]}, "tool_duration_ns"),
    ],
)  # fmt: skip
def test_a_bad_line_of_llmservingsim_is_refused_by_its_place(line: dict[str, Any], field: str) -> None:
    with pytest.raises(BadTrace) as raised:
        read_llmservingsim(json.dumps(line).encode(), "log")
    assert raised.value.where == f"log:1: {field}"


def test_llmservingsims_requests_are_read(data_dir: Any) -> None:
    trace = read(data_dir / "traces" / "llmservingsim" / "example_trace.jsonl")
    assert (trace.input_tokens[0], trace.output_tokens[0]) == (10, 70)
    assert trace.session is None
    assert len(read(data_dir / "traces" / "llmservingsim" / "workload_me2_01_mixed.jsonl")) > 100


def test_our_own_request_log_knows_its_pauses() -> None:
    def line(at_s: float, took_s: float | None, session: str | None) -> dict[str, Any]:
        usage = {"prompt_tokens": 9, "completion_tokens": 3}
        timings = {} if took_s is None else {"timings": {"ttft_s": 0.1, "e2e_s": took_s}}
        return {"created": 1e9 + at_s, "model": "m", "usage": usage, **timings} | (
            {"session": session} if session else {}
        )

    lines = [line(0, 2.0, "a"), line(5, 1.0, "a"), line(5.5, 1.0, "a"), line(7, None, "b"), line(8, 1.0, "b")]
    trace = read_openai(b"".join(json.dumps(each).encode() + b"\n" for each in lines), "log")
    assert trace.pause_s is not None
    np.testing.assert_allclose(trace.pause_s, [np.nan, 3.0, 0.0, np.nan, np.nan])
    assert any("1 requests came before the end" in note for note in trace.notes)


def test_pauses_stay_with_their_requests(tmp_path: Any) -> None:
    trace = log([0, 1, 2, 3], ["a", "a", "b", "b"], pause_s=np.array([np.nan, 0.5, np.nan, 0.25]))
    write(trace, tmp_path / "log.parquet")
    again = read(tmp_path / "log.parquet")
    assert again.digest() == trace.digest() == Trace.from_pandas(trace.to_pandas()).digest()
    assert trace.digest() != log([0, 1, 2, 3], ["a", "a", "b", "b"]).digest()
    part = window(trace, 1.0, 4.0)
    assert part.pause_s is not None
    np.testing.assert_array_equal(part.pause_s, [0.5, np.nan, 0.25])
    with pytest.raises(BadTrace) as raised:
        log([0, 1], ["a", "a"], pause_s=np.array([0.0, -1.0]))
    assert "row 1: pause_s" in raised.value.where


@pytest.mark.parametrize(("family", "calls", "correlation"), [("magagent", 693, 0.89), ("taubench", 188, 0.80)])
def test_lmcaches_agents_are_read_in_order_of_their_calls(
    data_dir: Any, family: str, calls: int, correlation: float
) -> None:
    import pyarrow.parquet as pq

    path = data_dir / "traces" / "lmcache_agent" / f"{family}.parquet"
    trace = read(path)
    assert len(trace) == calls
    assert trace.session is not None
    assert trace.prefix is not None
    assert trace.prefix.block_size == 512
    assert any("estimated" in note for note in trace.notes)
    with pytest.raises(BadTrace):
        sessions(trace)
    found = sessions(trace, recorded=RecordedService(0.5, 0.01))
    assert (found.after >= 0).sum() == calls - len(trace.session.names)
    # that times are those of the calls, not of their ends: gaps grow with the answer before them
    rows = pq.read_table(path).to_pylist()
    by_session: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["timestamp_us"]):
        by_session.setdefault(row["session"], []).append(row)
    pairs = [pair for each in by_session.values() for pair in itertools.pairwise(each)]
    gap_s = [(after["timestamp_us"] - before["timestamp_us"]) / 1e6 for before, after in pairs]
    before_chars = [before["output_chars"] for before, _ in pairs]
    assert np.corrcoef(gap_s, before_chars)[0, 1] == pytest.approx(correlation, abs=0.01)
