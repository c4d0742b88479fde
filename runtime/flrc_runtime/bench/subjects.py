"""What is measured: a stage of a bundle, speculation; peers (genai.py, llama_bench.py) behave the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..any_decoder import AnyDecoder
from ..bundle import Bundle
from ..engine import Model
from ..sampling import Sampler, Sampling
from ..speculative import Speculation, Speculator

ROOM = (
    4  # positions behind those that are asked for: a step to warm up, and what a peer takes when it goes back
)


@dataclass(frozen=True)
class Label:
    """What a row says of its subject; ``step_bytes``: weights that a decode step reads, None where that varies."""

    bundle: str
    stage: str = ""
    keep: float | None = None
    step_bytes: int | None = None


class Subject(Protocol):
    """Something that reads a prompt and makes tokens, whatever they are: end tokens do not end it.

    Attributes:
        label: What it is.
        steps: Whether it can make one token and wait; else it only runs.
        reads: Whether it has a way of its own to read a prompt.
        accepted: Share of the drafts that were kept since it began; None without drafts.
    """

    @property
    def label(self) -> Label: ...  # noqa: D102

    @property
    def steps(self) -> bool: ...  # noqa: D102

    @property
    def reads(self) -> bool: ...  # noqa: D102

    @property
    def accepted(self) -> float | None: ...  # noqa: D102

    def read(self, ids: Sequence[int]) -> float:
        """Read a prompt and choose a token, in a sequence that then ends; return the seconds."""

    def begin(self, ids: Sequence[int], tokens: int) -> None:
        """Read what decoding goes on from; there will be at most so many tokens until it goes back."""

    def rewind(self) -> None:
        """Go back to where it began."""

    def step(self) -> float:
        """Make one token; return the seconds."""

    def run(self, tokens: int) -> float:
        """Go back, and make so many tokens at a stretch; return the seconds."""

    def end(self) -> None:
        """Free the sequence."""

    def close(self) -> None:
        """Free everything."""


class StageSubject:
    """One stage of a bundle, greedy."""

    steps = reads = True
    accepted: float | None = None

    def __init__(self, label: Label, model: Model, stage: int) -> None:
        self.label = label
        self._model, self._stage = model, stage
        self._decoder: AnyDecoder | None = None
        self._token = self._start = 0

    def read(self, ids: Sequence[int]) -> float:
        """Read a prompt."""
        decoder = self._model.decoder()
        try:
            started = time.perf_counter()
            decoder.prefill(ids, self._stage).argmax()
            return time.perf_counter() - started
        finally:
            decoder.close()

    def begin(self, ids: Sequence[int], tokens: int) -> None:
        """Open a sequence; the model's context is its room."""
        self._decoder = self._model.decoder()
        self._token = int(self._decoder.prefill(ids, self._stage).argmax())
        self._start = self._decoder.length

    def rewind(self) -> None:
        """Go back."""
        assert self._decoder is not None
        self._decoder.cache.rollback(self._start)

    def step(self) -> float:
        """Make one token: logits, and the choice from them."""
        assert self._decoder is not None
        started = time.perf_counter()
        self._token = int(self._decoder.step(self._token, self._stage).argmax())
        return time.perf_counter() - started

    def run(self, tokens: int) -> float:
        """Make tokens."""
        self.rewind()
        return sum(self.step() for _ in range(tokens))

    def end(self) -> None:
        """Free keys and values."""
        if self._decoder is not None:
            self._decoder.close()
        self._decoder = None

    def close(self) -> None:
        """Do nothing: other subjects have the same model."""


class SpeculativeSubject:
    """Stage 0 with drafts of a later stage, greedy. It makes several tokens a round, so it runs and is not stepped."""

    steps = reads = False

    def __init__(self, label: Label, model: Model, speculation: Speculation) -> None:
        self.label = label
        self._model, self._speculation = model, speculation
        self._decoder: AnyDecoder | None = None
        self._ids: Sequence[int] = ()
        self._token = self._drafted = self._kept = 0

    @property
    def accepted(self) -> float | None:
        """Share of the drafts that were kept."""
        return self._kept / self._drafted if self._drafted else None

    def read(self, ids: Sequence[int]) -> float:
        """Never asked: stage 0 reads the prompt."""
        raise NotImplementedError

    def begin(self, ids: Sequence[int], tokens: int) -> None:
        """Open a sequence."""
        self._ids, self._decoder = ids, self._model.decoder()
        self._drafted = self._kept = 0
        self._token = int(self._decoder.prefill(ids, 0).argmax())

    def rewind(self) -> None:
        """Go back."""
        assert self._decoder is not None
        self._decoder.cache.rollback(len(self._ids))

    def step(self) -> float:
        """Never asked."""
        raise NotImplementedError

    def run(self, tokens: int) -> float:
        """Make tokens; the time of the last round's surplus is shared out."""
        self.rewind()
        assert self._decoder is not None
        sampler = Sampler(Sampling(), self._ids)
        speculator = Speculator(self._decoder, sampler, self._speculation, stages=self._model.num_stages)
        token, made = self._token, 0
        started = time.perf_counter()
        while made < tokens:
            found = speculator.round(token)
            token, made = found[-1], made + len(found)
        seconds = time.perf_counter() - started
        self._drafted += speculator.drafted
        self._kept += speculator.kept
        return seconds * tokens / made

    def end(self) -> None:
        """Free keys and values."""
        if self._decoder is not None:
            self._decoder.close()
        self._decoder = None

    def close(self) -> None:
        """Do nothing: other subjects have the same model."""


def bundle_subjects(bundle: Bundle, model: Model, *, speculation: Speculation | None) -> list[Subject]:
    """Return every stage of a bundle and, of several, speculation if wanted."""
    name = bundle.folder.resolve().name
    subjects: list[Subject] = [
        StageSubject(Label(name, str(stage), info.keep, info.bytes), model, stage)
        for stage, info in enumerate(bundle.manifest.stages)
    ]
    if speculation is not None and model.num_stages > 1:
        subjects.append(SpeculativeSubject(Label(name, "speculative"), model, speculation))
    return subjects
