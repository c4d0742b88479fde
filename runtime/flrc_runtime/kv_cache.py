"""One set of key and value buffers for all stages.

They are bound as past and as present of every stage's graph, so the graph appends in place and another stage goes on
where the last one stopped: a switch copies nothing.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .any_decoder import Positions

if TYPE_CHECKING:
    from onnxruntime import IOBinding, OrtValue


BLOCK_POSITIONS = 16  # that our own operators keep together


@dataclass(frozen=True)
class KvShape:
    """Shape of the cache: layers, and of each the kv heads and the rows of one.

    Args:
        layers: Of the model.
        heads: Of keys and values.
        width: Numbers of a row: float32 of one position, or bytes of several.
        positions: That a row holds: 1 in the graphs of onnxruntime's operators, 16 in our own.
    """

    layers: int
    heads: int
    width: int
    positions: int = 1

    @property
    def dtype(self) -> type[np.generic]:
        """Type of a number."""
        return np.float32 if self.positions == 1 else np.uint8

    def rows(self, context: int) -> int:
        """Return the rows of a head that hold ``context`` positions."""
        return -(-context // self.positions)

    def bytes_for(self, context: int) -> int:
        """Return the bytes of keys and values for ``context`` positions."""
        return 2 * self.layers * self.heads * self.rows(context) * self.width * np.dtype(self.dtype).itemsize


class KvCache(Positions):
    """Keys and values of one sequence.

    Args:
        shape: Of the graphs.
        context: Positions to hold.
    """

    def __init__(self, shape: KvShape, context: int) -> None:
        from onnxruntime import OrtValue

        super().__init__(context)
        self._buffers: dict[str, OrtValue] = {}
        # Pages of its own, mapped at first touch and given back at the end: unused context costs no memory. numpy's
        # zeros are that for the first cache alone; later ones get used heap memory, which is cleared and so touched.
        memory = np.frombuffer(mmap.mmap(-1, shape.bytes_for(context)), shape.dtype)
        names = [f"{layer}.{kind}" for layer in range(shape.layers) for kind in ("key", "value")]
        for name, part in zip(names, np.split(memory, len(names)), strict=True):
            buffer = part.reshape(1, shape.heads, shape.rows(context), shape.width)
            self._buffers[name] = OrtValue.ortvalue_from_numpy(buffer)

    def bind(self, binding: IOBinding) -> None:
        """Bind every buffer as past and as present of one stage's graph."""
        for name, value in self._buffers.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)

    def pointers(self) -> tuple[int, ...]:
        """Return the address of every buffer; they stay the same for the cache's life."""
        return tuple(value.data_ptr() for value in self._buffers.values())

    def close(self) -> None:
        """Free the buffers."""
        self._buffers.clear()
