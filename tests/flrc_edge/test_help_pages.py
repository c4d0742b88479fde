"""The page of all commands, and completion in the shells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flrc_edge.cli import COMMANDS
from flrc_edge.cli.help_pages import page

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_page_is_that_of_the_commands() -> None:
    assert PAGE.read_text("utf-8") == page(), "run make docs-cli"
    assert all(f"\n## {name}\n" in page() for name in COMMANDS)


def installed() -> str:
    command = shutil.which("flrc-edge", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("flrc-edge is not installed beside this python")
    return command


def complete(words: str, position: int) -> list[str]:
    """Ask as bash does."""
    environment = os.environ | {
        "_FLRC_EDGE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position),
    }  # fmt: skip
    done = subprocess.run(
        [installed()], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_completion() -> None:
    assert set(complete("flrc-edge ", 1)) == set(COMMANDS)
    assert complete("flrc-edge comp", 1) == ["compress", "compare"]
    assert complete("flrc-edge compress --sto", 2) == ["--storage"]
    assert complete("flrc-edge compress --storage p", 3) == ["pivoted", "plain"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    environment = os.environ | {"_FLRC_EDGE_COMPLETE": f"{shell}_source"}
    done = subprocess.run(
        [installed()], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert "_FLRC_EDGE_COMPLETE" in done.stdout, done.stderr
