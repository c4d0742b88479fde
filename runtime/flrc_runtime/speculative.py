"""Self-speculative decoding: a late stage drafts, stage 0 verifies all drafts in one pass, on the same KV buffers.

Every token is one that stage 0 chooses, or is drawn as stage 0 would draw it (speculative sampling, arXiv 2211.17192):
a draft from q is kept with probability min(1, p / q), else a token is drawn from max(0, p - q). The draft's weights
are in memory already, and taking positions back is only a shorter length.

What stage 0 chooses is what it computes in a pass over several tokens. Kernels that round activations to int8 (accuracy
level 4) give a single step other roundings: as good, but a close call may go another way than in stepping.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .any_decoder import AnyDecoder
from .errors import UsageError
from .sampling import Sampler

SMOOTHING = 0.1  # weight of the newest draft in the acceptance rate, of the newest pass in its time
FIRST = 4  # drafts of the first rounds, until times are known
PROBE = 32  # rounds without a draft after which one is tried again


@dataclass(frozen=True)
class Speculation:
    """How to draft.

    Args:
        stage: That drafts; None for the last one.
        most: Drafts at a time, at most.
        adaptive: Draft as many as measure fastest, which may be none; otherwise always ``most``.
    """

    stage: int | None = None
    most: int = 6
    adaptive: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.most, bool) or not isinstance(self.most, int) or self.most < 1:
            raise UsageError(f"most {self.most!r} is not a positive number of drafts")


def checked_draft_stage(speculation: Speculation, stages: int) -> int:
    """Return the stage that drafts.

    Raises:
        UsageError: The bundle has no such stage after stage 0.
    """
    if stages == 1:
        raise UsageError("a bundle of one stage has none that could draft")
    stage = stages - 1 if speculation.stage is None else speculation.stage
    if isinstance(stage, bool) or not isinstance(stage, int) or not 0 < stage < stages:
        raise UsageError(f"stage {stage!r} cannot draft, one of 1 to {stages - 1} can")
    return stage


class DraftLength:
    """How many drafts are fastest, from the acceptance rate and from what steps and passes take.

    Args:
        most: Upper bound.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._rate = 0.7  # of drafts that are kept, each given that those before it were
        self._draft: float | None = None  # seconds of a step of the draft's stage
        self._verify: dict[int, float] = {}  # seconds of a pass of stage 0 over a token and k drafts
        self._idle = 0

    def __call__(self) -> int:
        """Return the drafts of the next round."""
        for k in (FIRST, 0):  # both are needed to compare with
            if min(k, self._most) not in self._verify:
                return min(k, self._most)
        best = max(range(self._most + 1), key=lambda k: (self.speed(k), -k))
        self._idle = 0 if best else self._idle + 1
        if self._idle >= PROBE:
            self._idle = 0
            return 1
        return best

    def speed(self, k: int) -> float:
        """Return the tokens a second that k drafts a round are expected to give."""
        tokens = sum(self._rate**i for i in range(k + 1))
        return tokens / max(k * (self._draft or 0.0) + self._time(k), 1e-9)

    def note(self, drafted: int, kept: int, *, draft_seconds: float, verify_seconds: float) -> None:
        """Learn from a round."""
        if drafted:
            step = draft_seconds / drafted
            self._draft = step if self._draft is None else self._draft + SMOOTHING * (step - self._draft)
        known = self._verify.get(drafted, verify_seconds)
        self._verify[drafted] = known + SMOOTHING * (verify_seconds - known)
        for i in range(min(kept + 1, drafted)):  # what follows a refused draft says nothing
            self._rate += SMOOTHING * ((i < kept) - self._rate)

    def _time(self, k: int) -> float:
        """Return the seconds of a pass over k drafts, between or beyond those that were measured."""
        counts = sorted(self._verify)
        if len(counts) == 1:
            return self._verify[counts[0]]
        upper = next((i for i, count in enumerate(counts) if k <= count), len(counts) - 1)
        first, second = counts[max(upper, 1) - 1], counts[max(upper, 1)]
        slope = (self._verify[second] - self._verify[first]) / (second - first)
        return self._verify[first] + slope * (k - first)


class Speculator:
    """Rounds of drafting and verifying one sequence.

    Args:
        decoder: Of the sequence, whose positions stage 0 filled.
        sampler: Chooses; knows the tokens so far.
        speculation: How to draft.
        stages: Of the bundle.
        ends: Tokens that end the answer.
        clock: Seconds.
    """

    def __init__(
        self,
        decoder: AnyDecoder,
        sampler: Sampler,
        speculation: Speculation,
        *,
        stages: int,
        ends: Collection[int] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        stage = checked_draft_stage(speculation, stages)
        self._decoder, self._sampler, self._stage = decoder, sampler, stage
        self._settings, self._ends, self._clock = speculation, frozenset(ends), clock
        self._length = DraftLength(speculation.most)
        self.drafted = self.kept = 0

    def tokens(self, ids: Sequence[int]) -> Iterator[int]:
        """Yield the tokens after a prompt without end, several a round."""
        logits = self._decoder.prefill(ids, 0)
        token = self._sampler(logits, stage=0, position=self._decoder.length - 1)
        yield token
        while True:
            found = self.round(token)
            yield from found
            token = found[-1]

    def round(self, token: int) -> list[int]:
        """Return the tokens after ``token``, at least one; the cache then ends before the last of them."""
        decoder = self._decoder
        start = decoder.length
        wanted = self._length() if self._settings.adaptive else self._settings.most
        begun = self._clock()
        drafts, chances = self._drafts(token, min(wanted, decoder.cache.context - start - 1))
        between = self._clock()
        decoder.cache.rollback(start)
        # [drafts + 1, vocab]
        rows = decoder.feed([token, *drafts], 0) if drafts else decoder.step(token, 0)[None]
        kept: list[int] = []
        for i, draft in enumerate(drafts):
            chosen, accepted = self._sampler.verified(rows[i], draft, chances[i], stage=0, position=start + i)
            kept.append(chosen)
            if not accepted:
                break
        else:
            kept.append(self._sampler(rows[-1], stage=0, position=start + len(drafts)))
        decoder.cache.rollback(start + len(kept))
        good = len(kept) - 1
        self._length.note(
            len(drafts), good, draft_seconds=between - begun, verify_seconds=self._clock() - between
        )
        self.drafted += len(drafts)
        self.kept += good
        return kept

    def _drafts(self, token: int, count: int) -> tuple[list[int], list[NDArray[np.float64] | None]]:
        """Return tokens of the draft's stage and the chances it drew each from (None where it is greedy)."""
        drafts: list[int] = []
        chances: list[NDArray[np.float64] | None] = []
        for _ in range(count):
            logits = self._decoder.step(drafts[-1] if drafts else token, self._stage)
            draft, chance = self._sampler.draft(
                logits, after=drafts, stage=self._stage, position=self._decoder.length - 1
            )
            drafts.append(draft)
            chances.append(chance)
            if draft in self._ends:
                break
        return drafts, chances
