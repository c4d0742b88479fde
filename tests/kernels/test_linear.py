"""The operator flrc.Linear in onnxruntime: sums of parts, any number of threads, and refusals of what does not fit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from flrc_exporters.tiles import pack_tiles, scale_bytes, scale_values


def float_tiles(weights: Any) -> bytes:
    """Lay out ``[rows, inputs]`` floats: groups of 16 rows, a line of 16 rows an input, both filled up."""
    rows, inputs = weights.shape
    filled = np.pad(weights.astype("<f4"), ((0, -rows % 16), (0, -inputs % 32)))
    return bytes(filled.reshape(len(filled) // 16, 16, -1).transpose(0, 2, 1).tobytes())


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
    constants: dict[str, Any] = field(default_factory=dict)  # post_norm, norm, bias: float arrays
    inputs_too: tuple[str, ...] = ()  # of residual, gate, start

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
                scales.append(unit)
                if width == 32:
                    contents.append(float_tiles(integers))
                    continue
                padded = np.pad(integers, ((0, 0), (0, -integers.shape[1] % 32)))
                contents.append(pack_tiles(padded, codes, width).tobytes())
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
        outputs += ["sum"] if "residual" in self.inputs_too else []
        there = {"x", *self.constants, *self.inputs_too}
        order = [
            name if name in there else ""
            for name in ("x", "residual", "gate", "post_norm", "norm", "bias", "start")
        ]
        node = helper.make_node(
            "Linear", [*order, *(t.name for t in tensors)], outputs, domain="flrc", **attributes
        )
        given = ["x", *self.inputs_too]
        tensors += [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(
            [node],
            "one",
            [
                helper.make_tensor_value_info(
                    name, TensorProto.INT64 if name == "start" else TensorProto.FLOAT, None
                )
                for name in given
            ],
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
    integers, codes, unit, width = one
    if width == 32:
        return integers
    return integers * np.repeat(scale_values(codes, unit), 32, axis=1)[:, : integers.shape[1]]


def fma(a: Any, b: Any, c: Any) -> Any:
    return (a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)).astype(np.float32)


def rounded(x: Any) -> Any:
    """Return x as int8 in blocks of 32 stand for it."""
    fill = -x.shape[1] % 32
    blocks = np.pad(x, ((0, 0), (0, fill))).reshape(len(x), -1, 32)
    most = np.abs(blocks).max(2, keepdims=True)
    q = np.rint(np.divide(blocks * 127, most, out=np.zeros_like(blocks), where=most > 0))
    return (q * most / 127).reshape(len(x), -1)[:, : x.shape[1]]


def float_plane(rows: int, inputs: int, seed: int) -> tuple[Any, Any, float, int]:
    weights = np.random.default_rng(seed).standard_normal((rows, inputs)).astype(np.float32) / inputs**0.5
    return weights, None, 1.0, 32


def reference(node: Node, x: Any) -> list[Any]:
    """Return each projection in floats, of the same integers; x is what is multiplied."""
    bias = node.constants.get("bias", np.zeros(sum(node.rows)))
    outputs = [
        np.tile(own, (len(x), 1)) for own in np.split(bias.astype(np.float64), np.cumsum(node.rows)[:-1])
    ]
    for part in node.parts:
        given = x if part.v[3] == 32 else rounded(x)
        if part.u is None:
            outputs[part.projection] += given @ dense(part.v).T.astype(np.float64)
        else:
            inner = (given @ dense(part.v).T)[:, : part.read].astype(np.float32)
            second = inner if part.u[3] == 32 else rounded(inner)
            product = second @ dense(part.u)[:, : part.read].T.astype(np.float64)
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


FLOATS = Node(
    86,
    [24, 40, 33],
    [
        Part(0, float_plane(24, 86, 1)),
        Part(0, plane(24, 86, 4, 2)),
        Part(0, float_plane(96, 86, 3), plane(24, 96, 4, 4), read=64),
        Part(1, plane(20, 86, 8, 5), float_plane(20, 20, 6), read=20, order=shuffled(40, 1)),
        Part(2, float_plane(64, 86, 7), float_plane(33, 64, 8), read=32),
    ],
)


def arrays(node: Node, tokens: int, *names: str) -> dict[str, Any]:
    """Return inputs of a node like x, or of as many columns."""
    rng = np.random.default_rng(7)
    return {name: rng.standard_normal((tokens, node.inputs)).astype(np.float32) for name in names}


def vector(count: int, seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def near(found: list[Any], expected: list[Any]) -> None:
    for y, wanted in zip(found, expected, strict=True):
        assert y.shape == wanted.shape
        assert (
            np.abs(y - wanted).max() < 2e-2 * np.abs(wanted).max()
        )  # ranks are rounded from other last bits
        assert np.linalg.norm(y - wanted) < 2e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("node", [GROUP, PIVOTED, ODD, FLOATS], ids=["group", "pivoted", "odd", "floats"])
@pytest.mark.parametrize("bias", [False, True])
def test_sums_of_parts(kernels: Any, tmp_path: Path, node: Node, bias: bool) -> None:
    node = replace(node, constants={"bias": vector(sum(node.rows), 3)} if bias else {})
    path = node.write(tmp_path / "node")
    x = np.random.default_rng(0).standard_normal((7, node.inputs)).astype(np.float32)
    near(session(kernels, path).run(None, {"x": x}), reference(node, x))


def test_planes_of_floats_are_exact(kernels: Any, tmp_path: Path) -> None:
    """Inputs in their order, the bias first."""
    node = Node(40, [20], [Part(0, float_plane(20, 40, 1))], constants={"bias": vector(20, 2)})
    x = np.random.default_rng(0).standard_normal((9, 40)).astype(np.float32)
    sums = np.zeros((9, 20), np.float32)
    for i in range(40):
        sums = fma(x[:, i : i + 1], node.parts[0].v[0][None, :, i], sums)
    found = session(kernels, node.write(tmp_path / "node")).run(None, {"x": x})
    assert np.array_equal(found[0], node.constants["bias"] + sums)


@pytest.mark.parametrize("node", [GROUP, PIVOTED, ODD, FLOATS], ids=["group", "pivoted", "odd", "floats"])
def test_what_comes_before_the_products(kernels: Any, tmp_path: Path, node: Node) -> None:
    columns, x = node.inputs, arrays(node, 7, "x")["x"]
    weights = {"post_norm": vector(columns, 1), "norm": vector(columns, 2)}
    too = arrays(node, 7, "residual", "gate")
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({}, ("gate",)),
        ({"norm": weights["norm"]}, ("residual",)),
        (weights, ("residual", "gate")),
        ({}, ("residual",)),
    ]
    plain = session(kernels, node.write(tmp_path / "plain"))
    for i, (constants, names) in enumerate(cases):
        changed = replace(
            node,
            constants=constants,
            inputs_too=names,
            change={"epsilon": 1e-5, "activation": "gelu_tanh" if i % 2 else "silu"},
        )
        given = {name: too[name] for name in names}
        *_, floats, added, _ = kernels.prepare("portable", x, gelu=i % 2 == 1, **constants, **given)
        expected = plain.run(None, {"x": floats[:, :columns].copy()})
        opened = session(kernels, changed.write(tmp_path / f"node{i}"), threads=1 + i)
        found = opened.run(None, {"x": x, **given})
        if "residual" in names:
            assert np.array_equal(found.pop(), added)
        assert [y.tobytes() for y in found] == [y.tobytes() for y in expected]
        one = opened.run(None, {name: a[3:4] for name, a in {"x": x, **given}.items()})
        assert all(np.array_equal(y[0], whole[3]) for y, whole in zip(one, expected, strict=False))


def test_positions_from_a_start_on(kernels: Any, tmp_path: Path) -> None:
    node = replace(GROUP, inputs_too=("residual", "start"))
    opened = session(kernels, node.write(tmp_path / "node"))
    x, too = (a[None] for a in arrays(node, 6, "x", "residual").values())
    whole = opened.run(None, {"x": x, "residual": too, "start": np.array([0])})
    for start, first in ((2, 2), (-1, 5), (-6, 0), (6, 6), (5, 5)):
        found = opened.run(None, {"x": x, "residual": too, "start": np.array([start])})
        assert all(np.array_equal(y, all_of[:, first:]) for y, all_of in zip(found, whole, strict=True))
    for start in (7, -7, 2**62, -(2**63)):
        with pytest.raises(Exception, match="start is no position"):
            opened.run(None, {"x": x, "residual": too, "start": np.array([start])})
    with pytest.raises(Exception, match="start must be one number"):
        opened.run(None, {"x": x, "residual": too, "start": np.array([0, 1])})
    with pytest.raises(Exception, match="one sequence"):
        opened.run(None, {"x": np.repeat(x, 2, 0), "residual": np.repeat(too, 2, 0), "start": np.array([0])})


def test_a_long_prompt_and_a_wide_gate(kernels: Any, tmp_path: Path) -> None:
    """More tokens than are computed at a time, and a lone token that several threads prepare."""
    node = Node(4864, [40], [Part(0, plane(40, 4864, 4, 1))], {"activation": "silu"}, inputs_too=("gate",))
    path = node.write(tmp_path / "node")
    given = arrays(node, 301, "x", "gate")
    whole = session(kernels, path).run(None, given)[0]
    threads = session(kernels, path, threads=3)
    assert threads.run(None, given)[0].tobytes() == whole.tobytes()
    for t in (0, 127, 128, 300):
        assert np.array_equal(
            threads.run(None, {name: a[t : t + 1] for name, a in given.items()})[0][0], whole[t]
        )
    given["gate"][0, 4863] = np.nan
    for tokens in (1, 301):
        with pytest.raises(Exception, match="not finite"):
            threads.run(None, {name: a[:tokens] for name, a in given.items()})


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


def test_runs_at_once_give_the_same_bytes(kernels: Any, tmp_path: Path) -> None:
    """Of one session and of two: memory between the passes belongs to one run at a time."""
    sessions = [
        session(kernels, node.write(tmp_path / name), threads=2)
        for name, node in (("group", GROUP), ("pivoted", PIVOTED))
    ]
    x = np.random.default_rng(0).standard_normal((300, 96)).astype(np.float32)
    cases = [(opened, x[:tokens]) for tokens in (300, 1, 40) for opened in sessions]
    expected = [[y.tobytes() for y in opened.run(None, {"x": given})] for opened, given in cases]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda case: case[0].run(None, {"x": case[1]}), cases * 20))
    assert [[y.tobytes() for y in outputs] for outputs in found] == expected * 20


@pytest.mark.parametrize(("core", "isa"), [("cortex-a53", "portable"), ("cortex-a76", "neon")])
def test_android_s_library_gives_the_same_bytes(
    kernels: Any, android: Any, tmp_path: Path, core: str, isa: str
) -> None:
    path = GROUP.write(tmp_path / "node")
    x = arrays(GROUP, 5, "x")["x"]
    wanted = session(kernels, path).run(None, {"x": x})
    said, found = android(core=core, graph=path, x=x)
    assert said == f"{isa} 1"
    assert found == b"".join(y.tobytes() for y in wanted)


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
        (replace(one(), constants={"norm": vector(64, 1)}), "epsilon"),
        (replace(one(epsilon=0.0), constants={"norm": vector(64, 1)}), "epsilon must be positive"),
        (replace(one(epsilon=float("nan")), constants={"post_norm": vector(64, 1)}), "epsilon must be positive"),
        (replace(one(epsilon=1e-5), constants={"norm": vector(63, 1)}), "does not have the size"),
        (replace(one(epsilon=1e-5), constants={"post_norm": vector(96, 1)}), "does not have the size"),
        (replace(one(), constants={"bias": vector(31, 1)}), "does not have the size"),
        (replace(one(), inputs_too=("gate",)), "activation"),
        (replace(one(activation="relu"), inputs_too=("gate",)), "activation must be"),
        (replace(one(activation="silu" * 100), inputs_too=("gate",)), "."),
        (replace(one(rows=[32, 32]), inputs_too=("residual",)), "rows must name every output"),
        (one(parts=[0, 32, 0, 0, 0, 0]), "does not have the size"),
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


def test_inputs_that_are_not_like_x(kernels: Any, tmp_path: Path) -> None:
    node = replace(one(activation="silu"), inputs_too=("residual", "gate"))
    opened = session(kernels, node.write(tmp_path / "node"))
    fits, x = np.ones((2, 64), np.float32), np.ones((2, 64), np.float32)
    assert len(opened.run(None, {"x": x, "residual": fits, "gate": fits})) == 2
    for shape in ((1, 64), (2, 63), (2, 1, 64), (128,), (0, 64)):
        other = np.ones(shape, np.float32)
        for given in ({"residual": other, "gate": fits}, {"residual": fits, "gate": other}):
            with pytest.raises(Exception, match="shape of x"):
                opened.run(None, {"x": x, **given})


def test_tiles_that_are_no_constant(kernels: Any, tmp_path: Path) -> None:
    path = one().write(tmp_path / "node")
    model = onnx.load(path, load_external_data=False)
    tensor = model.graph.initializer.pop()
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.UINT8, ["bytes"]))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(Exception, match="must be constants"):
        session(kernels, path)
