"""One sequence in the graphs: its KV cache, and token ids in, logits out.

The decode step binds everything once per stage; a step writes one id, points the attention mask at the first
n entries of a row of ones, and runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .kv_cache import KvCache
from .sessions import LOGITS_START, StageSessions

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding

FloatArray = NDArray[np.float32]

MAX_CHUNK = 256
_LAST, _ALL = np.array([-1], np.int64), np.array([0], np.int64)  # values of logits_start
# The graphs give logits over the vocabulary for every position of a chunk.
MAX_LOGITS_BYTES = 64 * 1024 * 1024


def default_chunk(vocab_size: int) -> int:
    """Return the tokens of a prompt chunk: at most 256, and at most 64 MiB of logits."""
    return max(1, min(MAX_CHUNK, MAX_LOGITS_BYTES // (4 * vocab_size)))


class Decoder:
    """Feeds tokens of one sequence through any of the stages.

    Args:
        sessions: Of the bundle; shared with other decoders.
        context: Positions to hold.
        vocab_size: Of the logits.
    """

    def __init__(self, sessions: StageSessions, *, context: int, vocab_size: int) -> None:
        from onnxruntime import OrtValue

        self.cache = KvCache(sessions.kv_shape, context)
        self._sessions = sessions
        self._vocab_size = vocab_size
        self._chunk = default_chunk(vocab_size)
        self._ones = np.ones((1, context), np.int64)
        self._mask_pointer = self._ones.ctypes.data
        self._id = np.zeros((1, 1), np.int64)
        self._logits = np.empty((1, 1, vocab_size), np.float32)
        self._id_value = OrtValue.ortvalue_from_numpy(self._id)
        self._logits_value = OrtValue.ortvalue_from_numpy(self._logits)
        self._steps: dict[int, tuple[InferenceSession, IOBinding]] = {}

    @property
    def length(self) -> int:
        """Positions fed so far."""
        return self.cache.length

    def step(self, token_id: int, stage: int) -> FloatArray:
        """Feed one token.

        Returns:
            Logits [vocab] float32 of the next one, a view that the next step overwrites.
        """
        bound = self._steps.get(stage) or self._bind_step(stage)
        self._id[0, 0] = token_id
        self._run(*bound, stage, 1)
        view: FloatArray = self._logits[0, 0]
        return view

    def feed(self, ids: Sequence[int], stage: int) -> FloatArray:
        """Feed several tokens at once.

        Returns:
            Logits [len(ids), vocab] float32 of the token after each.
        """
        logits = np.empty((1, len(ids), self._vocab_size), np.float32)
        self._feed(ids, stage, logits)
        rows: FloatArray = logits[0]
        return rows

    def prefill(self, ids: Sequence[int], stage: int) -> FloatArray:
        """Feed a prompt of at least one token, in chunks.

        Returns:
            Logits [vocab] float32 of the token after the last.
        """
        if self._prunes(stage):
            last = np.empty((1, 1, self._vocab_size), np.float32)
            for start in range(0, len(ids), MAX_CHUNK):
                self._feed(ids[start : start + MAX_CHUNK], stage, last, last_only=True)
            row: FloatArray = last[0, 0]
            return row
        for start in range(0, len(ids), self._chunk):
            row = self.feed(ids[start : start + self._chunk], stage)[-1]
        return row.copy()

    def _prunes(self, stage: int) -> bool:
        """Return whether a graph can leave out logits; stock ones of before cannot."""
        session = self._sessions.get(stage)
        return self._sessions.own or any(
            node.name == LOGITS_START for node in session.get_overridable_initializers()
        )

    def close(self) -> None:
        """Free the buffers."""
        self._steps.clear()
        self.cache.close()

    def _bind_step(self, stage: int) -> tuple[InferenceSession, IOBinding]:
        from onnxruntime import OrtValue

        session = self._sessions.get(stage)
        binding = session.io_binding()
        self.cache.bind(binding)
        binding.bind_ortvalue_input("input_ids", self._id_value)
        binding.bind_ortvalue_output("logits", self._logits_value)
        if self._sessions.own:
            binding.bind_ortvalue_input(LOGITS_START, OrtValue.ortvalue_from_numpy(_LAST))
        self._steps[stage] = (session, binding)
        return session, binding

    def _feed(self, ids: Sequence[int], stage: int, logits: FloatArray, *, last_only: bool = False) -> None:
        from onnxruntime import OrtValue

        session = self._sessions.get(stage)
        binding = session.io_binding()
        self.cache.bind(binding)
        row = np.array([ids], np.int64)  # [1, chunk]
        binding.bind_ortvalue_input("input_ids", OrtValue.ortvalue_from_numpy(row))
        binding.bind_ortvalue_output("logits", OrtValue.ortvalue_from_numpy(logits))
        if last_only or self._sessions.own:
            start = _LAST if last_only else _ALL
            binding.bind_ortvalue_input(LOGITS_START, OrtValue.ortvalue_from_numpy(start))
        self._run(session, binding, stage, len(ids))

    def _run(self, session: InferenceSession, binding: IOBinding, stage: int, count: int) -> None:
        total = self.cache.after(count)  # the graph would write past the end of the buffers
        # The mask is as long as the sequence: a view of n ones costs 2 µs and allocates nothing.
        binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, total), self._mask_pointer)
        self._sessions.run(session, binding, stage=stage, position=total - 1)
        self.cache.length = total
