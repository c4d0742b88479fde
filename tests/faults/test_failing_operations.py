"""The n-th file operation fails, for every n: the old folder or the new one is there, and one sentence says why."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import SMALL, STORIES, hashes

COMPRESS = (*SMALL, "--tokens", "512")


def check_one_sentence(run: Any) -> None:
    assert run.status in (0, 1), run.log
    assert "Traceback" not in run.log and "died of" not in run.log, run.log
    assert (run.status == 1) == ("Error: " in run.log), run.log


def check_compress(zygote: Any, folder: Path, every: int) -> dict[str, int]:
    """Fail every ``every``-th operation of a compress, one in each run."""

    def compress(place: Path, fail: int | None) -> Any:
        place.mkdir(parents=True, exist_ok=True)
        return zygote.run(
            "compress",
            STORIES,
            "-o",
            place / "out",
            *COMPRESS,
            cache=place / "cache",
            fail=fail,
            watched=place,
        )

    whole = compress(folder / "whole", None)
    assert whole.status == 0, whole.log
    wanted = hashes(folder / "whole" / "out")
    found = {"operations": whole.operations, "tried": 0, "refused": 0, "tolerated": 0}
    for n in range(1, whole.operations + 1, every):
        place = folder / str(n)
        run = compress(place, n)
        check_one_sentence(run)
        found["tried"] += 1
        found["refused" if run.status else "tolerated"] += 1
        if run.status:
            assert {p.name for p in place.iterdir()} <= {"cache"}
            again = compress(place, None)
            assert again.status == 0, again.log
        assert hashes(place / "out") == wanted
        assert {p.name for p in place.iterdir()} <= {"out", "cache"}
        shutil.rmtree(place)
    return found


def check_export(zygote: Any, folder: Path, every: int) -> dict[str, int]:
    """Fail every ``every``-th operation of an export over an older bundle."""
    folder.mkdir()
    cache, checkpoint = folder / "cache", folder / "checkpoint"

    def export(out: Path, dtype: str, fail: int | None = None) -> Any:
        options = ("--dtype", dtype, "--overwrite")
        return zygote.run("export", checkpoint, "-o", out, *options, cache=cache, fail=fail, watched=folder)

    made = zygote.run("compress", STORIES, "-o", checkpoint, *COMPRESS, cache=cache)
    assert made.status == 0, made.log
    wanted = {}
    for dtype in ("int8", "int4"):
        assert export(folder / dtype, dtype).status == 0
        wanted[dtype] = hashes(folder / dtype)
    place = folder / "place"
    place.mkdir()
    shutil.copytree(folder / "int8", place / "out")
    whole = export(place / "out", "int4")
    found = {"operations": whole.operations, "tried": 0, "refused": 0, "tolerated": 0}
    for n in range(1, whole.operations + 1, every):
        shutil.rmtree(place)
        place.mkdir()
        shutil.copytree(folder / "int8", place / "out")
        run = export(place / "out", "int4", fail=n)
        check_one_sentence(run)
        found["tried"] += 1
        found["refused" if run.status else "tolerated"] += 1
        assert hashes(place / "out") == wanted["int8" if run.status else "int4"]
        if run.status:
            assert [p.name for p in place.iterdir()] == ["out"]
    assert export(place / "out", "int4").status == 0
    assert [p.name for p in place.iterdir()] == ["out"]
    return found


def test_some_of_compress(zygote: Any, tmp_path: Path) -> None:
    print(found := check_compress(zygote, tmp_path, 29))
    assert found["refused"] and found["tolerated"]


def test_some_of_export(zygote: Any, tmp_path: Path) -> None:
    print(found := check_export(zygote, tmp_path / "export", 7))
    assert found["refused"]


@pytest.mark.full
def test_all_of_both(zygote: Any, tmp_path: Path) -> None:
    print(check_compress(zygote, tmp_path / "compress", 1), check_export(zygote, tmp_path / "export", 1))
