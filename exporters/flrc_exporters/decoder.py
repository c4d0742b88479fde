"""The decoder, one description for every family and stage, built as ``onnxscript.nn`` modules (fused form).

Parameters carry names and shapes only; ``stages.py`` points them into ``weights.bin``. Shapes in comments:
B batch, S new tokens, H hidden, nh heads, kv key-value heads, hd head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from .architectures import DecoderConfig
from .attention import (
    Attention,
    GroupQueryAttention,
    PastLength,
    RotaryCache,
    SequenceLengths,
    Step,
    fuses_rotary,
)
from .layout import GroupLayout
from .lowrank import MICROSOFT, Linear, LinearGroup
from .norm import Norm
from .number_format import AccuracyLevel, Formats, NumberFormat

LAST = 2**63 - 1  # the end of any axis, for Slice


class Embedding(nn.Module):
    """Rows of the embedding matrix; a quantized one is stored exactly as the head reads it."""

    def __init__(self, config: DecoderConfig, *, number_format: NumberFormat) -> None:
        super().__init__("embed_tokens")
        self.config, self.format = config, number_format
        vocab, hidden = config.vocab_size, config.hidden_size
        if number_format.quantized:
            _, blocks, size = number_format.packed_shape(vocab, hidden)
            self.qrows = nn.Parameter([vocab, blocks * size], ir.DataType.UINT8)
            self.scales = nn.Parameter([vocab, blocks])
            self.padded = blocks * number_format.block_size
        else:
            self.weight = nn.Parameter([vocab, hidden])

    def forward(self, op: Any, input_ids: ir.Value) -> ir.Value:
        """Look up ``input_ids: [B, S]``."""
        if self.format.quantized:
            x: ir.Value = op.GatherBlockQuantized(
                self.qrows,
                input_ids,
                self.scales,
                bits=self.format.bits,
                block_size=self.format.block_size,
                gather_axis=0,
                quantize_axis=1,
                _domain=MICROSOFT,
                _version=1,
            )
            if self.padded != self.config.hidden_size:
                x = op.Slice(x, [0], [self.config.hidden_size], [-1])
        else:
            x = op.Gather(self.weight, input_ids)
        if self.config.embedding_scale != 1.0:
            x = op.Mul(x, self.config.embedding_scale)
        return x  # (B, S, H)


class TiedHead(nn.Module):
    """The fp32 head on the embedding's own bytes ``[vocab, H]``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__("lm_head")
        self.weight = nn.Parameter([config.vocab_size, config.hidden_size])

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Return logits ``[B, S, vocab]``."""
        logits: ir.Value = op.FusedMatMul(x, self.weight, transB=1, _domain=MICROSOFT, _version=1)
        return logits


class GatedMLP(nn.Module):
    """``down(act(gate x) · up x)``."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        groups: dict[str, GroupLayout],
        stage: int,
        *,
        accuracy_level: AccuracyLevel,
    ) -> None:
        super().__init__("mlp")
        prefix = f"model.layers.{layer}.mlp"
        self.activation = config.activation
        self.gate_up_proj = LinearGroup(
            groups[f"{prefix}.gate_up_proj"], stage, accuracy_level=accuracy_level
        )
        self.down_proj = LinearGroup(groups[f"{prefix}.down_proj"], stage, accuracy_level=accuracy_level)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Return ``[B, S, H]``."""
        gate, up = self.gate_up_proj(op, x)
        if self.activation == "silu":
            gate = op.QuickGelu(gate, alpha=1.0, _domain=MICROSOFT, _version=1)  # x · sigmoid(x)
        else:
            gate = op.Gelu(gate, approximate="tanh")
        down: list[ir.Value] = self.down_proj(op, op.Mul(gate, up))
        return down[0]


class Layer(nn.Module):
    """One decoder layer; the addition of its last residual is left to the next norm."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        groups: dict[str, GroupLayout],
        stage: int,
        *,
        accuracy_level: AccuracyLevel,
        core: type[GroupQueryAttention],
    ) -> None:
        super().__init__(f"layers.{layer}")
        h, eps = config.hidden_size, config.norm_eps
        four = config.norms_per_block == 4
        self.input_layernorm = Norm("input_layernorm", h, eps=eps)
        self.self_attn = Attention(config, layer, groups, stage, accuracy_level=accuracy_level, core=core)
        self.attn_post = Norm("post_attention_layernorm", h, eps=eps) if four else None
        self.mlp_pre = Norm("pre_feedforward_layernorm" if four else "post_attention_layernorm", h, eps=eps)
        self.mlp = GatedMLP(config, layer, groups, stage, accuracy_level=accuracy_level)
        self.mlp_post = Norm("post_feedforward_layernorm", h, eps=eps) if four else None

    def forward(
        self,
        op: Any,
        x: ir.Value,
        residual: ir.Value | None,
        cache: tuple[ir.Value, ir.Value],
        step: Step,
    ) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """Return what is to be added, what it is to be added to, and the present keys and values."""
        x, residual = self.input_layernorm(op, x, residual)
        x, key, value = self.self_attn(op, x, cache, step)
        if self.attn_post is not None:
            x, _ = self.attn_post(op, x)
        x, residual = self.mlp_pre(op, x, residual)
        x = self.mlp(op, x)
        if self.mlp_post is not None:
            x, _ = self.mlp_post(op, x)
        return x, residual, key, value


class Decoder(nn.Module):
    """The whole model at one stage.

    Args:
        config: The architecture.
        groups: Layout of every input group (:func:`layout.group_layouts`).
        stage: The stage.
        formats: Number formats.
        context: Positions the rotary caches hold.
        core: The attention of the wanted graph form.
    """

    def __init__(
        self,
        config: DecoderConfig,
        groups: dict[str, GroupLayout],
        *,
        stage: int,
        formats: Formats,
        context: int,
        core: type[GroupQueryAttention] = GroupQueryAttention,
    ) -> None:
        super().__init__("model")
        ropes = config.rope_kinds()
        self.config = config
        self.embed_tokens = Embedding(config, number_format=formats.embedding)
        self.rotary = [RotaryCache(i, context, config.head_dim) for i in range(len(ropes))]
        self.rope_of_layer = [ropes.index(layer.rope) for layer in config.layers]
        self.blocks = [
            Layer(config, i, groups, stage, accuracy_level=formats.accuracy_level, core=core)
            for i in range(config.num_layers)
        ]
        self.norm = Norm("norm", config.hidden_size, eps=config.norm_eps)

    def forward(
        self,
        op: Any,
        input_ids: ir.Value,
        attention_mask: ir.Value,
        logits_start: ir.Value,
        caches: Sequence[tuple[ir.Value, ir.Value]],
    ) -> tuple[ir.Value, list[tuple[ir.Value, ir.Value]]]:
        """Return the normalized hidden states that become logits, and every layer's present keys and values."""
        rotary = [cache(op) for cache in self.rotary]
        seqlens_k, total_length = SequenceLengths()(op, attention_mask)
        past_length = None if fuses_rotary(self.config) else PastLength()(op, input_ids, attention_mask)
        step = Step(seqlens_k, total_length, [rotary[i] for i in self.rope_of_layer], past_length)
        x, residual = self.embed_tokens(op, input_ids), None
        present = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, residual, key, value = block(op, x, residual, cache, step)
            present.append((key, value))
        x, _ = self.norm(op, x, residual)
        # (B, S', H): of a prompt, only the last position needs the head
        return op.Slice(x, logits_start, [LAST], [1]), present


def make_head(config: DecoderConfig, number_format: NumberFormat) -> nn.Module:
    """Return the module that turns hidden states into logits."""
    if config.tied_embedding and not number_format.quantized:
        return TiedHead(config)
    return Linear("lm_head", (config.vocab_size, config.hidden_size), number_format=number_format)
