"""Checkpoint folder in, bundle folder out: stage graphs, one weight file, tokenizer, ``flrc.json``."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flrc_runtime import kernels
from flrc_runtime import manifest as manifests
from flrc_runtime.errors import FormatError, UsageError
from flrc_runtime.files import read_json, resolve_inside, write_json
from flrc_runtime.genai_file import GENAI_FILE
from flrc_runtime.graph_file import GraphForm, check_graph_file
from flrc_runtime.manifest import Manifest, RankPlan, StageInfo, prefill_graph
from flrc_runtime.model_card import write_card
from flrc_runtime.output_folder import check_output_folder, check_room, published_folder
from flrc_runtime.tokenizer import read_template

from .architectures import DecoderConfig, checkpoint_tensors
from .chat_frames import write_frames
from .genai import eos_tokens, genai_config
from .layout import group_layouts
from .number_format import AccuracyLevel, Dtype, Formats, NumberFormat, default_dtype, rounded_plan
from .own_form import Cache, build_own_stage, default_cache, own_bytes_read
from .parity import check_graph, check_static_graph, check_values
from .refit import RefittedTensors
from .sizes import bytes_read
from .source import CheckpointTensors
from .stages import attach_weights, build_stage, save_stage, stage_file
from .static_stages import build_static_stage
from .versions import export_versions
from .weight_table import FILE_NAME, Matrix, Recipe, Stored, Tiles, own_recipes, placed, recipes
from .weights import WeightFile

SCALES_OF_A_BYTE = 3  # the schema version from which on scales have three bits of mantissa
STATIC_CONTEXT = 1024  # positions of a static bundle, if not asked for others
_COPIED = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")

log = logging.getLogger(__name__)


def export(
    checkpoint: Path,
    output: Path,
    *,
    dtype: Dtype | None = None,
    head: Dtype | None = None,
    context: int | None = None,
    accuracy_level: AccuracyLevel = 4,
    stock: bool = False,
    prefill: int | None = None,
    cache: Cache | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Manifest:
    """Write a bundle.

    Args:
        checkpoint: What ``compress`` wrote.
        output: The bundle folder; published by one rename, or left as it was.
        dtype: Number format of a float checkpoint's projections; by default int4, or int8 if it holds pivoted factors;
            int4/128 for instance has longer blocks (no row is padded: NumberFormat.fitted); integers are rounded to
            nearest. A checkpoint of integers is laid out as it is.
        head: Number format of embedding and head, or None for the one of ``dtype``.
        context: Positions (tokens) a conversation may have, or None for the model's own, at most 4096 (with ``prefill``
            1024, since every step looks at all of them).
        accuracy_level: Of a stock or static graph. 4: kernels of integers round activations to int8, 2-3 times faster;
            0 or 1: they do not.
        stock: Write graphs of onnxruntime's own operators, for onnxruntime-genai, WebGPU and onnxruntime-web, and not
            of the project's.
        prefill: Write a static bundle: graphs of standard operators and fixed shapes, for accelerators, one for a token
            and one for so many tokens of a prompt (static_form.py). A static bundle's numbers are fp32 if not asked
            otherwise, as are its embedding and head.
        cache: Numbers of keys and values in graphs of the project's operators: float16 by default, float32 where the
            projections are.
        overwrite: Replace an earlier bundle.
        progress: Called with what is being done, steps done and steps in all.

    Returns:
        The manifest as written.

    Raises:
        UsageError: The output exists, the context is out of range, or a number format is asked of a checkpoint of
            integers, or a cache of a stock or static graph.
        VerificationError: The checkpoint is damaged, or a written value differs from it.
        UnsupportedModelError: The decoder cannot compute this model.
    """
    check_output_folder(output, overwrite=overwrite)
    own = not stock and prefill is None
    if cache is not None and not own:
        raise UsageError("only graphs of the project's operators have a cache of other numbers than float32")
    # Hashes, not only sizes: a damaged factor must not become a bundle that verifies.
    written = manifests.verify(checkpoint, "checkpoint")
    resolve_inside(checkpoint, "tokenizer.json")
    raw = read_json(resolve_inside(checkpoint, "config.json"))
    if not isinstance(raw, dict):
        raise FormatError(f"{checkpoint.name}/config.json is not an object")
    config = DecoderConfig.from_hf(raw)
    static = prefill is not None
    positions = _context(context, config, most=STATIC_CONTEXT if static else None)
    if prefill is not None and not 2 <= prefill <= positions:
        raise UsageError(f"prefill {prefill} must lie between 2 and the {positions} tokens of the context")
    if written.schema_version < SCALES_OF_A_BYTE and written.plan.embedding and not (stock or static):
        raise UsageError(
            f"{checkpoint.name} holds integers of format {written.schema_version}, which our operators cannot read",
            hint="compress the model again, or export with --graph stock",
        )
    source = CheckpointTensors(checkpoint)
    _check_plan(written, config, source)
    if static and not written.plan.embedding:
        dtype, head = dtype or "fp32", head or "fp32"
    chosen, plan = _formats(written, dtype, head)
    if not written.plan.embedding:
        source = RefittedTensors(checkpoint, plan)
    formats = Formats(NumberFormat.named(plan.embedding, accuracy_level), accuracy_level)
    groups = group_layouts(config, plan)
    numbers = cache or default_cache(chosen)
    wanted = (own_recipes if own else recipes)(config, groups, formats)
    check_room(output, placed(config, plan, context=positions, own=own).size)

    def report(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, all_: progress(what, done, all_)

    with published_folder(output, overwrite=overwrite) as folder:
        weights = WeightFile(folder / FILE_NAME)
        weights.write(source, wanted, progress=report("weights"))
        weights.write_rotary(config, positions)
        stages, log_progress = [], report("stages")
        for stage in range(written.plan.num_stages):
            if prefill is None:
                build = partial(build_own_stage, cache=numbers) if own else build_stage
                model = build(config, groups, stage=stage, formats=formats, context=positions)
                used = _write_graph(folder / stage_file(stage), model, weights, "own" if own else "stock")
                check_graph(folder / stage_file(stage), config, context=positions, own=own)
            else:
                for count in (prefill, 1):
                    model = build_static_stage(
                        config, groups, stage=stage, formats=formats, window=positions, count=count
                    )
                    name = stage_file(stage) if count == 1 else prefill_graph(stage_file(stage))
                    used = _write_graph(folder / name, model, weights, "static")
                    check_static_graph(folder / name)
            if own:
                size = own_bytes_read(config, groups, stage=stage, formats=formats)
            else:
                size = bytes_read(used, config.vocab_size)
            stages.append(StageInfo(stage_file(stage), round(written.plan.kept(stage), 6), size))
            if log_progress is not None:
                log_progress(stage + 1, written.plan.num_stages)
        errors = check_values(weights.path, weights.table, wanted, source, progress=report("check"))
        _log_errors(errors, wanted)
        generation = _copy_files(checkpoint, folder)
        write_frames(folder, read_template(folder))
        if stock:
            write_json(
                folder / GENAI_FILE,
                genai_config(config, generation, context=positions, graph=stage_file(0)),
            )
        eos = eos_tokens(config, generation)
        content = replace(
            written,
            kind="static" if static else "bundle",
            dtype=chosen,
            plan=plan,
            model=replace(written.model, context_length=positions, eos_token_ids=eos),
            stages=tuple(stages),
            operators=kernels.VERSION if own else 0,
            versions=export_versions(written),
        )
        write_card(folder, content)
        return manifests.seal(folder, content)


def _formats(written: Manifest, dtype: Dtype | None, head: Dtype | None) -> tuple[str, RankPlan]:
    """Return the number format the bundle is named by, and the plan with the format of every matrix."""
    if written.plan.embedding:
        if dtype is not None or head is not None:
            raise UsageError(
                f"the checkpoint holds {written.dtype} numbers, which are laid out as they are",
                hint="leave out --dtype and --head, or compress with --dtype float",
            )
        return written.dtype, written.plan
    dtype = dtype or default_dtype(written.plan)
    chosen = NumberFormat.named(dtype)
    embedding = (NumberFormat.named(head) if head else chosen).fitted(written.model.hidden_size).name
    return dtype, rounded_plan(written.plan, chosen, embedding=embedding)


def _write_graph(path: Path, model: Any, weights: WeightFile, form: GraphForm) -> list[Stored]:
    """Write a graph that reads the weight file; return the tensors it reads."""
    used = attach_weights(model, weights.table, path.parent)
    save_stage(model, path)
    check_graph_file(path, {FILE_NAME: weights.path.stat().st_size}, form)
    return used


def _context(asked: int | None, config: DecoderConfig, *, most: int | None) -> int:
    if asked is None:
        return config.export_context() if most is None else min(config.export_context(), most)
    if not 2 <= asked <= config.context_length:
        raise UsageError(f"context {asked} must lie between 2 and the model's {config.context_length} tokens")
    return asked


def _check_plan(manifest: Manifest, config: DecoderConfig, source: CheckpointTensors) -> None:
    """Refuse a checkpoint whose plan, configuration and tensors disagree."""
    for name, shape in checkpoint_tensors(config, manifest.plan, where=source.folder.name).items():
        if source.shape(name) != shape:
            raise FormatError(f"tensor {name} has shape {source.shape(name)}, the plan says {shape}")


def _copy_files(checkpoint: Path, folder: Path) -> Mapping[str, Any]:
    """Copy tokenizer and configurations; return the content of generation_config.json."""
    shutil.copyfile(checkpoint / "tokenizer.json", folder / "tokenizer.json")
    for name in _COPIED:
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, folder / name)
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    return generation if isinstance(generation, dict) else {}


def _log_errors(errors: Mapping[str, float], wanted: list[Recipe]) -> None:
    worst = max((r for r in wanted if isinstance(r, Matrix | Tiles)), key=lambda r: errors[r.name])
    if errors[worst.name]:
        log.debug("largest rounding error: %.1f %% of the norm, in %s", 100 * errors[worst.name], worst.name)
