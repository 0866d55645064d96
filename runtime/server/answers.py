"""Answers as bytes: server-sent events while tokens come, or one JSON object at the end, in OpenAI's two shapes.

A streamed token costs a few string concatenations: whatever stays the same for a whole stream is made once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any

from ..text import Tokenizer

DONE = b"data: [DONE]\n\n"

# of one token: its log-probability, the most likely tokens in its place, and theirs
TokenLogprobs = tuple[float, list[int], list[float]]


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer, or of one HTTP request, all its prompts together."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def object(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True)
class Choice:
    """One whole answer. prompt_token_ids and token_ids are None unless the client asked for them."""

    index: int
    text: str
    finish_reason: str
    logprobs: dict[str, Any] | None
    prompt_token_ids: list[int] | None
    token_ids: list[int] | None


class EventWriter:
    """Writes the events of one stream."""

    def __init__(self, *, chat: bool, call_id: str, created: int, model: str, with_usage: bool) -> None:
        self._chat = chat
        self._with_usage = with_usage
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = {"id": call_id, "object": kind, "created": created, "model": model, "choices": []}
        self._head = "data: " + json.dumps(head, separators=(",", ":"))[:-2] + '{"index":'
        self._text = ',"delta":{"content":' if chat else ',"text":'
        self._after_text = "}" if chat else ""
        self._tail = '}],"usage":null}\n\n' if with_usage else "}]}\n\n"
        self._usage = "data: " + json.dumps(head, separators=(",", ":"))[:-1] + ',"usage":'

    def opening(self, index: int, prompt_token_ids: list[int] | None, usage: Usage | None = None) -> bytes:
        """What comes before a choice's first token: the role, in chat; and the prompt's ids, where asked for.

        usage: of the choice so far, where the client wants it in every event.
        """
        if not self._chat and prompt_token_ids is None:
            return b""
        more = "" if prompt_token_ids is None else f',"prompt_token_ids":{json.dumps(prompt_token_ids)}'
        what = ',"delta":{"role":"assistant","content":""}' if self._chat else ',"text":""'
        return f'{self._head}{index}{what},"logprobs":null{more},"finish_reason":null{self._end(usage)}'.encode()

    def _end(self, usage: Usage | None) -> str:
        return self._tail if usage is None else f'}}],"usage":{json.dumps(usage.object())}}}\n\n'

    def tokens(
        self,
        index: int,
        text: str,
        finish_reason: str | None,
        logprobs: dict[str, Any] | None,
        token_ids: list[int] | None,
        usage: Usage | None = None,
    ) -> bytes:
        """One event: the tokens of one step. The text is empty where they complete none, or none that may be shown."""
        logprobs_text = "null" if logprobs is None else json.dumps(logprobs)
        ids_text = "" if token_ids is None else f',"token_ids":{token_ids}'
        finish = "null" if finish_reason is None else f'"{finish_reason}"'
        return (
            f"{self._head}{index}{self._text}{encode_basestring_ascii(text)}{self._after_text}"
            f',"logprobs":{logprobs_text}{ids_text},"finish_reason":{finish}{self._end(usage)}'
        ).encode()

    def closing(self, usage: Usage) -> bytes:
        """What ends a stream."""
        if not self._with_usage:
            return DONE
        return f"{self._usage}{json.dumps(usage.object())}}}\n\n".encode() + DONE


def error_event(body: bytes) -> bytes:
    """An error after the stream has begun, which OpenAI's client raises."""
    return b"data: " + body + b"\n\n" + DONE


def whole_answer(
    *, chat: bool, call_id: str, created: int, model: str, choices: Sequence[Choice], usage: Usage
) -> bytes:
    """The body of an answer that is not streamed."""
    head = {
        "id": call_id,
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
    }
    return json.dumps({**head, "choices": [_choice(chat, one) for one in choices], "usage": usage.object()}).encode()


def _choice(chat: bool, choice: Choice) -> dict[str, Any]:
    data: dict[str, Any] = {"index": choice.index}
    if chat:
        data["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
    else:
        data["text"] = choice.text
    data |= {"logprobs": choice.logprobs, "finish_reason": choice.finish_reason}
    for name in ("prompt_token_ids", "token_ids"):
        if getattr(choice, name) is not None:
            data[name] = getattr(choice, name)
    return data


def chat_logprobs(tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Log-probabilities in the shape of chat completions."""
    content = [
        _chat_token(tokenizer, token_id, logprob)
        | {"top_logprobs": [_chat_token(tokenizer, *pair) for pair in zip(top_ids, top_logprobs)]}
        for token_id, (logprob, top_ids, top_logprobs) in zip(token_ids, logprobs)
    ]
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.name_of(token_id),
        "logprob": logprob,
        "bytes": list(tokenizer.bytes_of(token_id)),
    }


def completion_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], text_offset: int
) -> dict[str, Any]:
    """Log-probabilities in the shape of completions; text_offset: characters of the answer before these tokens."""
    names = [tokenizer.name_of(token_id) for token_id in token_ids]
    offsets = [text_offset + sum(map(len, names[:i])) for i in range(len(names))]
    top = [
        {tokenizer.name_of(top_id): value for top_id, value in zip(top_ids, top_logprobs)}
        for _, top_ids, top_logprobs in logprobs
    ]
    chosen = [logprob for logprob, _, _ in logprobs]
    return {"tokens": names, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}
