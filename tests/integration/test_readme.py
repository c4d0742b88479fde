"""The commands and Python of the README run in order and end in an answer (on stories260k instead of SmolLM2)."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

STORIES = Path(__file__).parents[1] / "data" / "stories260k"
README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
# What a model of 64 features and 512 positions needs.
SMALL = ["--tokens", "2048", "--window", "256", "--rank-step", "8"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_commands_and_python(tmp_path: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("flrc-edge ")]
    commands = [shlex.split(line, comments=True)[1:] for line in lines]
    assert {"pull", "estimate", "compress", "inspect", "export", "generate", "bench", "verify"} <= {
        c[0] for c in commands
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for arguments in commands:
        if arguments[0] in ("pull", "chat", "serve"):
            continue  # a download; and stories260k cannot chat: see tests/runtime/test_chat.py and test_server.py
        arguments = [str(STORIES) if a == "smollm2-135m" else a for a in arguments]
        if arguments[0] == "compress":
            arguments += SMALL
        done = subprocess.run(
            [sys.executable, "-m", "flrc_edge", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (arguments, done.stderr)
        assert done.stdout.strip(), arguments
    for code in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (code, done.stderr)
