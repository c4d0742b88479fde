"""The whole way on one model, with its figures: compress, export, measure, answer.

The dense model goes through the same exporter and runtime, so every figure stands beside its own baseline.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from flrc_edge.compression import compress
from flrc_edge.decoding import prompt_ids
from flrc_edge.errors import ContextOverflowError
from flrc_edge.evaluation.bundle_perplexity import bundle_perplexity
from flrc_edge.measurements import window_length
from flrc_edge.models import LoadedModel
from flrc_edge.progress import Progress, Timings, silent
from flrc_edge.settings import Settings
from flrc_edge.texts import WeightedText, token_windows
from flrc_exporters.bundle import export
from flrc_exporters.number_format import Dtype
from flrc_runtime import Answer, Model, Token, load
from flrc_runtime.bench import bench
from flrc_runtime.files import write_json
from flrc_runtime.output_folder import check_output_folder

PROMPT = "What are the benefits of walking every day?"
HELD_OUT = (WeightedText("wikitext2-heldout", 0.5), WeightedText("austen-heldout", 0.5))
Show = Callable[[Token], None]


@dataclass(frozen=True)
class StageFigures:
    """One stage: share of projection parameters, perplexity, decode time (ms), bytes read a token."""

    keep: float
    ppl: float
    ms_per_token: float
    bytes: int


@dataclass(frozen=True)
class DenseFigures:
    """The dense model in the same number format."""

    ppl: float
    ms_per_token: float
    bytes: int


@dataclass(frozen=True)
class Summary:
    """What ``summary.json`` holds; ``stage_of_token`` names the stage of every answer token."""

    model: str
    keep: tuple[float, ...]
    dtype: str
    stages: tuple[StageFigures, ...]
    dense: DenseFigures
    bundle_bytes: int
    prompt: str
    answer: str
    dense_answer: str
    stage_of_token: tuple[int, ...]
    seconds: dict[str, float]
    machine: str


def run(
    loaded: LoadedModel,
    output: Path,
    settings: Settings,
    *,
    dtype: Dtype,
    prompt: str = PROMPT,
    max_tokens: int = 128,
    windows: int = 8,
    window: int = 512,
    overwrite: bool = False,
    progress: Progress = silent,
    show_dense: Show = lambda token: None,
    show: Show = lambda token: None,
) -> Summary:
    """Compress and export ``loaded`` into ``output``, and write ``summary.json`` there.

    Args:
        loaded: The model.
        output: An existing folder; gets ``checkpoint``, ``bundle`` and ``summary.json``.
        settings: How to compress.
        dtype: Number format of both exports.
        prompt: The question.
        max_tokens: Tokens of an answer, at most.
        windows: Held-out windows the perplexities are measured on.
        window: Tokens of each.
        overwrite: Replace an earlier demo, folder by folder once each is complete.
        progress: Called after each unit of work.
        show_dense: Called with each token of the dense model's answer.
        show: Called with each token of the compressed model's answer.
    """
    timings = Timings()
    checkpoint, bundle = output / "checkpoint", output / "bundle"
    context, length = loaded.config.context_length, prompt_ids(loaded.tokenizer, prompt).shape[1]
    if length >= context:
        raise ContextOverflowError(length, context)
    for folder in (checkpoint, bundle):
        check_output_folder(folder, overwrite=overwrite)
    compress(loaded, checkpoint, settings, overwrite=overwrite, progress=progress, timings=timings)
    with timings.phase("export"):
        written = export(checkpoint, bundle, dtype=dtype, overwrite=overwrite, progress=progress)
    with tempfile.TemporaryDirectory(dir=output, prefix=".dense-") as scratch:
        dense_bundle = Path(scratch) / "dense"
        with timings.phase("dense"):
            whole = Path(scratch) / "checkpoint"
            compress(loaded, whole, Settings(keep=(1.0,)))
            dense_info = export(whole, dense_bundle, dtype=dtype, progress=progress)
        ids = token_windows(
            loaded.tokenizer,
            HELD_OUT,
            windows=windows,
            length=window_length(loaded, window),
            vocab_size=loaded.config.vocab_size,
        ).ids
        with timings.phase("perplexity"):
            ppl = _perplexities(load(bundle), ids, progress, "stage")
            dense_ppl = _perplexities(load(dense_bundle), ids, progress, "dense")[0]
        with timings.phase("bench"):
            speed = bench(
                [bundle],
                baseline=dense_bundle,
                prompt_tokens=(),
                progress=lambda what, done, total: progress("bench", done, total),
            )
        ms = {(r.bundle, r.stage): r.ms_per_token for r in speed.rows if r.test == "decode"}
        with timings.phase("answer"):
            dense_answer = _answer(load(dense_bundle), prompt, max_tokens, show_dense)
            answer = _answer(load(bundle), prompt, max_tokens, show)
    summary = Summary(
        model=loaded.name,
        keep=settings.keep,
        dtype=dtype,
        stages=tuple(
            StageFigures(round(s.keep, 5), round(ppl[i], 3), round(ms[bundle.name, str(i)], 3), s.bytes)
            for i, s in enumerate(written.stages)
        ),
        dense=DenseFigures(
            round(dense_ppl, 3), round(ms[dense_bundle.name, "0"], 3), dense_info.stages[0].bytes
        ),
        bundle_bytes=sum(p.stat().st_size for p in bundle.iterdir()),
        prompt=prompt,
        answer=answer.text,
        dense_answer=dense_answer.text,
        stage_of_token=tuple(answer.stage_of_token),
        seconds={name: round(seconds, 1) for name, seconds in timings.seconds.items()},
        machine=f"{speed.machine}, {os.cpu_count()} cores, onnxruntime {speed.versions['onnxruntime']}",
    )
    write_json(output / "summary.json", asdict(summary))
    return summary


def _perplexities(model: Model, ids: Tensor, progress: Progress, what: str) -> list[float]:
    stages = model.manifest.plan.num_stages
    return [
        bundle_perplexity(model, ids, stage=s, progress=progress, phase=f"perplexity, {what} {s}")
        for s in range(stages)
    ]


def _answer(model: Model, prompt: str, max_tokens: int, show: Show) -> Answer:
    tokens = []
    for token in model.stream(prompt, max_tokens=max_tokens):
        tokens.append(token)
        show(token)
    return Answer.of(tokens)
