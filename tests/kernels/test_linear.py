"""The operator flrc.Linear in onnxruntime: sums of parts, any number of threads, and refusals of what does not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from flrc_exporters.tiles import pack_tiles, scale_bytes, scale_values


@dataclass
class Part:
    """A plane of a projection (``v``), or a pair ``u v`` of which ``read`` ranks are read, perhaps pivoted."""

    projection: int
    v: tuple[Any, Any, float, int]  # integers, scale bytes, unit, width
    u: tuple[Any, Any, float, int] | None = None
    read: int = 0
    order: Any = None  # of a pivoted pair: which outputs V x and U V x are


@dataclass
class Node:
    """A graph of one Linear, and what may be wrong with it."""

    inputs: int
    rows: list[int]
    parts: list[Part]
    change: dict[str, Any] = field(default_factory=dict)  # attributes to replace
    spoil: Any = None  # of the tensors' bytes

    def write(self, folder: Path) -> Path:
        """Write the model with its tiles in a file beside it, at multiples of 64 bytes."""
        numbers, scales, tensors, data = [], [], [], bytearray()
        for part in self.parts:
            planes = [part.v] if part.u is None else [part.v, part.u]
            stored = 0 if part.u is None else part.v[0].shape[0]
            widths = planes[0][3], 0 if part.u is None else planes[1][3]
            numbers += [part.projection, *widths, stored, part.read, int(part.order is not None)]
            contents = []
            for integers, codes, unit, width in planes:
                padded = np.pad(integers, ((0, 0), (0, -integers.shape[1] % 32)))
                contents.append(pack_tiles(padded, codes, width).tobytes())
                scales.append(unit)
            if part.order is not None:
                contents.append(np.asarray(part.order, "<i4").tobytes())
            for content in contents:
                content = content if self.spoil is None else self.spoil(content)
                tensor = TensorProto(
                    name=f"tiles_{len(tensors)}", data_type=TensorProto.UINT8, dims=[len(content)]
                )
                tensor.data_location = TensorProto.EXTERNAL
                place = {"location": "tiles.bin", "offset": len(data), "length": len(content)}
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=str(value))
                tensors.append(tensor)
                data += content + bytes(-len(content) % 4096)
        attributes: dict[str, Any] = {
            "columns": self.inputs,
            "rows": self.rows,
            "parts": numbers,
            "scales": scales,
        }
        attributes |= self.change
        outputs = [f"y{i}" for i in range(len(self.rows))]
        node = helper.make_node(
            "Linear", ["x", *[""] * 6, *(t.name for t in tensors)], outputs, domain="flrc", **attributes
        )
        graph = helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", None])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            tensors,
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("flrc", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        folder.mkdir(exist_ok=True)
        (folder / "tiles.bin").write_bytes(data)
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return folder / "model.onnx"


def session(kernels: Any, path: Path, *, threads: int = 1) -> Any:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(kernels.library._name)
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def plane(rows: int, inputs: int, width: int, seed: int) -> tuple[Any, Any, float, int]:
    rng = np.random.default_rng(seed)
    zero = 1 << (width - 1)
    integers = rng.integers(-zero, zero, (rows, inputs)).astype(np.int8)
    scales = rng.uniform(0.5, 2, (rows, -(-inputs // 32))).astype(np.float32) / zero / inputs**0.5
    return integers, *scale_bytes(scales), width


def dense(one: tuple[Any, Any, float, int]) -> Any:
    """Return the floats that a plane stands for."""
    integers, codes, unit, _ = one
    return integers * np.repeat(scale_values(codes, unit), 32, axis=1)[:, : integers.shape[1]]


def rounded(x: Any) -> Any:
    """Return x as int8 in blocks of 32 stand for it."""
    fill = -x.shape[1] % 32
    blocks = np.pad(x, ((0, 0), (0, fill))).reshape(len(x), -1, 32)
    most = np.abs(blocks).max(2, keepdims=True)
    q = np.rint(np.divide(blocks * 127, most, out=np.zeros_like(blocks), where=most > 0))
    return (q * most / 127).reshape(len(x), -1)[:, : x.shape[1]]


def reference(node: Node, x: Any) -> list[Any]:
    """Return each projection in floats, of the same integers."""
    outputs = [np.zeros((len(x), rows)) for rows in node.rows]
    for part in node.parts:
        if part.u is None:
            outputs[part.projection] += rounded(x) @ dense(part.v).T.astype(np.float64)
        else:
            inner = (rounded(x) @ dense(part.v).T)[:, : part.read].astype(np.float32)
            product = rounded(inner) @ dense(part.u)[:, : part.read].T.astype(np.float64)
            if part.order is None:
                outputs[part.projection] += product
            else:
                outputs[part.projection][:, part.order] += np.concatenate([inner, product], axis=1)
    return outputs


GROUP = Node(
    96,
    [64, 40, 16],
    [
        Part(0, plane(64, 96, 4, 1)),
        Part(0, plane(64, 96, 2, 2)),  # what the first plane left
        Part(0, plane(96, 96, 8, 3), plane(64, 96, 6, 4), read=64),
        Part(1, plane(64, 96, 5, 5), plane(40, 64, 4, 6), read=32),
        Part(1, plane(40, 96, 3, 7), plane(40, 40, 8, 8), read=40),
        Part(2, plane(16, 96, 3, 9)),
    ],
)


def shuffled(rows: int, seed: int) -> Any:
    return np.random.default_rng(seed).permutation(rows)


PIVOTED = Node(
    96,
    [64, 56, 40],
    [
        Part(0, plane(24, 96, 6, 1), plane(40, 24, 4, 2), read=24, order=shuffled(64, 1)),
        Part(0, plane(32, 96, 4, 3), plane(32, 32, 8, 4), read=32, order=shuffled(64, 2)),
        Part(1, plane(56, 96, 2, 5)),
        Part(1, plane(40, 96, 4, 6), plane(16, 40, 5, 7), read=40, order=shuffled(56, 3)),
        Part(2, plane(64, 96, 4, 8), plane(40, 64, 4, 9), read=32),
    ],
)
ODD = Node(
    86, [24], [Part(0, plane(24, 86, 4, 1)), Part(0, plane(32, 86, 4, 2), plane(24, 32, 4, 3), read=32)]
)


@pytest.mark.parametrize("node", [GROUP, PIVOTED, ODD], ids=["group", "pivoted", "odd"])
def test_sums_of_parts(kernels: Any, tmp_path: Path, node: Node) -> None:
    path = node.write(tmp_path / "node")
    x = np.random.default_rng(0).standard_normal((7, node.inputs)).astype(np.float32)
    found = session(kernels, path).run(None, {"x": x})
    for y, wanted in zip(found, reference(node, x), strict=True):
        assert y.shape == wanted.shape
        assert (
            np.abs(y - wanted).max() < 2e-2 * np.abs(wanted).max()
        )  # ranks are rounded from other last bits
        assert np.linalg.norm(y - wanted) < 2e-3 * np.linalg.norm(wanted)


def test_any_number_of_threads_and_any_cut_of_the_prompt_give_the_same_bytes(
    kernels: Any, tmp_path: Path
) -> None:
    node = Node(576, [1536, 1536, 576], [
        Part(0, plane(1536, 576, 4, 1)),
        Part(1, plane(288, 576, 4, 2), plane(1536, 288, 4, 3), read=256),
        Part(2, plane(192, 576, 4, 4), plane(384, 192, 4, 5), read=192, order=shuffled(576, 1)),
        Part(2, plane(64, 576, 3, 6), plane(512, 64, 4, 7), read=64, order=shuffled(576, 2)),
    ])  # fmt: skip
    path = node.write(tmp_path / "node")
    x = np.random.default_rng(0).standard_normal((13, 576)).astype(np.float32)
    whole = session(kernels, path).run(None, {"x": x})
    for threads in (2, 3, 4):
        many = session(kernels, path, threads=threads)
        assert [y.tobytes() for y in many.run(None, {"x": x})] == [y.tobytes() for y in whole]
        for cut in (1, 4, 12):
            parts = [many.run(None, {"x": part}) for part in (x[:cut], x[cut:])]
            for i, y in enumerate(whole):
                assert np.concatenate([part[i] for part in parts]).tobytes() == y.tobytes()
    empty = session(kernels, path).run(None, {"x": x[:0]})
    assert [y.shape for y in empty] == [(0, 1536), (0, 1536), (0, 576)]


def one(**change: Any) -> Node:
    return Node(64, [32], [Part(0, plane(32, 64, 4, 1))], change)


def pair(**change: Any) -> Node:
    return Node(64, [32], [Part(0, plane(64, 64, 4, 1), plane(32, 64, 4, 2), read=32)], change)


def turned(order: Any) -> Node:
    """Return a pivoted pair with an order of its own."""
    parts = [Part(0, plane(16, 64, 4, 1), plane(16, 16, 4, 2), read=16, order=list(order))]
    return Node(64, [32], parts)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (one(columns=0), "columns must be 1"),
        (one(columns=-(2**40)), "columns must be 1"),
        (one(columns=4096), "does not have the size"),
        (one(rows=[31, 1]), "rows must name every output"),
        (one(rows=[0]), "rows must be 1"),
        (one(rows=[2**40]), "rows must be 1"),
        (one(rows=[48]), "does not have the size"),
        (one(parts=[0, 4, 0, 0, 0]), "six numbers"),
        (one(parts=[0, 7, 0, 0, 0, 0]), "width must be"),
        (one(parts=[0, 5, 0, 0, 0, 0]), "does not have the size"),
        (one(parts=[1, 4, 0, 0, 0, 0]), "order of their projections"),
        (one(parts=[-1, 4, 0, 0, 0, 0]), "order of their projections"),
        (one(parts=[0, 4, 0, 32, 0, 0]), "ranks must be"),
        (one(parts=[0, 4, 0, 0, 0, 0] * 2), "fewer scales"),
        (one(scales=[1.0, 1.0]), "more planes"),
        (one(scales=[float("nan")]), "scales must be positive"),
        (one(scales=[-1.0]), "scales must be positive"),
        (pair(parts=[0, 4, 4, 64, 33, 0]), "ranks must be"),
        (pair(parts=[0, 4, 4, 64, 96, 0]), "ranks must be"),
        (pair(parts=[0, 4, 4, 0, 0, 0]), "ranks must be"),
        (pair(parts=[0, 4, 4, 2**40, 32, 0]), "ranks must be"),
        (pair(parts=[0, 4, 9, 64, 32, 0]), "width must be"),
        (pair(parts=[0, 4, 4, 96, 32, 0]), "does not have the size"),
        (pair(parts=[0, 4, 4, 64, 64, 1]), "less ranks than rows"),
        (pair(parts=[0, 4, 4, 64, 32, 1]), "less ranks than rows"),
        (one(parts=[0, 4, 0, 0, 0, 1]), "less ranks than rows"),
        (one(parts=[0, 4, 0, 0, 0, 2]), "less ranks than rows"),
        (turned([0] * 32), "every output once"),
        (turned([*range(31), 32]), "every output once"),
        (turned([*range(31), -1]), "every output once"),
        (turned(range(31)), "does not have the size"),
        (Node(64, [32, 16], [Part(0, plane(32, 64, 4, 1))]), "has no part"),
        (
            Node(64, [32], [Part(0, plane(32, 64, 4, 1), plane(32, 32, 4, 2), read=32), Part(0, plane(32, 64, 4, 3))]),
            "planes must come before",
        ),
        (Node(64, [32], [Part(0, plane(32, 64, 4, 1))], spoil=lambda tiles: tiles[:-64]), "does not have the size"),
    ],
)  # fmt: skip
def test_attributes_and_shapes_that_do_not_fit(
    kernels: Any, tmp_path: Path, node: Node, message: str
) -> None:
    path = node.write(tmp_path / "node")
    with pytest.raises(Exception, match=message):
        session(kernels, path)


def test_inputs_that_do_not_fit(kernels: Any, tmp_path: Path) -> None:
    opened = session(kernels, one().write(tmp_path / "node"))
    with pytest.raises(Exception, match="columns"):
        opened.run(None, {"x": np.zeros((2, 63), np.float32)})
    for value in (np.nan, np.inf):
        x = np.zeros((3, 64), np.float32)
        x[2, 63] = value
        with pytest.raises(Exception, match="not finite"):
            opened.run(None, {"x": x})
    assert np.array_equal(
        opened.run(None, {"x": np.zeros((1, 64), np.float32)})[0], np.zeros((1, 32), np.float32)
    )


def test_tiles_that_are_no_constant(kernels: Any, tmp_path: Path) -> None:
    path = one().write(tmp_path / "node")
    model = onnx.load(path, load_external_data=False)
    tensor = model.graph.initializer.pop()
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.UINT8, ["bytes"]))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(Exception, match="must be constants"):
        session(kernels, path)
