"""The turns and their statistics, on clocks that a test sets."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Any

import pytest

from flrc_runtime import FlrcError
from flrc_runtime.bench.paired import median, ratios
from flrc_runtime.bench.run import _rows
from flrc_runtime.bench.subjects import Label
from flrc_runtime.bench.turns import decode_beside, decode_in_turn, moves, read_in_turn


class Machine:
    """Seconds that everything on it is slowed by, another at every call, and who was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.random = random.Random(0)
        self.slow = 1.0

    def swing(self) -> float:
        """Return how slow it is from the next turn on: by a half either way."""
        self.slow = self.random.uniform(0.5, 1.5)
        return self.slow


@dataclass
class Clocked:
    """A subject whose step takes ``ms`` on a machine that stands still."""

    name: str
    ms: float
    machine: Machine
    steps: bool = True
    leads: bool = False  # whether the machine swings when it is this one's turn
    reads: bool = True
    accepted: float | None = None
    at: int = 0
    seen: list[Any] = field(default_factory=list)

    @property
    def label(self) -> Label:
        return Label(self.name, step_bytes=10**6)

    def _take(self, what: str, tokens: int) -> float:
        if self.leads and not (self.machine.calls and self.machine.calls[-1].startswith(f"{self.name}.s")):
            self.machine.swing()
        self.machine.calls.append(f"{self.name}.{what}")
        return self.ms * tokens * self.machine.slow / 1e3

    def read(self, ids: Sequence[int]) -> float:
        return self._take("read", len(ids))

    def begin(self, ids: Sequence[int], tokens: int) -> None:
        self.at = len(ids)
        self.seen.append(("begin", len(ids), tokens))

    def rewind(self) -> None:
        self.seen.append("rewind")

    def step(self) -> float:
        assert self.steps
        return self._take("step", 1)

    def run(self, tokens: int) -> float:
        return self._take(f"run {tokens}", tokens)

    def end(self) -> None:
        self.seen.append("end")

    def close(self) -> None:
        self.seen.append("close")


def silent(done: int, total: int) -> None:
    """Show nothing."""


def subjects(**change: Any) -> tuple[Machine, list[Clocked]]:
    machine = Machine()
    return machine, [
        Clocked("a", 4.0, machine, leads=True),
        Clocked("b", 2.0, machine),
        Clocked("c", 10.0, machine, **change),
    ]


def test_steps_are_taken_in_turn_and_compared_within_it() -> None:
    machine, found = subjects()
    times = decode_in_turn(found, [1] * 64, 13, 3, silent)
    turns = [name for steps in (8, 6) for name in "abc" for _ in range(steps)]
    assert machine.calls == [f"{name}.step" for name in turns * 3]
    assert [len(t.own) for t in times] == [6] * 3  # one number a turn
    rows = _rows("decode", 64, found, times)
    assert [r.ratio for r in rows] == pytest.approx([1, 0.5, 2.5])
    assert [r.ratio_low for r in rows] == pytest.approx([1, 0.5, 2.5])  # whatever the machine did meanwhile
    assert rows[0].ms_spread > 0.5 and rows[0].samples == 6 and rows[0].tokens == 64
    assert rows[1].gb_per_second == pytest.approx(1e6 / rows[1].ms_per_token / 1e6)
    assert found[0].seen == [("begin", 64, 13), "rewind", "rewind", "rewind", "end"]


def test_the_ratio_is_that_of_pairs_not_of_medians() -> None:
    own, other = [2.0, 20.0, 3.0], [1.0, 10.0, 30.0]
    assert ratios(own, other).value == 2.0  # the medians' would be 0.3


def test_what_cannot_be_stepped_runs_behind_a_run_of_the_first() -> None:
    machine, found = subjects(steps=False)
    times = decode_in_turn(found, [1] * 64, 5, 6, silent)
    turn = ["a.step"] * 6 + ["b.step"] * 6 + ["a.run 5", "c.run 5"]
    assert machine.calls == turn * 6
    assert [len(t.own) for t in times] == [6, 6, 6]
    rows = _rows("decode", 64, found, times)
    assert [r.ratio for r in rows] == pytest.approx([1, 0.5, 2.5])
    assert 5 <= rows[2].ms_per_token <= 15 and rows[2].ratio_low == pytest.approx(2.5)


def test_all_run_where_the_first_cannot_be_stepped() -> None:
    machine, found = subjects()
    found[0].steps = False
    times = decode_in_turn(found, [1] * 64, 5, 2, silent)
    assert machine.calls == ["a.run 5", "b.run 5", "c.run 5"] * 2
    assert [r.ratio for r in _rows("decode", 64, found, times)] == pytest.approx([1, 0.5, 2.5])


def test_prompts_are_read_in_turn() -> None:
    machine, found = subjects()
    seen: list[tuple[int, int]] = []
    times = read_in_turn(found, [1] * 8, 2, lambda *step: seen.append(step))
    assert machine.calls == ["a.read", "b.read", "c.read"] * 3 and seen == [(1, 3), (2, 3), (3, 3)]
    rows = _rows("prompt", 8, found, times)
    assert [r.ratio for r in rows] == pytest.approx([1, 0.5, 2.5])
    assert all(r.bytes_per_token is None and r.ratio_low is None for r in rows)  # two turns have no interval


def test_beside_busy_processes_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    from flrc_runtime.bench import turns

    popen = turns.subprocess.Popen

    def watched(*arguments: Any, **options: Any) -> Any:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(turns.subprocess, "Popen", watched)
    machine, found = subjects(steps=False)
    machine.swing = lambda: 1.0  # type: ignore[method-assign]
    running: list[int] = []
    for subject in found:
        run = subject.run

        def counted(tokens: int, run: Any = run) -> float:
            alive = sum(process.poll() is None for process in started)
            running.append(alive)
            return float(run(tokens) * (1 + alive))

        subject.run = counted  # type: ignore[method-assign]
    times = decode_beside(found, [1] * 4, 5, 1, 2, silent)
    assert running == [0, 2] * 3
    assert [ratios(t.own, t.other).value for t in times] == pytest.approx([3, 3, 3])
    assert len(started) == 6 and all(process.poll() is not None for process in started)


def test_sequences_end_when_a_subject_fails() -> None:
    _, found = subjects()

    def fail() -> float:
        raise FlrcError("c ended")

    found[2].step = fail  # type: ignore[method-assign]
    with pytest.raises(FlrcError, match="c ended"):
        decode_in_turn(found, [1], 5, 2, silent)
    assert all(subject.seen[-1] == "end" for subject in found)


def test_a_move_is_a_step_behind_another_stages(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.accumulate(itertools.cycle([0, 5, 0, 2, 0, 9, 0, 4]))  # of 0, 0, last and last
    from flrc_runtime.bench import turns

    monkeypatch.setattr(turns.time, "perf_counter", lambda: float(next(now)))
    assert moves(model, [5, 6, 7], 12) == [(5 - 2 + 9 - 4) / 2] * 3


@pytest.mark.parametrize("count", [1, 2, 5, 6, 8, 15, 40, 257])
def test_the_interval_encloses_as_often_as_it_says(count: int) -> None:
    values = [float(v) for v in range(count)]
    random.Random(count).shuffle(values)
    found = median(values)
    assert found.value == statistics.median(values)
    if count < 6:
        assert found.low is None and found.high is None
        return
    assert found.low is not None and found.high is not None

    def missed(outside: int) -> float:  # fewer than so many below, or above
        return 2 * sum(comb(count, k) for k in range(outside)) / 2**count

    outside = int(found.low) + 1
    assert found.high == count - outside  # as many on either side
    assert missed(outside) <= 0.05 < missed(outside + 1)


def test_intervals_of_a_known_distribution() -> None:
    source = random.Random(1)
    inside = 0
    for _ in range(400):
        found = median(source.expovariate(1) for _ in range(21))
        assert found.low is not None and found.high is not None
        inside += found.low <= 0.6931471805599453 <= found.high
    assert inside / 400 > 0.93
