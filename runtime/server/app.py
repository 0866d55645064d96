"""The HTTP side: routes, keys, limits and errors of an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..request_log import FinishedRequest, RequestLog
from ..text import BadMessages, ChatTemplate, Tokenizer
from . import metrics
from .adapters import ServedAdapters
from .answers import error_event
from .connections import MAX_HEAD_BYTES, head_too_large
from .generation import Generation, Reply
from .protocol import ApiError, Call, parse_chat, parse_completion
from .replicas import Fleet

MAX_BODY_BYTES = 1 << 20
# read and thrown away past the limit, so that a client that still sends can read the answer
_MOST_DISCARDED_BYTES = 16 << 20
_BODY_TIMEOUT_S = 60.0
# longer texts are tokenized beside the event loop: 2,000 characters take 2 to 3 ms on a 2-core VM (2026-11)
_LONG_TEXT = 2000


@dataclass(frozen=True)
class ServedModel:
    """What the server knows of the model; weights are the replicas' business.

    end_token_ids  tokens that end an answer and are not shown
    tokenizer      None: token ids only
    by_priority    requests may say how urgent they are
    """

    name: str
    vocab_size: int
    max_model_len: int
    end_token_ids: frozenset[int]
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    by_priority: bool = False


class Service:
    """The handlers, and what they share."""

    def __init__(
        self,
        model: ServedModel,
        fleet: Fleet,
        *,
        api_keys: Sequence[str] = (),
        request_log: RequestLog | None = None,
        adapters: ServedAdapters | None = None,
    ) -> None:
        """api_keys: any of them lets a client in; none: anyone comes in."""
        self.model = model
        self.fleet = fleet
        self.adapters = adapters or ServedAdapters(model.name, (), fleet, None)
        self.metrics = metrics.Metrics(model.name, model.max_model_len, fleet)
        self._key_digests = [_digest(b"Bearer " + key.encode()) for key in api_keys]
        self._request_log = request_log
        self._created = int(time.time())

    def app(self) -> ASGIApp:
        """The ASGI application."""
        v1 = self._for_key_holders
        changes = [
            Route("/v1/load_lora_adapter", v1(self.load_adapter), methods=["POST"]),
            Route("/v1/unload_lora_adapter", v1(self.unload_adapter), methods=["POST"]),
        ]
        app = Starlette(
            routes=[
                Route("/health", self.health, methods=["GET"]),
                Route("/metrics", self.show_metrics, methods=["GET"]),
                Route("/v1/models", v1(self.models), methods=["GET"]),
                Route("/v1/models/{name:path}", v1(self.one_model), methods=["GET"]),
                Route("/v1/completions", v1(self.completions), methods=["POST"]),
                Route("/v1/chat/completions", v1(self.chat_completions), methods=["POST"]),
                *(changes if self.adapters.may_change else []),
            ],
            exception_handlers={
                ApiError: _api_error,
                HTTPException: _http_exception,
                ClientDisconnect: _client_gone,
                Exception: _internal_error,
            },
        )
        return _with_head_limit(app)

    async def health(self, request: Request) -> Response:
        """200 once every replica has loaded."""
        replicas = self.fleet.replicas
        ready = sum(replica.ready for replica in replicas)
        status = "ok" if self.fleet.ready else "loading"
        body = {"status": status, "replicas": len(replicas), "ready": ready}
        return _json(json.dumps(body).encode(), 200 if self.fleet.ready else 503)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": metrics.CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        return _json(json.dumps({"object": "list", "data": [self._model_object(), *self.adapters.objects()]}).encode())

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._check_model(name)
        found = self.adapters.object(name) if name in self.adapters else self._model_object()
        return _json(json.dumps(found).encode())

    async def load_adapter(self, request: Request) -> Response:
        return Response(await self.adapters.load(await _body(request)), media_type="text/plain")

    async def unload_adapter(self, request: Request) -> Response:
        return Response(self.adapters.unload(await _body(request)), media_type="text/plain")

    async def completions(self, request: Request) -> Response | Answer:
        received = await _body(request)
        return await self._answer(request, parse_completion(received), "cmpl")

    async def chat_completions(self, request: Request) -> Response | Answer:
        received = await _body(request)
        return await self._answer(request, parse_chat(received), "chatcmpl")

    async def _answer(self, request: Request, call: Call, kind: str) -> Answer:
        reply = Reply(
            call, f"{kind}-{secrets.token_hex(12)}", self.metrics, app=request.headers.get("x-app") or call.app
        )
        self._check_model(call.model)
        # decided here and now: an adapter that is unloaded while the prompt is read must not become the base
        adapter = call.model if call.model in self.adapters else None
        if not self.fleet.ready:
            raise ApiError(503, "the server is loading or shutting down: wait for GET /health to answer 200")
        # before the work of tokenizing, and again before any of it goes to the replicas
        self._check_room(call)
        if self.model.tokenizer is None and (call.stop or call.logprobs is not None):
            field = "stop" if call.stop else "logprobs"
            raise ApiError(400, f"{field}: the model has no tokenizer.json, so there is no text", field)
        if call.priority and not self.model.by_priority:
            raise ApiError(400, "priority: this server schedules first come, first served; it takes only 0", "priority")
        self._check_token_ids(np.array(call.sampling["stop_token_ids"], dtype=np.int64), "stop_token_ids")
        prompts = [await self._chat_prompt(call)] if call.chat else [await self._prompt(one) for one in call.prompts]
        end_token_ids = self.model.end_token_ids | set(call.sampling["stop_token_ids"])
        for index, prompt_token_ids in enumerate(prompts):
            generation = Generation(
                index,
                prompt_token_ids,
                {**call.sampling, "max_tokens": self._max_tokens(call, len(prompt_token_ids))},
                reply=reply,
                tokenizer=self.model.tokenizer,
                end_token_ids=end_token_ids,
                on_finish=self._finished,
                adapter=adapter,
            )
            reply.add(generation)
        self._check_room(call)
        for generation in reply.generations:
            self.metrics.request_received(generation.sampling["max_tokens"])
            self.fleet.dispatch(generation)
        return Answer(reply)

    def _check_room(self, call: Call) -> None:
        """Raises: ApiError (429): the queue is as long as the spec lets it be."""
        if self.fleet.has_room(max(1, len(call.prompts))):
            return
        self.metrics.request_refused()
        queued = self.fleet.queued
        raise ApiError(
            429,
            f"{queued} requests wait, the most that max_queued_requests lets wait: come again later",
            code="rate_limit_exceeded",
            retry_after_s=self.fleet.drain_rate.retry_after_s(queued, time.perf_counter()),
        )

    async def _chat_prompt(self, call: Call) -> NDArray[np.int32]:
        if self.model.chat_template is None:
            raise ApiError(400, f"model {self.model.name!r} has no chat template: use /v1/completions", "messages")
        try:
            text = self.model.chat_template.render(call.messages)
        except BadMessages as error:
            raise ApiError(400, str(error), "messages") from None
        # the template writes the special tokens itself
        return await self._encode(text, "messages", add_special_tokens=False)

    async def _prompt(self, prompt: str | NDArray[np.int32]) -> NDArray[np.int32]:
        if isinstance(prompt, str):
            return await self._encode(prompt, "prompt", add_special_tokens=True)
        self._check_token_ids(prompt, "prompt")
        return prompt

    async def _encode(self, text: str, field: str, *, add_special_tokens: bool) -> NDArray[np.int32]:
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            raise ApiError(400, f"{field}: the model has no tokenizer.json: give token ids to /v1/completions", field)
        try:
            if len(text) < _LONG_TEXT:
                ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
            else:
                ids = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
        except UnicodeEncodeError:
            raise ApiError(400, f"{field}: half a surrogate pair is no text", field) from None
        if not len(ids):
            raise ApiError(400, f"{field}: an empty prompt", field)
        return ids

    def _check_token_ids(self, token_ids: NDArray[np.integer], field: str) -> None:
        if len(token_ids) and not (token_ids.min() >= 0 and token_ids.max() < self.model.vocab_size):
            allowed = f"token ids are 0 to {self.model.vocab_size - 1}"
            raise ApiError(400, f"{field}: {allowed}; found {token_ids.min()} to {token_ids.max()}", field)

    def _max_tokens(self, call: Call, prompt_tokens: int) -> int:
        """Raises: ApiError (400): prompt and answer do not fit the model."""
        most = self.model.max_model_len - prompt_tokens
        wanted = max(1, call.sampling["min_tokens"]) if call.max_tokens is None else call.max_tokens
        if wanted > most:
            message = (
                f"this model takes at most {self.model.max_model_len} tokens, prompt and answer together; "
                f"the prompt has {prompt_tokens} and the answer may have {wanted}"
            )
            field = "messages" if call.chat else "prompt"
            raise ApiError(400, message, field, "context_length_exceeded")
        return most if call.max_tokens is None else call.max_tokens

    def _check_model(self, name: str) -> None:
        if name != self.model.name and name not in self.adapters:
            message = f"there is no model {name[:80]!r}; this server has {self.model.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def _model_object(self) -> dict[str, object]:
        return {
            "id": self.model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "paretune",
            "max_model_len": self.model.max_model_len,
        }

    def _finished(self, generation: Generation) -> None:
        """Count and log a request that ended, however it did."""
        end_s = time.perf_counter()
        if generation.finish_reason in ("stop", "length") and generation.last_token_s is not None:
            end_s = generation.last_token_s
        first_s = generation.first_token_s
        ttft_s = None if first_s is None else first_s - generation.received_s
        e2e_s = end_s - generation.received_s
        reason = generation.finish_reason or "error"
        self.metrics.request_finished(generation, reason, end_s)
        # the end of a stream must not wait for the log: 8,000 prompt tokens take 1 ms to hash
        if self._request_log is not None and reason != "error":
            finished = FinishedRequest(
                created=generation.created,
                model=generation.adapter or self.model.name,
                adapter=generation.adapter,
                app=generation.app,
                session=generation.call.session,
                prompt_token_ids=generation.prompt_token_ids,
                completion_tokens=generation.completion_tokens,
                cached_tokens=generation.cached_tokens,
                ttft_s=ttft_s,
                e2e_s=e2e_s,
                finish_reason=reason,
                speculated=None if self.fleet.pool.speculation == "none" else generation.speculated,
            )
            asyncio.get_running_loop().call_soon(self._request_log.write, finished)

    def _for_key_holders(self, handler: _Handler) -> _Handler:
        if not self._key_digests:
            return handler

        async def checked(request: Request) -> Response | Answer:
            given = _digest(request.headers.get("authorization", "").encode("latin-1"))
            # all of them, whichever fits: the time must not tell
            if not sum(hmac.compare_digest(given, known) for known in self._key_digests):
                raise ApiError(
                    401, "no API key, or a wrong one: send Authorization: Bearer KEY", code="invalid_api_key"
                )
            return await handler(request)

        return checked


class Answer:
    """An ASGI response that sends a Reply as it grows, and gives up its requests when the client goes away."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = self._reply
        watch = asyncio.create_task(_fail_when_gone(receive, reply))
        try:
            if reply.call.stream:
                await self._send_events(send)
            else:
                await _json(await reply.whole())(scope, receive, send)
        finally:
            watch.cancel()
            reply.cancel()

    async def _send_events(self, send: Send) -> None:
        reply = self._reply
        # nothing is sent before the first token: until then an error can still have a status of its own
        events = await reply.events()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            while not reply.finished:
                await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
                events = await reply.events()
        except ApiError as error:
            events = [error_event(error.body())]
        await send({"type": "http.response.body", "body": b"".join(events), "more_body": False})


_Handler = Callable[[Request], Awaitable[Response | Answer]]


def _digest(credentials: bytes) -> bytes:
    return hashlib.sha256(credentials).digest()


def _with_head_limit(app: ASGIApp) -> ASGIApp:
    """Refuse heads that came in one piece and are too large; uvicorn's parser counts only while one is incomplete."""

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            size = len(scope["raw_path"]) + len(scope["query_string"])
            size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
            if size > MAX_HEAD_BYTES:
                await _error_response(head_too_large())(scope, receive, send)
                return
        await app(scope, receive, send)

    return limited


async def _fail_when_gone(receive: Receive, reply: Reply) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    reply.fail(ApiError(499, "the client has closed the connection"))


async def _body(request: Request) -> bytes:
    """The body of a request. Raises: ApiError: 413 too large, 408 too slow."""
    # h11 has refused whatever is no number
    if int(request.headers.get("content-length", "0")) > _MOST_DISCARDED_BYTES:
        raise _too_large()
    data = bytearray()
    length = 0
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for chunk in request.stream():
                length += len(chunk)
                if length <= MAX_BODY_BYTES:
                    data += chunk
                elif length > _MOST_DISCARDED_BYTES:
                    break
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {_BODY_TIMEOUT_S:.0f} s") from None
    if length > MAX_BODY_BYTES:
        raise _too_large()
    return bytes(data)


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")


def _json(body: bytes, status: int = 200) -> Response:
    return Response(body, status, headers={"content-type": "application/json"})


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


def _error_response(error: ApiError) -> Response:
    response = _json(error.body(), error.status)
    if error.status in (408, 413, 431):
        # what is left of the body would be read as the next request
        response.headers["connection"] = "close"
    if error.retry_after_s is not None:
        response.headers["retry-after"] = str(error.retry_after_s)
    return response


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = f"{request.method} {request.url.path}"
    message = f"{found}: method not allowed" if error.status_code == 405 else f"{found}: {error.detail}"
    response = _json(ApiError(error.status_code, message).body(), error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _internal_error(request: Request, error: Exception) -> Response:
    return _json(ApiError(500, "an error inside the server; its log has more").body(), 500)
