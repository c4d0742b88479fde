"""The arm64 library that is inside the APK, under qemu: a phone's processor computes what this one does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import arm64_check
import fetch_tools
import pytest

from flrc_exporters.bundle import export
from tests.android.conftest import TOOLS

QEMU = arm64_check.installed_qemu()  # of the user's own cache, before tests get one of their own


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which(arm64_check.COMPILER) is None:
        pytest.skip(f"{arm64_check.COMPILER} is not installed ({arm64_check.COMPILER_PACKAGES})")
    if QEMU is None or not (TOOLS / fetch_tools.AAR_FILE).is_file():
        pytest.skip("qemu or the arm64 library is not on this machine (make android-arm64 BUNDLE=folder)")
    monkeypatch.setattr(arm64_check, "qemu", lambda: QEMU)
    monkeypatch.setattr(arm64_check, "fetch", lambda: TOOLS)


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_exact_graphs_give_the_same_logits(compressed_stories: Any, tmp_path: Path, dtype: Any) -> None:
    export(compressed_stories.checkpoint, tmp_path / "bundle", dtype=dtype, accuracy_level=0)
    lines = arm64_check.compare(tmp_path / "bundle")
    assert [line["core"] for line in lines] == ["cortex-a53", "cortex-a76", "max"]
    for line in lines:
        assert 0 < line["relative_l2"] <= 1e-5
        assert line["same_best_token"] == 1
        assert line["moves"] >= 5


@pytest.mark.usefixtures("emulator")
def test_activations_rounded_to_int8_stay_near(compressed_stories: Any, tmp_path: Path) -> None:
    for name, level in (("rounded", 4), ("exact", 0)):
        export(compressed_stories.checkpoint, tmp_path / name, dtype="int4", accuracy_level=level)  # type: ignore[arg-type]
    *cores, here = arm64_check.compare(tmp_path / "rounded", tmp_path / "exact")
    for line in cores:
        assert 1e-4 < line["relative_l2"] <= 0.05
        assert line["same_best_token"] >= 0.9
        # No phone's rounding is worse than this machine's by more than chance.
        assert line["to_exact"]["relative_l2"] <= 1.5 * here["to_exact"]["relative_l2"]


@pytest.mark.full
@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_smollm2(real_cache: Path, tmp_path: Path, dtype: Any) -> None:
    if not (real_cache / "models" / "smollm2-135m").is_dir():
        pytest.skip("smollm2-135m is not on this machine (flrc-edge pull smollm2-135m)")
    from flrc_edge.compression import compress
    from flrc_edge.settings import Settings

    settings = Settings(keep=(0.9, 0.8, 0.7), tokens=4096, boundaries=(8, 16), allocator="spectrum")
    compress("smollm2-135m", tmp_path / "checkpoint", settings)
    export(tmp_path / "checkpoint", tmp_path / "bundle", dtype=dtype, accuracy_level=0)
    for line in arm64_check.compare(tmp_path / "bundle"):
        assert 0 < line["relative_l2"] <= 1e-5
