"""The parameters of a compressed model that are trained, and their optimizer: AdamW, warm-up, cosine to zero.

A tensor's learning rate is relative: ``lr`` times the root mean square it starts with. The factors differ in size by
orders of magnitude (U has unit columns, V carries the loss), so one absolute rate fits few of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flrc_edge.errors import NumericalError, UsageError
from flrc_edge.healing.distillation import Distiller
from flrc_edge.lowrank import LowRankLinear, set_stage

Train = Literal["factors", "projections", "all"]
BETAS = (0.9, 0.95)  # a few hundred steps: a memory of 1000 steps would never fill
MICRO_BATCH = 2048  # tokens whose activations exist at a time
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def trainable(model: nn.Module, train: Train) -> dict[str, nn.Parameter]:
    """Return the parameters to train by name; never those of the embedding and the head.

    Args:
        model: A compressed model.
        train: ``factors``; ``projections`` adds those that stayed dense; ``all`` adds norms and biases.

    Raises:
        UsageError: There is none.
    """
    fixed = {id(p) for m in (model.get_submodule("model.embed_tokens"), model.get_submodule("lm_head"))
             for p in m.parameters()}  # fmt: skip
    factors, dense = set(), set()
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            factors |= {id(p) for p in module.chunks.parameters()}
        elif isinstance(module, nn.Linear):
            dense.add(id(module.weight))
    wanted = factors | (dense if train == "projections" else set())
    chosen = {
        name: p
        for name, p in model.named_parameters()
        if id(p) not in fixed and (train == "all" or id(p) in wanted)
    }
    if not chosen:
        raise UsageError(
            "the checkpoint holds no factors, there is nothing to train",
            hint="--train projections trains the dense projections",
        )
    return chosen


def rate(progress: float, warmup: float) -> float:
    """Return the share of the learning rate at ``progress`` in [0, 1]: linear warm-up, then cosine to zero."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


class Trainer:
    """One optimizer step after another.

    Args:
        distiller: The two models.
        accelerator: Of ``accelerate``; gradients are summed over its processes.
        train: Which parameters.
        lr: Learning rate relative to the size of a tensor.
        clip: Largest norm of the gradient; 0 leaves it as it is.
    """

    def __init__(
        self, distiller: Distiller, accelerator: Accelerator, *, train: Train, lr: float, clip: float
    ) -> None:
        self._distiller, self._accelerator, self._clip = distiller, accelerator, clip
        self.parameters = trainable(distiller.student, train)
        for parameter in distiller.student.parameters():
            parameter.requires_grad_(False)
        groups = []
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
            size = max(parameter.detach().square().mean().sqrt().item(), 1e-3)  # a bias may be zero
            groups.append({"params": [parameter], "lr": 0.0, "full": lr * size})
        # No weight decay: it pulls towards zero, and what is wanted lies near the start.
        self._optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=1e-12, weight_decay=0.0, fused=True)

    def step(self, ids: Tensor, *, stage: int, rate: float, tokens: int) -> float:
        """Train one stage on this process's windows.

        Args:
            ids: ``[windows, T]``.
            stage: The stage to train.
            rate: Share of the learning rate.
            tokens: Of the step in all processes.

        Returns:
            Mean KL of the step, nats a token, before the parameters changed.

        Raises:
            NumericalError: It or its gradient is not finite; the parameters are as they were.
        """
        set_stage(self._distiller.student, stage)
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self._accelerator.device)
        with torch.enable_grad():
            for part in torch.split(ids, max(1, MICRO_BATCH // ids.shape[1])):
                total += self._distiller.backward(part.to(self._accelerator.device), tokens=tokens)
        loss: float = self._sum(total).item() / tokens
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        self._sum_gradients(gradients)
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "KL" if not math.isfinite(loss) else "gradient"
            raise NumericalError(f"the {what} of stage {stage} is not finite")
        if self._clip and norm > self._clip:
            torch._foreach_mul_(gradients, self._clip / norm)
        for group in self._optimizer.param_groups:
            group["lr"] = group["full"] * rate
        self._optimizer.step()
        return loss

    def _sum(self, value: Tensor) -> Tensor:
        summed: Tensor = self._accelerator.reduce(value, reduction="sum")
        return summed

    def _sum_gradients(self, gradients: list[Tensor]) -> None:
        if self._accelerator.num_processes == 1:
            return
        flat = self._sum(torch.cat([g.view(-1) for g in gradients]))
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and moments by name, for a state file."""
        result = {}
        for name, parameter in self.parameters.items():
            result[f"parameter {name}"] = parameter.detach()
            for key in _MOMENTS:
                if key in (state := self._optimizer.state[parameter]):
                    result[f"{key} {name}"] = state[key]
        return {name: tensor.cpu().contiguous() for name, tensor in result.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"parameter {name}"])
            state: dict[str, Any] = {
                key: tensors[f"{key} {name}"].clone().to(parameter.device)
                for key in _MOMENTS
                if f"{key} {name}" in tensors
            }
            if state:
                self._optimizer.state[parameter] = state
