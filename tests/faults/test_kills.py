"""SIGKILL at random points: what is run again ends in the same bytes, and nothing of the killed run is left."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import SMALL, STORIES, hashes

COMPRESS = (*SMALL, "--tokens", "4096")


def compress(zygote: Any, place: Path, **options: Any) -> Any:
    return zygote.run(
        "compress", STORIES, "-o", place / "out", *COMPRESS, cache=place.parent / "cache", **options
    )


def leftovers(place: Path) -> list[str]:
    cache = place.parent / "cache"
    parts = [p.name for kind in ("statistics", "losses") for p in (cache / kind).glob(".*")]
    return sorted([p.name for p in place.iterdir() if p.name != "out"] + parts)


def check_compress(zygote: Any, folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill ``kills`` runs, some of them several times in a row; return how often something of it was gone on with."""
    rng = random.Random(seed)
    (folder / "whole" / "place").mkdir(parents=True)
    whole = compress(zygote, folder / "whole" / "place")
    assert whole.status == 0, whole.log
    wanted = hashes(folder / "whole" / "place" / "out")
    found = {"killed": 0, "gone on": 0, "runs": 0}
    while found["killed"] < kills:
        place = folder / str(found["runs"]) / "place"
        place.mkdir(parents=True)
        found["runs"] += 1
        for _ in range(rng.choice((1, 1, 2, 3))):
            run = compress(zygote, place, delay=rng.uniform(0, whole.seconds))
            found["killed"] += run.status == -9
            assert run.status in (0, -9), run.log
            if run.status == 0:
                break
            if (place / "out").exists():  # killed after it was published
                assert hashes(place / "out") == wanted
                break
        last = compress(zygote, place) if not (place / "out").exists() else run
        assert last.status in (0, -9), last.log
        found["gone on"] += "going on after" in last.log or "taken from the cache" in last.log
        assert hashes(place / "out") == wanted
        if last.status == 0:
            assert leftovers(place) == []
    return found


def test_compress(zygote: Any, tmp_path: Path) -> None:
    found = check_compress(zygote, tmp_path, 8, seed=0)
    print(found)
    assert found["gone on"] > 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_request_to_end_is_obeyed_and_says_how_to_go_on(
    zygote: Any, tmp_path: Path, number: int, code: int
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "whole").mkdir()
    whole = compress(zygote, tmp_path / "whole" / "place")
    assert whole.status == 0, whole.log
    run = compress(zygote, place, after="Calibrating: 48/96", signal=number)
    assert run.status == code, run.log
    assert "What was measured is kept; go on with: flrc-edge" in run.log
    assert "Traceback" not in run.log
    assert list(place.iterdir()) == []
    assert compress(zygote, place).status == 0
    assert hashes(place / "out") == hashes(tmp_path / "whole" / "place" / "out")


def check_export(zygote: Any, folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill exports over an older bundle: old or new is there at any time, and the next one leaves nothing else."""
    rng = random.Random(seed)
    folder.mkdir()
    cache = folder / "cache"

    def export(out: Path, dtype: str, **options: Any) -> Any:
        checkpoint = folder / "checkpoint"
        return zygote.run(
            "export", checkpoint, "-o", out, "--dtype", dtype, "--overwrite", cache=cache, **options
        )

    made = zygote.run("compress", STORIES, "-o", folder / "checkpoint", *COMPRESS, cache=cache)
    assert made.status == 0, made.log
    place = folder / "place"
    place.mkdir()
    wanted, seconds = {}, 0.0
    for dtype in ("int8", "int4"):
        run = export(folder / dtype, dtype)
        assert run.status == 0, run.log
        wanted[dtype], seconds = hashes(folder / dtype), run.seconds
    found = {"killed": 0, "old": 0, "new": 0}
    assert export(place / "out", "int8").status == 0
    before = "int8"
    while found["killed"] < kills:
        after = "int4" if before == "int8" else "int8"
        run = export(place / "out", after, delay=rng.uniform(0, 1.1 * seconds))
        assert run.status in (0, -9), run.log
        found["killed"] += run.status == -9
        now = hashes(place / "out")
        assert now in (wanted[before], wanted[after])
        found["new" if now == wanted[after] else "old"] += 1
        before = after if now == wanted[after] else before
        if run.status == 0:
            assert [p.name for p in place.iterdir()] == ["out"]
    assert export(place / "out", "int8").status == 0
    assert [p.name for p in place.iterdir()] == ["out"]
    return found


def test_export(zygote: Any, tmp_path: Path) -> None:
    found = check_export(zygote, tmp_path / "export", 8, seed=0)
    print(found)
    assert found["old"] > 0


@pytest.mark.full
def test_two_hundred_kills(zygote: Any, tmp_path: Path) -> None:
    compressed = check_compress(zygote, tmp_path / "compress", 200, seed=1)
    exported = check_export(zygote, tmp_path / "export", 200, seed=1)
    print(compressed, exported)
    assert (
        compressed["gone on"] >= 25
    )  # of the runs that ended; many are killed before the first layer is done
    assert min(exported["old"], exported["new"]) >= 5
