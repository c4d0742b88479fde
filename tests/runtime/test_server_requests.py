"""Bodies of requests: what is read, what is refused and by which name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flrc_runtime.server.errors import ApiError
from flrc_runtime.server.requests import chat_request, completion_request, parse_body

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": HELLO} | fields


def test_what_clients_send_by_default_is_accepted() -> None:
    request = chat_request(
        parse_body(
            json.dumps(
                chat(
                    messages=[
                        {"role": "developer", "content": "Be short."},
                        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
                        {"role": "assistant", "content": "Hi", "tool_calls": None, "refusal": None},
                        {"role": "user", "content": "Again", "name": "me"},
                    ],
                    stop="x", n=1, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, user="someone",
                    stream=True, stream_options={"include_usage": True}, max_completion_tokens=5, seed=3, top_p=1,
                    response_format={"type": "text"}, metadata={"a": "b"}, temperature=0.5, tools=None,
                )
            ).encode()
        )
    )  # fmt: skip
    assert [m["role"] for m in request.messages] == ["system", "user", "assistant", "user"]
    assert request.messages[1]["content"] == "Hello" and request.stop == ("x",) and request.max_tokens == 5
    assert (
        request.include_usage and request.sampling(0.0).temperature == 0.5 and request.wanted_logprobs is None
    )
    assert chat_request(chat(logprobs=True, top_logprobs=3)).wanted_logprobs == 3


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": None}, "messages", "missing"),
        ({"messages": []}, "messages", "not empty"),
        ({"messages": "Hello"}, "messages", "list"),
        ({"messages": ["Hello"]}, "messages", "messages[0] is not an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "role must be one of"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages", "role must be one of"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages", "content must be a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "something else than text",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages", "tool_calls"),
        ({"model": 3}, "model", "expected str"),
        ({"n": 2}, "n", "n is not supported"),
        ({"n": True}, "n", "n is not supported"),
        ({"tools": [{}]}, "tools", "not supported"),
        ({"presence_penalty": 1}, "presence_penalty", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"colour": "red"}, "colour", "unknown field"),
        ({"temperature": "hot"}, "temperature", "expected float"),
        ({"temperature": -1}, "temperature", "temperature -1"),
        ({"temperature": 1e300}, "temperature", "temperature"),
        ({"top_p": 0}, "top_p", "top_p 0"),
        ({"seed": 1.5}, "seed", "expected int"),
        ({"seed": -1}, "seed", "seed"),
        ({"max_tokens": 0}, "max_tokens", "positive"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"stream": "yes"}, "stream", "expected bool"),
        ({"stream_options": {"loud": True}}, "stream_options", "unknown field"),
        ({"logprobs": 3}, "logprobs", "expected bool"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
        ({"top_logprobs": 1}, "top_logprobs", "needs logprobs"),
        ({"stop": [1]}, "stop", "expected str"),
        ({"stage": "last"}, "stage", "expected int"),
    ],
)
def test_refused_by_name(fields: dict[str, Any], param: str, message: str) -> None:
    body = {k: v for k, v in chat(**fields).items() if v is not None}
    with pytest.raises(ApiError) as raised:
        chat_request(body)
    error = raised.value
    assert (error.status, error.param) == (400, param) and message in error.message, error.message
    assert error.body()["error"] == {  # type: ignore[comparison-overlap]
        "message": error.message, "type": "invalid_request_error", "param": param, "code": error.code,
    }  # fmt: skip


def test_completions_take_a_text_or_token_ids() -> None:
    for given_prompt, read in (("Once", "Once"), (["Once"], "Once"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2])):
        request = completion_request({"model": "m", "prompt": given_prompt, "logprobs": 2, "echo": False})
        assert request.prompt == read and request.wanted_logprobs == 2
    for wrong in (None, [], ["a", "b"], [True], [[]], 3, {"a": 1}):
        with pytest.raises(ApiError, match="one text or one list of token ids"):
            completion_request({"model": "m", "prompt": wrong})
    with pytest.raises(ApiError, match="echo is not supported"):
        completion_request({"model": "m", "prompt": "x", "echo": True})


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"3", b"\xff{}", b'{"a": 1, "a": 2}', b'{"a": NaN}', b'{"a": 1e999}', b"[" * 100_000,
        b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", b'{"a": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_no_json(body: bytes) -> None:
    with pytest.raises(ApiError) as raised:
        parse_body(body)
    assert raised.value.code == "invalid_json" and len(raised.value.message) < 300


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = (
    "model",
    "messages",
    "prompt",
    "stop",
    "n",
    "logprobs",
    "top_logprobs",
    "temperature",
    "seed",
    "stage",
    "x",
)


@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6))
def test_anything_else_is_a_refusal(fields: dict[str, Any]) -> None:
    for read, complete in ((chat_request, chat()), (completion_request, {"model": "m", "prompt": "x"})):
        for body in (fields, complete | fields):
            try:
                read(parse_body(json.dumps(body).encode()))
            except ApiError as error:
                assert error.status == 400 and error.message and "\n" not in error.message.strip()


@given(st.binary(max_size=64))
def test_any_bytes_are_a_refusal(data: bytes) -> None:
    try:
        parse_body(data)
    except ApiError as error:
        assert error.status == 400
