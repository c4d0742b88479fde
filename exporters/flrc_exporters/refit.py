"""A checkpoint of floats whose pivoted factors are about to be rounded to nearest: U is fitted to what V becomes.

An error in a pivot row is in every row that is made of it, a few times over: with U as it was, int4 costs
SmolLM2-135M at keep .8 about 5 nats. No inputs are known here, so that least squares takes all alike.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flrc_runtime.manifest import RankPlan

from .number_format import Float, NumberFormat, dequantize, quantize
from .source import CheckpointTensors

RIDGE = 1e-6  # of the mean square of V's rows, so that U is defined where V has lost a direction


def refitted(U: Float, V: Float, number_format: NumberFormat) -> Float:
    """Return the coefficients of least ``‖U V - U' V̂‖``, V̂ being V rounded to nearest.

    Args:
        U: ``[m - r, r]``.
        V: ``[r, n]``.
        number_format: Of V.
    """
    bits = number_format.bits
    if bits == 32 or not V.any():
        return U
    block = number_format.block_size
    rounded = dequantize(*quantize(V, bits, block), V.shape[1], block=block).astype(np.float64)
    energy = rounded @ rounded.T
    ridge = max(RIDGE * float(np.diagonal(energy).mean()), np.finfo(np.float64).tiny)
    mixed = U @ (V.astype(np.float64) @ rounded.T)  # (m - r, r)
    return np.linalg.solve(energy + ridge * np.eye(len(V)), mixed.T).T.astype(np.float32)


class RefittedTensors(CheckpointTensors):
    """The tensors of a checkpoint of floats, U of pivoted chunks fitted to V in its number format.

    Args:
        folder: The checkpoint.
        plan: With number formats.

    Raises:
        FormatError: A file is damaged or truncated.
        VerificationError: A file is missing.
    """

    def __init__(self, folder: Path, plan: RankPlan) -> None:
        super().__init__(folder)
        self._formats = {
            f"{p.name}.chunks.{i}": NumberFormat.named(p.format_of(f"chunks.{i}.V"))
            for p in plan.projections
            if p.storage == "pivoted" and not p.dense
            for i in range(len(p.chunks()))
        }
        self._last: tuple[str, Float] | None = None

    def read(self, name: str, rows: slice = slice(None)) -> Float:
        """Read a tensor or a part of it, as :class:`CheckpointTensors` does."""
        chunk, _, matrix = name.rpartition(".")
        if matrix != "U" or chunk not in self._formats:
            return super().read(name, rows)
        if self._last is None or self._last[0] != name:  # read in slabs of rows
            u, v = super().read(name), super().read(f"{chunk}.V")
            self._last = name, refitted(u, v, self._formats[chunk])
        return self._last[1][rows]
