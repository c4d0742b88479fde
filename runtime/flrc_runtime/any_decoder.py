"""What is the same of one sequence, whatever form its graphs have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import FlrcError, UsageError


class Positions:
    """How much of a sequence is kept, wherever its keys and values are.

    Args:
        context: Positions to hold.

    Attributes:
        length: Positions filled so far.
    """

    def __init__(self, context: int) -> None:
        self.context, self.length = context, 0

    def after(self, count: int) -> int:
        """Return the positions filled when ``count`` more tokens are fed.

        Raises:
            FlrcError: There is no room for them.
        """
        total = self.length + count
        if total > self.context:
            raise FlrcError(f"position {total} is outside the context of {self.context}")
        return total

    def rollback(self, length: int) -> None:
        """Forget every position from ``length`` on.

        Raises:
            UsageError: ``length`` is negative or more than is filled.
        """
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot roll back to {length}: the cache holds {self.length} positions")
        self.length = length


class AnyDecoder(Protocol):
    """One sequence: token ids in, logits of the next token out (decoder.py, device_decoder.py, window_decoder.py)."""

    @property
    def cache(self) -> Positions:
        """Return what is kept of the tokens fed so far."""

    @property
    def length(self) -> int:
        """Return the positions fed so far."""

    def step(self, token_id: int, stage: int) -> NDArray[np.float32]:
        """Feed one token; return logits ``[vocab]``, a view that the next step overwrites."""

    def feed(self, ids: Sequence[int], stage: int) -> NDArray[np.float32]:
        """Feed several tokens; return logits ``[len(ids), vocab]`` of the token after each."""

    def prefill(self, ids: Sequence[int], stage: int) -> NDArray[np.float32]:
        """Feed a prompt of at least one token; return logits ``[vocab]`` of the token after the last."""

    def close(self) -> None:
        """Free the buffers."""
