"""What clients may ask: the fields of OpenAI's completions and chat completions that this server honors, and no others.

A field that is not known, or asks for what this server does not do, is refused by name. Fields of OpenAI's
that it cannot honor are taken where they ask for nothing (`n=1`, `presence_penalty=0`, `tools=[]`, ...).
Reference: https://platform.openai.com/docs/api-reference; top_k, min_tokens, stop_token_ids, ignore_eos,
return_token_ids and priority are vLLM's extensions, and so is stream_options.continuous_usage_stats. `user`,
`safety_identifier` and `prompt_cache_key` are taken, and not used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for completions
LEAST_TEMPERATURE = 1e-5  # what vLLM, too, tells apart from 0
MOST_LOGPROBS = 20
MOST_PROMPTS = 1024
_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1


_ERROR_TYPES = {429: "rate_limit_error"}


class ApiError(Exception):
    """A refusal as OpenAI words it; `param` names the field, `retry_after_s` says when to come again."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        *,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(status, message, param, code)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        kind = "server_error" if self.status >= 500 else _ERROR_TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def _only(*values: Any) -> BeforeValidator:
    """A field that this server knows but cannot do: taken where it asks for nothing, null among it."""

    def check(value: Any) -> Any:
        if value is not None and not any(value == allowed and _kind(value) == _kind(allowed) for allowed in values):
            allowed_text = " or ".join(json.dumps(allowed) for allowed in (*values, None))
            raise ValueError(f"this server supports only {allowed_text}")
        return value

    return BeforeValidator(check)


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)


Prompt = str | NDArray[np.int32]


def _prompts(value: Any) -> list[Prompt]:
    """A text, texts, token ids, or lists of token ids, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a list of texts, a list of token ids, or a list of lists of token ids")
    kinds = set(map(type, value))
    if kinds == {int}:
        return [_token_ids(value)]
    if len(value) > MOST_PROMPTS:
        raise ValueError(f"has {len(value)} prompts; at most {MOST_PROMPTS} are taken in one request")
    if kinds == {str}:
        return list(value)
    if kinds == {list}:
        return [_token_ids(ids) for ids in value]
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of lists of token ids")


def _token_ids(value: list[Any]) -> NDArray[np.int32]:
    if not value or set(map(type, value)) != {int}:
        raise ValueError("has a list that is empty or holds other than integers")
    if min(value) < 0 or max(value) > _INT32_MAX:
        raise ValueError("has a token id out of range")
    return np.array(value, dtype=np.int32)


def _stops(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or len(texts) > 4 or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("must be a text, or a list of at most 4 texts, none of them empty")
    return tuple(texts)


def _joined_parts(value: Any) -> Any:
    """The text of a message, which may come as a list of text parts."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            raise ValueError('must be a text, or a list of {"type": "text", "text": ...}')
        if not isinstance(part["text"], str):
            raise ValueError("has a part whose text is no text")
    return "".join(part["text"] for part in value)


def _temperature(value: float | None) -> float | None:
    # logits divided by less overflow fp32
    if value is not None and value != 0 and not LEAST_TEMPERATURE <= value <= 2:
        raise ValueError(f"must be 0 (the best token always), or {LEAST_TEMPERATURE} to 2")
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Any, _only(False)] = None


class _Common(_Strict):
    model: str
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    temperature: Annotated[float | None, AfterValidator(_temperature)] = None
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_INT32_MAX)
    seed: int | None = Field(None, ge=-_INT64_MAX, le=_INT64_MAX)
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] = ()
    stop_token_ids: list[Annotated[int, Field(ge=0, le=_INT32_MAX)]] | None = Field(None, max_length=128)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    priority: int | None = Field(None, ge=-_INT32_MAX, le=_INT32_MAX)
    metadata: dict[str, str] | None = None
    user: str | None = None

    n: Annotated[Any, _only(1)] = None
    presence_penalty: Annotated[Any, _only(0)] = None
    frequency_penalty: Annotated[Any, _only(0)] = None
    logit_bias: Annotated[Any, _only({})] = None


class CompletionBody(_Common):
    prompt: Annotated[Any, PlainValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    best_of: Annotated[Any, _only(1)] = None
    echo: Annotated[Any, _only(False)] = None
    suffix: Annotated[Any, _only()] = None


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_parts)]
    name: str | None = None

    # an answer of ours, given back as it came
    refusal: Annotated[Any, _only()] = None
    annotations: Annotated[Any, _only([])] = None
    audio: Annotated[Any, _only()] = None
    function_call: Annotated[Any, _only()] = None
    tool_calls: Annotated[Any, _only([])] = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.content} | ({} if self.name is None else {"name": self.name})


class ChatBody(_Common):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    audio: Annotated[Any, _only()] = None
    function_call: Annotated[Any, _only("none")] = None
    functions: Annotated[Any, _only([])] = None
    modalities: Annotated[Any, _only(["text"])] = None
    parallel_tool_calls: bool | None = None
    prediction: Annotated[Any, _only()] = None
    prompt_cache_key: str | None = None
    reasoning_effort: Annotated[Any, _only("none")] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    safety_identifier: str | None = None
    service_tier: Annotated[Any, _only("auto", "default")] = None
    store: Annotated[Any, _only(False)] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    tools: Annotated[Any, _only([])] = None
    verbosity: Annotated[Any, _only("medium")] = None
    web_search_options: Annotated[Any, _only()] = None


@dataclass(frozen=True)
class Call:
    """One HTTP request, understood: what to compute and how to answer.

    max_tokens  None: as many as the model's length leaves
    priority    lower goes first
    logprobs    most likely tokens to show beside each token; None: no log-probabilities
    """

    chat: bool
    model: str
    prompts: tuple[Prompt, ...]
    messages: tuple[dict[str, str], ...]
    max_tokens: int | None
    sampling: Mapping[str, Any]
    stop: tuple[str, ...]
    logprobs: int | None
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    priority: int
    app: str | None
    session: str | None


def parse_completion(data: bytes) -> Call:
    """The body of POST /v1/completions. Raises: ApiError (400), naming the field."""
    body = _validated(CompletionBody, data)
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return _call(body, max_tokens, body.logprobs, prompts=tuple(body.prompt))


def parse_chat(data: bytes) -> Call:
    """The body of POST /v1/chat/completions. Raises: ApiError (400), naming the field."""
    body = _validated(ChatBody, data)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens and max_completion_tokens are two names of one limit: give one", "max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _call(body, max_tokens, logprobs, messages=tuple(message.plain() for message in body.messages))


def _call(
    body: CompletionBody | ChatBody,
    max_tokens: int | None,
    logprobs: int | None,
    *,
    prompts: tuple[Prompt, ...] = (),
    messages: tuple[dict[str, str], ...] = (),
) -> Call:
    min_tokens = body.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise ApiError(400, f"min_tokens ({min_tokens}) is more than the {max_tokens} tokens allowed", "min_tokens")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    metadata = body.metadata or {}
    sampling = {
        "min_tokens": min_tokens,
        "temperature": 1.0 if body.temperature is None else float(body.temperature),
        "top_p": 1.0 if body.top_p is None else float(body.top_p),
        "top_k": max(body.top_k or 0, 0),
        "seed": body.seed,
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "ignore_eos": bool(body.ignore_eos),
        "logprobs": logprobs,
    }
    options = body.stream_options
    if options and options.continuous_usage_stats and not options.include_usage:
        raise ApiError(400, "continuous_usage_stats needs include_usage: true", "stream_options")
    return Call(
        chat=isinstance(body, ChatBody),
        model=body.model,
        prompts=prompts,
        messages=messages,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=body.stop,
        logprobs=logprobs,
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        return_token_ids=bool(body.return_token_ids),
        priority=body.priority or 0,
        app=metadata.get("app"),
        session=metadata.get("session"),
    )


_Body = TypeVar("_Body", CompletionBody, ChatBody)


def _validated(model: type[_Body], data: bytes) -> _Body:
    fields = _json_object(data)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        raise ApiError(400, f"{path}: this server does not know this field", path, "unknown_parameter")
    if first["type"] == "missing":
        raise ApiError(400, f"{path} is missing", path, "missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    raise ApiError(400, f"{path}: {message}; found {_shown(first['input'])}", path, "invalid_value")


def _shown(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 40 else text[:40] + "..."


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field stands twice")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
