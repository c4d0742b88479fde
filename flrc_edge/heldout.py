"""Held-out texts that several versions of one model are measured on, with the dense model's perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from torch import Tensor

from flrc_edge.errors import UsageError
from flrc_edge.evaluation.perplexity import perplexity, torch_logits
from flrc_edge.models import LoadedModel
from flrc_edge.progress import Progress, silent
from flrc_edge.texts import WeightedText, token_windows


@dataclass(frozen=True)
class EvaluationText:
    """What perplexity is measured on, and the dense model's."""

    name: str
    tokens: int
    dense_perplexity: float


@dataclass(frozen=True)
class HeldOut:
    """Windows ``[windows, T]`` by the name of their text, and the dense model's perplexity on each."""

    windows: dict[str, Tensor]
    dense: dict[str, float]

    def perplexities(self, model: Any) -> dict[str, float]:
        """Return a model's perplexity on each text."""
        return {name: perplexity(torch_logits(model), ids) for name, ids in self.windows.items()}

    def growth(self, text: str, value: float) -> float:
        """Return ln perplexity - ln perplexity of the dense model."""
        return log(value) - log(self.dense[text])

    def described(self) -> tuple[EvaluationText, ...]:
        """Return the texts for a result."""
        return tuple(
            EvaluationText(name, ids.numel(), round(self.dense[name], 3))
            for name, ids in self.windows.items()
        )


def check_texts(texts: Sequence[str]) -> None:
    """Check the texts' names.

    Raises:
        UsageError: There is none, or two have the same name.
    """
    names = [Path(t).name for t in texts]
    if not names:
        raise UsageError("name at least one text")
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UsageError(f"the text {twice} is named twice")


def held_out_windows(
    loaded: LoadedModel, texts: Sequence[str], *, windows: int | None, length: int
) -> dict[str, Tensor]:
    """Cut texts into windows.

    Args:
        loaded: Gives the tokenizer.
        texts: Built-in samples, files or folders.
        windows: How many from the beginning of each; None for all.
        length: Tokens of each.

    Raises:
        UsageError: A text is missing, unreadable or too short.
    """
    return {
        Path(text).name: token_windows(
            loaded.tokenizer,
            (WeightedText(text),),
            windows=windows,
            length=length,
            vocab_size=loaded.config.vocab_size,
        ).ids
        for text in texts
    }


def hold_out(loaded: LoadedModel, windows: dict[str, Tensor], *, progress: Progress = silent) -> HeldOut:
    """Measure the dense model on windows."""
    dense = {}
    for done, (name, ids) in enumerate(windows.items(), 1):
        dense[name] = perplexity(torch_logits(loaded.model), ids)
        progress("perplexity, dense", done, len(windows))
    return HeldOut(windows, dense)
