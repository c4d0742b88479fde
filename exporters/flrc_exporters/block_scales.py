"""Scales that a byte can hold: floats with three bits of mantissa, within a matrix 15 powers of two.

Every scale of a matrix of integers is one before its integers are chosen, so that the kernels' form (tiles.py: a byte
a scale and a power of two a matrix) holds exactly what a checkpoint and a stock graph hold in float32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MANTISSA, POWERS = 3, 15  # bits, and how many powers of two the scales of a matrix may have
Float = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def rounded(scales: npt.ArrayLike) -> Float:
    """Return the nearest floats with three bits of mantissa."""
    mantissas, exponents = np.frexp(np.asarray(scales, np.float32))  # from 1/2 to 1
    steps = np.float32(2 << MANTISSA)
    return np.ldexp(np.rint(mantissas * steps) / steps, exponents).astype(np.float32)


def smallest(scales: npt.ArrayLike) -> float:
    """Return the least size that a scale other than 0 may have beside these, or 0 if all of them are 0."""
    most = float(np.abs(rounded(scales)).max(initial=0.0))
    return float(np.ldexp(1.0, int(np.frexp(most)[1]) - POWERS)) if most else 0.0
