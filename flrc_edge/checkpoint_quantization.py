"""A checkpoint of floats -> one of integers: what ``compress --dtype`` does, for factors that were healed since.

Inputs and gradients are those of the compressed model itself, so that nothing of the original is needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from flrc_edge import checkpoint
from flrc_edge.chunks import Chunk
from flrc_edge.errors import UsageError
from flrc_edge.input_grams import weighted_grams
from flrc_edge.integers import quantize_model, with_formats
from flrc_edge.lowrank import LowRankLinear
from flrc_edge.measurements import GRAM_WINDOWS
from flrc_edge.models import DTYPES
from flrc_edge.progress import Progress, silent
from flrc_edge.settings import DEFAULT_TEXTS
from flrc_edge.texts import WeightedText, token_windows
from flrc_edge.tokenizer_files import open_tokenizer
from flrc_exporters.number_format import Integers
from flrc_runtime import manifest
from flrc_runtime.manifest import Manifest
from flrc_runtime.model_card import write_card
from flrc_runtime.output_folder import check_output_folder, published_folder


def quantize(
    folder: str | Path,
    output: str | Path,
    *,
    dtype: Integers = "int4",
    head: Integers = "int8",
    texts: Sequence[WeightedText] = DEFAULT_TEXTS,
    windows: int = GRAM_WINDOWS,
    window: int = 1024,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Manifest:
    """Round a checkpoint's matrices with compensation.

    Args:
        folder: A checkpoint of floats.
        output: The checkpoint to write; appears whole or not at all.
        dtype: Number format of the projections.
        head: Number format of embedding and head.
        texts: What the inputs are measured on.
        windows: How many windows of them.
        window: Tokens of each; the model's context if that is shorter.
        seed: Chooses the windows.
        overwrite: Replace a checkpoint that is there.
        progress: Called after each unit of work.

    Returns:
        The manifest as written.

    Raises:
        FlrcError: Anything a user can mend; nothing is written then.
    """
    source, target = Path(folder), Path(output)
    check_output_folder(target, overwrite=overwrite)
    content = manifest.verify(source, "checkpoint")
    if content.dtype not in DTYPES:
        raise UsageError(
            f"{source.name} holds {content.dtype} numbers already", hint="quantize a checkpoint of floats"
        )
    ids = token_windows(
        open_tokenizer(source),
        tuple(texts),
        windows=windows,
        length=min(window, content.model.context_length),
        seed=seed,
        vocab_size=content.model.vocab_size,
    ).ids
    model: Any = checkpoint.load(source).float()
    plan = with_formats(content.plan, dtype, head=head, hidden_size=content.model.hidden_size)
    chunks: dict[str, tuple[Chunk, ...]] = {
        name: module.stored() for name, module in model.named_modules() if isinstance(module, LowRankLinear)
    }
    grams = weighted_grams(model, [p.name for p in plan.projections], ids, progress=progress)
    integers = quantize_model(model, plan, chunks, grams, progress=progress)
    with published_folder(target, overwrite=overwrite) as work:
        for name in content.files:
            if name in (checkpoint.FACTORS, checkpoint.BASE):
                save_file(checkpoint.as_stored(load_file(source / name), integers), work / name)
            else:
                shutil.copyfile(source / name, work / name)
        rounded = replace(content, plan=plan, dtype=dtype)
        write_card(work, rounded)
        return manifest.seal(work, rounded)
