"""Interrupted runs: what is kept, that they go on to the same result, and what is refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import flrc_edge
from flrc_edge.compression import compress
from flrc_edge.errors import FlrcError, FormatError, UsageError
from flrc_edge.healing import Healed, Interrupted, Settings, heal
from flrc_edge.settings import Settings as Compression
from flrc_edge.texts import WeightedText
from flrc_runtime import manifest

SETTINGS = Settings(
    steps=8,
    window=48,
    tokens_per_step=96,
    validate_every=3,
    validation_windows=2,
    train="all",
    texts=(WeightedText("wikitext2"), WeightedText("austen")),
)
NAMES = ("factors.safetensors", "base.safetensors")


@pytest.fixture(scope="module")
def checkpoint(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("resume") / "checkpoint"
    settings = Compression(
        keep=(0.8, 0.6), tokens=1024, window=128, rank_step=8, boundaries=(16,), storage="pivoted"
    )
    compress(str(stories), folder, settings)
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Healed]:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "healed"
    result = heal(checkpoint, folder, SETTINGS, model=str(stories))
    assert result is not None
    return folder, result


def at_step(step: int, action: Callable[[], Any]) -> Callable[[str, int, int], None]:
    def progress(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("heal", step):
            action()

    return progress


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def same_bytes(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in NAMES)


def test_the_same_seed_gives_the_same_bytes(
    checkpoint: Path, stories: Path, whole: tuple[Path, Healed], tmp_path: Path
) -> None:
    again = heal(checkpoint, tmp_path / "h", SETTINGS, model=str(stories))
    assert again is not None and same_bytes(whole[0], tmp_path / "h")
    assert [(p.step, p.train, p.validation) for p in again.curve] == [
        (p.step, p.train, p.validation) for p in whole[1].curve
    ]
    heal(checkpoint, tmp_path / "other", replace(SETTINGS, seed=1), model=str(stories))
    assert not same_bytes(whole[0], tmp_path / "other")


def test_ctrl_c_and_resume_equal_an_uninterrupted_run(
    checkpoint: Path, stories: Path, whole: tuple[Path, Healed], tmp_path: Path
) -> None:
    """Interrupted twice: between two measurements of the curve, and right after one."""
    target = tmp_path / "h"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stopped:
        heal(checkpoint, target, SETTINGS, model=str(stories), progress=at_step(2, press_ctrl_c))
    # The signal comes after the step that was being reported, so it ends with the next.
    assert 2 <= stopped.value.step <= 3 and signal.getsignal(signal.SIGINT) == before
    assert not target.exists() and (tmp_path / ".h.healing" / "state.safetensors").exists()
    with pytest.raises(Interrupted) as stopped:
        heal(checkpoint, target, SETTINGS, model=str(stories), resume=True, progress=at_step(6, press_ctrl_c))
    assert 6 <= stopped.value.step <= 7
    result = heal(checkpoint, target, SETTINGS, model=str(stories), resume=True)
    assert result is not None and same_bytes(whole[0], target)
    assert [(p.step, p.train, p.validation) for p in result.curve] == [
        (p.step, p.train, p.validation) for p in whole[1].curve
    ]
    minutes = [p.minutes for p in result.curve]
    assert minutes == sorted(minutes)
    assert [p.name for p in tmp_path.iterdir()] == ["h"]  # nothing of the run is left


def test_a_killed_run_goes_on_from_its_last_state(
    checkpoint: Path, stories: Path, whole: tuple[Path, Healed], tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    often = replace(SETTINGS, save_minutes=1e-9)
    with pytest.raises(Killed):
        heal(checkpoint, tmp_path / "h", often, model=str(stories), progress=at_step(5, die))
    steps: list[int] = []
    heal(
        checkpoint,
        tmp_path / "h",
        SETTINGS,  # how often to save is no part of the run
        model=str(stories),
        resume=True,
        progress=lambda phase, done, _: steps.append(done) if phase == "heal" else None,
    )
    assert steps == [5, 6, 7, 8] and same_bytes(whole[0], tmp_path / "h")


def test_a_run_whose_publishing_failed_only_publishes(
    checkpoint: Path,
    stories: Path,
    whole: tuple[Path, Healed],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "seal", full)
        with pytest.raises(FlrcError, match="No space left on device"):
            heal(checkpoint, tmp_path / "h", SETTINGS, model=str(stories))
    steps: list[int] = []
    heal(
        checkpoint,
        tmp_path / "h",
        SETTINGS,
        model=str(stories),
        resume=True,
        progress=lambda phase, done, _: steps.append(done) if phase == "heal" else None,
    )
    assert steps == [] and same_bytes(whole[0], tmp_path / "h")


@pytest.fixture
def interrupted(checkpoint: Path, stories: Path, tmp_path: Path) -> Path:
    with pytest.raises(Interrupted):
        heal(checkpoint, tmp_path / "h", SETTINGS, model=str(stories), progress=at_step(1, press_ctrl_c))
    return tmp_path / "h"


def test_an_interrupted_run_is_not_lost_by_beginning_again(
    checkpoint: Path, stories: Path, interrupted: Path
) -> None:
    with pytest.raises(UsageError, match=r"a run into .* was interrupted") as error:
        heal(checkpoint, interrupted, SETTINGS, model=str(stories))
    assert error.value.hint is not None and "--resume" in error.value.hint
    assert (interrupted.parent / ".h.healing" / "state.safetensors").exists()


def test_another_run_is_refused(
    checkpoint: Path, stories: Path, interrupted: Path, whole: tuple[Path, Healed]
) -> None:
    cases: list[tuple[Path, Settings, str]] = [
        (checkpoint, replace(SETTINGS, lr=1e-4), "has lr 0.0[0-9]+, this one 0.0001$"),
        (checkpoint, replace(SETTINGS, steps=9), "has steps 8, this one 9$"),
        (checkpoint, replace(SETTINGS, steps=None, minutes=1.0), "has minutes null, this one 1.0$"),
        (checkpoint, replace(SETTINGS, seed=3), "has seed 0, this one 3$"),
        (checkpoint, replace(SETTINGS, train="factors"), "has train all, this one factors$"),
        (checkpoint, replace(SETTINGS, texts=SETTINGS.texts[:1]), "has texts "),
        (whole[0], SETTINGS, "has checkpoint [0-9a-f]{12}…, this one [0-9a-f]{12}…$"),
    ]
    for folder, settings, message in cases:
        with pytest.raises(UsageError, match=message):
            heal(folder, interrupted, settings, model=str(stories), resume=True)
    dense = flrc_edge.open_model(str(stories))
    with torch.no_grad():
        dense.model.get_parameter("model.norm.weight")[3] += 1
    with pytest.raises(UsageError, match=r"has dense model [0-9a-f]{12}…"):
        heal(checkpoint, interrupted, SETTINGS, model=dense, resume=True)


def test_a_damaged_state_is_refused(checkpoint: Path, stories: Path, interrupted: Path) -> None:
    path = interrupted.parent / ".h.healing" / "state.safetensors"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\x08" + content[1:]):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"the state in .* is damaged"):
            heal(checkpoint, interrupted, SETTINGS, model=str(stories), resume=True)
    path.write_bytes(content)
    assert load_file(path)
    assert heal(checkpoint, interrupted, SETTINGS, model=str(stories), resume=True) is not None


def test_two_runs_into_one_folder(checkpoint: Path, stories: Path, tmp_path: Path) -> None:
    (tmp_path / ".h.healing").mkdir()
    refused = pytest.raises(UsageError, match="another run is healing into")
    with FileLock(tmp_path / ".h.healing" / "lock"), refused:
        heal(checkpoint, tmp_path / "h", SETTINGS, model=str(stories))


def test_resume_without_a_state_begins(
    checkpoint: Path, stories: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="flrc_edge")
    assert heal(checkpoint, tmp_path / "h", replace(SETTINGS, steps=1), model=str(stories), resume=True)
    assert "no interrupted run was found" in caplog.text
