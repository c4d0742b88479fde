"""How long ``compress`` takes on this machine: one decoder layer of the model's shape is compressed for a trial.

What runs is the compressor's own code, so that caches, threads and memory have their say; what it took is multiplied by
layers and windows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from flrc_edge.calibration import Moments, calibrate
from flrc_edge.factorization import Factors, factorize, largest_rank
from flrc_edge.measured import measured_losses
from flrc_edge.measurements import MEASURED_WINDOWS
from flrc_edge.token_loss import HEAD_CHUNK, loss_gradient
from flrc_exporters.architectures import DecoderConfig
from flrc_runtime.manifest import Storage

# A trial takes no longer for a large model: narrower layers and a smaller vocabulary, which cost a known part of it.
TRIAL_VOCABULARY, TRIAL_SIDE = 65536, 1024
WARM_UP, WINDOWS = 64, 2  # tokens before, windows that are timed
# Beside the passes: python, torch and transformers; reading the weights, writing the factors (bytes a second).
START, THROUGHPUT = 4.0, 3e8
REST = 1.06  # what layers of one model take beside the timed parts; SmolLM2-135M, Gemma 3 270M and Qwen2.5 0.5B agree


@dataclass(frozen=True)
class Trial:
    """Seconds on this machine.

    Args:
        head: Of the loss and its gradient, a token.
        forward: Of one layer, a token.
        calibrate: Of one layer's statistics, forward again and backward, a token.
        measure: Of the losses of one layer's ranks, forward again and backward, a token.
        factorize: Of one layer's projections.
    """

    head: float
    forward: float
    calibrate: float
    measure: float
    factorize: float

    @classmethod
    def of(cls, config: DecoderConfig, *, window: int, storage: Storage) -> Trial:
        """Compress one layer of a model with these shapes.

        Args:
            config: The model.
            window: Tokens of a calibration window.
            storage: Of factors.
        """
        trial, layer = _narrower(config), config.layer_shapes()
        shapes = trial.layer_shapes()
        smaller = _parameters(layer) / _parameters(shapes)
        generator = torch.Generator().manual_seed(0)
        model = _one_layer(trial)
        ids = torch.randint(model.config.vocab_size, (WINDOWS, window), generator=generator)
        factors = {name: _random_factors(shape, storage, generator) for name, shape in shapes.items()}
        names = list(shapes)
        calibrate(model, names, ids[:1, :WARM_UP])
        tokens = ids.numel()
        forward, backward = _passes(lambda told: calibrate(model, names, ids, progress=told))
        _, measured = _passes(lambda told: measured_losses(model, factors, ids, progress=told))
        return cls(
            head=_head(trial, generator) * config.hidden_size / trial.hidden_size,
            forward=forward / tokens * smaller,
            calibrate=backward / tokens * smaller,
            measure=measured / tokens * smaller,
            factorize=sum(_factorization(shape, storage, generator) for shape in layer.values()),
        )

    def seconds(self, config: DecoderConfig, *, tokens: int, window: int) -> float:
        """Return what a whole ``compress`` takes, with the default allocator and factorization.

        Args:
            config: The model.
            tokens: Of the calibration.
            window: Tokens of one window.
        """
        measured = min(tokens, MEASURED_WINDOWS * window)
        layers = config.num_layers
        passes = (tokens + measured) * (self.head + layers * self.forward)
        backward = layers * (tokens * self.calibrate + measured * self.measure)
        files = START + 2 * 4 * config.parameters() / THROUGHPUT
        return REST * (passes + backward + layers * self.factorize) + files


def _passes(run: Callable[[Callable[[str, int, int], None]], object]) -> tuple[float, float]:
    """Return the seconds of the forward and of the backward passes of ``WINDOWS`` windows and one layer."""
    marks: list[float] = []
    run(lambda phase, done, total: marks.append(time.perf_counter()))
    start, forward, backward = marks[0], marks[WINDOWS], marks[-1]
    return forward - start, backward - forward


def _narrower(config: DecoderConfig) -> DecoderConfig:
    """Return a model whose layers are at most ``TRIAL_SIDE`` wide, of the same proportions."""
    share = min(1.0, TRIAL_SIDE / config.hidden_size)
    kv_heads = max(1, round(config.num_kv_heads * share))
    return replace(
        config,
        hidden_size=round(config.hidden_size * share),
        intermediate_size=round(config.intermediate_size * share),
        num_heads=kv_heads * (config.num_heads // config.num_kv_heads),
        num_kv_heads=kv_heads,
    )


def _parameters(shapes: Mapping[str, tuple[int, int]]) -> int:
    return sum(m * n for m, n in shapes.values())


def _one_layer(config: DecoderConfig) -> Any:
    """Return a decoder of one layer of these shapes, and next to no vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=256,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    model: Any = LlamaForCausalLM(shape)
    return model.float().eval()


def _random_factors(shape: tuple[int, int], storage: Storage, generator: torch.Generator) -> Factors:
    m, n = shape
    rank = largest_rank(shape, storage)
    u, v = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
    return Factors(u, v, torch.zeros(min(shape), dtype=torch.float64), 1.0)


def _head(config: DecoderConfig, generator: torch.Generator) -> float:
    """Return the seconds of the loss of one token."""
    vocabulary = min(config.vocab_size, TRIAL_VOCABULARY)
    model = SimpleNamespace(
        lm_head=nn.Linear(config.hidden_size, vocabulary, bias=False).requires_grad_(False)
    )
    hidden = torch.randn(1, HEAD_CHUNK + 1, config.hidden_size, generator=generator)
    ids = torch.randint(vocabulary, (HEAD_CHUNK + 1,), generator=generator)
    seconds = []
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        loss_gradient(model, hidden, ids, labels="sampled", seed=0)
        seconds.append(time.perf_counter() - start)
    return seconds[-1] / HEAD_CHUNK * config.vocab_size / vocabulary


def _factorization(shape: tuple[int, int], storage: Storage, generator: torch.Generator) -> float:
    smaller = max(1.0, min(shape) / TRIAL_SIDE)
    m, n = (max(1, round(size / smaller)) for size in shape)
    side = min(m, n)
    rows = torch.randn(2 * side, side, dtype=torch.float64, generator=generator)
    gram = rows.T @ rows / len(rows)
    moments = Moments(gram, gram, side, 1.0, 1.0, gram)
    weight = torch.randn(m, n, generator=generator)
    start = time.perf_counter()
    factorize(weight, moments, storage=storage)
    return (time.perf_counter() - start) * smaller**3
