"""Graphs that hold what export does not write are refused before onnxruntime sees them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import flrc_runtime
from flrc_runtime import manifest
from flrc_runtime.errors import FormatError
from flrc_runtime.graph_file import OWN, STATIC, STOCK, check_graph_file
from tests.attacks.graphs import ATTACKS, Attack, apply

ROOT = Path(__file__).parents[2]


@pytest.fixture
def attacked(stories_bundle: Path, tmp_path: Path) -> Callable[[Attack], Path]:
    def make(attack: Attack) -> Path:
        folder = tmp_path / "bundle"
        shutil.copytree(stories_bundle, folder)
        apply(attack, folder)
        return folder

    return make


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(attacked: Callable[[Attack], Path], name: str) -> None:
    attack, message = ATTACKS[name]
    folder = attacked(attack)
    with pytest.raises(FormatError, match=r"stage_1\.onnx is not a graph that export writes") as caught:
        manifest.verify(folder)
    assert message in str(caught.value)
    with pytest.raises(FormatError, match=r"stage_1\.onnx is not a graph that export writes"):
        flrc_runtime.load(folder, context=32).decoder().step(1, 1)


def test_a_graph_that_is_left_alone(attacked: Callable[[Attack], Path]) -> None:
    folder = attacked(lambda model: None)
    manifest.verify(folder)
    flrc_runtime.load(folder, context=32).decoder().step(1, 1)


def test_no_graph_and_two(tmp_path: Path, stories_bundle: Path) -> None:
    one = (stories_bundle / "stage_0.onnx").read_bytes()
    sizes = {"weights.bin": (stories_bundle / "weights.bin").stat().st_size}
    for content in (b"", one + one):  # protobuf would merge them
        (tmp_path / "x.onnx").write_bytes(content)
        with pytest.raises(FormatError, match=r"it holds [02] graphs"):
            check_graph_file(tmp_path / "x.onnx", sizes, "own")


def test_every_operator_is_one_of_onnxruntime() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert STOCK[""] | STATIC[""] <= known


def test_the_java_engine_knows_the_same_operators() -> None:
    source = (ROOT / "android_demo/engine/src/main/java/dev/flrc/engine/GraphFile.java").read_text()
    for domain, name in (("", "STANDARD"), ("com.microsoft", "MICROSOFT"), ("flrc", "OWN")):
        listed = re.search(rf"{name} = new HashSet<>\(Arrays\.asList\((.*?)\)\);", source, re.DOTALL)
        assert listed is not None
        assert set(re.findall(r'"(\w+)"', listed[1])) == {**STOCK, **OWN}[domain]
