"""One prompt on its way through an engine, and the HTTP reply that waits for it. All of it runs on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..speculated import NOTHING
from ..text import Detokenizer, StopStrings, Tokenizer
from .answers import Choice, EventWriter, TokenLogprobs, Usage, chat_logprobs, completion_logprobs, whole_answer
from .metrics import Metrics
from .protocol import ApiError, Call

# some 1,500 tokens, and what logprobs make of 100
MAX_UNREAD_BYTES = 256 << 10


class Generation:
    """One answer: what came of it, and when. Times are seconds of time.perf_counter().

    received_s      when its HTTP request was complete
    admitted_s      when the step began that admitted it first; None before
    first_token_s, last_token_s  when its first and latest tokens came from the engine; None before
    finish_reason   "stop", "length" or "abort"; None while it runs
    speculated      what was proposed for it so far, and kept
    abort           tells the engine to end it; set when it is handed to a replica
    """

    def __init__(
        self,
        index: int,
        prompt_token_ids: NDArray[np.int32],
        sampling: dict[str, Any],
        *,
        reply: Reply,
        tokenizer: Tokenizer | None,
        end_token_ids: frozenset[int],
        on_finish: Callable[[Generation], None],
        adapter: str | None = None,
    ) -> None:
        self.index = index
        self.prompt_token_ids = prompt_token_ids
        self.sampling = sampling
        self.adapter = adapter
        self.call, self.app = reply.call, reply.app
        self.received_s, self.created = reply.received_s, reply.created
        self.abort: Callable[[], None] | None = None
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.speculated = NOTHING
        self.admitted_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.finish_reason: str | None = None
        self.text_parts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self._reply = reply
        self._tokenizer = tokenizer
        self._end_token_ids = end_token_ids
        self._on_finish = on_finish
        self._metrics = reply.metrics
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer.token_bytes)
        self._stops = StopStrings(self.call.stop) if self.call.stop else None
        self._min_tokens: int = sampling["min_tokens"]
        self._text_offset = 0

    def receive(
        self,
        token_ids: Sequence[int],
        finish_reason: str | None,
        cached_tokens: int,
        logprobs: list[TokenLogprobs] | None,
        now_s: float,
    ) -> None:
        """What one step of the engine made of it."""
        if token_ids:
            if self.last_token_s is None:
                self.first_token_s = now_s
                self.cached_tokens = cached_tokens
                self._metrics.first_token(now_s - self.received_s, len(self.prompt_token_ids), len(token_ids))
                self._reply.open_choice(self)
            else:
                self._metrics.next_tokens(now_s - self.last_token_s, len(token_ids))
            self.last_token_s = now_s
        if self._stops is None:
            text = self._text_of(token_ids, finish_reason)
            self.completion_tokens += len(token_ids)
        else:
            text, count, stopped = self._text_before_stop(self._stops, token_ids, finish_reason)
            self.completion_tokens += count
            token_ids = token_ids[:count]
            logprobs = None if logprobs is None else logprobs[:count]
            if stopped:
                if finish_reason is None and self.abort is not None:
                    self.abort()
                finish_reason = "stop"
        self.finish_reason = finish_reason
        shown = None
        if not self.call.stream:
            self.text_parts.append(text)
            self.token_ids += token_ids
            self.logprobs += logprobs or ()
        elif logprobs is not None:
            shown = self._shown_logprobs(token_ids, logprobs)
        self._reply.deliver(self, text, token_ids, shown)
        if finish_reason is not None:
            self._on_finish(self)

    def cancel(self) -> None:
        """The client is gone: free what the engine holds."""
        if self.finish_reason is None:
            self.finish_reason = "abort"
            if self.abort is not None:
                self.abort()
            self._on_finish(self)

    def fail(self, error: ApiError) -> None:
        """The replica is gone."""
        if self.finish_reason is None:
            self.finish_reason = "error"
            self._reply.fail(error)
            self._on_finish(self)

    def choice(self) -> Choice:
        """The whole answer, once it is finished."""
        assert self.finish_reason is not None, "an answer has no end yet"
        asked = self.call.return_token_ids
        return Choice(
            self.index,
            "".join(self.text_parts),
            self.finish_reason,
            self._shown_logprobs(self.token_ids, self.logprobs) if self.call.logprobs is not None else None,
            self.prompt_token_ids.tolist() if asked else None,
            self.token_ids if asked else None,
        )

    def _text_of(self, token_ids: Sequence[int], finish_reason: str | None) -> str:
        """The text that these tokens complete; the token that ended the answer is not shown."""
        if self._detokenizer is None:
            return ""
        if finish_reason is None:
            return self._detokenizer.push(token_ids)
        if finish_reason == "stop" and token_ids and token_ids[-1] in self._end_token_ids:
            token_ids = token_ids[:-1]
        return self._detokenizer.push(token_ids) + self._detokenizer.flush()

    def _text_before_stop(
        self, stops: StopStrings, token_ids: Sequence[int], finish_reason: str | None
    ) -> tuple[str, int, bool]:
        """(text, tokens up to and with the one that completed a stop string, whether one did).

        Like vLLM, stop strings count from the token after min_tokens.
        """
        shown = ""
        for i, token_id in enumerate(token_ids):
            last = i == len(token_ids) - 1
            text = self._text_of((token_id,), finish_reason if last else None)
            if self.completion_tokens + i < self._min_tokens:
                shown += text
                continue
            text, stopped = stops.push(text)
            shown += text
            if stopped:
                return shown, i + 1, True
        return shown + (stops.flush() if finish_reason is not None else ""), len(token_ids), False

    def _shown_logprobs(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        assert self._tokenizer is not None, "refused where the model has no tokenizer"
        if self.call.chat:
            return chat_logprobs(self._tokenizer, token_ids, logprobs)
        shown = completion_logprobs(self._tokenizer, token_ids, logprobs, self._text_offset)
        self._text_offset += sum(map(len, shown["tokens"]))
        return shown


class Reply:
    """All answers of one HTTP request, and what of them is ready to be sent.

    A client that reads more slowly than tokens come has MAX_UNREAD_BYTES of grace, beyond what the network holds; then
    its stream ends with an error, and its requests with it: their blocks are worth more than their answer.
    """

    def __init__(self, call: Call, call_id: str, metrics: Metrics, *, app: str | None) -> None:
        self.call = call
        self.app = app
        self.call_id = call_id
        self.metrics = metrics
        self.received_s = time.perf_counter()
        self.created = time.time()
        self.generations: list[Generation] = []
        self.error: ApiError | None = None
        self._events: list[bytes] = []
        self._unread_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._unfinished = 0
        self._writer: EventWriter | None = None
        if call.stream:
            self._writer = EventWriter(
                chat=call.chat,
                call_id=call_id,
                created=int(self.created),
                model=call.model,
                with_usage=call.include_usage,
            )

    def add(self, generation: Generation) -> None:
        self.generations.append(generation)
        self._unfinished += 1

    def open_choice(self, generation: Generation) -> None:
        """The first tokens of an answer are about to be delivered."""
        if self._writer is not None:
            ids = generation.prompt_token_ids.tolist() if self.call.return_token_ids else None
            opening = self._writer.opening(generation.index, ids, self._usage_so_far(generation))
            if opening:
                self._append(opening)

    def deliver(
        self, generation: Generation, text: str, token_ids: Sequence[int], logprobs: dict[str, Any] | None
    ) -> None:
        """Tokens of one step, or the end of an answer, or both."""
        finish_reason = generation.finish_reason
        if finish_reason is not None:
            self._unfinished -= 1
        if self._writer is not None:
            ids = list(token_ids) if self.call.return_token_ids else None
            usage = self._usage_so_far(generation)
            self._append(self._writer.tokens(generation.index, text, finish_reason, logprobs, ids, usage))
            if not self._unfinished:
                self._append(self._writer.closing(self.usage()))
        elif self._unfinished:
            return
        self._wake()

    def _append(self, event: bytes) -> None:
        self._events.append(event)
        self._unread_bytes += len(event)
        if self._unread_bytes > MAX_UNREAD_BYTES and self.error is None:
            self._events.clear()
            self.metrics.stream_cut()
            self.fail(ApiError(408, f"{MAX_UNREAD_BYTES:,} bytes of this answer wait unread: read faster", code="slow"))
            # not from within the delivery of a token of one of them
            asyncio.get_running_loop().call_soon(self.cancel)

    def fail(self, error: ApiError) -> None:
        self.error = error
        self._wake()

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        for generation in self.generations:
            generation.cancel()

    @property
    def finished(self) -> bool:
        return self._unfinished == 0

    async def events(self) -> list[bytes]:
        """The events that have come since the last call, at least one. Raises: ApiError."""
        while not self._events and self.error is None:
            await self._wait()
        if self.error is not None:
            raise self.error
        events, self._events = self._events, []
        self._unread_bytes = 0
        return events

    async def whole(self) -> bytes:
        """The body of an answer that is not streamed, once it is there. Raises: ApiError."""
        while self._unfinished and self.error is None:
            await self._wait()
        if self.error is not None:
            raise self.error
        return whole_answer(
            chat=self.call.chat,
            call_id=self.call_id,
            created=int(self.created),
            model=self.call.model,
            choices=[generation.choice() for generation in self.generations],
            usage=self.usage(),
        )

    def _usage_so_far(self, generation: Generation) -> Usage | None:
        if not self.call.continuous_usage:
            return None
        return Usage(len(generation.prompt_token_ids), generation.completion_tokens, generation.cached_tokens)

    def usage(self) -> Usage:
        return Usage(
            sum(len(generation.prompt_token_ids) for generation in self.generations),
            sum(generation.completion_tokens for generation in self.generations),
            sum(generation.cached_tokens for generation in self.generations),
        )

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter
        self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
