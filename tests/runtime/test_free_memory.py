"""Pages of a mapped file leave the process, and come back as they were."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flrc_runtime import load
from flrc_runtime.free_memory import let_go
from flrc_runtime.packing import find_packed
from flrc_runtime.shared_weights import PACKED_WEIGHTS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is in memory")
PAGES = 300


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path.resolve() / "weights of a model.bin"
    path.write_bytes(np.arange(PAGES * mmap.PAGESIZE // 8).tobytes())
    return path


@pytest.fixture
def mapped(file: Path) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """The file as onnxruntime maps it: private, so that writing would copy a page."""
    with file.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    yield np.frombuffer(pages, np.int64)


def resident(file: Path) -> int:
    """Bytes of a file that are in this process."""
    total, ours = 0, False
    for line in os.fsdecode(Path("/proc/self/smaps").read_bytes()).splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_pages_that_were_read_go_and_come_back(file: Path, mapped: np.ndarray[Any, Any]) -> None:
    before = int(mapped.sum())
    assert resident(file) == PAGES * mmap.PAGESIZE
    let_go(file)
    assert resident(file) == 0
    assert int(mapped.sum()) == before and resident(file) == PAGES * mmap.PAGESIZE


def test_pages_that_were_written_to_stay(file: Path, mapped: np.ndarray[Any, Any]) -> None:
    mapped[-1] = -7
    let_go(file)
    assert mapped[-1] == -7 and resident(file) > 0


def test_another_file_is_left_alone(file: Path, mapped: np.ndarray[Any, Any]) -> None:
    assert mapped.sum() > 0
    let_go(file.parent)
    assert resident(file) == PAGES * mmap.PAGESIZE


def test_no_file_no_error(tmp_path: Path) -> None:
    let_go(tmp_path / "none")


def test_a_bundle_takes_memory_as_it_is_used(
    stories_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLRC_EDGE_CACHE", str(tmp_path))
    model = load(stories_bundle, threads=1)
    found = find_packed(model.manifest)
    assert found is not None
    weights = (found / PACKED_WEIGHTS).resolve()
    assert resident(weights) == 0
    expected = load(stories_bundle, threads=1, pack=False).logits([5, 6, 7], stages=[0, 1, 1])
    assert np.array_equal(model.logits([5, 6, 7], stages=[0, 1, 1]), expected)
    assert resident(weights) > 0


def test_names_that_are_not_text(file: Path, mapped: np.ndarray[Any, Any]) -> None:
    """Another library may have mapped a file of any name; that must not look like damaged weights."""
    other = os.fsdecode(os.fsencode(file.parent) + b"/\xff")
    Path(other).write_bytes(b"0" * mmap.PAGESIZE)
    with Path(other).open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ):
        assert mapped.sum() > 0
        let_go(file)
    assert resident(file) == 0
