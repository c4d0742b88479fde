"""Policies that look at more than the token count: time, mean parameters, and outside signals such as the battery.

All take plain numbers, so that they can be tried without a clock or a device. Those with a memory belong to one
stream at a time; a new answer (``state.generated == 1``) starts them anew, what a step takes is remembered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from .errors import UsageError
from .policy import Policy, StepState, prompt_stage

SMOOTHING = 0.25  # weight of the newest step in the time of a stage
MARGIN = 0.9  # of the budget, under which an earlier stage is tried again, so that it does not come and go
PATIENCE = 8  # tokens on a stage before another move


class LatencyBudget:
    """Use the earliest stage whose decode step stays within a time.

    Args:
        ms: Milliseconds a token may take.
        stages: Of the bundle.
    """

    def __init__(self, ms: float, stages: int) -> None:
        if not 0 < ms < math.inf:
            raise UsageError(f"a latency budget of {ms!r} ms is not positive")
        self._budget, self._stages = ms, stages
        self._times: dict[int, float] = {}  # ms of a step by stage, as last seen
        self._stayed = 0

    def __call__(self, state: StepState) -> int:
        """Return the stage of the next token."""
        if state.generated <= 1:
            self._stayed = 0
        now = state.stage
        if state.last_ms > 0:
            before = self._times.get(now)
            new = state.last_ms if before is None else before + SMOOTHING * (state.last_ms - before)
            if before is not None:  # what slows one stage down, another program or heat, slows all
                self._times = {s: t * new / before for s, t in self._times.items()}
            self._times[now] = new
        self._stayed += 1
        chosen = self._chosen(now)
        if chosen != now:
            self._stayed = 0
        return chosen

    def _chosen(self, now: int) -> int:
        time = self._times.get(now)
        if time is None:
            return now
        if time > self._budget:
            return min(now + 1, self._stages - 1) if self._stayed >= 2 else now  # a single slow step is noise
        if now > 0 and self._stayed >= PATIENCE and self._times.get(now - 1, 0.0) <= MARGIN * self._budget:
            return now - 1
        return now


class MeanBudget:
    """Use the earliest stages that keep the mean share of activated parameters of an answer within a budget.

    The mean holds at the end of every block of tokens, so wherever the answer ends it is exceeded by less than a block.

    Args:
        mean: Share of projection parameters a token may activate on average.
        kept: Share of each stage, falling; a manifest's ``plan.kept(s)``.
        block: Tokens between two decisions.
    """

    def __init__(self, mean: float, kept: Sequence[float], *, block: int = 16) -> None:
        if not kept or any(a < b for a, b in pairwise(kept)):
            raise UsageError("the shares of the stages must be given and must not grow")
        if not mean >= kept[-1]:
            raise UsageError(f"a mean of {mean:g} is below {kept[-1]:g}, the share of the last stage")
        if block < 1:
            raise UsageError(f"a block of {block} tokens is too short")
        self._mean, self._kept, self._block = mean, tuple(kept), block
        self._spent, self._stage = 0.0, 0

    def __call__(self, state: StepState) -> int:
        """Return the stage of the next token."""
        done = state.generated
        if done <= 1:
            self._spent, self._stage = 0.0, state.stage
        self._spent += self._kept[state.stage]  # of the token before this one
        if done <= 1 or done % self._block == 0:
            ahead = self._block - done % self._block
            left = self._mean * (done + ahead) - self._spent
            last = len(self._kept) - 1
            self._stage = next(
                (s for s, share in enumerate(self._kept) if share * ahead <= left + 1e-9), last
            )
        return self._stage


class SignalStages:
    """Move to later stages as an outside number falls, such as the battery's charge or the thermal headroom.

    Args:
        signal: Read before every token.
        thresholds: Falling: from thresholds[i] down to thresholds[i + 1], stage i + 1 decodes.
        hysteresis: How far the signal must rise over a threshold before its move is undone.
    """

    def __init__(
        self, signal: Callable[[], float], thresholds: Sequence[float], *, hysteresis: float = 0.0
    ) -> None:
        if not all(a > b for a, b in pairwise(thresholds)):
            raise UsageError("the thresholds of a signal must fall")
        if hysteresis < 0:
            raise UsageError(f"a hysteresis of {hysteresis:g} is negative")
        self._signal, self._thresholds, self._hysteresis = signal, tuple(thresholds), hysteresis

    def __call__(self, state: StepState) -> int:
        """Return the stage of the next token."""
        value = self._signal()
        if math.isnan(value):  # nothing is known: stay
            return min(state.stage, len(self._thresholds))
        latest = sum(value < t for t in self._thresholds)
        earliest = sum(value < t + self._hysteresis for t in self._thresholds)
        return min(max(state.stage, latest), earliest)


class Cheapest:
    """Follow whichever of several policies asks for the latest stage.

    Args:
        policies: At least one.
    """

    def __init__(self, *policies: Policy) -> None:
        if not policies:
            raise UsageError("name at least one policy")
        self._policies = policies

    @property
    def prompt_stage(self) -> int:
        """The stage that reads the prompt."""
        return max(prompt_stage(p) for p in self._policies)

    def __call__(self, state: StepState) -> int:
        """Return the stage of the next token."""
        return max(policy(state) for policy in self._policies)
