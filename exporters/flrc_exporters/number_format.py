"""Number formats of stored matrices: fp32, and symmetric integers of 2, 4 or 8 bits in blocks along the input.

The integers are what com.microsoft ``MatMulNBits`` and ``GatherBlockQuantized`` read without zero points,
``w ≈ (q - 2^(bits-1)) · s``. Rounded to nearest here; ``compress`` compensates the error (flrc_edge.quantization).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from flrc_runtime.errors import UsageError
from flrc_runtime.manifest import ProjectionPlan, RankPlan

from .block_scales import rounded, smallest
from .tiles import plane_bytes

Integers = Literal["int8", "int8/64", "int8/128", "int4", "int4/64", "int4/128"]
Dtype = Literal["fp32", Integers]
Bits = Literal[8, 4, 2]
AccuracyLevel = Literal[0, 1, 4]
Float = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BLOCK = 32
BLOCKS = (32, 64, 128)  # onnxruntime 1.32 has fast CPU kernels for all of them at 4 and 8 bits
# Scales tried per block, before they are rounded (block_scales.py), relative to the one that maps the entry of largest
# magnitude to -127 or -8; the last one of 4 bits maps it to 7. ‖ŵ - w‖ / ‖w‖ on SmolLM2, 8 bits: .0055 with float32
# scales; of three bits .0086 with the first alone, .0057 with both; 4 bits: .0783 and, of three, .0798 (.0794 with 40).
SCALES: dict[int, tuple[float, ...]] = {
    8: (1.0, 1.07),
    4: (1.0, 1.06, 0.93, 0.87, 0.8, -8 / 7),
    2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, -2.0, -1.5, -1.0, -0.9, -0.8, -0.7, -0.6),
}
_SLAB = 1 << 20  # elements quantized at once, so that temporaries stay small
LEAST = 1e-30  # smaller entries are zeros: their scale would have no three bits


@dataclass(frozen=True)
class NumberFormat:
    """How a matrix ``[out, in]`` is stored.

    Args:
        bits: 32 for float32, else the width of an integer.
        block_size: Entries along the input dimension that share a scale.
        accuracy_level: 4 lets kernels round activations to int8.
    """

    bits: Literal[32, 8, 4, 2]
    block_size: int = BLOCK
    accuracy_level: AccuracyLevel = 4

    @classmethod
    def named(cls, name: str, accuracy_level: AccuracyLevel = 4) -> NumberFormat:
        """Return the format of a name such as ``fp32``, ``int8``, ``int4`` or ``int4/64``.

        Raises:
            UsageError: There is no such format.
        """
        bits: dict[str, Literal[32, 8, 4, 2]] = {"fp32": 32, "int8": 8, "int4": 4, "int2": 2}
        kind, _, block = name.partition("/")
        if kind not in bits or (block and (kind == "fp32" or block not in map(str, BLOCKS))):
            raise UsageError(
                f"{name!r} is not a number format",
                hint="fp32, int8 or int4, or with a block, such as int4/64",
            )
        return cls(bits[kind], int(block) if block else BLOCK, accuracy_level)

    def fitted(self, in_features: int) -> NumberFormat:
        """Return the format with the largest block, up to its own, that pads no row of so many inputs.

        Padding is read like weights: blocks of 128 would make 640 inputs of SmolLM2's 576.
        """
        if not self.quantized:
            return self
        exact = [block for block in BLOCKS if block <= self.block_size and in_features % block == 0]
        return replace(self, block_size=max(exact, default=min(BLOCKS)))

    @property
    def name(self) -> str:
        """Name in plans: ``fp32`` or, with its block, ``int4/32``."""
        return f"int{self.bits}/{self.block_size}" if self.quantized else "fp32"

    @property
    def quantized(self) -> bool:
        """Whether the values are integers with a scale a block."""
        return self.bits < 32

    @property
    def block_bytes(self) -> int:
        """Bytes of the integers of one block."""
        return self.block_size * self.bits // 8

    def packed_shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """Return ``(out, blocks, bytes of a block)``; the last block of a row is padded."""
        return out_features, -(-in_features // self.block_size), self.block_bytes

    def size(self, out_features: int, in_features: int) -> int:
        """Return the bytes of a matrix as the project's own kernels read it (tiles.py), scales and filling included."""
        if not self.quantized:
            return 4 * out_features * in_features
        return plane_bytes(out_features, -(-in_features // BLOCK) * BLOCK, self.bits)


def fitted_formats(plan: ProjectionPlan, wanted: Callable[[str], NumberFormat]) -> tuple[str, ...]:
    """Return the format names of a projection's matrices, with blocks that pad none of their rows.

    Args:
        plan: Of the projection.
        wanted: The format of a matrix, by its name in :meth:`ProjectionPlan.matrices`, before its block is fitted.
    """
    return tuple(wanted(name).fitted(width).name for name, (_, width) in plan.matrices().items())


def rounded_plan(plan: RankPlan, wanted: NumberFormat, *, embedding: str) -> RankPlan:
    """Return a plan whose projections all have one number format, and the embedding another.

    The coefficients U of pivoted chunks get at least 8 bits: an error in one takes a multiple of a whole row. With 4
    bits for V and U, compensated, SmolLM2-135M at keep .8 has g .471, with 8 for U .321 (.165 in floats).
    """
    finer = replace(wanted, bits=max(wanted.bits, 8))

    def formats(p: ProjectionPlan) -> tuple[str, ...]:
        return fitted_formats(
            p, lambda matrix: finer if p.storage == "pivoted" and matrix.endswith(".U") else wanted
        )

    projections = tuple(replace(p, formats=formats(p)) for p in plan.projections)
    return replace(plan, projections=projections, embedding=embedding)


def default_dtype(plan: RankPlan) -> Dtype:
    """Return the number format that floats are best rounded to if none is asked: pivoted factors take 8 bits only."""
    pivoted = any(p.storage == "pivoted" and not p.dense for p in plan.projections)
    return "int8" if pivoted else "int4"


@dataclass(frozen=True)
class Formats:
    """Number format of embedding and head; those of the projections are in the plan, but for ``accuracy_level``."""

    embedding: NumberFormat
    accuracy_level: AccuracyLevel


def quantize(weight: Float, bits: Bits, block: int = BLOCK) -> tuple[Bytes, Float]:
    """Round a matrix to nearest with the scale of least squared error per block.

    Args:
        weight: ``[out, in] float32``; ``in`` need not be a multiple of the block.
        bits: 8, 4 or 2.
        block: Entries along the input dimension that share a scale.

    Returns:
        Integers ``[out, blocks, block · bits / 8] uint8`` (the earlier entry in the lower bits), scales
        ``[out, blocks]``.
    """
    out_features, in_features = weight.shape
    blocks = -(-in_features // block)
    packed = np.empty((out_features, blocks, block * bits // 8), np.uint8)
    scales = np.empty((out_features, blocks), np.float32)
    step = max(1, _SLAB // (blocks * block))
    for start in range(0, out_features, step):
        rows = weight[start : start + step]
        padded = np.zeros((len(rows), blocks * block), np.float32)
        padded[:, :in_features] = rows
        q, s = _quantize_blocks(padded.reshape(len(rows), blocks, block), bits)
        packed[start : start + step] = pack(q, bits)
        scales[start : start + step] = s
    fit_powers(packed, scales, bits)
    return packed, scales


def fit_powers(packed: Bytes, scales: Float, bits: Bits) -> None:
    """Give blocks whose scale is too small beside the largest one of their matrix the smallest there may be; in place.

    Args:
        packed: ``[out, blocks, block · bits / 8]``.
        scales: ``[out, blocks]``; becomes 0 where a block is nothing but zeros.
        bits: 8, 4 or 2.
    """
    half = 1 << (bits - 1)
    zero = pack(np.full(8 // bits, half, np.uint8), bits)
    scales[(packed == zero).all(-1)] = 0
    least = np.float32(smallest(scales))
    small = (scales != 0) & (np.abs(scales) < least)
    if small.any():
        values = (unpack(packed[small], bits).astype(np.float32) - half) * scales[small][:, None]
        packed[small] = pack(
            (np.clip(np.rint(values / least), -half, half - 1) + half).astype(np.uint8), bits
        )
        scales[small] = least
        scales[(packed == zero).all(-1)] = 0


def reach(bits: int) -> int:
    """Return the integer that the entry of largest magnitude is mapped to, negated, before scales are tried."""
    return 127 if bits == 8 else 1 << (bits - 1)  # int8 has no need of the one more negative value


def _quantize_blocks(x: Float, bits: Bits) -> tuple[Bytes, Float]:
    half = 1 << (bits - 1)
    peak = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)[..., 0]
    base = np.where(np.abs(peak) < LEAST, 1, peak / -reach(bits)).astype(np.float32)
    best_q = best_s = best_error = None
    for factor in SCALES[bits]:
        s = rounded(base * np.float32(factor))
        q = np.clip(np.rint(x / s[..., None]), -half, half - 1)
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


def pack(values: Bytes, bits: Bits) -> Bytes:
    """Pack unsigned integers ``[..., k]`` into ``[..., k · bits / 8]`` bytes, the earlier one in the lower bits."""
    per_byte = 8 // bits
    packed = values[..., 0::per_byte].copy()
    for i in range(1, per_byte):
        packed |= values[..., i::per_byte] << (bits * i)
    return packed


def unpack(packed: Bytes, bits: Bits) -> Bytes:
    """Undo :func:`pack`."""
    per_byte = 8 // bits
    values = np.empty((*packed.shape[:-1], packed.shape[-1] * per_byte), np.uint8)
    for i in range(per_byte):
        values[..., i::per_byte] = packed >> (bits * i) & (1 << bits) - 1
    return values


def dequantize(packed: Bytes, scales: Float, in_features: int, *, block: int = BLOCK) -> Float:
    """Return the matrix ``[out, in] float32`` that the integers stand for; ``block`` says how wide they are."""
    bits: Bits = {block: 8, block // 2: 4, block // 4: 2}[packed.shape[-1]]  # type: ignore[assignment]
    values = unpack(packed, bits).astype(np.float32)
    values -= 1 << (bits - 1)
    values *= scales[..., None]
    return values.reshape(len(packed), -1)[:, :in_features]
