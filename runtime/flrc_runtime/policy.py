"""Which stage computes the next token: by schedule, fixed, scripted, or any callable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .errors import UsageError
from .manifest import Schedule


@dataclass(frozen=True, slots=True)
class StepState:
    """What a policy may look at before a token is computed.

    Args:
        generated: Tokens of the answer so far, which is the 0-based index of the token about to be computed.
        position: Tokens in the KV cache, prompt included.
        last_ms: Milliseconds the last decode step took; 0 before the first one.
        stage: The stage that computed the last token.
    """

    generated: int
    position: int
    last_ms: float
    stage: int


# The stage of the next token. An attribute `prompt_stage` says which stage reads the prompt, else stage 0
# does; that stage also computes the first token, so a policy is asked from the second token on.
Policy = Callable[[StepState], int]


@dataclass(frozen=True)
class SchedulePolicy:
    """Move on at the token counts of the bundle's schedule."""

    schedule: Schedule
    prompt_stage: int = 0

    def __call__(self, state: StepState) -> int:
        """Return the stage the schedule has for the answer token ``state.generated``."""
        return self.schedule.stage_at(state.generated)


@dataclass(frozen=True)
class FixedStage:
    """Decode every token with one stage.

    Args:
        stage: Of the answer.
        prompt_stage: Of the prompt; None for the same one.
    """

    stage: int
    prompt_stage: int | None = None

    def __post_init__(self) -> None:
        if self.prompt_stage is None:
            object.__setattr__(self, "prompt_stage", self.stage)

    def __call__(self, state: StepState) -> int:
        """Return the one stage."""
        return self.stage


@dataclass(frozen=True)
class ScriptedStages:
    """A stage for every answer token, one by one.

    Args:
        stages: Entry i computes answer token i; entry 0 reads the prompt too, the last one holds on.
    """

    stages: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise UsageError("a script of stages needs at least one stage")

    @property
    def prompt_stage(self) -> int:
        """The stage that reads the prompt."""
        return self.stages[0]

    def __call__(self, state: StepState) -> int:
        """Return the scripted stage of the answer token ``state.generated``."""
        return self.stages[min(state.generated, len(self.stages) - 1)]


def prompt_stage(policy: Policy) -> int:
    """Return the stage that reads the prompt under ``policy``."""
    stage = getattr(policy, "prompt_stage", 0)
    return 0 if stage is None else stage


def checked_stage(stage: object, num_stages: int) -> int:
    """Return ``stage`` if it is one of the model's.

    Raises:
        UsageError: It is not an integer from 0 to ``num_stages - 1``.
    """
    if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage < num_stages:
        raise UsageError(f"stage {stage!r} is not one of the bundle's stages 0 to {num_stages - 1}")
    return stage
