"""ASVD's factors: SVD of the weight with every input channel scaled by how loud it is (arXiv 2312.05821, section 3.3).

``W S = U Λ Zᵀ`` with ``S = diag(mean|x| ** α)``; ``W ≈ U (Λ Zᵀ S⁻¹)``. The decomposition is exact and fails with an
error, where ASVD4LLM draws a random sketch and falls back to random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flrc_edge.baselines.svd import singular_triplets
from flrc_edge.errors import NumericalError
from flrc_edge.factorization import Factors
from flrc_edge.progress import Progress, silent

ALPHA = 0.5  # the published choice
FLOOR = 1e-6  # added to S, as ASVD4LLM does, so that a silent channel can be divided by


@torch.no_grad()
def channel_means(
    model: Any, projections: Sequence[str], ids: Tensor, *, progress: Progress = silent
) -> dict[str, Tensor]:
    """Measure the mean absolute input of every channel of every projection, in one pass forward.

    Args:
        model: A Hugging Face causal language model.
        projections: Names of ``nn.Linear`` modules of its decoder layers.
        ids: ``[windows, length]`` int64 token ids.
        progress: Called after every window.

    Returns:
        ``[n]`` float64 by projection.

    Raises:
        NumericalError: An activation is not finite; names the projection and the window.
    """
    sums: dict[str, Tensor] = {}
    window = 0

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total = inputs[0].reshape(-1, inputs[0].shape[-1]).abs().sum(0, dtype=torch.float64)
        if not torch.isfinite(total).all():
            raise NumericalError(f"{name}: activations are not finite in calibration window {window}")
        sums[name] = sums[name] + total if name in sums else total

    with ExitStack() as stack:
        for name in projections:
            hook: Callable[..., None] = partial(add, name)
            handle = model.get_submodule(name).register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        for window in range(len(ids)):
            model.model(input_ids=ids[window : window + 1], use_cache=False)
            progress("channel means", window + 1, len(ids))
    return {name: sums[name] / ids.numel() for name in projections}


def asvd_factors(weight: Tensor, means: Tensor, *, alpha: float = ALPHA, name: str = "") -> Factors:
    """Factorize a weight.

    Args:
        weight: ``[m, n]``.
        means: ``[n]``: the mean absolute input of each channel.
        alpha: Its power; 0 is the plain SVD.
        name: Used in error messages.

    Returns:
        Factors up to rank ``min(m, n)``. Their loss is ``‖(W - U V) S‖²`` (Frobenius), not nats.

    Raises:
        NumericalError: The weight or a mean is not finite, or the SVD does not converge.
    """
    if not torch.isfinite(means).all():
        raise NumericalError(f"{name}: its channel means hold a value that is not finite")
    scale = means.double() ** alpha + FLOOR
    u, values, zt = singular_triplets(weight.double() * scale, name=name)
    v = values[:, None] * zt / scale
    return Factors(u.float().contiguous(), v.float().contiguous(), values.square(), loss_scale=1.0)
