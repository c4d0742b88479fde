"""Statistics between runs: found again, measured again when anything differs, never a reason to fail."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flrc_edge import compression as compressing
from flrc_edge import statistics_cache
from flrc_edge.calibration import Moments, Statistics
from flrc_edge.models import open_model
from flrc_edge.statistics_cache import KEPT, cached_matrices
from flrc_edge.statistics_cache import cached_statistics as cached
from flrc_edge.texts import WeightedText


def some_statistics(seed: int = 0) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    return Statistics(
        {
            name: Moments(
                torch.randn(3, 3, generator=generator, dtype=torch.float64),
                torch.randn(2, 2, generator=generator, dtype=torch.float64),
                0.1 + seed, 1 / 3, 1e-30,
                torch.randn(3, 3, generator=generator, dtype=torch.float64),
            )
            for name in ("a.b", "a.energy")
        },
        2.5, 1024,
    )  # fmt: skip


NAMES = ("a.b", "a.energy")


def cached_statistics(fingerprint: str | None, make: Callable[[], Statistics]) -> Statistics:
    """Put what ``make`` returns into the mapping of the cache, as a calibration does."""

    def compute(into: MutableMapping[str, Moments] | None, _: Path | None) -> Statistics:
        found = make()
        if into is None:
            return found
        for name in reversed(NAMES):
            into[name] = found.moments[name]
        return replace(found, moments=into)

    return cached(fingerprint, NAMES, compute)


def equal(a: Statistics, b: Statistics) -> bool:
    return (
        (a.loss, a.tokens, a.moments.keys()) == (b.loss, b.tokens, b.moments.keys())
        and all(
            torch.equal(a.moments[n].energy, b.moments[n].energy)
            and torch.equal(a.moments[n].weighted, b.moments[n].weighted)
            and torch.equal(a.moments[n].gradient, b.moments[n].gradient)
            and a.moments[n].gradient_trace == b.moments[n].gradient_trace
            and a.moments[n].fisher_g2 == b.moments[n].fisher_g2
            and a.moments[n].fisher_gw2 == b.moments[n].fisher_gw2
            for n in a.moments
        )
    )  # fmt: skip


def forbidden() -> Statistics:
    pytest.fail("measured again")


def test_found_again_to_the_last_bit(cache: Path) -> None:
    first = cached_statistics("f", some_statistics)
    assert equal(first, some_statistics())
    again = cached_statistics("f", forbidden)
    assert equal(again, first) and again.moments["a.b"].energy.dtype == torch.float64
    assert list(again.moments) == list(NAMES)  # the order of the model, not that of the calibration
    assert [p.name for p in (cache / "statistics").iterdir()] == ["f"]
    files = {"a.b.safetensors", "a.energy.safetensors", "totals.safetensors"}
    assert {p.name for p in (cache / "statistics" / "f").iterdir()} == files


def test_without_a_fingerprint_nothing_is_stored(cache: Path) -> None:
    assert equal(cached_statistics(None, some_statistics), some_statistics())
    assert not cache.exists()


def test_several_processes_measure_together(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_statistics("f", some_statistics)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert equal(cached_statistics("f", lambda: some_statistics(1)), some_statistics(1))


@pytest.mark.parametrize("name", ["a.b", "totals"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "other tensors", "missing", "no folder"])
def test_a_damaged_entry_is_measured_again(
    cache: Path, damage: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    cached_statistics("f", some_statistics)
    path = cache / "statistics" / "f" / f"{name}.safetensors"
    data = path.read_bytes()
    if damage == "no folder":
        shutil.rmtree(path.parent)
        path.parent.write_bytes(b"a file")
    elif damage == "missing":
        path.unlink()
    elif damage == "other tensors":
        save_file({"x": torch.ones(1)}, path)
    else:
        path.write_bytes({"truncated": data[:-8], "garbage": b"\xff" * 99, "empty": b""}[damage])
    assert equal(cached_statistics("f", lambda: some_statistics(1)), some_statistics(1))
    assert "are damaged and are measured again" in caplog.text
    if damage != "no folder":
        assert equal(cached_statistics("f", forbidden), some_statistics(1))


def test_a_cache_that_cannot_be_written(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.mkdir()
    (cache / "statistics").write_text("a file")
    assert equal(cached_statistics("f", some_statistics), some_statistics())
    assert "could not be cached" in caplog.text


@pytest.mark.parametrize("written", range(3))
def test_a_disk_that_fills_up(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, written: int
) -> None:
    """Before the first file, between two, and before the last: nothing measured is lost, nothing is left."""
    from safetensors import SafetensorError

    left, save = [written], statistics_cache.save_file

    def fills(*arguments: Any) -> None:
        if not left[0]:
            raise SafetensorError("No space left on device")
        left[0] -= 1
        save(*arguments)

    monkeypatch.setattr(statistics_cache, "save_file", fills)
    assert equal(cached_statistics("f", some_statistics), some_statistics())
    assert "could not be cached" in caplog.text and not list((cache / "statistics").iterdir())


def test_an_interrupted_calibration_is_gone_on_with(cache: Path) -> None:
    moments = some_statistics().moments

    def interrupted(into: MutableMapping[str, Moments] | None, journal: Path | None) -> Statistics:
        assert into is not None
        into["a.b"] = moments["a.b"]
        raise KeyboardInterrupt

    def gone_on(into: MutableMapping[str, Moments] | None, journal: Path | None) -> Statistics:
        assert into is not None
        assert list(into) == ["a.b"]
        into["a.energy"] = moments["a.energy"]
        return replace(some_statistics(), moments=into)

    with pytest.raises(KeyboardInterrupt):
        cached("f", NAMES, interrupted)
    (cache / "statistics" / ".f.part" / "a.energy.safetensors").write_bytes(b"half")
    assert equal(cached("f", NAMES, gone_on), some_statistics())
    assert equal(cached_statistics("f", forbidden), some_statistics())
    assert [p.name for p in (cache / "statistics").iterdir()] == ["f"]


def test_two_processes_measure_once(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Threads stand for them: each has a lock of its own on the same file."""
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> Statistics:
        begun.set()
        assert go_on.wait(30)
        return some_statistics()

    with ThreadPoolExecutor(2) as pool, caplog.at_level(logging.INFO, logger="flrc_edge"):
        first = pool.submit(cached_statistics, "f", slow)
        assert begun.wait(30)
        second = pool.submit(cached_statistics, "f", forbidden)
        while "waiting for another process" not in caplog.text:
            time.sleep(0.01)
        go_on.set()
        assert equal(first.result(30), some_statistics())
        assert equal(second.result(30), some_statistics())


def test_parts_of_other_runs_make_room(cache: Path) -> None:
    def interrupted(into: MutableMapping[str, Moments] | None, journal: Path | None) -> Statistics:
        assert into is not None
        into["a.b"] = some_statistics().moments["a.b"]
        raise KeyboardInterrupt

    for i in range(4):
        with pytest.raises(KeyboardInterrupt):
            cached(f"f{i}", NAMES, interrupted)
        os.utime(cache / "statistics" / f".f{i}.part", (1e9 + i, 1e9 + i))
    assert sorted(p.name for p in (cache / "statistics").iterdir()) == [".f2.part", ".f3.part"]


def test_moments_without_gradients_are_kept_too(cache: Path) -> None:
    """Then the weighted energy is the plain one, the same tensor."""
    energy = torch.eye(3, dtype=torch.float64)
    moments = dict.fromkeys(NAMES, Moments(energy, 2 * energy, 0.0, 0.0, 0.0, energy))
    found = cached_statistics("f", lambda: Statistics(moments, 1.0, 5))
    assert torch.equal(found.moments["a.b"].weighted, energy)  # type: ignore[arg-type]


def test_matrices(cache: Path) -> None:
    calls = []

    def compute(into: MutableMapping[str, torch.Tensor] | None, _: Path | None) -> Any:
        calls.append(into)
        target: MutableMapping[str, torch.Tensor] = {} if into is None else into
        for i, name in enumerate(NAMES):
            target[name] = torch.full((2, 2), float(i))
        return target

    for key in ("k", "k", None):
        found = cached_matrices("input-moments", key, NAMES, compute)
        assert [m[0, 0].item() for m in found.values()] == [0, 1]
    assert len(calls) == 2 and calls[1] is None


def test_only_the_newest_are_kept(cache: Path) -> None:
    for i in range(KEPT["statistics"] + 2):
        cached_statistics(f"f{i}", lambda i=i: some_statistics(i))  # type: ignore[misc]
        os.utime(cache / "statistics" / f"f{i}", (1e9 + i, 1e9 + i))
    cached_statistics("last", some_statistics)
    names = sorted(p.name for p in (cache / "statistics").iterdir())
    assert names == ["f3", "f4", "last"]
    cached_statistics("f3", forbidden)  # in use, so younger than f4 now
    cached_statistics("later", some_statistics)
    assert sorted(p.name for p in (cache / "statistics").iterdir()) == ["f3", "last", "later"]


def test_another_keep_measures_nothing(compressed_stories: Any, tmp_path: Path, cache: Path) -> None:
    settings = replace(compressed_stories.settings, keep=(0.8,))
    source = compressed_stories.source
    count = []

    def run(loaded: Any = source, **change: Any) -> str:
        calls: list[str] = []
        _, calibration = compressing.measure(
            loaded, replace(settings, **change), progress=lambda phase, *_: calls.append(phase)
        )
        count.append("calibrate" in calls)
        return str(calibration.fingerprint)

    first = run()
    assert run(keep=(0.6,), allocator="fisher", factorization="one-sided", rank_step=4) == first
    others = {run(seed=5), run(texts=(WeightedText("austen"),)), run(tokens=2816), run(window=128)}
    changed = open_model(str(source.path))
    with torch.no_grad():
        changed.model.get_parameter("model.layers.4.mlp.down_proj.weight")[0, 0] += 1e-6
    others.add(run(changed))
    assert len({first, *others}) == 6
    assert count == [True, False] + [True] * 5
    assert run(reuse_statistics=False) == first and count[-1]
