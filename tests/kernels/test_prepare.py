"""What comes before a product: gate, norms, residual rounding, to the last bit on every instruction set."""

from __future__ import annotations

import subprocess
from typing import Any

import numpy as np
import pytest

CASES: list[dict[str, bool]] = [
    {},
    {"gate": True},
    {"gate": True, "gelu": True},
    {"norm": True},
    {"residual": True},
    {"residual": True, "norm": True},
    {"post_norm": True, "residual": True, "norm": True},
    {"gate": True, "post_norm": True, "norm": True},
]
LARGE = np.longdouble  # holds a product of two float32 exactly


def given(case: dict[str, bool], tokens: int, columns: int) -> tuple[Any, dict[str, Any]]:
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((tokens, columns)).astype(np.float32) * np.float32(3)
    shapes = {
        "gate": (tokens, columns),
        "residual": (tokens, columns),
        "post_norm": (columns,),
        "norm": (columns,),
    }
    return x, {
        name: rng.standard_normal(shapes[name]).astype(np.float32) * np.float32(2)
        for name in case
        if name in shapes
    }


def fma(a: Any, b: Any, c: Any) -> Any:
    return (np.asarray(a, LARGE) * np.asarray(b, LARGE) + np.asarray(c, LARGE)).astype(np.float32)


def rms_norm(x: Any, weights: Any, epsilon: float = 1e-5) -> Any:
    """Squares in 16 lanes, these added 8, 4, 2 and 1 apart."""
    tokens, columns = x.shape
    padded = np.pad(x, ((0, 0), (0, -columns % 16))).reshape(tokens, -1, 16)
    lanes = np.zeros((tokens, 16), np.float32)
    for i in range(padded.shape[1]):
        lanes = fma(padded[:, i], padded[:, i], lanes)
    for width in (8, 4, 2, 1):
        lanes = lanes[:, :width] + lanes[:, width : 2 * width]
    r = np.float32(1) / np.sqrt(lanes / np.float32(columns) + np.float32(epsilon))
    return (x * r) * weights


def activated(gate: Any, gelu: bool) -> Any:
    x = gate.astype(np.float64)
    if gelu:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("columns", [16, 32, 50, 86, 576, 1000])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case) or "plain")
def test_the_same_bytes_on_every_instruction_set(kernels: Any, case: dict[str, bool], columns: int) -> None:
    x, arrays = given(case, 3, columns)
    gelu = case.get("gelu", False)
    found = {isa: kernels.prepare(isa, x, gelu=gelu, **arrays) for isa in kernels.isas}
    q, scales, sums, floats, added, finite = found["portable"]
    assert finite
    for isa, other in found.items():
        assert all(
            a.tobytes() == b.tobytes() for a, b in zip(other[:5], found["portable"][:5], strict=True)
        ), isa
    expected = x
    if "gate" in case:  # the activation itself is of our own exp: near, then taken as it is
        alone = kernels.prepare("portable", x, gelu=gelu, gate=arrays["gate"])[3][:, :columns]
        wanted = activated(arrays["gate"], gelu) * x
        assert np.all(np.abs(alone - wanted) <= 1e-6 * np.abs(wanted) + 1e-6)
        expected = alone
    if "post_norm" in case:
        expected = rms_norm(expected, arrays["post_norm"])
    if "residual" in case:
        expected = expected + arrays["residual"]
        assert np.array_equal(added, expected)
    if "norm" in case:
        expected = rms_norm(expected, arrays["norm"])
    assert np.array_equal(floats[:, :columns], expected) and not floats[:, columns:].any()
    blocks = floats.reshape(3, -1, 32)
    most = np.abs(blocks).max(2, keepdims=True)
    assert np.array_equal(q.reshape(blocks.shape), np.rint(blocks * (np.float32(127) / most)))
    assert np.array_equal(scales, (most / np.float32(127))[..., 0])
    assert np.array_equal(sums, q.reshape(blocks.shape).sum(2, dtype=np.int32))


def test_a_norm_is_that_of_float64(kernels: Any) -> None:
    x, arrays = given({"norm": True}, 2, 896)
    found = kernels.prepare("portable", x, **arrays)[3]
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5) * arrays["norm"]
    assert np.allclose(found, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("x", "gate", "residual", "norm") for value in (np.nan, np.inf, -np.inf)),
        *((name, 1e38) for name in ("x", "gate", "residual")),
    ],
)
def test_values_that_are_not_finite_are_told(kernels: Any, name: str, value: float) -> None:
    """Of 1e38, the square is not."""
    for place in (0, 40, 85):
        x, arrays = given({"gate": True, "residual": True, "norm": True}, 1, 86)
        target = x if name == "x" else arrays[name]
        target[..., place] = value
        for isa in kernels.isas:
            assert not kernels.prepare(isa, x, **arrays)[5], isa


def test_products_of_floats(kernels: Any) -> None:
    """Inputs in their order, one fused multiply-add each; on to what is there; in any cut."""
    rng = np.random.default_rng(0)
    for rows, inputs, tokens in ((16, 32, 1), (40, 96, 6)):
        weights = rng.standard_normal((-(-rows // 16) * 16, inputs)).astype(np.float32)
        data = (
            np.ascontiguousarray(weights.reshape(-1, 16, inputs).transpose(0, 2, 1))
            .view(np.uint8)
            .reshape(-1)
        )
        x = rng.standard_normal((tokens, inputs)).astype(np.float32)
        expected = np.zeros((tokens, len(weights)), np.float32)
        for i in range(inputs):
            expected = fma(x[:, i : i + 1], weights[None, :, i], expected)
        for isa in kernels.isas:
            y = kernels.floats(isa, data, rows, x)
            assert np.array_equal(y, expected), isa
            assert np.array_equal(kernels.floats(isa, data, rows, x, cut=1), expected), isa
            onto = rng.standard_normal(expected.shape).astype(np.float32)
            assert np.array_equal(kernels.floats(isa, data, rows, x, onto=onto), onto + expected), isa


def test_the_same_bytes_on_arm64(kernels: Any, arm64_prepare: list[str]) -> None:
    asked, expected = b"", b""
    rng = np.random.default_rng(1)
    for case in CASES:
        for columns in (32, 50, 576):
            x, arrays = given(case, 1, columns)
            names = ("gate", "post_norm", "residual", "norm")
            head = [columns, *(name in arrays for name in names), case.get("gelu", False), 2]
            weights = rng.standard_normal(32 * -(-columns // 32) * 32).astype(np.float32)
            asked += np.array(head, np.int32).tobytes() + x.tobytes()
            asked += b"".join(arrays[name].tobytes() for name in names if name in arrays) + weights.tobytes()
            *made, _ = kernels.prepare("portable", x, gelu=case.get("gelu", False), **arrays)
            made.append(kernels.floats("portable", weights.view(np.uint8), 32, made[3]))
            expected += 2 * b"".join(a.tobytes() for a in made)
    done = subprocess.run(arm64_prepare, input=asked, capture_output=True, check=True)
    assert done.stdout == expected
