"""The options that say how to decode, shared by ``generate`` and ``chat``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flrc_edge.errors import UsageError

if TYPE_CHECKING:
    from flrc_runtime.engine import Model
    from flrc_runtime.policy import Policy
    from flrc_runtime.sampling import Sampling

F = TypeVar("F", bound=Callable[..., object])


def sampling_options(function: F) -> F:
    """Add the options that say which token is chosen; they come as one ``sampling``."""
    options = [
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
        click.option(
            "--top-k", type=int, default=0, show_default=True, help="Draw among this many; 0 for all."
        ),
        click.option(
            "--top-p", type=float, default=1.0, show_default=True, help="Draw among this much probability."
        ),
        click.option(
            "--repetition-penalty", type=float, default=1.0, show_default=True, help="1 has no effect."
        ),
        click.option("--seed", type=int, default=None, help="Of the draws; without it every answer differs."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def stage_options(function: F) -> F:
    """Add the options that say which stage computes a token."""
    options = [
        click.option(
            "--stage", type=int, default=None, metavar="N", help="One stage instead of the schedule."
        ),
        click.option(
            "--ms-per-token",
            type=float,
            default=None,
            metavar="MS",
            help="Instead of the schedule, the earliest stage whose steps take at most this long.",
        ),
        click.option(
            "--mean-keep",
            type=float,
            default=None,
            metavar="SHARE",
            help="Instead of the schedule, the earliest stages whose mean share of parameters is at most this.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def sampling_of(options: dict[str, Any]) -> Sampling:
    """Take the sampling options out of a command's arguments."""
    from flrc_runtime import Sampling

    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    return Sampling(**{name: options.pop(name) for name in names})


def check_stage_options(**options: object) -> None:
    """Refuse more than one of the options that name stages.

    Raises:
        UsageError: More than one is given.
    """
    if sum(option not in (None, False) for option in options.values()) > 1:
        names = [f"--{name.replace('_', '-')}" for name in options]
        raise UsageError(f"{', '.join(names[:-1])} and {names[-1]} exclude each other")


def policy_of(
    model: Model, stage: int | None, ms_per_token: float | None, mean_keep: float | None
) -> Policy | None:
    """Return the policy of the options; None for the bundle's schedule."""
    from flrc_runtime import FixedStage, LatencyBudget, MeanBudget

    if stage is not None:
        return FixedStage(stage)
    if ms_per_token is not None:
        return LatencyBudget(ms_per_token, model.num_stages)
    if mean_keep is not None:
        plan = model.manifest.plan
        return MeanBudget(mean_keep, [plan.kept(s) for s in range(model.num_stages)])
    return None
