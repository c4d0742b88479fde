"""Static bundles: the window of keys and values, and the same stream as over fused graphs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flrc_runtime
from flrc_exporters.bundle import export
from flrc_runtime import FlrcError, FormatError, Sampling, UsageError, manifest

IDS = list(range(3, 43))


@pytest.fixture(scope="module")
def static(bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("static") / "bundle"
    export(bundle.folder.parent / "checkpoint", folder, prefill=8, context=96)
    return folder


@pytest.fixture(scope="module")
def window(static: Path) -> flrc_runtime.Model:
    return flrc_runtime.load(static, threads=1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampling": Sampling(temperature=0.9, top_k=30, seed=5)},
        {"speculation": flrc_runtime.Speculation()},
    ],
)
def test_streams_of_both_forms_are_the_same(window: Any, model: Any, options: Any) -> None:
    for prompt in ("Once", "Once upon a time there was a little girl who had a red ball and"):
        found, wanted = (
            flrc_runtime.generate(m, prompt, max_tokens=40, chat=False, **options) for m in (window, model)
        )
        assert found.token_ids == wanted.token_ids
        assert found.stage_of_token == wanted.stage_of_token


def test_positions_can_be_forgotten(window: Any) -> None:
    decoder = window.decoder()
    decoder.prefill(IDS[:20], 0)
    wanted = decoder.step(7, 1).copy()
    for token in (9, 11, 13):
        decoder.step(token, 0)
    decoder.cache.rollback(20)
    assert np.array_equal(decoder.step(7, 1), wanted)
    for length in (-1, 22):
        with pytest.raises(UsageError, match="cannot roll back"):
            decoder.cache.rollback(length)
    decoder.close()


def test_two_sequences_do_not_meet(window: Any) -> None:
    first, second = window.decoder(), window.decoder()
    alone = window.logits(IDS, stages=[i % 2 for i in range(40)])
    for i, token in enumerate(IDS):
        assert np.array_equal(first.step(token, i % 2), alone[i])
        second.step(IDS[-i - 1], 1)
    first.close()
    second.close()


def test_the_window_ends(static: Path) -> None:
    model = flrc_runtime.load(static, threads=1, context=10)
    decoder = model.decoder()
    decoder.prefill(IDS[:10], 0)
    with pytest.raises(FlrcError, match="position 11 is outside the context of 10"):
        decoder.step(3, 0)
    whole = flrc_runtime.load(static, threads=1)  # the last position of the graphs
    assert len(whole.logits((IDS * 3)[:96], stages=1)) == 96
    answer = flrc_runtime.generate(whole, "Once upon a time", max_tokens=1000, chat=False)
    assert answer.finish_reason == "length"
    with pytest.raises(UsageError, match="context 97 is not from 2"):
        flrc_runtime.load(static, context=97)


@pytest.mark.parametrize("change", ["swapped", "missing", "fused"])
def test_graphs_of_other_shapes_are_refused(static: Path, bundle: Any, tmp_path: Path, change: str) -> None:
    folder = Path(shutil.copytree(static, tmp_path / "copy"))
    sealed = manifest.read(folder)
    if change == "swapped":
        (folder / "stage_1.onnx").write_bytes((folder / "stage_1.prefill.onnx").read_bytes())
        manifest.seal(folder, sealed)
        with pytest.raises(FormatError, match=r"copy/stage_1\.onnx: it takes 8 tokens at once"):
            flrc_runtime.load(folder)
    elif change == "missing":
        (folder / "stage_1.prefill.onnx").unlink()
        manifest.seal(folder, sealed)
        with pytest.raises(FormatError, match=r"does not list stage_1\.prefill\.onnx"):
            flrc_runtime.load(folder)
    else:
        (folder / "stage_1.onnx").write_bytes((bundle.folder / "stage_1.onnx").read_bytes())
        (folder / "weights.bin").write_bytes((bundle.folder / "weights.bin").read_bytes())
        manifest.seal(folder, sealed)
        with pytest.raises(FormatError, match=r"copy/stage_\d"):
            flrc_runtime.load(folder)


def test_it_is_no_bundle_for_others(static: Path) -> None:
    with pytest.raises(FormatError, match="is a static bundle, not a checkpoint"):
        manifest.read(static, "checkpoint")
    manifest.verify(static, "static")
    assert manifest.read(static, "bundle").kind == "static"
