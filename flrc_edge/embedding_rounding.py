"""Embedding and head as integers, rounded with the error of the logits compensated.

A tied matrix is read in both places; it is rounded for the head, whose errors reach every logit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from flrc_edge.quantization import QuantizedMatrix, quantize_compensated, round_to_nearest
from flrc_exporters.number_format import NumberFormat

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def is_tied(model: nn.Module) -> bool:
    """Return whether the head is the embedding itself."""
    return model.get_parameter(HEAD).data_ptr() == model.get_parameter(EMBEDDING).data_ptr()


def quantize_embedding(
    model: nn.Module, number_format: NumberFormat, gram: Tensor
) -> dict[str, QuantizedMatrix]:
    """Round embedding and head.

    Args:
        model: A Hugging Face causal language model.
        number_format: Of integers.
        gram: ``E[h hᵀ]: [hidden, hidden]`` of the head's inputs.

    Returns:
        Integers by tensor name; a tied head has none of its own.
    """
    embedding = model.get_parameter(EMBEDDING).detach()
    if is_tied(model):
        return {EMBEDDING: quantize_compensated(embedding, gram, number_format, name=EMBEDDING)}
    head = model.get_parameter(HEAD).detach()
    return {
        EMBEDDING: round_to_nearest(embedding, number_format),  # a row is looked up, not multiplied
        HEAD: quantize_compensated(head, gram, number_format, name=HEAD),
    }


@contextmanager
def replaced_weights(model: Any, integers: dict[str, QuantizedMatrix]) -> Iterator[None]:
    """Put what integers stand for in the place of a model's weights while the block runs."""
    before = {name: model.get_parameter(name).data for name in integers}
    try:
        for name, matrix in integers.items():
            model.get_parameter(name).data = matrix.dequantize().to(before[name].dtype)
        yield
    finally:
        for name, data in before.items():
            model.get_parameter(name).data = data
