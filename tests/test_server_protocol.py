"""What clients may ask of the server, and how the rest is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.runtime.server.protocol import ApiError, Call, parse_chat, parse_completion


def completion(**fields: Any) -> Call:
    return parse_completion(json.dumps({"model": "m", "prompt": "p", **fields}).encode())


def chat(**fields: Any) -> Call:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_chat(json.dumps(body).encode())


def test_defaults_are_those_of_openai() -> None:
    call = completion()
    assert (call.max_tokens, call.stream, call.logprobs, call.stop) == (16, False, None, ())
    assert call.sampling["temperature"] == call.sampling["top_p"] == 1.0
    assert chat().max_tokens is None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_a_prompt_comes_in_four_shapes(prompt: Any, expected: list[Any]) -> None:
    got = [one if isinstance(one, str) else one.tolist() for one in completion(prompt=prompt).prompts]
    assert got == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", []),
        ("prompt", None),
        ("prompt", {"a": 1}),
        ("prompt", [[]]),
        ("prompt", [1, "a"]),
        ("prompt", [1.5]),
        ("prompt", [True]),
        ("prompt", [-1]),
        ("prompt", [2**31]),
        ("prompt", [["a"]]),
        ("prompt", ["a"] * 1025),
        ("max_tokens", 0),
        ("max_tokens", "7"),
        ("max_tokens", 7.5),
        ("max_tokens", True),
        ("min_tokens", 17),
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", 1e-40),
        ("top_p", 0),
        ("top_k", -2),
        ("top_k", 10**30),
        ("max_tokens", -(10**30)),
        ("stop_token_ids", [10**30]),
        ("stop_token_ids", [-1]),
        ("seed", 2**63),
        ("stop", ["a"] * 5),
        ("stop", [""]),
        ("stop", [1]),
        ("stop", 7),
        ("stop_token_ids", ["a"]),
        ("logprobs", 21),
        ("logprobs", True),
        ("n", 2),
        ("n", True),
        ("best_of", 3),
        ("echo", True),
        ("suffix", "x"),
        ("presence_penalty", 0.5),
        ("frequency_penalty", 1),
        ("logit_bias", {"5": 1}),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("metadata", {"app": 7}),
        ("beam_width", 4),
        ("model", None),
    ],
)
def test_what_cannot_be_honored_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ApiError) as error:
        completion(**{field: value})
    assert error.value.status == 400
    assert error.value.param is not None
    assert error.value.param.split(".")[0] == field
    assert field in error.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1),
        ("best_of", 1),
        ("echo", False),
        ("suffix", None),
        ("presence_penalty", 0),
        ("frequency_penalty", 0.0),
        ("logit_bias", {}),
        ("stop", None),
        ("user", "someone"),
        ("temperature", None),
        ("temperature", 0),
        ("top_k", -1),
    ],
)
def test_fields_that_ask_for_nothing_are_taken(field: str, value: Any) -> None:
    assert completion(**{field: value}).model == "m"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "hi"),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "user", "content": 5}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user", "content": "x", "tool_calls": [{}]}]),
        ("messages", [{"role": "user"}]),
        ("top_logprobs", 3),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("max_completion_tokens", 0),
        ("reasoning_effort", "high"),
        ("prompt", "x"),
    ],
)
def test_what_chat_cannot_honor_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ApiError) as error:
        chat(**{field: value})
    assert error.value.status == 400
    assert (error.value.param or "").split(".")[0] == field


def test_an_answer_of_ours_may_be_given_back_as_it_came() -> None:
    answer = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "annotations": []}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    call = chat(messages=[answer, parts])
    assert call.messages == ({"role": "assistant", "content": "yes"}, {"role": "user", "content": "ab"})


def test_two_names_of_one_limit_are_refused_together() -> None:
    assert chat(max_completion_tokens=5).max_tokens == 5
    with pytest.raises(ApiError, match="max_completion_tokens"):
        chat(max_completion_tokens=5, max_tokens=5)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe",
        b'{"model": "m", "model": "m", "prompt": "p"}',
        b'{"model": "m", "prompt": "p", "temperature": NaN}',
        b'{"model": "m", "prompt": "p", "temperature": 1e999}',
        b'{"model": "m", "prompt": "p", "metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_a_body_that_is_no_sound_json_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as error:
        parse_completion(body)
    assert error.value.status == 400
    assert set(json.loads(error.value.body())["error"]) == {"message", "type", "param", "code"}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
names = st.sampled_from(
    [
        "prompt",
        "messages",
        "max_tokens",
        "stop",
        "stream",
        "stream_options",
        "logprobs",
        "metadata",
        "seed",
        "n",
        "tools",
    ]
)


@given(st.dictionaries(names | st.text(max_size=6), values, max_size=5), st.booleans())
def test_any_json_object_is_understood_or_refused_with_an_api_error(fields: dict[str, Any], as_chat: bool) -> None:
    try:
        status = (chat if as_chat else completion)(**fields) and 200
    except ApiError as error:
        status = error.status
    assert status in (200, 400)
