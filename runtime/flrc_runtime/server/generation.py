"""One answer: computed in a thread, awaited in the event loop, stopped when its client goes."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Generator
from concurrent.futures import Executor

from ..engine import Token
from ..errors import FlrcError
from .errors import ApiError

_log = logging.getLogger(__name__)


class Generation:
    """Tokens of a stream of the engine, for one client.

    Args:
        stream: Whose tokens are computed in a thread; closed there.
        executor: With a thread for every place.
    """

    def __init__(self, stream: Generator[Token, None, None], executor: Executor) -> None:
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Token | BaseException | None] = asyncio.Queue()
        self._stopped = threading.Event()
        self._done = self._loop.run_in_executor(executor, self._compute)

    async def tokens(self) -> AsyncIterator[Token]:
        """Yield tokens as they come.

        Raises:
            ApiError: Computing them failed.
        """
        while (item := await self._queue.get()) is not None:
            if isinstance(item, FlrcError):
                raise ApiError.of(item)
            if isinstance(item, BaseException):
                raise item
            yield item

    async def stop(self) -> None:
        """End after the token that is being computed, and wait for that."""
        self._stopped.set()
        await asyncio.shield(self._done)

    def _compute(self) -> None:
        try:
            for token in self._stream:
                self._put(token)
                if self._stopped.is_set():
                    return
        except BaseException as error:  # the thread has nobody else to tell
            self._put(error)
        finally:
            self._stream.close()
            self._put(None)

    def _put(self, item: Token | BaseException | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody listens
            _log.debug("an answer outlived the server")
