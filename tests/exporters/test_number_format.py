"""Rounding to nearest in blocks of 32, in the layout onnxruntime's kernels read."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flrc_edge.cli.settings import INTEGERS
from flrc_exporters.block_scales import smallest
from flrc_exporters.number_format import Integers, NumberFormat, dequantize, quantize
from flrc_exporters.tiles import scale_bytes, scale_values


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.008), (4, 0.085)])
def test_error_of_gaussian_weights(bits: Literal[8, 4], most: float) -> None:
    weight = normal(64, 256)
    back = dequantize(*quantize(weight, bits), 256)
    assert np.linalg.norm(back - weight) <= most * np.linalg.norm(weight)


def test_scale_search_beats_the_plain_scale() -> None:
    weight = normal(64, 256)
    plain = np.abs(weight.reshape(64, 8, 32)).max(-1, keepdims=True) / 7
    wanted = (np.rint(weight.reshape(64, 8, 32) / plain) * plain).reshape(64, 256)
    back = dequantize(*quantize(weight, 4), 256)
    assert np.linalg.norm(back - weight) < 0.86 * np.linalg.norm(wanted - weight)


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=70),
        elements=st.floats(-(2.0**20), 2.0**20, width=32).map(lambda v: v if abs(v) > 1e-20 else 0.0),
    ),
    st.sampled_from([8, 4]),
)
def test_round_trip_stays_within_a_step(weight: np.ndarray, bits: Literal[8, 4]) -> None:
    packed, scales = quantize(weight, bits)
    out, width = weight.shape
    assert packed.shape == NumberFormat(bits).packed_shape(out, width)
    back = dequantize(packed, scales, width)
    assert back.shape == weight.shape and np.isfinite(back).all()
    # The smallest scale tried, 0.8 of peak / 8 and rounded down, puts the peak at 10.7 steps; on the positive side 7
    # are left. Of 8 bits a clipped peak costs at most what 32 roundings would.
    steps = np.repeat(np.abs(scales), 32, axis=1)[:, :width]
    least = smallest(scales)  # of blocks too small beside the largest
    assert (np.abs(back - weight) <= steps * (3.1 if bits == 8 else 4.3) + least + 1e-30).all()
    assert (back[weight == 0] == 0).all()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_byte_holds_every_scale(bits: Literal[8, 4, 2]) -> None:
    weight = normal(64, 256) * np.exp(normal(64, 1, seed=1) * 4)  # scales of 30 powers of two
    weight[3, :32] = 0
    packed, scales = quantize(weight, bits)
    assert np.array_equal(scale_values(*scale_bytes(scales)), scales)
    assert scales[3, 0] == 0 and 1 / 512 < np.mean(scales == 0) < 0.5
    error = np.abs(dequantize(packed, scales, 256) - weight).max(axis=1)
    most = np.abs(weight).max(axis=1)
    assert (error <= np.maximum({8: 0.02, 4: 0.2, 2: 0.8}[bits], smallest(scales) / most) * most).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [32, 172, 20])
def test_onnxruntime_reads_the_layout(bits: Literal[8, 4], width: int) -> None:
    weight, x = normal(24, width), normal(3, width, seed=1)
    packed, scales = quantize(weight, bits)
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", "b", "s"],
        ["y"],
        domain="com.microsoft",
        K=width,
        N=24,
        bits=bits,
        block_size=32,
        accuracy_level=0,
    )
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [value("x", onnx.TensorProto.FLOAT, [3, width])],
        [value("y", onnx.TensorProto.FLOAT, [3, 24])],
        [onnx.numpy_helper.from_array(packed, "b"), onnx.numpy_helper.from_array(scales, "s")],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(
        session.run(None, {"x": x})[0], x @ dequantize(packed, scales, width).T, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "width", "fitted"),
    [
        ("int4/128", 1536, "int4/128"),
        ("int4/128", 576, "int4/64"),
        ("int8/128", 96, "int8/32"),
        ("int4/64", 1536, "int4/64"),
        ("int4/128", 172, "int4/32"),  # which nothing fits: 192 are the fewest
        ("fp32", 3, "fp32"),
    ],
)
def test_blocks_are_fitted_to_a_row(name: str, width: int, fitted: str) -> None:
    assert NumberFormat.named(name).fitted(width).name == fitted


def test_the_command_line_knows_the_formats() -> None:
    assert get_args(Integers) == INTEGERS
