"""The bundles that the app keeps: copied in whole and verified, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.android.conftest import hosted
from tests.android.test_chat import CHATML, exported


@pytest.fixture(scope="module")
def bundle(compressed_stories: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(compressed_stories.checkpoint, CHATML, tmp_path_factory.mktemp("library"))


def imported(library: Any, folder: Path) -> dict[str, Any]:
    library.send(type="import", folder=str(folder))
    found: dict[str, Any] = library.until("imported", "import_error")[-1]
    if found["type"] == "imported":
        library.until("bundles")
    return found


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_bundle_is_imported_chosen_and_removed(library: Any, bundle: Path, tmp_path: Path) -> None:
    library.send(type="bundles")
    assert library.event() == {"type": "bundles", "names": [], "last": None, "interrupted": None}
    odd = tmp_path / "my bundle (1)"
    shutil.copytree(bundle, odd)
    library.send(type="import", folder=str(odd))
    events = library.until("imported", "import_error")
    assert events[-1] == {"type": "imported", "name": "my-bundle-1-"}
    assert events[-2]["bytes"] == events[-2]["total"] > 100_000
    assert library.event()["names"] == ["my-bundle-1-"]
    assert imported(library, odd)["name"] == "my-bundle-1--2"  # the first is not replaced
    library.send(type="choose", name="my-bundle-1-", threads=1)
    assert library.until("opened", "error")[-1]["type"] == "opened"
    library.send(type="ask", text="Once", max_tokens=3)
    assert library.until("done", "error")[-1]["tokens"] == 3
    library.send(type="remove", name="my-bundle-1-")
    assert "is open" in library.event()["message"]
    library.send(type="remove", name="my-bundle-1--2")
    assert library.event() == {
        "type": "bundles",
        "names": ["my-bundle-1-"],
        "last": "my-bundle-1-",
        "interrupted": None,
    }
    for name in ("../library", "none", ""):
        library.send(type="choose", name=name)
        assert library.event()["type"] == "error"


def test_what_is_no_whole_bundle_leaves_nothing(library: Any, bundle: Path, tmp_path: Path) -> None:
    assert imported(library, bundle)["type"] == "imported"
    before = files(tmp_path / "library")
    broken = tmp_path / "broken"

    def refused(change: Any) -> str:
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(bundle, broken)
        change()
        found = imported(library, broken)
        assert found["type"] == "import_error" and files(tmp_path / "library") == before
        message: str = found["message"]
        return message

    weights = broken / "weights.bin"
    assert "checksum mismatch in weights.bin" in refused(
        lambda: weights.write_bytes(weights.read_bytes()[:-1] + b"\x99")
    )
    assert "weights.bin is missing" in refused(weights.unlink)
    assert "weights.bin has" in refused(lambda: weights.write_bytes(weights.read_bytes()[:-1]))
    assert "more than the" in refused(lambda: weights.write_bytes(weights.read_bytes() + b"0"))
    assert "flrc.json is missing" in refused((broken / "flrc.json").unlink)
    assert "flrc.json" in refused(lambda: (broken / "flrc.json").write_text("{"))

    def rewritten(name: str, size: int) -> None:
        content = json.loads((broken / "flrc.json").read_text())
        content["files"][name] = {"size": size, "sha256": "0" * 64}
        (broken / "flrc.json").write_text(json.dumps(content))

    assert "not a plain file name" in refused(lambda: rewritten("../evil", 1))
    assert "are free" in refused(lambda: rewritten("weights.bin", 1 << 60))
    assert "flrc.json is missing" in imported(library, tmp_path / "nowhere")["message"]


def test_extra_files_of_the_picked_folder_stay_behind(library: Any, bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "extra"
    shutil.copytree(bundle, folder)
    (folder / "notes.txt").write_text("mine")
    assert imported(library, folder)["name"] == "extra"
    assert "extra/notes.txt" not in files(tmp_path / "library")


def test_a_load_that_ended_the_program_is_named_once(
    engine_command: list[str], bundle: Path, tmp_path: Path
) -> None:
    root = tmp_path / "library"
    for library in hosted(engine_command, root):
        assert imported(library, bundle)["type"] == "imported"
        library.send(type="choose", name=bundle.name, threads=1)
        library.until("opened")
        assert not (root / ".loading").exists()
    (root / ".loading").write_text(bundle.name)  # what a process that died while loading leaves
    (root / ".import-1").mkdir()
    for library in hosted(engine_command, root):
        library.send(type="bundles")
        event = library.event()
        assert (event["interrupted"], event["last"]) == (bundle.name, bundle.name)
        assert not (root / ".import-1").exists()
    for library in hosted(engine_command, root):
        library.send(type="bundles")
        assert library.event()["interrupted"] is None
