"""Render a model's chat template in a sandbox; what a template expects to find is what Hugging Face provides.

A template comes with the model and may be hostile: it can run nothing, and its size, steps, depth, data and output
are limited (here, in ``template_sandbox`` and in ``template_data``).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING, Any

from .errors import FlrcError, FormatError, UsageError

if TYPE_CHECKING:
    from .template_sandbox import Sandbox

MAX_TEMPLATE_BYTES = 64 * 1024
MAX_OUTPUT_CHARS = 4 * 1024 * 1024
MAX_STEPS = 1_000_000  # lines of compiled template; a chat of 1000 messages takes about 20,000
MAX_SECONDS = 5.0  # a long chat takes hundredths of a second
LOOK_EVERY = 64  # steps between two looks at the clock
# A macro in a macro takes 5 frames, a level of a loop over a tree 4; a frame takes up to 0.5 KiB of C stack.
MAX_FRAMES = 250
_OWN = {f"{__package__}.template_sandbox", f"{__package__}.template_data"}

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

        from .template_data import check

        pieces: list[str] = []
        length = 0
        try:
            check(messages)
        except SecurityError:
            raise UsageError("the messages are nested too deeply, or too long for a chat template") from None
        variables: dict[str, Any] = {
            **self._special_tokens,
            "messages": [dict(m) for m in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        try:
            with _Limit():
                for piece in self._template.generate(variables):
                    length += len(piece)
                    if length > MAX_OUTPUT_CHARS:
                        raise FlrcError(f"the chat template writes more than {MAX_OUTPUT_CHARS} characters")
                    pieces.append(piece)
        except _BeyondLimitError as error:
            raise FlrcError(f"the chat template takes {error}", hint="use --raw") from None
        except SecurityError as error:
            raise FlrcError(f"the chat template does what it must not: {error}", hint="use --raw") from None
        except TemplateError as error:
            raise UsageError(f"the chat template refuses the messages: {error}") from None
        except FlrcError:
            raise
        except Exception as error:  # whatever a stranger's program raises
            raise FlrcError(f"the chat template fails: {error}", hint="use --raw") from None
        return "".join(pieces)


class _BeyondLimitError(BaseException):
    """No ``Exception``: jinja swallows some of those, and one raised while tracing ends the tracing."""


class _Limit:
    """Ends a template that runs too many lines, too long or too deep; a thread could not be stopped, tracing can."""

    def __enter__(self) -> None:
        self._left = MAX_STEPS
        self._end = time.monotonic() + MAX_SECONDS
        self._depths: dict[FrameType | None, int] = {}
        self._previous = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._previous)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise _BeyondLimitError(f"more than {MAX_STEPS} steps")
        if event == "call":
            # Own count: by Python's, which other libraries may raise, the stack could end first.
            depth = self._depths[frame] = self._depths.get(frame.f_back, 0) + 1
            if depth > MAX_FRAMES:
                raise _BeyondLimitError(f"more than {MAX_FRAMES} calls within one another")
            # The sandbox's own loops are as long as the data that it checks, which are limited.
            frame.f_trace_lines = frame.f_globals.get("__name__") not in _OWN
        elif event == "return":
            self._depths.pop(frame, None)
        if (event == "call" or self._left % LOOK_EVERY == 0) and time.monotonic() > self._end:
            raise _BeyondLimitError(f"more than {MAX_SECONDS:g} seconds")
        return self._trace


@cache
def _environment() -> Sandbox:
    from .template_sandbox import sandbox

    return sandbox()
