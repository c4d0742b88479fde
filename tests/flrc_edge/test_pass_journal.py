"""A pass that was interrupted goes on after its last layer and ends in the same bits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flrc_edge import pass_journal
from flrc_edge.calibration import calibrate
from flrc_edge.factorization import Factors, factorize
from flrc_edge.input_grams import weighted_grams
from flrc_edge.measured import measured_losses
from flrc_edge.models import open_model
from flrc_edge.statistics_cache import TensorFolder, _moments, _packed_moments

WINDOWS = 3
Pass = Callable[[Path | None, Any, Any], Mapping[str, Any]]


class Killed(Exception):
    """What ends a run in the middle of a layer."""


@pytest.fixture
def loaded(family_model: Callable[[str], Path]) -> Any:
    return open_model(str(family_model("gemma3_text")))  # four layers of two kinds


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 512, (WINDOWS, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def factors(loaded: Any, ids: Tensor) -> dict[str, Factors]:
    names = [p.name for p in loaded.config.projections()]
    moments = calibrate(loaded.model, names, ids).moments
    return {
        name: factorize(loaded.model.get_parameter(f"{name}.weight").detach(), m)
        for name, m in moments.items()
    }


def passes(loaded: Any, ids: Tensor, factors: dict[str, Factors]) -> dict[str, Pass]:
    model, names = loaded.model, [p.name for p in loaded.config.projections()]

    def statistics(journal: Path | None, into: Any, progress: Any) -> Mapping[str, Any]:
        found = calibrate(model, names, ids, into=into, journal=journal, progress=progress)
        return {"": torch.tensor(found.loss), **{n: _packed_moments(m) for n, m in found.moments.items()}}

    def losses(journal: Path | None, _: Any, progress: Any) -> Mapping[str, Any]:
        return measured_losses(model, factors, ids, journal=journal, progress=progress)

    def grams(journal: Path | None, into: Any, progress: Any) -> Mapping[str, Any]:
        return dict(weighted_grams(model, names, ids, into=into, journal=journal, progress=progress))

    return {"statistics": statistics, "losses": losses, "grams": grams}


def stores(folder: Path, names: list[str]) -> dict[str, Any]:
    return {
        "statistics": TensorFolder(folder, names, _packed_moments, _moments),
        "losses": None,
        "grams": TensorFolder(folder, [*names, "lm_head"], lambda m: {"": m}, lambda t: t[""]),
    }


def silent(phase: str, done: int, total: int) -> None:
    """Show nothing."""


def counted() -> tuple[list[int], Callable[[str, int, int], None]]:
    calls: list[int] = []
    return calls, lambda phase, done, total: calls.append(done)


def killed_after(count: int) -> Callable[[str, int, int], None]:
    def report(phase: str, done: int, total: int) -> None:
        if done == count:
            raise Killed

    return report


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[n], b[n]) if isinstance(a[n], Tensor) else same(a[n], b[n]) for n in a
    )


@pytest.mark.parametrize("kind", ["statistics", "losses", "grams"])
def test_wherever_it_was_interrupted(
    loaded: Any, ids: Tensor, factors: dict[str, Factors], tmp_path: Path, kind: str
) -> None:
    names = [p.name for p in loaded.config.projections()]
    run = passes(loaded, ids, factors)[kind]
    whole = run(None, None if kind == "losses" else {}, silent)
    total = WINDOWS * 5
    for count in range(1, total + 1):
        folder = tmp_path / str(count)
        with pytest.raises(Killed):
            run(folder / "journal", stores(folder, names)[kind], killed_after(count))
        if count % 2:  # interrupted again, one window later
            again = stores(folder, names)[kind]
            if again is not None:
                again.adopt()
            if count < total:
                with pytest.raises(Killed):
                    run(folder / "journal", again, killed_after(count + 1))
        store = stores(folder, names)[kind]
        if store is not None:
            store.adopt()
        calls, report = counted()
        found = run(folder / "journal", store, report)
        assert same(found, whole)
        assert calls[-1] == total
        layers = max(0, count - 1) // WINDOWS  # the forward pass and the layers that were done before
        assert len(calls) <= total + 1 - WINDOWS * layers


def test_a_state_that_is_damaged_or_lacks_its_files_is_not_gone_on_with(
    loaded: Any, ids: Tensor, factors: dict[str, Factors], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [p.name for p in loaded.config.projections()]
    run = passes(loaded, ids, factors)["statistics"]
    whole = run(None, {}, silent)
    for damage in ("half", "lost"):
        folder = tmp_path / damage
        with pytest.raises(Killed):
            run(folder / "journal", stores(folder, names)["statistics"], killed_after(WINDOWS * 4))
        if damage == "half":
            (folder / "journal").write_bytes((folder / "journal").read_bytes()[:100])
        else:
            (folder / f"{names[-1]}.safetensors").unlink()
        store = stores(folder, names)["statistics"]
        store.adopt()
        calls, report = counted()
        assert same(run(folder / "journal", store, report), whole)
        assert len(calls) == WINDOWS * 5 + 1  # from the beginning
        assert ("damaged" in caplog.text) == (damage == "half")
        caplog.clear()


def test_a_disk_that_is_full_ends_the_journal_and_not_the_run(
    loaded: Any,
    ids: Tensor,
    factors: dict[str, Factors],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = passes(loaded, ids, factors)["losses"]
    whole = run(None, None, silent)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pass_journal, "save_file", full)
    with caplog.at_level(logging.WARNING):
        assert same(run(tmp_path / "journal", None, silent), whole)
    assert caplog.text.count("could not be gone on with") == 1
    assert list(tmp_path.iterdir()) == []
