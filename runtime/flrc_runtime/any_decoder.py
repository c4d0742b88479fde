"""What decoding asks of one sequence, whatever form its graphs have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Positions(Protocol):
    """Keys and values of a sequence: ``length`` positions are filled of at most ``context``."""

    context: int
    length: int

    def rollback(self, length: int) -> None:
        """Forget every position from ``length`` on."""


class AnyDecoder(Protocol):
    """One sequence: token ids in, logits of the next token out (decoder.py, window_decoder.py)."""

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
