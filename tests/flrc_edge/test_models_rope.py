"""A configuration in the spelling of transformers 4, of 5 and in both gives the same logits."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flrc_edge.errors import UnsupportedModelError
from flrc_edge.hf_config import normalized_config
from flrc_edge.models import open_model

OLD = ("rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
IDS = torch.arange(48)[None] * 11 % 512


def spelled(config: dict[str, Any], spelling: str) -> dict[str, Any]:
    both = normalized_config(config)
    if spelling == "4":
        return {k: v for k, v in both.items() if k not in ("rope_parameters", "layer_types")}
    if spelling == "5":
        return {k: v for k, v in both.items() if k not in OLD}
    return both


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return open_model(str(folder)).model(IDS).logits


@pytest.mark.parametrize("scaling", [None, LLAMA3])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_same_logits_from_every_spelling(
    name: str, scaling: dict[str, Any] | None, copied_model: Callable[..., Path]
) -> None:
    folder = copied_model(name)
    original = json.loads((folder / "config.json").read_text())
    if scaling is not None:
        target = original["rope_parameters"]
        target = target["full_attention"] if name == "gemma3_text" else target
        target.update(scaling)
    found = {}
    for spelling in ("4", "5", "both"):
        (folder / "config.json").write_text(json.dumps(spelled(original, spelling)))
        found[spelling] = logits(folder)
    assert torch.equal(found["4"], found["5"])
    assert torch.equal(found["both"], found["5"])
    # and the theta is really used: with the default the logits are others
    plain = {k: v for k, v in original.items() if k not in (*OLD, "rope_parameters")}
    (folder / "config.json").write_text(json.dumps(plain))
    assert (logits(folder) - found["5"]).abs().max() > 1e-2


def test_normalizing_twice_changes_nothing(family_model: Callable[[str], Path]) -> None:
    for name in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text"):
        once = normalized_config(json.loads((family_model(name) / "config.json").read_text()))
        assert normalized_config(once) == once
        assert once["rope_scaling"] is None
    assert once["rope_parameters"]["full_attention"]["rope_theta"] == once["rope_theta"] == 5e5
    assert once["rope_parameters"]["sliding_attention"]["rope_theta"] == once["rope_local_base_freq"] == 2e4
    assert once["sliding_window_pattern"] == 2


def test_layer_types_without_a_pattern_are_kept() -> None:
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    config = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "layer_types": types,
        "sliding_window_pattern": 6,
    }
    result = normalized_config(config)
    assert result["layer_types"] == types
    assert "sliding_window_pattern" not in result


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}}, "disagree"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 1e5}},
            "disagree",
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2},
                "rope_parameters": {"rope_type": "linear", "factor": 4},
            },
            r"rope_scaling\.factor 2 and rope_parameters\.factor 4 disagree",
        ),
        ({"rope_theta": "many"}, "must be positive"),
        ({"rope_scaling": {"type": "default", "rope_theta": 1e5}, "rope_theta": 1e4}, "disagree"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 64}, "disagree"),
    ],
)
def test_spellings_that_disagree(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        normalized_config({"model_type": "llama", **fields})


LLAMA3_ALONE = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
RARE: dict[str, tuple[str, dict[str, Any]]] = {
    "silent": ("llama", {}),
    "null": ("llama", {"rope_scaling": None, "rope_parameters": None, "rope_theta": 2e4}),
    "empty": ("llama", {"rope_scaling": {}, "rope_parameters": {}, "rope_theta": 2e4}),
    "theta in rope_scaling": ("llama", {"rope_scaling": {"rope_type": "default", "rope_theta": 3e5}}),
    "theta and factor in rope_scaling": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 3.0, "rope_theta": 3e5}},
    ),
    "theta twice": ("llama", {"rope_scaling": {"type": "default", "rope_theta": 3e5}, "rope_theta": 3e5}),
    "theta beside rope_parameters": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 3e5},
    ),
    "factor without a type": ("llama", {"rope_scaling": {"factor": 2.0}, "rope_theta": 2e4}),
    "original beside": ("llama", {"rope_scaling": LLAMA3_ALONE, "original_max_position_embeddings": 64}),
    "original nowhere": ("llama", {"rope_scaling": LLAMA3_ALONE}),
    "original of another type": ("llama", {"original_max_position_embeddings": 64}),
    "gemma, silent": ("gemma3_text", {}),
    "gemma, one kind alone": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}}, "rope_theta": 3e5},
    ),
    "gemma, theta in rope_scaling": (
        "gemma3_text",
        {
            "rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e5},
            "rope_local_base_freq": 5e3,
        },
    ),
}


@pytest.mark.parametrize("spelling", list(RARE))
def test_rare_spellings_are_read_as_transformers_reads_them(
    spelling: str, copied_model: Callable[..., Path]
) -> None:
    import transformers

    family, fields = RARE[spelling]
    folder = copied_model(family)
    config = json.loads((folder / "config.json").read_text())
    kept = {k: v for k, v in config.items() if k not in (*OLD, "rope_parameters")}
    (folder / "config.json").write_text(json.dumps({**kept, **fields}))
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = theirs(IDS).logits
    assert torch.allclose(logits(folder), expected, atol=1e-4 * float(expected.abs().max()))
    ours = open_model(str(folder)).decoder
    for kind, layer in (("full_attention", ours.layers[-1]), ("sliding_attention", ours.layers[0])):
        rotary = theirs.model.rotary_emb
        frequencies = getattr(rotary, f"{kind}_inv_freq") if family == "gemma3_text" else rotary.inv_freq
        found = torch.tensor(layer.rope.inverse_frequencies(ours.head_dim))
        assert torch.allclose(found, frequencies, rtol=1e-5)


def test_one_embedding_for_two_kinds_of_layers_is_refused() -> None:
    """transformers takes no notice of it, whatever it says."""
    with pytest.raises(UnsupportedModelError, match="must name full_attention and sliding_attention"):
        normalized_config({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 3e5}})


OTHER_VERSION = """
import sys, torch, transformers
assert transformers.__version__.startswith("4.57"), transformers.__version__
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.arange(48)[None] * 11 % 512
    with torch.no_grad():
        found = {"logits": model(ids).logits, "ids": tokenizer("Once upon a time 123").input_ids}
    torch.save(found, folder + "/out.pt")
"""


@pytest.mark.full
def test_same_logits_in_transformers_4(
    copied_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from flrc_edge.tokenizer_files import save_tokenizer

    home = tmp_path_factory.mktemp("transformers4")
    venv.create(home, with_pip=True)
    python = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    requirements = ["transformers==4.57.6", "torch==2.13.0"]
    subprocess.run([python, "-m", "pip", "install", "-q", *requirements], check=True, timeout=1500)
    folders = []
    for name in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text"):
        folder = copied_model(name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(normalized_config(config)))
        save_tokenizer(open_model(str(folder)).tokenizer, folder)
        folders.append(folder)
    subprocess.run([python, "-c", OTHER_VERSION, *map(str, folders)], check=True, timeout=600)
    for folder in folders:
        other = torch.load(folder / "out.pt", weights_only=True)
        mine = open_model(str(folder))
        assert other["ids"] == mine.tokenizer("Once upon a time 123").input_ids
        expected = logits(folder)
        assert (other["logits"] - expected).abs().max() < 1e-5 * expected.abs().max(), folder.name
