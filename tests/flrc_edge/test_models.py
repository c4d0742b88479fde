"""Every family opens with the logits transformers computes; everything else is refused by name."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flrc_edge.builtin_models import BUILTIN
from flrc_edge.errors import FlrcError, FormatError, UnsupportedModelError, UsageError
from flrc_edge.models import open_model, resolve_model

FAMILIES = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma3_text"]


@pytest.mark.parametrize("name", FAMILIES)
def test_family_opens_with_the_logits_of_transformers(name: str, family_model: Callable[[str], Path]) -> None:
    import transformers

    folder = family_model(name)
    loaded = open_model(str(folder))
    assert loaded.config.architecture == name.removesuffix("-tied")
    assert loaded.path == folder
    assert not loaded.model.training
    linear = {
        n: tuple(m.weight.shape) for n, m in loaded.model.named_modules() if isinstance(m, torch.nn.Linear)
    }
    assert {p.name: p.shape for p in loaded.config.projections()}.items() <= linear.items()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.arange(40)[None] * 7 % 512  # longer than the windows of mistral and gemma3
    with torch.no_grad():
        expected, found = plain(ids).logits, loaded.model(ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert sum(p.numel() for p in loaded.model.parameters()) == loaded.config.parameters()


def test_stories_tells_a_story(stories: Path) -> None:
    loaded = open_model(str(stories))
    ids = torch.tensor([loaded.tokenizer("Once upon a time").input_ids])
    with torch.no_grad():
        out = loaded.model.generate(ids, max_new_tokens=20, do_sample=False)
    assert loaded.tokenizer.decode(out[0], skip_special_tokens=True).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play"
    )


def test_dtype(stories: Path) -> None:
    assert open_model(str(stories), dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(UsageError, match="'int8' is not one of float32"):
        open_model(str(stories), dtype="int8")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported .its projections are Conv1D"),
        ({"model_type": "qwen3_moe"}, "'qwen3_moe' is not supported .it is a mixture of experts"),
        ({"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "multimodal gemma 3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "models with their own code are never run"),
        ({"num_local_experts": 8}, "num_local_experts is set"),
        ({"rope_theta": 123.0}, "rope_theta 123.0 and rope_parameters.rope_theta 500000.0 disagree"),
    ],
)
def test_unsupported_configuration_is_refused(
    fields: dict[str, Any], message: str, copied_model: Callable[..., Path]
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        resolve_model(str(copied_model("llama", **fields)))


def test_refusal_loads_no_torch(copied_model: Callable[..., Path]) -> None:
    folder = copied_model("llama", model_type="gpt2")
    code = (
        "import sys\nfrom flrc_edge.models import resolve_model\n"
        f"try:\n    resolve_model({str(folder)!r})\nexcept Exception as e:\n    print(type(e).__name__)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["UnsupportedModelError", "[]"]


def test_only_pickled_weights(copied_model: Callable[..., Path]) -> None:
    folder = copied_model()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FlrcError, match=r"only pickled weights \(pytorch_model.bin\)"):
        resolve_model(str(folder))


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 2000, -1])
def test_truncated_weights(keep: int, copied_model: Callable[..., Path]) -> None:
    path = copied_model() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"llama/model.safetensors is truncated"):
        resolve_model(str(path.parent))


def test_missing_and_truncated_shard(copied_model: Callable[..., Path]) -> None:
    import transformers

    folder = copied_model()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(open_model(str(folder)).model(ids).logits, model.eval()(ids).logits)
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[:-10])
    with pytest.raises(
        FormatError, match=f"{shards[1].name} is truncated: {len(data) - 10} of {len(data)} bytes"
    ):
        resolve_model(str(folder))
    shards[1].unlink()
    with pytest.raises(FormatError, match=f"incomplete: {shards[1].name} is missing"):
        resolve_model(str(folder))


def test_index_may_not_leave_the_folder(copied_model: Callable[..., Path]) -> None:
    folder = copied_model()
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"names '../model.safetensors'"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            FormatError,
            "hold no model.layers.1.mlp.up_proj.weight",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(63)}),
            FormatError,
            r"model.norm.weight is \[63\], config.json says \[64\]",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
            UnsupportedModelError,
            "the tensor model.layers.0.self_attn.q_proj.bias has no place",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
            UnsupportedModelError,
            "model.norm.weight is stored as I8",
        ),
    ],
)
def test_weights_that_are_not_the_configuration(
    change: Callable[[dict[str, torch.Tensor]], object],
    error: type[FlrcError],
    message: str,
    copied_model: Callable[..., Path],
) -> None:
    from safetensors.torch import load_file, save_file

    path = copied_model() / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(error, match=message):
        resolve_model(str(path.parent))


def test_damaged_header(copied_model: Callable[..., Path]) -> None:
    path = copied_model() / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 4) + b"{]}}" + b"\0" * 64)
    with pytest.raises(FormatError, match="damaged header"):
        resolve_model(str(path.parent))


def test_loaded_modules_must_be_the_projections(
    family_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.models.llama.modeling_llama as llama

    class Weight(torch.nn.Module):
        def __init__(self, out: int, size: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(out, size))

    class Other(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.gate_proj = torch.nn.Linear(64, 96, bias=False)
            self.up_proj = torch.nn.Linear(64, 96, bias=False)
            self.down_proj = Weight(64, 96)

    monkeypatch.setattr(llama, "LlamaMLP", Other)
    with pytest.raises(UnsupportedModelError, match=r"model.layers.0.mlp.down_proj is not an nn.Linear"):
        open_model(str(family_model("llama")))


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model 'smollm3'") as caught:
        resolve_model("smollm3")
    assert all(name in str(caught.value.hint) for name in BUILTIN)
    with pytest.raises(UsageError, match="no model"):
        resolve_model(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="no model ''"):
        resolve_model("")
    with pytest.raises(FlrcError, match=r"holds no config.json"):
        resolve_model(str(tmp_path))


def test_builtin_that_was_not_pulled(cache: Path) -> None:
    with pytest.raises(FlrcError, match="is not on this machine yet") as caught:
        resolve_model("smollm2-135m")
    assert caught.value.hint == "flrc-edge pull smollm2-135m"


def test_flrc_folder_is_not_a_model(copied_model: Callable[..., Path]) -> None:
    folder = copied_model()
    (folder / "flrc.json").write_text("{}")
    with pytest.raises(FlrcError, match="a folder that flrc-edge wrote"):
        resolve_model(str(folder))


def test_no_tokenizer(copied_model: Callable[..., Path]) -> None:
    folder = copied_model()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FlrcError, match=r"holds no tokenizer.json"):
        resolve_model(str(folder))


def test_end_of_text_of_generation_config_counts(copied_model: Callable[..., Path]) -> None:
    folder = copied_model()
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert resolve_model(str(folder)).config.eos_token_ids == (2, 7)


def test_hub_reads_the_configuration_before_the_weights(
    family_model: Callable[[str], Path], copied_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[list[str]] = []
    folder = family_model("qwen3")

    def download(hub_id: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = open_model("someone/tiny-qwen3")
    assert (loaded.name, loaded.path) == ("tiny-qwen3", folder)
    assert asked[0] == ["config.json", "generation_config.json", "adapter_config.json"]
    assert not any(p.endswith((".bin", ".pt", ".py", ".gguf")) or p.startswith("*") for p in asked[1])
    folder = copied_model("llama", model_type="mamba")
    with pytest.raises(UnsupportedModelError, match="'mamba' is not supported"):
        open_model("someone/mamba")
    assert len(asked) == 3  # no weights were asked for

    def fail(hub_id: str, *, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("cannot reach the hub\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FlrcError, match=r"someone/mamba could not be downloaded: cannot reach the hub$"):
        open_model("someone/mamba")
