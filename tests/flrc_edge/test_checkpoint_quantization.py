"""``flrc-edge quantize``: a checkpoint of floats becomes one of integers that says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import flrc_edge
from flrc_edge.checkpoint_quantization import quantize
from flrc_edge.cli import group
from flrc_edge.errors import UsageError
from flrc_edge.texts import WeightedText, token_windows
from flrc_exporters.bundle import export
from flrc_runtime import manifest

TEXTS = (WeightedText("austen"), WeightedText("chat"))


def divergence(a: Any, b: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.log_softmax(-1) for m in (a, b))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("fixture", ["compressed_stories", "pivoted_stories"])
def test_integers_say_what_the_floats_say(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    compressed = request.getfixturevalue(fixture)
    ids = token_windows(
        compressed.source.tokenizer, (WeightedText("austen-heldout"),), windows=2, length=256
    ).ids
    floats = flrc_edge.load(compressed.checkpoint)
    found = {}
    for dtype in ("int8", "int4"):
        written = quantize(
            compressed.checkpoint,
            tmp_path / dtype,
            dtype=dtype,
            texts=TEXTS,
            windows=8,
            window=256,  # type: ignore[arg-type]
        )
        assert written.dtype == dtype and written.schedule == compressed.manifest.schedule
        assert manifest.verify(tmp_path / dtype, "checkpoint").plan == written.plan
        found[dtype] = divergence(floats, flrc_edge.load(tmp_path / dtype), ids)
    assert found["int8"] < 0.01 and found["int8"] < 0.1 * found["int4"]
    bundle = export(tmp_path / "int4", tmp_path / "bundle")
    assert bundle.dtype == "int4" and len(bundle.stages) == 3


def test_a_checkpoint_of_integers_is_refused(compressed_stories: Any, tmp_path: Path) -> None:
    quantize(compressed_stories.checkpoint, tmp_path / "a", dtype="int8", texts=TEXTS, windows=2, window=64)
    with pytest.raises(UsageError, match="holds int8 numbers already"):
        quantize(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_command(compressed_stories: Any, tmp_path: Path) -> None:
    arguments = ["quantize", str(compressed_stories.checkpoint), "-o", str(tmp_path / "q")]
    small = ["--calibration", "austen", "--windows", "2", "--window", "64"]
    done = CliRunner().invoke(group, [*arguments, *small])
    assert done.exit_code == 0, done.stderr
    assert f"Next: flrc-edge export {tmp_path / 'q'}" in done.stdout and "int4" in done.stdout
    again = CliRunner().invoke(group, [*arguments, *small])
    assert again.exit_code == 2 and "Traceback" not in again.stderr and "already" in again.stderr
