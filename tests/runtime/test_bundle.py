"""Opening a bundle: what is damaged is refused in one sentence."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flrc_runtime import FlrcError, FormatError, UsageError, VerificationError, generate, load, manifest


def damage(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and seal the folder again, so that only the file's reader can notice."""
    sealed = manifest.read(folder)
    (folder / name).write_bytes(content)
    manifest.seal(folder, sealed)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_graph(copied: Path, share: float) -> None:
    graph = (copied / "stage_1.onnx").read_bytes()
    damage(copied, "stage_1.onnx", graph[: int(len(graph) * share)])
    with pytest.raises(FormatError, match=r"copy/stage_1\.onnx") as caught:
        load(copied)
    assert "\n" not in str(caught.value) and str(copied) not in str(caught.value)


def test_truncated_weights(copied: Path) -> None:
    damage(copied, "weights.bin", (copied / "weights.bin").read_bytes()[:1000])
    with pytest.raises(FormatError, match=r"weights end at byte \d+ of weights\.bin, which has 1000"):
        load(copied)


@pytest.mark.parametrize("name", ["weights.bin", "stage_1.onnx", "tokenizer.json"])
def test_missing_files(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(VerificationError, match=f"{name} is missing"):
        load(copied)


@pytest.mark.parametrize("name", ["weights.bin", "stage_1.onnx", "tokenizer.json"])
def test_shorter_files(copied: Path, name: str) -> None:
    (copied / name).write_bytes((copied / name).read_bytes()[:-1])
    with pytest.raises(VerificationError, match=f"{name} has .* bytes"):
        load(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 4}, "its inputs are not those of a decoder of 4 layers"),
        ({"vocab_size": 511}, "logits over 512 tokens, the vocabulary has 511"),
    ],
)
def test_a_manifest_of_another_model(copied: Path, change: dict[str, int], message: str) -> None:
    sealed = manifest.read(copied)
    manifest.seal(copied, replace(sealed, model=replace(sealed.model, **change)))
    with pytest.raises(FormatError, match=message):
        load(copied)


def test_stages_of_different_caches(copied: Path) -> None:
    onnx = pytest.importorskip("onnx")
    sealed = manifest.read(copied)
    graph = onnx.load(copied / "stage_1.onnx", load_external_data=False)
    for value in (*graph.graph.input, *graph.graph.output):
        if "key" in value.name or "value" in value.name:
            value.type.tensor_type.shape.dim[3].dim_value = 32
    onnx.save(graph, copied / "stage_1.onnx")
    manifest.seal(copied, sealed)
    with pytest.raises(FormatError, match=r"stage_1\.onnx: its KvShape.* differs"):
        load(copied)


def test_a_link_is_refused(copied: Path, tmp_path: Path) -> None:
    (copied / "stage_1.onnx").rename(tmp_path / "elsewhere.onnx")
    (copied / "stage_1.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(VerificationError, match="not a regular file"):
        load(copied)


def test_an_onnxruntime_that_reads_outside_the_folder(bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.24.1")
    with pytest.raises(FlrcError, match=r"onnxruntime 1\.24\.1 is too old"):
        load(bundle.folder)


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        load(tmp_path)
    with pytest.raises(FormatError):
        load(tmp_path / "nothing")


@pytest.mark.parametrize(
    "arguments",
    [{"threads": 0}, {"stages": (2,)}, {"stages": (-1,)}, {"providers": ("CUDAExecutionProvider",)}],
)
def test_impossible_arguments(bundle, arguments: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        load(bundle.folder, **arguments)


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_a_bundle_that_changes_while_it_is_open(copied: Path, change: str) -> None:
    """What is mapped stays: a deleted folder, or one that another export took the place of, answers as before."""
    if sys.platform == "win32":
        pytest.skip("open files cannot be removed on Windows")
    whole = load(copied, threads=1)
    wanted = whole.logits(range(3, 40), stages=[0] * 20 + [1] * 17)
    opened = load(copied, threads=1)
    opened.logits([3], stages=1)
    if change == "deleted":
        shutil.rmtree(copied)
    else:
        other = copied.with_name("other")
        copied.rename(other)
        copied.mkdir()
        for path in other.iterdir():
            (copied / path.name).write_bytes(bytes(path.stat().st_size))
        shutil.rmtree(other)
    assert np.array_equal(opened.logits(range(3, 40), stages=[0] * 20 + [1] * 17), wanted)
    assert len(generate(opened, "Once", max_tokens=20, chat=False).token_ids) == 20
