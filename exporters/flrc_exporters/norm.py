"""The RMS norm, fused with the residual addition before it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import nn

from .lowrank import MICROSOFT


class Norm(nn.Module):
    """RMS norm, with the residual addition before it if there is one.

    onnx.checker knows no SimplifiedLayerNormalization, so a norm without residual is the skip form of
    ``x + x`` with four times the epsilon: ``2x / sqrt(4 mean(x²) + 4ε)``, the same bits, as scaling by
    powers of two is exact.
    """

    def __init__(self, name: str, size: int, *, eps: float) -> None:
        super().__init__(name)
        self.weight = nn.Parameter([size])
        self.eps = eps

    def forward(self, op: Any, x: ir.Value, residual: ir.Value | None = None) -> tuple[ir.Value, ir.Value]:
        """Return the normalized sum and the sum itself."""
        if residual is None:
            y = op.SkipSimplifiedLayerNormalization(
                x, x, self.weight, epsilon=4 * self.eps, _domain=MICROSOFT, _version=1
            )
            return y, x
        y, _, _, total = op.SkipSimplifiedLayerNormalization(
            residual, x, self.weight, epsilon=self.eps, _outputs=4, _domain=MICROSOFT, _version=1
        )
        return y, total
