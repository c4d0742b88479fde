"""``flrc-edge heal``: its output, its mistakes in one sentence, and Ctrl-C."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from flrc_edge.cli import group
from flrc_edge.compression import compress
from flrc_edge.settings import Settings
from flrc_runtime import manifest

SMALL = (
    "--tokens-per-step", 96, "--window", 48, "--calibration", "wikitext2", "--calibration", "austen",
    "--validate-every", 2,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    compress(
        str(stories),
        folder,
        Settings(keep=(0.8, 0.6), tokens=512, window=128, rank_step=8, boundaries=(16,)),
    )
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(a) for a in arguments])


def test_heal(checkpoint: Path, stories: Path, tmp_path: Path) -> None:
    target = tmp_path / "h"
    done = run(
        "heal", checkpoint, "-o", target, "--model", stories, "--steps", 3, "--lr", 0.001, "--train", "all",
        "--stage-weights", "1,1", *SMALL,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    head, *rows, summary, following = done.stdout.splitlines()
    assert head.split()[:3] == ["step", "minutes", "training:"] and "held out" in head
    assert [row.split()[0] for row in rows] == ["0", "2", "3"]
    assert rows[0].split()[2:4] == ["-", "-"] and len(rows[1].split()) == 6
    assert "3 steps, 288 tokens" in summary
    assert following == f"Next: flrc-edge export {target} -o {target}.onnx"
    assert "Healing: 3/3" in done.stderr
    manifest.verify(target, "checkpoint")
    (entry,) = json.loads((target / "healing.json").read_text())["runs"]
    assert entry["settings"]["lr"] == 0.001 and entry["settings"]["train"] == "all"
    assert entry["settings"]["stage_weights"] == [1.0, 1.0]


def test_json(checkpoint: Path, stories: Path, tmp_path: Path) -> None:
    done = run("heal", checkpoint, "-o", tmp_path / "h", "--model", stories, "--steps", 1, "--json", *SMALL)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["tokens"] == 96 and [p["step"] for p in report["curve"]] == [0, 1]
    assert len(report["curve"][0]["validation"]) == 2


def test_mistakes(checkpoint: Path, stories: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    new = tmp_path / "h"
    cases: list[tuple[list[object], int, str]] = [
        ([checkpoint, "-o", tmp_path / "full"], 2, "exists already"),
        ([tmp_path, "-o", new], 3, "flrc.json is missing"),
        ([checkpoint, "-o", new], 2, "compressed from stories260k, which is not a built-in model"),
        ([checkpoint, "-o", new, "--model", "nowhere"], 2, "there is no model 'nowhere'"),
        ([checkpoint, "-o", new, "--model", checkpoint], 1, "is a folder that flrc-edge wrote"),
        ([checkpoint, "-o", new, "--steps", 2, "--minutes", 1], 2, "give steps or minutes, not both"),
        ([checkpoint, "-o", new, "--lr", -1], 2, "lr must be a positive number"),
        ([checkpoint, "-o", new, "--stage-weights", "1,x"], 2, "is not a list of numbers"),
        ([checkpoint, "-o", new, "--calibration", "austen-heldout"], 2, "is kept for measurements"),
        ([checkpoint, "-o", new, "--model", stories, "--calibration", "none.txt"], 2, "there is no text"),
    ]
    for arguments, code, message in cases:
        done = run("heal", *arguments)
        assert done.exit_code == code, (arguments, done.stderr)
        assert message in done.stderr and done.stdout == ""
        assert done.stderr.count("Error: ") == 1 and "Traceback" not in done.stderr
    assert not new.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_names_the_command_that_goes_on(
    checkpoint: Path, stories: Path, tmp_path: Path, number: int, code: int
) -> None:
    command = [
        sys.executable, "-m", "flrc_edge", "heal", str(checkpoint), "-o", str(tmp_path / "h"),
        "--model", str(stories), "--steps", "3000", *map(str, SMALL),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None and process.stdout is not None
    read = []
    while not (read and read[-1].startswith("step 2,")):
        line = process.stderr.readline()
        assert line, read
        read.append(line)
    process.send_signal(number)
    out, rest = process.communicate(timeout=120)
    assert process.returncode == code and out == "" and "Traceback" not in rest
    (sentence,) = [line for line in rest.splitlines() if "go on with" in line]
    given = shlex.split(sentence.partition("go on with: ")[2])
    assert given == ["flrc-edge", *command[3:], "--resume"]
    assert (tmp_path / ".h.healing" / "state.safetensors").exists() and not (tmp_path / "h").exists()
    again = run(*given[1:-1])
    assert again.exit_code == 2 and "was interrupted" in again.stderr and "--resume" in again.stderr
    other = run(*given[1:], "--lr", 0.5)
    assert other.exit_code == 2 and "has lr" in other.stderr
