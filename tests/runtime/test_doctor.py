"""The command doctor on this machine, and where something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flrc_edge.cli import group
from flrc_runtime import diagnosis


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, ["doctor", *map(str, arguments)])


def found(*arguments: object) -> dict[str, dict[str, str]]:
    return {f["topic"]: f for f in json.loads(run(*arguments, "--json").stdout)}


def test_this_machine(bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLRC_EDGE_CACHE", str(tmp_path / "cache"))
    done = run(bundle.folder)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ok       python: python 3.")
    assert any("every stage answers: stage 0 " in line and "stage 1 " in line for line in lines)
    everything = found(bundle.folder)
    assert {"python", "packages", "processors", "instructions", "memory", "cache", "onnxruntime"} <= set(
        everything
    )
    assert str(tmp_path / "cache") in everything["cache"]["text"]
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_file()]  # the test file is gone
    assert "torch 2." in everything["extra compress"]["text"]


def test_it_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys; from flrc_runtime.diagnosis import diagnose; list(diagnose());"
        "print([m for m in ('torch', 'transformers', 'onnx') if m in sys.modules])"
    )
    environment = os.environ | {"FLRC_EDGE_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "inside", Path("/proc/nothing")):
        monkeypatch.setenv("FLRC_EDGE_CACHE", str(place))
        done = run()
        assert (
            done.exit_code == 1
            and f"problem  cache: {place} " in done.stdout
            and "FLRC_EDGE_CACHE" in done.stdout
        )
        assert "Traceback" not in done.output


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    real = diagnosis.version

    def without(name: str) -> str:
        if name in ("jinja2", "torch", "rouge-score"):
            raise diagnosis.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(diagnosis, "version", without)
    everything = found()
    assert (
        everything["packages"]["level"] == "problem" and "missing: jinja2" in everything["packages"]["text"]
    )
    assert everything["extra compress"]["level"] == "warning"
    assert everything["extra compress"]["remedy"].startswith("pip install 'flrc-edge[compress]'")
    assert run().exit_code == 1


def test_a_bundle_without_the_runtime_s_packages(bundle: Any, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules |= {'numpy': None, 'onnxruntime': None}  # importing them fails\n"
        "from flrc_edge.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "doctor", bundle.folder, "--json"],
        env=os.environ | {"FLRC_EDGE_CACHE": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    problems = {f["topic"]: f for f in json.loads(done.stdout) if f["level"] == "problem"}
    assert done.returncode == 1 and set(problems) == {"onnxruntime", f"bundle {bundle.folder.name}"}
    assert "cannot be tried" in problems[f"bundle {bundle.folder.name}"]["text"] and not done.stderr


def test_an_old_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.20.0")
    assert found()["onnxruntime"] == {
        "level": "problem", "topic": "onnxruntime", "text": "onnxruntime 1.20.0 is too old",
        "remedy": "pip install 'onnxruntime>=1.24.2'",
    }  # fmt: skip


def test_the_operator_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flrc_runtime import kernels

    if (kernels._FOLDER / kernels.FILE).is_file():
        monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
        assert found()["kernels"]["text"].startswith(f"{kernels.isa()}, version {kernels.VERSION}, ")
        monkeypatch.setenv(kernels.ENVIRONMENT, "portable")
        assert found()["kernels"] | {"text": ""} == {
            "level": "ok", "topic": "kernels", "text": "", "remedy": "",
        }  # fmt: skip
        assert "FLRC_EDGE_ISA asks for it" in found()["kernels"]["text"]
        monkeypatch.setenv(kernels.ENVIRONMENT, "sse")
        assert run().exit_code == 1 and "'sse', which is no instruction set" in run().stdout
    monkeypatch.setattr(kernels, "_FOLDER", tmp_path)
    missing = found()["kernels"]
    assert missing["level"] == "problem" and "is not built" in missing["text"] and missing["remedy"]


def test_a_damaged_bundle(copied: Path) -> None:
    (copied / "stage_1.onnx").write_bytes(b"")
    done = run(copied)
    assert done.exit_code == 1 and "problem  bundle copy: copy: stage_1.onnx has 0 bytes" in done.stdout


def test_processors_that_share_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, siblings in enumerate(("0-1", "0-1", "2-3", "2-3")):
        topology = tmp_path / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "core_cpus_list").write_text(siblings + "\n")
    monkeypatch.setattr(diagnosis, "PROCESSORS", tmp_path)
    assert " processors (2 physical cores) may be used" in found()["processors"]["text"]
    monkeypatch.setattr(diagnosis, "PROCESSORS", tmp_path / "cpu0")
    assert "core" not in found()["processors"]["text"]


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({"/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1, None),
        ({"/sys/fs/cgroup/cpu.max": "max 100000\n"}, len(os.sched_getaffinity(0)), None),
        ({"/proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 400 kB\n"}, None, (1024000, 409600)),
        (
            {
                "/proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 900 kB\n",
                "/sys/fs/cgroup/memory.max": "512000\n", "/sys/fs/cgroup/memory.current": "500000\n",
            },
            None, (512000, 12000),
        ),
        ({}, None, None),
    ],
)  # fmt: skip
def test_limits_of_a_container(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int | None, memory: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(diagnosis, "_read", lambda path: files.get(path, ""))
    if cores is not None:
        assert diagnosis.usable_cores() == cores
    assert diagnosis.memory_bytes() == memory
    limited = "/sys/fs/cgroup/memory.max" in files
    assert ("all that the control group allows" in diagnosis._memory().text) == limited
    assert all(f.level != "problem" for f in (diagnosis._instructions(), diagnosis._memory()))
