"""What keeps bad clients from what good ones need: queue, connections, heads, bodies, readers, keys.

Before the scripted engine of test_server_http; everything from the socket to the engine's messages is the real thing.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.runtime.server import app, connections
from paretune.runtime.server.replicas import DrainRate

from .test_server_http import MODEL, Echo, Running, client_of, metric, running, wait_until


@contextmanager
def connected(server: Running, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(30)
        connection.connect((host, int(port)))
        yield connection


def request_bytes(body: dict[str, object]) -> bytes:
    data = json.dumps({"model": MODEL, **body}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data) + data


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes; a reset ends it, too."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


ENDLESS = {"prompt": ["x"] * 8, "max_tokens": 500, "ignore_eos": True, "stream": True, "logprobs": 20}


# clients that read slowly, or not at all


def test_a_client_that_does_not_read_loses_its_answer_and_the_engine_its_work() -> None:
    with running(Echo()) as server, connected(server, receive_buffer=4096) as connection:
        connection.sendall(request_bytes(ENDLESS))
        wait_until(lambda: len(server.engines[0].seen) == 8 and not server.engines[0].live)
        assert len(server.engines[0].aborted) == 8
        wait_until(lambda: metric(server, "vllm:kv_cache_usage_perc") == 0)
        assert metric(server, "paretune:streams_cut_total") == 1
        connection.settimeout(1)
        received = bytearray()
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(1 << 16)
        # all eight answers are some 8 MB
        assert len(received) < 1.5e6
        assert b"read faster" in received[-1000:]
        assert server.complete("still here")["choices"][0]["text"] == "still here"


def test_a_client_that_never_reads_loses_its_connection_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STALL_TIMEOUT_S", 0.3)
    with running(Echo()) as server, connected(server, receive_buffer=4096) as connection:
        connection.sendall(request_bytes(ENDLESS))
        ended = select.poll()
        ended.register(connection, 0)
        wait_until(lambda: bool(ended.poll(0)))


def test_a_slow_reader_that_keeps_up_gets_every_token() -> None:
    with running(Echo(step_s=0.002)) as server, connected(server, receive_buffer=4096) as connection:
        connection.sendall(request_bytes({**ENDLESS, "prompt": "x"}))
        received = bytearray()
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(8192)
            time.sleep(0.001)
        assert received.count(b'"text"') == 500
        assert b"read faster" not in received


# the queue


def test_a_full_queue_is_429_and_says_when_to_come_again() -> None:
    engine = Echo(seats=1, step_s=0.02)
    with running(engine, max_num_seqs=1, max_queued_requests=2) as server:
        body = request_bytes({"prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True})
        with connected(server) as first, connected(server) as second, connected(server) as third:
            for number, connection in enumerate((first, second, third), start=1):
                connection.sendall(body)
                wait_until(lambda number=number: len(engine.seen) == number)  # type: ignore[misc]
            wait_until(lambda: metric(server, "vllm:num_requests_waiting") == 2)
            with pytest.raises(openai.RateLimitError, match="max_queued_requests") as refused:
                client_of(server).completions.create(model=MODEL, prompt="x")
            assert refused.value.type == "rate_limit_error"
            assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
            assert metric(server, "vllm:admission_rejections_total") == 1
            assert len(engine.seen) == 3
        # the clients are gone, and there is room again
        wait_until(lambda: not engine.live)
        wait_until(lambda: metric(server, "vllm:num_requests_waiting") == 0)
        assert server.complete("room again")["choices"][0]["text"] == "room again"


def test_a_burst_on_an_idle_server_is_no_queue_as_far_as_there_are_seats() -> None:
    with running(Echo(seats=8, step_s=0.01), max_num_seqs=8, max_queued_requests=2) as server:
        assert len(server.complete(["x"] * 10)["choices"]) == 10
        response = server.post("/v1/completions", {"model": MODEL, "prompt": ["x"] * 11})
        assert response.status_code == 429


def test_without_a_limit_everybody_waits() -> None:
    with running(Echo(seats=1), max_num_seqs=1) as server:
        assert len(server.complete(["x"] * 100)["choices"]) == 100


def test_retry_after_is_the_time_in_which_the_queue_drains() -> None:
    rate = DrainRate()
    assert rate.retry_after_s(1000, 0.0) == 1, "nothing measured"
    for second in range(11):
        rate.admitted(2, float(second))
    assert rate.retry_after_s(12, 10.0) == 6, "12 requests at 2 a second"
    assert rate.retry_after_s(12, 20.0) == 12, "nobody was admitted for as long again"
    assert rate.retry_after_s(10**9, 10.0) == 60
    assert rate.retry_after_s(1, 1e6) == 60, "a queue that no longer moves"


@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), max_size=200),
    st.integers(0, 10**9),
    st.floats(0, 200),
)
def test_retry_after_is_always_a_second_to_a_minute(
    admissions: list[tuple[float, int]], queued: int, later_s: float
) -> None:
    rate, now_s = DrainRate(), 0.0
    for gap_s, count in admissions:
        now_s += gap_s
        rate.admitted(count, now_s)
    assert 1 <= rate.retry_after_s(queued, now_s + later_s) <= 60


# connections, heads and bodies


def test_a_head_that_does_not_come_is_408_and_a_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.3)
    with running(Echo()) as server:
        with connected(server) as silent:
            assert rest(silent) == b""
        with connected(server) as slow:
            slow.sendall(b"GET /health HT")
            answer = rest(slow)
            assert status_of(answer) == 408
            assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["type"] == "invalid_request_error"
        with connected(server) as second_request:
            second_request.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert second_request.recv(12) == b"HTTP/1.1 200"
            second_request.sendall(b"GET /hea")
            assert b"HTTP/1.1 408 " in rest(second_request)


def test_bytes_that_trickle_in_do_not_stretch_the_time_for_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.3)
    with running(Echo()) as server, connected(server) as slow:
        slow.setblocking(False)
        answer = b""

        def trickle() -> bool:
            nonlocal answer
            try:
                slow.send(b"x")
                answer += slow.recv(4096)
            except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                time.sleep(0.02)
            return answer.startswith(b"HTTP/1.1 408")

        slow.send(b"GET /health?")
        wait_until(trickle)


def test_slow_connections_do_not_keep_good_clients_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(Echo()) as server:
        monkeypatch.setattr(connections.Connection, "max_connections", 40)
        slow = []
        host, port = server.url.removeprefix("http://").split(":")
        for _ in range(100):
            slow.append(socket.create_connection((host, int(port))))
            slow[-1].sendall(b"POST /v1/completions HTTP/1.1\r\nx: ")
        for i in range(10):
            assert server.complete(f"good {i}")["choices"][0]["text"] == f"good {i}"
        for connection in slow:
            connection.close()


def test_a_server_whose_connections_are_all_busy_says_503(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Echo(step_s=0.02)
    with running(engine) as server:
        monkeypatch.setattr(connections.Connection, "max_connections", 2)
        body = request_bytes({"prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True})
        with connected(server) as first, connected(server) as second:
            first.sendall(body)
            second.sendall(body)
            wait_until(lambda: len(engine.seen) == 2)
            with connected(server) as third:
                assert status_of(rest(third)) == 503
        wait_until(lambda: not engine.live)
        assert httpx.get(server.url + "/health").status_code == 200


@pytest.mark.parametrize("size", [17 << 10, 200 << 10])
def test_a_head_too_large_is_431_in_one_piece_or_many(size: int) -> None:
    with running(Echo()) as server:
        assert httpx.get(server.url + "/health", headers={"x": "y" * size}).status_code == 431
        with connected(server) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx: ")
            for _ in range(size // 1024):
                connection.sendall(b"y" * 1024)
            connection.sendall(b"\r\n\r\n")
            answer = rest(connection)
        assert status_of(answer) == 431
        assert b"16,384 bytes" in answer
        assert httpx.get(server.url + "/health", headers={"x": "y" * (15 << 10)}).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: many\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_an_error_and_no_line_in_the_log(sent: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with running(Echo()) as server:
        with connected(server) as connection:
            connection.sendall(sent + b"\r\n\r\n")
            answer = rest(connection)
        assert status_of(answer) in (400, 501)
        assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["message"]
        assert server.complete("fine")["choices"][0]["text"] == "fine"
    assert capfd.readouterr().err == ""


def test_a_body_that_does_not_come_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_BODY_TIMEOUT_S", 0.3)
    with running(Echo()) as server, connected(server) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert status_of(rest(connection)) == 408


# keys


def test_any_of_several_keys_lets_a_client_in() -> None:
    with running(Echo(), api_keys=("first", "second")) as server:
        for key, status in (("first", 200), ("second", 200), ("firs", 401), ("FIRST", 401), ("second,", 401)):
            response = server.post(
                "/v1/completions", {"model": MODEL, "prompt": "x"}, headers={"authorization": f"Bearer {key}"}
            )
            assert response.status_code == status, key
