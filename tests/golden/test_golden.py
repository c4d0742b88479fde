"""What an earlier flrc-edge wrote is read by this one, with the answers it gave then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flrc_runtime
from flrc_exporters.bundle import export
from flrc_runtime.errors import UsageError
from flrc_runtime.manifest import SCHEMA_VERSION, verify
from tests.golden.make import KINDS, forced

HERE = Path(__file__).parent
FOLDERS = [folder / kind for folder in sorted(HERE.glob("schema_*")) for kind in KINDS]


def name(folder: Path) -> str:
    return f"{folder.parent.name}-{folder.name}"


NEAR = 1e-5  # of the norm


def check_logits(bundle: Path, wanted: Any, near: float = NEAR) -> None:
    found = forced(bundle)
    assert np.linalg.norm(found - wanted) <= near * np.linalg.norm(wanted)


def test_the_current_schema_has_golden_folders() -> None:
    assert (HERE / f"schema_{SCHEMA_VERSION}").is_dir(), "python -m tests.golden.make"


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_bundle(folder: Path) -> None:
    bundle = folder / "bundle"
    verify(bundle, "bundle")
    check_logits(bundle, np.load(folder / "logits.npy"))
    expected = json.loads((folder / "answer.json").read_text())
    model = flrc_runtime.load(bundle, threads=1)
    answer = flrc_runtime.generate(model, expected["prompt"], max_tokens=32, chat=False)
    assert list(answer.token_ids) == expected["ids"]
    assert list(answer.stage_of_token) == expected["stages"]


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_checkpoint(folder: Path, tmp_path: Path) -> None:
    written = verify(folder / "checkpoint", "checkpoint")
    # Floats of version 2 were rounded with scales of more bits, so they are compared less sharply.
    stock = written.schema_version == 2
    near = 0.05 if stock and not written.plan.embedding else NEAR
    export(folder / "checkpoint", tmp_path / "bundle", accuracy_level=0, stock=stock, **KINDS[folder.name][1])
    check_logits(tmp_path / "bundle", np.load(folder / "logits.npy"), near)


def test_integers_of_version_2_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds integers of format 2") as caught:
        export(HERE / "schema_2" / "pivoted" / "checkpoint", tmp_path / "bundle")
    assert caught.value.hint is not None and "--graph stock" in caught.value.hint
