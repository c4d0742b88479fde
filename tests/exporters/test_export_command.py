"""``flrc-edge export`` as a person runs it."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flrc_edge.cli import group
from flrc_runtime import manifest as manifests


def run(*arguments: object) -> Any:
    return CliRunner().invoke(group, ["export", *map(str, arguments)])


def test_says_what_was_written_and_what_to_run_next(staged_checkpoint: Any, tmp_path: Path) -> None:
    result = run(staged_checkpoint.folder, "-o", tmp_path / "b", "--dtype", "int8", "--context", 64)
    assert result.exit_code == 0, result.output
    assert "rounded to nearest" in result.stderr
    assert "context 64" in result.stdout and "stage 2" in result.stdout
    assert f"Next: flrc-edge generate {tmp_path / 'b'}" in result.stdout
    assert manifests.verify(tmp_path / "b").dtype == "int8"


def test_progress_is_lines_where_there_is_no_terminal(staged_checkpoint: Any, tmp_path: Path) -> None:
    result = run(staged_checkpoint.folder, "-o", tmp_path / "b", "--dtype", "int8")
    lines = result.stderr.splitlines()
    ends = [re.match(r"(.+): (\d+)/(\d+), \d+ s, peak", line) for line in lines]
    finished = [m[1] for m in ends if m and m[2] == m[3]]
    assert finished == ["Writing weights", "Building the stages' graphs", "Comparing with the checkpoint"]
    quiet = CliRunner().invoke(
        group, ["-q", "export", str(staged_checkpoint.folder), "-o", str(tmp_path / "q")]
    )
    assert quiet.exit_code == 0 and quiet.stderr == ""


def test_progress_is_a_bar_on_a_terminal(staged_checkpoint: Any, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "flrc_edge", "export", staged_checkpoint.folder, "-o", tmp_path / "b"]
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # Linux: the other side is closed
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert b"Comparing with the checkpoint" in shown and b"#]" in shown and b"\r" in shown


def test_json(staged_checkpoint: Any, tmp_path: Path) -> None:
    result = run(staged_checkpoint.folder, "-o", tmp_path / "b", "--dtype", "fp32", "--json")
    summary = json.loads(result.stdout)
    assert [s["graph"] for s in summary["stages"]] == ["stage_0.onnx", "stage_1.onnx", "stage_2.onnx"]
    assert summary["bytes"] == sum(
        f.stat().st_size for f in (tmp_path / "b").iterdir() if f.name not in ("flrc.json", "README.md")
    )


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("--context", "1000000"), 2, "context 1000000"),
        (("--dtype", "int5"), 2, "int5"),
    ],
)
def test_bad_options(
    arguments: tuple[str, ...], code: int, named: str, dense_checkpoint: Any, tmp_path: Path
) -> None:
    import click

    try:
        result = run(dense_checkpoint.folder, "-o", tmp_path / "b", *arguments)
    except click.UsageError as error:  # outside main(), click's own errors may come through
        assert code == 2 and named in str(error)
    else:
        assert result.exit_code == code
        assert named in result.stderr
    assert not (tmp_path / "b").exists()


def test_existing_folder_and_missing_checkpoint(dense_checkpoint: Any, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    for extra in ((), ("--overwrite",)):
        result = run(dense_checkpoint.folder, "-o", tmp_path / "b", *extra)
        assert result.exit_code == 2 and "Traceback" not in result.output
    assert (tmp_path / "b" / "notes.txt").read_text() == "mine"
    result = run(tmp_path / "nothing", "-o", tmp_path / "c")
    assert result.exit_code == 3 and "not a folder" in result.stderr


def test_help_needs_no_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnx_ir", "onnxscript", "safetensors"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run("--help").exit_code == 0
