"""Replays a trace against a live server over HTTP, with streaming: open loop, at the recorded arrival times.

A request is sent when the trace says, however busy the server is, and its TTFT counts from then (no coordinated
omission; Tene, "How NOT to Measure Latency", 2013). How late it was really sent is reported beside it. Requests that
wait for others' ends (traces/sessions.py) are sent when these have come and the pause is over. Prompts are
random token ids of the recorded lengths; where the trace's prefix hashes agree, so do the tokens. The answers are
made as long as the recorded ones (`ignore_eos`, `min_tokens` = `max_tokens`); of servers that do not honor that, the
lengths that came count.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..runtime.model_shape import BadModel, ModelShape, read_json, resolve_model
from ..traces.metrics import RequestTimes, percentiles
from ..traces.sessions import DependentArrivals, SendOrder, open_loop
from ..traces.trace import Trace
from .http_stream import Connection, Origin, Stream, connect, fetch_json

CONNECT_LIMIT_S = 30.0
# asyncio's timers wake up to a millisecond late; the last stretch is yielded to the loop instead
_EARLY_S = 0.001
# a connection that closes later than this after a request was sent on it was not closed for having been idle
_STALE_S = 2.0

Progress = Callable[[int, int], None]


class BadReplay(Exception):
    """A replay that cannot begin."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str) -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:160]}; allowed: {self.allowed}; {self.todo}"


class NoServer(BadReplay):
    """Nothing answers at the address."""

    exit_code: ClassVar[int] = 1


@dataclass(frozen=True)
class ReplayResult:
    """What a live server did with a trace.

    times             one row a request, in trace order; second 0 is second 0 of the trace
    schedule_error_s  how much later requests were sent than they should have been: "p50", "p95", "max"
    errors            "request i: what went wrong", for those that did not finish
    server            url, model, and tokens_per_event (1: every token came in an event of its own)
    started_s         second 0 of the trace on the clock of time.perf_counter
    client_cpu_s      CPU time of this process during the replay
    """

    times: RequestTimes
    schedule_error_s: dict[str, float]
    errors: tuple[str, ...]
    server: dict[str, Any]
    started_s: float
    client_cpu_s: float


def replay(
    trace: Trace,
    url: str,
    *,
    k: int = 30,
    seed: int = 0,
    rate: float = 1.0,
    api_key: str | None = None,
    model: str | None = None,
    token_ids: NDArray[np.int32] | None = None,
    timeout_s: float = 600.0,
    arrivals: DependentArrivals | None = None,
    progress: Progress | None = None,
) -> ReplayResult:
    """Send every request of a trace at its time and record when its tokens come.

    Args:
        url: of an OpenAI-compatible server, with or without /v1.
        k: of TTF-k.
        seed: of the prompts' token ids. Equal prompts sent again find themselves in the server's prefix cache, so
            replays one after the other want a seed each.
        rate: arrivals are that many times as fast as recorded.
        model: the name to ask for; left out: the first that the server has.
        token_ids: ids that prompts may hold; left out: those of the model directory that `model` names
            (`prompt_token_ids`).
        timeout_s: of one request, from its sending; then its connection is closed and it counts as failed.
        arrivals: which requests wait for others' ends; left out: all come as recorded. One that failed has ended.
        progress: called with the numbers of requests ended and of all.
    Raises: BadReplay: no http address, no positive rate, or token ids that nobody knows; NoServer. What goes wrong with
        single requests is collected, not raised. KeyboardInterrupt closes all connections first.
    """
    if not 0 < rate < math.inf:
        raise BadReplay("rate", rate, "a positive number", "replay at 1 for the recorded arrivals")
    try:
        origin = Origin(url, api_key)
    except ValueError as error:
        raise BadReplay("url", error, "http://HOST:PORT", "correct the address") from None
    name = _served_model(origin, url) if model is None else model
    if token_ids is None:
        token_ids = _known_token_ids(name)
    bodies = request_bodies(trace, name, token_ids, seed)
    streams = [Stream(body) for body in bodies]
    sends = SendOrder(open_loop(len(trace)) if arrivals is None else arrivals, trace.arrival_s / rate)
    cpu_s = time.process_time()
    try:
        started_s = asyncio.run(_replay(origin, streams, sends, timeout_s, progress))
    except (OSError, TimeoutError) as error:
        raise _no_server(url, error) from None
    cpu_s = time.process_time() - cpu_s
    times, tokens_per_event = request_times(streams, sends.scheduled_s, started_s, k)
    late_s = times.sent_s - sends.sent_s
    p50, p95, most = percentiles(late_s, (50, 95, 100))
    errors = tuple(f"request {i}: {s.error}" for i, s in enumerate(streams) if s.error is not None)
    server = {"url": url, "model": name, "tokens_per_event": tokens_per_event}
    return ReplayResult(times, {"p50": p50, "p95": p95, "max": most}, errors, server, started_s, cpu_s)


def prompt_token_ids(model_dir: Path) -> NDArray[np.int32]:
    """The ids that random prompts may hold: the whole vocabulary but for special tokens. Raises: BadModel."""
    shape = ModelShape.load(model_dir)
    usable = np.ones(shape.vocab_size, np.bool_)
    special = set(shape.eos_token_ids)
    tokenizer = model_dir / "tokenizer.json"
    if tokenizer.is_file():
        special |= {int(token["id"]) for token in read_json(tokenizer).get("added_tokens", []) if token.get("special")}
    usable[[token for token in special if token < shape.vocab_size]] = False
    return np.flatnonzero(usable).astype(np.int32)


def prompts(trace: Trace, token_ids: NDArray[np.int32], seed: int = 0) -> list[NDArray[np.int32]]:
    """Token ids of every prompt: random, the same for the same seed, and the same under the same prefix hash."""
    out = []
    blocks: dict[int, NDArray[np.int32]] = {}
    for i, length in enumerate(trace.input_tokens.tolist()):
        rng = np.random.default_rng((seed, 0, i))
        prompt = token_ids[rng.integers(0, len(token_ids), length)]
        if trace.prefix is not None:
            size = trace.prefix.block_size
            for place, content in enumerate(trace.prefix.row(i).tolist()):
                if content not in blocks:
                    block_rng = np.random.default_rng((seed, 1, content & 0xFFFFFFFFFFFFFFFF))
                    blocks[content] = token_ids[block_rng.integers(0, len(token_ids), size)]
                covered = prompt[place * size : (place + 1) * size]
                covered[:] = blocks[content][: len(covered)]
        out.append(prompt)
    return out


def request_bodies(trace: Trace, model: str, token_ids: NDArray[np.int32], seed: int = 0) -> list[bytes]:
    """The JSON of every request, made before the first is sent: it would cost time between two arrivals."""
    bodies = []
    for prompt, tokens in zip(prompts(trace, token_ids, seed), trace.output_tokens.tolist()):
        rest = {
            "model": model,
            "max_tokens": tokens,
            "min_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        ids = ",".join(map(str, prompt.tolist()))
        bodies.append(f'{{"prompt":[{ids}],{json.dumps(rest)[1:]}'.encode())
    return bodies


def request_times(
    streams: list[Stream], scheduled_s: NDArray[np.float64], started_s: float, k: int
) -> tuple[RequestTimes, float]:
    """Times of every request on the trace's clock; and tokens per event, all streams together.

    Where events hold several tokens, the k-th token is taken to come with the event that holds its share of them.
    """
    n = len(streams)
    first_s, kth_s, end_s, sent_s = (np.full(n, np.nan) for _ in range(4))
    tokens, finished = np.zeros(n, np.int64), np.zeros(n, np.bool_)
    gaps: list[NDArray[np.float64]] = []
    for i, stream in enumerate(streams):
        sent_s[i] = stream.sent_s - started_s
        tokens[i], finished[i] = stream.output_tokens, stream.finished
        events = np.array(stream.token_s) - started_s
        gaps.append(np.diff(events))
        if len(events):
            first_s[i], end_s[i] = events[0], events[-1]
        if len(events) and tokens[i] >= k:
            place = k if tokens[i] == len(events) else math.ceil(k * len(events) / tokens[i])
            kth_s[i] = events[min(place, len(events)) - 1]
    events_total = sum(len(stream.token_s) for stream in streams)
    times = RequestTimes(
        scheduled_s=np.asarray(scheduled_s, np.float64),
        sent_s=sent_s,
        first_token_s=first_s,
        kth_token_s=kth_s,
        end_s=end_s,
        output_tokens=tokens,
        finished=finished,
        k=k,
        token_gap_s=np.concatenate(gaps) if gaps else np.zeros(0),
        gap_offsets=np.concatenate([[0], np.cumsum([len(gap) for gap in gaps])]).astype(np.int64),
    )
    return times, float(tokens.sum() / events_total) if events_total else math.nan


async def _replay(
    origin: Origin, streams: list[Stream], sends: SendOrder, timeout_s: float, progress: Progress | None
) -> float:
    """Send everything on time and wait for all; returns second 0 of the trace on the clock of time.perf_counter."""
    client = _Client(origin, timeout_s, len(streams), progress)
    tasks: list[asyncio.Task[None]] = []
    ended = asyncio.Event()  # something has, and who waits for it may be next

    async def send(row: int) -> None:
        try:
            await client.send(streams[row])
        finally:
            if sends.arrivals.waits:
                sends.ended(row, time.perf_counter() - started_s)
                ended.set()

    try:
        # the first connections are there before the trace begins, as those of a running client are
        await client.open(min(8, len(streams)))
        started_s = time.perf_counter() + 0.05
        while len(tasks) < len(streams):
            ended.clear()
            if await _come(started_s + sends.next_s(), ended):
                tasks.append(asyncio.create_task(send(sends.take()[0])))
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        client.close()
    return started_s


async def _come(at_s: float, ended: asyncio.Event) -> bool:
    """Wait until a time; False: a request ended before. An infinite time is one that only an end can bring."""
    wait_s = at_s - time.perf_counter()
    if wait_s > _EARLY_S:
        with suppress(TimeoutError):
            async with asyncio.timeout(None if math.isinf(wait_s) else wait_s - _EARLY_S):
                await ended.wait()
    while time.perf_counter() < at_s and not ended.is_set():
        await asyncio.sleep(0)
    return not ended.is_set()


class _Client:
    """Connections to one origin, and the requests on them."""

    def __init__(self, origin: Origin, timeout_s: float, total: int, progress: Progress | None) -> None:
        self._origin = origin
        self._timeout_s = timeout_s
        self._total = total
        self._progress = progress
        self._ended = 0
        self._idle: deque[Connection] = deque()
        self._all: set[Connection] = set()

    async def open(self, count: int) -> None:
        for _ in range(count):
            self._idle.append(await self._connect())

    async def _connect(self) -> Connection:
        async with asyncio.timeout(CONNECT_LIMIT_S):
            connection = await connect(self._origin, self._put_back)
        self._all.add(connection)
        return connection

    def _put_back(self, connection: Connection) -> None:
        if connection.reusable and not connection.closed:
            self._idle.append(connection)
        else:
            self._all.discard(connection)
            connection.close()

    async def send(self, stream: Stream) -> None:
        """One request to its end; what goes wrong is written into it.

        A server may close an idle connection in the very moment that a request is sent on it. Such a request was not
        served, and goes again, once and on a new connection (RFC 9112, section 9.3.1).
        """
        try:
            idle = self._take_idle()
            if idle is None or not await self._exchange(stream, idle):
                stream.error = None
                await self._exchange(stream, await self._connect())
        except (OSError, TimeoutError) as error:
            stream.error = f"no connection: {error or type(error).__name__}"
        self._ended += 1
        if self._progress is not None:
            self._progress(self._ended, self._total)

    async def _exchange(self, stream: Stream, connection: Connection) -> bool:
        """A request and its answer, well or not; False: the connection closed at once, with no byte of an answer."""
        done = connection.start(stream, self._origin.post("/v1/completions", stream.body))
        ended, _ = await asyncio.wait([done], timeout=self._timeout_s)
        if not ended:
            stream.error = f"no end within {self._timeout_s:g} s"
            connection.close()
            await done
        return not (connection.unanswered and time.perf_counter() - stream.sent_s < _STALE_S)

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        return None

    def close(self) -> None:
        for connection in self._all:
            connection.close()


def _no_server(url: str, error: Exception) -> NoServer:
    return NoServer(url, str(error) or type(error).__name__, "a running server", "start it: `paretune serve`")


def _served_model(origin: Origin, url: str) -> str:
    try:
        answer = asyncio.run(fetch_json(origin, "/v1/models", CONNECT_LIMIT_S))
        return str(answer["data"][0]["id"])  # type: ignore[index]
    except (OSError, TimeoutError) as error:
        raise _no_server(url, error) from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BadReplay(f"{url}: /v1/models", error, "a list of models", "give the model's name") from None


def _known_token_ids(model: str) -> NDArray[np.int32]:
    try:
        return prompt_token_ids(resolve_model(model))
    except BadModel as error:
        todo = "give the model's directory, so that prompts hold tokens it knows"
        allowed = "a model directory on this machine"
        raise BadReplay(f"vocabulary of model {model!r}", error.found, allowed, todo) from None
