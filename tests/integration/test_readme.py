"""Commands and Python of the README and the quickstart run in order and end in an answer (on stories260k)."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STORIES = ROOT / "tests" / "data" / "stories260k"
# What a model of 64 features and 512 positions needs, and fewer repetitions of what is measured.
SMALL = {
    "compress": ["--tokens", "2048", "--window", "256", "--rank-step", "8"],
    "bench": ["-p", "16", "-n", "16", "-r", "1"],
    "eval": ["--windows", "1"],
}
# A download, and what waits for someone: stories260k cannot chat, see tests/runtime/test_chat.py and test_server.py.
NOT_RUN = {"pull", "chat", "serve"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize(
    ("page", "shown"),
    [
        ("README.md", {"pull", "estimate", "compress", "inspect", "export", "generate", "bench", "verify"}),
        (
            "docs/quickstart.md",
            {"doctor", "estimate", "compress", "export", "generate", "serve", "report", "eval"},
        ),
    ],
)
def test_commands_and_python(page: str, shown: set[str], tmp_path: Path) -> None:
    text = (ROOT / page).read_text("utf-8")
    lines = [
        line for block in blocks(text, "sh") for line in block.splitlines() if line.startswith("flrc-edge ")
    ]
    commands = [shlex.split(line, comments=True)[1:] for line in lines]
    assert shown <= {c[0] for c in commands}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (arguments, done.stderr)
        return done.stdout

    for arguments in commands:
        if arguments[0] in NOT_RUN:
            continue
        arguments = [str(STORIES) if a == "smollm2-135m" else a for a in arguments]
        arguments += SMALL.get(arguments[0], [])
        assert run("-m", "flrc_edge", *arguments).strip(), arguments
    for code in blocks(text, "python"):
        run("-c", code)
