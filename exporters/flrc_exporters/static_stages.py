"""Graphs of fixed shape: for every stage one that decodes a token, and one that takes a piece of the prompt."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import GraphBuilder

from flrc_runtime.window_decoder import BIAS, LAST, LOCAL_BIAS, LOCAL_WINDOW

from .architectures import DecoderConfig
from .decoder import Decoder, make_head
from .layout import GroupLayout
from .number_format import Formats
from .stages import add_output, name_nodes
from .static_form import STATIC

OPSET, IR_VERSION = 23, 11  # the first with RMSNormalization


def build_static_stage(
    config: DecoderConfig,
    groups: dict[str, GroupLayout],
    *,
    stage: int,
    formats: Formats,
    window: int,
    count: int,
) -> ir.Model:
    """Build a graph of one stage; its parameters have no values yet.

    Args:
        config: The architecture.
        groups: Layout of every input group.
        stage: The stage.
        formats: Number formats.
        window: Past positions W that the graph sees.
        count: New tokens S.

    Returns:
        A model ``input_ids``, ``position_ids`` ``[1, S]`` int32, ``attention_bias`` ``[1, 1, S, W + S]``,
        ``past_key_values.N.key`` ``[1, kv, hd, W]`` and ``.value`` ``[1, kv, W, hd]`` -> ``logits`` ``[1, 1, vocab]``,
        ``present.N.key`` ``[1, kv, hd, S]`` and ``.value`` ``[1, kv, S, hd]``: those of the new tokens alone. With S
        above 1, ``last`` ``[1]`` int32 is the place in S whose logits are wanted. Layers that see only the last
        positions have a bias of their own, ``local_attention_bias``.
    """
    graph = ir.Graph(
        [], [], nodes=[], name=f"stage_{stage}_{count}", opset_imports={"": OPSET, "com.microsoft": 1}
    )
    builder = GraphBuilder(graph)
    integer, real = ir.DataType.INT32, ir.DataType.FLOAT
    kv, size = config.num_kv_heads, config.head_dim
    ids = builder.input("input_ids", integer, [1, count])
    where = [builder.input("position_ids", integer, [1, count])]
    for name, used in (
        (BIAS, any(not layer.window for layer in config.layers)),
        (LOCAL_BIAS, any(layer.window for layer in config.layers)),
    ):
        if used:
            where.append(builder.input(name, real, [1, 1, count, window + count]))
    last = builder.input(LAST, integer, [1]) if count > 1 else None
    caches = [
        (
            builder.input(f"past_key_values.{i}.key", real, [1, kv, size, window]),
            builder.input(f"past_key_values.{i}.value", real, [1, kv, window, size]),
        )
        for i in range(config.num_layers)
    ]
    decoder = Decoder(config, groups, stage=stage, formats=formats, context=window, form=STATIC)
    head = make_head(config, formats.embedding, STATIC)
    hidden, present = decoder(builder.op, ids, where, caches)
    if last is not None:
        hidden = builder.op.Gather(hidden, last, axis=1)
    add_output(builder, head(builder.op, hidden), "logits", [1, 1, config.vocab_size])
    for i, (key, value) in enumerate(present):
        add_output(builder, key, f"present.{i}.key", [1, kv, size, count])
        add_output(builder, value, f"present.{i}.value", [1, kv, count, size])
    name_nodes(graph)
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="flrc-edge")
    local = {layer.window for layer in config.layers if layer.window}
    if local:
        (size,) = local
        model.metadata_props[LOCAL_WINDOW] = str(size)
    return model
