"""Input correction: fit each projection on the inputs that the compressed layers before it produce.

``W' = W E[x x̂ᵀ] (E[x̂ x̂ᵀ] + ε)⁻¹`` is the matrix that makes the most of the compressed model's inputs x̂ of what the
original makes of its own, x; it is then factorized as any other weight. Closed form, layer after layer. Off by
default: the regression shrinks what it cannot explain, and on SmolLM2-135M that costs more than it mends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from flrc_edge.calibration import Moments
from flrc_edge.chunks import Chunk, chunks_of
from flrc_edge.factorization import Method, factorize
from flrc_edge.layerwise import GroupInputs, walk
from flrc_edge.lowrank import low_rank_layer
from flrc_edge.models import LoadedModel
from flrc_edge.progress import Progress, silent
from flrc_edge.texts import Windows
from flrc_runtime.manifest import RankPlan

RIDGE = 0.1  # of the mean diagonal of E[x̂ x̂ᵀ]; pulls W' towards W. 0.01 was worse on SmolLM2-135M


def corrected(
    weight: Tensor, moments: Moments, inputs: GroupInputs, *, ridge: float = RIDGE
) -> tuple[Tensor, Moments]:
    """Return the corrected matrix and its statistics.

    Args:
        weight: ``W: [m, n]``.
        moments: Its statistics in the original model.
        inputs: Second moments of x and x̂.
        ridge: ε as a share of the mean diagonal; infinity gives W itself.

    Returns:
        ``W': [m, n]`` float64, and the moments of ``y = W' x̂`` with the same output gradients.
    """
    w = weight.double()
    m, n = w.shape
    epsilon = ridge * inputs.energy.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    map_back = torch.linalg.solve(inputs.energy + epsilon, (inputs.cross + epsilon).T).T
    changed = w @ map_back
    if m <= n:
        return changed, replace(moments, energy=changed @ inputs.energy @ changed.T, weighted=None)
    gradient = map_back.T @ moments.gradient @ map_back  # z = W'ᵀ g
    return changed, replace(moments, energy=inputs.energy, gradient=gradient, weighted=None)


def fit_corrected(
    loaded: LoadedModel,
    plan: RankPlan,
    moments: Mapping[str, Moments],
    windows: Windows,
    *,
    method: Method = "two-sided",
    ridge: float = RIDGE,
    progress: Progress = silent,
) -> dict[str, tuple[Chunk, ...]]:
    """Factorize every projection of a plan on corrected inputs, in the order of the forward pass.

    Args:
        loaded: The original model; left as it was.
        plan: Ranks and storage.
        moments: Statistics of the original model.
        windows: Calibration tokens.
        method: See :func:`flrc_edge.factorization.factorize`.
        ridge: See :func:`corrected`.
        progress: Called after every layer.

    Returns:
        The chunks of every factored projection.
    """
    plans = plan.by_name()
    groups: dict[str, list[str]] = {}
    for projection in loaded.config.projections():
        groups.setdefault(projection.group, []).append(projection.name)
    chunks: dict[str, tuple[Chunk, ...]] = {}

    def fit(inputs: GroupInputs) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {}
        for name in inputs.names:
            p = plans[name]
            ranks = tuple(r for r in p.ranks if r is not None)
            if not ranks:
                continue  # a dense matrix passes its input's error on; correcting it, too, was worse
            linear = loaded.model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            weight, statistics = corrected(linear.weight, moments[name], inputs, ridge=ridge)
            f = factorize(weight, statistics, method=method, storage=p.storage, name=name)
            chunks[name] = chunks_of(f.U, f.V, p)
            modules[name] = low_rank_layer(linear, chunks[name], ranks=ranks)
        return modules

    walk(loaded.model, groups, windows.ids, fit, progress=progress, phase="correct")
    return chunks
