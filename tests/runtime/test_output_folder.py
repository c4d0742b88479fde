"""Output folders: whole or not at all, one process at a time, nothing left of killed ones."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from flrc_runtime import output_folder
from flrc_runtime.errors import FlrcError, UsageError
from flrc_runtime.output_folder import check_output_folder, check_room, claimed, published_folder


def written(folder: Path, text: str = "old") -> Path:
    """A folder as flrc-edge leaves it."""
    folder.mkdir()
    (folder / "data.bin").write_text(text)
    (folder / "flrc.json").write_text(json.dumps({"files": {"data.bin": {}}}))
    return folder


def test_published_folder(tmp_path: Path) -> None:
    with published_folder(tmp_path / "deep" / "out") as work:
        assert list(work.iterdir()) == [] and work.parent == tmp_path / "deep"
        (work / "x").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "x").read_text() == "1"
    assert len(list((tmp_path / "deep").iterdir())) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, FlrcError])
def test_a_failed_build_leaves_nothing_new(tmp_path: Path, error: type[BaseException]) -> None:
    old = written(tmp_path / "out")
    with pytest.raises(error), published_folder(old, overwrite=True) as work:
        (work / "x").write_text("1")
        raise error("stop")
    assert (old / "data.bin").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(FlrcError, match="out could not be written: No space left on device"),
        published_folder(tmp_path / "out"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_overwriting(tmp_path: Path) -> None:
    old = written(tmp_path / "out")
    with pytest.raises(UsageError, match="exists already"), published_folder(old):
        pytest.fail("entered")
    with published_folder(old, overwrite=True) as work:
        (work / "new").write_text("1")
        assert (old / "data.bin").read_text() == "old"
    assert [p.name for p in old.iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failed_rename_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    old = written(tmp_path / "out")
    whole, calls = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == fails_at:
            raise OSError(16, "Device or resource busy")
        return whole(self, target)

    monkeypatch.setattr(output_folder, "_exchanged", lambda one, other: False)  # as where the system cannot
    monkeypatch.setattr(Path, "replace", replace)
    with (
        pytest.raises(FlrcError, match="could not be written: Device or resource busy"),
        published_folder(old, overwrite=True) as work,
    ):
        (work / "new").write_text("1")
    assert (old / "data.bin").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_an_empty_folder_may_be_named_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with published_folder(Path()) as work:
        (work / "x").write_text("1")
    assert (tmp_path / "out" / "x").read_text() == "1" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "flrc.json").unlink(), "was not written by flrc-edge"),
        (lambda f: (f / "flrc.json").write_text("{"), "was not written by flrc-edge"),
        (lambda f: (f / "flrc.json").write_text("[]"), "was not written by flrc-edge"),
        (lambda f: (f / "flrc.json").write_text('{"files": 3}'), "was not written by flrc-edge"),
        (lambda f: (f / "thesis.txt").write_text("mine"), "holds thesis.txt, which flrc-edge did not write"),
        (lambda f: (f / "more").mkdir(), "holds more, which flrc-edge did not write"),
    ],
)
def test_only_what_flrc_edge_wrote_is_overwritten(tmp_path: Path, change: Any, message: str) -> None:
    folder = written(tmp_path / "out")
    change(folder)
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(UsageError, match=message):
        check_output_folder(folder, overwrite=True)
    with pytest.raises(UsageError, match=message), published_folder(folder, overwrite=True):
        pytest.fail("entered")
    assert sorted(p.name for p in folder.iterdir()) == before


def test_output_folders_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    check_output_folder(tmp_path / "folder")
    check_output_folder(tmp_path / "new" / "deeper")
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="exists and is not a folder"):
            check_output_folder(tmp_path / name, overwrite=True)
    with pytest.raises(UsageError, match="file is not a folder that can be written"):
        check_output_folder(tmp_path / "file" / "below")
    monkeypatch.setattr(output_folder.os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="is not a folder that can be written"):
        check_output_folder(tmp_path / "new")


HOLDER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from flrc_runtime.output_folder import published_folder
    with published_folder(Path(sys.argv[1]), overwrite=True) as work:
        (work / "half").write_text("x")
        print("here", flush=True)
        sys.stdin.read()
    """
)


def test_another_process_is_refused_until_it_ends_or_is_killed(tmp_path: Path) -> None:
    old = written(tmp_path / "out")
    for end in ("killed", "ended"):
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(old)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            assert process.stdout.readline() == "here\n"
            message = f"out is being written by process {process.pid}"
            with pytest.raises(UsageError, match=message), published_folder(old, overwrite=True):
                pytest.fail("entered")
            assert len(list(tmp_path.iterdir())) == 2  # out, and what grows
            if end == "killed":
                process.send_signal(signal.SIGKILL)
            process.stdin.close()
            process.wait(60)
        assert sorted(p.name for p in old.iterdir()) == (
            ["half"] if end == "ended" else ["data.bin", "flrc.json"]
        )
        if end == "killed":
            assert len(list(tmp_path.iterdir())) == 2  # which the next writer removes
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_was_moved_aside_comes_back(tmp_path: Path) -> None:
    old = written(tmp_path / "out")
    old.rename(tmp_path / ".out.old-1")
    (tmp_path / ".out.tmp-1").mkdir()
    with claimed(old), claimed(old):  # again, by the same process
        assert (old / "data.bin").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_cache_that_cannot_be_written_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(output_folder, "cache_folder", lambda: tmp_path / "file" / "cache")
    with published_folder(tmp_path / "out") as work:
        (work / "x").write_text("1")
    assert (tmp_path / "out" / "x").exists()


def test_room_is_asked_for_before(tmp_path: Path) -> None:
    check_room(tmp_path / "deep" / "out", 1)
    with pytest.raises(FlrcError, match=r"out needs about 1000000000 MB, \d+ MB are free there"):
        check_room(tmp_path / "out", 10**15)
