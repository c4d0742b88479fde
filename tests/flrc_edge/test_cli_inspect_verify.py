"""``flrc-edge inspect`` and ``verify``: what a folder holds, and exit 3 for every damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flrc_edge.cli import group
from flrc_runtime import manifest


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(a) for a in arguments])


@pytest.fixture(params=["checkpoint", "bundle"])
def folder(
    request: pytest.FixtureRequest, compressed_stories: Any, stories_bundle: Path, tmp_path: Path
) -> Path:
    """A copy of either kind that a test may damage."""
    source = compressed_stories.checkpoint if request.param == "checkpoint" else stories_bundle
    return Path(shutil.copytree(source, tmp_path / request.param))


def test_inspect(folder: Path) -> None:
    done = run("inspect", folder)
    content = manifest.read(folder)
    assert done.exit_code == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{folder.name} of stories260k (llama, 0.3 M parameters), ")
    assert f"allocator {content.plan.allocator}, factors two-sided" in lines[1]
    kept = "; keys and values are kept in float32" if folder.name == "bundle" else ""
    assert lines[2] == f"answers end at </s> (2){kept}"
    assert lines[3].startswith("calibrated on ") and "tokens), seed 0" in lines[3]
    assert lines[4].startswith("decoding ")
    stages = lines[5:]
    assert len(stages) == 3
    of_token = [content.schedule.stage_at(t) for t in range(content.model.context_length)]
    for s, line in enumerate(stages):
        assert line.startswith(f"  stage {s}: keep {content.plan.kept(s):.3f}")
        start = f"from token {of_token.index(s)}" if s in of_token else "never used by the schedule"
        assert start in line and "KL to dense" in line
        assert (f"stage_{s}.onnx, reads" in line) == (folder.name == "bundle")


def test_inspect_ranks(folder: Path) -> None:
    lines = run("inspect", folder, "--ranks").stdout.splitlines()[8:]
    plan = manifest.read(folder).plan
    assert len(lines) == len(plan.projections) == 35
    for line, p in zip(lines, plan.projections, strict=True):
        shown = "dense" if p.dense else " > ".join(map(str, p.ranks))
        assert line.split()[0] == p.name and f"{shown}  (break-even" in line
        most = int(line.rstrip(")").split()[-1])
        m, n = p.shape
        assert most * (m + n) < m * n <= (most + 1) * (m + n)


def test_inspect_ranks_of_pivoted_factors(pivoted_stories: Any) -> None:
    """They take fewer parameters than the matrix up to the last rank but one."""
    lines = run("inspect", pivoted_stories.checkpoint, "--ranks").stdout.splitlines()
    for p in pivoted_stories.manifest.plan.projections:
        line = next(line for line in lines if line.split()[:1] == [p.name])
        assert p.dense or line.endswith(f"(break-even {min(p.shape) - 1})")


def test_json(folder: Path) -> None:
    done = run("inspect", folder, "--json")
    assert json.loads(done.stdout) == json.loads((folder / "flrc.json").read_text())
    result = json.loads(run("verify", folder, "--json").stdout)
    listed = [p for p in folder.iterdir() if p.name not in ("flrc.json", "README.md")]
    size = sum(p.stat().st_size for p in listed)
    assert result == {"folder": str(folder), "files": len(listed), "bytes": size, "ok": True}


def test_verify(folder: Path) -> None:
    done = run("verify", folder)
    assert done.exit_code == 0 and "all as written" in done.stdout and done.stderr == ""


def test_a_flipped_byte_in_any_file(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.name == "README.md":
            continue  # people may edit the card
        data = bytearray(path.read_bytes())
        for position in {0, len(data) // 2, len(data) - 1}:
            changed = bytearray(data)
            changed[position] ^= 0x20
            path.write_bytes(changed)
            done = run("verify", folder)
            if path.name == "flrc.json" and done.exit_code == 0:
                continue  # flrc.json is checked for sense, not for bits: a changed figure or space may pass
            assert done.exit_code == 3 and done.stdout == "", (path.name, position, done.output)
            assert done.stderr.startswith("Error: ") and "Traceback" not in done.stderr
            if path.name != "flrc.json":
                assert f"checksum mismatch in {path.name}" in done.stderr
        path.write_bytes(data)
    assert run("verify", folder).exit_code == 0


@pytest.mark.parametrize(
    "damage", ["truncated", "missing", "added", "link", "no flrc.json", "torn flrc.json"]
)
def test_damage(folder: Path, damage: str) -> None:
    path = folder / "tokenizer.json"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        path.unlink()
    elif damage == "added":
        (folder / "evil.py").write_text("print()")
    elif damage == "link":
        path.rename(folder.parent / "t.json")
        path.symlink_to(folder.parent / "t.json")
    elif damage == "no flrc.json":
        (folder / "flrc.json").unlink()
    else:
        (folder / "flrc.json").write_bytes((folder / "flrc.json").read_bytes()[:-20])
    done = run("verify", folder)
    assert done.exit_code == 3 and done.stdout == "" and "Traceback" not in done.stderr
    assert [line.split()[0] for line in done.stderr.splitlines()] in (["Error:"], ["Error:", "Hint:"])
    assert run("inspect", folder).exit_code == (0 if damage == "added" else 3)
    assert run("verify", folder, "--json").stdout == ""


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_not_a_folder(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nowhere", tmp_path / "file", tmp_path):
        done = run(command, path)
        assert done.exit_code == 3 and done.stderr.startswith("Error: ") and "Traceback" not in done.stderr
