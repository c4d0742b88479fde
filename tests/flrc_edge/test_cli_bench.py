"""``flrc-edge bench`` beside a real llama.cpp, which reads the GGUF file a model comes from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flrc_edge.cli import group

pytestmark = pytest.mark.skipif(not shutil.which("llama-bench"), reason="llama-bench is not on the PATH")


def test_llama_bench_is_measured_beside_it(
    stories_bundle: Path, stories: Path, tmp_path: Path, write_gguf: Any
) -> None:
    file = write_gguf(stories, tmp_path / "s.gguf")
    arguments = ["-p", "8,16", "-c", "8", "-n", "4", "-r", "2", "--threads", "2", "--json"]
    done = CliRunner().invoke(
        group, ["bench", str(stories_bundle), *arguments, "--peer", f"llama.cpp={file}"]
    )
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    for name in ("llama.cpp: s.gguf (1 thread)", "llama.cpp: s.gguf (2 threads)"):
        peer = [r for r in result["rows"] if r["bundle"] == name]
        assert [(r["test"], r["tokens"]) for r in peer] == [("prompt", 8), ("prompt", 16), ("decode", 8)]
        assert all(r["ms_per_token"] > 0 for r in peer)


def test_what_llama_bench_cannot_open(stories_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "s.gguf").write_bytes(b"GGUF")
    arguments = ["bench", str(stories_bundle), "-p", "8", "-n", "4", "-r", "1", "--threads", "1"]
    done = CliRunner().invoke(group, [*arguments, "--peer", f"llama.cpp={tmp_path / 's.gguf'}"])
    assert done.exit_code == 1 and "Traceback" not in done.stderr
    assert "llama.cpp: s.gguf (1 thread): llama-bench: " in done.stderr
    assert len(done.stderr.splitlines()) == 1
