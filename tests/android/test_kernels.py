"""The operator library in the Java engine: registered for bundles that need it, one sentence where it does not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import fetch_tools
import pytest

from flrc_runtime import manifest
from tests.android.conftest import TOOLS
from tests.golden.make import HERE

STOCK = HERE / "schema_2" / "plain" / "bundle"


def opened(command: list[str], bundle: Path, kernels: Path | None) -> tuple[dict[str, Any], bool]:
    """Open a bundle and ask; return the last event, and whether the library is then in the process."""
    environment = {**fetch_tools.java_environment(TOOLS), "FLRC_EDGE_KERNELS": str(kernels or "")}
    with subprocess.Popen(
        [*command, "dev.flrc.desktop.HostMain"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=environment,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for line in ({"type": "open", "folder": str(bundle), "threads": 1}, {"type": "ask", "text": "Once"}):
            process.stdin.write(json.dumps({"max_tokens": 2} | line) + "\n")
        process.stdin.flush()
        events = [json.loads(process.stdout.readline())]
        while events[-1]["type"] not in ("done", "error"):
            events.append(json.loads(process.stdout.readline()))
        there = "flrc_kernels" in (Path("/proc") / str(process.pid) / "maps").read_text()
        process.stdin.close()
        return events[-1], there


@pytest.fixture
def library() -> Path:
    if not fetch_tools.KERNELS.is_file():
        pytest.skip("the operator library is not built (make setup)")
    return fetch_tools.KERNELS


def test_it_is_registered_where_it_is_needed(
    engine_command: list[str], stories_bundle: Path, library: Path
) -> None:
    event, there = opened(engine_command, stories_bundle, library)
    assert event["type"] == "done" and there
    event, there = opened(engine_command, STOCK, library)
    assert event["type"] == "done" and not there


def test_stock_bundles_open_without_it(engine_command: list[str]) -> None:
    assert opened(engine_command, STOCK, None)[0]["type"] == "done"


def test_operators_of_another_version(
    engine_command: list[str], stories_bundle: Path, library: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(stories_bundle, tmp_path / "bundle"))
    text = (bundle / "flrc.json").read_text("utf-8")
    assert text.count('"operators": 1') == 1
    (bundle / "flrc.json").write_text(text.replace('"operators": 1', '"operators": 2'), "utf-8")
    assert manifest.verify(bundle).operators == 2
    event, _ = opened(engine_command, bundle, library)
    assert event["message"] == (
        "the bundle needs version 2 of the operators, the library here is of version 1"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "the bundle needs the operator library, which is not here"),
        ("missing.so", "missing.so cannot be loaded"),
        ("text.so", "text.so cannot be loaded"),
        ("another.so", "another.so is no library of flrc-edge's operators"),
    ],
)
def test_what_is_no_library_is_one_sentence(
    engine_command: list[str], stories_bundle: Path, tmp_path: Path, name: str | None, message: str
) -> None:
    (tmp_path / "text.so").write_text("no library")
    shutil.copy(TOOLS / "liblog.so", tmp_path / "another.so")
    event, there = opened(engine_command, stories_bundle, name and tmp_path / name)  # type: ignore[arg-type]
    assert event["type"] == "error" and not there
    assert event["message"].endswith(message) and event["hint"]
