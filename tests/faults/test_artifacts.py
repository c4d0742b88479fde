"""Bundles with flipped blocks and files that end too early: found or refused, never a crash."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import flrc_runtime
from flrc_runtime import manifest
from flrc_runtime.errors import FlrcError, VerificationError

PREFIXES = 30  # of each file
READ_BY_THE_RUNTIME = ("flrc.json", "tokenizer.json", ".onnx")


def check_blocks(bundle: Path, block: int) -> int:
    """Flip one bit in every block of every file, and ask ``verify`` each time; return how many were flipped."""
    flipped = 0
    for path in sorted(bundle.iterdir()):
        if path.name in ("flrc.json", "README.md"):  # the one is read strictly, the other is for people
            continue
        with path.open("r+b") as file:
            for start in range(0, path.stat().st_size, block):
                offset = start + min(block, path.stat().st_size - start) // 2
                file.seek(offset)
                byte = file.read(1)
                file.seek(offset)
                file.write(bytes([byte[0] ^ 0x10]))
                file.flush()
                with pytest.raises(VerificationError, match=path.name):
                    manifest.verify(bundle)
                file.seek(offset)
                file.write(byte)
                file.flush()
                flipped += 1
    manifest.verify(bundle)
    return flipped


def test_every_block_of_a_bundle_is_watched(stories_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(stories_bundle, tmp_path / "bundle")
    assert check_blocks(tmp_path / "bundle", 2**14) > 70


@pytest.mark.full
def test_every_mebibyte_of_smollm2(real_cache: Path, tmp_path: Path) -> None:
    if not (real_cache / "models" / "smollm2-135m").is_dir():
        pytest.skip("smollm2-135m is not on this machine (flrc-edge pull smollm2-135m)")
    from flrc_edge.compression import compress
    from flrc_edge.settings import Settings
    from flrc_exporters.bundle import export

    compress("smollm2-135m", tmp_path / "checkpoint", Settings(keep=(1.0,)))
    export(tmp_path / "checkpoint", tmp_path / "bundle", dtype="int4")
    assert check_blocks(tmp_path / "bundle", 2**20) >= 84


def sealed_prefix(bundle: Path, name: str, length: int) -> None:
    """Cut a file and make the manifest agree with it, so that its size and hash betray nothing."""
    path = bundle / name
    path.write_bytes(path.read_bytes()[:length])
    if name != "flrc.json":
        content = json.loads((bundle / "flrc.json").read_text())
        if name in content["files"]:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            content["files"][name] |= {"size": length, "sha256": digest}
            (bundle / "flrc.json").write_text(json.dumps(content))


def test_every_prefix_of_every_file_is_refused(stories_bundle: Path, tmp_path: Path) -> None:
    """JSON and graphs, cut at many places: the parsers themselves, behind sizes and hashes that agree."""
    names = [p.name for p in sorted(stories_bundle.iterdir()) if p.suffix in (".json", ".onnx")]
    found: dict[str, int] = {}
    for name in names:
        size = (stories_bundle / name).stat().st_size
        for length in sorted({*range(0, size - 1, max(1, size // PREFIXES)), size - 2}):
            bundle = tmp_path / "bundle"
            shutil.copytree(stories_bundle, bundle)
            sealed_prefix(bundle, name, length)
            try:
                model = flrc_runtime.load(bundle, threads=1, context=32)
                for stage in range(model.num_stages):
                    model.decoder().step(1, stage)
            except FlrcError as error:
                assert str(error)
                assert "Traceback" not in str(error)
                found[name] = found.get(name, 0) + 1
            else:
                assert not name.endswith(READ_BY_THE_RUNTIME), (
                    f"{name} cut to {length} of {size} bytes was taken"
                )
            shutil.rmtree(bundle)
    print(found)
    assert sum(found.values()) > 150


def test_two_models_are_not_mixed(stories_bundle: Path, tmp_path: Path) -> None:
    """A graph that is another stage's is found by its hash alone."""
    bundle = tmp_path / "bundle"
    shutil.copytree(stories_bundle, bundle)
    content: Any = json.loads((bundle / "flrc.json").read_text())
    first, second = (bundle / stage["graph"] for stage in content["stages"][:2])
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    with pytest.raises(VerificationError):
        manifest.verify(bundle)
