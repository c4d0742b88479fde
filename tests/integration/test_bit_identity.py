"""SmolLM2-135M gives the same logits, to the last bit, on every instruction set and however it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.bit_identity import results_on
from tests.kernels.conftest import supported

pytestmark = pytest.mark.full
MODEL = "smollm2-135m"
SCRIPT = [0] * 40 + [2] * 30 + [1] * 30 + [0] * 28  # three moves


@pytest.mark.parametrize("form", ["int4", "int8", "int4, head int8, plain", "mixed"])
def test_the_same_bits(form: str, real_cache: Path, tmp_path: Path) -> None:
    import flrc_edge
    from flrc_edge.compression import compress
    from flrc_edge.pull import is_pulled
    from flrc_edge.settings import Settings
    from flrc_edge.texts import WeightedText, token_windows
    from flrc_exporters.bundle import export

    if not is_pulled(MODEL):
        pytest.skip(f"flrc-edge pull {MODEL} first")
    source = flrc_edge.open_model(MODEL)
    chosen: dict[str, Any] = {"keep": (0.9, 0.8, 0.6), "boundaries": (16, 32), "allocator": "spectrum"}
    exported: dict[str, Any] = {"dtype": form.split(",")[0]}
    if form == "mixed":
        chosen |= {"dtype": "mixed", "sizes": (80_000_000, 70_000_000, 60_000_000)}
        exported = {}
    elif "plain" in form:
        chosen["storage"], exported["head"], exported["cache"] = "plain", "int8", "int8"
    else:
        chosen["storage"] = "pivoted"
    compress(source, tmp_path / "checkpoint", Settings(tokens=4096, window=512, **chosen))
    export(tmp_path / "checkpoint", tmp_path / "bundle", **exported)
    text = (WeightedText("wikitext2-heldout"),)
    ids = token_windows(source.tokenizer, text, windows=1, length=len(SCRIPT)).ids[0].tolist()
    del source
    found = {isa: results_on(isa, tmp_path / "bundle", ids, SCRIPT) for isa in supported()}
    assert len(found["portable"]) == 1, "the result depends on threads or cutting"
    for isa, hashes in found.items():
        assert hashes == found["portable"], f"{isa} differs from portable"
