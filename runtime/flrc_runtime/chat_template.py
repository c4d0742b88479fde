"""Render a model's chat template in a sandbox; what a template expects to find is what Hugging Face provides.

A template comes with the model and may be hostile: it can run nothing, and its size, steps and output are
limited.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from types import FrameType
from typing import Any

from .errors import FlrcError, FormatError, UsageError

MAX_TEMPLATE_BYTES = 64 * 1024
MAX_OUTPUT_CHARS = 4 * 1024 * 1024
MAX_STEPS = 1_000_000  # lines of compiled template; a chat of 1000 messages takes about 20,000
MAX_SECONDS = 5.0  # a long chat takes hundredths of a second
LOOK_EVERY = 64  # steps between two looks at the clock
MAX_REPEAT = 1_000_000  # length of a product such as '-' * 40

# Attributes and filters that pad to a given width: one call could fill the memory.
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja source.
        special_tokens: Names such as ``bos_token`` and their text.

    Attributes:
        uses_date: Whether it may say what day it is.

    Raises:
        FormatError: It is too long or not a template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES:
            raise FormatError(f"the chat template is longer than {MAX_TEMPLATE_BYTES} bytes")
        self.uses_date = "strftime_now" in source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # jinja2's own, and what Python's compiler says of what jinja2 made
            raise FormatError(f"the chat template is not valid: {error}", hint="use --raw") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt for a conversation.

        Args:
            messages: With ``role`` and ``content`` each.
            add_generation_prompt: Whether to end where the assistant's answer begins.

        Raises:
            UsageError: The template refuses the messages.
            FlrcError: It does what a template must not, or does not end.
        """
        from jinja2 import TemplateError
        from jinja2.exceptions import SecurityError

        pieces: list[str] = []
        length = 0
        variables: dict[str, Any] = {
            **self._special_tokens,
            "messages": [dict(m) for m in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        try:
            with _StepLimit():
                for piece in self._template.generate(variables):
                    length += len(piece)
                    if length > MAX_OUTPUT_CHARS:
                        raise FlrcError(f"the chat template writes more than {MAX_OUTPUT_CHARS} characters")
                    pieces.append(piece)
        except SecurityError as error:
            raise FlrcError(f"the chat template does what it must not: {error}", hint="use --raw") from None
        except TemplateError as error:
            raise UsageError(f"the chat template refuses the messages: {error}") from None
        except FlrcError:
            raise
        except Exception as error:  # whatever a stranger's program raises
            raise FlrcError(f"the chat template fails: {error}", hint="use --raw") from None
        return "".join(pieces)


class _StepLimit:
    """Ends a template that runs too many lines, or for too long; a thread could not be stopped, tracing can."""

    def __enter__(self) -> None:
        self._left = MAX_STEPS
        self._end = time.monotonic() + MAX_SECONDS
        self._previous = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._previous)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise FlrcError(f"the chat template takes more than {MAX_STEPS} steps", hint="use --raw")
        if self._left % LOOK_EVERY == 0 and time.monotonic() > self._end:
            raise FlrcError(f"the chat template takes more than {MAX_SECONDS:g} seconds", hint="use --raw")
        return self._trace


@cache
def _environment() -> Any:
    """Return the sandbox, set up as Hugging Face sets up its own."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """``{% generation %}`` marks the assistant's words for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%"})

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            padding = isinstance(obj, str) and attr in _PADDING
            return not padding and super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> Any:
            if super().wrap_str_format(value) is not None:
                raise SecurityError("str.format is not allowed")
            return None

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" or (operator == "%" and isinstance(left, str)):
                raise SecurityError(f"the operator {operator} is not allowed")
            for one, other in ((left, right), (right, left)):
                if operator == "*" and hasattr(one, "__len__") and len(one) * int(other) > MAX_REPEAT:
                    raise SecurityError("a repeated text is too long")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if indent is not None and not 0 <= int(indent) <= 16:
            raise SecurityError("indent is not from 0 to 16")
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    for name in ("center", "format", "indent", "wordwrap"):
        environment.filters.pop(name, None)
    environment.globals.pop("lipsum", None)
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    environment.filters["tojson"] = tojson
    return environment
