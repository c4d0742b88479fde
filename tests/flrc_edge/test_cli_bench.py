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


@pytest.mark.skipif(not shutil.which("llama-bench"), reason="llama-bench is not on the PATH")
def test_llama_bench_is_measured_beside_it(
    stories_bundle: Path, stories: Path, tmp_path: Path, write_gguf: Any
) -> None:
    file = write_gguf(stories, tmp_path / "s.gguf")
    arguments = ["bench", str(stories_bundle), "-p", "8,16", "-n", "4", "-r", "2", "--threads", "1", "--json"]
    done = CliRunner().invoke(group, [*arguments, "--peer", f"llama.cpp={file}"])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    peer = [r for r in result["rows"] if r["bundle"] == "llama.cpp: s.gguf"]
    assert [(r["test"], r["tokens"]) for r in peer] == [("prompt", 8), ("prompt", 16), ("decode", 4)]
    assert all(r["ms_per_token"] > 0 for r in peer)
    assert result["versions"]["llama.cpp: s.gguf"].endswith("(llama-bench)")


@pytest.mark.skipif(not shutil.which("llama-bench"), reason="llama-bench is not on the PATH")
def test_what_llama_bench_cannot_open(stories_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "s.gguf").write_bytes(b"GGUF")
    arguments = ["bench", str(stories_bundle), "-p", "8", "-n", "4", "-r", "1"]
    done = CliRunner().invoke(group, [*arguments, "--peer", f"llama.cpp={tmp_path / 's.gguf'}"])
    assert done.exit_code == 1 and "Traceback" not in done.stderr
    assert "llama.cpp: s.gguf: llama-bench: " in done.stderr and len(done.stderr.splitlines()) == 1
