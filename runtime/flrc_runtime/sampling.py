"""Choose a token from logits: greedy, or by temperature, top-k and top-p after a repetition penalty.

The order and the penalty are those of Hugging Face's logits processors. Only the entries that can be drawn
are sorted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import NumericalError, UsageError

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: 0 is greedy (top_k, top_p and seed then have no effect), at most 100.
        top_k: Draw among this many most likely tokens; 0 for all.
        top_p: Draw among the fewest tokens whose probabilities, after top_k, sum to this or more; in (0, 1].
        repetition_penalty: Divides positive and multiplies negative logits of tokens seen in prompt or
            answer; in (0, 10], 1 has no effect.
        seed: Of the draws, from 0 on; None for another answer every time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= _number(self.temperature) <= 100, "from 0 to 100")
        _check("top_k", self.top_k, _is_integer(self.top_k) and self.top_k >= 0, "an integer from 0 on")
        _check("top_p", self.top_p, 0 < _number(self.top_p) <= 1, "in (0, 1]")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0 < _number(penalty) <= 10, "in (0, 10]")
        _check(
            "seed", self.seed, self.seed is None or (_is_integer(self.seed) and self.seed >= 0), "from 0 on"
        )


class Sampler:
    """Draws one token after another and remembers the seen ones for the repetition penalty.

    Args:
        sampling: The settings.
        seen: Token ids of the prompt.
    """

    def __init__(self, sampling: Sampling, seen: Iterable[int] = ()) -> None:
        self._settings = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._penalized = sampling.repetition_penalty != 1
        self._seen = set(seen) if self._penalized else set()

    def __call__(self, logits: FloatArray, *, stage: int, position: int) -> int:
        """Return the next token id.

        Args:
            logits: [vocab] float32, not changed.
            stage: That computed them, for the error message.
            position: Of the token they follow.

        Raises:
            NumericalError: A logit is not finite.
        """
        _check_finite(logits, stage, position)
        scores = self._penalize(logits) if self._penalized else logits
        if self._settings.temperature == 0:
            token = int(scores.argmax())
        else:
            ids, probabilities = distribution(scores, self._settings)
            token = int(ids[self._drawn(probabilities)])
        self._note(token)
        return token

    def draft(
        self, logits: FloatArray, *, after: Sequence[int], stage: int, position: int
    ) -> tuple[int, NDArray[np.float64] | None]:
        """Return a token that another stage will verify, and what it was drawn from; it is not remembered.

        Args:
            logits: [vocab] float32 of the drafting stage.
            after: Drafts before this one, not verified either.
            stage: That computed them, for the error message.
            position: Of the token they follow.

        Returns:
            The token, and the probabilities [vocab] or None if greedy.
        """
        _check_finite(logits, stage, position)
        scores = self._penalize(logits, after) if self._penalized else logits
        if self._settings.temperature == 0:
            return int(scores.argmax()), None
        chances = self._chances(scores)
        return self._drawn(chances), chances

    def verified(
        self,
        logits: FloatArray,
        draft: int,
        chances: NDArray[np.float64] | None,
        *,
        stage: int,
        position: int,
    ) -> tuple[int, bool]:
        """Return the next token, distributed as a call would draw it, and whether it is the draft.

        Args:
            logits: [vocab] float32 of the stage that verifies.
            draft: A token of :meth:`draft`.
            chances: What it was drawn from.
            stage: That computed the logits, for the error message.
            position: Of the token they follow.
        """
        if chances is None:
            token = self(logits, stage=stage, position=position)
            return token, token == draft
        _check_finite(logits, stage, position)
        wanted = self._chances(self._penalize(logits) if self._penalized else logits)
        accepted = self._random.random() * chances[draft] < wanted[draft]
        token = draft
        if not accepted:
            rest = np.maximum(wanted - chances, 0)
            total = rest.sum()  # 0 where only rounding made the draft likelier than the verifier has it
            token = self._drawn(rest / total if total > 0 else wanted)
        self._note(token)
        return token, bool(accepted)

    def _chances(self, scores: FloatArray) -> NDArray[np.float64]:
        ids, probabilities = distribution(scores, self._settings)
        chances = np.zeros(scores.shape[0], np.float64)
        chances[ids] = probabilities
        return chances

    def _drawn(self, probabilities: NDArray[np.float64]) -> int:
        """Return the index that one uniform number draws, so that a seed gives the same draws for any top_k, top_p."""
        drawn = int(np.searchsorted(np.cumsum(probabilities), self._random.random(), side="right"))
        if drawn == len(probabilities):  # the sum is rounded to less than the number
            return int(np.flatnonzero(probabilities)[-1])
        return drawn

    def _note(self, token: int) -> None:
        if self._penalized:
            self._seen.add(token)

    def _penalize(self, logits: FloatArray, after: Sequence[int] = ()) -> FloatArray:
        tokens = self._seen.union(after) if after else self._seen
        seen = np.fromiter(tokens, np.int64, len(tokens))
        scores = logits.copy()
        values = scores[seen]
        penalty = np.float32(self._settings.repetition_penalty)
        scores[seen] = np.where(values < 0, values * penalty, values / penalty)
        return scores


def _check_finite(logits: FloatArray, stage: int, position: int) -> None:
    if not np.isfinite(logits).all():
        raise NumericalError(
            f"stage {stage} gave logits that are not finite at position {position}",
            hint="run flrc-edge verify on the bundle; if it is intact, export it again",
        )


@dataclass(frozen=True, slots=True)
class LogProbabilities:
    """What the model thought of a token, before temperature, restrictions and repetition penalty.

    Args:
        chosen: Natural logarithm of the probability of the token that was chosen.
        top: The most likely tokens and theirs, most likely first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


def log_probabilities(logits: FloatArray, token: int, top: int) -> LogProbabilities:
    """Return the log probabilities of a token and of the ``top`` most likely ones.

    Args:
        logits: [vocab] float32.
        token: The one that was chosen.
        top: How many more; 0 for none.
    """
    scores = logits.astype(np.float64) - float(logits.max())
    scores -= np.log(np.exp(scores).sum())
    best = _largest(scores, top) if top else np.empty(0, np.int64)
    return LogProbabilities(float(scores[token]), tuple((int(i), float(scores[i])) for i in best))


def distribution(scores: FloatArray, sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return what is drawn from at a temperature above 0.

    Args:
        scores: [vocab] float32 logits after the repetition penalty.
        sampling: The settings.

    Returns:
        Token ids [n], most likely first if top_k or top_p restrict them, and their probabilities [n], sum 1.
    """
    vocab = scores.shape[0]
    # Subtract before dividing: a tiny temperature then underflows to 0 and never overflows.
    scaled = (scores.astype(np.float64) - float(scores.max())) / sampling.temperature
    count = min(sampling.top_k, vocab) or vocab
    if count == vocab and sampling.top_p == 1:
        weights = np.exp(scaled)
        return np.arange(vocab), weights / weights.sum()
    if sampling.top_p == 1:
        ids = _largest(scaled, count)
        weights = np.exp(scaled[ids])
        return ids, weights / weights.sum()
    total = float(np.exp(scaled if count == vocab else scaled[_largest(scaled, count)]).sum())
    size = min(64, count)
    while True:
        ids = _largest(scaled, size)
        weights = np.exp(scaled[ids])
        before = np.cumsum(weights) - weights  # mass of the more likely tokens
        inside = int(np.count_nonzero(before < sampling.top_p * total))
        if inside < size or size == count:
            ids, weights = ids[:inside], weights[:inside]
            return ids, weights / weights.sum()
        size = min(size * 8, count)


def _largest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return the indices of the ``count`` largest values, largest first."""
    size = values.shape[0]
    chosen = np.arange(size) if count >= size else np.argpartition(values, size - count)[size - count :]
    return chosen[np.argsort(-values[chosen], kind="stable")]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> float:
    """Return a real number as it is and anything else as NaN, which is outside every range."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _check(name: str, value: object, valid: bool, allowed: str) -> None:
    if not valid:
        raise UsageError(f"{name} {value!r} is not {allowed}")
