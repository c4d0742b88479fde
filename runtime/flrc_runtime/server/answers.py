"""The bodies of answers, whole and piece by piece."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..engine import Token
from ..tokenizer import Tokenizer

Kind = Literal["chat", "text"]


@dataclass(frozen=True)
class Reply:
    """One answer's name, and the form of its bodies.

    Args:
        kind: ``chat`` for messages, ``text`` for completions.
        model: Name of the model.
        tokenizer: To show tokens of log probabilities as text.
        ident: Of the answer.
        created: Seconds since 1970.
    """

    kind: Kind
    model: str
    tokenizer: Tokenizer
    ident: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return the body of a whole answer of at least one token."""
        text, last = "".join(t.text for t in tokens), tokens[-1]
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": last.finish_reason,
            "logprobs": self._logprobs(tokens),
            "stages": [t.stage for t in tokens],
        }
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return {**self._head(chunk=False), "choices": [choice], "usage": usage(tokens)}

    def piece(self, token: Token) -> dict[str, Any]:
        """Return the body of one token of a stream."""
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": token.finish_reason,
            "logprobs": self._logprobs([token]),
            "stage": token.stage,
        }
        if self.kind == "chat":
            first = {"role": "assistant"} if token.index == 0 else {}
            choice["delta"] = {**first, "content": token.text}
        else:
            choice["text"] = token.text
        return {**self._head(chunk=True), "choices": [choice]}

    def counts(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return the body that ends a stream which shall tell its token counts."""
        return {**self._head(chunk=True), "choices": [], "usage": usage(tokens)}

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        chat = self.kind == "chat"
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        return {
            "id": f"{prefix}-{self.ident}", "object": kind, "created": self.created, "model": self.model,
        }  # fmt: skip

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        found = [(t, t.logprobs) for t in tokens if t.logprobs is not None]
        if not found:
            return None
        if self.kind == "chat":
            return {
                "content": [
                    {
                        **self._scored(t.token_id, p.chosen),
                        "top_logprobs": [self._scored(*top) for top in p.top],
                    }
                    for t, p in found
                ],
                "refusal": None,
            }
        return {
            "tokens": [self.tokenizer.token_text(t.token_id) for t, _ in found],
            "token_logprobs": [p.chosen for _, p in found],
            "top_logprobs": [self._by_text(p.top) for _, p in found],
        }

    def _by_text(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Return log probabilities by token; of two tokens of one text, the less likely is named by its number."""
        result: dict[str, float] = {}
        for token_id, value in top:
            text = self.tokenizer.token_text(token_id)
            result[f"token_id:{token_id}" if text in result else text] = value
        return result

    def _scored(self, token_id: int, value: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(token_id)
        return {"token": self.tokenizer.token_text(token_id), "logprob": value, "bytes": list(data)}


def usage(tokens: Sequence[Token]) -> dict[str, int]:
    """Return the token counts of an answer."""
    prompt, answer = tokens[-1].prompt_tokens, len(tokens)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def event(body: dict[str, Any] | str) -> bytes:
    """Return a server-sent event."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
