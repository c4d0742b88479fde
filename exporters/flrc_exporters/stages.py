"""One ONNX graph per stage, every weight a reference into the shared ``weights.bin``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from flrc_runtime.sessions import LOGITS_START

from .architectures import DecoderConfig
from .decoder import Decoder, make_head
from .layout import GroupLayout
from .number_format import Formats
from .weight_table import FILE_NAME, Stored

OPSET, IR_VERSION = 21, 10
FLRC = "flrc"  # the domain of our own operators
LAST = 2**63 - 1  # the end of any axis, for Slice
EVERY_POSITION = -(2**31)  # as a start: before any first position
_TYPES = {"float32": ir.DataType.FLOAT, "uint8": ir.DataType.UINT8, "int64": ir.DataType.INT64}


def stage_file(stage: int) -> str:
    """Return the name of a stage's graph file."""
    return f"stage_{stage}.onnx"


def build_stage(
    config: DecoderConfig,
    groups: dict[str, GroupLayout],
    *,
    stage: int,
    formats: Formats,
    context: int,
) -> ir.Model:
    """Build the graph of one stage; its parameters have no values yet.

    Returns:
        A model with the inputs and outputs of onnxruntime-genai: ``input_ids``, ``attention_mask``,
        ``past_key_values.N.key/value`` -> ``logits``, ``present.N.key/value``. Logits are those of every position,
        or of the last k if ``logits_start``, an initializer that may be overridden, is fed with -k.
    """
    graph = ir.Graph([], [], nodes=[], name=f"stage_{stage}", opset_imports={"": OPSET, "com.microsoft": 1})
    builder = GraphBuilder(graph)
    integer, real = ir.DataType.INT64, ir.DataType.FLOAT
    past: list[int | str] = [config.num_kv_heads, "past_sequence_length", config.head_dim]
    now: list[int | str] = [config.num_kv_heads, "total_sequence_length", config.head_dim]
    ids = builder.input("input_ids", integer, ["batch_size", "sequence_length"])
    mask = builder.input("attention_mask", integer, ["batch_size", "total_sequence_length"])
    start = builder.input(LOGITS_START, integer, [1])
    start.const_value = ir.tensor(np.array([EVERY_POSITION], np.int64), name=LOGITS_START)
    graph.initializers[LOGITS_START] = start  # which onnxruntime-genai does not feed
    caches = [
        (
            builder.input(f"past_key_values.{i}.key", real, ["batch_size", *past]),
            builder.input(f"past_key_values.{i}.value", real, ["batch_size", *past]),
        )
        for i in range(config.num_layers)
    ]
    decoder = Decoder(config, groups, stage=stage, formats=formats, context=context)
    head: nn.Module = make_head(config, formats.embedding)
    hidden, present = decoder(builder.op, ids, [mask], caches)
    # [B, S', H]: of a prompt, only the last position needs the head
    logits = head(builder.op, builder.op.Slice(hidden, start, [LAST], [1]))
    add_output(builder, logits, "logits", ["batch_size", "logits_length", config.vocab_size])
    for i, (key, value) in enumerate(present):
        add_output(builder, key, f"present.{i}.key", ["batch_size", *now])
        add_output(builder, value, f"present.{i}.value", ["batch_size", *now])
    name_nodes(graph)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="flrc-edge")


def attach_weights(model: ir.Model, table: Mapping[str, Stored], folder: Path) -> list[Stored]:
    """Point every parameter into ``weights.bin``.

    Returns:
        The tensors the graph reads, aliases as they are named.

    Raises:
        ValueError: A parameter is not in the table, or with another shape (an error of this package).
    """
    used = []
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue  # a small constant, inline
        stored = table.get(name)
        if stored is None or value.shape is None or tuple(value.shape) != stored.shape:
            raise ValueError(f"{name}: shape {value.shape} in the graph, {stored} in {FILE_NAME}")
        value.const_value = ir.ExternalTensor(
            FILE_NAME,
            stored.offset,
            stored.length,
            _TYPES[stored.dtype],
            shape=ir.Shape(stored.shape),
            name=name,
            base_dir=folder,
        )
        used.append(stored)
    _say_units(model, table)
    return used


def _say_units(model: ir.Model, table: Mapping[str, Stored]) -> None:
    """Say in the nodes of our own operators what the scale bytes of their tiles are multiples of."""
    for node in model.graph:
        if node.domain == FLRC:
            names = [value.name or "" for value in node.inputs if value is not None]
            units = [table[name].unit for name in names if name.endswith(".tiles")]
            if node.op_type == "Linear":
                node.attributes["scales"] = ir.AttrFloat32s("scales", units)
            elif node.op_type == "Embedding":
                node.attributes["scale"] = ir.AttrFloat32("scale", units[0])


def save_stage(model: ir.Model, path: Path) -> None:
    """Write the graph and run onnx.checker on it.

    Raises:
        onnx.checker.ValidationError: The graph is not valid (an error of this package).
    """
    import onnx

    ir.save(model, path)
    onnx.checker.check_model(str(path))


def add_output(builder: GraphBuilder, value: ir.Value, name: str, shape: list[int | str]) -> None:
    """Make a float32 value an output of the graph."""
    value.type = ir.TensorType(ir.DataType.FLOAT)
    value.shape = ir.Shape(shape)
    builder.add_output(value, name)


def name_nodes(graph: ir.Graph) -> None:
    """Name nodes by their place in the module tree: ``/model/layers.3/mlp/down_proj/V/MatMul``."""
    counts: dict[str, int] = {}
    outputs = set(graph.outputs)
    for node in graph:
        scope = (node.name or "").rpartition("/")[0]
        name = f"/{scope}/{node.op_type}" if scope else f"/{node.op_type}"
        counts[name] = counts.get(name, 0) + 1
        if counts[name] > 1:
            name = f"{name}_{counts[name] - 1}"
        node.name = name
        node.metadata_props.clear()
        for i, output in enumerate(node.outputs):
            if output not in outputs:
                # an unused optional output is left out: kernels then skip it; ours have none
                used = output.uses() or len(node.outputs) == 1 or node.domain == FLRC
                output.name = f"{name}/output_{i}" if used else ""
