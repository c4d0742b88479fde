"""Which stage reads the prompt and computes each answer token: the policies that are compared.

A policy is a script, one stage an answer token, as in the runtime: entry 0 reads the prompt too (the first answer
token comes with it), entry i feeds answer token i - 1, and the last entry holds on.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from flrc_edge.errors import UsageError
from flrc_runtime.manifest import Schedule

DENSE = "dense"  # the dense model itself, which has no script
_STATIC = re.compile(r"static:(\d+)(:prompt0)?")


@dataclass(frozen=True)
class StagePolicy:
    """Stages over spans of the answer.

    Args:
        name: As the command line spells it.
        boundaries: Answer tokens at which the next stage takes over; not falling.
        stages: One more than boundaries.
        mirrored: Run the spans backwards over the planned length of an answer.
    """

    name: str
    boundaries: tuple[int, ...]
    stages: tuple[int, ...]
    mirrored: bool = False

    def script(self, length: int, *, planned: int) -> tuple[int, ...]:
        """Return the stage of every answer token.

        Args:
            length: Answer tokens.
            planned: The length a mirrored policy is mirrored in, so that every stage computes as many of that
                many tokens as it would have otherwise; tokens after it stay on the last stage.
        """
        if self.mirrored:
            return tuple(self._at(max(planned - 1 - i, 0)) for i in range(length))
        return tuple(self._at(i) for i in range(length))

    def _at(self, i: int) -> int:
        return self.stages[bisect_right(self.boundaries, i)]


def parse_policy(spec: str, schedule: Schedule) -> StagePolicy:
    """Parse ``static:S``, ``static:S:prompt0``, ``schedule`` or ``reversed``.

    Args:
        spec: The policy.
        schedule: Of the manifest; has one boundary less than there are stages.

    Raises:
        UsageError: It is none of these, or names a stage that does not exist.
    """
    count = len(schedule.boundaries) + 1
    if spec in ("schedule", "reversed"):
        return StagePolicy(spec, schedule.boundaries, tuple(range(count)), mirrored=spec == "reversed")
    match = _STATIC.fullmatch(spec)
    if match is None:
        raise UsageError(
            f"there is no policy {spec!r}",
            hint="give static:S, static:S:prompt0, schedule, reversed or, with --dense, dense",
        )
    stage = int(match[1])
    if stage >= count:
        raise UsageError(
            f"the policy {spec!r} names stage {stage}: there are stages 0 to {count - 1}",
        )
    return StagePolicy(spec, (1,), (0, stage)) if match[2] else StagePolicy(spec, (), (stage,))


def parse_policies(specs: Sequence[str], schedule: Schedule, *, dense: bool) -> list[StagePolicy]:
    """Parse policies; ``dense`` is left out, being no policy of stages.

    Args:
        specs: As :func:`parse_policy` reads them, and ``dense``.
        schedule: Of the manifest.
        dense: Whether there is a dense model.

    Raises:
        UsageError: One is not possible.
    """
    if DENSE in specs and not dense:
        raise UsageError("the policy 'dense' needs the dense model", hint="name it with --dense")
    return [parse_policy(spec, schedule) for spec in dict.fromkeys(specs) if spec != DENSE]


def default_policies(
    schedule: Schedule, kept: Sequence[float], *, planned: Sequence[int]
) -> tuple[list[StagePolicy], str | None]:
    """Return what is compared unless told otherwise, and the name of the fair control.

    Every static stage; with several stages also the schedule, the schedule reversed, and the constant stage nearest
    to the schedule's mean share with its prompt on stage 0. That last one is the control a schedule has to beat.

    Args:
        schedule: Of the manifest.
        kept: Share of parameters each stage activates.
        planned: Answer lengths in tokens.
    """
    specs = [f"static:{s}" for s in range(len(kept))]
    if len(kept) == 1:
        return [parse_policy(s, schedule) for s in specs], None
    stage = nearest_stage(parse_policy("schedule", schedule), kept, planned=planned)
    control = f"static:{stage}:prompt0" if stage else "static:0"
    specs += [control] if stage else []
    return [parse_policy(s, schedule) for s in [*specs, "schedule", "reversed"]], control


def nearest_stage(policy: StagePolicy, kept: Sequence[float], *, planned: Sequence[int]) -> int:
    """Return the stage whose share is nearest to the policy's mean share over answers of these lengths."""
    target = mean_share([policy.script(n, planned=n) for n in planned], kept)
    return min(range(len(kept)), key=lambda s: (abs(kept[s] - target), s))


def mean_share(scripts: Sequence[Sequence[int]], kept: Sequence[float]) -> float:
    """Return the mean share of projection parameters an answer token activates."""
    total = sum(kept[s] for script in scripts for s in script)
    return total / sum(len(script) for script in scripts)
