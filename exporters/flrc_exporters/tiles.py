"""Matrices of integers as the project's own kernels read them: tiles of 16 rows and 32 inputs, one-byte scales.

The layout is said in words in ``runtime/kernels/flrc_product.h``; this module writes it, and reads it again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .block_scales import Bytes, Float, rounded, smallest

BLOCK, ROWS, STRIP, LINE = 32, 16, 4, 64
WIDTHS = (2, 3, 4, 5, 6, 8)
# Bits of each plane, the highest bits of an integer first.
PLANES = {8: (4, 4), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
Integers = npt.NDArray[np.int8]


def scale_bytes(scales: Float) -> tuple[Bytes, float]:
    """Say scales in a byte each: sign, 4 bits of exponent e = 1 .. 15, 3 bits of mantissa m; 0 is zero.

    Args:
        scales: float32 of any shape.

    Returns:
        The bytes, and the power of two that ``+-(1 + m/8) * 2^(e - 7)`` is multiplied by: the largest scale has e = 15.
        Floats of three bits within 15 powers of two (block_scales.py) are said exactly. Others become the nearest, one
        below the least there is becomes that or zero.
    """
    least = smallest(scales)
    unit = np.float32(max(least * 2.0**6, float(np.finfo(np.float32).tiny)) if least else 1.0)
    sizes = np.abs(rounded(scales)) / unit
    mantissas, exponents = np.frexp(sizes)  # mantissas from 1/2 to 1
    codes = (exponents.astype(np.int64) + 6) * 8 + (mantissas * 16).astype(np.int64) - 8
    codes = np.where(sizes >= 2.0**-6, codes, np.where(np.abs(scales) / unit >= 2.0**-7, 8, 0))
    return (codes | np.where((scales < 0) & (codes > 0), 128, 0)).astype(np.uint8), float(unit)


def scale_values(codes: Bytes, unit: float) -> Float:
    """Return the scales that bytes stand for, float32."""
    exponents, mantissas = (codes & 127) >> 3, codes & 7
    sizes = (1 + mantissas / 8.0) * np.exp2(exponents.astype(np.float64) - 7)
    signed = np.where(codes & 127, np.where(codes & 128, -sizes, sizes), 0.0)
    return (signed.astype(np.float32) * np.float32(unit)).astype(np.float32)


def filled(inputs: int) -> int:
    """Return the inputs that are stored: filled up to whole blocks."""
    return -(-inputs // BLOCK) * BLOCK


def tile_bytes(rows: int, inputs: int, width: int) -> int:
    """Return the bytes of a matrix, its rows and inputs filled up; a width of 32 is float32."""
    if width == 32:
        return -(-rows // ROWS) * LINE * filled(inputs)
    return plane_bytes(rows, filled(inputs), width)


def float_tiles(weight: Float) -> Bytes:
    """Lay out a matrix ``[rows, inputs]`` of floats: groups of 16 rows, a line an input, filled up with zeros."""
    rows, inputs = weight.shape
    padded = np.zeros((-(-rows // ROWS) * ROWS, filled(inputs)), np.float32)
    padded[:rows, :inputs] = weight
    lines = padded.reshape(-1, ROWS, padded.shape[1]).transpose(0, 2, 1)
    return np.frombuffer(np.ascontiguousarray(lines, "<f4").tobytes(), np.uint8)


def float_values(data: Bytes, rows: int, inputs: int) -> Float:
    """Undo :func:`float_tiles`."""
    lines = data.view("<f4").reshape(-(-rows // ROWS), filled(inputs), ROWS)
    values: Float = lines.transpose(0, 2, 1).reshape(-1, filled(inputs))[:rows, :inputs]
    return values


def plane_bytes(rows: int, inputs: int, width: int) -> int:
    """Return the bytes of a matrix, its rows filled up to a multiple of 16."""
    blocks = inputs // BLOCK
    return -(-rows // ROWS) * LINE * (-(-blocks // STRIP) + blocks * width)


def pack_tiles(integers: Integers, codes: Bytes, width: int) -> Bytes:
    """Lay out a matrix.

    Args:
        integers: ``[rows, inputs]`` from ``-2^(width-1)`` to ``2^(width-1) - 1``; inputs a multiple of 32.
        codes: Scale bytes ``[rows, inputs / 32]``.
        width: Bits of an integer.

    Returns:
        ``[plane_bytes(rows, inputs, width)]`` uint8.

    Raises:
        ValueError: Shapes, width or integers do not fit one another.
    """
    rows, inputs = integers.shape
    blocks, zero = inputs // BLOCK, 1 << (width - 1)
    if width not in WIDTHS or inputs % BLOCK or codes.shape != (rows, blocks):
        raise ValueError(f"{integers.shape} integers of {width} bits do not fit {codes.shape} scales")
    if integers.size and not -zero <= integers.min() <= integers.max() < zero:
        raise ValueError(f"an integer does not have {width} bits")
    groups, strips = -(-rows // ROWS), -(-blocks // STRIP)
    fill = groups * ROWS - rows
    unsigned = np.pad(integers.astype(np.int16) + zero, ((0, fill), (0, 0)), constant_values=zero)
    # [groups, blocks, quads of inputs, rows, inputs of a quad]
    quads = unsigned.reshape(groups, ROWS, blocks, 8, 4).transpose(0, 2, 3, 1, 4).astype(np.uint8)
    lines, shift = [], width
    for bits in PLANES[width]:
        shift -= bits
        lines.append(_plane((quads >> shift & ((1 << bits) - 1)).astype(np.uint8), bits))
    tiles = np.concatenate(lines, axis=2).reshape(groups, blocks, width * LINE)
    padded = np.pad(codes, ((0, fill), (0, strips * STRIP - blocks)))
    scales = padded.reshape(groups, ROWS, strips, STRIP).transpose(0, 2, 3, 1).reshape(groups, strips, LINE)
    parts = [
        part
        for strip in range(strips)
        for part in (
            scales[:, strip],
            tiles[:, STRIP * strip : STRIP * (strip + 1)].reshape(groups, -1),
        )
    ]
    return np.ascontiguousarray(np.concatenate(parts, axis=1)).reshape(-1)


def unpack_tiles(data: Bytes, rows: int, inputs: int, width: int) -> tuple[Integers, Bytes]:
    """Return the integers and scale bytes that :func:`pack_tiles` laid out.

    Raises:
        ValueError: ``data`` is not as long as such a matrix is.
    """
    if data.size != plane_bytes(rows, inputs, width):
        raise ValueError(
            f"{data.size} bytes are no matrix of {rows} rows and {inputs} inputs in {width} bits"
        )
    blocks, groups = inputs // BLOCK, -(-rows // ROWS)
    strips = -(-blocks // STRIP)
    of_group = data.reshape(groups, -1)
    stride = LINE * (1 + STRIP * width)
    scales = np.stack([of_group[:, s * stride : s * stride + LINE] for s in range(strips)], axis=1)
    tiles = np.concatenate(
        [
            of_group[:, s * stride + LINE : (s + 1) * stride].reshape(groups, -1, width, LINE)
            for s in range(strips)
        ],
        axis=1,
    )
    quads: Bytes = np.zeros((groups, blocks, 8, ROWS, 4), np.uint8)
    first = 0
    for bits in PLANES[width]:
        lines = tiles[:, :, first : first + bits].reshape(groups, blocks, bits, ROWS, 4)
        fields = 8 // bits
        parts = [(lines[:, :, i // fields] >> (bits * (i % fields))) & ((1 << bits) - 1) for i in range(8)]
        quads = ((quads << bits) | np.stack(parts, axis=2)).astype(np.uint8)
        first += bits
    unsigned = quads.transpose(0, 3, 1, 2, 4).reshape(groups * ROWS, inputs)[:rows]
    codes = scales.reshape(groups, strips * STRIP, ROWS).transpose(0, 2, 1).reshape(groups * ROWS, -1)
    integers = (unsigned.astype(np.int16) - (1 << (width - 1))).astype(np.int8)
    return integers, np.ascontiguousarray(codes[:rows, :blocks])


def _plane(values: Bytes, bits: int) -> Bytes:
    """Put 8 quads of values of so many bits into lines: ``[groups, blocks, 8, rows, 4]`` to ``[.., bits, 64]``."""
    groups, blocks = values.shape[:2]
    fields = 8 // bits
    shifted = (
        values.reshape(groups, blocks, bits, fields, ROWS, 4)
        << (bits * np.arange(fields, dtype=np.uint8))[:, None, None]
    )
    lines: Bytes = np.bitwise_or.reduce(shifted, axis=3)
    return lines.reshape(groups, blocks, bits, LINE)
