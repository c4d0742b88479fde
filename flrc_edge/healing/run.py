"""Heal a checkpoint: ``KL(dense || stage s)``, mean per token over the whole vocabulary, by AdamW on its factors.

Windows and stage are functions of seed and step, so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flrc_edge import checkpoint, schedule
from flrc_edge.boundaries import HORIZON
from flrc_edge.divergence import dense_log_probs
from flrc_edge.errors import UsageError
from flrc_edge.healing.balance import balance, stored_tensors
from flrc_edge.healing.distillation import Arithmetic, Distiller
from flrc_edge.healing.session import Point, Session
from flrc_edge.healing.settings import Settings
from flrc_edge.healing.state import StateFile
from flrc_edge.healing.trainer import Trainer
from flrc_edge.healing.windows import TrainingWindows, training_windows
from flrc_edge.machine import machine
from flrc_edge.models import DTYPES, LoadedModel
from flrc_edge.origin import open_dense
from flrc_edge.progress import Progress, silent
from flrc_runtime import manifest
from flrc_runtime.files import read_json, write_json
from flrc_runtime.manifest import Manifest
from flrc_runtime.model_card import write_card
from flrc_runtime.output_folder import check_output_folder, published_folder

REPORT = "healing.json"


@dataclass(frozen=True)
class Healed:
    """What a run did.

    Attributes:
        manifest: As written.
        tokens: Trained on.
        curve: From the start to the end.
        report: The run's entry in ``healing.json``.
    """

    manifest: Manifest
    tokens: int
    curve: tuple[Point, ...]
    report: dict[str, Any]

    def benchmark(self, checkpoint: str) -> dict[str, Any]:
        """Return the result for ``benchmarks.json``, of a checkpoint of that name."""
        plan = self.manifest.plan
        return {
            **self.report,
            "checkpoint": checkpoint,
            "kept": [round(plan.kept(s), 4) for s in range(plan.num_stages)],
            "storage": " and ".join(sorted({p.storage for p in plan.projections if not p.dense})),
            "machine": machine(),
        }


def heal(
    folder: str | Path,
    output: str | Path,
    settings: Settings | None = None,
    *,
    model: str | LoadedModel | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    on_point: Callable[[Point], None] | None = None,
) -> Healed | None:
    """Heal a checkpoint.

    Args:
        folder: A checkpoint.
        output: The checkpoint to write; appears whole or not at all.
        settings: How to heal.
        model: The dense model it was compressed from; by default the built-in one its manifest names.
        overwrite: Replace a checkpoint that is there.
        resume: Go on with an interrupted run into the same output; begins if there is none.
        progress: Called after every step.
        on_point: Called with every measurement of the curve.

    Returns:
        What was done, or None in a process of ``accelerate launch`` that only helped.

    Raises:
        Interrupted: Ctrl-C; the state is saved.
        FlrcError: Anything a user can mend; an earlier state is kept.
    """
    from accelerate import Accelerator

    settings = settings or Settings()
    source, target = Path(folder), Path(output)
    check_output_folder(target, overwrite=overwrite)
    content = manifest.verify(source, "checkpoint")
    if content.dtype not in DTYPES:
        raise UsageError(
            f"{source.name} is stored as {content.dtype} and cannot be trained",
            hint="heal a checkpoint of floats, then quantize",
        )
    stages = content.plan.num_stages
    weights = settings.stage_weights or (1.0,) * stages
    if len(weights) != stages:
        raise UsageError(f"{len(weights)} stage weights are given, {source.name} has {stages} stages")
    dense = open_dense(model, content, source)
    windows = training_windows(
        dense.tokenizer,
        settings.texts,
        length=min(settings.window, content.model.context_length),
        validation=settings.validation_windows,
        vocab_size=content.model.vocab_size,
    )
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    arithmetic = Arithmetic.of(settings.precision, accelerator.device)
    run = _run(content, dense, windows, settings)
    run |= {"precision": str(arithmetic.dtype), "processes": accelerator.num_processes}
    state = StateFile(target, run)
    if not resume:
        state.refuse_unless_resumed()
    student = checkpoint.load(source).float()
    balance(student)
    student.to(accelerator.device)
    teacher: Any = dense.model.to(accelerator.device)
    distiller = Distiller(student, teacher, arithmetic)
    trainer = Trainer(distiller, accelerator, train=settings.train, lr=settings.lr, clip=settings.clip)
    session = Session(
        settings,
        trainer=trainer,
        distiller=distiller,
        windows=windows,
        accelerator=accelerator,
        stage_weights=weights,
        on_point=on_point if accelerator.is_main_process else None,
        progress=progress,
    )
    if not accelerator.is_main_process:
        session.run(state, resume=resume)
        return None
    with state.locked():
        session.run(state, resume=resume)
        content = _with_schedule(content, student.cpu(), dense, progress)
        trained = {name: parameter.detach() for name, parameter in trainer.parameters.items()}
        pivoted = {p.name for p in content.plan.projections if p.storage == "pivoted"}
        trained |= dict(stored_tensors(student, pivoted))
        chosen = asdict(settings)
        del chosen["texts"]  # they are below, without the paths of this machine
        report = {
            "model": dense.name,
            "settings": chosen,
            "precision": str(arithmetic.dtype).removeprefix("torch."),
            "texts": [asdict(text) for text in windows.sources],
            "tokens": session.tokens,
            "curve": [asdict(point) for point in session.curve],
        }
        written = _publish(target, source, content, trained=trained, report=report, overwrite=overwrite)
        state.remove()
    return Healed(written, session.tokens, tuple(session.curve), report)


def _run(
    content: Manifest, dense: LoadedModel, windows: TrainingWindows, settings: Settings
) -> dict[str, Any]:
    """Return by name what the result depends on."""
    chosen = asdict(settings)
    for name in ("save_minutes", "precision", "texts"):
        del chosen[name]
    return {
        **chosen,
        "checkpoint": _digest({name: f.sha256 for name, f in content.files.items()}),
        "dense model": _weights_digest(dense.model),
        "texts": [[s.name, s.sha256, s.weight] for s in windows.sources],
    }


def _digest(value: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(value.items())).encode()).hexdigest()


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def _with_schedule(content: Manifest, student: nn.Module, dense: LoadedModel, progress: Progress) -> Manifest:
    """Measure the schedule again where it had been measured: healing changes how good each stage is."""
    if not content.schedule.divergence:
        return content
    model: Any = dense.model.cpu()
    context, plan = dense.config.context_length, content.plan
    reference = schedule.reference_answers(model, dense.tokenizer, context=context, progress=progress)
    planned = schedule.plan_schedule(
        student,
        reference,
        dense_log_probs(model, reference),
        kept=[plan.kept(s) for s in range(plan.num_stages)],
        end=max(context, HORIZON),
        progress=progress,
    )
    return replace(content, schedule=planned.schedule)


def _publish(
    target: Path,
    source: Path,
    content: Manifest,
    *,
    trained: Mapping[str, Tensor],
    report: Mapping[str, Any],
    overwrite: bool,
) -> Manifest:
    """Write the source checkpoint with its trained tensors replaced, each in the dtype it was stored in."""
    left = set(trained)
    with published_folder(target, overwrite=overwrite) as work:
        for name in content.files:
            if name not in (checkpoint.FACTORS, checkpoint.BASE):
                shutil.copyfile(source / name, work / name)
                continue
            tensors = load_file(source / name)
            for key in tensors.keys() & left:
                tensors[key] = trained[key].to(tensors[key].dtype).contiguous()
                left.remove(key)
            save_file(tensors, work / name)
        if left:
            raise KeyError(f"{sorted(left)[0]} is not a tensor of {source.name}")
        earlier = read_json(source / REPORT)["runs"] if REPORT in content.files else []
        write_json(work / REPORT, {"runs": [*earlier, report]})
        write_card(work, content)
        return manifest.seal(work, content)
