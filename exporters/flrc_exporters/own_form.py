"""The form of a graph of the project's own operators: four ``Linear`` and one ``Attention`` a layer, nothing else.

A norm, a residual addition and a gate's activation are what a ``Linear`` does to its input before it multiplies. So
the modules for them make no node here: they return a value with a note of what is to be done, for the next ``Linear``.
Shapes: S new tokens, H hidden, hd head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from flrc_runtime.sessions import LOGITS_START

from .architectures import DecoderConfig
from .attention import FusedSteps, GroupQueryAttention
from .decoder import Decoder, Embedding, Form, GatedMLP
from .layout import GroupLayout
from .lowrank import LinearGroup
from .norm import Norm
from .number_format import AccuracyLevel, Formats, NumberFormat
from .parts import Part, parts_of
from .stages import FLRC, IR_VERSION, OPSET, add_output, name_nodes
from .tiles import tile_bytes

POSITIONS = 16  # of the cache that lie in one block
Cache = Literal["float32", "float16", "int8"]  # numbers of keys and values
CACHE_BYTES: dict[Cache, int] = {"float32": 4, "float16": 2, "int8": 1}


@dataclass
class Prepared:
    """An input of a ``Linear`` and what is to be done to it first.

    Args:
        x: The input ``[1, S, columns]``.
        residual: What is added to it; ``total`` is then the sum, which the ``Linear`` gives as its last output.
        gate: What ``x`` is multiplied by after ``activation``.
        post_norm: Weight of a norm before the residual is added.
        norm: Weight of a norm of the sum.
        epsilon: Of both norms.
        total: The sum; ``x`` itself where nothing is added.
    """

    x: ir.Value
    residual: ir.Value | None = None
    gate: ir.Value | None = None
    post_norm: ir.Value | None = None
    norm: ir.Value | None = None
    epsilon: float = 0.0
    activation: str = ""
    total: ir.Value | None = None

    def inputs(self) -> list[ir.Value | None]:
        """Return what a ``Linear`` takes before bias, start and tiles."""
        return [self.x, self.residual, self.gate, self.post_norm, self.norm]

    def attributes(self) -> dict[str, Any]:
        """Return the attributes that say how."""
        normed = self.norm is not None or self.post_norm is not None
        return ({"epsilon": self.epsilon} if normed else {}) | (
            {"activation": self.activation} if self.activation else {}
        )


class OwnNorm(Norm):
    """A norm, and the residual addition before it, that the next ``Linear`` does."""

    def forward(self, op: Any, x: Any, residual: Any = None) -> tuple[Any, Any]:
        """Return what is to be multiplied, and what later residuals are added to: the same note."""
        del op
        if residual is None and not isinstance(x, Prepared):
            prepared = Prepared(x, norm=self.weight, epsilon=self.eps, total=x)
        else:
            post = x.norm if isinstance(x, Prepared) else None
            start = residual.total if isinstance(residual, Prepared) else residual
            prepared = Prepared(
                x.x if isinstance(x, Prepared) else x,
                start,
                post_norm=post,
                norm=self.weight,
                epsilon=self.eps,
            )
        return prepared, prepared


class PartTensors(nn.Module):
    """The tensors of one matrix of a part: its tiles, and of the U of a pivoted pair the order."""

    def __init__(self, name: str, shape: tuple[int, int], number_format: NumberFormat, rows: int = 0) -> None:
        super().__init__(name)
        self.tiles = nn.Parameter([tile_bytes(*shape, number_format.bits)], ir.DataType.UINT8)
        self.order = nn.Parameter([4 * rows], ir.DataType.UINT8) if rows else None

    def forward(self, op: Any) -> list[ir.Value]:
        """Return them."""
        del op
        return [self.tiles] if self.order is None else [self.tiles, self.order]


class LinearNode(nn.Module):
    """One ``Linear``: its bias is its own parameter, the tensors of its parts are given."""

    def __init__(self, name: str, rows: Sequence[int], columns: int, *, bias: bool) -> None:
        super().__init__(name)
        self.rows, self.columns = list(rows), columns
        self.bias = nn.Parameter([sum(rows)]) if bias else None

    def forward(
        self,
        op: Any,
        x: Any,
        parts: Sequence[int],
        tensors: Sequence[ir.Value],
        start: ir.Value | None = None,
    ) -> list[ir.Value]:
        """Multiply: ``x`` a value or :class:`Prepared`, ``parts`` six numbers each, as docs/format.md says."""
        prepared = x if isinstance(x, Prepared) else Prepared(x)
        summed = prepared.residual is not None
        outputs = op.Linear(
            *prepared.inputs(),
            self.bias,
            start,
            *tensors,
            columns=self.columns,
            rows=self.rows,
            parts=list(parts),
            scales=[1.0] * len(tensors),
            **prepared.attributes(),
            _outputs=len(self.rows) + summed,
            _domain=FLRC,
            _version=1,
        )
        outputs = [outputs] if isinstance(outputs, ir.Value) else list(outputs)
        if summed:
            prepared.total = outputs.pop()
        return outputs


class OwnGroup(LinearGroup):
    """All projections of one input group in one ``Linear``."""

    def __init__(
        self,
        layout: GroupLayout,
        stage: int,
        *,
        accuracy_level: AccuracyLevel,
        bias: bool = False,
        packed: bool = False,
    ) -> None:
        del accuracy_level, packed
        nn.Module.__init__(self, "")
        plans = layout.projections
        self.numbers: list[int] = []
        self.tensors: list[PartTensors] = []
        for i, plan in enumerate(plans):
            for part in parts_of(plan):
                if part.read_at(stage):
                    self.numbers += _numbers(i, part, stage)
                    self.tensors += _tensors(part)
        self.node = LinearNode(
            layout.name.rpartition(".")[2], [p.shape[0] for p in plans], layout.in_features, bias=bias
        )

    def forward(self, op: Any, x: Any) -> list[ir.Value]:
        """Return one output ``[1, S, out]`` a projection."""
        tensors = [value for module in self.tensors for value in module(op)]
        outputs: list[ir.Value] = self.node(op, x, self.numbers, tensors)
        return outputs


def _numbers(projection: int, part: Part, stage: int) -> list[int]:
    second = part.second_format.bits if part.second_format is not None else 0
    return [
        projection,
        part.format.bits,
        second,
        part.ranks,
        part.ranks_at(stage),
        int(part.pivoted),
    ]


def _tensors(part: Part) -> list[PartTensors]:
    short = part.projection.name.rpartition(".")[2]
    rows = part.projection.shape[0] if part.pivoted else 0
    return [
        PartTensors(f"{short}{module}", shape, number_format, rows if module.startswith(".U") else 0)
        for module, (shape, number_format) in part.matrices().items()
    ]


class OwnMLP(GatedMLP):
    """The gate's activation is left to the last projection."""

    def gated(self, op: Any, gate: ir.Value, up: ir.Value) -> Any:
        """Return a note of it."""
        del op
        return Prepared(up, gate=gate, activation=self.activation)


class OwnEmbedding(Embedding):
    """Rows of the head's own tiles."""

    def __init__(self, config: DecoderConfig, *, number_format: NumberFormat) -> None:
        nn.Module.__init__(self, "embed_tokens")
        self.config, self.format = config, number_format
        size = tile_bytes(config.vocab_size, config.hidden_size, number_format.bits)
        self.tiles = nn.Parameter([size], ir.DataType.UINT8)

    def forward(self, op: Any, input_ids: ir.Value) -> ir.Value:
        """Look up ``input_ids: [1, S]``."""
        x: ir.Value = op.Embedding(
            input_ids,
            self.tiles,
            rows=self.config.vocab_size,
            columns=self.config.hidden_size,
            width=self.format.bits,
            scale=1.0,
            factor=float(self.config.embedding_scale),
            _domain=FLRC,
            _version=1,
        )
        return x


class OwnHead(nn.Module):
    """Hidden states to logits, of the positions from ``start`` on."""

    def __init__(self, config: DecoderConfig, number_format: NumberFormat) -> None:
        super().__init__("")
        vocab, hidden = config.vocab_size, config.hidden_size
        self.part = [0, number_format.bits, 0, 0, 0, 0]
        self.tensors = PartTensors("lm_head", (vocab, hidden), number_format)
        self.node = LinearNode("lm_head", [vocab], hidden, bias=False)

    def forward(self, op: Any, x: Any, start: ir.Value) -> ir.Value:
        """Return logits ``[1, S', vocab]``."""
        logits: ir.Value = self.node(op, x, self.part, self.tensors(op), start)[0]
        return logits


class OwnSteps(FusedSteps):
    """The mask itself: ``Attention`` reads its length."""

    def forward(
        self,
        op: Any,
        input_ids: ir.Value,
        where: Sequence[ir.Value],
        rotary: Sequence[tuple[ir.Value, ir.Value]],
    ) -> Any:
        """Return the mask, and the rotary caches of every layer."""
        del op, input_ids
        return where[0], [rotary[i] for i in self.rope_of_layer]


class OwnAttention(GroupQueryAttention):
    """Norms of queries and keys, rotation, the in-place cache and attention in one node."""

    takes_packed = False
    takes_norms = True
    cache: Cache = "float32"

    def forward(
        self, op: Any, qkv: Sequence[Any], cache: tuple[ir.Value, ir.Value], step: Any
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Attend.

        Args:
            op: The builder.
            qkv: Queries, keys and values ``[1, S, heads · hd]``, the first two perhaps with the note of a norm.
            cache: Past keys and values, bytes ``[1, kv, blocks, bytes of a block]``.
            step: What :class:`OwnSteps` made.

        Returns:
            Output ``[1, S, nh · hd]``, present keys, present values.
        """
        config, (mask, rotary) = self.config, step
        values = [x.x if isinstance(x, Prepared) else x for x in qkv]
        norms = [x.norm for x in qkv[:2] if isinstance(x, Prepared)]
        y, key, value = op.Attention(
            *values,
            *cache,
            mask,
            *rotary[self.layer],
            *norms,
            num_heads=config.num_heads,
            kv_num_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.attention_scale,
            window=config.layers[self.layer].window,
            softcap=0.0,
            epsilon=config.norm_eps,
            cache=self.cache,
            _outputs=3,
            _domain=FLRC,
            _version=1,
        )
        return y, key, value


class HalfAttention(OwnAttention):
    """A cache of float16."""

    cache = "float16"


class ByteAttention(OwnAttention):
    """A cache of int8, one scale a position of a head."""

    cache = "int8"


OWN = Form(
    norm=OwnNorm,
    attention=OwnAttention,
    mlp=OwnMLP,
    steps=OwnSteps,
    group=OwnGroup,
    embedding=OwnEmbedding,
)


FORMS = {a.cache: replace(OWN, attention=a) for a in (OwnAttention, HalfAttention, ByteAttention)}


def cache_block_bytes(head_dim: int, cache: Cache) -> int:
    """Return the bytes of a block of the cache: 16 positions of one head, and of int8 their scales."""
    return POSITIONS * (head_dim * CACHE_BYTES[cache] + (4 if cache == "int8" else 0))


def default_cache(dtype: str) -> Cache:
    """Return the numbers of keys and values beside projections of a number format, if not asked for others."""
    return "float32" if dtype == "fp32" else "float16"


def build_own_stage(
    config: DecoderConfig,
    groups: dict[str, GroupLayout],
    *,
    stage: int,
    formats: Formats,
    context: int,
    cache: Cache = "float32",
) -> ir.Model:
    """Build the graph of one stage; its parameters have no values yet.

    Returns:
        A model ``input_ids``, ``attention_mask``, ``logits_start``, ``past_key_values.N.key/value`` -> ``logits``,
        ``present.N.key/value``; the keys and values are bytes, a row 16 positions of a head. Logits are those of the
        positions from ``logits_start`` on.
    """
    graph = ir.Graph([], [], nodes=[], name=f"stage_{stage}", opset_imports={"": OPSET, FLRC: 1})
    builder = GraphBuilder(graph)
    integer, byte = ir.DataType.INT64, ir.DataType.UINT8
    width = cache_block_bytes(config.head_dim, cache)
    ids = builder.input("input_ids", integer, [1, "sequence_length"])
    mask = builder.input("attention_mask", integer, [1, "total_sequence_length"])
    start = builder.input(LOGITS_START, integer, [1])
    caches = [
        tuple(
            builder.input(f"past_key_values.{i}.{kind}", byte, [1, config.num_kv_heads, "past_blocks", width])
            for kind in ("key", "value")
        )
        for i in range(config.num_layers)
    ]
    decoder = Decoder(config, groups, stage=stage, formats=formats, context=context, form=FORMS[cache])
    hidden, present = decoder(builder.op, ids, [mask], caches)
    logits = OwnHead(config, formats.embedding)(builder.op, hidden, start)
    add_output(builder, logits, "logits", [1, "logits_length", config.vocab_size])
    for i, both in enumerate(present):
        for kind, value in zip(("key", "value"), both, strict=True):
            value.type = ir.TensorType(byte)
            value.shape = ir.Shape([1, config.num_kv_heads, "blocks", width])
            builder.add_output(value, f"present.{i}.{kind}")
    name_nodes(graph)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="flrc-edge")


def own_bytes_read(
    config: DecoderConfig, groups: dict[str, GroupLayout], *, stage: int, formats: Formats
) -> int:
    """Return the bytes of weights a decode step of a stage reads: one row of the embedding, no rotary caches."""
    bits, hidden, vocab = formats.embedding.bits, config.hidden_size, config.vocab_size
    parts = [part for group in groups.values() for plan in group.projections for part in parts_of(plan)]
    orders = sum(4 * p.projection.shape[0] for p in parts if p.pivoted and p.read_at(stage))
    vectors = sum(4 * shape[0] for shape in config.other_tensors().values() if len(shape) == 1)
    head = tile_bytes(vocab, hidden, bits)
    return sum(p.bytes_at(stage) for p in parts) + orders + vectors + head + head // vocab
