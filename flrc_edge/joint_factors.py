"""Would one V for all projections that read the same inputs be better than one V each? By predicted loss.

Joint factors of a group (q, k, v; gate, up) are those of its stacked matrix: ``[W_1; W_2; …] ≈ U V`` at
``r (Σ m_i + n)`` parameters instead of ``Σ r_i (m_i + n)``, and of fewer if pivoted. With the loss of stacked outputs
``½ Σ_i tr(H_i ΔW_i C ΔW_iᵀ)`` it is two-sided factorization with ``M = Σ_i W_iᵀ H_i W_i``, and a choice of one group
can be weighed against the best separate ranks, dense matrices included, at the same parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flrc_edge.allocation import candidate_ranks, check_feasible
from flrc_edge.calibration import Moments
from flrc_edge.errors import UsageError
from flrc_edge.factorization import DAMPING, symmetric_root
from flrc_edge.machine import machine
from flrc_edge.measurements import input_grams, measure
from flrc_edge.models import LoadedModel
from flrc_edge.progress import Progress, silent
from flrc_edge.settings import Settings
from flrc_exporters.architectures import Projection
from flrc_runtime.manifest import Storage, factor_parameters

Array = NDArray[np.float64]
STORAGES: tuple[Storage, ...] = ("plain", "pivoted")


@dataclass(frozen=True)
class JointFigure:
    """The best of separate factors, and the best where every group may have joint ones instead.

    Args:
        storage: How factors are stored.
        keep: Share of the projections' parameters.
        separate: Predicted growth of the token loss (nats) with a V for every projection.
        joint: The same where each group has what is better for it.
        chosen: How many groups have joint factors then.
    """

    storage: Storage
    keep: float
    separate: float
    joint: float
    chosen: int


@dataclass(frozen=True)
class JointComparison:
    """All figures and their conditions; ``groups`` counts those of more than one projection."""

    model: str
    calibration_tokens: int
    groups: int
    figures: tuple[JointFigure, ...]
    machine: str


def compare_joint(
    loaded: LoadedModel, settings: Settings, *, keeps: Sequence[float], progress: Progress = silent
) -> JointComparison:
    """Weigh joint factors of q-k-v and gate-up against separate ones, under the same inputs and gradients.

    Args:
        loaded: The model; left as it was.
        settings: Calibration and rank step.
        keeps: Shares of projection parameters, each alone.
        progress: Called after each unit of work.

    Raises:
        UsageError: No keep is given, or one is below what the smallest ranks take.
    """
    if not keeps:
        raise UsageError("name at least one keep")
    projections = loaded.config.projections()
    for keep in keeps:
        check_feasible((p.shape for p in projections), (keep,), step=settings.rank_step)
    statistics, calibration = measure(loaded, settings, progress=progress)
    grams, _ = input_grams(loaded, settings, progress=progress)
    groups = [tuple(members) for _, members in groupby(projections, key=lambda p: p.group)]
    spectra = []
    for done, members in enumerate(groups, 1):
        weights = [loaded.model.get_parameter(f"{p.name}.weight").detach() for p in members]
        inputs = torch.stack([grams[p.name] for p in members]).double().mean(0)
        moments = [statistics.moments[p.name] for p in members]
        spectra.append(group_spectra(weights, moments, inputs))
        progress("joint factors", done, len(groups))
    total = sum(m * n for m, n in (p.shape for p in projections))
    figures = [
        figure
        for storage in STORAGES
        for figure in _figures(groups, spectra, storage, keeps, total=total, step=settings.rank_step)
    ]
    return JointComparison(
        model=loaded.name,
        calibration_tokens=calibration.tokens,
        groups=sum(len(members) > 1 for members in groups),
        figures=tuple(figures),
        machine=machine(),
    )


def group_spectra(
    weights: Sequence[Tensor], moments: Sequence[Moments], inputs: Tensor
) -> tuple[list[Array], Array]:
    """Return the loss (nats) that each direction removes, of every projection alone and of the stacked matrix.

    Args:
        weights: ``[m_i, n]`` of the projections of one group.
        moments: Their statistics.
        inputs: ``E[x xᵀ]: [n, n]`` of the inputs that they share.
    """
    root = symmetric_root(inputs)
    metrics = [_output_metric(w.double(), m) for w, m in zip(weights, moments, strict=True)]
    alone = [_spectrum(root, metric) for metric in metrics]
    return alone, _spectrum(root, torch.stack(metrics).sum(0))


def _output_metric(w: Tensor, moments: Moments) -> Tensor:
    """``Wᵀ H W: [n, n]`` with H damped as in factorization.py, from either side's Gram matrix."""
    m, n = w.shape
    damping = DAMPING * moments.gradient_trace / m
    if m <= n:
        return w.T @ (moments.gradient + damping * torch.eye(m, dtype=w.dtype)) @ w
    return moments.gradient + damping * (w.T @ w)


def _spectrum(root: Tensor, metric: Tensor) -> Array:
    values: Array = torch.linalg.eigvalsh(root @ metric @ root).flip(0).clamp_min(0).numpy()
    return 0.5 * values


def _figures(
    groups: Sequence[tuple[Projection, ...]],
    spectra: Sequence[tuple[list[Array], Array]],
    storage: Storage,
    keeps: Sequence[float],
    *,
    total: int,
    step: int,
) -> list[JointFigure]:
    """Return the figures of one storage form; ``total`` counts the parameters of all projections."""
    separate, joint = [], []
    for members, (alone, stacked) in zip(groups, spectra, strict=True):
        hulls = [_hull(_choices(p.shape, s, storage, step)) for p, s in zip(members, alone, strict=True)]
        separate.append(_sum(hulls))
        whole = (sum(p.shape[0] for p in members), members[0].shape[1])
        joint.append(_hull(_choices(whole, stacked, storage, step)))
    either = _sum([_hull(np.concatenate(pair)) for pair in zip(separate, joint, strict=True)])
    separately = _sum(separate)
    figures = []
    for keep in keeps:
        price = _price(either, keep * total)
        chosen = sum(  # not where both are dense
            len(members) > 1 and _least(j, price) < _least(s, price) * (1 - 1e-9)
            for members, j, s in zip(groups, joint, separate, strict=True)
        )
        without, best = (round(_loss(hull, keep * total), 5) for hull in (separately, either))
        figures.append(JointFigure(storage, keep, without, best, chosen))
    return figures


def _choices(shape: tuple[int, int], spectrum: Array, storage: Storage, step: int) -> Array:
    """Return ``[choices, 2]``: parameters and loss of every rank and of the dense matrix."""
    ranks = candidate_ranks(shape, step, storage=storage)
    rows = [(factor_parameters(shape, r, storage=storage), float(spectrum[r:].sum())) for r in ranks]
    return np.array([*rows, (shape[0] * shape[1], 0.0)], dtype=np.float64)


def _hull(points: Array) -> Array:
    """Return the points that are best at some price of a parameter, by rising cost."""
    hull: list[Array] = []
    for point in points[np.lexsort((points[:, 1], points[:, 0]))]:
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return np.array(hull)


def _slope(a: Array, b: Array) -> float:
    return float((b[1] - a[1]) / (b[0] - a[0]))


def _sum(hulls: Sequence[Array]) -> Array:
    """Return the best sums of one point of each hull: all segments, the steepest first."""
    segments = np.concatenate([np.diff(h, axis=0) for h in hulls] + [np.zeros((0, 2))])
    steepest = segments[np.argsort(segments[:, 1] / segments[:, 0], kind="stable")]
    return np.cumsum(np.concatenate([np.sum([h[0] for h in hulls], axis=0)[None], steepest]), axis=0)


def _loss(hull: Array, budget: float) -> float:
    return float(np.interp(budget, hull[:, 0], hull[:, 1]))


def _price(hull: Array, budget: float) -> float:
    """Return what a parameter is worth (nats) where a budget ends."""
    if len(hull) == 1:
        return 0.0
    i = int(np.clip(np.searchsorted(hull[:, 0], budget), 1, len(hull) - 1))
    return -_slope(hull[i - 1], hull[i])


def _least(hull: Array, price: float) -> float:
    return float((hull[:, 1] + price * hull[:, 0]).min())
