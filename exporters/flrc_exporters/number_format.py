"""Number formats of stored matrices: fp32, and symmetric int8 and int4 in blocks along the input dimension.

The integers are what com.microsoft ``MatMulNBits`` and ``GatherBlockQuantized`` read without zero points,
``w ≈ (q - 2^(bits-1)) · s``, rounded to nearest. Error-compensated rounding happens before export, not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Dtype = Literal["fp32", "int8", "int4"]
Float = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BLOCK = 32
# Scales tried per block, relative to the one that maps the entry of largest magnitude to -8; the last maps it
# to 7. ‖ŵ − w‖ / ‖w‖ on SmolLM2: 0.102 largest to 7, 0.087 to -8, 0.0795 with these six, 0.0786 with sixteen.
_INT4_SCALES = (1.0, 0.95, 0.9, 0.85, 0.8, -8 / 7)
_SLAB = 1 << 20  # elements quantized at once, so that temporaries stay small


@dataclass(frozen=True)
class NumberFormat:
    """How a matrix ``[out, in]`` is stored; ``accuracy_level`` 4 lets kernels round activations to int8."""

    bits: Literal[32, 8, 4]
    accuracy_level: Literal[0, 1, 4] = 4

    @classmethod
    def named(cls, dtype: Dtype, accuracy_level: Literal[0, 1, 4] = 4) -> NumberFormat:
        """Return the format of a ``--dtype`` name."""
        bits: dict[Dtype, Literal[32, 8, 4]] = {"fp32": 32, "int8": 8, "int4": 4}
        return cls(bits[dtype], accuracy_level)

    @property
    def quantized(self) -> bool:
        """Whether the values are integers with a scale a block."""
        return self.bits < 32

    @property
    def block_size(self) -> int:
        """Entries along the input dimension that share a scale."""
        return BLOCK

    @property
    def block_bytes(self) -> int:
        """Bytes of the integers of one block."""
        return BLOCK * self.bits // 8

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes a parameter takes, its share of the block's float32 scale included."""
        return self.bits / 8 + (4 / BLOCK if self.quantized else 0)

    def packed_shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """Return ``(out, blocks, bytes of a block)``; the last block of a row is padded."""
        return out_features, -(-in_features // BLOCK), self.block_bytes


def quantize(weight: Float, bits: Literal[8, 4]) -> tuple[Bytes, Float]:
    """Round a matrix to nearest with the scale of least squared error per block.

    Args:
        weight: ``[out, in] float32``; ``in`` need not be a multiple of the block.
        bits: 8 or 4.

    Returns:
        Integers ``[out, blocks, block · bits / 8] uint8`` (int4: low nibble first), scales ``[out, blocks]``.
    """
    out_features, in_features = weight.shape
    blocks = -(-in_features // BLOCK)
    packed = np.empty((out_features, blocks, BLOCK * bits // 8), np.uint8)
    scales = np.empty((out_features, blocks), np.float32)
    step = max(1, _SLAB // (blocks * BLOCK))
    for start in range(0, out_features, step):
        rows = weight[start : start + step]
        padded = np.zeros((len(rows), blocks * BLOCK), np.float32)
        padded[:, :in_features] = rows
        q, s = _quantize_blocks(padded.reshape(len(rows), blocks, BLOCK), bits)
        packed[start : start + step] = q if bits == 8 else q[..., 0::2] | q[..., 1::2] << 4
        scales[start : start + step] = s
    return packed, scales


def _quantize_blocks(x: Float, bits: int) -> tuple[Bytes, Float]:
    half = 1 << (bits - 1)
    reach = half if bits == 4 else half - 1  # int8 has no need of the one more negative value
    peak = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)[..., 0]
    base = np.where(peak == 0, 1, peak / -reach).astype(np.float32)
    best_q = best_s = best_error = None
    for factor in _INT4_SCALES if bits == 4 else (1.0,):
        s = base * np.float32(factor)
        q = np.clip(np.rint(x / s[..., None]), -half, half - 1)
        if bits == 8:
            best_q, best_s = q, s
            break
        error = np.square(q * s[..., None] - x).sum(-1)
        if best_q is None or best_s is None or best_error is None:
            best_q, best_s, best_error = q, s, error
        else:
            better = error < best_error
            best_q = np.where(better[..., None], q, best_q)
            best_s = np.where(better, s, best_s)
            best_error = np.minimum(error, best_error)
    assert best_q is not None and best_s is not None
    return (best_q + half).astype(np.uint8), best_s.astype(np.float32)


def dequantize(packed: Bytes, scales: Float, in_features: int) -> Float:
    """Return the matrix ``[out, in] float32`` that the integers stand for."""
    out_features, blocks, size = packed.shape
    if size == BLOCK:
        values = packed.astype(np.float32) - 128
    else:
        values = np.empty((out_features, blocks, BLOCK), np.float32)
        values[..., 0::2] = packed & 15
        values[..., 1::2] = packed >> 4
        values -= 8
    values *= scales[..., None]
    return values.reshape(out_features, blocks * BLOCK)[:, :in_features]
