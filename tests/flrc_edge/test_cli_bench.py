"""``flrc-edge bench`` beside llama.cpp, which reads the GGUF file a model comes from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flrc_edge.cli import group


@pytest.mark.skipif(
    not (shutil.which("node") and os.environ.get("FLRC_EDGE_NODE_MODULES")),
    reason="FLRC_EDGE_NODE_MODULES names no folder in which npm installed node-llama-cpp",
)
def test_llama_cpp_is_measured_beside_it(
    stories_bundle: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_gguf: Any
) -> None:
    monkeypatch.chdir(os.environ["FLRC_EDGE_NODE_MODULES"])
    file = write_gguf(stories, tmp_path / "s.gguf")
    arguments = ["bench", str(stories_bundle), "-p", "8", "-n", "4", "-r", "1", "--threads", "1", "--json"]
    done = CliRunner().invoke(group, [*arguments, "--peer", f"llama.cpp={file}"])
    assert done.exit_code == 0, done.stderr
    peer = [r for r in json.loads(done.stdout)["rows"] if r["bundle"] == "llama.cpp: s.gguf"]
    assert [(r["test"], r["ratio"]) for r in peer] == [("prompt", 1), ("decode", 1)]
