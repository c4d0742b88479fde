"""A rank plan's low-rank layers in the place of a model's projections, for as long as they are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from flrc_edge.chunks import Chunk, chunks_of
from flrc_edge.embedding_rounding import replaced_weights
from flrc_edge.factorization import Factors
from flrc_edge.lowrank import low_rank_layer, replace_linear
from flrc_edge.models import LoadedModel
from flrc_edge.progress import Progress, silent
from flrc_edge.quantization import QuantizedMatrix
from flrc_runtime.manifest import RankPlan


def stored_chunks(
    plan: RankPlan, factors: Mapping[str, Factors], *, progress: Progress = silent
) -> dict[str, tuple[Chunk, ...]]:
    """Cut and, where the plan says so, pivot the factors of every factored projection."""
    factored = [p for p in plan.projections if not p.dense]
    chunks = {}
    for done, p in enumerate(factored, 1):
        chunks[p.name] = chunks_of(factors[p.name].U, factors[p.name].V, p)
        progress("store", done, len(factored))
    return chunks


@contextmanager
def compressed(
    loaded: LoadedModel, plan: RankPlan, factors: Mapping[str, Factors]
) -> Iterator[torch.nn.Module]:
    """Put a plan's low-rank layers into the loaded model while the block runs."""
    with placed(loaded, plan, stored_chunks(plan, factors)) as model:
        yield model


@contextmanager
def placed(
    loaded: LoadedModel, plan: RankPlan, chunks: Mapping[str, Sequence[Chunk]]
) -> Iterator[torch.nn.Module]:
    """Put chunks into the loaded model while the block runs."""
    replaced = {}
    try:
        for p in plan.projections:
            ranks = p.factored_ranks
            if ranks:
                linear = loaded.model.get_submodule(p.name)
                assert isinstance(linear, torch.nn.Linear)
                layer = low_rank_layer(linear, chunks[p.name], ranks=ranks)
                replaced[p.name] = replace_linear(loaded.model, p.name, layer)
        yield loaded.model
    finally:
        for name, linear in replaced.items():
            parent, _, child = name.rpartition(".")
            setattr(loaded.model.get_submodule(parent), child, linear)


@contextmanager
def placed_integers(
    loaded: LoadedModel,
    plan: RankPlan,
    chunks: Mapping[str, Sequence[Chunk]],
    integers: Mapping[str, QuantizedMatrix],
) -> Iterator[torch.nn.Module]:
    """Put what integers stand for into the loaded model while the block runs.

    Args:
        loaded: The original model.
        plan: Ranks of every projection.
        chunks: Float factors; those without integers are used as they are.
        integers: By the tensor name of a checkpoint.
    """

    def stored(name: str, tensor: Tensor) -> Tensor:
        return integers[name].dequantize() if name in integers else tensor

    rounded = {
        name: [
            Chunk(stored(f"{name}.chunks.{i}.V", c.V), stored(f"{name}.chunks.{i}.U", c.U), c.order)
            for i, c in enumerate(parts)
        ]
        for name, parts in chunks.items()
    }
    weights = {name: matrix for name, matrix in integers.items() if ".chunks." not in name}
    with replaced_weights(loaded.model, weights), placed(loaded, plan, rounded) as model:
        yield model
