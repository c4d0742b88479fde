"""Open a causal language model: a Hugging Face folder, a hub id, a GGUF file or a built-in name.

:func:`resolve_model` refuses from ``config.json`` and file headers alone, before torch is imported or weights
are downloaded; :func:`open_model` then loads. No code of a model is ever run and no pickle opened.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flrc_exporters.architectures import FAMILIES, DecoderConfig, ModelShapes
from flrc_runtime.cache import cache_folder
from flrc_runtime.errors import FlrcError, FormatError, NumericalError, UnsupportedModelError, UsageError
from flrc_runtime.files import sha256_of
from flrc_runtime.output_folder import published_folder

from .builtin_models import BUILTIN
from .cache import locked
from .hf_config import read_config
from .model_folder import check_weights, folder_name, follow_weights, refuse_other_folders
from .tokenizer_files import (
    check_files,
    check_own_class,
    check_template,
    check_vocabulary,
    end_tokens,
    open_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DTYPES = ("float32", "bfloat16", "float16")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """A model that was found and is of a supported family; nothing of it is loaded yet.

    Attributes:
        name: How it is called in manifests and tables.
        kind: ``folder``, ``hub`` or ``gguf``.
        location: The folder or file; for the hub the id.
        config: The decoder; of a family that only ``--graph optimum`` takes, its shapes.
        hf_config: Its ``config.json``, normalized (see :mod:`flrc_edge.hf_config`).
        note: What a user should hear before it is loaded.
    """

    name: str
    kind: Literal["folder", "hub", "gguf"]
    location: str
    config: ModelShapes
    hf_config: Mapping[str, Any]
    note: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, in eval mode.

    Attributes:
        name: How it is called in manifests and tables.
        path: The Hugging Face folder it was loaded from.
        config: The decoder.
        hf_config: Its ``config.json`` in both rope spellings, with every token that ends an answer.
        model: The torch model (SDPA attention, eval mode).
        tokenizer: What transformers makes of the folder's files (tokenizer_files.py).
    """

    name: str
    path: Path
    config: ModelShapes
    hf_config: Mapping[str, Any]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    @property
    def decoder(self) -> DecoderConfig:
        """The decoder, for what the exporter has to know of it.

        Raises:
            UsageError: The model is of a family that it cannot compute.
        """
        return decoder_of(self.config)


def decoder_of(config: ModelShapes) -> DecoderConfig:
    """Return a decoder that the exporter can compute.

    Raises:
        UsageError: It cannot.
    """
    if not isinstance(config, DecoderConfig):
        raise UsageError(
            f"a {config.architecture} has no size in bytes before it is exported",
            hint="give shares of parameters: --keep or --stages",
        )
    return config


def model_shapes(hf_config: Mapping[str, Any], *, portable: bool) -> ModelShapes:
    """Return the decoder of a configuration, or its shapes if it is of another family and ``portable`` is wanted.

    Raises:
        UnsupportedModelError: It is of another family, or has a layout that cannot be compressed.
    """
    if portable and hf_config.get("model_type") not in FAMILIES:
        from .portable_shapes import portable_shapes

        return portable_shapes(hf_config)
    return DecoderConfig.from_hf(hf_config)


def resolve_model(name_or_path: str, *, portable: bool = False) -> ModelSource:
    """Find a model and refuse it early if it cannot be compressed.

    Args:
        name_or_path: A built-in name, a folder, a ``.gguf`` file or a hub id. A built-in name wins over a
            folder of that name; write ``./name`` for the folder.
        portable: Also take families outside the capability table, whose graphs come from optimum.

    Raises:
        FlrcError: Unknown name, missing folder, a built-in model that was not pulled, pickled weights.
        FormatError: A weight file is truncated, missing or not what ``config.json`` says.
        UnsupportedModelError: The family or a field of its configuration is not handled.
    """
    if name_or_path in BUILTIN:
        return _builtin(name_or_path)
    path = Path(name_or_path).expanduser()
    if name_or_path and path.is_dir():
        return _folder(path, portable=portable)
    if name_or_path and path.is_file():
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".onnx", ".json"):
            raise UsageError(f"{path} is one file of a model", hint=f"give its folder: {path.parent}")
        from .gguf_file import read_gguf

        gguf = read_gguf(path)
        return ModelSource(path.stem, "gguf", str(path), DecoderConfig.from_hf(gguf.config), gguf.config)
    if _HUB_ID.match(name_or_path) and not name_or_path.lower().endswith(".gguf"):
        from .hub import fetch_config

        folder = fetch_config(name_or_path)
        refuse_other_folders(folder, name=name_or_path)
        config = read_config(folder)
        name = name_or_path.rpartition("/")[2]
        return ModelSource(name, "hub", name_or_path, model_shapes(config, portable=portable), config)
    raise UsageError(
        f"there is no model {name_or_path!r}",
        hint=f"give a folder, a GGUF file, a hub id (owner/name) or one of {', '.join(BUILTIN)}",
    )


def read_decoder_config(name_or_path: str) -> tuple[str, DecoderConfig]:
    """Return name and decoder of a model of which only the configuration need be there.

    Args:
        name_or_path: What :func:`resolve_model` takes; or a ``config.json``, or a folder that holds one.

    Raises:
        FlrcError: See :func:`resolve_model`.
    """
    path = Path(name_or_path).expanduser()
    if name_or_path not in BUILTIN and path.name == "config.json" and path.is_file():
        path = path.parent
    elif name_or_path in BUILTIN or not (path / "config.json").is_file():
        source = resolve_model(name_or_path)
        return source.name, decoder_of(source.config)
    return path.resolve().name, DecoderConfig.from_hf(read_config(path))


def open_model(name_or_path: str, *, dtype: str = "float32", portable: bool = False) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name_or_path: See :func:`resolve_model`.
        dtype: Of the weights in memory: float32, bfloat16 or float16.
        portable: See :func:`resolve_model`.

    Raises:
        FlrcError: See :func:`resolve_model`; also if the loaded modules are not those of the configuration.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    found = resolve_model(name_or_path, portable=portable)
    source = _materialize(found)
    folder = Path(source.location)
    if source.note is not None:
        _log.warning("%s", source.note)
    tokenizer = open_tokenizer(folder)
    source = _with_end_tokens(source, tokenizer)
    check_vocabulary(tokenizer, source.config.vocab_size, name=found.name)
    check_template(tokenizer, source.config.eos_token_ids, name=found.name)
    if found.kind != "gguf":  # a converted folder is written for the class that takes tokenizer.json as it is
        check_own_class(tokenizer, folder)
    return LoadedModel(
        name=found.name,
        path=folder,
        config=source.config,
        hf_config=source.hf_config,
        model=_load(folder, source, dtype),
        tokenizer=tokenizer,
    )


def _with_end_tokens(source: ModelSource, tokenizer: PreTrainedTokenizerFast) -> ModelSource:
    """Return the source with the tokens that end an answer, whoever names them."""
    ends = tuple(
        i for i in end_tokens(tokenizer, source.config.eos_token_ids) if i < source.config.vocab_size
    )
    value = None if not ends else ends[0] if len(ends) == 1 else list(ends)
    config: Any = source.config
    return replace(
        source,
        config=replace(config, eos_token_ids=ends),
        hf_config={**source.hf_config, "eos_token_id": value},
    )


def _builtin(name: str) -> ModelSource:
    from .pull import model_folder

    folder = model_folder(name)
    if not folder.is_dir():
        raise FlrcError(f"{name} is not on this machine yet", hint=f"flrc-edge pull {name}")
    source = _folder(folder)
    return replace(source, name=name)


def _folder(path: Path, *, portable: bool = False) -> ModelSource:
    refuse_other_folders(path, name=str(path))
    hf_config, note = follow_weights(path, read_config(path))
    config = model_shapes(hf_config, portable=portable)
    check_weights(path, config)
    check_files(path)
    return ModelSource(folder_name(path), "folder", str(path), config, hf_config, note)


def _materialize(source: ModelSource) -> ModelSource:
    """Return a source as a Hugging Face folder, downloading or converting it first."""
    if source.kind == "hub":
        from .hub import fetch_model

        return _folder(fetch_model(source.location), portable=not isinstance(source.config, DecoderConfig))
    if source.kind == "gguf":
        return replace(source, location=str(_converted(Path(source.location))))
    return source


def _converted(path: Path) -> Path:
    """Convert a GGUF file once; the folder in the cache is named by the file's hash."""
    from .gguf_file import CONVERSION, convert_gguf, read_gguf

    stem = re.sub(r"[^A-Za-z0-9._-]", "_", path.stem)
    target = cache_folder() / "gguf" / f"{stem}-{sha256_of(path)[:16]}-{CONVERSION}"
    with locked(target.parent / f".{target.name}.lock"):
        if not target.is_dir():
            _log.info("converting %s to %s", path.name, target)
            with published_folder(target) as work:
                convert_gguf(read_gguf(path), work)
    return target


def _load(folder: Path, source: ModelSource, dtype: str) -> PreTrainedModel:
    import torch
    import transformers

    settings = {k: v for k, v in source.hf_config.items() if k not in ("model_type", "transformers_version")}
    config = transformers.AutoConfig.for_model(source.config.architecture, **settings)
    try:
        with _no_progress_bar():
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, dtype),
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise FormatError(f"{folder.name} cannot be loaded: {first}") from error
    model: PreTrainedModel = loaded[0]
    # transformers only warns about these and fills what is missing with random numbers
    for problem in ("missing_keys", "mismatched_keys"):
        names = sorted(str(key) for key in loaded[1].get(problem, ()))
        if names:
            raise FormatError(f"{folder.name}: {names[0]} was not loaded from the weights ({problem})")
    _check_modules(model, source.config)
    _check_finite(model, folder.name)
    model.train(False)
    return model


def _check_finite(model: PreTrainedModel, name: str) -> None:
    """Refuse weights that calibration may never touch and the exporter would refuse, after hours of work."""
    import torch

    for key, tensor in model.state_dict().items():
        least, most = torch.aminmax(tensor)
        if not (torch.isfinite(least) and torch.isfinite(most)):
            raise NumericalError(
                f"{name}: {key} holds a value that is not finite", hint="the model's weights are damaged"
            )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _check_modules(model: Any, config: ModelShapes) -> None:
    """Compare the ``nn.Linear`` modules of the decoder layers with the projections of the configuration."""
    from torch import nn

    found = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    expected = {projection.name: projection.shape for projection in config.projections()}
    for name, shape in expected.items():
        if found.get(name) != shape:
            kind = f"is {list(found[name])}" if name in found else "is not an nn.Linear"
            raise UnsupportedModelError(f"the module {name} {kind}, expected {list(shape)}")
    extra = sorted(set(found) - set(expected))
    if extra:
        raise UnsupportedModelError(f"the module {extra[0]} is not a projection of a {config.architecture}")
