"""The HTTP server before engines that answer as scripted: a prompt is answered with its own tokens, so text comes back.

Everything between the socket and the engine is the real thing: uvicorn, the app, the worker's loop and its messages.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from paretune.runtime import worker
from paretune.runtime.engine import EngineStats, Output, Request, StepRecord
from paretune.runtime.request_log import RequestLog
from paretune.runtime.sampler import TokenLogprobs
from paretune.runtime.server.app import ServedModel, Service
from paretune.runtime.server.process import http_config, listen
from paretune.runtime.server.replicas import Fleet, Replica
from paretune.runtime.small_model import MODEL_DIR
from paretune.runtime.spec import Pool
from paretune.runtime.text import ChatTemplate, Tokenizer
from paretune.traces import read

MODEL = "small"
BOS, EOS = 1, 2
MAX_LEN = 512
TOKENIZER = Tokenizer.load(MODEL_DIR)
assert TOKENIZER is not None


@dataclass
class Echo:
    """An engine that answers a prompt with the prompt's own tokens (again and again under ignore_eos), then EOS.

    step_s: seconds of each step; tokens_per_step: as speculation would bring; seats: requests that run at once
    """

    tokens_per_step: int = 1
    step_s: float = 0.0
    seats: int = 1000
    fails: bool = False
    last_step: StepRecord | None = None
    last_admitted: list[int] = field(default_factory=list)
    live: dict[int, tuple[Request, Iterator[int], int]] = field(default_factory=dict)
    seen: list[Request] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    steps: int = 0
    begun: set[int] = field(default_factory=set)
    pools: list[Pool] = field(default_factory=list)

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    @property
    def num_waiting(self) -> int:
        return max(0, len(self.live) - self.seats)

    def change(self, pool: Pool) -> None:
        self.pools.append(pool)

    def add(self, request: Request) -> None:
        own = [token for token in request.prompt_token_ids.tolist() if token != BOS]
        answer = itertools.cycle(own) if request.sampling.ignore_eos else iter([*own, EOS])
        self.live[request.request_id] = (request, answer, 0)
        self.seen.append(request)

    def abort(self, request_id: int) -> None:
        if self.live.pop(request_id, None):
            self.aborted.append(request_id)

    def step(self) -> list[Output]:
        if self.fails:
            raise RuntimeError("the engine caught fire")
        started_s = time.perf_counter()
        time.sleep(self.step_s)
        self.steps += 1
        running = list(self.live)[: self.seats]
        self.last_admitted = [request_id for request_id in running if request_id not in self.begun]
        self.begun.update(running)
        if running:
            self.last_step = StepRecord(len(running), len(running), len(running), 1.0, 0.0, self.step_s, started_s)
        return [self._output(request_id) for request_id in running]

    def _output(self, request_id: int) -> Output:
        request, answer, done = self.live[request_id]
        sampling = request.sampling
        tokens: list[int] = []
        reason = None
        while reason is None and len(tokens) < self.tokens_per_step:
            token = next(answer)
            tokens.append(token)
            if (token == EOS and not sampling.ignore_eos) or token in sampling.stop_token_ids:
                reason = "stop"
            elif done + len(tokens) == sampling.max_tokens:
                reason = "length"
        self.live[request_id] = (request, answer, done + len(tokens))
        if reason is not None:
            del self.live[request_id]
        top = tuple((rank + 3, -1.0 - rank) for rank in range(sampling.logprobs or 0))
        logprobs = tuple(TokenLogprobs(token, -0.5, top) for token in tokens)
        return Output(request_id, tuple(tokens), None if sampling.logprobs is None else logprobs, reason, 7)

    def stats(self) -> EngineStats:
        waiting = self.num_waiting
        return EngineStats(len(self.live) - waiting, waiting, 3 * len(self.live), 30, 0, 10, 4, self.steps)

    def close(self) -> None:
        pass


@dataclass
class Running:
    url: str
    engines: list[Echo]
    fleet: Fleet
    lost: list[int]

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body)
        return httpx.post(self.url + path, content=content, timeout=30, **options)

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        response = self.post("/v1/completions", {"model": MODEL, "prompt": prompt, "max_tokens": 100, **fields})
        assert response.status_code == 200, response.text
        data: dict[str, Any] = response.json()
        return data

    def stream(self, prompt: Any, path: str = "/v1/completions", **fields: Any) -> list[dict[str, Any]]:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 100, "stream": True, **fields}
        response = self.post(path, {key: value for key, value in body.items() if value is not None})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, done = response.text.strip().split("\n\n")
        assert done == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]


@contextmanager
def running(
    *engines: Echo,
    log: Path | None = None,
    api_keys: tuple[str, ...] = (),
    text: bool = True,
    **pool: Any,
) -> Iterator[Running]:
    """A server in a thread of its own, each engine in another; pool: fields of it."""
    listener = listen("127.0.0.1", 0)
    pairs = [socket.socketpair() for _ in engines]
    workers = [threading.Thread(target=drive, args=(engine, pair[1])) for engine, pair in zip(engines, pairs)]
    lost: list[int] = []
    replicas = [Replica(i, lambda one: lost.append(one.index) if one.lost else None) for i in range(len(engines))]
    fleet = Fleet(replicas, Pool(replicas=len(engines), **pool))
    tokenizer, template = (TOKENIZER, ChatTemplate.load(MODEL_DIR)) if text else (None, None)
    model = ServedModel(
        MODEL, 4096, MAX_LEN, frozenset({EOS}), tokenizer, template, fleet.pool.scheduling == "priority"
    )
    request_log = None if log is None else RequestLog(log, block_size=4)
    service = Service(model, fleet, api_keys=api_keys, request_log=request_log)
    server = uvicorn.Server(http_config(service.app()))

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        for replica, (ours, _) in zip(fleet.replicas, pairs):
            await loop.create_connection(lambda replica=replica: replica, sock=ours)
        await server.serve(sockets=[listener])
        for replica in fleet.replicas:
            replica.close()
        await asyncio.sleep(0)

    server_thread = threading.Thread(target=lambda: asyncio.run(serve()))
    for thread in (*workers, server_thread):
        thread.start()
    port = listener.getsockname()[1]
    try:
        wait_until(lambda: fleet.ready or bool(lost))
        yield Running(f"http://127.0.0.1:{port}", list(engines), fleet, lost)
    finally:
        server.should_exit = True
        for thread in (server_thread, *workers):
            thread.join(10)
            assert not thread.is_alive()
        if request_log is not None:
            request_log.close()


def drive(engine: Echo, connection: socket.socket) -> None:
    """What worker.main does, less what belongs to a process."""
    connection.sendall(worker.frame((worker.READY,)))
    try:
        worker.run(engine, connection, worker.Inbox(connection))
    except RuntimeError as error:
        connection.sendall(worker.frame((worker.FAILED, 1, str(error))))
    finally:
        connection.close()


def wait_until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(Echo()) as server:
        yield server


def client_of(server: Running, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, **options)


# the public client, unchanged


def test_openai_client_completes(server: Running) -> None:
    answer = client_of(server).completions.create(model=MODEL, prompt="import os and sys", max_tokens=100)
    assert answer.choices[0].text == "import os and sys"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    tokens = len(TOKENIZER.encode("import os and sys", add_special_tokens=False))
    assert answer.usage.prompt_tokens == tokens + 1  # BOS
    assert answer.usage.completion_tokens == tokens + 1  # EOS
    assert answer.usage.total_tokens == 2 * tokens + 2
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 7


def test_openai_client_streams_text_and_usage(server: Running) -> None:
    text = "naïve 🦆🦆 ducks, 日本語"
    chunks = list(
        client_of(server).completions.create(
            model=MODEL, prompt=text, max_tokens=200, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text
    assert all("\ufffd" not in chunk.choices[0].text for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(chunks) - 1


def test_usage_comes_in_every_event_where_it_is_asked_for(server: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = server.stream("one two three", stream_options=options)
    prompt = last["usage"]["prompt_tokens"]
    assert [event["usage"]["completion_tokens"] for event in events] == list(range(1, len(events) + 1))
    assert {event["usage"]["prompt_tokens"] for event in events} == {prompt}
    assert events[-1]["usage"] == last["usage"]
    chat = {"messages": [{"role": "user", "content": "hi"}], "stream_options": options, "max_tokens": 3}
    events = server.stream(None, "/v1/chat/completions", **chat)
    assert [event["usage"]["completion_tokens"] for event in events] == [0, 1, 2, 3, 3]
    body = {"model": MODEL, "prompt": "x", "stream": True, "stream_options": {"continuous_usage_stats": True}}
    response = server.post("/v1/completions", body)
    assert response.json()["error"]["param"] == "stream_options"


def test_openai_client_chats(server: Running) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    client = client_of(server)
    answer = client.chat.completions.create(model=MODEL, messages=messages)
    # the prompt comes back: what the template made of the messages
    assert answer.choices[0].message.content == "User: hello\n\nAssistant:"
    assert answer.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(model=MODEL, messages=messages, stream=True, max_completion_tokens=4))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, None, "length"]


def test_openai_client_stream_helper_builds_the_message(server: Running) -> None:
    with client_of(server).chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], max_completion_tokens=50
    ) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "User: hello\n\nAssistant:"


def test_openai_client_reads_logprobs(server: Running) -> None:
    client = client_of(server)
    messages: Any = [{"role": "user", "content": "x"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, logprobs=True, top_logprobs=2, max_tokens=3)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert [len(token.top_logprobs) for token in content] == [2, 2, 2]
    assert b"".join(bytes(token.bytes or []) for token in content).decode() == answer.choices[0].message.content
    completion = client.completions.create(model=MODEL, prompt="a b c", logprobs=1, max_tokens=3, stream=True)
    chunks = [chunk.choices[0] for chunk in completion]
    assert [chunk.logprobs.token_logprobs for chunk in chunks if chunk.logprobs] == [[-0.5]] * 3
    offsets = [offset for chunk in chunks if chunk.logprobs for offset in chunk.logprobs.text_offset or []]
    assert offsets == [0, *itertools.accumulate(len(chunk.text) for chunk in chunks[:-1])]


def test_openai_client_lists_models(server: Running) -> None:
    client = client_of(server)
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


def test_openai_client_gets_its_own_exceptions(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="512 tokens") as error:
        client_of(server).completions.create(model=MODEL, prompt="x", max_tokens=512)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="beam_width"):
        client_of(server).completions.create(model=MODEL, prompt="x", extra_body={"beam_width": 4})


# what public load generators send, taken from the wire (benchmarks/load_generators.py runs the tools themselves)

_USAGE = {"include_usage": True}
_CHAT = [{"role": "user", "content": "nt ear for several virtues Have I li"}]
_PARTS = [{"role": "user", "content": [{"type": "text", "text": "1 0 m0 Finish medical want almost away"}]}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        # aiperf 0.13.0
        (
            "chat/completions",
            {"messages": _CHAT, "max_completion_tokens": 8, "stream_options": {"include_usage": True}},
        ),
        (
            "completions",
            {"prompt": "st my soul Who like a brother", "max_tokens": 8, "stream_options": {"include_usage": True}},
        ),
        # guidellm 0.8.1
        (
            "chat/completions",
            {
                "messages": _PARTS,
                "max_completion_tokens": 8,
                "ignore_eos": True,
                "stream_options": {**_USAGE, "continuous_usage_stats": True},
            },
        ),
    ],
)
def test_load_generators_get_their_tokens_and_their_count(server: Running, path: str, body: dict[str, Any]) -> None:
    rest = {"max_tokens": None, **{name: value for name, value in body.items() if name != "prompt"}}
    *events, last = server.stream(body.get("prompt"), f"/v1/{path}", **rest)
    assert last["usage"]["completion_tokens"] == 8
    told = [event["choices"][0].get("delta", event["choices"][0]) for event in events]
    assert sum("role" not in one for one in told) == 8


# prompts and answers


def test_several_prompts_get_several_choices_in_order(server: Running) -> None:
    answer = server.complete(["one", "two words", "three"])
    assert [choice["text"] for choice in answer["choices"]] == ["one", "two words", "three"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    parts = [server.complete(prompt)["usage"]["total_tokens"] for prompt in ("one", "two words", "three")]
    assert answer["usage"]["total_tokens"] == sum(parts)
    events = server.stream(["one", "two words", "three"])
    by_index = {i: "".join(e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == i) for i in range(3)}
    assert by_index == {0: "one", 1: "two words", 2: "three"}


def test_token_ids_go_in_and_come_out(server: Running) -> None:
    ids = TOKENIZER.encode("def f(x):", add_special_tokens=False).tolist()
    choice = server.complete(ids, return_token_ids=True)["choices"][0]
    assert choice["prompt_token_ids"] == ids
    assert choice["token_ids"] == [*ids, EOS]
    assert choice["text"] == "def f(x):"
    first, *events = server.stream([ids], return_token_ids=True)
    assert first["choices"][0]["prompt_token_ids"] == ids
    assert [event["choices"][0]["token_ids"] for event in events] == [[one] for one in [*ids, EOS]]


def test_one_event_comes_for_each_token_even_where_it_completes_no_text(server: Running) -> None:
    ids = TOKENIZER.encode("🦆", add_special_tokens=False).tolist()
    assert len(ids) > 1
    events = server.stream(ids)
    assert [event["choices"][0]["text"] for event in events] == [*[""] * (len(ids) - 1), "🦆", ""]


def test_ignore_eos_with_equal_limits_gives_exactly_so_many_tokens(server: Running) -> None:
    answer = server.complete([5, 6, 7], max_tokens=40, min_tokens=40, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 40
    assert answer["choices"][0]["finish_reason"] == "length"
    sampling = server.engines[0].seen[-1].sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos) == (40, 40, True)


def test_sampling_parameters_reach_the_engine(server: Running) -> None:
    fields = {"temperature": 0.25, "top_p": 0.5, "top_k": 9, "seed": 11, "stop_token_ids": [77]}
    server.complete("x", **fields)
    sampling = server.engines[0].seen[-1].sampling
    assert {name: getattr(sampling, name) for name in fields} == {**fields, "stop_token_ids": (77,)}


def test_a_stop_string_ends_the_answer_and_is_never_shown(server: Running) -> None:
    text = "first line\nsecond line\n\nthird"
    for stop in ("\n\n", ["zzz", "nd line\n\nth"], "first line\nsecond line"):
        expected = min((text.split(one)[0] for one in ([stop] if isinstance(stop, str) else stop)), key=len)
        choice = server.complete(text, stop=stop)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
        shown = ""
        for event in server.stream(text, stop=stop):
            shown += event["choices"][0]["text"]
            assert expected.startswith(shown)
        assert shown == expected


def test_a_stop_string_ends_the_work_of_the_engine_too(server: Running) -> None:
    answer = server.complete("stop here, not later", stop=" here", ignore_eos=True, max_tokens=400)
    assert answer["usage"]["completion_tokens"] < 6
    wait_until(lambda: not server.engines[0].live)


def test_a_stop_string_counts_only_after_min_tokens(server: Running) -> None:
    once = len(TOKENIZER.encode("a;", add_special_tokens=False))
    limits = {"min_tokens": 2 * once + 1, "max_tokens": 50}
    answer = server.complete("a;", stop=";", ignore_eos=True, **limits)
    assert answer["choices"][0]["text"] == "a;a;a"


def test_a_stop_token_ends_the_answer_and_is_not_shown(server: Running) -> None:
    ids = TOKENIZER.encode("alpha beta gamma", add_special_tokens=False).tolist()
    answer = server.complete(ids, stop_token_ids=[ids[-1]])
    shown = b"".join(TOKENIZER.bytes_of(token) for token in ids[:-1]).decode()
    assert answer["choices"][0]["text"] == shown
    assert answer["usage"]["completion_tokens"] == len(ids)


def test_tokens_of_one_step_share_an_event_and_a_stop_string_cuts_inside_it() -> None:
    with running(Echo(tokens_per_step=5)) as server:
        text = "one two three four five six seven eight"
        events = server.stream(text, return_token_ids=True)[1:]
        assert "".join(event["choices"][0]["text"] for event in events) == text
        assert max(len(event["choices"][0]["token_ids"]) for event in events) == 5
        ids = TOKENIZER.encode("one two three four", add_special_tokens=False).tolist()
        answer = server.complete(text, stop=" four", return_token_ids=True)
        assert answer["choices"][0]["text"] == "one two three"
        assert answer["choices"][0]["token_ids"] == ids


# refusals


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": MODEL, "prompt": "x", "n": 2}, 400, "n"),
        ({"model": MODEL, "prompt": [4096]}, 400, "prompt"),
        ({"model": MODEL, "prompt": "x", "stop_token_ids": [5000]}, 400, "stop_token_ids"),
        ({"model": MODEL, "prompt": [5] * 512}, 400, "prompt"),
        ({"model": MODEL, "prompt": "\ud800"}, 400, "prompt"),
        ({"model": "other", "prompt": "x"}, 404, "model"),
        (b"{", 400, None),
        (b"x" * ((1 << 20) + 1), 413, None),
        (b"[" * (1 << 20), 400, None),
    ],
)
def test_errors_are_openai_error_objects(server: Running, body: Any, status: int, param: str | None) -> None:
    before = len(server.engines[0].seen)
    response = server.post("/v1/completions", body)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(server.engines[0].seen) == before


def test_wrong_methods_and_paths_are_openai_errors_too(server: Running) -> None:
    response = httpx.get(server.url + "/v1/completions")
    assert response.status_code == 405
    assert response.json()["error"]["type"] == "invalid_request_error"
    response = httpx.get(server.url + "/v1/embeddings")
    assert response.status_code == 404
    assert "/v1/embeddings" in response.json()["error"]["message"]


def test_a_prompt_of_8192_token_ids_fits_the_body_limit(server: Running) -> None:
    response = server.post("/v1/completions", {"model": MODEL, "prompt": [4095] * 8192})
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_body_that_says_it_is_huge_is_refused_before_it_comes(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n{")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 413")


def test_an_api_key_is_asked_for_and_does_not_show() -> None:
    with running(Echo(), api_keys=("other-key", "secret-key")) as server:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret-key"}):
            response = server.post("/v1/completions", {"model": MODEL, "prompt": "x"}, headers=headers)
            assert response.status_code == 401
            assert "secret" not in response.text
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="secret-key", max_retries=0)
        assert client.completions.create(model=MODEL, prompt="hello").choices[0].text == "hello"
        assert httpx.get(server.url + "/health").status_code == 200


def test_a_model_without_a_tokenizer_takes_and_gives_token_ids() -> None:
    with running(Echo(), text=False) as server:
        choice = server.complete([5, 6, 7], return_token_ids=True)["choices"][0]
        assert (choice["text"], choice["token_ids"]) == ("", [5, 6, 7, EOS])
        for fields in ({"prompt": "x"}, {"prompt": [5], "stop": "x"}, {"prompt": [5], "logprobs": 1}):
            response = server.post("/v1/completions", {"model": MODEL, **fields})
            assert response.status_code == 400
            assert "tokenizer" in response.json()["error"]["message"]
        body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
        assert server.post("/v1/chat/completions", body).status_code == 400


# clients that go away, replicas that fail, several replicas


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_the_engine(stream: bool) -> None:
    with running(Echo(step_s=0.01)) as server:
        body = {"model": MODEL, "prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": stream}
        host, port = server.url.removeprefix("http://").split(":")
        data = json.dumps(body).encode()
        for _ in range(5):
            with socket.create_connection((host, int(port))) as connection:
                head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
                connection.sendall(head.encode() + data)
                wait_until(lambda: bool(server.engines[0].live))
            wait_until(lambda: not server.engines[0].live)
        assert len(server.engines[0].aborted) == 5
        wait_until(lambda: metric(server, "vllm:kv_cache_usage_perc") == 0)
        assert server.complete("still here")["choices"][0]["text"] == "still here"


def test_replicas_take_requests_in_turn() -> None:
    with running(Echo(), Echo(), Echo()) as server:
        for i in range(7):
            server.complete([100 + i])
        server.complete([[110], [111]])
        taken = [[int(request.prompt_token_ids[0]) for request in engine.seen] for engine in server.engines]
        assert taken == [[100, 103, 106], [101, 104, 110], [102, 105, 111]]


def test_a_replica_that_fails_fails_its_requests_with_500() -> None:
    engine = Echo()
    with running(engine) as server:
        engine.fails = True
        response = server.post("/v1/completions", {"model": MODEL, "prompt": "x"})
        assert response.status_code == 500
        assert "the engine caught fire" in response.json()["error"]["message"]
        wait_until(lambda: server.lost == [0])
        assert httpx.get(server.url + "/health").status_code == 503
        assert server.post("/v1/completions", {"model": MODEL, "prompt": "x"}).status_code == 503


def test_a_replica_that_fails_in_the_middle_of_a_stream_ends_it_with_an_error() -> None:
    engine = Echo(step_s=0.02)
    with running(engine) as server:
        stream = client_of(server).completions.create(
            model=MODEL, prompt="x", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        engine.fails = True
        with pytest.raises(openai.APIError, match="caught fire"):
            list(stream)


# what it counts and logs


def metric(server: Running, name: str) -> float:
    text = httpx.get(server.url + "/metrics").text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))


def test_metrics_count_what_was_served() -> None:
    with running(Echo(), Echo()) as server:
        answers = [server.complete("one two three"), server.complete("one two three", max_tokens=1)]
        wait_until(lambda: metric(server, "vllm:prefix_cache_queries_total") == 20)
        prompt = sum(answer["usage"]["prompt_tokens"] for answer in answers)
        generated = sum(answer["usage"]["completion_tokens"] for answer in answers)
        assert metric(server, "vllm:prompt_tokens_total") == prompt
        assert metric(server, "vllm:generation_tokens_total") == generated
        assert metric(server, "vllm:time_to_first_token_seconds_count") == 2
        assert metric(server, "vllm:e2e_request_latency_seconds_count") == 2
        assert metric(server, "vllm:inter_token_latency_seconds_count") == generated - 2
        assert metric(server, "vllm:request_time_per_output_token_seconds_count") == 1
        assert metric(server, "vllm:request_success_total") == 2
        assert metric(server, "vllm:num_requests_running") == 0


def test_the_request_log_is_read_by_our_own_reader(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    with running(Echo(), log=path) as server:
        client = client_of(server)
        shared = "import os\nimport sys\nimport json\nimport asyncio\n"
        client.completions.create(model=MODEL, prompt=shared + "a", extra_headers={"X-App": "voice"})
        client.completions.create(model=MODEL, prompt=shared + "b", extra_headers={"X-App": "voice"})
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], metadata={"app": "chat", "session": "s1"}
        )
        server.complete([5, 6], user="never logged")
        server.post("/v1/completions", {"model": MODEL, "prompt": "x", "n": 2})
    trace = read(path)
    assert trace.app is not None
    assert trace.app.values() == ["voice", "voice", "chat", MODEL]
    assert trace.session is not None
    assert trace.session.values() == [None, None, "s1", None]
    assert trace.prefix is not None
    assert trace.prefix.block_size == 4
    first, second = trace.prefix.row(0).tolist(), trace.prefix.row(1).tolist()
    blocks = len(TOKENIZER.encode(shared, add_special_tokens=True)) // 4
    assert first[:blocks] == second[:blocks]
    assert trace.output_tokens.tolist()[-1] == 3
    text = path.read_text()
    assert "import" not in text
    assert "never logged" not in text


class Recorded(Echo):
    """Like the real engine: an abort is work, which a step without a record of its own reports."""

    @property
    def has_work(self) -> bool:
        return bool(self.live or self.aborted)

    def step(self) -> list[Output]:
        outputs = [Output(request_id, (), None, "abort", 0) for request_id in self.aborted]
        self.aborted.clear()
        return outputs + super().step()


def test_the_step_log_has_one_line_for_each_step_that_computed(tmp_path: Path) -> None:
    engine, (ours, theirs) = Recorded(step_s=0.01), socket.socketpair()
    log = worker.StepLog(tmp_path / "steps.jsonl", 3)
    thread = threading.Thread(target=worker.run, args=(engine, theirs, worker.Inbox(theirs), log))
    thread.start()
    sampling = {"max_tokens": 1000, "ignore_eos": True}
    prompt = b"\x05\x00\x00\x00"
    ours.sendall(worker.frame((worker.ADD, 0, prompt, sampling, 0, None)))
    wait_until(lambda: engine.steps > 3)
    ours.sendall(worker.frame((worker.ABORT, 0, None)))
    wait_until(lambda: not engine.has_work)
    ours.sendall(worker.frame((worker.ADD, 1, prompt, {"max_tokens": 2}, 0, None)))
    wait_until(lambda: len(engine.seen) == 2 and not engine.has_work)
    ours.shutdown(socket.SHUT_WR)
    thread.join(60)
    ours.close()
    records = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    started = [record["started_s"] for record in records]
    assert {record["replica"] for record in records} == {3}
    assert len(set(started)) == len(started) > 4


def test_requests_go_to_the_replica_with_the_fewest_outstanding_tokens() -> None:
    with running(Echo(step_s=0.05), Echo(), router="least_outstanding_tokens") as server:
        busy, idle = server.engines
        long = {"model": MODEL, "prompt": [5, 6], "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", server.url + "/v1/completions", json=long, timeout=30):
            wait_until(lambda: len(busy.seen) == 1)
            for _ in range(4):
                server.complete([7, 8, 9], max_tokens=3)
            assert (len(busy.seen), len(idle.seen)) == (1, 4)
            assert server.fleet.replicas[0].outstanding_tokens == 402
        wait_until(lambda: bool(busy.aborted))
        assert [replica.outstanding_tokens for replica in server.fleet.replicas] == [0, 0]


def test_a_conversation_stays_with_its_replica() -> None:
    with running(Echo(), Echo(), router="prefix_affinity") as server:
        first, second = [5] * 40, [6] * 40
        for prompt in (first, second, [*first, 7, 7], [*second, 8, 8], [*first, 9], second):
            server.complete(prompt, max_tokens=2)
        for engine in server.engines:
            assert len({int(request.prompt_token_ids[0]) for request in engine.seen}) == 1
        assert [len(engine.seen) for engine in server.engines] == [3, 3]


def test_the_priority_of_a_request_reaches_the_engine_where_the_spec_schedules_by_it() -> None:
    with running(Echo(), scheduling="priority") as server:
        server.complete("one", priority=-3)
        server.complete("two")
        assert [request.priority for request in server.engines[0].seen] == [-3, 0]


def test_a_priority_that_would_change_nothing_is_refused_by_name() -> None:
    with running(Echo()) as server:
        server.complete("one", priority=0)
        response = server.post("/v1/completions", {"model": MODEL, "prompt": "one", "priority": 1})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "priority")
