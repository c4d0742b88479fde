"""What is measured: a stage, a schedule or speculation of a bundle; a peer (peers.py) behaves the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..bundle import Bundle
from ..engine import Model
from ..policy import FixedStage, Policy, SchedulePolicy, StepState, prompt_stage
from ..sampling import Sampler, Sampling
from ..speculative import Speculation, Speculator
from .result import ALTERNATING


@dataclass(frozen=True)
class Label:
    """What a row says of its subject; ``step_bytes``: weights that a decode step reads, None where that varies."""

    bundle: str
    stage: str = ""
    keep: float | None = None
    step_bytes: int | None = None


@dataclass(frozen=True)
class Spent:
    """One repetition: seconds of the whole prompt and of all tokens, and the share of drafts that were kept."""

    prompt: float
    decode: float
    accepted: float | None = None


class Subject(Protocol):
    """Something that reads a prompt and makes tokens."""

    @property
    def label(self) -> Label:
        """What it is."""

    def measure(self, ids: Sequence[int], tokens: int) -> Spent:
        """Read a prompt, then make so many tokens, whatever they are: end tokens do not end it."""

    def close(self) -> None:
        """Free what it holds."""


class PolicySubject:
    """A bundle under a policy, greedy."""

    def __init__(self, label: Label, model: Model, policy: Policy) -> None:
        self.label = label
        self._model, self._policy = model, policy

    def measure(self, ids: Sequence[int], tokens: int) -> Spent:
        """Read and make tokens."""
        policy = self._policy
        stage = prompt_stage(policy)
        decoder = self._model.decoder()
        try:
            started = time.perf_counter()
            logits = decoder.prefill(ids, stage)
            read = time.perf_counter()
            for index in range(1, tokens + 1):
                stage = policy(StepState(index, decoder.length, 0.0, stage))
                logits = decoder.step(int(logits.argmax()), stage)
            ended = time.perf_counter()
        finally:
            decoder.close()
        return Spent(read - started, ended - read)

    def close(self) -> None:
        """Do nothing: other subjects have the same model."""


class SpeculativeSubject:
    """Stage 0 with drafts of a later stage, greedy."""

    def __init__(self, label: Label, model: Model, speculation: Speculation) -> None:
        self.label = label
        self._model, self._speculation = model, speculation

    def measure(self, ids: Sequence[int], tokens: int) -> Spent:
        """Read and make tokens; the times of the last round's surplus tokens are shared out."""
        decoder = self._model.decoder()
        try:
            speculator = Speculator(
                decoder, Sampler(Sampling(), ids), self._speculation, stages=self._model.num_stages
            )
            stream = speculator.tokens(ids)
            started = time.perf_counter()
            next(stream)
            read = time.perf_counter()
            for _ in range(tokens):
                next(stream)
            ended = time.perf_counter()
            made = decoder.length - len(ids)  # whole rounds: more than were taken
        finally:
            decoder.close()
        drafted = speculator.drafted
        accepted = speculator.kept / drafted if drafted else None
        return Spent(read - started, (ended - read) * tokens / max(made, tokens), accepted)

    def close(self) -> None:
        """Do nothing: other subjects have the same model."""


def bundle_subjects(bundle: Bundle, model: Model, *, speculation: Speculation | None) -> list[Subject]:
    """Return every stage of a bundle and, of several, its schedule, the cost of a move and speculation if wanted."""
    manifest, name = bundle.manifest, bundle.folder.resolve().name
    subjects: list[Subject] = [
        PolicySubject(Label(name, str(stage), info.keep, info.bytes), model, FixedStage(stage))
        for stage, info in enumerate(manifest.stages)
    ]
    if model.num_stages > 1:
        subjects.append(PolicySubject(Label(name, "schedule"), model, SchedulePolicy(manifest.schedule)))
        # Beside the two stages alone, this is what a move costs.
        last = model.num_stages - 1
        subjects.append(
            PolicySubject(Label(name, ALTERNATING), model, lambda state: state.generated % 2 * last)
        )
        if speculation is not None:
            subjects.append(SpeculativeSubject(Label(name, "speculative"), model, speculation))
    return subjects
