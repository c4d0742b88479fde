"""File operations: names stay inside their folder, and what is published is whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from flrc_runtime.errors import FormatError, VerificationError
from flrc_runtime.files import (
    MAX_JSON_BYTES,
    read_json,
    resolve_inside,
    sha256_of,
    write_json,
)


@pytest.mark.parametrize(
    "name",
    [
        "../x", "/etc/passwd", "a/../../b", "a/b", "..", ".", "", "a\\b", "C:\\x", "C:", "\\\\host\\x", "a\x00b",
        "a b", "ä", "a\n", "~", "a:b", "a*", "a" * 256,
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
