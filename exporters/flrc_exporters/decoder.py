"""The decoder, one description for every family, stage and form of graph, built as ``onnxscript.nn`` modules.

Parameters carry names and shapes only; ``stages.py`` points them into ``weights.bin``. Shapes in comments:
B batch, S new tokens, H hidden, nh heads, kv key-value heads, hd head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from .architectures import DecoderConfig
from .attention import Attention, FusedSteps, GroupQueryAttention, RotaryCache
from .layout import GroupLayout
from .lowrank import MICROSOFT, Linear, LinearGroup
from .norm import Norm
from .number_format import AccuracyLevel, Formats, NumberFormat


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
        self.config = config
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
        group: type[LinearGroup] = LinearGroup,
    ) -> None:
        super().__init__("mlp")
        prefix = f"model.layers.{layer}.mlp"
        self.activation = config.activation
        self.gate_up_proj = group(groups[f"{prefix}.gate_up_proj"], stage, accuracy_level=accuracy_level)
        self.down_proj = group(groups[f"{prefix}.down_proj"], stage, accuracy_level=accuracy_level)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """Return ``[B, S, H]``."""
        gate, up = self.gate_up_proj(op, x)
        down: list[ir.Value] = self.down_proj(op, self.gated(op, gate, up))
        return down[0]

    def gated(self, op: Any, gate: ir.Value, up: ir.Value) -> ir.Value:
        """Return ``act(gate) · up``."""
        gate = self.silu(op, gate) if self.activation == "silu" else op.Gelu(gate, approximate="tanh")
        y: ir.Value = op.Mul(gate, up)
        return y

    def silu(self, op: Any, x: ir.Value) -> ir.Value:
        """Return ``x · sigmoid(x)``."""
        y: ir.Value = op.QuickGelu(x, alpha=1.0, _domain=MICROSOFT, _version=1)
        return y


@dataclass(frozen=True)
class Form:
    """The modules in which the forms of a graph differ.

    onnxruntime's operators are the defaults; our own are in own_form.py, fixed shapes in static_form.py.
    """

    norm: type[Norm] = Norm
    attention: type[GroupQueryAttention] = GroupQueryAttention
    mlp: type[GatedMLP] = GatedMLP
    tied_head: type[TiedHead] = TiedHead
    steps: type[FusedSteps] = FusedSteps
    group: type[LinearGroup] = LinearGroup
    embedding: type[Embedding] = Embedding


FUSED = Form()


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
        form: Form,
    ) -> None:
        super().__init__(f"layers.{layer}")
        h, eps, norm = config.hidden_size, config.norm_eps, form.norm
        four = config.norms_per_block == 4
        self.input_layernorm = norm("input_layernorm", h, eps=eps)
        self.self_attn = Attention(
            config,
            layer,
            groups,
            stage,
            accuracy_level=accuracy_level,
            core=form.attention,
            norm=norm,
            group=form.group,
        )
        self.attn_post = norm("post_attention_layernorm", h, eps=eps) if four else None
        self.mlp_pre = norm("pre_feedforward_layernorm" if four else "post_attention_layernorm", h, eps=eps)
        self.mlp = form.mlp(config, layer, groups, stage, accuracy_level=accuracy_level, group=form.group)
        self.mlp_post = norm("post_feedforward_layernorm", h, eps=eps) if four else None

    def forward(
        self,
        op: Any,
        x: ir.Value,
        residual: ir.Value | None,
        cache: tuple[ir.Value, ir.Value],
        step: Any,
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
        form: Of the graph.
    """

    def __init__(
        self,
        config: DecoderConfig,
        groups: dict[str, GroupLayout],
        *,
        stage: int,
        formats: Formats,
        context: int,
        form: Form = FUSED,
    ) -> None:
        super().__init__("model")
        ropes = config.rope_kinds()
        self.config = config
        self.embed_tokens = form.embedding(config, number_format=formats.embedding)
        self.rotary = [RotaryCache(i, context, config.head_dim) for i in range(len(ropes))]
        self.blocks = [
            Layer(config, i, groups, stage, accuracy_level=formats.accuracy_level, form=form)
            for i in range(config.num_layers)
        ]
        self.norm = form.norm("norm", config.hidden_size, eps=config.norm_eps)
        self.steps = form.steps(config)

    def forward(
        self,
        op: Any,
        input_ids: ir.Value,
        where: Sequence[ir.Value],
        caches: Sequence[tuple[ir.Value, ir.Value]],
    ) -> tuple[ir.Value, list[tuple[ir.Value, ir.Value]]]:
        """Run all layers.

        Args:
            op: The builder.
            input_ids: ``[B, S]``.
            where: Inputs that say where these tokens are in the sequence, as ``form.steps`` takes them.
            caches: Keys and values of every layer.

        Returns:
            Normalized hidden states ``[B, S, H]``, and every layer's keys and values to keep.
        """
        rotary = [cache(op) for cache in self.rotary]
        step = self.steps(op, input_ids, where, rotary)
        x, residual = self.embed_tokens(op, input_ids), None
        present = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, residual, key, value = block(op, x, residual, cache, step)
            present.append((key, value))
        x, _ = self.norm(op, x, residual)
        return x, present


def make_head(config: DecoderConfig, number_format: NumberFormat, form: Form = FUSED) -> nn.Module:
    """Return the module that turns hidden states into logits."""
    if config.tied_embedding and not number_format.quantized:
        return form.tied_head(config)
    return Linear("lm_head", (config.vocab_size, config.hidden_size), number_format=number_format)
