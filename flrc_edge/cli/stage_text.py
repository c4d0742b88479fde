"""Show which stage computed which part of an answer: by colour, or by marks such as ``[1]``."""

from __future__ import annotations

import os
import re
from typing import TextIO

from flrc_runtime.manifest import Schedule

_COLORS = (36, 33, 35, 32, 34, 31)  # ANSI foregrounds of stage 0, 1, …, then again from the first
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def wants_color(stream: TextIO) -> bool:
    """Return whether a stream is a terminal and the user has not set NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def printable(text: str) -> str:
    """Return text without control characters, so that a model's words cannot steer the terminal."""
    return _CONTROL.sub("", text)


def schedule_text(schedule: Schedule, *, stages: int, context: int) -> str:
    """Return in words when decoding moves on, and whether falling ranks were measured to pay.

    Args:
        schedule: The schedule.
        stages: How many stages there are.
        context: Positions of the model; a boundary there is never reached.
    """
    firsts = {s: schedule.first_token(s, context) for s in range(1, stages)}
    moves = [f"to stage {s} after {first} tokens" for s, first in firsts.items() if first is not None]
    text = "decoding moves " + ", ".join(moves) if moves else "decoding stays on stage 0"
    unused = [str(s) for s, first in firsts.items() if first is None]
    if unused:
        text += f"; no answer reaches stage {' and '.join(unused)}"
    facts = schedule.validation
    if facts:
        verdict = "beat" if facts["gain"] > 0 else "did not beat"
        text += (
            f" (falling ranks {verdict} one constant stage of the same mean share: "
            f"KL {facts['schedule_kl']:.3f} against {facts['constant_kl']:.3f})"
        )
    return text


class StageText:
    """Renders the pieces of one answer.

    Args:
        color: Colour every piece by its stage; else write a mark where the stage changes.
    """

    def __init__(self, *, color: bool) -> None:
        self._color = color
        self._stage: int | None = None

    def piece(self, text: str, stage: int) -> str:
        """Return the next piece as shown."""
        if not text:
            return ""
        if self._color:
            return f"\x1b[{_COLORS[stage % len(_COLORS)]}m{text}\x1b[0m"
        mark = "" if stage == self._stage else f"[{stage}]"
        self._stage = stage
        return mark + text
