"""What is evaluated: a checkpoint or a model through torch, a bundle through onnxruntime, behind one face.

Everything else in this package reads tokens through a :class:`Subject` and never asks which of them it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from flrc_edge.errors import UsageError
from flrc_runtime import manifest
from flrc_runtime.manifest import Manifest, Schedule


@dataclass(frozen=True)
class Facts:
    """What a subject is.

    Attributes:
        name: Of the original model.
        kind: ``model``, ``checkpoint`` or ``bundle``.
        dtype: Number format of the projections.
        architecture: Its family.
        vocab_size: Size of the logits.
        hidden_size: Width of the residual stream.
        num_layers: Decoder layers.
        context_length: Most tokens of prompt and answer together.
        ends: Tokens that end an answer.
        projection_parameters: Of all projections before compression.
        kept: Share of them that each stage activates.
        schedule: Answer length -> stage.
    """

    name: str
    kind: str
    dtype: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    context_length: int
    ends: frozenset[int]
    projection_parameters: int
    kept: tuple[float, ...]
    schedule: Schedule

    @classmethod
    def of(cls, content: Manifest, ends: frozenset[int]) -> Facts:
        """Return the facts of a checkpoint or bundle."""
        model, plan = content.model, content.plan
        return cls(
            name=model.name,
            kind=content.kind,
            dtype=content.dtype,
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            num_layers=model.num_layers,
            context_length=model.context_length,
            ends=ends,
            projection_parameters=plan.dense_parameters,
            kept=tuple(plan.kept(s) for s in range(plan.num_stages)),
            schedule=content.schedule,
        )


class ReadPrompt(Protocol):
    """A prompt in the KV cache."""

    @property
    def logits(self) -> Tensor:
        """Logits ``[vocab]`` float32 of the first answer token."""

    def feed(self, ids: Sequence[int], stage: int) -> Tensor:
        """Feed tokens through a stage, behind those fed before; return logits ``[len(ids), vocab]`` float32."""

    def rewind(self) -> None:
        """Forget everything behind the prompt."""


class Subject(Protocol):
    """A model whose stages can be evaluated."""

    @property
    def facts(self) -> Facts:
        """What it is."""

    @property
    def tokenizer(self) -> Any:
        """Its Hugging Face tokenizer."""

    def logits(self, ids: Tensor, stage: int) -> Tensor:
        """Read ``ids: [T]`` at one stage; return logits ``[T, vocab]`` float32, which the caller may overwrite."""

    def read(self, prompt: Sequence[int], stage: int) -> AbstractContextManager[ReadPrompt]:
        """Read a prompt at one stage; its cache lives as long as the context."""


def open_subject(name: str) -> Subject:
    """Open a checkpoint, a bundle, or a model by folder or name.

    Raises:
        FlrcError: There is no such thing, or it is damaged.
    """
    folder = Path(name)
    if not (folder / manifest.FILE_NAME).is_file():
        from flrc_edge.evaluation.torch_subject import open_model_subject

        return open_model_subject(name)
    content = manifest.read(folder)
    if content.kind in ("bundle", "static"):
        from flrc_edge.evaluation.bundle_subject import BundleSubject

        return BundleSubject(folder, content)
    from flrc_edge.evaluation.torch_subject import open_checkpoint_subject

    return open_checkpoint_subject(folder, content)


def check_dense(subject: Subject, dense: Subject) -> None:
    """Check that ``dense`` can be the dense reference of ``subject``.

    Raises:
        UsageError: It is compressed, or of another model.
    """
    ours, theirs = subject.facts, dense.facts
    if min(theirs.kept) < 1:
        raise UsageError(
            f"the {theirs.kind} given as dense is compressed to keep {min(theirs.kept):.3f}",
            hint="give the original model, or a checkpoint or bundle of keep 1",
        )
    for label, field in _COMPARED.items():
        mine, other = getattr(ours, field), getattr(theirs, field)
        if mine != other:
            raise UsageError(
                f"the {ours.kind} has {label} {mine} and the dense {theirs.kind} {other}: "
                "they are of different models"
            )
    if subject.tokenizer.get_vocab() != dense.tokenizer.get_vocab():
        raise UsageError(
            f"the {ours.kind} and the dense {theirs.kind} have different vocabularies: "
            "they are of different models"
        )


_COMPARED: Mapping[str, str] = {
    "architecture": "architecture",
    "a vocabulary of": "vocab_size",
    "hidden size": "hidden_size",
    "layers:": "num_layers",
}
