"""Stock stages through WebGPU, on the software adapter that Chromium carries."""

from __future__ import annotations

import ctypes.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "schema_2"  # whose bundles are of onnxruntime's operators
SWIFTSHADER = Path("/usr/lib/chromium/libvk_swiftshader.so")
# Lengths of the sequence, from the attention mask: small integers that onnxruntime keeps on the CPU.
LENGTHS = {"Cast", "Gather", "ReduceSum", "Shape", "Sub"}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process that sees the software adapter; this process must not load its driver."""
    pytest.importorskip("onnxruntime_ep_webgpu", reason="onnxruntime-ep-webgpu is not installed")
    if not SWIFTSHADER.exists() or ctypes.util.find_library("vulkan") is None:
        pytest.skip("there is no software adapter (packages chromium and libvulkan1)")
    driver = tmp_path_factory.mktemp("driver") / "icd.json"
    icd = {"library_path": str(SWIFTSHADER), "api_version": "1.1.0"}
    driver.write_text(json.dumps({"file_format_version": "1.0.0", "ICD": icd}))
    return {**os.environ, "VK_DRIVER_FILES": str(driver), "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1"}


def run(adapter: dict[str, str], *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "flrc_edge", "-q", *map(str, arguments)],
        env=adapter,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["plain", "pivoted"])
def test_compute_is_on_the_gpu_and_exact(adapter: dict[str, str], kind: str) -> None:
    found = json.loads(run(adapter, "place", GOLDEN / kind / "bundle", "--provider", "webgpu", "--json"))
    assert len(found["graphs"]) == 3
    for graph in found["graphs"]:
        assert set(graph["elsewhere"]) <= LENGTHS and len(graph["elsewhere"]) < 12
        assert graph["placed"] > 80
    assert found["relative_l2"] <= 1e-4 and found["top1"] == 1


def test_an_answer_is_that_of_the_cpu(adapter: dict[str, str]) -> None:
    bundle = GOLDEN / "pivoted" / "bundle"
    expected = json.loads((GOLDEN / "pivoted" / "answer.json").read_text())
    for speculative in ([], ["--speculative"]):  # which goes back and forth
        found = json.loads(
            run(
                adapter,
                *("generate", bundle, expected["prompt"], "--raw", "--max-tokens", 20, "--json"),
                *("--provider", "webgpu", *speculative),
            )
        )
        if not speculative:
            assert found["tokens"] == expected["ids"][:20]
        assert len(found["tokens"]) == 20


def test_without_an_adapter_the_cpu_answers(adapter: dict[str, str]) -> None:
    bare = {
        k: v
        for k, v in adapter.items()
        if k not in ("VK_DRIVER_FILES", "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER")
    }
    bundle = GOLDEN / "plain" / "bundle"
    command = [sys.executable, "-m", "flrc_edge", "generate", str(bundle), "Once", "--max-tokens", "4"]
    both = [*command, "--provider", "webgpu", "--provider", "cpu"]
    done = subprocess.run(both, env=bare, capture_output=True, text=True, check=False)
    if "WebGpuExecutionProvider" not in done.stderr:
        pytest.skip("this machine has a GPU")
    assert done.returncode == 0 and "; using CPUExecutionProvider" in done.stderr
    alone = subprocess.run(
        [*command, "--provider", "webgpu"], env=bare, capture_output=True, text=True, check=False
    )
    assert alone.returncode == 2 and "finds no device on this machine" in alone.stderr
