"""The capability table: both spellings of a configuration are read, everything else is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flrc_exporters.architectures import FAMILIES, DecoderConfig
from flrc_exporters.rope import Rope
from flrc_runtime.errors import UnsupportedModelError

STORIES = Path(__file__).parents[1] / "data" / "stories260k"

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
GEMMA: dict[str, Any] = {
    **{k: v for k, v in LLAMA.items() if k != "hidden_act"},
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "num_hidden_layers": 6,
}


def config(**change: Any) -> DecoderConfig:
    return DecoderConfig.from_hf({**LLAMA, **change})


def gemma(**change: Any) -> DecoderConfig:
    return DecoderConfig.from_hf({**GEMMA, **change})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_and_shapes_are_those_of_transformers(family: str, bias: bool) -> None:
    base = GEMMA if family == "gemma3_text" else LLAMA
    if family == "mistral" and bias:
        pytest.skip("mistral has no attention_bias")
    raw = {**base, "model_type": family, "attention_bias": bias, "tie_word_embeddings": bias}
    if family == "qwen2":
        del raw["head_dim"]
    ours = DecoderConfig.from_hf(raw)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    expected = {f"{p.name}.weight": p.shape for p in ours.projections()} | ours.other_tensors()
    assert shapes == expected
    assert ours.parameters() == sum(p.numel() for p in model.parameters())


def test_groups() -> None:
    first = config().projections()[:7]
    assert [p.group.rpartition(".")[2] for p in first] == ["qkv"] * 3 + ["o"] + ["gate_up"] * 2 + ["down"]
    assert first[0].shape == (64, 32) and first[1].shape == (32, 32) and first[6].shape == (32, 48)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {
            "rope_theta": 5e5,
            "rope_scaling": None,
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
        },
    ],
)
def test_rope_theta_in_both_spellings(spelling: dict[str, Any]) -> None:
    assert config(**spelling).layers[0].rope == Rope(5e5)


def test_rope_spellings_that_disagree_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="disagree"):
        config(rope_theta=1e4, rope_parameters={"rope_theta": 1e5, "rope_type": "default"})


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
)
def test_scaled_frequencies_are_those_of_transformers(new: bool, scaling: dict[str, Any]) -> None:
    theta = 500.0
    spelling: dict[str, Any] = (
        {"rope_parameters": {**scaling, "rope_theta": theta}}
        if new
        else {"rope_theta": theta, "rope_scaling": scaling}
    )
    ours = config(**spelling).layers[0].rope.inverse_frequencies(16)
    raw = {**LLAMA, "rope_parameters": {**scaling, "rope_theta": theta}}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    torch.testing.assert_close(torch.tensor(ours), model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)


def test_gemma_layers_in_both_spellings() -> None:
    old = gemma(rope_theta=1e6, rope_local_base_freq=1e4, sliding_window_pattern=3, rope_scaling=None)
    new = gemma(
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    assert old == new
    assert [layer.window for layer in new.layers] == [8, 8, 0, 8, 8, 0]
    assert [layer.rope.theta for layer in new.layers] == [1e4, 1e4, 1e6] * 2
    assert new.tied_embedding and new.norms_per_block == 4 and new.attention_scale == 0.25


def test_text_only_gemma_by_its_class() -> None:
    assert gemma(model_type="gemma3", architectures=["Gemma3ForCausalLM"]).architecture == "gemma3_text"


def test_windows() -> None:
    assert {layer.window for layer in config(model_type="mistral", sliding_window=7).layers} == {7}
    assert {layer.window for layer in config(model_type="mistral", sliding_window=None).layers} == {0}
    late = config(model_type="qwen2", sliding_window=7, use_sliding_window=True, max_window_layers=1)
    assert [layer.window for layer in late.layers] == [0, 7, 7]
    off = config(model_type="qwen2", sliding_window=7, use_sliding_window=False, max_window_layers=1)
    assert {layer.window for layer in off.layers} == {0}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2.*Conv1D"),
        ({"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "multimodal"),
        ({"model_type": "mixtral"}, "mixture"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"head_dim": 12}, "head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "64"}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        ({"model_type": "qwen2", "max_window_layers": None, "use_sliding_window": True}, "max_window_layers"),
    ],
)
def test_refusals_name_the_field(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        config(**change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_activation": "gelu"}, "hidden_activation"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"sliding_window": None}, "sliding_window"),
    ],
)
def test_gemma_refusals_name_the_field(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        gemma(**change)


def test_reading_a_configuration_imports_nothing_heavy() -> None:
    code = (
        "import json, sys\n"
        "from flrc_exporters.architectures import DecoderConfig\n"
        f"c = DecoderConfig.from_hf(json.load(open({str(STORIES / 'config.json')!r})))\n"
        "assert not {'torch', 'onnx', 'onnx_ir', 'onnxscript', 'transformers'} & set(sys.modules)\n"
        "print(json.dumps(c.parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == 260_032


@pytest.mark.parametrize("family", FAMILIES)
def test_silent_fields_are_those_of_transformers(family: str) -> None:
    """A config.json that says nothing but its family, and one without any single field."""
    theirs = AutoConfig.for_model(family)
    for name, value in FAMILIES[family].defaults.items():
        # what it is before windows are switched on
        switched = AutoConfig.for_model(family, use_sliding_window=True) if "window" in name else theirs
        if name != "use_sliding_window":
            assert getattr(switched, name) == value, name
    ours = DecoderConfig.from_hf({"model_type": family})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    assert ours.parameters() == sum(p.numel() for p in model.parameters())
    assert ours.context_length == theirs.max_position_embeddings
    if family != "llama":
        types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
        assert [bool(layer.window) for layer in ours.layers] == [t == "sliding_attention" for t in types]
    base = {**(GEMMA if family == "gemma3_text" else LLAMA), "num_attention_heads": 32, "model_type": family}
    for name, value in FAMILIES[family].defaults.items():
        silent = {k: v for k, v in base.items() if k != name}
        assert DecoderConfig.from_hf(silent) == DecoderConfig.from_hf({**base, name: value}), name


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "fields",
    [
        {"use_sliding_window": True, "num_hidden_layers": 32},
        {"use_sliding_window": True, "num_hidden_layers": 3, "max_window_layers": 1, "sliding_window": 7},
        {"use_sliding_window": False, "num_hidden_layers": 3, "max_window_layers": 1, "sliding_window": 7},
        {
            "use_sliding_window": True,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "max_window_layers": 0,
        },
    ],
)
def test_layer_types_against_windows(family: str, fields: dict[str, Any]) -> None:
    theirs = AutoConfig.for_model(family, **fields)
    ours = DecoderConfig.from_hf({**LLAMA, "model_type": family, **fields})
    wanted = [theirs.sliding_window if t == "sliding_attention" else 0 for t in theirs.layer_types]
    assert [layer.window for layer in ours.layers] == wanted
