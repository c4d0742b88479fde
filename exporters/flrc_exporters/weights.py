"""``weights.bin``: every tensor of every stage once, at an aligned offset, written in one pass.

Offsets follow from shapes alone, so matrices are read, rounded and written a slab of rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt

from .architectures import DecoderConfig
from .attention import rope_kinds
from .decoder import Formats
from .layout import GroupLayout, Part, output_factor_name
from .number_format import Float, NumberFormat, quantize
from .source import CheckpointTensors

FILE_NAME = "weights.bin"
PAGE, LINE = 4096, 64  # large tensors start on a page so that they can be mapped, small ones on a cache line
_SLAB = 1 << 22  # elements of a matrix read at once


@dataclass(frozen=True)
class Stored:
    """A tensor in ``weights.bin``; ``offset`` and ``length`` in bytes."""

    name: str
    dtype: Literal["float32", "uint8"]
    shape: tuple[int, ...]
    offset: int

    @property
    def length(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def read(self, path: Path) -> npt.NDArray[np.float32] | npt.NDArray[np.uint8]:
        """Map the tensor read-only."""
        return np.memmap(path, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)


@dataclass(frozen=True)
class Piece:
    """A part of a source tensor: some of its rows, or some of its columns."""

    tensor: str
    start: int
    stop: int
    columns: bool = False


@dataclass(frozen=True)
class Matrix:
    """A matrix ``[out, in]`` made of source pieces on top of each other; ``name`` is its module in the graph.

    ``transposed`` is how fp32 MatMul wants it. ``aliases`` are further parameter names of the same bytes.
    """

    name: str
    pieces: tuple[Piece, ...]
    shape: tuple[int, int]
    format: NumberFormat
    transposed: bool = True
    is_embedding: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vector:
    """A norm weight or bias: source vectors end to end, plus ``offset``."""

    name: str
    tensors: tuple[str, ...]
    size: int
    offset: float = 0.0


Recipe = Matrix | Vector


def recipes(config: DecoderConfig, groups: dict[str, GroupLayout], formats: Formats) -> list[Recipe]:
    """Return what every tensor of ``weights.bin`` is made of, in the order a forward pass reads it."""
    vocab, hidden = config.vocab_size, config.hidden_size
    whole = (Piece("model.embed_tokens.weight", 0, vocab),)
    embedding = Matrix(
        "model.embed_tokens",
        whole,
        (vocab, hidden),
        formats.embedding,
        transposed=False,
        is_embedding=True,
        aliases=("lm_head",) if config.tied_embedding else (),
    )
    result: list[Recipe] = [embedding]
    shapes = config.other_tensors()
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        result += [
            Vector(name, (name,), shape[0], config.norm_offset)
            for name, shape in shapes.items()
            if name.startswith(f"{layer}.") and name.endswith("norm.weight")
        ]
        for name, group in groups.items():
            if name.startswith(f"{layer}."):
                result += _group_recipes(name, group, shapes, formats.projections)
    result.append(Vector("model.norm.weight", ("model.norm.weight",), hidden, config.norm_offset))
    if not config.tied_embedding:
        head = (Piece("lm_head.weight", 0, vocab),)
        result.append(Matrix("lm_head", head, (vocab, hidden), formats.head))
    return result


def _group_recipes(
    name: str, group: GroupLayout, shapes: dict[str, tuple[int, ...]], number_format: NumberFormat
) -> list[Recipe]:
    result: list[Recipe] = []
    for block in group.blocks:
        full_name = f"{name}.{block.name}" if block.name else name
        pieces = tuple(_piece(part) for part in block.parts)
        result.append(Matrix(full_name, pieces, (block.rows, group.in_features), number_format))
    biases = [f"{p.name}.bias" for p in group.projections if f"{p.name}.bias" in shapes]
    for plan in group.projections:
        m = plan.shape[0]
        for index, (start, stop) in enumerate(plan.chunks()):
            factor = f"{plan.name}.{output_factor_name(index)}"
            pieces = (Piece(f"{plan.name}.U", start, stop, columns=True),)
            result.append(Matrix(factor, pieces, (m, stop - start), number_format))
        bias = f"{plan.name}.bias"
        if bias in biases and not group.dense:
            result.append(Vector(bias if plan.dense else f"{plan.name}.U.bias", (bias,), m))
    if biases and group.dense:
        result.append(Vector(f"{name}.bias", tuple(biases), sum(p.shape[0] for p in group.projections)))
    return result


def _piece(part: Part) -> Piece:
    name = part.projection.name
    if part.chunk is None:
        return Piece(f"{name}.weight", 0, part.rows)
    return Piece(f"{name}.V", *part.chunk)


def read_piece(source: CheckpointTensors, piece: Piece, rows: slice = slice(None)) -> Float:
    """Read ``rows`` of a piece, counted from its own start, as ``[rows, in] float32``."""
    if piece.columns:
        return source.read(piece.tensor, rows, slice(piece.start, piece.stop))
    start, stop, _ = rows.indices(piece.stop - piece.start)
    return source.read(piece.tensor, slice(piece.start + start, piece.start + stop))


def piece_rows(matrix: Matrix, piece: Piece) -> int:
    """Return the rows a piece takes in its matrix."""
    return matrix.shape[0] if piece.columns else piece.stop - piece.start


class WeightFile:
    """Writes ``weights.bin`` and knows where every parameter lies in it; ``table`` maps parameter names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table: dict[str, Stored] = {}
        self._end = 0

    def reserve(self, name: str, dtype: Literal["float32", "uint8"], shape: Sequence[int]) -> Stored:
        """Give a tensor its place."""
        stored = Stored(name, dtype, tuple(shape), 0)
        step = PAGE if stored.length >= 1 << 16 else LINE
        stored = Stored(name, dtype, tuple(shape), -(-self._end // step) * step)
        self._end = stored.offset + stored.length
        self.table[name] = stored
        return stored

    def alias(self, name: str, stored: Stored, shape: Sequence[int] | None = None) -> None:
        """Give the bytes of a tensor a second name, with another shape if wanted."""
        self.table[name] = Stored(
            name, stored.dtype, stored.shape if shape is None else tuple(shape), stored.offset
        )

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
                if isinstance(recipe, Vector):
                    self._write_vector(file, source, recipe)
                elif recipe.format.quantized:
                    self._write_quantized(file, source, recipe)
                else:
                    self._write_float(file, source, recipe)
                if progress is not None:
                    progress(i + 1, len(wanted))

    def write_rotary(self, config: DecoderConfig, context: int) -> None:
        """Append cosines and sines of every kind of rotary embedding, computed in float64."""
        with self.path.open("r+b") as file:
            for i, rope in enumerate(rope_kinds(config)):
                angles = np.outer(np.arange(context), rope.inverse_frequencies(config.head_dim))
                for name, values in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
                    stored = self.reserve(f"model.rotary.{i}.{name}", "float32", values.shape)
                    _put(file, stored.offset, values.astype(np.float32))

    def _write_vector(self, file: IO[bytes], source: CheckpointTensors, recipe: Vector) -> None:
        stored = self.reserve(recipe.name, "float32", (recipe.size,))
        _put(file, stored.offset, vector_values(source, recipe))

    def _write_float(self, file: IO[bytes], source: CheckpointTensors, recipe: Matrix) -> None:
        out, width = recipe.shape
        shape = (width, out) if recipe.transposed else (out, width)
        stored = self.reserve(f"{recipe.name}.weight", "float32", shape)
        for alias in recipe.aliases:
            self.alias(f"{alias}.weight", stored)
        if recipe.transposed:
            values = np.empty(shape, np.float32)
            for start, rows in slabs(source, recipe):
                values[:, start : start + len(rows)] = rows.T
            _put(file, stored.offset, values)
        else:
            for start, rows in slabs(source, recipe):
                _put(file, stored.offset + start * width * 4, rows)

    def _write_quantized(self, file: IO[bytes], source: CheckpointTensors, recipe: Matrix) -> None:
        bits = recipe.format.bits
        assert bits != 32
        packed = recipe.format.packed_shape(*recipe.shape)
        rows_shape = (packed[0], packed[1] * packed[2])
        q = self.reserve(f"{recipe.name}.{'qrows' if recipe.is_embedding else 'qweight'}", "uint8", packed)
        if recipe.is_embedding:
            self.alias(q.name, q, rows_shape)
        s = self.reserve(f"{recipe.name}.scales", "float32", packed[:2])
        for alias in recipe.aliases:
            self.alias(f"{alias}.qweight", q)
            self.alias(f"{alias}.scales", s)
        for start, rows in slabs(source, recipe):
            values, scales = quantize(rows, bits)
            _put(file, q.offset + start * rows_shape[1], values)
            _put(file, s.offset + start * packed[1] * 4, scales)


def vector_values(source: CheckpointTensors, recipe: Vector) -> Float:
    """Return the values of a vector as they are to be stored."""
    values = np.concatenate([source.read(name) for name in recipe.tensors])
    return values + np.float32(recipe.offset) if recipe.offset else values


def slabs(source: CheckpointTensors, recipe: Matrix) -> Iterable[tuple[int, Float]]:
    """Yield ``(first row, rows)`` of a matrix, a few million elements at a time."""
    step = max(1, _SLAB // recipe.shape[1])
    first = 0
    for piece in recipe.pieces:
        rows = piece_rows(recipe, piece)
        for start in range(0, rows, step):
            yield first + start, read_piece(source, piece, slice(start, min(rows, start + step)))
        first += rows


def _put(file: IO[bytes], offset: int, values: npt.NDArray[np.generic]) -> None:
    file.seek(offset)
    file.write(np.ascontiguousarray(values).data)
