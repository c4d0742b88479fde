"""The model card says what the manifest says, in metadata that a hub reads."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from flrc_exporters.bundle import export
from flrc_runtime import manifest
from flrc_runtime.model_card import model_card


def metadata(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_checkpoint_and_bundle_have_one(compressed_stories: Any, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    export(compressed_stories.checkpoint, tmp_path / "bundle", dtype="int8")
    for folder, kind in ((compressed_stories.checkpoint, "checkpoint"), (tmp_path / "bundle", "bundle")):
        content = manifest.verify(folder)
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "flrc-edge" and card.data.pipeline_tag == "text-generation"
        assert ("onnx" in (card.data.tags or [])) == (kind == "bundle")
        for stage in range(3):
            assert f"| {stage} | {content.plan.kept(stage):.3f} |" in card.text
        assert f"A {kind} of stories260k" in card.text and "Calibrated on 4096 tokens" in card.text
        assert ("bytes a token" in card.text) == (kind == "bundle")
        assert ("KL to dense" in card.text) == bool(content.schedule.divergence)
        assert card.text.strip() == (folder / "README.md").read_text().split("---\n", 2)[2].strip()


def test_it_may_be_edited(compressed_stories: Any, tmp_path: Path) -> None:
    shutil.copytree(compressed_stories.checkpoint, tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("my own words\n")
    content = manifest.verify(tmp_path / "mine")
    assert "README.md" not in content.files
    listed = json.loads((tmp_path / "mine" / "flrc.json").read_text())
    listed["files"]["README.md"] = {"size": 1, "sha256": "0" * 64}  # as folders of before list it
    (tmp_path / "mine" / "flrc.json").write_text(json.dumps(listed))
    assert manifest.verify(tmp_path / "mine") == content
    (tmp_path / "mine" / "README.md").unlink()
    manifest.verify(tmp_path / "mine")


@pytest.mark.parametrize("name", ['a"b: [c]\n---\n', "<script>", "[x](http://y)", "a|b", "*b*", "x" * 300])
def test_a_hostile_name_stays_a_name(compressed_stories: Any, name: str) -> None:
    content = compressed_stories.manifest
    text = model_card(replace(content, model=replace(content.model, name=name)))
    assert metadata(text)["model_name"] == f"{name}, checkpoint of flrc-edge"
    body = text.split("\n---\n", 1)[1]
    assert "<script" not in body and "](" not in body and "*b*" not in body
    assert len(body.splitlines()) == len(model_card(content).split("\n---\n", 1)[1].splitlines())


def test_a_dense_model(compressed_stories: Any) -> None:
    content = compressed_stories.manifest
    dense = tuple(replace(p, ranks=(None,)) for p in content.plan.projections)
    plan = replace(content.plan, keep=(1.0,), projections=dense)
    text = model_card(replace(content, plan=plan, schedule=manifest.Schedule(()), calibration=None))
    assert "all 35 projections keep their full matrix" in text and "Calibrated" not in text
