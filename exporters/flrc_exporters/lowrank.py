"""Linear layers, dense or as rank chunks: ``y = U_a (V_a x) + U_b (V_b x)``; later stages drop chunks."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import nn

from flrc_runtime.manifest import ProjectionPlan

from .layout import GroupLayout, output_factor_name
from .number_format import AccuracyLevel, NumberFormat

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
        self, layout: GroupLayout, stage: int, *, accuracy_level: AccuracyLevel, bias: bool, packed: bool
    ) -> None:
        super().__init__(layout.name.rpartition(".")[2])
        self.blocks = layout.blocks_at(stage)
        self.packed = packed
        self.products = [
            Linear(
                block.name,
                (block.rows, layout.in_features),
                number_format=NumberFormat.named(block.format, accuracy_level),
                bias=bias,
            )
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


class PivotedFactor(Linear):
    """Second factor of a pivoted chunk: ``cat(z, U z)`` put in order, ``shape`` is (out, rank) of the chunk."""

    def __init__(self, name: str, shape: tuple[int, int], *, number_format: NumberFormat) -> None:
        super().__init__(name, (shape[0] - shape[1], shape[1]), number_format=number_format)
        self.order = nn.Parameter([shape[0]], ir.DataType.INT64)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Multiply and order: ``[batch, sequence, rank] -> [batch, sequence, out]``."""
        outputs = op.Concat(x, super().forward(op, x), axis=-1)
        y: ir.Value = op.Gather(outputs, self.order, axis=-1)
        return y


class ProjectionOutput(nn.Module):
    """The second half of one projection: the sum of what each chunk makes of its ``V_c x``, and its bias."""

    def __init__(
        self, plan: ProjectionPlan, stage: int, *, accuracy_level: AccuracyLevel, bias: bool
    ) -> None:
        super().__init__(plan.name.rpartition(".")[2])
        m, rank = plan.shape[0], plan.ranks[stage]
        sizes = [stop - start for start, stop in plan.chunks() if rank is not None and stop <= rank]
        # A bias that no product can add is added last: to the dense outputs of a mixed group, and after a Gather.
        apart = bias and (plan.dense or plan.storage == "pivoted")
        formats = [
            NumberFormat.named(plan.format_of(f"chunks.{i}.U"), accuracy_level) for i in range(len(sizes))
        ]
        self.factors: list[Linear | PivotedFactor] = [
            PivotedFactor(output_factor_name(i), (m, size), number_format=formats[i])
            if plan.storage == "pivoted"
            else Linear(output_factor_name(i), (m, size), number_format=formats[i], bias=bias and i == 0)
            for i, size in enumerate(sizes)
        ]
        self.bias = nn.Parameter([m]) if apart else None

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
        accuracy_level: 4 lets kernels round activations to int8.
        bias: Whether every projection has one.
        packed: Leave the outputs of an all-dense group in one tensor, one after the other.
    """

    def __init__(
        self,
        layout: GroupLayout,
        stage: int,
        *,
        accuracy_level: AccuracyLevel,
        bias: bool = False,
        packed: bool = False,
    ) -> None:
        super().__init__("")
        dense = layout.dense
        self.packed = packed and dense
        self.names = [plan.name for plan in layout.projections]
        self.stack = StackedInput(
            layout, stage, accuracy_level=accuracy_level, bias=bias and dense, packed=self.packed
        )
        self.outputs = [
            ProjectionOutput(plan, stage, accuracy_level=accuracy_level, bias=bias and not dense)
            for plan in layout.projections
        ]

    def forward(self, op: Any, x: ir.Value) -> list[ir.Value]:
        """Return one output ``[batch, sequence, out]`` per projection, or the packed one alone."""
        pieces: dict[str, list[ir.Value]] = self.stack(op, x)
        if self.packed:
            return pieces[self.names[0]]
        return [output(op, pieces[name]) for name, output in zip(self.names, self.outputs, strict=True)]
