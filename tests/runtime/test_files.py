"""File operations: names stay inside their folder, and what is published is whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from flrc_runtime import files
from flrc_runtime.errors import FlrcError, FormatError, UsageError, VerificationError
from flrc_runtime.files import (
    MAX_JSON_BYTES,
    check_output_folder,
    published_folder,
    read_json,
    resolve_inside,
    sha256_of,
    write_json,
)


@pytest.mark.parametrize(
    "name",
    [
        "../x", "/etc/passwd", "a/../../b", "a/b", "..", ".", "", "a\\b", "C:\\x", "C:", "\\\\host\\x", "a\x00b",
        "a b", "ä", "a\n", "~", "a:b", "a*",
    ],
)  # fmt: skip
def test_names_that_are_no_plain_file_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "x").write_text("outside")
    with pytest.raises(VerificationError, match="is not a plain file name"):
        resolve_inside(tmp_path / "root", name)


def test_only_regular_files(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "file.bin")
    (tmp_path / "dangling").symlink_to("/nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert resolve_inside(tmp_path, "file.bin") == tmp_path / "file.bin"
    for name in ("folder", "link", "dangling", "pipe"):
        with pytest.raises(VerificationError, match=f"{name} is not a regular file"):
            resolve_inside(tmp_path, name)
    with pytest.raises(VerificationError, match="absent is missing") as caught:
        resolve_inside(tmp_path, "absent")
    assert caught.value.exit_code == 3


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b'{"a": 1', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"a": 1, "a": 2}', "a key appears twice"),
        (b'{"a": {"b": 1, "b": 1}}', "a key appears twice"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": -Infinity}', "-Infinity is not a finite number"),
        (b'{"a": 1e999}', "1e999 is not a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b" " * (MAX_JSON_BYTES + 1), "more than the"),
    ],
    ids=range(11),
)
def test_json_is_read_strictly(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_json(tmp_path / "a.json")
    assert message in str(caught.value) and f"{tmp_path.name}/a.json" in str(caught.value)
    assert caught.value.exit_code == 3


def test_json_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"a.json is missing"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(FormatError, match="not a regular file"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True, "ü\u2028"]}, 1e-300, [1e308], -0.0])
def test_json_round_trip(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("value", [{"a": float("nan")}, {"a": object()}])
def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == 1 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    write_json(tmp_path / "a.json", 1)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, fail)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", 2)
    assert read_json(tmp_path / "a.json") == 1 and len(list(tmp_path.iterdir())) == 1


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
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="is not a folder that can be written"):
        check_output_folder(tmp_path / "new")
