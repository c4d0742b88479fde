"""ROUGE-1, -2 and -L F1 by the package ``rouge_score`` with its stemmer, and the repetition of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from flrc_edge.errors import FlrcError

VARIANTS = ("rouge1", "rouge2", "rougeL")


class Rouge:
    """A scorer; the package is imported at once, so that it is missed before an hour of answers."""

    def __init__(self) -> None:
        try:
            from rouge_score import rouge_scorer
        except ModuleNotFoundError as error:
            raise FlrcError(
                f"ROUGE needs the package {error.name}, which is not installed",
                hint="pip install 'flrc-edge[eval]'",
            ) from None
        self._make = rouge_scorer.RougeScorer

    @cached_property
    def _scorer(self) -> Any:
        return self._make(list(VARIANTS), use_stemmer=True)

    def __call__(self, reference: str, answer: str) -> tuple[float, float, float]:
        """Return ROUGE-1, ROUGE-2 and ROUGE-L F1, from 0 to 1."""
        scores = self._scorer.score(reference, answer)
        one, two, longest = (float(scores[v].fmeasure) for v in VARIANTS)
        return one, two, longest


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Return the share of repeated n-grams, ``1 - distinct / all``, over token ids.

    ``seq-rep-4`` of Welleck et al., *Neural Text Generation with Unlikelihood Training* (ICLR 2020); 0 for an
    answer shorter than n tokens.
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
