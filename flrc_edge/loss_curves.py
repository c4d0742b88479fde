"""``losses.json`` of a checkpoint: what every projection's ranks were found to cost, for figures and comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flrc_runtime.files import read_json, write_json
from flrc_runtime.typed_json import build

if TYPE_CHECKING:  # a report reads this file without torch
    from flrc_edge.factorization import Factors

FILE_NAME = "losses.json"
POINTS = 16  # of a curve, at most


@dataclass(frozen=True)
class LossCurve:
    """Growth of the token loss (nats) when this projection alone has a rank, at a few rising ranks."""

    ranks: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class LossCurves:
    """The curves that ranks were chosen by.

    Args:
        source: ``measured`` (one backward pass at every rank) or ``predicted`` (from the spectra).
        projections: A curve for each projection by name.
    """

    source: Literal["measured", "predicted"]
    projections: Mapping[str, LossCurve]


def loss_curves(factors: Mapping[str, Factors]) -> LossCurves:
    """Take a few points, more of them at small ranks, of the loss of every rank."""
    measured = all(f.measured is not None for f in factors.values())
    curves = {}
    for name, f in factors.items():
        largest = f.U.shape[1]
        ranks = sorted({max(1, round(largest * ((i + 1) / POINTS) ** 1.5)) for i in range(POINTS)})
        found = f.measured if measured and f.measured is not None else None
        losses = [f.loss(r) if found is None else found[r].item() for r in ranks]
        curves[name] = LossCurve(tuple(ranks), tuple(float(f"{loss:.4g}") for loss in losses))
    return LossCurves("measured" if measured else "predicted", curves)


def write_curves(folder: Path, curves: LossCurves) -> None:
    """Write ``losses.json`` into a checkpoint that is about to be sealed."""
    write_json(folder / FILE_NAME, asdict(curves))


def read_curves(folder: Path) -> LossCurves:
    """Read ``losses.json`` of a checkpoint.

    Raises:
        FormatError: It is damaged.
    """
    return build(LossCurves, read_json(folder / FILE_NAME), FILE_NAME)
