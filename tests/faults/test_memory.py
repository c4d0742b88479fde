"""Memory that runs out: one sentence or a process that dies, nothing half-written, and the next run ends as ever."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from flrc_edge import peak_memory
from tests.faults.conftest import SMALL, STORIES, Run, hashes

STEP = 2**18


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text so short that the memory goes to torch, not to the tokenizer."""
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a little girl who had a red ball. " * 600)
    return path


def check(zygote: Any, folder: Path, text: Path, rooms: range) -> dict[str, int]:
    """Compress with so many times 256 KiB beyond what a process begins with; return how the runs ended."""

    def compress(place: Path, **options: Any) -> Run:
        place.mkdir(parents=True, exist_ok=True)
        arguments = (*SMALL, "--tokens", "4096", "--calibration", text)
        run: Run = zygote.run(
            "compress", STORIES, "-o", place / "out", *arguments, cache=place.parent / "cache", **options
        )
        return run

    assert compress(folder / "whole" / "place").status == 0
    wanted = hashes(folder / "whole" / "place" / "out")
    ends = {"refused": 0, "died": 0, "ended": 0}
    for room in rooms:
        place = folder / str(room) / "place"
        run = compress(place, room=room * STEP)
        assert "Traceback" not in run.log
        if run.status == 0:
            ends["ended"] += 1
        else:
            assert run.status in (1, 3, -6), (
                run.log
            )  # 3: a file cannot be mapped; -6: the tokenizer's library aborts
            ends["died" if run.status == -6 else "refused"] += 1
            if run.status != -6:
                assert run.log.count("Error: ") == 1
                assert "memory" in run.log.split("Error: ")[1]
                assert not any(place.iterdir())
            assert not (place / "out").exists()
            assert compress(place).status == 0
        assert hashes(place / "out") == wanted
        assert [p.name for p in place.iterdir()] == ["out"]
    return ends


def test_some_rooms(zygote: Any, tmp_path: Path, text: Path) -> None:
    ends = check(zygote, tmp_path, text, range(0, 16, 4))
    print(ends)
    assert ends["refused"] + ends["died"] > 0


@pytest.mark.full
def test_many_rooms(zygote: Any, tmp_path: Path, text: Path) -> None:
    ends = check(zygote, tmp_path, text, range(40))
    print(ends)
    assert min(ends["refused"], ends["ended"]) > 0


def test_scarce_memory_is_named_before_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peak_memory, "peak_rss_bytes", lambda: 10**9)
    monkeypatch.setattr(peak_memory, "memory_bytes", lambda: (8 * 10**9, 2 * 10**9))
    with caplog.at_level(logging.WARNING):
        peak_memory.warn_if_scarce(3 * 10**9)
        assert not caplog.messages
        peak_memory.warn_if_scarce(4 * 10**9)
    assert "takes about 4.0 GB of memory and 3.0 GB are free" in caplog.text
    monkeypatch.setattr(peak_memory, "memory_bytes", lambda: None)  # a system that does not tell
    peak_memory.warn_if_scarce(10**12)
