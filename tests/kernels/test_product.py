"""Products of the kernels: the integers of a NumPy reference, and the same bytes on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from flrc_exporters.tiles import WIDTHS, pack_tiles, plane_bytes, scale_bytes, scale_values, unpack_tiles


def matrix(rows: int, inputs: int, width: int, seed: int = 0) -> tuple[Any, Any, float]:
    """Return integers, scale bytes and unit of a random matrix whose extremes are there."""
    rng = np.random.default_rng(seed)
    zero = 1 << (width - 1)
    integers = rng.integers(-zero, zero, (rows, inputs), dtype=np.int64).astype(np.int8)
    integers[0, :32], integers[-1, -32:] = -zero, zero - 1
    scales = rng.normal(size=(rows, inputs // 32)).astype(np.float32) * np.exp(
        rng.normal(size=(rows, 1)) * 2
    ).astype(np.float32)
    scales[rows // 2] = 0
    codes, unit = scale_bytes(scales)
    return integers, codes, unit


def placed(data: Any) -> Any:
    """Return a copy that begins at a multiple of 64 bytes."""
    raw = np.zeros(data.size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    raw[start : start + data.size] = data
    return raw[start : start + data.size]


def activations(tokens: int, inputs: int, seed: int = 1) -> Any:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, inputs)).astype(np.float32) * np.exp(
        rng.normal(size=(tokens, 1))
    ).astype(np.float32)
    x[0, :32] = 0
    x[-1, -32:] = [1e4, -1e4] * 16  # every product at its extreme
    return x


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 32), (16, 128), (17, 160), (40, 224), (64, 576)])
def test_laid_out_and_read_again(width: int, rows: int, inputs: int) -> None:
    integers, codes, _ = matrix(rows, inputs, width)
    data = pack_tiles(integers, codes, width)
    assert data.size == plane_bytes(rows, inputs, width) and data.dtype == np.uint8
    again, scales = unpack_tiles(data, rows, inputs, width)
    assert np.array_equal(again, integers) and np.array_equal(scales, codes)


def test_what_does_not_fit_is_refused() -> None:
    integers, codes, _ = matrix(16, 64, 4)
    for wrong in (
        (integers, codes, 3),
        (integers, codes[:, :1], 4),
        (integers[:, :40], codes, 4),
        (integers, codes, 7),
    ):
        with pytest.raises(ValueError, match="bits"):
            pack_tiles(*wrong)
    with pytest.raises(ValueError, match="bytes are no matrix"):
        unpack_tiles(np.zeros(100, np.uint8), 16, 64, 4)


def test_scale_bytes_are_the_nearest() -> None:
    rng = np.random.default_rng(0)
    scales = (rng.normal(size=4000) * np.exp(rng.normal(size=4000) * 3)).astype(np.float32)
    scales[:3] = 0, 1e-12, -1e-12
    codes, unit = scale_bytes(scales)
    allowed = [c for c in range(256) if c in (0,) or (c & 127) >= 8]
    assert set(codes.tolist()) <= set(allowed)
    values = scale_values(np.array(allowed, np.uint8), unit)
    nearest = np.abs(scales[:, None] - values[None]).min(1)
    found = np.abs(scales - scale_values(codes, unit))
    assert np.all(found <= nearest * (1 + 1e-5) + 1e-12)
    exact = scale_values(codes, unit)
    again = scale_bytes(exact)
    assert np.array_equal(again[0], codes) and again[1] == unit
    assert np.frexp(unit)[0] == 0.5 and (codes & 127).max() >> 3 == 15
    assert scale_bytes(np.zeros(3, np.float32))[0].tolist() == [0, 0, 0]


def test_activations_are_rounded_to_the_nearest_integer(kernels: Any) -> None:
    x = activations(5, 160)
    x[2, 32:64] = np.arange(-16, 16) + 0.5  # ties, after the scale a power of two would leave
    x[2, 63] = 127.0
    q, scales, sums, finite = kernels.quantize(x)
    blocks = x.reshape(5, -1, 32)
    most = np.abs(blocks).max(2, keepdims=True)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    assert finite and np.array_equal(q.reshape(blocks.shape), np.rint(blocks * inverse))
    assert np.array_equal(scales, (most / np.float32(127))[..., 0])
    assert np.array_equal(sums, q.reshape(blocks.shape).sum(2, dtype=np.int32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_not_finite_are_told(kernels: Any, value: float) -> None:
    for place in (0, 31, 40, 95):
        x = activations(1, 96)
        x[0, place] = value
        assert not kernels.quantize(x)[3]
    assert kernels.quantize(np.full((1, 64), 1e-35, np.float32))[3]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("rows", "inputs", "tokens"), [(16, 32, 1), (40, 224, 3), (33, 576, 9)])
def test_the_same_bytes_on_every_instruction_set(
    kernels: Any, width: int, rows: int, inputs: int, tokens: int
) -> None:
    """Sums of integers to the last bit, blocks added in their order; however rows and tokens are cut."""
    integers, codes, unit = matrix(rows, inputs, width)
    data = placed(pack_tiles(integers, codes, width))
    q, scales, sums, _ = kernels.quantize(activations(tokens, inputs))
    shape = (rows, inputs, width, unit)
    blocks = inputs // 32
    dots = np.einsum(
        "rbk,tbk->trb",
        integers.reshape(rows, blocks, 32).astype(np.int64),
        q.reshape(tokens, blocks, 32).astype(np.int64),
    )
    bits = scale_values(codes, 1.0).astype(np.float32)  # a byte's own value, exact
    expected = np.zeros((tokens, rows), np.float32)
    for b in range(
        blocks
    ):  # a float64 holds the product of an integer and a float32 exactly, so this is one rounding
        lifted = (np.float32(unit) * np.float32(2.0**120) * scales[:, b]).astype(np.float32)
        factor = (bits[None, :, b] * np.float32(2.0**-120) * lifted[:, None]).astype(np.float32)
        exact = dots[:, :, b].astype(np.longdouble) * factor.astype(np.longdouble) + expected.astype(
            np.longdouble
        )
        expected = exact.astype(np.float32)
    found = {isa: kernels.product(isa, data, shape, (q, scales, sums)) for isa in kernels.isas}
    assert np.array_equal(found["portable"][:, :rows], expected)
    for isa, y in found.items():
        assert y.tobytes() == found["portable"].tobytes(), isa
        for t in range(tokens):  # a token alone
            one = kernels.product(isa, data, shape, (q[t : t + 1], scales[t : t + 1], sums[t : t + 1]))
            assert one.tobytes() == y[t : t + 1].tobytes(), isa
        if rows > 16:
            cut = kernels.product(isa, data, shape, (q, scales, sums), cut=1)
            assert cut.tobytes() == y.tobytes(), isa


@pytest.mark.parametrize("width", WIDTHS)
def test_a_stage_reads_the_first_blocks_and_adds_to_what_is_there(kernels: Any, width: int) -> None:
    rows, inputs, tokens = 48, 288, 5
    integers, codes, unit = matrix(rows, inputs, width)
    data = placed(pack_tiles(integers, codes, width))
    q, scales, sums, _ = kernels.quantize(activations(tokens, inputs))
    before = np.random.default_rng(5).standard_normal((tokens, rows)).astype(np.float32)
    for blocks in (0, 1, 3, 4, 5, 9):
        found = {
            isa: kernels.product(isa, data, (rows, inputs, width, unit), (q, scales, sums), blocks=blocks)
            for isa in kernels.isas
        }
        if blocks:
            narrow = placed(pack_tiles(integers[:, : 32 * blocks], codes[:, :blocks], width))
            less = tuple(
                np.ascontiguousarray(a[:, : n * blocks]) for a, n in ((q, 32), (scales, 1), (sums, 1))
            )
            whole = kernels.product("portable", narrow, (rows, 32 * blocks, width, unit), less)
            assert found["portable"].tobytes() == whole.tobytes()
        for isa, y in found.items():
            assert y.tobytes() == found["portable"].tobytes(), isa
            added = kernels.product(
                isa, data, (rows, inputs, width, unit), (q, scales, sums), blocks=blocks, onto=before
            )
            assert added.tobytes() == (before + y).tobytes(), isa


def test_the_environment_names_an_instruction_set(kernels: Any) -> None:
    program = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.flrc_best_isa.restype = ctypes.POINTER(ctypes.c_char_p)  # a struct that begins with its name
isa = library.flrc_best_isa()
print(isa[0].decode() if isa else "none")
"""
    for wanted in ("", *kernels.isas, "neon"):
        done = subprocess.run(
            [sys.executable, "-c", program, kernels.library._name],
            env={**os.environ, "FLRC_EDGE_ISA": wanted},
            capture_output=True,
            text=True,
            check=True,
        )
        best = next(i for i in ("avx512", "avx_vnni", "avx2", "portable") if i in kernels.isas)
        assert done.stdout.strip() == ("none" if wanted == "neon" else wanted or best)


def test_the_same_bytes_on_arm64(kernels: Any, arm64: list[str]) -> None:
    """NEON, emulated, beside this machine's portable code: every width, cuts of blocks, adding."""
    asked, expected = b"", b""
    cases = [
        (w, r, i, t, b, a)
        for w in WIDTHS
        for r, i, t, b, a in ((16, 32, 1, 1, 0), (40, 224, 9, 7, 0), (33, 160, 2, 3, 1))
    ]
    for width, rows, inputs, tokens, blocks, add in cases:
        integers, codes, unit = matrix(rows, inputs, width)
        data = placed(pack_tiles(integers, codes, width))
        q, scales, sums, _ = kernels.quantize(activations(tokens, inputs))
        groups = -(-rows // 16)
        before = np.random.default_rng(5).standard_normal((tokens, 16 * groups)).astype(np.float32)
        head = np.array([groups, inputs // 32, width, tokens, blocks, add, data.size], np.int32)
        asked += b"".join(
            a.tobytes() for a in (head, np.float32(unit), data, q, scales, sums, before, before)
        )
        y = kernels.product(
            "portable",
            data,
            (rows, inputs, width, unit),
            (q, scales, sums),
            blocks=blocks,
            onto=before if add else None,
        )
        expected += 2 * y.tobytes()
    done = subprocess.run(arm64, input=asked, capture_output=True, check=True)
    assert done.stdout == expected
