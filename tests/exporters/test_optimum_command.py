"""``optimum-cli export flrc``, found by optimum itself; also from a wheel."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from flrc_runtime import load, manifest

ROOT = Path(__file__).parents[2]
STORIES = ROOT / "tests" / "data" / "stories260k"
SMALL = ("--tokens", "2048", "--window", "256", "--rank-step", "8")
SCRIPT = "from optimum.commands.optimum_cli import main; main()"


def optimum(*arguments: object) -> subprocess.CompletedProcess[str]:
    roots = [ROOT, ROOT / "exporters", ROOT / "runtime"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_export(tmp_path: Path) -> None:
    done = optimum(
        "export", "flrc", "-m", STORIES, "--stages", ".9,.8", "--dtype", "int8", *SMALL, tmp_path / "b"
    )
    assert done.returncode == 0, done.stderr
    content = manifest.verify(tmp_path / "b", "bundle")
    assert content.plan.num_stages == 2 and content.dtype == "int8"
    assert "flrc-edge generate" in done.stdout and [p.name for p in tmp_path.iterdir()] == ["b"]
    assert list(load(tmp_path / "b").stream("Once upon a time", max_tokens=4))
    again = optimum("export", "flrc", "-m", STORIES, "--keep", ".8", *SMALL, tmp_path / "b")
    assert again.returncode == 1 and "exists already" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("-m", "nothing"), 2, "there is no model 'nothing'"),
        (("-m", STORIES, "--keep", "7"), 2, "keep must lie in (0, 1]"),
        (("-m", STORIES, "--keep", ".8", "--stages", ".9"), 2, "not allowed with"),
        (("-m", STORIES, "--dtype", "int3"), 2, "int3"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: tuple[object, ...], code: int, message: str) -> None:
    done = optimum("export", "flrc", *arguments, tmp_path / "b")
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_wheel_brings_it(tmp_path: Path) -> None:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed")
    build = "import hatchling.build as b, sys; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "installed")
    assert "optimum/commands/register/flrc.py" in names
    assert [n for n in names if n.startswith("optimum/")] == ["optimum/commands/register/flrc.py"]
    # Without this project's own folders, which an editable install adds: the command would be there twice.
    paths = [str(tmp_path / "installed"), sysconfig.get_path("purelib")]
    found = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {paths}; {SCRIPT}", "export", "flrc", "--help"],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0 and "--target-size" in found.stdout
