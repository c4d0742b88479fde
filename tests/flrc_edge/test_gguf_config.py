"""Metadata of a GGUF's model: the logits it asks for, or the key's name in a refusal; tokens that end an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flrc_edge.errors import FormatError, UnsupportedModelError
from flrc_edge.gguf_file import read_gguf
from flrc_edge.models import open_model, resolve_model
from flrc_exporters.rope import Rope

IDS = torch.randint(3, 500, (1, 64), generator=torch.Generator().manual_seed(0))


def logits(folder: Path, **settings: Any) -> torch.Tensor:
    """Return what transformers computes for a folder whose config has other fields."""
    import transformers

    config = {**json.loads((folder / "config.json").read_text()), **settings}
    kind = config.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **config)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config)
    with torch.no_grad():
        return model(IDS).logits


def read_logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return open_model(str(path)).model(IDS).logits


def linear(factor: float) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": factor, "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({"rope.scaling.factor": ("float32", 2.5)}, 2.5),
        ({"rope.scale_linear": ("float32", 8.0)}, 8.0),
        ({"rope.scaling.type": ("string", "linear"), "rope.scaling.factor": ("float32", 3.0)}, 3.0),
        # the new key is there, though it says nothing
        ({"rope.scaling.factor": ("float32", 0.0), "rope.scale_linear": ("float32", 8.0)}, None),
        ({"rope.scaling.type": ("string", "none"), "rope.scaling.factor": ("float32", 4.0)}, None),
        ({"rope.scaling.type": ("string", "linear")}, None),
        ({"rope.scaling.factor": ("float32", 1.0)}, None),
    ],
)
def test_linear_rope(
    fields: dict[str, Any],
    factor: float | None,
    family_model: Callable[[str], Path],
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    cache: Path,
) -> None:
    folder = family_model("llama")
    path = write_gguf(folder, tmp_path / "m.gguf", fields={f"llama.{k}": v for k, v in fields.items()})
    expected = logits(folder) if factor is None else logits(folder, rope_parameters=linear(factor))
    assert torch.allclose(read_logits(path), expected, atol=1e-5)
    if factor is not None:
        assert (expected - logits(folder)).abs().max() > 0.1


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_of_llama3(
    factor: float,
    copied_model: Callable[..., Path],
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    cache: Path,
) -> None:
    folder = copied_model("llama", max_position_embeddings=131072)
    plain = Rope(5e5).inverse_frequencies(16)
    scaled = Rope(5e5, "llama3", factor, 1.0, 4.0, 8192).inverse_frequencies(16)
    divisors = (np.array(plain) / np.array(scaled)).astype(np.float32)
    path = write_gguf(folder, tmp_path / "m.gguf", tensors={"rope_freqs.weight": divisors})
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert resolve_model(str(path)).hf_config["rope_parameters"] == rope
    expected = logits(folder, rope_parameters=rope, rope_theta=None)
    assert torch.allclose(read_logits(path), expected, atol=1e-5)


def test_other_factors_are_refused(
    family_model: Callable[[str], Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    ones = np.ones(8, np.float32)
    for divisors, options in (
        (np.linspace(1, 8, 8, dtype=np.float32), {}),
        (ones[:4], {}),
        (ones, {"architecture": "qwen2"}),
    ):
        folder = family_model("qwen2" if options else "llama")
        path = write_gguf(folder, tmp_path / "m.gguf", tensors={"rope_freqs.weight": divisors}, **options)
        with pytest.raises(UnsupportedModelError, match=r"\(rope_freqs.weight\) are not those of Llama 3"):
            read_gguf(path)
    model = read_gguf(write_gguf(family_model("llama"), path, tensors={"rope_freqs.weight": ones}))
    assert model.config["rope_scaling"] is None


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("rope.scaling.type", "string", "yarn"),
        ("rope.scaling.type", "string", "longrope"),
        ("rope.scaling.attn_factor", "float32", 1.2),
        ("rope.scaling.yarn_log_multiplier", "float32", 0.1),
        ("rope.dimension_count", "uint32", 8),
        ("rope.dimension_sections", "array", [4, 4, 4, 4]),
        ("attention.value_length", "uint32", 32),
        ("attention.sliding_window", "uint32", 16),
        ("attention.scale", "float32", 0.5),
        ("attention.clamp_kqv", "float32", 8.0),
        ("attention.causal", "bool", False),
        ("attention.max_alibi_bias", "float32", 8.0),
        ("attn_logit_softcapping", "float32", 50.0),
        ("final_logit_softcapping", "float32", 30.0),
        ("logit_scale", "float32", 0.25),
        ("residual_scale", "float32", 0.25),
        ("embedding_scale", "float32", 12.0),
        ("expert_count", "uint32", 8),
        ("nextn_predict_layers", "uint32", 1),
        ("pooling_type", "uint32", 3),
        ("use_parallel_residual", "bool", True),
        ("some_new_key", "string", "yes"),
    ],
)
def test_keys_that_change_what_is_computed(
    key: str,
    kind: str,
    value: Any,
    family_model: Callable[[str], Path],
    write_gguf: Callable[..., Path],
    tmp_path: Path,
) -> None:
    for family in ("llama", "qwen2"):
        path = write_gguf(
            family_model(family),
            tmp_path / "m.gguf",
            architecture=family,
            fields={f"{family}.{key}": (kind, value)},
        )
        with pytest.raises(UnsupportedModelError, match=rf"m.gguf: {family}.{key} is "):
            resolve_model(str(path))


def test_keys_that_change_nothing(
    family_model: Callable[[str], Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    fields = {
        "vocab_size": ("uint32", 512),
        "tensor_data_layout": ("string", "Meta AI original pth"),
        "rope.dimension_count": ("uint32", 16),
        "rope.scaling.attn_factor": ("float32", 1.0),
        "rope.scaling.finetuned": ("bool", True),
        "rope.scaling.original_context_length": ("uint32", 64),
        "attention.sliding_window": ("uint32", 4096),
        "attention.scale": ("float32", 0.25),
        "attention.causal": ("bool", True),
        "expert_count": ("uint32", 0),
        "expert_used_count": ("uint32", 0),
        "logit_scale": ("float32", 1.0),
        "pooling_type": ("uint32", 0),
    }
    folder = family_model("llama")
    plain = read_gguf(write_gguf(folder, tmp_path / "m.gguf"))
    path = write_gguf(folder, tmp_path / "n.gguf", fields={f"llama.{k}": v for k, v in fields.items()})
    assert read_gguf(path).config == plain.config


def test_numbers_by_layer(
    family_model: Callable[[str], Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    fields = {"llama.attention.head_count_kv": ("array", [4, 2, 4])}
    path = write_gguf(family_model("llama"), tmp_path / "m.gguf", fields=fields)
    with pytest.raises(UnsupportedModelError, match=r"llama.attention.head_count_kv is not one number"):
        resolve_model(str(path))


PATTERN = ["sliding_attention", "full_attention"] * 2


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"attention.sliding_window_pattern": ("uint32", 2)}, {}),
        ({"attention.sliding_window_pattern": ("array", [True, False, True, False])}, {}),
        ({}, {"layer_types": ["sliding_attention"] * 4}),  # every sixth of four layers
        ({"attention.sliding_window": ("uint32", 0)}, {"layer_types": ["full_attention"] * 4}),
        (
            {"attention.sliding_window_pattern": ("uint32", 2), "rope.scaling.factor": ("float32", 8.0)},
            {"full": {"rope_type": "linear", "factor": 8.0}},
        ),
        (
            {"attention.sliding_window_pattern": ("uint32", 2), "rope.freq_base_swa": ("float32", 5e4)},
            {"local": {"rope_theta": 5e4}},
        ),
    ],
)
def test_gemma3(
    fields: dict[str, Any],
    settings: dict[str, Any],
    family_model: Callable[[str], Path],
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    cache: Path,
) -> None:
    """The larger Gemma 3 scale the rotary embedding of their full layers linearly, by 8."""
    folder = family_model("gemma3_text")
    fields = {"attention.sliding_window": ("uint32", 12), **fields}
    path = write_gguf(
        folder,
        tmp_path / "m.gguf",
        architecture="gemma3",
        fields={f"gemma3.{k}": v for k, v in fields.items()},
    )
    full = {"rope_type": "default", "rope_theta": 5e5, **settings.pop("full", {})}
    local = {"rope_type": "default", "rope_theta": 1e4, **settings.pop("local", {})}
    rope = {"full_attention": full, "sliding_attention": local}
    expected = logits(folder, **{"layer_types": PATTERN, "rope_parameters": rope, **settings})
    assert torch.allclose(read_logits(path), expected, atol=2e-5)


def test_gemma3_without_a_base(
    family_model: Callable[[str], Path], write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    """llama.cpp takes 10,000 when it is missing, Hugging Face 1,000,000."""
    path = write_gguf(family_model("gemma3_text"), tmp_path / "m.gguf", architecture="gemma3")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"gemma3.rope.freq_base", b"gemma9.rope.freq_base"))
    with pytest.raises(FormatError, match=r"the header holds no gemma3.rope.freq_base"):
        resolve_model(str(path))


@pytest.mark.parametrize(
    ("fields", "tokens", "ends"),
    [
        ({}, {}, 2),
        ({"eot_token_id": ("uint32", 512)}, {"<stop>": 3}, [2, 512]),
        ({"eom_token_id": ("uint32", 512)}, {"<stop>": 3}, [2, 512]),
        ({"eos_token_ids": ("array", [512, 513])}, {"<a>": 3, "<b>": 3}, [2, 512, 513]),
        ({"eos_token_id": ("uint32", 513), "eot_token_id": ("uint32", 513)}, {"<a>": 3, "<b>": 3}, [513, 2]),
        ({}, {"<|im_end|>": 3}, [2, 512]),
        ({}, {"<|user|>": 3, "<|end|>": 3, "<|eot_id|>": 4, "<end_of_turn>": 1}, [2, 513, 514, 515]),
        ({"eos_token_id": ("uint32", 512)}, {"<|endoftext|>": 3, "<|file_sep|>": 3}, [512, 513, 2]),
        ({"eos_token_id": ("uint32", 2**32 - 1)}, {}, 2),  # out of range: llama.cpp's default
    ],
)
def test_tokens_that_end_an_answer(
    fields: dict[str, Any],
    tokens: dict[str, int],
    ends: Any,
    stories: Path,
    write_gguf: Callable[..., Path],
    tmp_path: Path,
    cache: Path,
) -> None:
    rows = {"token_embd.weight": np.zeros((512 + len(tokens), 64), np.float32)}
    path = write_gguf(
        stories,
        tmp_path / "m.gguf",
        tokens=tokens,
        tensors=rows,
        fields={f"tokenizer.ggml.{k}": v for k, v in fields.items()},
    )
    read = open_model(str(path))
    first = ends if isinstance(ends, int) else ends[0]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((read.path / name).read_text())["eos_token_id"] == ends
    assert read.config.eos_token_ids == ((ends,) if isinstance(ends, int) else tuple(ends))
    assert read.tokenizer.eos_token_id == first
    for i in read.config.eos_token_ids:
        assert read.tokenizer.decode([i], skip_special_tokens=True) == ""
