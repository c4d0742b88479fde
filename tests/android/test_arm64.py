"""The arm64 library that is inside the APK, under qemu: a phone's processor computes what this one does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import arm64_check
import fetch_tools
import numpy as np
import pytest

import flrc_runtime
from flrc_exporters.bundle import export
from kernels.build import PLATFORMS, cross_compiler
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
    export(compressed_stories.checkpoint, tmp_path / "bundle", dtype=dtype, accuracy_level=0, stock=True)
    lines = arm64_check.compare(tmp_path / "bundle")
    assert [line["core"] for line in lines] == ["cortex-a53", "cortex-a76", "max"]
    for line in lines:
        assert 0 < line["relative_l2"] <= 1e-5
        assert line["same_best_token"] == 1
        assert line["moves"] >= 5


@pytest.mark.usefixtures("emulator")
def test_activations_rounded_to_int8_stay_near(compressed_stories: Any, tmp_path: Path) -> None:
    for name, level in (("rounded", 4), ("exact", 0)):
        export(
            compressed_stories.checkpoint,
            tmp_path / name,
            dtype="int4",
            accuracy_level=level,  # type: ignore[arg-type]
            stock=True,
        )
    *cores, here = arm64_check.compare(tmp_path / "rounded", tmp_path / "exact")
    for line in cores:
        assert 1e-4 < line["relative_l2"] <= 0.05
        assert line["same_best_token"] >= 0.9
        # No phone's rounding is worse than this machine's by more than chance.
        assert line["to_exact"]["relative_l2"] <= 1.5 * here["to_exact"]["relative_l2"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the programs and the operator library of the APK."""
    folder = tmp_path_factory.mktemp("arm64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arm64_check, "fetch", lambda: TOOLS)
        arm64_check.build(folder)
    if cross_compiler(PLATFORMS["android-arm64"]) is None:
        pytest.skip("no compiler of Android's operator library is here (make test-needs NEEDS=--install)")
    arm64_check.build_kernels(folder)
    return folder


@pytest.mark.parametrize(("core", "isa"), [("max", "neon"), ("cortex-a76", ""), ("cortex-a53", "")])
@pytest.mark.parametrize("dtype", ["fp32", "int8", "int4"])
def test_own_operators_give_the_bytes_of_this_machine(
    emulator: None,
    built: Path,
    own_bundles: dict[str, Path],
    dtype: str,
    core: str,
    isa: str,
) -> None:
    del emulator
    bundle, ids = own_bundles[dtype], np.random.default_rng(0).integers(3, 500, 40).tolist()
    stages = [0] * 19 + [i // 3 % 3 for i in range(21)]
    decoder = flrc_runtime.load(bundle, threads=1, context=64).decoder()
    wanted = [*decoder.feed(ids[:19], 0)]
    wanted += [decoder.step(i, s).copy() for i, s in zip(ids[19:], stages[19:], strict=True)]
    kernels = built / PLATFORMS["android-arm64"].file
    found = arm64_check.emulated(
        *(QEMU, built, bundle, ids, stages, core),  # type: ignore[arg-type]
        prompt=19,
        kernels=kernels,
        isa=isa,
    )
    assert found.tobytes() == np.stack(wanted).astype("<f4").tobytes()


@pytest.fixture(scope="module")
def own_bundles(compressed_stories: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("own")
    for dtype in ("fp32", "int8", "int4"):
        export(compressed_stories.checkpoint, folder / dtype, dtype=dtype)  # type: ignore[arg-type]
    return {dtype: folder / dtype for dtype in ("fp32", "int8", "int4")}


@pytest.mark.full
@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize(("dtype", "stock"), [("fp32", True), ("int4", True), ("int4", False)])
def test_smollm2(real_cache: Path, tmp_path: Path, dtype: Any, stock: bool) -> None:
    if not (real_cache / "models" / "smollm2-135m").is_dir():
        pytest.skip("smollm2-135m is not on this machine (flrc-edge pull smollm2-135m)")
    from flrc_edge.compression import compress
    from flrc_edge.settings import Settings

    settings = Settings(keep=(0.9, 0.8, 0.7), tokens=4096, boundaries=(8, 16), allocator="spectrum")
    compress("smollm2-135m", tmp_path / "checkpoint", settings)
    export(tmp_path / "checkpoint", tmp_path / "bundle", dtype=dtype, accuracy_level=0, stock=stock)
    for line in arm64_check.compare(tmp_path / "bundle"):
        assert line["equal"] is not stock and line["relative_l2"] <= 1e-5
