"""The loop of a run: steps, measurements on held-out windows, saved states, and an end that Ctrl-C may bring early."""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from flrc_edge.errors import NumericalError, UsageError
from flrc_edge.healing.distillation import Distiller, Validation
from flrc_edge.healing.settings import Settings
from flrc_edge.healing.state import Saved, StateFile
from flrc_edge.healing.trainer import Trainer, rate
from flrc_edge.healing.windows import TrainingWindows
from flrc_edge.progress import Progress, silent

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """One measurement of the curve; KL in nats a token, one value a stage.

    Args:
        step: Optimizer steps done.
        minutes: Of training and validation so far.
        train: Mean over the steps since the last point; None for a stage that had none.
        validation: On the held-out windows.
    """

    step: int
    minutes: float
    train: tuple[float | None, ...]
    validation: tuple[float, ...]

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Point:
        """Return the point that ``asdict`` wrote."""
        return cls(value["step"], value["minutes"], tuple(value["train"]), tuple(value["validation"]))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the state is saved, and ``resume=True`` goes on after ``step``."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        super().__init__(f"interrupted after step {step}")
        self.step, self.signal = step, number


def stage_order(weights: Sequence[float]) -> Iterator[int]:
    """Yield stages without end, each as often as its weight says and as evenly as can be."""
    counts, done = [0] * len(weights), 0
    while True:
        done += 1
        due = [w * done / sum(weights) - c for w, c in zip(weights, counts, strict=True)]
        stage = due.index(max(due))
        counts[stage] += 1
        yield stage


class Session:
    """A run that may have been interrupted before.

    Args:
        settings: How to heal.
        trainer: Does the steps.
        distiller: The two models.
        windows: To train on, and held out.
        accelerator: Every process takes its share of each step's windows.
        stage_weights: How often each stage is trained.
        on_point: Called with every measurement.
        progress: Called after every step.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        trainer: Trainer,
        distiller: Distiller,
        windows: TrainingWindows,
        accelerator: Accelerator,
        stage_weights: Sequence[float],
        on_point: Callable[[Point], None] | None = None,
        progress: Progress = silent,
    ) -> None:
        self._settings, self._trainer, self._accelerator = settings, trainer, accelerator
        self._windows, self._weights = windows, stage_weights
        self._on_point, self._progress = on_point, progress
        self._length = windows.validation.shape[1]
        self._batch = settings.tokens_per_step // self._length
        if self._batch < accelerator.num_processes:
            raise UsageError(
                f"{self._batch} windows of {self._length} tokens a step are fewer than the "
                f"{accelerator.num_processes} processes",
                hint="ask for more tokens a step",
            )
        mine = windows.validation[accelerator.process_index :: accelerator.num_processes]
        self._validation = Validation(distiller, mine, stages=len(stage_weights))
        self.step = 0
        self.seconds = 0.0
        self.curve: list[Point] = []
        self._sums = [0.0] * len(stage_weights)
        self._counts = [0] * len(stage_weights)
        self._measuring = 0.0  # seconds the last measurement took
        self._shown = 0
        self._stop = False

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, in all processes."""
        return self.step * self._batch * self._length

    def run(self, state: StateFile, *, resume: bool) -> None:
        """Train to the end.

        Args:
            state: Where the state is kept; only the main process writes it.
            resume: Start from the state, if there is one.

        Raises:
            Interrupted: Ctrl-C; the state is saved.
            NumericalError: A KL or gradient is not finite; names the step.
        """
        if resume and state.exists():
            self._restore(state.load())
        elif resume:
            _log.info("no interrupted run was found; this one begins")
        self._accelerator.wait_for_everyone()  # until all have read it
        stages = islice(stage_order(self._weights), self.step, None)
        drawn = islice(self._windows.draw(self._settings.seed), self.step * self._batch, None)
        self._started = time.monotonic() - self.seconds
        self._saved = time.monotonic()
        with _interruptible() as stop:
            if self._due():
                self._measure()
            while not self._finished():
                batch = torch.stack(list(islice(drawn, self._batch)))
                self._one_step(batch, next(stages))
                self._clock(stop.is_set())
                if self._stop:
                    self._save(state)
                    raise Interrupted(self.step, stop.signal)
                if self._due():
                    self._measure()
                if time.monotonic() - self._saved >= 60 * self._settings.save_minutes:
                    self._save(state)
            self._save(state)

    def _one_step(self, batch: Tensor, stage: int) -> None:
        mine = batch[self._accelerator.process_index :: self._accelerator.num_processes]
        try:
            loss = self._trainer.step(
                mine, stage=stage, rate=rate(self._share(), self._settings.warmup), tokens=batch.numel()
            )
        except NumericalError as error:
            raise NumericalError(
                f"{error} in step {self.step + 1}",
                hint="lower --lr; --resume goes on from the last saved state, if there is one",
            ) from None
        self.step += 1
        self._sums[stage] += loss
        self._counts[stage] += 1

    def _share(self) -> float:
        """Return which share of the run the next step lies at."""
        s = self._settings
        if s.steps is not None:
            return (self.step + 1) / (s.steps + 1)
        assert s.minutes is not None
        return min(1.0, self.seconds / (60 * s.minutes))

    def _finished(self) -> bool:
        s = self._settings
        if s.steps is not None:
            return self.step >= s.steps
        assert s.minutes is not None
        return self.seconds + self._measuring >= 60 * s.minutes  # the last measurement belongs to the time

    def _due(self) -> bool:
        """Return whether a measurement belongs here that was not made yet, perhaps for an interruption."""
        measured = bool(self.curve) and self.curve[-1].step == self.step
        return not measured and (self._finished() or self.step % self._settings.validate_every == 0)

    def _clock(self, stop: bool = False) -> None:
        """Read the time and whether to stop; all processes come to the same answer."""
        self.seconds, self._stop = time.monotonic() - self._started, stop
        if self._accelerator.num_processes > 1:
            told = torch.tensor([self.seconds, float(stop)], device=self._accelerator.device)
            seconds, stopped = self._accelerator.reduce(told, reduction="mean").tolist()
            self.seconds, self._stop = seconds, stopped > 0
        s = self._settings
        total = s.steps if s.steps is not None else int(60 * (s.minutes or 0))
        done = min(self.step if s.steps is not None else int(self.seconds), total)
        if done > self._shown:
            self._progress("heal", done, total)
            self._shown = done

    def _measure(self) -> None:
        """Add a point to the curve."""
        begun = time.monotonic()
        kl = self._accelerator.reduce(self._validation.measure(), reduction="sum")
        kl = tuple((kl / self._windows.validation.numel()).tolist())
        if not all(math.isfinite(v) for v in kl):
            raise NumericalError(
                f"the KL on the held-out windows is not finite after step {self.step}",
                hint="lower --lr; --resume goes on from the last saved state, if there is one",
            )
        self._measuring = time.monotonic() - begun
        self._clock()
        train = tuple(s / c if c else None for s, c in zip(self._sums, self._counts, strict=True))
        point = Point(self.step, self.seconds / 60, train, kl)
        self._sums, self._counts = [0.0] * len(kl), [0] * len(kl)
        self.curve.append(point)
        if self._on_point is not None:
            self._on_point(point)

    def _save(self, state: StateFile) -> None:
        if self._accelerator.is_main_process:
            record = {
                "step": self.step,
                "seconds": self.seconds,
                "curve": [asdict(p) for p in self.curve],
                "sums": self._sums,
                "counts": self._counts,
            }
            state.save(Saved(self._trainer.tensors(), record))
        self._saved = time.monotonic()

    def _restore(self, saved: Saved) -> None:
        self._trainer.restore(saved.tensors)
        self.step, self.seconds = saved.record["step"], saved.record["seconds"]
        self.curve = [Point.from_dict(p) for p in saved.record["curve"]]
        self._sums, self._counts = list(saved.record["sums"]), list(saved.record["counts"])
        _log.info("going on after step %d", self.step)


class _Stop(threading.Event):
    """Set by a signal, which it remembers."""

    signal: int = signal.SIGINT


@contextmanager
def _interruptible() -> Iterator[_Stop]:
    """Turn the first Ctrl-C or SIGTERM of the block into an event, for between two steps; the second ends it."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: object) -> None:
        if stop.is_set():
            if number == signal.SIGTERM:
                sys.exit(128 + number)
            raise KeyboardInterrupt
        stop.signal = number
        stop.set()
        _log.info("finishing the step; Ctrl-C again gives it up")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
