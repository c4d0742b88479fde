"""stories260k gives the same logits, to the last bit, on every instruction set and however it is run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flrc_exporters.bundle import export
from flrc_runtime import generate, load
from tests.bit_identity import results_on
from tests.kernels.conftest import supported

SCRIPT = [0] * 40 + [2] * 30 + [1] * 30 + [0] * 28  # three moves
# What is compressed, and how it is exported: every layout of parts, integers of one and of two widths, every cache.
BUNDLES: dict[str, tuple[str, dict[str, Any]]] = {
    "floats": ("compressed_stories", {"dtype": "fp32"}),
    "int8": ("compressed_stories", {"dtype": "int8", "cache": "float32"}),
    "int4": ("compressed_stories", {"dtype": "int4"}),
    "int4, head int8": ("compressed_stories", {"dtype": "int4/64", "head": "int8", "cache": "int8"}),
    "pivoted int8": ("pivoted_stories", {"dtype": "int8"}),
    "pivoted int4, head int8": ("pivoted_stories", {"dtype": "int4", "head": "int8"}),
}


@pytest.mark.parametrize("name", BUNDLES)
def test_the_same_bits(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    checkpoint, options = BUNDLES[name]
    folder = tmp_path / "bundle"
    export(request.getfixturevalue(checkpoint).checkpoint, folder, **options)
    model = load(folder, threads=1)
    prompt = model.tokenizer.encode("Once upon a time")
    ids = [*prompt, *generate(model, "Once upon a time", max_tokens=128).token_ids]
    ids = (ids * 128)[: len(SCRIPT)]
    found = {isa: results_on(isa, folder, ids, SCRIPT) for isa in supported()}
    assert len(found["portable"]) == 1, f"{name}: the result depends on threads or cutting"
    for isa, hashes in found.items():
        assert hashes == found["portable"], f"{name}: {isa} differs from portable"


def test_a_result_that_differs_would_be_seen(stories_bundle: Path, tmp_path: Path) -> None:
    """A bit of one weight, of a token that none of these is."""
    folder = Path(shutil.copytree(stories_bundle, tmp_path / "bundle"))
    ids, script = list(range(3, 20)), [0] * 17
    before = load(folder, threads=1).logits(ids, stages=script)
    weights = bytearray((folder / "weights.bin").read_bytes())
    weights[2] ^= 1
    (folder / "weights.bin").write_bytes(weights)
    assert not np.array_equal(before, load(folder, threads=1).logits(ids, stages=script))
