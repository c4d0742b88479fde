"""A bundle, evaluated with onnxruntime as a device runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flrc_edge.evaluation.subject import Facts, ReadPrompt
from flrc_edge.tokenizer_files import open_tokenizer
from flrc_runtime import Model, load
from flrc_runtime.any_decoder import AnyDecoder
from flrc_runtime.decoder import default_chunk
from flrc_runtime.manifest import Manifest


class BundleSubject:
    """A loaded bundle; a stage's graph opens when it is first asked for.

    Args:
        folder: Of the bundle.
        content: Its manifest.
    """

    def __init__(self, folder: Path, content: Manifest) -> None:
        self.facts = Facts.of(content, frozenset(content.model.eos_token_ids))
        self.tokenizer = open_tokenizer(folder)
        # Buffers for the whole context cost nothing until they are touched.
        self._model: Model = load(folder, context=content.model.context_length, stages=())

    def logits(self, ids: Tensor, stage: int) -> Tensor:
        """Read ``ids: [T]`` at one stage; return logits ``[T, vocab]`` float32."""
        return torch.from_numpy(self._model.logits(ids.tolist(), stages=stage))

    @contextmanager
    def read(self, prompt: Sequence[int], stage: int) -> Iterator[ReadPrompt]:
        """Read a prompt at one stage."""
        decoder = self._model.decoder()
        try:
            yield _BundlePrompt(decoder, prompt, stage, chunk=default_chunk(self.facts.vocab_size))
        finally:
            decoder.close()


class _BundlePrompt:
    """A prompt in the runtime's KV cache."""

    def __init__(self, decoder: AnyDecoder, prompt: Sequence[int], stage: int, *, chunk: int) -> None:
        self._decoder = decoder
        self._chunk = chunk
        self.logits: Tensor = torch.from_numpy(decoder.prefill(list(prompt), stage))
        self._length = decoder.length

    def feed(self, ids: Sequence[int], stage: int) -> Tensor:
        """Feed tokens through a stage; return logits ``[len(ids), vocab]`` float32."""
        if len(ids) == 1:
            return torch.from_numpy(self._decoder.step(ids[0], stage)[None].copy())
        parts = [
            self._decoder.feed(ids[start : start + self._chunk], stage)
            for start in range(0, len(ids), self._chunk)
        ]
        return torch.from_numpy(np.concatenate(parts))

    def rewind(self) -> None:
        """Forget everything behind the prompt."""
        self._decoder.cache.rollback(self._length)
