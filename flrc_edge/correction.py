"""Correction: a projection makes up for what the compressed layers before it have lost.

Layer after layer, with the inputs x̂ that the compressed model has there, each projection is asked for the outputs of
the original, ``W x``, and, where they are added to the residual stream, also for what that stream lacks by then, d.
The least-squares answer, damped, is ``U' = U + β E[(W (x - x̂) + d) x̂ᵀ] Vᵀ (V (E[x̂ x̂ᵀ] + ε) Vᵀ)⁻¹``. V stays, and
with it the directions that the loss chose. Closed form, no training; nothing is corrected where nothing was lost
before. A matrix that is rounded takes its change before it is, and what rounding does is among what later ones make up
for. Asking for inputs alone is known from the quantization of weights (GPTAQ, arXiv 2504.02692; QEP, arXiv
2504.09629, also for β < 1); asking for the residual stream is this project's.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from flrc_edge.chunks import Chunk, chunks_of
from flrc_edge.factorization import Factors
from flrc_edge.layerwise import STREAMS, GroupInputs, walk
from flrc_edge.lowrank import low_rank_layer
from flrc_edge.models import LoadedModel
from flrc_edge.progress import Progress, silent
from flrc_edge.quantization import QuantizedMatrix
from flrc_edge.quantized_factors import quantize_projection
from flrc_exporters.architectures import DecoderConfig
from flrc_runtime.manifest import ProjectionPlan, RankPlan

STRENGTH = 0.5  # β
RIDGE = 0.1  # ε, of the mean diagonal of E[x̂ x̂ᵀ]


@dataclass(frozen=True)
class Corrected:
    """What is stored of a plan.

    Args:
        chunks: Of every factored projection; what integers stand for where they are rounded.
        integers: By the tensor name of a checkpoint.
    """

    chunks: dict[str, tuple[Chunk, ...]] = field(default_factory=dict)
    integers: dict[str, QuantizedMatrix] = field(default_factory=dict)


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
    left = factors.U.clone()
    left[:, :rank] += _change(weight, v, inputs, strength).float()
    return replace(factors, U=left)


def corrected_weight(weight: Tensor, inputs: GroupInputs) -> Tensor:
    """Return ``W: [m, n]`` of a dense projection, fitted in the same way: its V is the identity."""
    return weight + _change(weight, None, inputs, STRENGTH).to(weight.dtype)


def _change(weight: Tensor, V: Tensor | None, inputs: GroupInputs, strength: float) -> Tensor:
    """Return ``[m, r]`` float64: what is added to what multiplies ``V x̂``, or x̂ itself."""
    wanted = weight.double() @ inputs.drift
    if inputs.lack is not None:
        wanted = wanted + inputs.lack
    energy, wanted = inputs.energy, wanted.T
    damped = energy + RIDGE * energy.diagonal().mean() * torch.eye(len(energy), dtype=energy.dtype)
    if V is not None:
        damped, wanted = V @ damped @ V.T, V @ wanted
    solution: Tensor = torch.linalg.solve(damped, wanted).T
    return strength * solution


def correct(
    loaded: LoadedModel,
    plan: RankPlan,
    factors: Mapping[str, Factors],
    ids: Tensor,
    *,
    grams: Mapping[str, Tensor] | None = None,
    progress: Progress = silent,
) -> Corrected:
    """Correct a plan's stage 0, in the order of the forward pass.

    Later stages take the same columns of U. Dense projections stay as they are in floats.

    Args:
        loaded: The original model; left as it was.
        plan: Ranks, storage and, with ``grams``, number formats.
        factors: Of every factored projection.
        ids: ``[windows, T]`` token ids.
        grams: ``[n, n]`` of every projection, from input_grams.py, to round to the plan's number formats by; None
            leaves floats.
        progress: Called after every layer.

    Raises:
        NumericalError: A value is not finite.
    """
    plans = plan.by_name()
    groups: dict[str, list[str]] = {}
    for projection in loaded.config.projections():
        if grams is not None or not plans[projection.name].dense:
            groups.setdefault(projection.group, []).append(projection.name)
    found = Corrected()
    if not groups:
        return found

    def fit(inputs: GroupInputs) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {}
        for name in inputs.names:
            linear = loaded.model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            modules[name] = fit_one(plans[name], linear, inputs)
        return modules

    def fit_one(p: ProjectionPlan, linear: nn.Linear, inputs: GroupInputs) -> nn.Module:
        weight: Tensor | None = None
        chunks: tuple[Chunk, ...] = ()
        if p.dense:
            weight = corrected_weight(linear.weight.detach(), inputs)
        else:
            f = corrected(factors[p.name], linear.weight, p.factored_ranks[0], inputs)
            chunks = chunks_of(f.U, f.V, p)
        if grams is not None:
            rounded = quantize_projection(weight, p, chunks, grams[p.name])
            weight, chunks = rounded.weight, rounded.chunks
            found.integers.update({f"{p.name}.{matrix}": q for matrix, q in rounded.integers.items()})
        if p.dense:
            assert weight is not None
            return _linear(linear, weight)
        found.chunks[p.name] = chunks
        return low_rank_layer(linear, chunks, ranks=p.factored_ranks)

    config = loaded.config
    plain = isinstance(config, DecoderConfig) and config.norms_per_block == 2
    streams = STREAMS if plain else {}  # elsewhere outputs are normalized or scaled before they are added
    walk(loaded.model, groups, ids, fit, streams=streams, progress=progress, phase="correct")
    return found


def _linear(like: nn.Linear, weight: Tensor) -> nn.Linear:
    made = deepcopy(like)
    made.weight = nn.Parameter(weight.to(like.weight.dtype), requires_grad=False)
    return made
