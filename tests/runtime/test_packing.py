"""Weights packed for this machine: the same answers, one copy, and a cache that may fail."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flrc_runtime import FlrcError, FormatError, load, manifest, packing
from flrc_runtime.packing import evict, find_packed, pack, packed_place
from flrc_runtime.protobuf import encoded, fields
from flrc_runtime.shared_weights import PACKED_WEIGHTS, SharedWeights

IDS = list(range(5, 60))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLRC_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


@pytest.fixture(
    scope="module", params=["plain-fp32", "plain-int8", "plain-int4", "pivoted-fp32", "pivoted-int4"]
)
def exported(
    request: pytest.FixtureRequest,
    compressed_stories: Any,
    pivoted_stories: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Three stages of stories260k in one storage form and number format."""
    from flrc_exporters.bundle import export

    storage, dtype = request.param.split("-")
    source = pivoted_stories if storage == "pivoted" else compressed_stories
    folder = tmp_path_factory.mktemp("packing") / request.param
    export(source.checkpoint, folder, dtype=dtype)
    return folder


def test_the_same_logits_through_all_stages(exported: Path, cache: Path) -> None:
    portable = load(exported, threads=1, pack=False)
    assert not cache.exists()
    stages = [i % portable.num_stages for i in range(len(IDS))]
    expected = portable.logits(IDS, stages=stages)
    for _ in range(2):  # made, then found
        packed = load(exported, threads=1)
        assert np.array_equal(packed.logits(IDS, stages=stages), expected)
    (entry,) = cache.iterdir()
    content = manifest.read(exported)
    assert sorted(p.name for p in entry.iterdir()) == sorted(
        [PACKED_WEIGHTS, *(stage.graph for stage in content.stages)]
    )
    # Raw and packed bytes of all stages, each once: what stage 0 alone has, for it has every chunk.
    weights = (exported / "weights.bin").stat().st_size
    assert (entry / PACKED_WEIGHTS).stat().st_size < 3 * weights + 4096 * 400


def test_a_prompt_is_read_without_the_logits_of_all_positions(exported: Path, cache: Path) -> None:
    ids = [1, *range(5, 300)]  # two chunks
    for pack_it in (False, True):
        model = load(exported, threads=1, pack=pack_it)
        for stage in range(model.num_stages):
            names = {n.name for n in model.sessions.get(stage).get_overridable_initializers()}
            assert names == {"logits_start"}
            last, all_positions = model.decoder(), model.decoder()
            found, expected = last.prefill(ids, stage), all_positions.feed(ids, stage)
            assert expected.shape == (len(ids), 512) and found.shape == (512,)
            np.testing.assert_allclose(found, expected[-1], rtol=0, atol=1e-3)
            assert last.length == all_positions.length == len(ids)
            step = [d.step(7, stage).copy() for d in (last, all_positions)]  # the caches hold the same
            np.testing.assert_allclose(*step, rtol=0, atol=1e-3)


def test_stages_share_every_tensor(bundle: Any, cache: Path, tmp_path: Path) -> None:
    folder = bundle.folder
    all_stages = pack(folder, manifest.read(folder)) / PACKED_WEIGHTS
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone)
    content = manifest.read(alone)
    (alone / content.stages[1].graph).write_bytes((alone / content.stages[0].graph).read_bytes())
    manifest.seal(alone, content)
    one_stage = pack(alone, manifest.read(alone)) / PACKED_WEIGHTS
    assert all_stages.stat().st_size == one_stage.stat().st_size


def test_another_bundle_or_onnxruntime_or_processor_is_another_entry(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    content = manifest.read(copied)
    places = {packed_place(content)}
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "__version__", "1.99.0")
        places.add(packed_place(content))
    with monkeypatch.context() as patch:
        patch.setattr(packing, "processor", lambda: "another")
        places.add(packed_place(content))
    (copied / "weights.bin").write_bytes((copied / "weights.bin").read_bytes()[:-1] + b"\0")
    manifest.seal(copied, content)
    places.add(packed_place(manifest.read(copied)))
    assert len(places) == 4 and packed_place(content) in places


def test_a_cache_that_cannot_be_written(
    bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLRC_EDGE_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        model = load(bundle.folder, threads=1)
    assert "cannot be written" in caplog.text and "copy of its weights" in caplog.text
    assert model.logits(IDS).shape == (len(IDS), 512)


def test_no_room(
    bundle: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(Path.cwd())._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    load(bundle.folder, threads=1)
    assert "are needed to pack" in caplog.text
    assert list(cache.iterdir()) == []


def test_a_damaged_bundle_is_refused_and_leaves_nothing(copied: Path, cache: Path) -> None:
    content = manifest.read(copied)
    (copied / "stage_1.onnx").write_bytes((copied / "stage_1.onnx").read_bytes()[:500])
    manifest.seal(copied, content)
    with pytest.raises(FormatError, match="a protobuf message is damaged"):
        load(copied)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", ["graph", "weights"])
def test_a_damaged_entry_is_made_again(
    bundle: Any, cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    expected = load(bundle.folder, threads=1).logits(IDS)
    (entry,) = cache.iterdir()
    file = entry / (PACKED_WEIGHTS if damage == "weights" else manifest.read(bundle.folder).stages[0].graph)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert np.array_equal(load(bundle.folder, threads=1).logits(IDS), expected)
    assert "are damaged and were removed" in caplog.text and not entry.exists()
    caplog.clear()
    assert np.array_equal(load(bundle.folder, threads=1).logits(IDS), expected)
    assert entry.exists() and not caplog.text


def test_several_processes_at_once(bundle: Any, cache: Path) -> None:
    code = (
        "import sys, flrc_runtime; m = flrc_runtime.load(sys.argv[1], threads=1);"
        "print(float(abs(m.logits(list(range(5, 60)))).sum()))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(bundle.folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for _ in range(4)
    ]
    ended = [process.communicate() for process in running]
    assert all(process.returncode == 0 for process in running), ended
    assert len({out for out, _ in ended}) == 1 and all(not err for _, err in ended)
    assert [p.name.startswith(".") for p in cache.iterdir()] == [False]


def test_the_least_recently_used_go_first(bundle: Any, cache: Path) -> None:
    content = manifest.read(bundle.folder)
    kept = pack(bundle.folder, content)
    now = time.time()
    for age, name in enumerate(("newer", "older", "oldest"), 1):
        (cache / name).mkdir()
        (cache / name / PACKED_WEIGHTS).write_bytes(b"\0" * 1000)
        os.utime(cache / name, (now - 100 * age,) * 2)
    os.utime(kept, (now - 1000,) * 2)  # the oldest of all, but in use
    size = sum(f.stat().st_size for f in kept.iterdir())
    evict(keep=kept, limit=size + 1500)
    assert {p.name for p in cache.iterdir()} == {kept.name, "newer"}
    assert find_packed(content) == kept and kept.stat().st_mtime > now - 100  # used now


def test_what_a_killed_run_left_goes_after_a_day(bundle: Any, cache: Path) -> None:
    for name, age in ((".a.tmp-1", 2 * packing.STALE), (".b.tmp-2", 60.0)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    pack(bundle.folder, manifest.read(bundle.folder))
    assert not (cache / ".a.tmp-1").exists() and (cache / ".b.tmp-2").exists()


def test_messages_are_copied_byte_for_byte() -> None:
    message = encoded(300, b"x" * 200) + b"\x08\x96\x01" + b"\x11" + b"\1" * 8 + b"\x1d" + b"\2" * 4
    found = list(fields(memoryview(message)))
    assert [f.number for f in found] == [300, 1, 2, 3]
    assert b"".join(f.encoded for f in found) == message and bytes(found[0].value or b"") == b"x" * 200
    for cut in range(1, len(message)):
        whole = b""
        try:
            whole = b"".join(f.encoded for f in fields(memoryview(message)[:cut]))
        except FormatError:
            continue
        assert whole == message[:cut]  # cut between two fields


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../else", "length": "4"}, "not in data"),
        ({"location": "data", "offset": "90", "length": "20"}, "damaged"),
        ({"location": "data", "offset": "-1", "length": "2"}, "damaged"),
        ({"location": "data"}, "damaged"),
        ({"location": "data", "length": "4", "prepacked_0": "k|1;2"}, "damaged"),
    ],
)
def test_damaged_external_data(tmp_path: Path, entries: dict[str, str], message: str) -> None:
    tensor = b"".join(
        encoded(13, encoded(1, k.encode()) + encoded(2, v.encode())) for k, v in entries.items()
    )
    (tmp_path / "graph").write_bytes(encoded(7, encoded(5, tensor)))
    (tmp_path / "data").write_bytes(b"\0" * 100)
    with (tmp_path / "out").open("wb") as file, pytest.raises(FormatError, match=message):
        SharedWeights(file, "out").move(tmp_path / "graph", tmp_path / "data")


def test_an_onnxruntime_that_is_too_old_opens_nothing(
    bundle: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.24.1")
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: pytest.fail("a graph was opened"))
    with pytest.raises(FlrcError, match=r"1\.24\.1 is too old"):
        load(bundle.folder)
    assert not cache.exists()
