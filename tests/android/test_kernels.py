"""The operator library in the Java engine: registered where it is present, one sentence where it is not one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import fetch_tools
import pytest

from tests.android.conftest import TOOLS


def opened(command: list[str], bundle: Path, kernels: Path) -> tuple[dict[str, Any], bool]:
    """Open a bundle; return the event, and whether the library is then in the process."""
    with subprocess.Popen(
        [*command, "dev.flrc.desktop.HostMain"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**fetch_tools.java_environment(TOOLS), "FLRC_EDGE_KERNELS": str(kernels)},
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for line in ({"type": "open", "folder": str(bundle), "threads": 1}, {"type": "ask", "text": "Once"}):
            process.stdin.write(json.dumps({"max_tokens": 2} | line) + "\n")
        process.stdin.flush()
        events = [json.loads(process.stdout.readline())]
        while events[-1]["type"] not in ("done", "error"):
            events.append(json.loads(process.stdout.readline()))
        there = str(kernels) in (Path("/proc") / str(process.pid) / "maps").read_text()
        process.stdin.close()
        return events[-1], there


def test_it_is_registered(engine_command: list[str], stories_bundle: Path) -> None:
    if not fetch_tools.KERNELS.is_file():
        pytest.skip("the operator library is not built (make setup)")
    event, there = opened(engine_command, stories_bundle, fetch_tools.KERNELS)
    assert event["type"] == "done" and there


@pytest.mark.parametrize("name", ["missing.so", "text.so"])
def test_what_is_no_library_is_one_sentence(
    engine_command: list[str], stories_bundle: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "text.so").write_text("no library")
    event, there = opened(engine_command, stories_bundle, tmp_path / name)
    assert event["type"] == "error" and not there
    assert event["message"].endswith(f"{name} cannot be loaded")
