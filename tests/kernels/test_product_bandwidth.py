"""The product whose speed bench compares decode steps with."""

from __future__ import annotations

from typing import Any

import pytest

from flrc_exporters.tiles import plane_bytes
from flrc_runtime.bench import product


def test_it_reads_its_weights(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plane_bytes(product.ROWS, product.COLUMNS, product.BITS) == product.BYTES
    monkeypatch.setattr(
        product.kernels,
        "register",
        lambda options: options.register_custom_ops_library(kernels.library._name),
    )
    assert 1e8 < product.product_bandwidth(1, repetitions=1) < 1e12
