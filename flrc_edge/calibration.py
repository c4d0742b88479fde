"""One pass over calibration tokens: the second moments and Fisher scores of every projection.

For a projection ``y = x Wᵀ`` (``W: [m, n]``) and the gradient ``g = ∂L/∂y`` of the summed token loss, only Gram
matrices of the smaller side are kept (docs/how-it-works.md):

* ``m <= n``: ``energy = E[y yᵀ]`` and ``gradient = E[g gᵀ]``, both ``[m, m]``, y without its bias;
* ``m > n``: ``energy = E[x xᵀ]`` and ``gradient = E[z zᵀ]`` with ``z = Wᵀ g``, both ``[n, n]``;
* ``weighted``: the energy once more, every token weighed by ``‖g‖²``: by how much the loss depends on it.

The loss is that of labels sampled from the model's own distribution (the true Fisher), not of the text's next
tokens (the empirical one): the former is the curvature of KL(model || compressed), see docs/how-it-works.md.
Products and sums are float64: with massive activations a float32 Gram loses the small directions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flrc_edge.errors import NumericalError
from flrc_edge.progress import Progress, silent

Labels = Literal["sampled", "text"]
PANELS = 4  # of a Gram matrix, whose upper triangle is not computed
HEAD_CHUNK = 256  # tokens whose logits exist at a time: a vocabulary of 262,144 costs 1 GiB per 1024 tokens


@dataclass(frozen=True)
class Moments:
    """Statistics of one projection, means over tokens.

    Args:
        energy: ``E[y yᵀ]: [m, m]`` if m <= n, else ``E[x xᵀ]: [n, n]``; float64.
        gradient: ``E[g gᵀ]: [m, m]`` if m <= n, else ``E[z zᵀ]: [n, n]``; float64.
        gradient_trace: ``tr E[g gᵀ]``, the same on both sides.
        fisher_g2: ``mean_b Σ G_b²`` over windows b, ``G_b = ∂L_b/∂W``.
        fisher_gw2: ``mean_b Σ (G_b ∘ W)²``.
        weighted: ``E[‖g‖² y yᵀ] / E[‖g‖²]``, or with x, of the shape of ``energy``; None if it was not measured.
    """

    energy: Tensor
    gradient: Tensor
    gradient_trace: float
    fisher_g2: float
    fisher_gw2: float
    weighted: Tensor | None = None


@dataclass(frozen=True)
class Statistics:
    """Moments by projection name, the mean loss (nats) of the labels and the tokens they were measured on."""

    moments: dict[str, Moments]
    loss: float
    tokens: int


def calibrate(
    model: nn.Module,
    projections: Sequence[str],
    ids: Tensor,
    *,
    labels: Labels = "sampled",
    progress: Progress = silent,
) -> Statistics:
    """Measure the statistics of ``projections``.

    Under ``accelerate launch`` every process takes its share of the windows and all return the same sums.

    Args:
        model: A Hugging Face causal language model with float32 weights.
        projections: Names of ``nn.Linear`` modules of its decoder layers.
        ids: ``[windows, length]`` int64 token ids; each window is one batch.
        labels: What the loss predicts: tokens ``sampled`` from the model (reproducibly), or the ``text``'s own.
        progress: Called after every window.

    Raises:
        NumericalError: An activation, gradient or loss is not finite; names the first such projection and the window.
    """
    rank, world = _processes()
    mine = range(rank, len(ids), world)
    wanted = {name: model.get_submodule(name) for name in projections}
    accumulators = {name: _Accumulator(name, module) for name, module in wanted.items()}
    frozen = {p: p.requires_grad for p in model.parameters()}
    loss = torch.zeros((), dtype=torch.float64)
    with ExitStack() as stack:
        stack.callback(_restore, frozen)
        for parameter in frozen:
            parameter.requires_grad_(False)
        for accumulator in accumulators.values():
            stack.enter_context(accumulator)
        stack.callback(model.train, model.training)
        stack.enter_context(torch.enable_grad())
        model.eval()
        progress("calibrate", 0, len(mine))
        for done, window in enumerate(mine, 1):
            try:
                loss += backward(model, ids[window : window + 1], labels=labels, seed=window)
            except NotFiniteError as error:
                raise NumericalError(
                    f"{error} in calibration window {window}",
                    hint="load the model in float32 and look at its weights and at that text",
                ) from None
            progress("calibrate", done, len(mine))
    _add_over_processes([loss, *(t for a in accumulators.values() for t in a.sums())], world)
    predicted = len(ids) * (ids.shape[1] - 1)
    return Statistics(
        {name: a.moments(ids.numel(), len(ids)) for name, a in accumulators.items()},
        loss.item() / predicted,
        ids.numel(),
    )


def backward(model: Any, ids: Tensor, *, labels: Labels, seed: int) -> Tensor:
    """Backpropagate the loss of one window, summed over its tokens, to every weight that wants a gradient.

    Args:
        model: A Hugging Face causal language model.
        ids: ``[1, T]``; the loss is that of positions 0 to T - 2.
        labels: See :func:`calibrate`.
        seed: Of the sampled labels.

    Returns:
        The summed loss, nats.

    Raises:
        NotFiniteError: It is not finite.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (1, T, h)
    leaf = hidden.detach().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    targets = ids[0, 1:]  # the one shift: position t predicts token t + 1
    generator = torch.Generator().manual_seed(seed)
    # The head runs in chunks of tokens: all logits of a window at once would be the largest tensor.
    for start in range(0, len(targets), HEAD_CHUNK):
        stop = min(start + HEAD_CHUNK, len(targets))
        logits = model.lm_head(leaf[0, start:stop]).float()  # (chunk, vocab)
        if not torch.isfinite(logits).all():
            raise NotFiniteError("the logits are not finite")
        target = targets[start:stop]
        if labels == "sampled":
            target = sampled_tokens(logits.detach(), generator)
        loss = nn.functional.cross_entropy(logits, target, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    if not torch.isfinite(total):
        raise NotFiniteError("the loss is not finite")
    hidden.backward(leaf.grad)
    return total


def sampled_tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token a row by inverting the distribution function; torch.multinomial draws vocab numbers a row.

    Args:
        logits: ``[T, vocab]`` float32, finite.
        generator: Of the random numbers.

    Returns:
        ``[T]`` int64.
    """
    cumulated = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    points = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator) * cumulated[:, -1:]
    # The first token whose sum is above the point: one of probability 0 cannot be it.
    return torch.searchsorted(cumulated, points, right=True)[:, 0].clamp_max(logits.shape[1] - 1)


class NotFiniteError(Exception):
    """Raised in the middle of a pass, so that what is named is the first thing that went wrong."""


class _Accumulator:
    """Sums the moments of one projection while it is entered as a context."""

    def __init__(self, name: str, module: nn.Module) -> None:
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{name} is {type(module).__name__}, not a linear projection")
        self.name = name
        self.module = module
        m, n = module.weight.shape
        self.wide_input = m <= n
        side = min(m, n)
        self.energy = torch.zeros(side, side, dtype=torch.float64)
        self.weighted = torch.zeros(side, side, dtype=torch.float64)
        self.gradient = torch.zeros(side, side, dtype=torch.float64)
        self.scalars = torch.zeros(3, dtype=torch.float64)  # tr(g gᵀ), ΣG², Σ(G∘W)²
        self._handles: list[Any] = []
        self._earlier_gradient: Tensor | None = None

    def __enter__(self) -> _Accumulator:
        self.module.weight.requires_grad_(True)
        self._earlier_gradient, self.module.weight.grad = self.module.weight.grad, None
        self._handles = [
            self.module.register_forward_pre_hook(self._input),
            self.module.register_forward_hook(self._forward),
            self.module.weight.register_post_accumulate_grad_hook(self._weight_gradient),  # type: ignore[no-untyped-call]
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.module.weight.grad = self._earlier_gradient

    def _input(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Give a projection with fewer inputs than outputs an input of its own, whose gradient is ``z = Wᵀ g``."""
        if self.wide_input:
            return None
        before = inputs[0]  # which nothing before it may want a gradient of
        own = before.view_as(before) if before.requires_grad else before.detach().requires_grad_()
        own.register_hook(lambda z: _add_gram(self.gradient, z.flatten(0, -2)))  # type: ignore[no-untyped-call]
        return (own, *inputs[1:])

    def _forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        with torch.no_grad():
            # A sum is finite where its terms are, but for overflow; looking at each takes four times as long.
            if not torch.isfinite(output.sum()) and not torch.isfinite(output).all():
                raise NotFiniteError(f"{self.name}: activations are not finite")
            if self.wide_input:
                value = output.detach()
                if self.module.bias is not None:
                    value = value - self.module.bias
            else:
                value = inputs[0].detach()
            value = value.reshape(-1, value.shape[-1])  # (T, side)
            _add_gram(self.energy, value)
        output.register_hook(lambda gradient: self._output_gradient(gradient.flatten(0, -2), value))  # type: ignore[no-untyped-call]

    def _output_gradient(self, gradient: Tensor, value: Tensor) -> None:
        weights = gradient.square().sum(1).double()  # (T,)
        trace = weights.sum()
        if not torch.isfinite(trace):
            raise NotFiniteError(f"{self.name}: gradients are not finite")
        self.scalars[0] += trace
        _add_gram(self.weighted, value * weights.sqrt()[:, None].to(value.dtype))
        if self.wide_input:
            _add_gram(self.gradient, gradient)

    def _weight_gradient(self, weight: Tensor) -> None:
        gradient = weight.grad
        assert gradient is not None
        self.scalars[1] += gradient.square().sum()
        self.scalars[2] += (gradient * weight.detach()).square().sum()
        weight.grad = None  # freed at once: all of them together are as large as the model

    def sums(self) -> list[Tensor]:
        return [self.energy, self.weighted, self.gradient, self.scalars]

    def moments(self, tokens: int, windows: int) -> Moments:
        trace, g2, gw2 = self.scalars.tolist()
        energy = _whole(self.energy) / tokens
        return Moments(
            energy,
            _whole(self.gradient) / tokens,
            trace / tokens,
            g2 / windows,
            gw2 / windows,
            _whole(self.weighted) / trace if trace > 0 else energy,
        )


def _add_gram(gram: Tensor, value: Tensor) -> None:
    """Add ``valueᵀ value`` to the lower triangle of ``gram``, panel by panel: a third of the work is saved."""
    rows = value.double()  # (T, side)
    width = -(-rows.shape[1] // PANELS)
    for start in range(0, rows.shape[1], width):
        stop = start + width
        gram[start:, start:stop].addmm_(rows[:, start:].T, rows[:, start:stop])


def _whole(gram: Tensor) -> Tensor:
    """Return the symmetric matrix whose lower triangle is given."""
    return gram.tril() + gram.tril(-1).T


def _restore(requires_grad: dict[nn.Parameter, bool]) -> None:
    for parameter, value in requires_grad.items():
        parameter.requires_grad_(value)


def _processes() -> tuple[int, int]:
    """Return (rank, number of processes), joining the group that ``accelerate launch`` set up."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    from accelerate import PartialState

    state = PartialState(cpu=True)  # the model is on the CPU, whatever the machine has
    return state.process_index, state.num_processes


def is_main_process() -> bool:
    """Whether this process writes the results (always, unless started by ``accelerate launch``)."""
    return _processes()[0] == 0


def _add_over_processes(tensors: list[Tensor], world: int) -> None:
    if world > 1:
        reduce: Callable[[Tensor], object] = torch.distributed.all_reduce
        for tensor in tensors:
            reduce(tensor)
