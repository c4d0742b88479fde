"""Linear layers, dense or as rank chunks: ``y = U_a (V_a x) + U_b (V_b x)``; later stages drop chunks."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import nn

from flrc_runtime.manifest import ProjectionPlan

from .layout import GroupLayout, output_factor_name
from .number_format import NumberFormat

MICROSOFT = "com.microsoft"


class Linear(nn.Module):
    """``y = W x (+ b)``, ``W: [out, in]`` in a number format; fp32 is stored transposed for MatMul."""

    def __init__(
        self, name: str, shape: tuple[int, int], *, number_format: NumberFormat, bias: bool = False
    ) -> None:
        super().__init__(name)
        out_features, in_features = shape
        self.shape, self.format = shape, number_format
        if number_format.quantized:
            packed = number_format.packed_shape(out_features, in_features)
            self.qweight = nn.Parameter(packed, ir.DataType.UINT8)
            self.scales = nn.Parameter(packed[:2])
        else:
            self.weight = nn.Parameter([in_features, out_features])
        self.bias = nn.Parameter([out_features]) if bias else None

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Multiply ``x: [batch, sequence, in]``."""
        if not self.format.quantized:
            y: ir.Value = op.MatMul(x, self.weight)
            return y if self.bias is None else _add(op, y, self.bias)
        inputs: list[ir.Value | None] = [x, self.qweight, self.scales]
        if self.bias is not None:
            inputs += [None, None, self.bias]
        y = op.MatMulNBits(
            *inputs,
            K=self.shape[1],
            N=self.shape[0],
            bits=self.format.bits,
            block_size=self.format.block_size,
            accuracy_level=self.format.accuracy_level,
            _domain=MICROSOFT,
            _version=1,
        )
        return y


def _add(op: Any, a: ir.Value, b: ir.Value) -> ir.Value:
    total: ir.Value = op.Add(a, b)
    return total


class StackedInput(nn.Module):
    """Every product of an input group that reads its input: dense projections and first factors ``V``."""

    def __init__(
        self, layout: GroupLayout, stage: int, *, number_format: NumberFormat, bias: bool, packed: bool
    ) -> None:
        super().__init__(layout.name.rpartition(".")[2])
        self.blocks = layout.blocks_at(stage)
        self.packed = packed
        self.products = [
            Linear(block.name, (block.rows, layout.in_features), number_format=number_format, bias=bias)
            for block in self.blocks
        ]

    def forward(self, op: Any, x: ir.Value) -> dict[str, list[ir.Value]]:
        """Return, by projection, its dense output or its chunks' ``V x``, first chunk first."""
        pieces: dict[str, list[ir.Value]] = {}
        for block, product in zip(self.blocks, self.products, strict=True):
            y = product(op, x)
            if len(block.parts) > 1 and not self.packed:
                sizes = [part.rows for part in block.parts]
                ys = op.Split(y, sizes, axis=-1, _outputs=len(sizes))
            else:
                ys = [y]
            for part, piece in zip(block.parts, ys, strict=not self.packed):
                pieces.setdefault(part.projection.name, []).append(piece)
        return pieces


class ProjectionOutput(nn.Module):
    """The second half of one projection: the sum of ``U_c z_c`` over its chunks, and its bias."""

    def __init__(self, plan: ProjectionPlan, stage: int, *, number_format: NumberFormat, bias: bool) -> None:
        super().__init__(plan.name.rpartition(".")[2])
        rank = plan.ranks[stage]
        self.factors = [
            Linear(
                output_factor_name(i),
                (plan.shape[0], stop - start),
                number_format=number_format,
                bias=bias and i == 0,
            )
            for i, (start, stop) in enumerate(plan.chunks())
            if rank is not None and stop <= rank
        ]
        self.bias = nn.Parameter([plan.shape[0]]) if bias and plan.dense else None

    def forward(self, op: Any, pieces: list[ir.Value]) -> ir.Value:
        """Combine the chunks ``[batch, sequence, rank of chunk]`` to ``[batch, sequence, out]``."""
        if self.factors:
            pieces = [factor(op, z) for factor, z in zip(self.factors, pieces, strict=True)]
        y = pieces[0]
        for more in pieces[1:]:
            y = _add(op, y, more)
        return y if self.bias is None else _add(op, y, self.bias)


class LinearGroup(nn.Module):
    """All projections of one input group at one stage.

    Args:
        layout: The group.
        stage: The stage.
        number_format: Of every matrix of the group.
        bias: Whether every projection has one.
        packed: Leave the outputs of an all-dense group in one tensor, one after the other.
    """

    def __init__(
        self,
        layout: GroupLayout,
        stage: int,
        *,
        number_format: NumberFormat,
        bias: bool = False,
        packed: bool = False,
    ) -> None:
        super().__init__("")
        dense = layout.dense
        self.packed = packed and dense
        self.names = [plan.name for plan in layout.projections]
        self.stack = StackedInput(
            layout, stage, number_format=number_format, bias=bias and dense, packed=self.packed
        )
        self.outputs = [
            ProjectionOutput(plan, stage, number_format=number_format, bias=bias and not dense)
            for plan in layout.projections
        ]

    def forward(self, op: Any, x: ir.Value) -> list[ir.Value]:
        """Return one output ``[batch, sequence, out]`` per projection, or the packed one alone."""
        pieces: dict[str, list[ir.Value]] = self.stack(op, x)
        if self.packed:
            return pieces[self.names[0]]
        return [output(op, pieces[name]) for name, output in zip(self.names, self.outputs, strict=True)]
