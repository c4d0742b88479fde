"""Shapes of a model outside the capability table, from its class in transformers, without weights or memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flrc_exporters.architectures import Projection
from flrc_runtime.errors import UnsupportedModelError


@dataclass(frozen=True)
class PortableShapes:
    """A model whose layers transformers computes, and whose graph comes from optimum; see ``ModelShapes``."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    tied_embedding: bool
    linear: tuple[Projection, ...]
    others: Mapping[str, tuple[int, ...]]
    eos_token_ids: tuple[int, ...] = ()

    def projections(self) -> tuple[Projection, ...]:
        """Return every linear module of the decoder layers."""
        return self.linear

    def other_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every other tensor, a tied head left out."""
        return dict(self.others)

    def parameters(self) -> int:
        """Return the parameters of the whole model, a tied embedding counted once."""
        weights = sum(p.shape[0] * p.shape[1] for p in self.linear)
        return weights + sum(math.prod(shape) for shape in self.others.values())


def portable_shapes(hf_config: Mapping[str, Any]) -> PortableShapes:
    """Build the model without memory and list its linear modules and tensors.

    Args:
        hf_config: The content of ``config.json``.

    Raises:
        UnsupportedModelError: transformers has no such causal language model, or it is not laid out as
            ``model.layers``, ``model.norm`` and ``lm_head``.
    """
    import torch
    import transformers
    from torch import nn

    kind = hf_config.get("model_type")
    fields = {k: v for k, v in hf_config.items() if k not in ("model_type", "transformers_version")}
    if hf_config.get("auto_map"):
        raise UnsupportedModelError("config.json: auto_map is set: models with their own code are never run")
    try:
        config: Any = transformers.AutoConfig.for_model(str(kind), **fields)
        with torch.device("meta"):
            model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # transformers raises what its models raise
        first = str(error).strip().partition("\n")[0]
        raise UnsupportedModelError(f"transformers has no model for model_type {kind!r}: {first}") from None
    _check_layout(model, str(kind))
    linear = tuple(
        Projection(name, (module.out_features, module.in_features), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    )
    tied = bool(getattr(config, "tie_word_embeddings", False))
    skipped = {f"{p.name}.weight" for p in linear} | ({"lm_head.weight"} if tied else set())
    others = {k: tuple(v.shape) for k, v in model.state_dict().items() if k not in skipped}
    heads = int(config.num_attention_heads)
    eos = config.eos_token_id
    return PortableShapes(
        architecture=str(kind),
        vocab_size=int(config.vocab_size),
        hidden_size=int(config.hidden_size),
        num_layers=len(model.model.layers),
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        context_length=int(config.max_position_embeddings),
        tied_embedding=tied,
        linear=linear,
        others=others,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
    )


def _check_layout(model: Any, kind: str) -> None:
    from torch import nn

    body = getattr(model, "model", None)
    parts = {
        "model.layers": isinstance(getattr(body, "layers", None), nn.ModuleList),
        "model.norm": isinstance(getattr(body, "norm", None), nn.Module),
        "model.embed_tokens": isinstance(getattr(body, "embed_tokens", None), nn.Embedding),
        "lm_head": isinstance(getattr(model, "lm_head", None), nn.Linear),
    }
    for name, there in parts.items():
        if not there:
            raise UnsupportedModelError(f"a {kind} has no {name}, which is how decoders are read here")
