"""The operator flrc.Embedding in onnxruntime: rows of a plane, and refusals of what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from flrc_exporters.tiles import WIDTHS, pack_tiles, scale_bytes, scale_values

ROWS, COLUMNS = 40, 86  # neither fills its last group or block


def floats(values: Any) -> Any:
    """Return a plane of width 32: groups of 16 rows, a line of 64 bytes an input."""
    rows, columns = values.shape
    padded = np.pad(values, ((0, -rows % 16), (0, -columns % 32)))
    return np.ascontiguousarray(padded.reshape(-1, 16, padded.shape[1]).transpose(0, 2, 1)).astype("<f4")


def opened(kernels: Any, folder: Path, tiles: bytes, **attributes: Any) -> Any:
    """Open a graph of one Embedding, its tiles in a file beside it."""
    (folder / "tiles.bin").write_bytes(tiles)
    tensor = TensorProto(name="tiles", data_type=TensorProto.UINT8, dims=[len(tiles)])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="tiles.bin")
    node = helper.make_node("Embedding", ["ids", "tiles"], ["y"], domain="flrc", **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [tensor],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("flrc", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(kernels.library._name)
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def plane(width: int) -> tuple[bytes, float, Any]:
    """Return tiles, their scale, and the floats that they stand for."""
    rng = np.random.default_rng(width)
    if width == 32:
        values = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
        return floats(values).tobytes(), 1.0, values
    zero = 1 << (width - 1)
    integers = rng.integers(-zero, zero, (ROWS, COLUMNS)).astype(np.int8)
    codes, unit = scale_bytes(rng.uniform(-2, 2, (ROWS, 3)).astype(np.float32))
    scales = np.repeat(scale_values(codes, unit), 32, axis=1)[:, :COLUMNS]
    return pack_tiles(np.pad(integers, ((0, 0), (0, 10))), codes, width).tobytes(), unit, integers * scales


@pytest.mark.parametrize("width", [*WIDTHS, 32])
@pytest.mark.parametrize("factor", [None, 24.0])
def test_rows(kernels: Any, tmp_path: Path, width: int, factor: float | None) -> None:
    tiles, scale, values = plane(width)
    own = {} if factor is None else {"factor": factor}
    session = opened(kernels, tmp_path, tiles, rows=ROWS, columns=COLUMNS, width=width, scale=scale, **own)
    ids = np.array([[0, 39, 15, 16, 39, *range(40)]])
    y = session.run(None, {"ids": ids})[0]
    assert y.shape == (1, 45, COLUMNS) and y.dtype == np.float32
    assert y[0].tobytes() == (values[ids[0]] * np.float32(factor or 1)).astype(np.float32).tobytes()
    assert session.run(None, {"ids": ids[:, :0]})[0].shape == (1, 0, COLUMNS)
    for wrong in (-1, ROWS, 2**40, -(2**63)):
        with pytest.raises(Exception, match="not one of its rows"):
            session.run(None, {"ids": np.array([[0, wrong]])})
    for shape in ((2, 2), (4,), (1, 1, 4)):
        with pytest.raises(Exception, match="must be"):
            session.run(None, {"ids": np.zeros(shape, np.int64)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows must be"),
        ({"rows": 2**40}, "rows must be"),
        ({"rows": 60}, "does not have the size"),
        ({"columns": 0}, "columns must be"),
        ({"columns": -(2**62)}, "columns must be"),
        ({"columns": 97}, "does not have the size"),
        ({"width": 7}, "width must be"),
        ({"width": 16}, "width must be"),
        ({"width": 32}, "does not have the size"),
        ({"scale": 0.0}, "scale must be"),
        ({"scale": float("nan")}, "scale must be"),
        ({"factor": float("inf")}, "factor must be"),
        ({"rows": None}, "rows"),
    ],
)
def test_attributes_that_do_not_fit(
    kernels: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tiles, scale, _ = plane(4)
    attributes = {"rows": ROWS, "columns": COLUMNS, "width": 4, "scale": scale} | change
    given = {key: value for key, value in attributes.items() if value is not None}
    with pytest.raises(Exception, match=message):
        opened(kernels, tmp_path, tiles, **given)
