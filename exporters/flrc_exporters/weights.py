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
from .number_format import AccuracyLevel, Bytes, Float, NumberFormat, quantize
from .source import CheckpointTensors

FILE_NAME = "weights.bin"
PAGE, LINE = 4096, 64  # large tensors start on a page so that they can be mapped, small ones on a cache line
_SLAB = 1 << 22  # elements of a matrix read at once


@dataclass(frozen=True)
class Stored:
    """A tensor in ``weights.bin``; ``offset`` and ``length`` in bytes."""

    name: str
    dtype: Literal["float32", "uint8", "int64"]
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
    """Some rows of a source tensor."""

    tensor: str
    start: int
    stop: int


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


@dataclass(frozen=True)
class Order:
    """Where the outputs of a pivoted chunk come from: ``size`` indices."""

    name: str
    tensor: str
    size: int


Recipe = Matrix | Vector | Order


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
                result += _group_recipes(name, group, shapes, formats.accuracy_level)
    result.append(Vector("model.norm.weight", ("model.norm.weight",), hidden, config.norm_offset))
    if not config.tied_embedding:
        head = (Piece("lm_head.weight", 0, vocab),)
        result.append(Matrix("lm_head", head, (vocab, hidden), formats.embedding))
    return result


def _group_recipes(
    name: str, group: GroupLayout, shapes: dict[str, tuple[int, ...]], accuracy_level: AccuracyLevel
) -> list[Recipe]:
    result: list[Recipe] = []
    for block in group.blocks:
        full_name = f"{name}.{block.name}" if block.name else name
        pieces = tuple(_piece(part) for part in block.parts)
        number_format = NumberFormat.named(block.format, accuracy_level)
        result.append(Matrix(full_name, pieces, (block.rows, group.in_features), number_format))
    biases = [f"{p.name}.bias" for p in group.projections if f"{p.name}.bias" in shapes]
    for plan in group.projections:
        m = plan.shape[0]
        for index, (start, stop) in enumerate(plan.chunks()):
            factor = f"{plan.name}.{output_factor_name(index)}"
            source = f"{plan.name}.chunks.{index}"
            rows = m - (stop - start) if plan.storage == "pivoted" else m
            pieces = (Piece(f"{source}.U", 0, rows),)
            number_format = NumberFormat.named(plan.format_of(f"chunks.{index}.U"), accuracy_level)
            result.append(Matrix(factor, pieces, (rows, stop - start), number_format))
            if plan.storage == "pivoted":
                result.append(Order(f"{factor}.order", f"{source}.order", m))
        bias = f"{plan.name}.bias"
        if bias in biases and not group.dense:
            apart = plan.dense or plan.storage == "pivoted"
            result.append(Vector(bias if apart else f"{plan.name}.U.bias", (bias,), m))
    if biases and group.dense:
        result.append(Vector(f"{name}.bias", tuple(biases), sum(p.shape[0] for p in group.projections)))
    return result


def _piece(part: Part) -> Piece:
    name = part.projection.name
    tensor = f"{name}.weight" if part.chunk is None else f"{name}.chunks.{part.index}.V"
    return Piece(tensor, 0, part.rows)


def read_piece(source: CheckpointTensors, piece: Piece, rows: slice = slice(None)) -> Float:
    """Read ``rows`` of a piece, counted from its own start, as ``[rows, in] float32``."""
    start, stop, _ = rows.indices(piece.stop - piece.start)
    return source.read(piece.tensor, slice(piece.start + start, piece.start + stop))


class WeightFile:
    """Writes ``weights.bin`` and knows where every parameter lies in it; ``table`` maps parameter names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table: dict[str, Stored] = {}
        self._end = 0

    def reserve(self, name: str, dtype: Literal["float32", "uint8", "int64"], shape: Sequence[int]) -> Stored:
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
                elif isinstance(recipe, Order):
                    stored = self.reserve(recipe.name, "int64", (recipe.size,))
                    _put(file, stored.offset, source.permutation(recipe.tensor))
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
        packed = recipe.format.packed_shape(*recipe.shape)
        rows_shape = (packed[0], packed[1] * packed[2])
        q = self.reserve(f"{recipe.name}.{'qrows' if recipe.is_embedding else 'qweight'}", "uint8", packed)
        if recipe.is_embedding:
            self.alias(q.name, q, rows_shape)
        s = self.reserve(f"{recipe.name}.scales", "float32", packed[:2])
        for alias in recipe.aliases:
            self.alias(f"{alias}.qweight", q)
            self.alias(f"{alias}.scales", s)
        for start, values, scales in quantized_slabs(source, recipe):
            _put(file, q.offset + start * rows_shape[1], values)
            _put(file, s.offset + start * packed[1] * 4, scales)


def vector_values(source: CheckpointTensors, recipe: Vector) -> Float:
    """Return the values of a vector as they are to be stored."""
    values = np.concatenate([source.read(name) for name in recipe.tensors])
    return values + np.float32(recipe.offset) if recipe.offset else values


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
