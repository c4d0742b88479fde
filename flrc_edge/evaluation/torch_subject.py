"""A checkpoint, or a model that was never compressed, evaluated with torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flrc_edge import checkpoint
from flrc_edge.decoding import end_tokens
from flrc_edge.evaluation.subject import Facts, ReadPrompt
from flrc_edge.lowrank import set_stage
from flrc_edge.model_cache import cache_argument, cache_of
from flrc_edge.models import LoadedModel, open_model
from flrc_edge.tokenizer_files import open_tokenizer
from flrc_runtime.manifest import Manifest, Schedule


class TorchSubject:
    """A torch model with stages.

    Args:
        model: A Hugging Face model in eval mode.
        tokenizer: Its tokenizer.
        facts: What it is.
    """

    def __init__(self, model: Any, tokenizer: Any, facts: Facts) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.facts = facts

    @torch.no_grad()
    def logits(self, ids: Tensor, stage: int) -> Tensor:
        """Read ``ids: [T]`` at one stage; return logits ``[T, vocab]`` float32."""
        set_stage(self.model, stage)
        result: Tensor = self.model(input_ids=ids[None], use_cache=False).logits[0].float()
        return result

    @contextmanager
    def read(self, prompt: Sequence[int], stage: int) -> Iterator[ReadPrompt]:
        """Read a prompt at one stage."""
        yield _TorchPrompt(self.model, prompt, stage)


class _TorchPrompt:
    """A prompt in a transformers cache, and a copy of it that grows."""

    @torch.no_grad()
    def __init__(self, model: Any, prompt: Sequence[int], stage: int) -> None:
        set_stage(model, stage)
        out = model(input_ids=torch.tensor([list(prompt)]), use_cache=True, logits_to_keep=1)
        self._model = model
        self._prompt = cache_of(out)
        self._cache: Any = None
        self.logits: Tensor = out.logits[0, -1].float()

    @torch.no_grad()
    def feed(self, ids: Sequence[int], stage: int) -> Tensor:
        """Feed tokens through a stage; return logits ``[len(ids), vocab]`` float32."""
        if self._cache is None:
            # Not crop() afterwards: a layer with a sliding window has already dropped what would be needed.
            self._cache = copy.deepcopy(self._prompt)
        set_stage(self._model, stage)
        row = torch.tensor([list(ids)])
        out = self._model(input_ids=row, use_cache=True, **cache_argument(self._model, self._cache))
        result: Tensor = out.logits[0].float()
        return result

    def rewind(self) -> None:
        """Forget everything behind the prompt."""
        self._cache = None


def open_checkpoint_subject(folder: Path, content: Manifest) -> TorchSubject:
    """Open a checkpoint."""
    model = checkpoint.load(folder)
    facts = Facts.of(content, frozenset(end_tokens(model)))
    return TorchSubject(model, open_tokenizer(folder), facts)


def open_model_subject(name: str) -> TorchSubject:
    """Open a model by folder or name; its one stage is dense."""
    return loaded_subject(open_model(name, portable=True))


def loaded_subject(loaded: LoadedModel) -> TorchSubject:
    """Return a loaded model as a subject of one dense stage."""
    config = loaded.config
    facts = Facts(
        name=loaded.name,
        kind="model",
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        architecture=config.architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        context_length=config.context_length,
        ends=frozenset(end_tokens(loaded.model)),
        projection_parameters=sum(p.shape[0] * p.shape[1] for p in config.projections()),
        kept=(1.0,),
        schedule=Schedule(()),
    )
    return TorchSubject(loaded.model, loaded.tokenizer, facts)
