"""Correction: a projection makes up for what the compressed layers before it have lost.

Layer after layer, with the inputs x̂ that the compressed model has there, each projection is asked for the outputs of
the original, ``W x``, and, where they are added to the residual stream, also for what that stream lacks by then, d.
The least-squares answer, damped, is ``U' = U + β E[(W (x - x̂) + d) x̂ᵀ] Vᵀ (V (E[x̂ x̂ᵀ] + ε) Vᵀ)⁻¹``. V stays, and
with it the directions that the loss chose. Closed form, no training; nothing is corrected where nothing was lost
before. Asking for inputs alone is known from the quantization of weights (GPTAQ, arXiv 2504.02692; QEP, arXiv
2504.09629, also for β < 1); asking for the residual stream is this project's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from flrc_edge.chunks import chunks_of
from flrc_edge.factorization import Factors
from flrc_edge.layerwise import STREAMS, GroupInputs, walk
from flrc_edge.lowrank import low_rank_layer
from flrc_edge.models import LoadedModel
from flrc_edge.progress import Progress, silent
from flrc_exporters.architectures import DecoderConfig
from flrc_runtime.manifest import RankPlan

STRENGTH = 0.5  # β
RIDGE = 0.1  # ε, of the mean diagonal of E[x̂ x̂ᵀ]


def corrected(
    factors: Factors, weight: Tensor, rank: int, inputs: GroupInputs, *, strength: float = STRENGTH
) -> Factors:
    """Return factors whose first ``rank`` columns of U are fitted again.

    Args:
        factors: Of the projection.
        weight: ``W: [m, n]``.
        rank: Ranks in use.
        inputs: What it reads, and what is lacking.
        strength: β; 0 returns the factors as they are.
    """
    v = factors.V[:rank].double()
    wanted = weight.double() @ inputs.drift
    if inputs.lack is not None:
        wanted = wanted + inputs.lack
    damped = inputs.energy + RIDGE * inputs.energy.diagonal().mean() * torch.eye(v.shape[1], dtype=v.dtype)
    change = strength * torch.linalg.solve(v @ damped @ v.T, v @ wanted.T).T
    left = factors.U.clone()
    left[:, :rank] += change.float()
    return replace(factors, U=left)


def correct(
    loaded: LoadedModel,
    plan: RankPlan,
    factors: Mapping[str, Factors],
    ids: Tensor,
    *,
    progress: Progress = silent,
) -> dict[str, Factors]:
    """Correct the factors of a plan's stage 0, in the order of the forward pass.

    Dense projections stay as they are. Later stages take the same columns of U.

    Args:
        loaded: The original model; left as it was.
        plan: Ranks and storage.
        factors: Of every projection.
        ids: ``[windows, T]`` token ids.
        progress: Called after every layer.

    Returns:
        The factors of every projection.

    Raises:
        NumericalError: An input is not finite.
    """
    plans = plan.by_name()
    groups: dict[str, list[str]] = {}
    for projection in loaded.config.projections():
        if not plans[projection.name].dense:
            groups.setdefault(projection.group, []).append(projection.name)
    found = dict(factors)

    def fit(inputs: GroupInputs) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {}
        for name in inputs.names:
            p = plans[name]
            ranks = tuple(r for r in p.ranks if r is not None)
            linear = loaded.model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            found[name] = corrected(factors[name], linear.weight, ranks[0], inputs)
            chunks = chunks_of(found[name].U, found[name].V, p)
            modules[name] = low_rank_layer(linear, chunks, ranks=ranks)
        return modules

    config = loaded.config
    plain = isinstance(config, DecoderConfig) and config.norms_per_block == 2
    streams = STREAMS if plain else {}  # elsewhere outputs are normalized or scaled before they are added
    walk(loaded.model, groups, ids, fit, streams=streams, progress=progress, phase="correct")
    return found
