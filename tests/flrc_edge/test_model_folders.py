"""Folders of models: other kinds by name, shards of any name, numbers of any width, ties."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flrc_edge.errors import FlrcError, NumericalError, UsageError
from flrc_edge.models import open_model, resolve_model

SHARDS = [("weights-a", "weights-b"), ("shards/one", "shards/two"), ("pytorch_model-1", "x_y.z")]
WEIGHTS = ["model.embed_tokens.weight", "model.norm.weight", "model.layers.2.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("file", "alone", "message"),
    [
        ("adapter_config.json", True, "holds an adapter"),
        ("adapter_config.json", False, "holds an adapter"),
        ("model_index.json", True, "is a diffusion pipeline"),
        ("modules.json", True, "is a sentence-transformers model"),
        ("genai_config.json", True, "is a folder of onnxruntime-genai"),
        ("params.json", True, "is in the original format of Meta or Mistral"),
    ],
)
def test_a_folder_of_another_kind_is_named(
    file: str, alone: bool, message: str, copied_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "other" if alone else copied_model()
    folder.mkdir(exist_ok=True)
    (folder / file).write_text("{}")
    with pytest.raises(FlrcError, match=message):
        resolve_model(str(folder))


def test_a_folder_above_the_model_and_a_file_of_it(copied_model: Callable[..., Path]) -> None:
    folder = copied_model()
    with pytest.raises(FlrcError, match=r"holds no config\.json") as caught:
        resolve_model(str(folder.parent))
    assert caught.value.hint == "give one of the folders in it: llama"
    with pytest.raises(UsageError, match=r"model\.safetensors is one file of a model") as file:
        resolve_model(str(folder / "model.safetensors"))
    assert file.value.hint == f"give its folder: {folder}"


def test_a_model_of_the_hubs_cache_is_called_by_its_repository(
    copied_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copied_model()
    snapshot = tmp_path / "hub" / "models--some-body--a--name" / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert resolve_model(str(snapshot)).name == "name"
    assert resolve_model(str(folder)).name == "llama"


@pytest.mark.parametrize("names", SHARDS)
def test_shards_of_any_name(
    names: tuple[str, str], copied_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the index lists is loaded from a folder and asked of the hub, whatever the files are called."""
    import huggingface_hub
    from safetensors.torch import load_file, save_file

    folder = copied_model()
    whole = load_file(folder / "model.safetensors")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = open_model(str(folder)).model(ids).logits
    (folder / "model.safetensors").unlink()
    keys = sorted(whole)
    files = [f"{name}.safetensors" for name in names]
    index = {key: files[i % 2] for i, key in enumerate(keys)}
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        save_file({k: whole[k] for k in keys if index[k] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    with torch.no_grad():
        assert torch.equal(open_model(str(folder)).model(ids).logits, expected)
    asked: list[list[str]] = []

    def download(hub_id: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    open_model("someone/sharded")
    assert set(files) <= set(asked[2])


def test_weights_in_float64(copied_model: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied_model()
    with torch.no_grad():
        expected = open_model(str(folder)).model(torch.arange(9)[None]).logits
    path = folder / "model.safetensors"
    save_file({k: v.double() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    with torch.no_grad():
        assert torch.equal(open_model(str(folder)).model(torch.arange(9)[None]).logits, expected)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_finite(name: str, value: float, copied_model: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    path = copied_model() / "model.safetensors"
    weights = load_file(path)
    weights[name].view(-1)[-1] = value
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=f"{name} holds a value that is not finite"):
        open_model(str(path.parent))


def _with_head(folder: Path, says: bool, head: str) -> Path:
    """Make a model whose configuration says that its head is tied, or not, and whose weights say something."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    embedding = weights["model.embed_tokens.weight"]
    heads = {"own": embedding.flip(0).contiguous(), "same": embedding.clone(), "none": None}
    weights.pop("lm_head.weight", None)
    if heads[head] is not None:
        weights["lm_head.weight"] = heads[head]
    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": says}))
    return folder


@pytest.mark.parametrize(
    ("says", "head", "tied"),
    [
        (True, "own", False),
        (True, "same", True),
        (True, "none", True),
        (False, "own", False),
        (False, "same", False),
        (False, "none", True),
    ],
)
def test_ties_follow_the_weights(
    says: bool,
    head: str,
    tied: bool,
    copied_model: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In calibration, the checkpoint, the bundle and an evaluation alike."""
    import flrc_edge
    from flrc_edge.compression import compress
    from flrc_edge.settings import Settings
    from flrc_exporters.bundle import export
    from flrc_runtime import load

    folder = _with_head(copied_model("llama"), says, head)
    ids = torch.arange(20)[None] * 7 % 512
    with caplog.at_level(logging.WARNING):
        loaded = open_model(str(folder))
    assert loaded.config.tied_embedding == tied
    assert ("the weights are followed" in caplog.text) == (says != tied)
    weights = loaded.model.state_dict()
    with torch.no_grad():
        hidden = loaded.model.model(ids).last_hidden_state
        own = {"own": weights["model.embed_tokens.weight"].flip(0)}.get(
            head, weights["model.embed_tokens.weight"]
        )
        expected = hidden @ own.T
        assert torch.allclose(loaded.model(ids).logits, expected, atol=1e-5)
        compress(loaded, tmp_path / "checkpoint", Settings(keep=(1.0,)))
        assert torch.allclose(flrc_edge.load(tmp_path / "checkpoint")(ids).logits, expected, atol=1e-5)
    export(tmp_path / "checkpoint", tmp_path / "bundle", dtype="fp32")
    found = torch.from_numpy(load(tmp_path / "bundle").logits(ids[0].tolist()))
    assert torch.allclose(found, expected[0], atol=1e-4)
