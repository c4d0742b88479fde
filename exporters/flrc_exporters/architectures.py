"""The capability table: what each family of decoders does differently, read from ``config.json`` alone.

Everything the decoder cannot compute is refused here by name, before a weight is downloaded or opened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from flrc_runtime.errors import FormatError, UnsupportedModelError
from flrc_runtime.manifest import RankPlan

from .number_format import NumberFormat
from .rope import Rope, is_number, read_rope, refuse

DEFAULT_CONTEXT = 4096  # positions an export has at most, if not asked for more
Architecture = Literal["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]


@dataclass(frozen=True)
class Family:
    """What distinguishes one family; the rest comes from the configuration."""

    name: Architecture
    causal_class: str  # the Hugging Face class of config.json's "architectures"
    activation: Literal["silu", "gelu_tanh"] = "silu"
    activation_key: str = "hidden_act"
    defaults: Mapping[str, Any] = field(
        default_factory=dict
    )  # transformers' own, where config.json is silent
    activations: tuple[str, ...] = ("silu", "swish")
    qkv_bias: bool | None = False  # None: decided by attention_bias, which then also gives o_proj one
    qk_norm: bool = False
    norms_per_block: Literal[2, 4] = 2
    norm_offset: float = 0.0  # gemma multiplies by 1 + w
    scaled_embedding: bool = False  # gemma multiplies embeddings by sqrt(hidden_size)
    windows: Literal["none", "every", "late", "pattern"] = "none"


_DEFAULTS = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_QWEN_DEFAULTS = {
    **_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            qkv_bias=None,
            defaults={
                **_DEFAULTS,
                "vocab_size": 32000,
                "intermediate_size": 11008,
                "max_position_embeddings": 2048,
            },
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            windows="every",
            defaults={
                **_DEFAULTS,
                "vocab_size": 32000,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "sliding_window": 4096,
            },
        ),
        Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True, windows="late", defaults=_QWEN_DEFAULTS),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            qkv_bias=None,
            qk_norm=True,
            windows="late",
            defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            activation="gelu_tanh",
            activation_key="hidden_activation",
            activations=("gelu_pytorch_tanh",),
            qkv_bias=None,
            qk_norm=True,
            norms_per_block=4,
            norm_offset=1.0,
            scaled_embedding=True,
            windows="pattern",
            defaults={
                "vocab_size": 262208,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-6,
                "query_pre_attn_scalar": 256,
                "sliding_window": 4096,
                "tie_word_embeddings": True,
            },
        ),
    )
}

# Why a family outside the table is refused; the key is a model_type.
_REASONS = {
    "gpt2": "its projections are Conv1D, not Linear",
    "gpt_neo": "its projections differ from the gated decoder",
    "gemma": "gemma 1 is not in the table",
    "gemma2": "it soft-caps attention scores and logits",
    "gemma3": "it is the multimodal gemma 3; only text-only gemma3_text is handled",
    "phi3": "its q, k, v and gate, up are fused projections",
    "mixtral": "it is a mixture of experts",
    "qwen2_moe": "it is a mixture of experts",
    "qwen3_moe": "it is a mixture of experts",
}
# Fields that must be absent, null, false or 0; each changes the computation.
_REFUSED_FIELDS = {
    "quantization_config": "quantized checkpoints are refused, give the float model",
    "num_local_experts": "mixtures of experts are not handled",
    "num_experts": "mixtures of experts are not handled",
    "n_routed_experts": "mixtures of experts are not handled",
    "mlp_bias": "biases in the MLP are not handled",
    "attn_logit_softcapping": "soft-capped attention scores are not handled",
    "final_logit_softcapping": "soft-capped logits are not handled",
    "use_bidirectional_attention": "only causal attention is handled",
    "is_encoder_decoder": "only decoder-only models are handled",
    "auto_map": "models with their own code are never run",
}


@dataclass(frozen=True)
class Projection:
    """One ``nn.Linear`` of a decoder layer: its Hugging Face name, shape ``(out, in)`` and input group."""

    name: str
    shape: tuple[int, int]
    group: str


class ModelShapes(Protocol):
    """What has to be known of a model to compress it, whatever its layers compute.

    A :class:`DecoderConfig` is one, which the exporter also knows how to compute.
    """

    @property
    def architecture(self) -> str:
        """The ``model_type`` of its configuration."""

    @property
    def vocab_size(self) -> int:
        """Size of the logits."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""

    @property
    def num_heads(self) -> int:
        """Heads of queries."""

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""

    @property
    def head_dim(self) -> int:
        """Size of a head."""

    @property
    def context_length(self) -> int:
        """Positions, in tokens."""

    @property
    def tied_embedding(self) -> bool:
        """Whether the head reads the embedding."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""

    def projections(self) -> tuple[Projection, ...]:
        """Return every projection in the order of the model."""

    def other_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor that is not a projection's weight, a tied head left out."""

    def parameters(self) -> int:
        """Return the parameters of the whole model, a tied embedding counted once."""


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer: ``window`` in tokens (0: full) and the rotary embedding."""

    window: int
    rope: Rope


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder, independent of who trained it. Sizes count elements, lengths count tokens."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # need not be hidden_size / num_heads
    context_length: int
    norm_eps: float
    tied_embedding: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    norm_offset: float  # weights are multiplied as (norm_offset + w)
    norms_per_block: Literal[2, 4]  # 4: also after attention and after the MLP, before the residual is added
    activation: Literal["silu", "gelu_tanh"]
    embedding_scale: float
    attention_scale: float  # multiplies q·k before the softmax
    layers: tuple[Layer, ...]
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def rope_kinds(self) -> list[Rope]:
        """Return the distinct rotary embeddings, in order of their first layer."""
        return list(dict.fromkeys(layer.rope for layer in self.layers))

    def export_context(self) -> int:
        """Return the positions an export has by default: the model's own, at most 4096."""
        return min(self.context_length, DEFAULT_CONTEXT)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read the ``config.json`` of a Hugging Face model, written by transformers 4 or 5.

        Raises:
            UnsupportedModelError: The family, a field or a value is not handled; the message names it.
        """
        family = _family(config)
        config = {**family.defaults, **config}
        _refuse_fields(config, family)
        hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
        kv_heads = _count(config, "num_key_value_heads", default=heads)
        head_dim = _count(config, "head_dim", default=hidden // heads)
        if heads % kv_heads:
            refuse(
                f"num_attention_heads ({heads}) must be divisible by num_key_value_heads ({kv_heads})",
            )
        if head_dim % 8:
            refuse(f"head_dim ({head_dim}) must be a multiple of 8")
        bias = bool(config.get("attention_bias")) if family.qkv_bias is None else family.qkv_bias
        scalar = config["query_pre_attn_scalar"] if family.scaled_embedding else head_dim
        if not is_number(scalar) or scalar <= 0:
            refuse(f"query_pre_attn_scalar ({scalar}) must be positive")
        context = _count(config, "max_position_embeddings")
        eps = config["rms_norm_eps"]
        if not is_number(eps) or not 0 < eps < 1:
            refuse(f"rms_norm_eps ({eps}) must lie between 0 and 1")
        return cls(
            architecture=family.name,
            vocab_size=_count(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_count(config, "intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            context_length=context,
            norm_eps=float(eps),
            tied_embedding=bool(config["tie_word_embeddings"]),
            qkv_bias=bias,
            o_bias=bias and family.qkv_bias is None,
            qk_norm=family.qk_norm,
            norm_offset=family.norm_offset,
            norms_per_block=family.norms_per_block,
            activation=family.activation,
            embedding_scale=math.sqrt(hidden) if family.scaled_embedding else 1.0,
            attention_scale=float(scalar) ** -0.5,
            layers=_layers(config, family, _count(config, "num_hidden_layers"), context),
            eos_token_ids=_tokens(config.get("eos_token_id")),
            bos_token_id=next(iter(_tokens(config.get("bos_token_id"))), None),
            pad_token_id=next(iter(_tokens(config.get("pad_token_id"))), None),
        )

    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the shapes of the first layer's projections by name; those of all layers are alike."""
        projections = self.projections()
        return {p.name: p.shape for p in projections[: len(projections) // self.num_layers]}

    def projections(self) -> tuple[Projection, ...]:
        """Return every projection in the order of the model: q, k, v, o, gate, up, down of each layer."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        h, f = self.hidden_size, self.intermediate_size
        parts = (
            ("self_attn.q_proj", (q, h), "self_attn.qkv"),
            ("self_attn.k_proj", (kv, h), "self_attn.qkv"),
            ("self_attn.v_proj", (kv, h), "self_attn.qkv"),
            ("self_attn.o_proj", (h, q), "self_attn.o"),
            ("mlp.gate_proj", (f, h), "mlp.gate_up"),
            ("mlp.up_proj", (f, h), "mlp.gate_up"),
            ("mlp.down_proj", (h, f), "mlp.down"),
        )
        return tuple(
            Projection(f"model.layers.{i}.{name}", shape, f"model.layers.{i}.{group}")
            for i in range(self.num_layers)
            for name, shape, group in parts
        )

    def other_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor that is not a projection's weight, a tied head left out."""
        h = self.hidden_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        norms = ["input_layernorm", "post_attention_layernorm"]
        if self.norms_per_block == 4:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, h)}
        for i in range(self.num_layers):
            layer = f"model.layers.{i}"
            shapes |= {f"{layer}.{norm}.weight": (h,) for norm in norms}
            if self.qk_norm:
                shapes |= {f"{layer}.self_attn.{part}_norm.weight": (self.head_dim,) for part in "qk"}
            if self.qkv_bias:
                shapes[f"{layer}.self_attn.q_proj.bias"] = (q,)
                shapes |= {f"{layer}.self_attn.{part}_proj.bias": (kv,) for part in "kv"}
            if self.o_bias:
                shapes[f"{layer}.self_attn.o_proj.bias"] = (h,)
        shapes["model.norm.weight"] = (h,)
        if not self.tied_embedding:
            shapes["lm_head.weight"] = (self.vocab_size, h)
        return shapes

    def parameters(self) -> int:
        """Return the parameters of the whole model, a tied embedding counted once."""
        projections = sum(p.shape[0] * p.shape[1] for p in self.projections())
        return projections + sum(math.prod(shape) for shape in self.other_tensors().values())


def checkpoint_tensors(config: ModelShapes, plan: RankPlan, *, where: str) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a checkpoint of this plan holds; errors begin with ``where``.

    Raises:
        FormatError: The plan names other projections or shapes than the configuration.
    """
    plans = plan.by_name()
    expected = {p.name: p.shape for p in config.projections()}
    if {name: p.shape for name, p in plans.items()} != expected:
        odd = sorted(set(plans) ^ set(expected)) or [n for n in plans if plans[n].shape != expected[n]]
        raise FormatError(f"{where}: the plan in flrc.json does not fit config.json at {odd[0]}")
    shapes = config.other_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in shapes:
            vocab, hidden = shapes.pop(name)
            shapes |= _stored(name, (vocab, hidden), plan.embedding)
    for name, p in plans.items():
        for matrix, shape in p.matrices().items():
            shapes |= _stored(f"{name}.{matrix}", shape, p.format_of(matrix))
        if p.storage == "pivoted":
            shapes |= {f"{name}.chunks.{i}.order": p.shape[:1] for i in range(len(p.chunks()))}
    return shapes


def _stored(name: str, shape: tuple[int, int], number_format: str) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the tensors a matrix is stored as: itself, or its integers and scales."""
    if number_format in ("", "fp32"):
        return {name: shape}
    packed = NumberFormat.named(number_format).packed_shape(*shape)
    return {f"{name}.q": packed, f"{name}.scales": packed[:2]}


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` with transformers' own value of every field that it is silent on (null is no silence).

    A configuration of another family is returned as it is.
    """
    family = FAMILIES.get(str(model_kind(config)))
    return {**(family.defaults if family else {}), **config}


def model_kind(config: Mapping[str, Any]) -> Any:
    """Return the family that a ``config.json`` is of: its model_type, but text-only Gemma 3 has two names."""
    kind = config.get("model_type")
    text_only = "vision_config" not in config and "text_config" not in config
    return "gemma3_text" if kind == "gemma3" and text_only else kind


def _family(config: Mapping[str, Any]) -> Family:
    kind = model_kind(config)
    supported = f"supported: {', '.join(FAMILIES)}"
    if not isinstance(kind, str) or kind not in FAMILIES:
        reason = _REASONS.get(str(kind))
        why = f" ({reason})" if reason else ""
        raise UnsupportedModelError(
            f"config.json: model_type {kind!r} is not supported{why}",
            hint=f"{supported}; others may go the way of --graph optimum (docs/optimum.md)",
        )
    family = FAMILIES[kind]
    classes = config.get("architectures")
    if classes and classes != [family.causal_class]:
        raise UnsupportedModelError(
            f"config.json: architectures {classes} is not the causal language model of {kind}",
            hint=f"needed: {family.causal_class}",
        )
    return family


def _refuse_fields(config: Mapping[str, Any], family: Family) -> None:
    for name, reason in _REFUSED_FIELDS.items():
        if config.get(name):
            refuse(f"{name} is set: {reason}")
    if config.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        refuse("partial_rotary_factor is set: only rotary embeddings of the whole head are handled")
    key = family.activation_key
    activation = config.get(key) or family.activations[0]
    if activation not in family.activations:
        refuse(f"{key} {activation!r} is not handled", hint=f"supported: {', '.join(family.activations)}")


def _count(config: Mapping[str, Any], name: str, *, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModelError(f"config.json: {name} must be a positive integer, found {value!r}")
    return value


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        refuse(f"{name} must be a whole number, found {value!r}")
    return value


def _tokens(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)


def _layers(config: Mapping[str, Any], family: Family, number: int, context: int) -> tuple[Layer, ...]:
    windows = _windows(config, family, number)
    if family.windows != "pattern":
        rope = read_rope(config, None, context, default=10_000.0)
        return tuple(Layer(window, rope) for window in windows)
    full = read_rope(config, "full_attention", context, default=1_000_000.0)
    local = read_rope(config, "sliding_attention", context, default=10_000.0)
    return tuple(Layer(window, local if window else full) for window in windows)


def _windows(config: Mapping[str, Any], family: Family, number: int) -> list[int]:
    """Return the attention window of every layer, 0 for full attention."""
    types = config.get("layer_types")
    if family.windows == "none":
        if types is not None and set(types) != {"full_attention"}:
            refuse(f"layer_types names {sorted(set(types))}, a {family.name} computes full_attention alone")
        return [0] * number
    window = config.get("sliding_window")
    if family.windows == "late" and not config.get("use_sliding_window", False):
        window = None
    if family.windows == "every":
        if types is not None and len(set(types)) > 1:
            refuse("layer_types alternates, which this family does not compute")
        types = ["sliding_attention" if window is not None else "full_attention"] * number
    elif types is None and family.windows == "late":
        first = _number(config, "max_window_layers") if window is not None else number
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(number)]
    elif types is None:
        pattern = config.get("sliding_window_pattern") or 6
        types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(number)]
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown or len(types) != number:
        refuse(f"layer_types must name full_attention or sliding_attention for each of {number} layers")
    sliding = "sliding_attention" in types
    return [
        _count({"sliding_window": window}, "sliding_window") if sliding and t[0] == "s" else 0 for t in types
    ]
