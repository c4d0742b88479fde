"""Static bundles on the simulator of a Qualcomm NPU: every node placed, every answer that of the CPU."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import flrc_runtime
from flrc_edge.cli import group
from flrc_runtime import manifest

CHECKPOINT = (
    Path(__file__).parents[1] / "golden" / f"schema_{manifest.SCHEMA_VERSION}" / "plain" / "checkpoint"
)
SIMULATOR = "qnn:soc_model=57,htp_arch=75"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(group, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def compiler() -> None:
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed (flrc-edge[qnn])")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the simulator of the NPU is a library for Linux on x86-64")


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("static") / "b"
    done = run("export", CHECKPOINT, "-o", folder, "--graph", "static", "--context", 64)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def compiled(compiler: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qnn") / "alone"
    done = run(
        "export",
        CHECKPOINT,
        "-o",
        folder,
        "--target",
        "qnn",
        "--soc",
        "sm8650",
        "--no-share",
        "--context",
        64,
    )
    assert done.exit_code == 0, done.output
    assert f"--provider {SIMULATOR}" in done.stdout
    return folder


def test_every_node_is_on_the_npu(compiled: Path) -> None:
    report = json.loads((compiled / "placement.json").read_text())
    assert report["soc"] == "SM8650" and len(report["graphs"]) == 6
    for graph in report["graphs"].values():
        assert graph["npu"] == graph["nodes"] > 200
        assert graph["elsewhere"] == []
    assert run("verify", compiled).exit_code == 0


def test_the_simulator_answers_as_the_cpu_does(compiled: Path, static: Path) -> None:
    wanted = flrc_runtime.generate(flrc_runtime.load(static), "Once upon a time", max_tokens=24, chat=False)
    model = flrc_runtime.load(compiled, providers=[SIMULATOR])
    found = flrc_runtime.generate(model, "Once upon a time", max_tokens=24, chat=False)
    assert found.stage_of_token == wanted.stage_of_token == (0,) * 8 + (1,) * 8 + (2,) * 8
    assert found.token_ids == wanted.token_ids


def test_place_measures_it(compiler: None, static: Path, tmp_path: Path) -> None:
    saved = tmp_path / "figures.json"
    done = run("place", static, "--soc", "SM8650", "--tokens", 16, "--json", "--save", saved)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert all(g["placed"] == g["nodes"] and not g["elsewhere"] for g in found["graphs"])
    assert found["relative_l2"] < 5e-3 and found["top1"] >= 0.9 and len(set(found["stages"])) == 3
    assert max(g["binary_bytes"] for g in found["graphs"]) < found["shared_bytes"]
    assert found["shared_bytes"] < 0.5 * sum(g["binary_bytes"] for g in found["graphs"])
    assert "relative L2" in saved.with_suffix(".md").read_text()


@pytest.mark.full
def test_integers_with_calibrated_activations(compiler: None, tmp_path: Path) -> None:
    """Coarser than float16: the figures are in docs/accelerators.md."""
    options = ("--context", 64, "--prefill", 8)
    assert run("export", CHECKPOINT, "-o", tmp_path / "b", "--graph", "static", *options).exit_code == 0
    done = run("place", tmp_path / "b", "--soc", "SM8650", "--precision", "a16w8", "--tokens", 12, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{") :])
    for graph in found["graphs"]:
        assert (
            set(graph["elsewhere"]) <= {"QuantizeLinear", "DequantizeLinear"} and len(graph["elsewhere"]) < 40
        )
    assert 1e-3 < found["relative_l2"] < 0.25
    target = ("--target", "qnn", "--soc", "SM8650", "--no-share", "--precision", "a16w8", *options)
    assert run("export", CHECKPOINT, "-o", tmp_path / "c", *target).exit_code == 0
    assert manifest.read(tmp_path / "c").dtype == "a16w8"
    model = flrc_runtime.load(tmp_path / "c", providers=[SIMULATOR])
    assert len(flrc_runtime.generate(model, "Once", max_tokens=10, chat=False).token_ids) == 10


def test_what_cannot_be_is_one_sentence(compiled: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    assert run("export", CHECKPOINT, "-o", shared, "--target", "qnn", "--soc", "SM8650").exit_code == 0
    for arguments, code, message in (
        (("generate", compiled, "x"), 2, "was compiled for a Qualcomm NPU"),
        (("generate", shared, "x", "--provider", SIMULATOR), 2, "share their weights"),
        (("place", compiled, "--soc", "SM8650"), 2, "was compiled for a Qualcomm NPU"),
        (("place", CHECKPOINT, "--soc", "SM8650"), 3, "is a checkpoint, not a bundle"),
        (
            ("export", CHECKPOINT, "-o", tmp_path / "x", "--target", "qnn", "--soc", "SM1"),
            2,
            "SoC 'SM1' is unknown",
        ),
        (("export", CHECKPOINT, "-o", shared, "--target", "qnn", "--soc", "SM8650"), 2, "exists already"),
    ):
        done = run(*arguments)
        assert (done.exit_code, message in done.stderr) == (code, True), (arguments, done.output)
        assert len([line for line in done.stderr.splitlines() if line.startswith("Error: ")]) == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "qnn"], "--target qnn and --soc go together"),
        (["--soc", "SM8650"], "--target qnn and --soc go together"),
        (["--graph", "optimum", "--target", "qnn", "--soc", "SM8650"], "--target qnn compiles static graphs"),
        (["--prefill", "8"], "--prefill is for --graph static"),
        (["--graph", "static", "--prefill", "1"], "prefill 1 must lie between 2 and"),
        (["--graph", "static", "--context", "64", "--prefill", "65"], "prefill 65 must lie between 2 and"),
        (["--graph", "static", "--context", "100000"], "context 100000 must lie between"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run("export", CHECKPOINT, "-o", tmp_path / "out", *arguments)
    assert (done.exit_code, message in done.stderr) == (2, True), done.output
    assert not (tmp_path / "out").exists()


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from flrc_runtime import providers

    providers._plugin.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    done = run("export", CHECKPOINT, "-o", tmp_path / "out", "--target", "qnn", "--soc", "SM8650")
    providers._plugin.cache_clear()
    assert done.exit_code == 2 and "needs the package onnxruntime-qnn" in done.stderr


def test_a_compiled_part_in_no_file_of_the_folder(compiled: Any, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(compiled, tmp_path / "copy"))
    graph = (folder / "stage_1.onnx").read_bytes()
    assert b"stage_1_qnn.bin" in graph
    (folder / "stage_1.onnx").write_bytes(graph.replace(b"stage_1_qnn.bin", b"../etc/password"))
    manifest.seal(folder, manifest.parse(folder))
    done = run("generate", folder, "x", "--provider", SIMULATOR)
    assert done.exit_code == 3 and "what was compiled is in no file of this folder" in done.stderr
