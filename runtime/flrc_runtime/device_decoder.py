"""One sequence in fused graphs on an accelerator with memory of its own: keys and values stay there between steps.

The in-place cache of decoder.py is memory of the host, which onnxruntime would copy to the device and back at every
step. Here the values that one step returns are given to the next one as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .any_decoder import Positions
from .decoder import default_chunk
from .sessions import LOGITS_START, StageSessions

if TYPE_CHECKING:
    from onnxruntime import OrtValue

FloatArray = NDArray[np.float32]


class DevicePast(Positions):
    """Keys and values ``[1, kv, length, hd]`` of every layer, wherever the last step left them.

    Args:
        sessions: Of the bundle.
        context: Positions to hold.
    """

    def __init__(self, sessions: StageSessions, context: int) -> None:
        from onnxruntime import OrtValue

        shape = sessions.kv_shape
        names = [f"{layer}.{kind}" for layer in range(shape.layers) for kind in ("key", "value")]
        empty = np.zeros((1, shape.heads, 0, shape.width), np.float32)
        super().__init__(context)
        self.values: dict[str, OrtValue] = {name: OrtValue.ortvalue_from_numpy(empty) for name in names}

    def rollback(self, length: int) -> None:
        """Forget every position from ``length`` on; what is left goes through the host.

        Raises:
            UsageError: ``length`` is negative or more than is filled.
        """
        from onnxruntime import OrtValue

        before = self.length
        super().rollback(length)
        if length < before:
            for name, value in self.values.items():
                kept = np.ascontiguousarray(value.numpy()[:, :, :length])
                self.values[name] = OrtValue.ortvalue_from_numpy(kept)


class DeviceDecoder:
    """Feeds tokens of one sequence through any of the stages.

    Args:
        sessions: Of the bundle; shared with other decoders.
        context: Positions to hold.
        vocab_size: Of the logits.
    """

    def __init__(self, sessions: StageSessions, *, context: int, vocab_size: int) -> None:
        self.cache = DevicePast(sessions, context)
        self._sessions = sessions
        self._chunk = default_chunk(vocab_size)

    @property
    def length(self) -> int:
        """Positions fed so far."""
        return self.cache.length

    def step(self, token_id: int, stage: int) -> FloatArray:
        """Feed one token; return logits ``[vocab]``."""
        row: FloatArray = self._run([token_id], stage)[0]
        return row

    def feed(self, ids: Sequence[int], stage: int) -> FloatArray:
        """Feed several tokens at once; return logits ``[len(ids), vocab]`` of the token after each."""
        return self._run(ids, stage)

    def prefill(self, ids: Sequence[int], stage: int) -> FloatArray:
        """Feed a prompt of at least one token, in chunks; return logits ``[vocab]`` of the token after the last."""
        session = self._sessions.get(stage)
        prunes = any(node.name == LOGITS_START for node in session.get_overridable_initializers())
        for start in range(0, len(ids), self._chunk):
            row: FloatArray = self._run(ids[start : start + self._chunk], stage, last_only=prunes)[-1]
        return row

    def close(self) -> None:
        """Free the buffers."""
        self.cache.values.clear()

    def _run(self, ids: Sequence[int], stage: int, *, last_only: bool = False) -> FloatArray:
        total = self.cache.after(len(ids))
        from onnxruntime import OrtValue

        session = self._sessions.get(stage)
        binding = session.io_binding()
        inputs = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, total), np.int64)}
        if last_only:
            inputs[LOGITS_START] = np.array([-1], np.int64)
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        binding.bind_output("logits", "cpu")
        for name, value in self.cache.values.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_output(f"present.{name}", self._sessions.device or "cpu")
        self._sessions.run(session, binding, stage=stage, position=total - 1)
        logits, *present = binding.get_outputs()
        self.cache.values = dict(zip(self.cache.values, present, strict=True))
        self.cache.length = total
        rows: FloatArray = logits.numpy()[0]
        return rows
