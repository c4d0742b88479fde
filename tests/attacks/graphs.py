"""Changes of a stage graph that make it hostile, with words of the refusal: for Python and for the Java engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from flrc_runtime import manifest

Attack = Callable[[onnx.ModelProto], None]


def with_node(kind: str, domain: str = "", **attributes: object) -> Attack:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node.append(
            helper.make_node(kind, ["input_ids"], ["stolen"], domain=domain, **attributes)
        )

    return change


def inner_graph() -> onnx.GraphProto:
    value = helper.make_tensor_value_info("y", TensorProto.INT64, None)
    return helper.make_graph([helper.make_node("Shape", ["input_ids"], ["y"])], "inner", [], [value])


def external(**entries: str) -> Attack:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        del tensor.external_data[:]
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)

    return change


def twice(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.external_data)
    tensor.external_data.add(key="location", value="weights.bin")


def sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add()


def function(model: onnx.ModelProto) -> None:
    model.functions.append(helper.make_function("", "MatMul", ["a"], ["b"], [], []))


def hidden_tensor(model: onnx.ModelProto) -> None:
    tensor = helper.make_tensor("t", TensorProto.INT64, [1], [1])
    tensor.ClearField("int64_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    model.graph.node[0].attribute.append(helper.make_attribute("value", tensor))


ATTACKS: dict[str, tuple[Attack, str]] = {
    "a custom operator": (with_node("Steal", "evil.example"), "evil.example.Steal is not known"),
    "an operator that runs Python": (with_node("PyOp", "com.microsoft"), "PyOp is not known"),
    "an operator that is not needed": (with_node("ImageDecoder"), "ImageDecoder is not known"),
    "a loop": (with_node("Loop", body=inner_graph()), "holds a graph"),
    "a branch": (with_node("If", then_branch=inner_graph(), else_branch=inner_graph()), "holds a graph"),
    "a graph in a known operator": (with_node("Shape", body=inner_graph()), "holds a graph"),
    "a function": (function, "holds functions"),
    "sparse weights": (sparse, "sparse weights"),
    "weights above the folder": (external(location="../secret", offset="0", length="8"), "'../secret'"),
    "weights of the system": (external(location="/etc/passwd"), "'/etc/passwd'"),
    "weights of another file": (external(location="tokenizer.json"), "does not list for them"),
    "weights in no file": (external(offset="0"), "''"),
    "weights behind the end": (
        external(location="weights.bin", offset="1", length="99999999999"),
        "weights end at",
    ),
    "weights before the beginning": (external(location="weights.bin", offset="-8"), "is no place in a file"),
    "a place that is no number": (external(location="weights.bin", offset="8 "), "is no place in a file"),
    "a place that is said twice": (twice, "said twice"),
    "weights hidden in an operator": (hidden_tensor, "'../secret'"),
}


def apply(attack: Attack, folder: Path, stage: int = 1) -> None:
    """Change one graph of a bundle and let the manifest agree with it."""
    content = manifest.parse(folder)
    graph = folder / content.stages[stage].graph
    model = onnx.load(graph, load_external_data=False)
    attack(model)
    graph.write_bytes(model.SerializeToString())
    manifest.seal(folder, content)
