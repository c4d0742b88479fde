"""What lies where in ``weights.bin``: every tensor of every stage once, at an aligned offset.

Places follow from the plan alone, so the size of a bundle is known before anything is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from flrc_runtime.manifest import RankPlan

from .architectures import DecoderConfig
from .layout import GroupLayout, Part, group_layouts, output_factor_name
from .number_format import AccuracyLevel, Formats, NumberFormat
from .parts import parts_of
from .rope import Rope
from .tiles import tile_bytes

FILE_NAME = "weights.bin"
PAGE, LINE = 4096, 64  # large tensors start on a page so that they can be mapped, small ones on a cache line


@dataclass(frozen=True)
class Stored:
    """A tensor in ``weights.bin``; ``offset`` and ``length`` in bytes."""

    name: str
    dtype: Literal["float32", "uint8", "int64"]
    shape: tuple[int, ...]
    offset: int
    unit: float = 1.0  # of tiles: what their scale bytes are multiples of

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
class Tiles:
    """A matrix ``[out, in]`` as the project's own operators read it, made of whole source tensors.

    They lie on top of each other, or, if ``widths`` says how wide each is, beside each other. ``order`` names a tensor
    that says which of their rows each row is. Further module names of the same bytes are ``aliases``.
    """

    name: str
    tensors: tuple[str, ...]
    shape: tuple[int, int]
    format: NumberFormat
    widths: tuple[int, ...] = ()
    order: str = ""
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
    """Where the outputs of a pivoted chunk come from: ``size`` indices.

    ``inverse``: instead which output each row of V and U is, bytes of int32, as the project's own operators read it.
    """

    name: str
    tensor: str
    size: int
    inverse: bool = False


Recipe = Matrix | Tiles | Vector | Order


def own_recipes(config: DecoderConfig, groups: dict[str, GroupLayout], formats: Formats) -> list[Recipe]:
    """Return what every tensor of ``weights.bin`` is made of in a bundle of our own operators, in reading order."""
    vocab, hidden = config.vocab_size, config.hidden_size
    embedding, head = "model.embed_tokens", "lm_head"
    aliases = (head,) if config.tied_embedding else ()
    result: list[Recipe] = [
        Tiles(embedding, (f"{embedding}.weight",), (vocab, hidden), formats.embedding, aliases=aliases)
    ]
    shapes = config.other_tensors()
    for i in range(config.num_layers):
        result += _norms(config, f"model.layers.{i}.")
        for name, group in groups.items():
            if name.startswith(f"model.layers.{i}."):
                result += _own_group(name, group, shapes)
    result.append(Vector("model.norm.weight", ("model.norm.weight",), hidden, config.norm_offset))
    if not config.tied_embedding:
        result.append(Tiles(head, (f"{head}.weight",), (vocab, hidden), formats.embedding))
    return result


def _norms(config: DecoderConfig, layer: str) -> list[Vector]:
    return [
        Vector(name, (name,), shape[0], config.norm_offset)
        for name, shape in config.other_tensors().items()
        if name.startswith(layer) and name.endswith("norm.weight")
    ]


def _own_group(name: str, group: GroupLayout, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Recipe]:
    for plan in group.projections:
        for part in parts_of(plan):
            for module, (shape, number_format) in part.matrices().items():
                kind = module[1:2]  # V, U, or nothing
                tensors = tuple(f"{plan.name}.chunks.{c}.{kind}" for c in part.chunks) or (
                    f"{plan.name}.weight",
                )
                widths = part.widths() if kind == "U" else ()
                order = f"{plan.name}.chunks.{part.chunks[0]}.order" if part.chunks else ""
                whole = order if kind == "V" and part.second_format is None else ""
                yield Tiles(f"{plan.name}{module}", tensors, shape, number_format, widths, whole)
                if kind == "U" and part.pivoted:
                    yield Order(f"{plan.name}{module}.order", order, plan.shape[0], inverse=True)
    biases = tuple(f"{p.name}.bias" for p in group.projections if f"{p.name}.bias" in shapes)
    if biases:
        yield Vector(f"{name}.bias", biases, sum(p.shape[0] for p in group.projections))


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
        result += _norms(config, f"{layer}.")
        for name, group in groups.items():
            if name.startswith(f"{layer}."):
                result += group_recipes(name, group, shapes, formats.accuracy_level)
    result.append(Vector("model.norm.weight", ("model.norm.weight",), hidden, config.norm_offset))
    if not config.tied_embedding:
        head = (Piece("lm_head.weight", 0, vocab),)
        result.append(Matrix("lm_head", head, (vocab, hidden), formats.embedding))
    return result


def group_recipes(
    name: str, group: GroupLayout, shapes: dict[str, tuple[int, ...]], accuracy_level: AccuracyLevel
) -> list[Recipe]:
    """Return what the tensors of one input group are made of; biases are those that ``shapes`` names."""
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


class WeightTable:
    """Gives tensors their places in ``weights.bin``; ``table`` maps parameter names."""

    def __init__(self) -> None:
        self.table: dict[str, Stored] = {}
        self.size = 0  # bytes up to the end of the last tensor

    def reserve(self, name: str, dtype: Literal["float32", "uint8", "int64"], shape: Sequence[int]) -> Stored:
        """Give a tensor its place."""
        stored = Stored(name, dtype, tuple(shape), 0)
        step = PAGE if stored.length >= 1 << 16 else LINE
        stored = Stored(name, dtype, tuple(shape), -(-self.size // step) * step)
        self.size = stored.offset + stored.length
        self.table[name] = stored
        return stored

    def alias(self, name: str, stored: Stored, shape: Sequence[int] | None = None) -> None:
        """Give the bytes of a tensor a second name, with another shape if wanted."""
        self.table[name] = Stored(
            name, stored.dtype, stored.shape if shape is None else tuple(shape), stored.offset
        )

    def place(self, recipe: Recipe) -> tuple[Stored, ...]:
        """Give what a recipe makes its place: one tensor, or integers and scales."""
        if isinstance(recipe, Vector):
            return (self.reserve(recipe.name, "float32", (recipe.size,)),)
        if isinstance(recipe, Order):
            dtype: Literal["uint8", "int64"] = "uint8" if recipe.inverse else "int64"
            return (self.reserve(recipe.name, dtype, (recipe.size * (4 if recipe.inverse else 1),)),)
        if isinstance(recipe, Tiles):
            stored = self.reserve(
                f"{recipe.name}.tiles", "uint8", (tile_bytes(*recipe.shape, recipe.format.bits),)
            )
            for alias in recipe.aliases:
                self.alias(f"{alias}.tiles", stored)
            return (stored,)
        if not recipe.format.quantized:
            out, width = recipe.shape
            shape = (width, out) if recipe.transposed else (out, width)
            stored = self.reserve(f"{recipe.name}.weight", "float32", shape)
            for alias in recipe.aliases:
                self.alias(f"{alias}.weight", stored)
            return (stored,)
        packed = recipe.format.packed_shape(*recipe.shape)
        q = self.reserve(f"{recipe.name}.{'qrows' if recipe.is_embedding else 'qweight'}", "uint8", packed)
        if recipe.is_embedding:
            self.alias(q.name, q, (packed[0], packed[1] * packed[2]))
        scales = self.reserve(f"{recipe.name}.scales", "float32", packed[:2])
        for alias in recipe.aliases:
            self.alias(f"{alias}.qweight", q)
            self.alias(f"{alias}.scales", scales)
        return q, scales

    def measure(self, recipe: Tiles, unit: float) -> None:
        """Note what the scale bytes of tiles are multiples of."""
        for name in (recipe.name, *recipe.aliases):
            self.table[f"{name}.tiles"] = replace(self.table[f"{name}.tiles"], unit=unit)

    def place_rotary(self, config: DecoderConfig, context: int) -> Iterator[tuple[Rope, Stored, Stored]]:
        """Give cosines and sines of every kind of rotary embedding their places."""
        for i, rope in enumerate(config.rope_kinds()):
            shape = (context, len(rope.inverse_frequencies(config.head_dim)))
            cos, sin = (self.reserve(f"model.rotary.{i}.{name}", "float32", shape) for name in ("cos", "sin"))
            yield rope, cos, sin


def placed(config: DecoderConfig, plan: RankPlan, *, context: int, own: bool = True) -> WeightTable:
    """Return where everything of a plan that names number formats lies.

    Args:
        config: The decoder.
        plan: Ranks and the number format of every matrix.
        context: Positions (tokens) that cosines and sines are stored for.
        own: For the graphs of our own operators, or else of onnxruntime's.
    """
    table = WeightTable()
    wanted = own_recipes if own else recipes
    for recipe in wanted(config, group_layouts(config, plan), Formats(NumberFormat.named(plan.embedding), 4)):
        table.place(recipe)
    for _ in table.place_rotary(config, context):
        pass
    return table


def file_size(config: DecoderConfig, plan: RankPlan, *, context: int) -> int:
    """Return the bytes of ``weights.bin`` without writing it; see :func:`placed`."""
    return placed(config, plan, context=context).size
