"""Who may go on: sequences take turns on the machine, and requests wait in line for one of a few places."""

from __future__ import annotations

import asyncio
import threading
from collections import deque


class Turns:
    """A lock that threads get in the order they asked for it, so that no answer starves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._busy = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._busy:
                self._busy = True
                return
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._busy = False


class FullError(Exception):
    """The line is as long as it may be."""


class Places:
    """A few places, and a line of those that wait for one, first come first served.

    Args:
        places: Answers at a time.
        line: Requests that may wait.
    """

    def __init__(self, places: int, line: int) -> None:
        self._free, self._line = places, line
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.taken = 0

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return len(self._waiting)

    async def take(self) -> None:
        """Take a place, waiting for one.

        Raises:
            FullError: The line is full.
        """
        if self._free:
            self._free -= 1
        elif len(self._waiting) >= self._line:
            raise FullError
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._pass_on()  # it was given the place in the same moment
                else:
                    self._waiting.remove(turn)
                raise
        self.taken += 1

    def give_back(self) -> None:
        """Leave the place to the next in line."""
        self.taken -= 1
        self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
