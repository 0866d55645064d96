"""Replay against a tiny server whose behavior is known to the millisecond, and against worse ones."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.profiler.http_stream import Connection, Origin, Stream
from paretune.profiler.replay import BadReplay, NoServer, prompt_token_ids, prompts, replay, request_times
from paretune.runtime.model_shape import resolve_model
from paretune.traces.columns import Labels, PrefixHashes
from paretune.traces.metrics import Metric
from paretune.traces.sessions import closed_loop, limited, sessions
from paretune.traces.trace import Trace

IDS = np.arange(3, 100, dtype=np.int32)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def event(content: object) -> bytes:
    text = content if isinstance(content, str) else json.dumps(content, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


def token(text: str = "x") -> bytes:
    return event({"id": "c", "choices": [{"index": 0, "text": text, "finish_reason": None}]})


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def closing(tokens: int) -> bytes:
    return event({"id": "c", "choices": [], "usage": {"completion_tokens": tokens}}) + event("[DONE]")


class FakeServer:
    """Answers /v1/models, and gives every completion to `answer(server, body, writer)`, in a thread of its own."""

    def __init__(self, answer: Callable) -> None:
        self.answer = answer
        self.bodies: list[dict] = []
        self.received_s: list[float] = []
        self.connections = 0
        self.closed_early = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET /v1/models"):
                    body = b'{"object":"list","data":[{"id":"fake"}]}'
                    writer.write(
                        b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body
                    )
                    await writer.drain()
                    break
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                self.received_s.append(time.perf_counter())
                self.bodies.append(body)
                if await self.answer(body, writer) is False:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            self.closed_early.set()
        writer.close()


@contextmanager
def fake(answer: Callable) -> Iterator[FakeServer]:
    server = FakeServer(answer)
    yield server
    server.close()


def steady(first_s: float, gap_s: float, written_s: list[list[float]] | None = None) -> Callable:
    """Tokens after first_s and then every gap_s; `written_s` takes the times, a list for each answer."""

    async def answer(body: dict, writer: asyncio.StreamWriter) -> None:
        times: list[float] = []
        if written_s is not None:
            written_s.append(times)
        writer.write(HEAD)
        await asyncio.sleep(first_s)
        for i in range(body["max_tokens"]):
            if i:
                await asyncio.sleep(gap_s)
            times.append(time.perf_counter())
            writer.write(chunk(token()))
            await writer.drain()
        writer.write(chunk(closing(body["max_tokens"])) + b"0\r\n\r\n")
        await writer.drain()

    return answer


def trace(arrivals: list[float], inputs: int = 8, outputs: int = 4, **more: object) -> Trace:
    n = len(arrivals)
    return Trace(np.array(arrivals, float), np.full(n, inputs), np.full(n, outputs), **more)


def run(server: FakeServer, log: Trace, **options: object):
    return replay(log, server.url, token_ids=IDS, **options)


def test_times_are_those_of_the_server() -> None:
    written_s: list[list[float]] = []
    with fake(steady(0.08, 0.03, written_s)) as server:
        result = run(server, trace([0.0, 0.05, 0.1], outputs=5), k=3)
    times = result.times
    assert result.errors == ()
    assert times.finished.all()
    assert times.output_tokens.tolist() == [5, 5, 5]
    # a busy machine only ever adds
    for metric, expected in (("ttft", 0.08), ("ttf3", 0.14), ("e2e", 0.20)):
        assert (times.values(Metric.parse(metric)) > 0.9 * expected).all()
    assert times.gap_offsets.tolist() == [0, 4, 8, 12]
    assert times.token_gap_s is not None
    for i, wrote_s in enumerate(sorted(written_s)):
        came_s = (
            result.started_s + times.first_token_s[i] + np.append(0, np.cumsum(times.token_gap_s[4 * i : 4 * i + 4]))
        )
        assert (came_s > np.array(wrote_s) - 1e-3).all()
        assert times.end_s[i] >= came_s[-1] - result.started_s - 1e-6
        assert times.kth_token_s[i] == pytest.approx(came_s[2] - result.started_s, abs=1e-6)
    assert result.server == {"url": server.url, "model": "fake", "tokens_per_event": 1.0}


def test_requests_are_sent_at_their_times_however_busy_the_server_is() -> None:
    arrivals = [0.0, 0.1, 0.2, 0.3]
    all_came = asyncio.Event()

    async def once_all_came(body: dict, writer: asyncio.StreamWriter) -> None:
        # a closed loop would wait for the first answer, which it never gets
        if len(server.bodies) == len(arrivals):
            all_came.set()
        await all_came.wait()
        await steady(0.0, 0.0)(body, writer)

    with fake(once_all_came) as server:
        result = run(server, trace(arrivals, outputs=1))
    assert result.errors == ()
    assert result.times.scheduled_s.tolist() == arrivals
    assert (result.times.sent_s >= result.times.scheduled_s).all()
    late = result.times.sent_s - result.times.scheduled_s
    assert result.schedule_error_s["max"] == late.max()
    assert result.schedule_error_s["p50"] <= result.schedule_error_s["p95"] <= result.schedule_error_s["max"]


def test_a_turn_is_sent_when_the_turn_before_it_has_ended_and_its_pause_is_over() -> None:
    log = trace([0.0, 0.01, 0.02, 0.03], session=Labels.of(["a", "b", "a", "a"]))
    with fake(steady(0.05, 0.02)) as server:
        result = run(server, log, arrivals=sessions(log, pause_s=0.1))
    times = result.times
    assert result.errors == ()
    for turn, before in ((2, 0), (3, 2)):
        # a busy client hears of an end late, and only that
        assert times.sent_s[turn] >= times.end_s[before] + 0.1
        assert times.scheduled_s[turn] == pytest.approx(times.end_s[before] + 0.1, abs=0.05)
        assert times.sent_s[turn] >= times.scheduled_s[turn]
    assert times.scheduled_s[:2].tolist() == [0.0, 0.01]
    # the schedule is that of the ends: waiting for them is no delay of the client's
    assert result.schedule_error_s["max"] < times.end_s[0]


@pytest.mark.parametrize("clients", [1, 3])
def test_clients_have_no_more_requests_open_than_they_are(clients: int) -> None:
    open_now, most_open = 0, 0

    async def counted(body: dict, writer: asyncio.StreamWriter) -> None:
        nonlocal open_now, most_open
        open_now += 1
        most_open = max(most_open, open_now)
        await asyncio.sleep(0.1)
        open_now -= 1
        await steady(0.0, 0.0)(body, writer)

    log = trace([50.0 * i for i in range(9)])  # recorded arrivals play no part
    with fake(counted) as server:
        result = run(server, log, arrivals=closed_loop(log, clients, think_s=0.01))
    assert result.errors == ()
    assert most_open == clients
    assert (np.diff(result.times.scheduled_s) >= 0).all()
    assert (result.times.scheduled_s <= result.times.sent_s).all()


def test_a_request_that_waits_for_a_seat_at_the_client_counts_from_its_arrival() -> None:
    log = trace([0.0, 0.0, 0.01], outputs=1)
    with fake(steady(0.1, 0.0)) as server:
        times = run(server, log, arrivals=limited(log, 1)).times
    assert times.scheduled_s.tolist() == [0.0, 0.0, 0.01]
    assert times.sent_s[1] >= times.end_s[0]
    assert times.values(Metric("ttft"))[2] > times.ttft_from_send()[2] + 0.1


def test_a_session_goes_on_after_a_turn_that_failed() -> None:
    log = Trace(np.array([0.0, 0.02, 0.04]), np.full(3, 4), np.array([2, 13, 2]), session=Labels.of(["a"] * 3))
    with fake(failing(b"HTTP/1.1 429 Busy\r\ncontent-length: 0\r\n\r\n")) as server:
        result = run(server, log, arrivals=sessions(log, pause_s=0.0))
    assert result.times.finished.tolist() == [True, False, True]


def closing_unanswered(times: int, after_s: float = 0.0) -> Callable:
    """The first connections are closed when a request has come on them, without a byte of an answer."""
    left = [times]

    async def answer(body: dict, writer: asyncio.StreamWriter) -> bool:
        if left[0]:
            left[0] -= 1
            await asyncio.sleep(after_s)
            return False
        return await steady(0.0, 0.0)(body, writer)

    return answer


@pytest.mark.parametrize(
    ("closed", "after_s", "sent", "finished"),
    [
        (1, 0.0, 2, True),  # as if it had been closed for being idle
        (2, 0.0, 2, False),  # a new connection closes, too: it is the request
        (1, 2.5, 1, False),  # so long after the request it is the request as well
    ],
)
def test_a_request_on_a_connection_that_had_been_closed_goes_again_once(
    closed: int, after_s: float, sent: int, finished: bool
) -> None:
    with fake(closing_unanswered(closed, after_s)) as server:
        result = run(server, trace([0.0]))
    assert len(server.bodies) == sent
    assert result.times.finished.tolist() == [finished]
    assert result.errors == (() if finished else ("request 0: the connection closed early",))
    # what was lost by it is delay of the client's, not of the server's
    assert sent == 1 or result.started_s + result.times.sent_s[0] > server.received_s[0]


def test_a_higher_rate_compresses_the_arrivals() -> None:
    with fake(steady(0.0, 0.0)) as server:
        result = run(server, trace([0.0, 0.4]), rate=4.0)
    assert result.times.scheduled_s.tolist() == [0.0, 0.1]


def test_requests_ask_for_exactly_the_recorded_lengths() -> None:
    log = Trace(np.zeros(3), np.array([5, 9, 2]), np.array([3, 1, 7]))
    with fake(steady(0.0, 0.0)) as server:
        run(server, log)
    bodies = sorted(server.bodies, key=lambda body: body["max_tokens"])
    assert [(len(b["prompt"]), b["max_tokens"], b["min_tokens"]) for b in bodies] == [(9, 1, 1), (5, 3, 3), (2, 7, 7)]
    for body in bodies:
        assert body["ignore_eos"] is True
        assert body["stream"] is True
        assert body["model"] == "fake"
        assert set(body["prompt"]) <= set(IDS.tolist())


def test_lengths_that_a_server_does_not_honor_are_recorded_as_they_came() -> None:
    async def stops_early(body: dict, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(token() + token()) + chunk(closing(2)) + b"0\r\n\r\n")

    with fake(stops_early) as server:
        result = run(server, trace([0.0], outputs=50), k=30)
    assert result.times.output_tokens.tolist() == [2]
    assert result.times.finished.all()
    # shorter than k: complete at the end
    assert result.times.values(Metric("ttf", 30)) == result.times.values(Metric("e2e"))


def test_events_with_several_tokens_are_counted_by_usage() -> None:
    async def pairs(body: dict, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for _ in range(3):
            writer.write(chunk(token("two words")))
            await asyncio.sleep(0.05)
        writer.write(chunk(closing(6)) + b"0\r\n\r\n")

    with fake(pairs) as server:
        result = run(server, trace([0.0], outputs=6), k=3)
    assert result.times.output_tokens.tolist() == [6]
    assert result.server["tokens_per_event"] == 2
    # the third token comes with the second event
    assert result.times.token_gap_s is not None
    assert result.times.kth_token_s[0] - result.times.first_token_s[0] == pytest.approx(result.times.token_gap_s[0])


@pytest.mark.parametrize("pieces", [1, 3, 7])
def test_answers_may_come_in_any_pieces(pieces: int) -> None:
    async def crumbs(body: dict, writer: asyncio.StreamWriter) -> None:
        text = token() + token() + closing(2)
        data = HEAD + b"".join(chunk(text[i : i + 11]) for i in range(0, len(text), 11)) + b"0\r\n\r\n"
        for i in range(0, len(data), pieces):
            writer.write(data[i : i + pieces])
            await asyncio.sleep(0)

    with fake(crumbs) as server:
        result = run(server, trace([0.0, 0.0]))
    assert result.errors == ()
    assert result.times.output_tokens.tolist() == [2, 2]


def test_a_connection_serves_one_request_after_the_other() -> None:
    with fake(steady(0.0, 0.0)) as server:
        result = run(server, trace([0.1 * i for i in range(12)]))
    # eight, opened before the trace began, and one that asked for the model; more only where answers were late
    times = result.times
    most = max(int(((times.sent_s <= at_s) & (times.end_s >= at_s)).sum()) for at_s in times.sent_s)
    assert server.connections <= 1 + max(8, most)


def test_an_answer_without_chunks_ends_with_its_connection() -> None:
    async def old(body: dict, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + token() + closing(1).replace(b"\n", b"\r\n"))
        return False

    with fake(old) as server:
        result = run(server, trace([0.0, 0.05], outputs=1))
    assert result.errors == ()
    assert result.times.finished.all()


def failing(data: bytes) -> Callable:
    async def answer(body: dict, writer: asyncio.StreamWriter) -> bool:
        if body["max_tokens"] == 13:
            writer.write(data)
            return False
        return await steady(0.0, 0.0)(body, writer)

    return answer


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"HTTP/1.1 500 Oops\r\ncontent-length: 4\r\n\r\nwhy?", "HTTP 500: why?"),
        (b"HTTP/1.1 429 Busy\r\ncontent-length: 0\r\n\r\n", "HTTP 429"),
        (HEAD + chunk(token()), "closed early"),
        (HEAD + chunk(token()) + b"0\r\n\r\n", "without [DONE]"),
        (HEAD + chunk(token() + event({"error": {"message": "out of blocks"}})) + b"0\r\n\r\n", "out of blocks"),
        (HEAD + chunk(event("{no json")) + b"0\r\n\r\n", "no JSON"),
        (HEAD + b"zz\r\n", "no chunk"),
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", "no HTTP"),
        (b"", "closed early"),
    ],
)
def test_what_goes_wrong_with_one_request_is_told_and_the_others_go_on(data: bytes, said: str) -> None:
    log = Trace(np.array([0.0, 0.02, 0.04]), np.full(3, 4), np.array([2, 13, 2]))
    with fake(failing(data)) as server:
        result = run(server, log)
    assert len(result.errors) == 1
    assert result.errors[0].startswith("request 1: ")
    assert said in result.errors[0]
    assert result.times.finished.tolist() == [True, False, True]


def test_a_request_without_an_end_is_given_up_in_time() -> None:
    async def stalls(body: dict, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(token()))
        await asyncio.sleep(30)

    with fake(stalls) as server:
        began = time.perf_counter()
        result = run(server, trace([0.0]), timeout_s=3)
    assert time.perf_counter() - began < 25
    assert "no end within 3 s" in result.errors[0]
    assert result.times.output_tokens.tolist() == [1]
    assert not np.isnan(result.times.first_token_s[0])
    assert np.isnan(result.times.values(Metric("e2e"))[0])


def test_a_server_that_is_not_there_is_one_clear_error() -> None:
    with pytest.raises(NoServer) as raised:
        replay(trace([0.0]), "http://127.0.0.1:9", token_ids=IDS)
    assert raised.value.exit_code == 1
    with pytest.raises(NoServer, match="paretune serve"):
        replay(trace([0.0]), "http://127.0.0.1:9", model="known", token_ids=IDS)
    with pytest.raises(BadReplay) as bad:
        replay(trace([0.0]), "localhost:8000", token_ids=IDS)
    assert (bad.value.where, bad.value.exit_code) == ("url", 2)


def test_a_model_whose_vocabulary_nobody_knows_is_refused() -> None:
    with fake(steady(0.0, 0.0)) as server, pytest.raises(BadReplay) as raised:
        replay(trace([0.0]), server.url)
    assert "fake" in raised.value.where


def test_ctrl_c_ends_the_replay_and_its_connections() -> None:
    async def endless(body: dict, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        while True:
            writer.write(chunk(token()))
            await writer.drain()
            await asyncio.sleep(0.01)

    code = (
        "import numpy as np, sys\n"
        "from paretune.profiler.replay import replay\n"
        "from paretune.traces.trace import Trace\n"
        "log = Trace(np.zeros(3), np.full(3, 4), np.full(3, 5))\n"
        "try:\n"
        "    replay(log, sys.argv[1], token_ids=np.arange(9, dtype=np.int32))\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    with fake(endless) as server:
        process = subprocess.Popen([sys.executable, "-c", code, server.url], stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while len(server.bodies) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=20)
        assert out == "interrupted\n"
        assert server.closed_early.wait(10)


def test_prompts_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    log = trace([0.0, 1.0], inputs=50)
    first, again, other = (prompts(log, IDS, seed) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again))
    assert not any((a == b).all() for a, b in zip(first, other))
    assert not (first[0] == first[1]).all()


def test_equal_prefix_hashes_get_equal_tokens_and_no_others_do() -> None:
    prefix = PrefixHashes.of([[1, 2], [1, 2, 3], [1, 4], []], 8)
    log = Trace(np.zeros(4), np.array([20, 30, 12, 16]), np.full(4, 1), prefix=prefix)
    one, two, three, four = prompts(log, IDS, 0)
    assert [len(p) for p in (one, two, three, four)] == [20, 30, 12, 16]
    assert (one[:16] == two[:16]).all()
    assert (one[:8] == three[:8]).all()
    assert not (one[8:12] == three[8:12]).all()
    assert not (one[16:20] == two[16:20]).all()
    assert not (one[:8] == four[:8]).all()


def test_random_prompts_hold_no_special_tokens() -> None:
    ids = prompt_token_ids(resolve_model("paretune/small"))
    config = json.loads((resolve_model("paretune/small") / "config.json").read_text())
    special = {config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]}
    assert not special & set(ids.tolist())
    assert len(ids) == config["vocab_size"] - 3


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_the_kth_token_is_never_before_the_first_nor_after_the_last(events: int, per_event: int, k: int) -> None:
    stream = Stream(b"", sent_s=10.0, token_s=[10.0 + i for i in range(events)], output_tokens=events * per_event)
    times, _ = request_times([stream], np.zeros(1), 10.0, k)
    if events * per_event >= k:
        assert times.first_token_s[0] <= times.kth_token_s[0] <= times.end_s[0]
        assert times.kth_token_s[0] == -(-k // per_event) - 1
    else:
        assert np.isnan(times.kth_token_s[0])


@given(st.binary(max_size=300))
def test_no_bytes_make_the_client_raise(data: bytes) -> None:
    async def feed() -> Stream:
        stream = Stream(b"")
        connection = Connection(lambda ended: None)
        connection.connection_made(_Deaf())
        done = connection.start(stream, b"")
        connection.data_received(data)
        connection.data_received(data)
        connection.connection_lost(None)
        await done
        return stream

    stream = asyncio.run(feed())
    assert stream.finished == (stream.error is None)


class _Deaf(asyncio.Transport):
    def write(self, data: bytes) -> None: ...
    def abort(self) -> None: ...
    def is_closing(self) -> bool:
        return False


def test_addresses_may_end_in_v1_and_hold_a_path() -> None:
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert Origin(url).post("/v1/completions", b"x").startswith(b"POST /v1/completions HTTP/1.1\r\nHost: h:1\r\n")
    assert Origin("https://h/api/v1", "key").get("/v1/models").startswith(b"GET /api/v1/models HTTP/1.1")
    assert b"Authorization: Bearer key\r\n" in Origin("http://h", "key").post("/x", b"")
