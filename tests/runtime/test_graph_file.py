"""Graphs that hold what export does not write are refused before onnxruntime sees them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import flrc_runtime
from flrc_runtime import manifest
from flrc_runtime.errors import FormatError
from flrc_runtime.graph_file import OPERATORS, check_graph_file

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


@pytest.fixture
def attacked(stories_bundle: Path, tmp_path: Path) -> Callable[[Attack], Path]:
    def make(attack: Attack) -> Path:
        folder = tmp_path / "bundle"
        shutil.copytree(stories_bundle, folder)
        graph = folder / "stage_1.onnx"
        model = onnx.load(graph, load_external_data=False)
        attack(model)
        graph.write_bytes(model.SerializeToString())
        manifest.seal(folder, manifest.parse(folder))  # sizes and hashes agree
        return folder

    return make


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(attacked: Callable[[Attack], Path], name: str) -> None:
    attack, message = ATTACKS[name]
    folder = attacked(attack)
    with pytest.raises(FormatError, match=r"stage_1\.onnx is not a graph that export writes") as caught:
        manifest.verify(folder)
    assert message in str(caught.value)
    for pack in (True, False):
        with pytest.raises(FormatError, match=r"stage_1\.onnx is not a graph that export writes"):
            flrc_runtime.load(folder, context=32, pack=pack).decoder().step(1, 1)


def test_a_graph_that_is_left_alone(attacked: Callable[[Attack], Path]) -> None:
    folder = attacked(lambda model: None)
    manifest.verify(folder)
    flrc_runtime.load(folder, context=32).decoder().step(1, 1)


def test_no_graph_and_two(tmp_path: Path, stories_bundle: Path) -> None:
    one = (stories_bundle / "stage_0.onnx").read_bytes()
    sizes = {"weights.bin": (stories_bundle / "weights.bin").stat().st_size}
    for content in (b"", one + one):  # protobuf would merge them
        (tmp_path / "x.onnx").write_bytes(content)
        with pytest.raises(FormatError, match=r"it holds [02] graphs"):
            check_graph_file(tmp_path / "x.onnx", sizes)


def test_every_operator_is_one_of_onnxruntime() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert OPERATORS[""] - {"SimplifiedLayerNormalization"} <= known
