"""The checkpoint folder: what ``compress`` writes and ``export`` reads (docs/format.md).

``factors.safetensors`` (``<projection>.chunks.<i>.V`` and ``.U``, pivoted also ``.order``), ``base.safetensors``
(every tensor that was not factorized, under its Hugging Face name), the model's config and tokenizer files, and
``flrc.json``, written last. A matrix with a number format of integers is stored as ``<tensor>.q`` and
``<tensor>.scales``, as the exporter lays them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flrc_edge.chunks import Chunk
from flrc_edge.errors import FormatError, UsageError
from flrc_edge.hf_config import read_config
from flrc_edge.loss_curves import LossCurves, write_curves
from flrc_edge.lowrank import LowRankLinear, replace_linear, set_stage
from flrc_edge.models import LoadedModel, model_shapes
from flrc_edge.quantization import QuantizedMatrix
from flrc_edge.tokenizer_files import save_tokenizer
from flrc_exporters.architectures import ModelShapes, checkpoint_tensors
from flrc_exporters.number_format import NumberFormat
from flrc_runtime import manifest
from flrc_runtime.files import read_json, resolve_inside, write_json
from flrc_runtime.manifest import Manifest, RankPlan
from flrc_runtime.model_card import write_card
from flrc_runtime.output_folder import published_folder

FACTORS = "factors.safetensors"
BASE = "base.safetensors"
GENERATION = "generation_config.json"


def write(
    target: Path,
    content: Manifest,
    *,
    source: LoadedModel,
    factors: Mapping[str, Sequence[Chunk]],
    integers: Mapping[str, QuantizedMatrix] | None = None,
    curves: LossCurves | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a checkpoint; ``target`` appears whole or not at all.

    Args:
        target: Folder to write.
        content: The manifest; its plan says which projections are factored.
        source: The original model, for every other tensor, its config and its tokenizer.
        factors: The chunks of every factored projection.
        integers: By tensor name, the matrices that are stored as integers instead of those floats.
        curves: What every rank was found to cost, for reports.
        overwrite: Replace a checkpoint that is there.

    Returns:
        The manifest as written.
    """
    factored = {p.name for p in content.plan.projections if not p.dense}
    integers = integers or {}
    with published_folder(target, overwrite=overwrite) as work:
        tensors = {}
        for name in factored:
            for i, chunk in enumerate(factors[name]):
                tensors[f"{name}.chunks.{i}.V"] = chunk.V.contiguous()
                tensors[f"{name}.chunks.{i}.U"] = chunk.U.contiguous()
                if chunk.order is not None:
                    tensors[f"{name}.chunks.{i}.order"] = chunk.order.contiguous()
        save_file(as_stored(tensors, integers), work / FACTORS)
        save_file(as_stored(_base_tensors(source.model, factored), integers), work / BASE)
        write_json(work / "config.json", dict(source.hf_config))
        write_json(work / GENERATION, _generation(source))
        save_tokenizer(source.tokenizer, work)
        if curves is not None:
            write_curves(work, curves)
        write_card(work, content)
        return manifest.seal(work, content)


def _generation(source: LoadedModel) -> dict[str, Any]:
    """Return the generation settings with every token that ends an answer, for those who read them alone."""
    path, special = source.path / GENERATION, ("bos_token_id", "eos_token_id", "pad_token_id")
    found = read_json(path) if path.is_file() else {key: source.hf_config.get(key) for key in special}
    settings = found if isinstance(found, dict) else {}
    return {**settings, "eos_token_id": source.hf_config.get("eos_token_id")}


def as_stored(tensors: Mapping[str, Tensor], integers: Mapping[str, QuantizedMatrix]) -> dict[str, Tensor]:
    """Return tensors as a checkpoint holds them: integers and scales in the place of floats."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in integers:
            stored |= {f"{name}.q": integers[name].packed, f"{name}.scales": integers[name].scales}
        else:
            stored[name] = tensor
    return stored


def _base_tensors(model: nn.Module, factored: set[str]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(".weight") and name.removesuffix(".weight") in factored:
            continue
        # A tied head is the embedding itself and is stored once.
        if seen.setdefault(tensor.data_ptr(), name) == name:
            kept[name] = tensor.contiguous()
    return kept


def load(folder: str | Path, stage: int = 0) -> Any:
    """Load a checkpoint as a Hugging Face model whose factored projections are :class:`LowRankLinear`.

    Args:
        folder: A checkpoint.
        stage: The stage to compute with; :func:`flrc_edge.set_stage` changes it later.

    Returns:
        The model in eval mode, usable with ``generate``.

    Raises:
        VerificationError: The folder does not hold what its ``flrc.json`` says.
        UsageError: There is no such stage.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    path = Path(folder)
    content = manifest.read(path, "checkpoint")
    if not 0 <= stage < content.plan.num_stages:
        raise UsageError(f"stage {stage} does not exist: there are stages 0 to {content.plan.num_stages - 1}")
    resolve_inside(path, "config.json")
    hf_config = read_config(path)
    decoder = model_shapes(hf_config, portable=True)
    factors = _read(resolve_inside(path, FACTORS))
    base = _read(resolve_inside(path, BASE))
    _check_tensors(path.name, content.plan, decoder, {**base, **factors})
    base, factors = (_as_floats(tensors, content.plan, decoder) for tensors in (base, factors))
    fields = {k: v for k, v in hf_config.items() if k not in ("model_type", "transformers_version")}
    config = AutoConfig.for_model(decoder.architecture, **fields)  # never the class a config.json names
    dtype = base["model.embed_tokens.weight"].dtype
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=dtype, attn_implementation="sdpa"
    ).eval()
    for projection in content.plan.projections:
        ranks = projection.factored_ranks
        if ranks:
            chunks = [
                Chunk(
                    factors[f"{projection.name}.chunks.{i}.V"].to(dtype),
                    factors[f"{projection.name}.chunks.{i}.U"].to(dtype),
                    factors.get(f"{projection.name}.chunks.{i}.order"),
                )
                for i in range(len(projection.chunks()))
            ]
            bias = base.get(f"{projection.name}.bias")
            replace_linear(model, projection.name, LowRankLinear(chunks, bias, ranks=ranks))
    model.load_state_dict({**base, **factors}, strict=False)
    model.tie_weights()
    if (path / GENERATION).is_file():
        resolve_inside(path, GENERATION)
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    set_stage(model, stage)
    return model


def _check_tensors(where: str, plan: RankPlan, decoder: ModelShapes, tensors: Mapping[str, Tensor]) -> None:
    """Compare plan and tensors with what the configuration says they are."""
    expected = checkpoint_tensors(decoder, plan, where=where)
    for name in sorted(expected.keys() ^ tensors.keys()):
        problem = "is missing" if name in expected else "is not part of its plan"
        raise FormatError(f"{where}: tensor {name} {problem}", hint="compress the model again")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise FormatError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}, the plan says {shape}"
            )
        if name.endswith(".q") and tensors[name].dtype != torch.uint8:
            raise FormatError(f"{where}: tensor {name} is not uint8", hint="compress the model again")
        if name.endswith(".order") and not _is_permutation(tensors[name]):
            raise FormatError(f"{where}: tensor {name} is not a permutation", hint="compress the model again")


def _as_floats(tensors: Mapping[str, Tensor], plan: RankPlan, decoder: ModelShapes) -> dict[str, Tensor]:
    """Replace integers and their scales by the floats they stand for."""
    formats = {name: (plan.embedding, shape) for name, shape in decoder.other_tensors().items()}
    for p in plan.projections:
        formats |= {f"{p.name}.{m}": (p.format_of(m), shape) for m, shape in p.matrices().items()}
    result: dict[str, Tensor] = {}
    for stored, tensor in tensors.items():
        name, _, kind = stored.rpartition(".")
        if kind == "q":
            number_format, shape = formats[name]
            integers = QuantizedMatrix(
                tensor, tensors[f"{name}.scales"], shape[1], NumberFormat.named(number_format)
            )
            result[name] = integers.dequantize()
        elif kind != "scales":
            result[stored] = tensor
    return result


def _is_permutation(order: Tensor) -> bool:
    return order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(len(order)))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path.parent.name}/{path.name} is damaged: {error}") from None
