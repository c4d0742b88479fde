"""The Java engine accepts and refuses the bundles that the Python runtime accepts and refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flrc_runtime import manifest
from flrc_runtime.errors import FlrcError
from tests.attacks.graphs import ATTACKS, apply
from tests.golden.make import HERE

OLD = HERE / "schema_2" / "plain" / "bundle"


@pytest.fixture
def bundle(stories_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(stories_bundle, tmp_path / "bundle"))


@pytest.mark.parametrize("schema", [2, 3])
def test_a_bundle_is_read_as_python_reads_it(
    java: Callable[..., Any], stories_bundle: Path, tmp_path: Path, schema: int
) -> None:
    bundle = Path(shutil.copytree(OLD if schema == 2 else stories_bundle, tmp_path / "bundle"))
    assert json.loads((bundle / "flrc.json").read_text("utf-8"))["schema_version"] == schema
    (bundle / "README.md").write_text("people edit the card")
    content = manifest.verify(bundle, "bundle")
    done = java("ManifestCheck", bundle)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "model": content.model.name,
        "dtype": content.dtype,
        "operators": content.operators,
        "bytes": sum(f.size for f in content.files.values()),
        "boundaries": list(content.schedule.boundaries),
        "stages": [s.graph for s in content.stages],
        "stage_at": [content.schedule.stage_at(i) for i in range(100)],
    }


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "flrc.json").read_text("utf-8"))
    change(content)
    (folder / "flrc.json").write_text(json.dumps(content), "utf-8")


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to(path.with_name("moved"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no flrc.json": lambda f: (f / "flrc.json").unlink(),
    "flrc.json is a link": lambda f: link(f / "flrc.json"),
    "flrc.json is huge": lambda f: (f / "flrc.json").write_bytes(b" " * (4 * 1024 * 1024 + 1)),
    "flrc.json is cut": lambda f: cut(f / "flrc.json") or cut(f / "flrc.json"),
    "flrc.json is nested": lambda f: (f / "flrc.json").write_text("[" * 50_000),
    "flrc.json is not UTF-8": lambda f: (f / "flrc.json").write_bytes(b'{"a": "\xff"}'),
    "a key twice": lambda f: (f / "flrc.json").write_text('{"kind": 1, "kind": 2}'),
    "a newer format": lambda f: edit(f, lambda c: c.update(schema_version=4)),
    "the format before": lambda f: edit(f, lambda c: c.update(schema_version=1)),
    "operators below 0": lambda f: edit(f, lambda c: c.update(operators=-1)),
    "operators of null": lambda f: edit(f, lambda c: c.update(operators=None)),
    "operators as text": lambda f: edit(f, lambda c: c.update(operators="1")),
    "own graphs that are to be stock ones": lambda f: edit(f, lambda c: c.update(operators=0)),
    "an unknown field": lambda f: edit(f, lambda c: c.update(extra=1)),
    "another kind": lambda f: edit(f, lambda c: c.update(kind="checkpoint", stages=[])),
    "no stages": lambda f: edit(f, lambda c: c.update(stages=[])),
    "a stage without bytes": lambda f: edit(f, lambda c: c["stages"][0].update(bytes=0)),
    "boundaries fall": lambda f: edit(f, lambda c: c["schedule"].update(boundaries=[9, 3])),
    "too few boundaries": lambda f: edit(f, lambda c: c["schedule"].update(boundaries=[9])),
    "an end outside": lambda f: edit(f, lambda c: c["model"].update(eos_token_ids=[10**6])),
    "a size as text": lambda f: edit(f, lambda c: c["files"]["weights.bin"].update(size="7")),
    "a name that leads out": lambda f: edit(
        f, lambda c: c["files"].update({"../x": c["files"]["weights.bin"]})
    ),
    "weights not listed": lambda f: edit(f, lambda c: c["files"].pop("weights.bin")),
    "weights missing": lambda f: (f / "weights.bin").unlink(),
    "weights cut": lambda f: cut(f / "weights.bin"),
    "weights flipped": lambda f: flip(f / "weights.bin", -1),
    "weights are a link": lambda f: link(f / "weights.bin"),
    "a graph flipped": lambda f: flip(f / "stage_1.onnx", 100),
    "a graph is a folder": lambda f: ((f / "stage_1.onnx").unlink(), (f / "stage_1.onnx").mkdir()),
    "a stranger": lambda f: (f / "stranger.bin").write_bytes(b"x"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_python_refuses_is_refused(java: Callable[..., Any], bundle: Path, damage: str) -> None:
    DAMAGES[damage](bundle)
    with pytest.raises(FlrcError):
        manifest.verify(bundle, "bundle")
    done = java("ManifestCheck", bundle)
    assert done.returncode == 3, done.stdout
    assert done.stderr.startswith("Error: ") and len(done.stderr.splitlines()) == 1, done.stderr


def test_stock_graphs_that_are_to_be_own_ones(java: Callable[..., Any], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(OLD, tmp_path / "bundle"))
    edit(bundle, lambda c: c.update(operators=1))
    with pytest.raises(FlrcError, match="is not known"):
        manifest.verify(bundle, "bundle")
    done = java("ManifestCheck", bundle)
    assert done.returncode == 3 and "is not known" in done.stderr


@pytest.mark.parametrize("schema", [2, 3])
@pytest.mark.parametrize("name", ATTACKS)
def test_graphs_that_export_does_not_write(
    java: Callable[..., Any], bundle: Path, name: str, schema: int
) -> None:
    if schema == 2:
        shutil.rmtree(bundle)
        shutil.copytree(OLD, bundle)
    attack, message = ATTACKS[name]
    apply(attack, bundle)
    done = java("ManifestCheck", bundle)
    assert done.returncode == 3, done.stdout
    assert "is not a graph that export writes" in done.stderr
    assert message in done.stderr
