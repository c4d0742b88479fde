"""The turns: every subject once, A, B, C, A, B, C, …, so that a machine that swings disturbs all alike.

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

from ..engine import Model
from .subjects import Subject

Report = Callable[[int, int], None]  # repetitions done, and all of them
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
    """Have every subject make tokens behind ``ids``, a step each in turn; every repetition goes back there.

    A first step of each repetition does not count.
    """
    first = subjects[0]
    stepped = [s for s in subjects if s.steps] if first.steps else []
    found = {id(subject): Times() for subject in subjects}
    with _begun(subjects, ids, tokens):
        for repetition in range(repetitions):
            for subject in stepped:
                subject.rewind()
            for index in range(tokens + 1 if stepped else 0):
                seconds = [subject.step() for subject in stepped]
                if index:
                    for subject, own in zip(stepped, seconds, strict=True):
                        found[id(subject)].add(own, seconds[0])
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
