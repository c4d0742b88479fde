"""Checkpoint in, portable folder out: optimum's graph of the dense model with its products put in low rank.

For models that the capability table lacks. Graphs have optimum's inputs and outputs, so each stage loads in
``ORTModelForCausalLM``; all of them read one ``weights.bin``.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from flrc_runtime import manifest as manifests
from flrc_runtime.errors import FormatError, UnsupportedModelError
from flrc_runtime.manifest import Manifest, ProjectionPlan, RankPlan, StageInfo
from flrc_runtime.model_card import write_card
from flrc_runtime.output_folder import check_output_folder, published_folder

from .layout import GroupLayout, single_layout
from .lowrank import LinearGroup
from .number_format import AccuracyLevel, Dtype, NumberFormat, rounded_plan
from .optimum_graph import export_dense, optimum_python
from .refit import RefittedTensors
from .source import CheckpointTensors
from .stages import IR_VERSION, attach_weights, save_stage, stage_file
from .versions import export_versions
from .weight_table import FILE_NAME, group_recipes
from .weights import WeightFile

_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_SMALL = 1024  # bytes up to which a constant stays in the graph file
_TYPES = (ir.DataType.FLOAT, ir.DataType.INT64)  # that weights.bin holds
Progress = Callable[[str, int, int], None]


def export_portable(
    checkpoint: Path,
    output: Path,
    *,
    optimum: str | None = None,
    dtype: Dtype = "fp32",
    accuracy_level: AccuracyLevel = 4,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Write a portable folder.

    Args:
        checkpoint: What ``compress`` wrote, with float factors.
        output: The folder; published by one rename, or left as it was.
        optimum: Python of an environment with optimum-onnx, or None for what ``FLRC_EDGE_OPTIMUM`` names.
        dtype: Number format of the projections, integers rounded to nearest; embedding and head stay fp32.
        accuracy_level: 4: integer kernels round activations to int8; 0 or 1: they do not.
        overwrite: Replace an earlier folder.
        progress: Called with what is being done, steps done and steps in all.

    Returns:
        The manifest as written.

    Raises:
        FlrcError: There is no optimum-onnx, or it cannot export the model.
        UnsupportedModelError: The checkpoint holds integers, or the graph lacks a projection.
        VerificationError: The checkpoint is damaged.
    """
    check_output_folder(output, overwrite=overwrite)
    python = optimum_python(optimum)
    written = manifests.verify(checkpoint, "checkpoint")
    if written.plan.embedding:
        raise UnsupportedModelError(
            f"{checkpoint.name} holds integers, which --graph optimum does not take",
            hint="compress with --dtype float, and give --dtype to export",
        )
    plan = rounded_plan(written.plan, NumberFormat.named(dtype), embedding="fp32")
    source = RefittedTensors(checkpoint, plan)
    report = progress or _silent
    layouts = {p.name: single_layout(p, plan.num_stages) for p in plan.projections}
    with (
        tempfile.TemporaryDirectory(prefix="flrc-edge-") as scratch,
        published_folder(output, overwrite=overwrite) as folder,
    ):
        dense = Path(scratch) / "dense"
        _write_dense(checkpoint, CheckpointTensors(checkpoint), written.plan, dense)
        report("dense graph", 0, 1)
        graph = export_dense(python, dense, Path(scratch) / "onnx")
        report("dense graph", 1, 1)
        shutil.rmtree(dense)
        weights = WeightFile(folder / FILE_NAME)
        wanted = [
            r for name, layout in layouts.items() for r in group_recipes(name, layout, {}, accuracy_level)
        ]
        weights.write(source, wanted, progress=lambda done, all_: report("weights", done, all_))
        stages = []
        for stage in range(plan.num_stages):
            model = ir.load(graph)
            _factorize(model, layouts, stage, accuracy_level)
            _share_head(model)
            _move_constants(model, weights)
            used = attach_weights(model, weights.table, folder)
            save_stage(model, folder / stage_file(stage))
            size = sum(stored.length for stored in used)
            stages.append(StageInfo(stage_file(stage), round(plan.kept(stage), 6), size))
            report("stages", stage + 1, plan.num_stages)
        _copy_files(checkpoint, folder)
        content = replace(
            written,
            kind="portable",
            dtype=dtype,
            plan=plan,
            stages=tuple(stages),
            versions=export_versions(written),
        )
        write_card(folder, content)
        return manifests.seal(folder, content)


def _write_dense(checkpoint: Path, source: CheckpointTensors, plan: RankPlan, folder: Path) -> None:
    """Write the model of stage 0 as Hugging Face stores it."""
    from safetensors.numpy import save_file

    folder.mkdir()
    factored = {p.name for p in plan.projections if not p.dense}
    tensors = {name: source.read(name) for name in source.names() if not _is_factor(name, factored)}
    for p in plan.projections:
        if not p.dense:
            tensors[f"{p.name}.weight"] = _dense_weight(source, p)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _copy_files(checkpoint, folder)


def _copy_files(checkpoint: Path, folder: Path) -> None:
    for name in _COPIED:
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, folder / name)


def _is_factor(name: str, factored: set[str]) -> bool:
    return name.partition(".chunks.")[0] in factored and ".chunks." in name


def _dense_weight(source: CheckpointTensors, plan: ProjectionPlan) -> np.ndarray[Any, np.dtype[np.float32]]:
    total = np.zeros(plan.shape, np.float32)
    for i in range(len(plan.chunks())):
        v, u = source.read(f"{plan.name}.chunks.{i}.V"), source.read(f"{plan.name}.chunks.{i}.U")
        if plan.storage == "pivoted":
            total += np.concatenate([v, u @ v])[source.permutation(f"{plan.name}.chunks.{i}.order")]
        else:
            total += u @ v
    return total


class _Module(nn.Module):
    """Gives the products of one projection their names."""

    def __init__(self, layout: GroupLayout, stage: int, accuracy_level: AccuracyLevel) -> None:
        super().__init__(layout.name.rpartition(".")[0])
        self.group = LinearGroup(layout, stage, accuracy_level=accuracy_level)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Apply the projection: ``[batch, sequence, in] -> [batch, sequence, out]``."""
        (y,) = self.group(op, x)
        return y  # type: ignore[no-any-return]


def _factorize(
    model: ir.Model, layouts: Mapping[str, GroupLayout], stage: int, accuracy_level: AccuracyLevel
) -> None:
    """Replace the product of every projection by those of its chunks.

    Raises:
        UnsupportedModelError: The graph has no such product.
    """
    graph = model.graph
    nodes = {node.name: node for node in graph}
    graph.opset_imports["com.microsoft"] = 1
    model.ir_version = IR_VERSION
    builder = GraphBuilder(graph)
    for name, layout in layouts.items():
        node = nodes.get(f"{_scope(name)}/MatMul")
        if node is None or node.inputs[0] is None:
            raise UnsupportedModelError(f"optimum's graph has no product for {name}")
        weight = node.inputs[1]
        y = _Module(layout, stage, accuracy_level)(builder.op, node.inputs[0])
        ir.convenience.replace_all_uses_with(node.outputs[0], y)
        graph.remove(node, safe=True)
        _drop_unused(graph, weight)
    graph.sort()


def _scope(name: str) -> str:
    """``model.layers.0.mlp.up_proj`` -> ``/model/layers.0/mlp/up_proj``, as torch names nodes."""
    return "/" + re.sub(r"\.(?!\d)", "/", name)


def _share_head(model: ir.Model) -> None:
    """Let a head that holds the embedding a second time, transposed, read the embedding itself."""
    graph = model.graph
    embedding = graph.initializers.get("model.embed_tokens.weight")
    node = next((n for n in graph if n.name == "/lm_head/MatMul"), None)
    if node is None or embedding is None or embedding.const_value is None:
        return
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or weight.const_value is None:
        return
    table = embedding.const_value.numpy()
    if weight.const_value.shape != table.shape[::-1] or not np.array_equal(
        weight.const_value.numpy(), table.T
    ):
        return
    op = GraphBuilder(graph).op
    vocab, hidden = table.shape
    rows = op.Reshape(x, op.Constant(value_ints=[-1, hidden]))
    logits = op.Gemm(rows, embedding, transB=1)  # a Transpose would be folded into a copy of the table
    shape = op.Concat(op.Shape(x, start=0, end=2), op.Constant(value_ints=[vocab]), axis=0)
    output = node.outputs[0]
    y = op.Reshape(logits, shape)
    y.type, y.shape = output.type, output.shape
    if output.is_graph_output():
        graph.outputs[list(graph.outputs).index(output)] = y
        name, output.name = output.name, f"{output.name}_before"
        y.name = name
    ir.convenience.replace_all_uses_with(output, y)
    graph.remove(node, safe=True)
    _drop_unused(graph, weight)
    graph.sort()


def _drop_unused(graph: ir.Graph, weight: ir.Value | None) -> None:
    if weight is not None and weight.name and weight.name in graph.initializers and not weight.uses():
        del graph.initializers[weight.name]


def _move_constants(model: ir.Model, weights: WeightFile) -> None:
    """Put what is large and not yet in ``weights.bin`` there, once for all stages."""
    for name, value in model.graph.initializers.items():
        constant = value.const_value
        if constant is None or constant.nbytes <= _SMALL:
            continue
        if constant.dtype not in _TYPES:
            raise FormatError(f"optimum's graph holds {name} as {constant.dtype}, not as floats")
        stored = weights.table.get(name) or weights.append(name, constant.numpy())
        value.shape = ir.Shape(stored.shape)
        value.const_value = None


def _silent(what: str, done: int, total: int) -> None: ...
