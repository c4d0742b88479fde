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

import atexit
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flrc_edge.layer_pass import in_layer, layer_pass
from flrc_edge.pass_journal import PassJournal
from flrc_edge.progress import Progress, silent
from flrc_edge.token_loss import Labels, NotFiniteError

PANELS = 4  # of a Gram matrix, whose upper triangle is not computed


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

    moments: Mapping[str, Moments]
    loss: float
    tokens: int


def calibrate(
    model: nn.Module,
    projections: Sequence[str],
    ids: Tensor,
    *,
    labels: Labels = "sampled",
    into: MutableMapping[str, Moments] | None = None,
    journal: Path | None = None,
    progress: Progress = silent,
) -> Statistics:
    """Measure the statistics of ``projections``, one decoder layer at a time (layer_pass.py).

    Under ``accelerate launch`` every process takes its share of the windows and all return the same sums.

    Args:
        model: A Hugging Face causal language model with float32 weights.
        projections: Names of ``nn.Linear`` modules of its decoder layers.
        ids: ``[windows, length]`` int64 token ids; each window is one batch.
        labels: What the loss predicts: tokens ``sampled`` from the model (reproducibly), or the ``text``'s own.
        into: Where the moments of a projection go as soon as they are known; by default memory.
        journal: Where the state is kept between two layers, of a run of one process whose ``into`` outlives it.
        progress: Called after every window of every layer.

    Raises:
        NumericalError: An activation, gradient or loss is not finite; names the first such projection and the window.
    """
    rank, world = _processes()
    mine = range(rank, len(ids), world)
    moments: MutableMapping[str, Moments] = {} if into is None else into
    for name in projections:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{name} is {type(module).__name__}, not a linear projection")

    @contextmanager
    def around(layer: int) -> Iterator[None]:
        accumulators = [
            _Accumulator(name, model.get_submodule(name)) for name in in_layer(projections, layer)
        ]
        with ExitStack() as stack:
            for accumulator in accumulators:
                stack.enter_context(accumulator)
            yield
        _add_over_processes([t for a in accumulators for t in a.sums()], world)
        for accumulator in accumulators:
            moments[accumulator.name] = accumulator.moments(ids.numel(), len(ids))

    def holds(layer: int) -> bool:
        return all(name in moments for name in in_layer(projections, layer))

    loss = layer_pass(
        model,
        ids[rank::world],
        around,
        labels=labels,
        seeds=mine,
        journal=None if journal is None else PassJournal(journal, holds=holds),
        progress=progress,
    )
    _add_over_processes([loss], world)
    if into is None:
        moments = {name: moments[name] for name in projections}
    return Statistics(moments, loss.item() / (len(ids) * (ids.shape[1] - 1)), ids.numel())


class _Accumulator:
    """Sums the moments of one projection while it is entered as a context."""

    def __init__(self, name: str, module: Any) -> None:
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
            self.module.weight.register_post_accumulate_grad_hook(self._weight_gradient),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.module.weight.grad = self._earlier_gradient
        self.module.weight.requires_grad_(False)

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


def _processes() -> tuple[int, int]:
    """Return (rank, number of processes), joining the group that ``accelerate launch`` set up."""
    return (0, 1) if int(os.environ.get("WORLD_SIZE", "1")) == 1 else _joined()


@cache
def _joined() -> tuple[int, int]:
    from accelerate import PartialState

    state = PartialState(cpu=True)  # the model is on the CPU, whatever the machine has
    atexit.register(
        state.destroy_process_group
    )  # its threads, ended with the interpreter, would abort the process
    return state.process_index, state.num_processes


def is_main_process() -> bool:
    """Whether this process writes the results (always, unless started by ``accelerate launch``)."""
    return _processes()[0] == 0


def _add_over_processes(tensors: list[Tensor], world: int) -> None:
    if world > 1:
        reduce: Callable[[Tensor], object] = torch.distributed.all_reduce
        for tensor in tensors:
            reduce(tensor)
