"""KL(dense || compressed) over the whole vocabulary, its gradient, and the measurement of it on held-out windows.

Knowledge distillation (Hinton et al. 2015, temperature 1) of a model from the one it was compressed from. The heads
run in chunks of tokens and the gradient at the logits is written down (``softmax(s) - softmax(t)``), so that
``[T, vocab]`` never exists at once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from flrc_edge.lowrank import set_stage

Precision = Literal["auto", "float32", "bfloat16"]
LOGITS = 2**22  # logits that exist at a time: 16 MiB each of the few arrays, which stays in a CPU's cache


def fast_bfloat16(device: torch.device) -> bool:
    """Return whether matrix products in bfloat16 are several times faster on ``device`` than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # AVX-512 alone emulates them at about the speed of float32.
    supported: Any = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return device.type == "cpu" and supported is not None and bool(supported())


@dataclass(frozen=True)
class Arithmetic:
    """Where and in which number format the two models are computed.

    Weights, residual stream, softmax, gradients of the weights and optimizer are float32 in either; ``bfloat16`` is of
    the matrix products. Measured on SmolLM2-135M, it alone is worth a KL of 7e-4 nats.
    """

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, precision: Precision, device: torch.device) -> Arithmetic:
        """Return the arithmetic of a precision; ``auto`` is bfloat16 where the device is built for it."""
        if precision == "auto":
            precision = "bfloat16" if fast_bfloat16(device) else "float32"
        return cls(device, getattr(torch, precision))

    def context(self) -> AbstractContextManager[Any]:
        """Return the context in which the models run."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


class Distiller:
    """A compressed model and the dense one it shall follow, their heads in the arithmetic of the products.

    Args:
        student: The compressed model.
        teacher: The dense one; both are Hugging Face causal language models whose heads are not trained.
        arithmetic: Where and how to compute.
    """

    def __init__(self, student: Any, teacher: Any, arithmetic: Arithmetic) -> None:
        self.student, self.teacher, self.arithmetic = student, teacher, arithmetic
        self._heads = [self._head(teacher), self._head(student)]
        if torch.equal(*self._heads):
            self._heads[1] = self._heads[0]

    def _head(self, model: Any) -> Tensor:
        weight: Tensor = model.lm_head.weight.detach()
        return weight.to(self.arithmetic.dtype)

    @torch.no_grad()
    def target(self, ids: Tensor) -> Tensor:
        """Return the dense model's last hidden state ``[B, T, h]`` for ids ``[B, T]``."""
        return self._hidden(self.teacher, ids)

    def backward(self, ids: Tensor, *, tokens: int) -> Tensor:
        """Add the gradient of the KL to the parameters of the student.

        Args:
            ids: ``[B, T]``.
            tokens: What the sum is divided by: the tokens of the whole step.

        Returns:
            The KL summed over the B·T tokens, nats, float64.
        """
        target = self.target(ids)
        hidden = self._hidden(self.student, ids)
        total, gradient = self._divergence(target, hidden.detach(), gradient=True)
        hidden.backward(gradient.view_as(hidden) / tokens)  # type: ignore[no-untyped-call]
        return total

    @torch.no_grad()
    def divergence(self, ids: Tensor, target: Tensor) -> Tensor:
        """Return the KL summed over the tokens of ids ``[B, T]``, nats, float64.

        Args:
            ids: Of the windows.
            target: What :meth:`target` gave for them.
        """
        return self._divergence(target, self._hidden(self.student, ids), gradient=False)[0]

    def _hidden(self, model: Any, ids: Tensor) -> Tensor:
        with self.arithmetic.context():
            hidden: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    @torch.no_grad()
    def _divergence(self, target: Tensor, hidden: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor]:
        """Return the summed KL and, if wanted, its gradient at ``hidden`` as ``[tokens, h]``."""
        teacher_head, student_head = self._heads
        size = hidden.shape[-1]
        rows = [h.reshape(-1, size).to(teacher_head.dtype) for h in (target, hidden)]  # (B, T, h) -> (BT, h)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        parts = []
        for t, s in zip(*(self._chunks(r) for r in rows), strict=True):
            p = torch.log_softmax(F.linear(t, teacher_head), -1, dtype=torch.float32)  # (chunk, vocab)
            q = torch.log_softmax(F.linear(s, student_head), -1, dtype=torch.float32)
            difference = p - q
            p.exp_()
            total += torch.dot(p.view(-1), difference.view(-1))  # one pass, without a product in memory
            if gradient:
                parts.append((q.exp_().sub_(p).to(student_head.dtype) @ student_head).to(hidden.dtype))
        return total, torch.cat(parts) if gradient else hidden

    def _chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        return torch.split(rows, max(1, LOGITS // self._heads[0].shape[0]))


class Validation:
    """Held-out windows with what the dense model makes of them, computed once.

    Args:
        distiller: The two models.
        ids: ``[windows, T]``, this process's share.
        stages: Stages of the student.
    """

    def __init__(self, distiller: Distiller, ids: Tensor, *, stages: int) -> None:
        self._distiller, self._stages = distiller, stages
        self._windows = [
            (w, distiller.target(w)) for w in torch.split(ids.to(distiller.arithmetic.device), 1)
        ]

    def measure(self) -> Tensor:
        """Return the KL of every stage summed over the tokens, float64 ``[stages]``, and leave stage 0 set."""
        model = self._distiller.student
        rows = []
        for stage in reversed(range(self._stages)):
            set_stage(model, stage)
            values = [self._distiller.divergence(ids, target) for ids, target in self._windows]
            rows.append(torch.stack(values).sum() if values else torch.zeros((), dtype=torch.float64))
        return torch.stack(rows[::-1])
