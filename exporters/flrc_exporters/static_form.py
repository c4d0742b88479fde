"""The form of a graph for accelerators: standard operators, every dimension fixed.

Attention reads a window of W past positions, held by the caller, and the S new ones beside it; it returns the new
keys and values alone, which the caller writes into its window: no step copies the window. Keys are kept transposed,
as the product with the queries wants them. Shapes: S new tokens, W past positions, nh heads, kv key-value heads,
hd head size, g = nh / kv.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from .attention import FusedSteps, GroupQueryAttention
from .decoder import Form, GatedMLP, TiedHead
from .norm import Norm


class StandardNorm(Norm):
    """RMS norm and the residual addition before it as two operators."""

    def forward(self, op: Any, x: ir.Value, residual: ir.Value | None = None) -> tuple[ir.Value, ir.Value]:
        """Return the normalized sum and the sum itself."""
        total = x if residual is None else op.Add(residual, x)
        y: ir.Value = op.RMSNormalization(total, self.weight, axis=-1, epsilon=self.eps)
        return y, total


class StandardMLP(GatedMLP):
    """The gate's activation of standard operators."""

    def silu(self, op: Any, x: ir.Value) -> ir.Value:
        """Return ``x · sigmoid(x)``."""
        y: ir.Value = op.Mul(x, op.Sigmoid(x))
        return y


class StandardTiedHead(TiedHead):
    """The head on the embedding's own bytes as a Gemm."""

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Return logits ``[1, S, vocab]``."""
        rows = op.Gemm(op.Reshape(x, [-1, self.config.hidden_size]), self.weight, transB=1)
        logits: ir.Value = op.Reshape(rows, [1, -1, self.config.vocab_size])
        return logits


@dataclass(frozen=True)
class WindowStep:
    """What every layer needs to know of this step.

    Args:
        count: New tokens S.
        rotary: By layer, cosines and signed sines ``[1, 1, S, hd]``.
        bias: By layer, what is added to the scores ``[1, 1, g S, W + S]``: 0, or a large negative number for a position
            that is not seen.
    """

    count: int
    rotary: Sequence[tuple[ir.Value, ir.Value]]
    bias: Sequence[ir.Value]


class WindowSteps(FusedSteps):
    """Cosines, sines and biases of a step, from positions and one bias for every kind of window."""

    def forward(
        self,
        op: Any,
        input_ids: ir.Value,
        where: Sequence[ir.Value],
        rotary: Sequence[tuple[ir.Value, ir.Value]],
    ) -> WindowStep:
        """Return the step.

        Args:
            op: The builder.
            input_ids: ``[1, S]``.
            where: Positions ``[1, S]``, and a bias ``[1, 1, S, W + S]`` of the layers that see all positions, of those
                that see the last ones, or of both.
            rotary: Cosines and sines ``[W, hd / 2]``, one pair a kind of layer.
        """
        positions, *biases = where
        turns = []
        for cos, sin in rotary:
            c, s = op.Gather(cos, positions, axis=0), op.Gather(sin, positions, axis=0)  # [1, S, hd / 2]
            turns.append(
                (
                    op.Unsqueeze(op.Concat(c, c, axis=-1), [1]),
                    op.Unsqueeze(op.Concat(op.Neg(s), s, axis=-1), [1]),
                )
            )
        groups = self.config.num_heads // self.config.num_kv_heads
        tall = [op.Concat(*[bias] * groups, axis=2) if groups > 1 else bias for bias in biases]
        return WindowStep(
            _fixed(input_ids, 1),
            [turns[i] for i in self.rope_of_layer],
            [tall[-1] if layer.window else tall[0] for layer in self.config.layers],
        )


class WindowAttention(GroupQueryAttention):
    """Rotary attention over a window of the past and the new tokens beside it."""

    takes_packed = False

    def forward(
        self, op: Any, qkv: Sequence[ir.Value], cache: tuple[ir.Value, ir.Value], step: Any
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Attend.

        Args:
            op: The builder.
            qkv: Queries, keys and values ``[1, S, heads · hd]``.
            cache: Past keys ``[1, kv, hd, W]`` and values ``[1, kv, W, hd]``.
            step: A :class:`WindowStep`.

        Returns:
            Output ``[1, S, nh · hd]``, new keys ``[1, kv, hd, S]``, new values ``[1, kv, S, hd]``.
        """
        config = self.config
        heads, kv, size = config.num_heads, config.num_kv_heads, config.head_dim
        past_keys, past_values = cache
        turn = step.rotary[self.layer]
        q = op.Mul(self._rotated(op, _heads(op, qkv[0], heads, size), turn), config.attention_scale)
        keys = op.Transpose(self._rotated(op, _heads(op, qkv[1], kv, size), turn), perm=[0, 1, 3, 2])
        values = _heads(op, qkv[2], kv, size)
        q = op.Reshape(q, [1, kv, -1, size])  # the heads of a group, one after the other
        scores = op.Concat(op.MatMul(q, past_keys), op.MatMul(q, keys), axis=-1)
        shares = op.Softmax(op.Add(scores, step.bias[self.layer]), axis=-1)
        past, now = op.Split(shares, [_fixed(past_keys, 3), step.count], axis=-1, _outputs=2)
        y = op.Add(op.MatMul(past, past_values), op.MatMul(now, values))
        y = op.Transpose(op.Reshape(y, [1, heads, -1, size]), perm=[0, 2, 1, 3])
        return op.Reshape(y, [1, -1, heads * size]), keys, values

    def _rotated(self, op: Any, x: ir.Value, turn: tuple[ir.Value, ir.Value]) -> ir.Value:
        half = self.config.head_dim // 2
        first, second = op.Split(x, [half, half], axis=-1, _outputs=2)
        y: ir.Value = op.Add(op.Mul(x, turn[0]), op.Mul(op.Concat(second, first, axis=-1), turn[1]))
        return y


def _fixed(value: ir.Value, axis: int) -> int:
    """Return a dimension of an input of the graph, all of which are fixed."""
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size


def _heads(op: Any, x: ir.Value, number: int, size: int) -> ir.Value:
    """Turn ``[1, S, number · size]`` into ``[1, number, S, size]``."""
    y: ir.Value = op.Transpose(op.Reshape(x, [1, -1, number, size]), perm=[0, 2, 1, 3])
    return y


STATIC = Form(StandardNorm, WindowAttention, StandardMLP, StandardTiedHead, WindowSteps)
