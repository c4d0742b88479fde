"""``weights.bin`` written in one pass: matrices are read, rounded and written a slab of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from .architectures import DecoderConfig
from .number_format import Bytes, Float, quantize, unpack
from .source import CheckpointTensors
from .tiles import BLOCK, filled, float_tiles, pack_tiles, scale_bytes
from .weight_table import Matrix, Order, Piece, Recipe, Stored, Tiles, Vector, WeightTable

_SLAB = 1 << 22  # elements of a matrix read at once


def read_piece(source: CheckpointTensors, piece: Piece, rows: slice = slice(None)) -> Float:
    """Read ``rows`` of a piece, counted from its own start, as ``[rows, in] float32``."""
    start, stop, _ = rows.indices(piece.stop - piece.start)
    return source.read(piece.tensor, slice(piece.start + start, piece.start + stop))


class WeightFile(WeightTable):
    """Writes ``weights.bin`` at ``path``."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def write(
        self,
        source: CheckpointTensors,
        wanted: Iterable[Recipe],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write every tensor of ``wanted``; ``progress`` gets the number written and the number of all."""
        wanted = list(wanted)
        with self.path.open("wb") as file:
            for i, recipe in enumerate(wanted):
                stored = self.place(recipe)
                if isinstance(recipe, Vector):
                    _put(file, stored[0].offset, vector_values(source, recipe))
                elif isinstance(recipe, Order):
                    _put(file, stored[0].offset, order_values(source, recipe))
                elif isinstance(recipe, Tiles):
                    data, unit = tile_values(source, recipe)
                    _put(file, stored[0].offset, data)
                    self.measure(recipe, unit)
                elif recipe.format.quantized:
                    _write_quantized(file, source, recipe, *stored)
                else:
                    _write_float(file, source, recipe, *stored)
                if progress is not None:
                    progress(i + 1, len(wanted))

    def append(self, name: str, values: npt.NDArray[np.float32] | npt.NDArray[np.int64]) -> Stored:
        """Write one more tensor behind the others."""
        stored = self.reserve(name, "int64" if values.dtype == np.int64 else "float32", values.shape)
        with self.path.open("r+b") as file:
            _put(file, stored.offset, values)
        return stored

    def write_rotary(self, config: DecoderConfig, context: int) -> None:
        """Append cosines and sines of every kind of rotary embedding, computed in float64."""
        with self.path.open("r+b") as file:
            for rope, cos, sin in self.place_rotary(config, context):
                angles = np.outer(np.arange(context), rope.inverse_frequencies(config.head_dim))
                _put(file, cos.offset, np.cos(angles).astype(np.float32))
                _put(file, sin.offset, np.sin(angles).astype(np.float32))


def _write_float(file: IO[bytes], source: CheckpointTensors, recipe: Matrix, stored: Stored) -> None:
    out, width = recipe.shape
    if recipe.transposed:
        values = np.empty((width, out), np.float32)
        for start, rows in slabs(source, recipe):
            values[:, start : start + len(rows)] = rows.T
        _put(file, stored.offset, values)
    else:
        for start, rows in slabs(source, recipe):
            _put(file, stored.offset + start * width * 4, rows)


def _write_quantized(
    file: IO[bytes], source: CheckpointTensors, recipe: Matrix, q: Stored, s: Stored
) -> None:
    out = recipe.shape[0]
    for start, values, scales in quantized_slabs(source, recipe):
        _put(file, q.offset + start * (q.length // out), values)
        _put(file, s.offset + start * (s.length // out), scales)


def vector_values(source: CheckpointTensors, recipe: Vector) -> Float:
    """Return the values of a vector as they are to be stored."""
    values = np.concatenate([source.read(name) for name in recipe.tensors])
    return values + np.float32(recipe.offset) if recipe.offset else values


def order_values(source: CheckpointTensors, recipe: Order) -> npt.NDArray[np.int64] | Bytes:
    """Return the order of a pivoted chunk's outputs as it is to be stored."""
    order = source.permutation(recipe.tensor)
    return np.argsort(order).astype("<i4").view(np.uint8) if recipe.inverse else order


def tile_values(source: CheckpointTensors, recipe: Tiles) -> tuple[Bytes, float]:
    """Return a matrix in tiles, and what its scale bytes are multiples of."""
    bits = recipe.format.bits
    if bits == 32:
        return float_tiles(float_matrix(source, recipe)), 1.0
    integers, scales = integer_values(source, recipe)
    codes, unit = scale_bytes(scales)
    return pack_tiles(integers, codes, bits), unit


def float_matrix(source: CheckpointTensors, recipe: Tiles) -> Float:
    """Return a matrix ``[rows, inputs]`` as the checkpoint has it."""
    values = np.concatenate([source.read(name) for name in recipe.tensors], 1 if recipe.widths else 0)
    return values[source.permutation(recipe.order)] if recipe.order else values


def integer_values(source: CheckpointTensors, recipe: Tiles) -> tuple[npt.NDArray[np.int8], Float]:
    """Return signed integers ``[rows, inputs filled up]`` and scales ``[rows, blocks of 32]`` of a matrix.

    They are those of the checkpoint, or its floats rounded to nearest.
    """
    bits, size = recipe.format.bits, recipe.format.block_size
    assert bits != 32
    integers, scales = [], []
    for i, name in enumerate(recipe.tensors):
        columns = filled(recipe.widths[i] if recipe.widths else recipe.shape[1])
        if source.holds_integers(name):
            packed, of_blocks = source.read_integers(name)
        else:
            packed, of_blocks = quantize(source.read(name), bits, size)
        values = unpack(packed, bits).reshape(len(packed), -1)[:, :columns]
        integers.append((values.astype(np.int16) - (1 << (bits - 1))).astype(np.int8))
        scales.append(np.repeat(of_blocks, size // BLOCK, axis=1)[:, : columns // BLOCK])
    axis = 1 if recipe.widths else 0
    rows = source.permutation(recipe.order) if recipe.order else slice(None)
    return np.concatenate(integers, axis)[rows], np.concatenate(scales, axis)[rows]


def slabs(source: CheckpointTensors, recipe: Matrix) -> Iterable[tuple[int, Float]]:
    """Yield ``(first row, rows)`` of a matrix, a few million elements at a time."""
    for first, piece, rows in _slices(recipe):
        yield first, read_piece(source, piece, rows)


def quantized_slabs(source: CheckpointTensors, recipe: Matrix) -> Iterable[tuple[int, Bytes, Float]]:
    """Yield ``(first row, packed integers, scales)``: those of the checkpoint, or its floats rounded to nearest."""
    bits = recipe.format.bits
    assert bits != 32
    for first, piece, rows in _slices(recipe):
        if source.holds_integers(piece.tensor):
            yield first, *source.read_integers(piece.tensor, rows)
        else:
            yield first, *quantize(read_piece(source, piece, rows), bits, recipe.format.block_size)


def _slices(recipe: Matrix) -> Iterable[tuple[int, Piece, slice]]:
    step = max(1, _SLAB // recipe.shape[1])
    first = 0
    for piece in recipe.pieces:
        rows = piece.stop - piece.start
        for start in range(0, rows, step):
            yield first + start, piece, slice(start, min(rows, start + step))
        first += rows


def _put(file: IO[bytes], offset: int, values: npt.NDArray[np.generic]) -> None:
    file.seek(offset)
    file.write(np.ascontiguousarray(values).data)
