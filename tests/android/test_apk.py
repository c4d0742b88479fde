"""The APK: built, signed, looked at; and its engine, turned back from dex, computes what it has to."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import build_apk
import dex_roundtrip
import fetch_sdk
import fetch_tools
import numpy as np
import pytest

from flrc_exporters.bundle import export
from tests.android.conftest import DEMO, SDK, TOOLS, java_command, needs_onnxruntime, runner, sources
from tests.android.vectors import check_answers, check_logits

MEGABYTE = 10**6


@pytest.fixture(scope="module")
def apk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [*fetch_sdk.missing_packages()]
    if missing:
        pytest.skip(f"no APK is built without {', '.join(missing)}")
    if not all(
        path.is_file() for path in (SDK / "d8.jar", SDK / "android.jar", TOOLS / fetch_tools.AAR_FILE)
    ):
        pytest.skip("the APK's build tools are not on this machine (make apk)")
    target = tmp_path_factory.mktemp("apk") / "flrc-edge.apk"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch_tools, "fetch", lambda: TOOLS)
        patch.setattr(fetch_sdk, "fetch", lambda: SDK)
        build_apk.build(target, key=target.with_name("key"), password="a test")
    return target


def test_gradle_builds_the_same_app() -> None:
    manifest = (DEMO / "app" / "src" / "main" / "AndroidManifest.xml").read_text()
    gradle = (DEMO / "app" / "build.gradle.kts").read_text()
    for name, setting in (
        ("package", "applicationId"),
        ("minSdkVersion", "minSdk"),
        ("targetSdkVersion", "targetSdk"),
        ("versionCode", "versionCode"),
        ("versionName", "versionName"),
    ):
        here = re.search(rf'{name}="([^"]+)"', manifest)
        there = re.search(rf'{setting} = "?([^"\n]+)', gradle)
        assert here is not None
        assert there is not None
        assert here[1] == there[1], name
    assert f'minSdkVersion="{build_apk.MIN_API}"' in manifest
    assert f'abiFilters += "{build_apk.ABI}"' in gradle
    assert f"onnxruntime-android:{fetch_tools.ONNXRUNTIME}" in gradle
    assert "uses-permission" not in manifest


def test_what_is_in_it(apk: Path) -> None:
    with zipfile.ZipFile(apk) as archive, zipfile.ZipFile(TOOLS / fetch_tools.AAR_FILE) as aar:
        for library in ("libonnxruntime.so", "libonnxruntime4j_jni.so"):
            assert archive.read(f"lib/arm64-v8a/{library}") == aar.read(f"jni/arm64-v8a/{library}")
        page = DEMO / "app" / "src" / "main" / "assets" / "ui"
        for path in page.iterdir():
            assert archive.read(f"assets/ui/{path.name}") == path.read_bytes()
    assert 5 * MEGABYTE < apk.stat().st_size < 20 * MEGABYTE


def test_an_apk_that_was_changed_or_not_signed_is_refused(apk: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.apk"
    data = bytearray(apk.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    with pytest.raises(SystemExit, match="the signature failed"):
        build_apk.check(changed)
    unsigned = tmp_path / "unsigned.apk"
    with zipfile.ZipFile(apk) as archive, zipfile.ZipFile(unsigned, "w") as target:
        for name in archive.namelist():
            target.writestr(name, archive.read(name))
    with pytest.raises(SystemExit, match="the signature failed"):
        build_apk.check(unsigned)


@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_the_engine_in_the_apk_decodes_as_python(
    apk: Path, compressed_stories: Any, tmp_path: Path, dtype: Any
) -> None:
    needs_onnxruntime()
    if shutil.which("enjarify") is None:
        pytest.skip("enjarify is not installed")
    jar = tmp_path / "apk.jar"
    dex_roundtrip.convert(apk, jar)
    api = TOOLS / fetch_tools.JAR
    checks = sources("engine/src/decodeTest")
    command = java_command(tmp_path, sources("engine/src/main"), checks, api, apk_classes=jar)
    java = runner([*command, f"-Donnxruntime.native.path={TOOLS}"], fetch_tools.java_environment(TOOLS))
    bundle = tmp_path / "bundle"
    export(compressed_stories.checkpoint, bundle, dtype=dtype)
    random = np.random.default_rng(1)
    ids, stages = random.integers(3, 500, 64).tolist(), random.integers(0, 3, 64).tolist()
    check_logits(java, bundle, ids, stages, tmp_path)
    check_answers(java, bundle, 40)
