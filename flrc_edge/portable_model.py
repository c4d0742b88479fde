"""Whether a model outside the capability table computes what the layer-wise passes take for granted."""

from __future__ import annotations

from typing import Any

import torch

from flrc_edge.errors import UnsupportedModelError, UsageError
from flrc_edge.layer_pass import embedded, layer_arguments
from flrc_edge.models import LoadedModel
from flrc_edge.settings import Settings

TOLERANCE = 1e-4  # relative, of logits


def check_portable(loaded: LoadedModel, settings: Settings) -> None:
    """Compare the model's logits with those of its layers, norm and head, one after the other, on a few tokens.

    Raises:
        UnsupportedModelError: They differ, or it cannot be run that way.
        UsageError: Integers or a size in bytes are asked for, which only our own exporter lays out.
    """
    if settings.dtype != "float" or settings.sizes:
        raise UsageError(
            "--graph optimum takes float factors and shares of parameters",
            hint="leave out --dtype and --target-size; export --dtype rounds to nearest",
        )
    model: Any = loaded.model
    ids = torch.arange(16) % loaded.config.vocab_size
    try:
        with torch.no_grad():
            arguments = layer_arguments(model, ids[None])
            x = embedded(model, ids)
            for layer, keywords in zip(model.model.layers, arguments, strict=True):
                x = layer(x, **keywords)
            found = model.lm_head(model.model.norm(x))
            wanted = model(input_ids=ids[None], use_cache=False).logits
            difference = (found - wanted).norm() / wanted.norm()
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(
            f"a {loaded.config.architecture} cannot be run layer by layer: {first}"
        ) from None
    if not difference <= TOLERANCE:
        raise UnsupportedModelError(
            f"a {loaded.config.architecture} does more than its layers, norm and head: logits differ by "
            f"{difference:.1%}"
        )
