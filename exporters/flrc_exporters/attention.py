"""Rotary attention over an in-place cache, fused by GroupQueryAttention.

Another form of the graph replaces :class:`GroupQueryAttention` and :class:`FusedSteps` and leaves the rest as it is.
Shapes: B batch, S new tokens, H hidden, nh heads, kv key-value heads, hd head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from .architectures import DecoderConfig
from .layout import GroupLayout
from .lowrank import MICROSOFT, LinearGroup
from .norm import Norm
from .number_format import AccuracyLevel


@dataclass(frozen=True)
class Step:
    """What every layer needs to know about this step: lengths (int32) and rotary caches by layer."""

    seqlens_k: ir.Value  # [B], tokens in the cache after this step, minus one
    total_length: ir.Value  # scalar, the longest of them
    rotary: Sequence[tuple[ir.Value, ir.Value]]  # (cos, sin), each [context, hd / 2], one a layer
    past_length: ir.Value | None = (
        None  # [1] int64, position of the first new token; only without fused rotary
    )


class RotaryCache(nn.Module):
    """Cosines and sines of every position of the context, one pair a kind of layer."""

    def __init__(self, index: int, context: int, head_dim: int) -> None:
        super().__init__(f"rotary.{index}")
        self.cos = nn.Parameter([context, head_dim // 2])
        self.sin = nn.Parameter([context, head_dim // 2])

    def forward(self, op: Any) -> tuple[ir.Value, ir.Value]:
        """Return the two caches."""
        return self.cos, self.sin


class GroupQueryAttention(nn.Module):
    """Rotary attention over the in-place cache, fused in one node: the fused form's attention."""

    takes_packed = True  # queries, keys and values may come in one tensor
    takes_norms = False  # the norms of queries and keys are its own part

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__("")
        self.config, self.layer = config, layer

    def forward(
        self, op: Any, qkv: Sequence[ir.Value], cache: tuple[ir.Value, ir.Value], step: Any
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Attend.

        Args:
            op: The builder.
            qkv: Queries, keys and values ``[B, S, heads · hd]``, or the three packed in one.
            cache: Past keys and values ``[B, kv, past, hd]``.
            step: What the form's steps made.

        Returns:
            Output ``[B, S, nh · hd]``, present keys, present values.
        """
        rotary, lengths = step.rotary[self.layer], (step.seqlens_k, step.total_length)
        inputs: list[ir.Value | None] = [*qkv, *([None] * (3 - len(qkv))), *cache, *lengths, *rotary]
        if not fuses_rotary(self.config):
            inputs = [*(self._rotate(op, x, rotary, step) for x in qkv[:2]), qkv[2], *cache, *lengths]
        window = self.config.layers[self.layer].window
        y, key, value = op.GroupQueryAttention(
            *inputs,
            num_heads=self.config.num_heads,
            kv_num_heads=self.config.num_kv_heads,
            scale=self.config.attention_scale,
            local_window_size=window or -1,
            do_rotary=int(fuses_rotary(self.config)),
            rotary_interleaved=0,
            _outputs=3,
            _domain=MICROSOFT,
            _version=1,
        )
        return y, key, value

    def _rotate(self, op: Any, x: ir.Value, rotary: tuple[ir.Value, ir.Value], step: Step) -> ir.Value:
        result: ir.Value = op.RotaryEmbedding(x, step.past_length, *rotary, _domain=MICROSOFT, _version=1)
        return result


class Attention(nn.Module):
    """q, k, v, their norms if the family has them, attention, and the output projection."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        groups: dict[str, GroupLayout],
        stage: int,
        *,
        accuracy_level: AccuracyLevel,
        core: type[GroupQueryAttention],
        norm: type[Norm],
        group: type[LinearGroup] = LinearGroup,
    ) -> None:
        super().__init__("self_attn")
        prefix = f"model.layers.{layer}.self_attn"
        self.config = config
        self.qkv_proj = group(
            groups[f"{prefix}.qkv_proj"],
            stage,
            accuracy_level=accuracy_level,
            bias=config.qkv_bias,
            packed=core.takes_packed and not config.qk_norm and fuses_rotary(config),
        )
        self.o_proj = group(
            groups[f"{prefix}.o_proj"], stage, accuracy_level=accuracy_level, bias=config.o_bias
        )
        if config.qk_norm:
            self.q_norm = norm("q_norm", config.head_dim, eps=config.norm_eps)
            self.k_norm = norm("k_norm", config.head_dim, eps=config.norm_eps)
        self.core = core(config, layer)

    def forward(
        self, op: Any, x: ir.Value, cache: tuple[ir.Value, ir.Value], step: Any
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return the output ``[B, S, H]`` and the present keys and values."""
        qkv = self.qkv_proj(op, x)
        if self.config.qk_norm:
            q, k, v = qkv
            qkv = [self._per_head(op, self.q_norm, q), self._per_head(op, self.k_norm, k), v]
        y, key, value = self.core(op, qkv, cache, step)
        return self.o_proj(op, y)[0], key, value

    def _per_head(self, op: Any, norm: Norm, x: ir.Value) -> ir.Value:
        if self.core.takes_norms:
            own: ir.Value = norm(op, x)[0]
            return own
        number = self.config.num_heads if norm is self.q_norm else self.config.num_kv_heads
        width = number * self.config.head_dim
        heads = op.Reshape(x, [0, -1, self.config.head_dim])  # (B, S, n * hd) -> (B, S * n, hd)
        y, _ = norm(op, heads)
        joined: ir.Value = op.Reshape(y, [0, -1, width])  # (B, S * n, hd) -> (B, S, n * hd)
        return joined


def fuses_rotary(config: DecoderConfig) -> bool:
    """Return whether GroupQueryAttention can rotate by itself: onnxruntime's kernel wants heads of 16 n."""
    return config.head_dim % 16 == 0


class SequenceLengths(nn.Module):
    """Lengths from ``attention_mask: [B, total] int64``, once for all layers, as in onnxruntime-genai."""

    def __init__(self) -> None:
        super().__init__("attention_mask")

    def forward(self, op: Any, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return ``seqlens_k: [B] int32`` and the scalar total length, int32."""
        last = op.Sub(op.ReduceSum(mask, [1], keepdims=0), [1])
        total = op.Gather(op.Shape(mask), 1)
        return op.Cast(last, to=ir.DataType.INT32), op.Cast(total, to=ir.DataType.INT32)


class FusedSteps(nn.Module):
    """What :class:`GroupQueryAttention` needs to know of a step, from ``attention_mask`` alone."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__("")
        self.config = config
        ropes = config.rope_kinds()
        self.rope_of_layer = [ropes.index(layer.rope) for layer in config.layers]

    def forward(
        self,
        op: Any,
        input_ids: ir.Value,
        where: Sequence[ir.Value],
        rotary: Sequence[tuple[ir.Value, ir.Value]],
    ) -> Any:
        """Return a :class:`Step`.

        Args:
            op: The builder.
            input_ids: ``[B, S]``.
            where: The mask ``[B, total]``.
            rotary: Cosines and sines, one pair a kind of layer.
        """
        (mask,) = where
        seqlens_k, total_length = SequenceLengths()(op, mask)
        past_length = None
        if not fuses_rotary(self.config):
            past_length = op.Sub(op.Shape(mask, start=1, end=2), op.Shape(input_ids, start=1, end=2))
        return Step(seqlens_k, total_length, [rotary[i] for i in self.rope_of_layer], past_length)
