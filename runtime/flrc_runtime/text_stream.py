"""Token ids to text as they come: no broken character, no part of a stop string.

All pieces together are the decoding of all ids (up to a stop string).
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Sequence

from .errors import UsageError
from .tokenizer import Tokenizer

_REPLACEMENT = "�"
MAX_STOPS = 64
_BACK = 64  # tokens of what is gone on from that are looked at, at most


class Detokenizer:
    """Decodes from a few tokens back, so that spaces come out right, and holds back incomplete bytes.

    Args:
        tokenizer: Of the ids.
        before: Ids of the text that is gone on from; none where a text of its own begins, as an answer in a chat.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window, self._emitted = self._end_of(before)  # the text of the window that is out already
        self._fresh = 0  # ids at the end of the window whose text is not

    def _end_of(self, before: Sequence[int]) -> tuple[list[int], str]:
        """Return the last ids that have a text, from where no run of bytes is cut, and that text."""
        least = max(len(before) - _BACK, 0)
        starts = (i for i in range(len(before) - 1, least, -1) if before[i] not in self._tokenizer.byte_ids)
        texts = ((i, self._tokenizer.decode_start(before[i:])) for i in starts)
        start = next((i for i, text in texts if text.replace(_REPLACEMENT, "").strip()), least)
        window, text = list(before[start:]), self._tokenizer.decode_start(before[start:])
        return window, text.rstrip(_REPLACEMENT) if self._ends_amid_a_character(window) else text

    def _ends_amid_a_character(self, ids: Sequence[int]) -> bool:
        decoder = getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(self._tokenizer.token_bytes(i) for i in ids))
        return bool(decoder.getstate()[0])

    def push(self, token_id: int) -> str:
        """Return the text that is certain after one more token, perhaps none."""
        if token_id in self._tokenizer.special_ids:
            return ""
        self._window.append(token_id)
        self._fresh += 1
        # A run of byte tokens decodes as a whole: an invalid byte makes even its valid characters U+FFFD.
        if token_id in self._tokenizer.byte_ids:
            return ""
        text = self._tokenizer.decode_start(self._window)
        if text.endswith(_REPLACEMENT):
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """Return the text held back; the last piece."""
        return self._emit(self._tokenizer.decode_start(self._window)) if self._fresh else ""

    def _emit(self, text: str) -> str:
        piece = text[len(self._emitted) :]
        recent = self._window[-self._fresh :]
        # A window without text would lose the space that decoders strip from a beginning.
        self._emitted = self._tokenizer.decode_start(recent)
        if self._emitted:
            self._window = recent
        else:
            self._emitted = text
        self._fresh = 0
        return piece


class StopStrings:
    """Cuts text at the first stop string and holds back what may become one.

    Args:
        stops: The strings; none stops never.

    Raises:
        UsageError: One is empty, or there are more than 64.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            stops = (stops,)
        if len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
            raise UsageError(f"stop strings must be at most {MAX_STOPS} and none of them empty")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def stopped(self) -> bool:
        """Whether a stop string came."""
        return self._stopped

    def push(self, text: str) -> str:
        """Return the text that is certainly before any stop string."""
        if not self._stops or self._stopped:
            return "" if self._stopped else text
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._stops) if at >= 0]
        if found:
            self._stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max(_overlap(self._held, s) for s in self._stops)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """Return the text held back, now that no more comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that ``stop`` begins with, but is not."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
