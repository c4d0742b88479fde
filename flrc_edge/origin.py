"""The dense model that a checkpoint was compressed from."""

from __future__ import annotations

from pathlib import Path

from flrc_edge.builtin_models import BUILTIN
from flrc_edge.compression import model_info
from flrc_edge.errors import UsageError
from flrc_edge.models import LoadedModel, ModelSource, open_model, resolve_model
from flrc_runtime.manifest import Manifest

_FACTS = ("architecture", "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")


def check_dense(source: ModelSource | LoadedModel, content: Manifest, *, where: str) -> None:
    """Refuse a dense model that the checkpoint cannot have been compressed from.

    Raises:
        UsageError: Its architecture, vocabulary or a shape differs; names the first difference.
    """
    found = model_info(source.name, source.config)
    for fact in _FACTS:
        has, wanted = getattr(found, fact), getattr(content.model, fact)
        if has != wanted:
            raise UsageError(
                f"{source.name} has {fact} {has}, {where} was compressed from a model with {wanted}",
                hint="name the model it was compressed from with --model",
            )
    shapes = {p.name: p.shape for p in source.config.projections()}
    for p in content.plan.projections:
        if shapes.get(p.name) != p.shape:
            raise UsageError(
                f"{p.name} of {source.name} is {shapes.get(p.name)}, {where} was compressed from {p.shape}",
                hint="name the model it was compressed from with --model",
            )


def dense_name(model: str | None, content: Manifest, *, where: str) -> str:
    """Return the model to open: the one given, else the built-in one that the manifest names.

    Raises:
        UsageError: None is given and the manifest's is not built in.
    """
    if model is not None:
        return model
    if content.model.name not in BUILTIN:
        raise UsageError(
            f"{where} was compressed from {content.model.name}, which is not a built-in model",
            hint="name that model (folder, GGUF file or hub id) with --model",
        )
    return content.model.name


def open_dense(model: str | LoadedModel | None, content: Manifest, folder: Path) -> LoadedModel:
    """Open the dense model of a checkpoint, or check the one that is given.

    Raises:
        UsageError: It cannot be the one that the checkpoint was compressed from, or is not known.
    """
    if isinstance(model, LoadedModel):
        check_dense(model, content, where=folder.name)
        return model
    name = dense_name(model, content, where=folder.name)
    # before any weights are loaded
    check_dense(resolve_model(name, portable=True), content, where=folder.name)
    return open_model(name, portable=True)
