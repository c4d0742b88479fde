"""What rounding the stored matrices costs, in nats a token, before ranks are chosen.

With ``G = E[‖g‖² x xᵀ] / E[‖g‖²]`` (input_grams.py) the growth of the token loss is taken as
``½ E[‖g‖²] / m · tr(ΔW G ΔWᵀ)``: to second order, were the errors of different outputs independent and alike, as
those of rounding nearly are. Every format is really tried, with compensation, on the matrix and on factors of one
rank; the error relative to the numbers stored hardly depends on the rank. Of embedding and head, the KL of the whole
model is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flrc_edge.allocation import candidate_ranks
from flrc_edge.calibration import Moments
from flrc_edge.chunks import chunks_of
from flrc_edge.embedding_rounding import quantize_embedding, replaced_weights
from flrc_edge.evaluation.token_scores import log_probs_, token_scores
from flrc_edge.factorization import Factors
from flrc_edge.models import LoadedModel
from flrc_edge.progress import Progress, silent
from flrc_edge.quantized_factors import product, quantize_projection
from flrc_exporters.number_format import NumberFormat
from flrc_runtime.manifest import ProjectionPlan, Storage

# Of a dense matrix; and of V and U: V takes few bits best. Longer blocks would save nothing (a scale is a byte in 32).
DENSE_FORMATS = ("int8/32", "int4/32", "int2/32")
FACTOR_FORMATS = (("int8/32", "int8/32"), ("int4/32", "int8/32"), ("int4/32", "int4/32"))
EMBEDDING_FORMATS = ("int8/32", "int4/32")
REFERENCE = 0.7  # of the largest candidate rank: where factors are tried


@dataclass(frozen=True)
class RoundingLosses:
    """Nats a token that rounding one projection costs.

    Args:
        dense: By the format of its matrix.
        factored: By storage, then by the formats of V and of U.
    """

    dense: Mapping[str, float]
    factored: Mapping[Storage, Mapping[tuple[str, str], float]] = field(default_factory=dict)

    def packed(self) -> Tensor:
        """Return all numbers in a fixed order, float64."""
        losses = [*self.dense.values(), *(loss for part in self.factored.values() for loss in part.values())]
        return torch.tensor(losses, dtype=torch.float64)

    @classmethod
    def unpacked(cls, values: Tensor, storages: Sequence[Storage]) -> RoundingLosses:
        """Undo :meth:`packed`; a projection too small for factors has none."""
        dense, pairs = values[: len(DENSE_FORMATS)], values[len(DENSE_FORMATS) :]
        rest = pairs.view(-1, len(FACTOR_FORMATS))
        return cls(
            dict(zip(DENSE_FORMATS, dense.tolist(), strict=True)),
            {
                s: dict(zip(FACTOR_FORMATS, v.tolist(), strict=True))
                for s, v in zip(storages, rest, strict=False)
            },
        )


def rounding_losses(
    loaded: LoadedModel,
    factors: Mapping[str, Factors],
    grams: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    *,
    storages: Sequence[Storage],
    step: int,
    progress: Progress = silent,
) -> dict[str, RoundingLosses]:
    """Try every number format on every projection.

    Args:
        loaded: The original model.
        factors: Of every projection.
        grams: ``G: [n, n]`` of every projection.
        moments: For ``E[‖g‖²]``.
        storages: The forms that factors may be stored in.
        step: Ranks are multiples of it.
        progress: Called after every projection.

    Raises:
        NumericalError: A matrix is not finite.
    """
    found = {}
    for done, (name, f) in enumerate(factors.items(), 1):
        weight = loaded.model.get_parameter(f"{name}.weight").detach()
        shape = (weight.shape[0], weight.shape[1])
        gram = grams[name].double()
        scale = 0.5 * moments[name].gradient_trace / shape[0]

        def loss(exact: Tensor, rounded: Tensor, gram: Tensor = gram, scale: float = scale) -> float:
            error = (exact - rounded).double()
            return scale * float(((error @ gram) * error).sum())

        dense = {}
        for number_format in DENSE_FORMATS:
            plan = ProjectionPlan(name, shape, (None,), formats=(number_format,))
            rounded = quantize_projection(weight, plan, (), gram).weight
            assert rounded is not None
            dense[number_format] = loss(weight, rounded)
        factored: dict[Storage, dict[tuple[str, str], float]] = {}
        for storage in storages:
            ranks = candidate_ranks(shape, step, storage=storage)
            if not ranks:
                continue
            rank = min(ranks, key=lambda r, most=ranks[-1]: abs(r - REFERENCE * most))  # type: ignore[misc]
            factored[storage] = {}
            for pair in FACTOR_FORMATS:
                plan = ProjectionPlan(name, shape, (rank,), storage, formats=pair)
                chunks = chunks_of(f.U, f.V, plan)
                result = quantize_projection(weight, plan, chunks, gram)
                factored[storage][pair] = loss(product(chunks[0]), product(result.chunks[0]))
        found[name] = RoundingLosses(dense, factored)
        progress("try number formats", done, len(factors))
    return found


@torch.no_grad()
def embedding_losses(
    model: Any,
    gram: Tensor,
    ids: Tensor,
    *,
    formats: Sequence[str] = EMBEDDING_FORMATS,
    progress: Progress = silent,
) -> dict[str, float]:
    """Measure the mean KL (nats a token) to the original of each number format of embedding and head alone.

    Args:
        model: A Hugging Face causal language model; as it was afterwards.
        gram: ``E[h hᵀ]: [hidden, hidden]`` of the head's inputs.
        ids: ``[windows, T]`` tokens.
        formats: Names of number formats.
        progress: Called after every format.
    """
    dense = [log_probs_(model(input_ids=w[None], use_cache=False).logits[0, :-1].float()) for w in ids]
    found = {}
    for done, name in enumerate(formats, 1):
        values = []
        with replaced_weights(model, quantize_embedding(model, NumberFormat.named(name), gram)):
            for window, expected in zip(ids, dense, strict=True):
                own = log_probs_(model(input_ids=window[None], use_cache=False).logits[0, :-1].float())
                kl = token_scores(own, window[1:], dense=expected, where=f"calibration text, head {name}").kl
                assert kl is not None
                values.append(float(kl.mean()))
        found[name] = sum(values) / len(values)
        progress("try formats of the head", done, len(formats))
    return found
