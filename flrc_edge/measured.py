"""The loss of every rank of every projection, measured on tokens in one backward pass.

For a projection with factors ``u_i v_iᵀ`` the change of output when the directions above r are dropped changes the
loss of token t by ``s_t(r) = Σ_{i>r} (g_t·u_i)(v_i·x_t)`` to first order; with labels sampled from the model,
``½ E[s(r)²]`` is the second-order growth of KL. The spectrum predicts the same number under the assumption that x
and g are independent (K-FAC); here nothing is assumed, as in EKFAC (arXiv 1806.03884), for all ranks at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flrc_edge.errors import NumericalError
from flrc_edge.factorization import Factors
from flrc_edge.layer_pass import in_layer, layer_pass
from flrc_edge.pass_journal import PassJournal
from flrc_edge.progress import Progress, silent


def measured_losses(
    model: Any,
    factors: Mapping[str, Factors],
    ids: Tensor,
    *,
    journal: Path | None = None,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Measure the growth of the token loss at every rank.

    Args:
        model: The original model, float32.
        factors: Of every projection.
        ids: ``[windows, T]`` tokens; 8 windows of 1024 are enough for curves that are averages of all of them.
        journal: Where the state is kept between two layers.
        progress: Called after every window of every layer.

    Returns:
        By projection, ``[R + 1]`` float64 nats at ranks 0 to R, not rising.

    Raises:
        NumericalError: A loss or gradient is not finite.
    """
    sums = {name: torch.zeros(f.U.shape[1] + 1, dtype=torch.float64) for name, f in factors.items()}

    @contextmanager
    def around(layer: int) -> Iterator[None]:
        with ExitStack() as stack:
            for name in in_layer(factors, layer):
                hook = _Measurement(factors[name], sums[name])
                stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
            yield

    kept = None if journal is None else PassJournal(journal, sums=sums)
    layer_pass(model, ids, around, journal=kept, progress=progress, phase="measure")
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    result = {}
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise NumericalError(f"{name}: gradients are not finite")
        # Noise may make a larger rank look worse: the curve is the least falling one above it.
        falling = torch.flip(torch.cummax(torch.flip(total, [0]), 0).values, [0])
        result[name] = 0.5 * falling / tokens
    return result


class _Measurement:
    """Adds ``Σ_t s_t(r)²`` of one projection to ``total: [R + 1]`` in a forward and backward pass."""

    def __init__(self, factors: Factors, total: Tensor) -> None:
        self.factors = factors
        self.total = total

    def __call__(self, module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        z = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float() @ self.factors.V.T  # (T, R)
        y = output.detach() if module.bias is None else output.detach() - module.bias
        output.register_hook(lambda gradient: self._add(z, y.flatten(0, -2), gradient.flatten(0, -2)))  # type: ignore[no-untyped-call]

    def _add(self, z: Tensor, y: Tensor, gradient: Tensor) -> None:
        kept = torch.cumsum((z * (gradient.float() @ self.factors.U)).double(), 1)  # (T, R)
        whole = (y.double() * gradient.double()).sum(1)  # what dropping everything changes
        self.total[0] += whole.square().sum()
        self.total[1:] += (whole[:, None] - kept).square().sum(0)
