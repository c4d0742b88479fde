"""The bodies of requests, read strictly: what cannot be honoured is refused by name, never ignored."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..engine import Prompt
from ..errors import FormatError, UsageError
from ..sampling import Sampling
from ..typed_json import build
from .errors import ApiError

MAX_DEPTH = 32
MOST_TOP_LOGPROBS = 20
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields that change nothing at the given value, which clients like to send; any other value is refused.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
}
_IGNORED = {
    "user",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
}
T = TypeVar("T", bound="Generation")


@dataclass(frozen=True)
class StreamOptions:
    """``stream_options``."""

    include_usage: bool = False
    include_obfuscation: bool = False  # accepted: nothing is obfuscated


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What both kinds of requests share.

    Args:
        model: Name of the model, which must be the one served; None: that one.
        stream: Send tokens as they come.
        stream_options: Of a stream.
        max_tokens: Of the answer; None: as many as the context holds.
        temperature: 0 is greedy.
        top_p: Draw among this much probability.
        top_k: Draw among this many (not OpenAI's).
        repetition_penalty: 1 has no effect (not OpenAI's).
        seed: Of the draws.
        stage: One stage instead of the bundle's schedule (not OpenAI's).
    """

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stage: int | None = None

    def sampling(self, default_temperature: float) -> Sampling:
        """Return how tokens are chosen."""
        return Sampling(
            temperature=default_temperature if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


@dataclass(frozen=True, kw_only=True)
class ChatRequest(Generation):
    """``/v1/chat/completions``."""

    messages: tuple[Mapping[str, str], ...]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0

    @property
    def prompt(self) -> Prompt:
        """The messages."""
        return self.messages

    @property
    def wanted_logprobs(self) -> int | None:
        """How many most likely tokens to name; None if no log probabilities are wanted."""
        return self.top_logprobs if self.logprobs else None


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(Generation):
    """``/v1/completions``: a text, or token ids, to go on from."""

    prompt: Prompt = field(default="")
    logprobs: int | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        """How many most likely tokens to name; None if no log probabilities are wanted."""
        return self.logprobs


def parse_body(data: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        ApiError: It is none, or is nested too deeply, or holds a key twice or a number that is not finite.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    if _depth(value) > MAX_DEPTH:
        raise ApiError(400, f"the body is nested deeper than {MAX_DEPTH}", code="invalid_json")
    return {key: entry for key, entry in value.items() if entry is not None}  # null is absent


def chat_request(body: dict[str, Any]) -> ChatRequest:
    """Read a request for an answer to messages.

    Raises:
        ApiError: A field is missing, unknown, of the wrong type, or cannot be honoured.
    """
    fields = _known(body)
    fields["messages"] = [_message(m, i) for i, m in enumerate(_list(fields.get("messages"), "messages"))]
    request = _built(ChatRequest, fields)
    if request.max_completion_tokens is not None:
        if request.max_tokens not in (None, request.max_completion_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens differ", param="max_tokens")
        request = _built(
            ChatRequest,
            {**fields, "max_tokens": request.max_completion_tokens, "max_completion_tokens": None},
        )
    if not 0 <= request.top_logprobs <= MOST_TOP_LOGPROBS:
        raise ApiError(400, f"top_logprobs must lie between 0 and {MOST_TOP_LOGPROBS}", param="top_logprobs")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    return request


def completion_request(body: dict[str, Any]) -> CompletionRequest:
    """Read a request to go on from a text; the errors are those of :func:`chat_request`."""
    fields = _known(body)
    prompt = fields.pop("prompt", None)
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    ids = isinstance(prompt, list) and bool(prompt) and all(type(i) is int for i in prompt)
    if not isinstance(prompt, str) and not ids:
        raise ApiError(400, "prompt must be one text or one list of token ids", param="prompt")
    request = _built(CompletionRequest, {**fields, "prompt": ""})
    if request.logprobs is not None and not 0 <= request.logprobs <= MOST_TOP_LOGPROBS:
        raise ApiError(400, f"logprobs must lie between 0 and {MOST_TOP_LOGPROBS}", param="logprobs")
    return CompletionRequest(**{**vars(request), "prompt": prompt})


def _known(body: dict[str, Any]) -> dict[str, Any]:
    """Leave out the fields that change nothing."""
    fields = {}
    for name, value in body.items():
        if name in _IGNORED:
            continue
        if name in _WITHOUT_EFFECT:
            # true is 1 to python, so types are compared as well
            if not any(type(value) is type(v) and value == v for v in _WITHOUT_EFFECT[name]):
                raise ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")
            continue
        fields[name] = value
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    return fields


def _built(kind: type[T], fields: dict[str, Any]) -> T:
    try:
        request = build(kind, fields, "request")
    except FormatError as error:
        missing = re.search(r"missing .*argument[s]?: '(\w+)'", str(error))
        named = missing or re.search(r"request\.(\w+)|unknown field '([^']*)'", str(error))
        param = next((g for g in named.groups() if g), None) if named else None
        text = (
            f"{param} is missing"
            if missing
            else str(error).removeprefix("request: ").removeprefix("request.")
        )
        raise ApiError(400, text, param=param) from None
    if request.max_tokens is not None and request.max_tokens < 1:
        raise ApiError(400, f"max_tokens must be positive, not {request.max_tokens}", param="max_tokens")
    try:
        request.sampling(0.0)
    except UsageError as error:
        raise ApiError(400, str(error), param=str(error).split()[0]) from None
    return request


def _message(value: Any, index: int) -> dict[str, str]:
    where = f"messages[{index}]"
    if not isinstance(value, dict):
        raise ApiError(400, f"{where} is not an object", param="messages")
    unknown = sorted(set(value) - {"role", "content", "name"})
    extra = [name for name in unknown if value[name] not in (None, [], {})]
    if extra:
        raise ApiError(400, f"{where}.{extra[0]} is not supported", param="messages")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(400, f"{where}.role must be one of {', '.join(ROLES)}", param="messages")
    content = value.get("content")
    if isinstance(content, list):
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise ApiError(400, f"{where}.content holds something else than text", param="messages")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ApiError(400, f"{where}.content must be a text", param="messages")
    return {"role": ROLES[role], "content": content}


def _list(value: Any, name: str) -> list[Any]:
    if value is None:
        raise ApiError(400, f"{name} is missing", param=name)
    if not isinstance(value, list) or not value:
        raise ApiError(400, f"{name} must be a list that is not empty", param=name)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse(text)
    return value


def _depth(value: Any) -> int:
    """Return how deeply lists and objects are nested, without recursion."""
    deepest, level = 0, [value]
    while level:
        deepest += 1
        nested = (v for x in level for v in (x.values() if isinstance(x, dict) else x))
        level = [v for v in nested if isinstance(v, dict | list)]
    return deepest
