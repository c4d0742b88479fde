"""Texts -> windows to train on, in an order that the seed alone decides, and held-out windows of the same texts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flrc_edge.errors import UsageError
from flrc_edge.texts import WeightedText, token_windows
from flrc_runtime.manifest import TextSource


@dataclass(frozen=True)
class TrainingWindows:
    """Windows of token ids, cut without overlap.

    Args:
        train: ``[windows, T]`` int64 of each text.
        weights: How often a window is drawn from each text, relative to the others.
        validation: ``[windows, T]``: parts of the same texts that are never drawn.
        sources: What each text is.
    """

    train: tuple[Tensor, ...]
    weights: tuple[float, ...]
    validation: Tensor
    sources: tuple[TextSource, ...]

    def draw(self, seed: int) -> Iterator[Tensor]:
        """Yield windows ``[T]`` without end; a text's windows come once each before any comes again."""
        choose = random.Random(seed)
        shuffled: list[list[int]] = [[] for _ in self.train]
        while True:
            # Texts by lot and not in turn: with stages in turn, a stage might never see one of them.
            (text,) = choose.choices(range(len(self.train)), self.weights)
            if not shuffled[text]:
                shuffled[text] = list(range(len(self.train[text])))
                choose.shuffle(shuffled[text])
            yield self.train[text][shuffled[text].pop()]


def training_windows(
    tokenizer: Any,
    texts: Sequence[WeightedText],
    *,
    length: int,
    validation: int,
    vocab_size: int | None = None,
) -> TrainingWindows:
    """Cut texts into windows, and set some of each aside.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: Built-in names, files or folders, with weights.
        length: Tokens a window.
        validation: Windows to set aside in all, spread over each text; at least one of each.
        vocab_size: Rows of the model's embedding; see :func:`flrc_edge.texts.token_windows`.

    Raises:
        UsageError: A text is missing, unreadable or shorter than two windows.
    """
    total = sum(t.weight for t in texts)
    train, held = list[Tensor](), list[Tensor]()
    sources: list[TextSource] = []
    for text in texts:
        found = token_windows(tokenizer, (text,), windows=None, length=length, vocab_size=vocab_size)
        count = len(found.ids)
        if count < 2:
            raise UsageError(
                f"the text {text.name} fills {count} window of {length} tokens, two are needed",
                hint="give a longer text or a shorter window",
            )
        aside = min(max(1, round(validation * text.weight / total)), count // 2)
        places = torch.tensor([(2 * i + 1) * count // (2 * aside) for i in range(aside)])
        drawn = torch.ones(count, dtype=torch.bool)
        drawn[places] = False
        train.append(found.ids[drawn])
        held.append(found.ids[places])
        sources.extend(found.sources)
    return TrainingWindows(tuple(train), tuple(t.weight for t in texts), torch.cat(held), tuple(sources))
