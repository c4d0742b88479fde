"""How to heal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from flrc_edge.errors import UsageError
from flrc_edge.healing.distillation import Precision
from flrc_edge.healing.trainer import Train
from flrc_edge.settings import DEFAULT_TEXTS
from flrc_edge.texts import BUILT_IN, WeightedText

DEFAULT_STEPS = 400


@dataclass(frozen=True)
class Settings:
    """How to heal.

    Args:
        steps: Optimizer steps; None with ``minutes`` given.
        minutes: Wall time of training and validation; the learning rate then falls with the clock, so that two runs
            differ. None with ``steps`` given; if neither is, 400 steps.
        tokens_per_step: Tokens of a step, in whole windows.
        window: Tokens a window.
        lr: Largest learning rate, relative to the size of each tensor.
        warmup: Share of the run in which the learning rate grows.
        clip: Largest norm of the gradient; 0 leaves it as it is.
        train: ``factors``, ``projections`` (also those that stayed dense) or ``all`` (also norms and biases).
        stage_weights: How often each stage is trained, relative to the others; None: all the same.
        texts: Texts and their weights.
        seed: Chooses the order of the windows.
        validate_every: Steps between two measurements on held-out windows.
        validation_windows: Windows held out of the texts.
        save_minutes: Minutes between two saved states.
        precision: Of the matrix products; ``auto`` is bfloat16 where the device is built for it.
    """

    steps: int | None = None
    minutes: float | None = None
    tokens_per_step: int = 1024
    window: int = 512
    lr: float = 2e-4
    warmup: float = 0.05
    clip: float = 1.0
    train: Train = "factors"
    stage_weights: tuple[float, ...] | None = None
    texts: tuple[WeightedText, ...] = DEFAULT_TEXTS
    seed: int = 0
    validate_every: int = 50
    validation_windows: int = 8
    save_minutes: float = 5.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if self.steps is not None and self.minutes is not None:
            raise UsageError("give steps or minutes, not both")
        if self.steps is None and self.minutes is None:
            object.__setattr__(self, "steps", DEFAULT_STEPS)
        for name, least in (("steps", 1), ("window", 2), ("validate_every", 1), ("validation_windows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, not {value}")
        for name in ("minutes", "lr", "save_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} must be a positive number, not {value}")
        for name, kind in (("train", Train), ("precision", Precision)):
            if getattr(self, name) not in get_args(kind):
                raise UsageError(f"{name} {getattr(self, name)!r} is not one of {', '.join(get_args(kind))}")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup must lie in [0, 1), not {self.warmup}")
        if not 0 <= self.clip < math.inf:
            raise UsageError(f"clip must be 0 or more, not {self.clip}")
        if self.tokens_per_step < self.window:
            raise UsageError(f"{self.tokens_per_step} tokens a step do not fill one window of {self.window}")
        if not self.texts:
            raise UsageError("name at least one text to heal on")
        for text in self.texts:
            if text.name in BUILT_IN and text.name.endswith("-heldout"):
                raise UsageError(f"{text.name} is kept for measurements; heal on another text")
        if self.stage_weights is not None and not all(0 < w < math.inf for w in self.stage_weights):
            raise UsageError(f"stage weights must be positive numbers, not {self.stage_weights}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must lie between 0 and 2^63 - 1, not {self.seed}")
