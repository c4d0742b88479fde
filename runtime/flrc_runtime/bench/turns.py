"""The turns: a few steps of every subject, A, B, C, A, B, C, …, so that a machine that swings disturbs all alike.

The first steps of a turn do not count: they fetch from memory what the others have pushed out of the caches, which no
user's answer pays for (a step of SmolLM2-135M right behind another model's takes 1.7 times as long).

The first subject is what the others are compared with. What cannot be stepped runs for a short while instead, right
behind such a run of the first.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median

from ..engine import Model
from .subjects import Subject

Report = Callable[[int, int], None]  # repetitions done, and all of them
WARM, COUNTED = 2, 6  # steps of a turn
_SPIN = "print(flush=True)\nwhile True: pass"


@dataclass(frozen=True)
class Times:
    """Seconds a token in every turn, and those of what they are compared with in the same turns."""

    own: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)

    def add(self, own: float, other: float, tokens: int = 1) -> None:
        """Add a turn that took so long for so many tokens."""
        self.own.append(own / tokens)
        self.other.append(other / tokens)


def read_in_turn(
    subjects: Sequence[Subject], ids: Sequence[int], repetitions: int, report: Report
) -> list[Times]:
    """Have every subject read a prompt, in turn; a first time does not count."""
    found = [Times() for _ in subjects]
    for repetition in range(repetitions + 1):
        seconds = [subject.read(ids) for subject in subjects]
        if repetition:
            for times, own in zip(found, seconds, strict=True):
                times.add(own, seconds[0], len(ids))
        report(repetition + 1, repetitions + 1)
    return found


def decode_in_turn(
    subjects: Sequence[Subject], ids: Sequence[int], tokens: int, repetitions: int, report: Report
) -> list[Times]:
    """Have every subject make tokens behind ``ids``, a few steps each in turn; every repetition goes back there."""
    first = subjects[0]
    stepped = [s for s in subjects if s.steps] if first.steps else []
    found = {id(subject): Times() for subject in subjects}
    with _begun(subjects, ids, tokens):
        for repetition in range(repetitions):
            for subject in stepped:
                subject.rewind()
            left = tokens + 1 if stepped else 0
            while left:
                steps = min(left, WARM + COUNTED)
                seconds = [_turn(subject, steps) for subject in stepped]
                for subject, own in zip(stepped, seconds, strict=True):
                    found[id(subject)].add(own, seconds[0])
                left = 0 if left - steps <= WARM else left - steps
            other = 0.0
            for subject in subjects:
                if subject not in stepped:
                    if first.steps or subject is first:
                        other = first.run(tokens)
                    own = other if subject is first else subject.run(tokens)
                    found[id(subject)].add(own, other, tokens)
            report(repetition + 1, repetitions)
    return [found[id(subject)] for subject in subjects]


def decode_beside(
    subjects: Sequence[Subject],
    ids: Sequence[int],
    tokens: int,
    repetitions: int,
    processes: int,
    report: Report,
) -> list[Times]:
    """Have every subject run alone and then beside busy processes, in turn; alone is what that is compared with."""
    found = [Times() for _ in subjects]
    with _begun(subjects, ids, tokens):
        for repetition in range(repetitions):
            for subject, times in zip(subjects, found, strict=True):
                alone = subject.run(tokens)
                with _busy(processes):
                    times.add(subject.run(tokens), alone, tokens)
            report(repetition + 1, repetitions)
    return found


def moves(model: Model, ids: Sequence[int], steps: int) -> list[float]:
    """Return how many seconds more a step takes behind one of another stage: the mean of going to the last and back.

    Every four steps are of the first, the first, the last and the last stage, and the first four do not count.
    """
    last = model.num_stages - 1
    decoder = model.decoder()
    found = []
    try:
        token = int(decoder.prefill(ids, 0).argmax())
        start = decoder.length
        for index in range(max(1, steps // 4) + 1):
            seconds = []
            decoder.cache.rollback(start)
            for stage in (0, 0, last, last):
                began = time.perf_counter()
                token = int(decoder.step(token, stage).argmax())
                seconds.append(time.perf_counter() - began)
            if index:
                found.append((seconds[0] - seconds[1] + seconds[2] - seconds[3]) / 2)
    finally:
        decoder.close()
    return found


def _turn(subject: Subject, steps: int) -> float:
    """Return the seconds of a step: the median of those that count."""
    seconds = [subject.step() for _ in range(steps)]
    return median(seconds[min(WARM, steps - 1) :])


@contextmanager
def _begun(subjects: Sequence[Subject], ids: Sequence[int], tokens: int) -> Iterator[None]:
    try:
        for subject in subjects:
            subject.begin(ids, tokens)
        yield
    finally:
        for subject in subjects:
            with suppress(Exception):  # a peer that ended has none to end, and has said so
                subject.end()


@contextmanager
def _busy(processes: int) -> Iterator[None]:
    """Keep so many processes of this priority busy meanwhile."""
    running = [
        subprocess.Popen([sys.executable, "-S", "-c", _SPIN], stdout=subprocess.PIPE)
        for _ in range(processes)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()  # it spins from now on
        yield
    finally:
        for process in running:
            process.kill()
            process.communicate()
