"""The checkpoint folder: what is in it, how it loads, and every way it can be damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import flrc_edge
from flrc_edge import checkpoint
from flrc_edge.compression import Settings, compress, compressed, factorize_all, measure
from flrc_edge.errors import FlrcError, FormatError, UsageError, VerificationError
from flrc_edge.lowrank import LowRankLinear, set_stage
from flrc_edge.models import open_model
from flrc_runtime import manifest

IDS = torch.arange(3, 67)[None]


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits
    return result


@pytest.fixture
def copied(compressed_stories: Any, tmp_path: Path) -> Path:
    """A copy a test may damage."""
    return Path(shutil.copytree(compressed_stories.checkpoint, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change flrc.json in place."""
    path = folder / "flrc.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_stage_equals_the_compressed_model_in_memory(compressed_stories: Any) -> None:
    source, plan = compressed_stories.source, compressed_stories.manifest.plan
    statistics, _ = measure(source, compressed_stories.settings)
    factors = factorize_all(source, statistics.moments)
    seen = []
    for stage in range(3):
        loaded = flrc_edge.load(compressed_stories.checkpoint, stage=stage)
        with compressed(source, plan, factors) as model:
            set_stage(model, stage)
            assert torch.equal(logits(loaded), logits(model))
        seen.append(logits(loaded))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_a_stage_equals_dense_layers_of_u_v(compressed_stories: Any) -> None:
    factors = load_file(compressed_stories.checkpoint / checkpoint.FACTORS)
    for stage in range(3):
        dense: Any = open_model(str(compressed_stories.source.path)).model
        for p in compressed_stories.manifest.plan.projections:
            rank = p.ranks[stage]
            if rank is not None:
                u, v = factors[f"{p.name}.U"].double(), factors[f"{p.name}.V"].double()
                with torch.no_grad():
                    dense.get_parameter(f"{p.name}.weight").copy_(u[:, :rank] @ v[:rank])
        loaded = flrc_edge.load(compressed_stories.checkpoint, stage=stage)
        assert (logits(loaded) - logits(dense)).abs().max() < 1e-3


def test_switching_back_and_forth(compressed_stories: Any) -> None:
    model = flrc_edge.load(compressed_stories.checkpoint)
    first = logits(model)
    flrc_edge.set_stage(model, 2)
    assert torch.equal(logits(model), logits(flrc_edge.load(compressed_stories.checkpoint, stage=2)))
    flrc_edge.set_stage(model, 0)
    assert torch.equal(logits(model), first)


def test_generate(compressed_stories: Any) -> None:
    model = flrc_edge.load(compressed_stories.checkpoint, stage=1)
    assert not model.training
    tokenizer = compressed_stories.source.tokenizer
    ids = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    greedy = logits(model, out[:, :-1]).argmax(-1)[0, ids.shape[1] - 1 :]
    assert torch.equal(out[0, ids.shape[1] :], greedy)
    flrc_edge.set_stage(model, 2)
    other = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert other.shape == out.shape and not torch.equal(other, out)


def test_generation_settings_come_along(compressed_stories: Any, copied: Path) -> None:
    path = copied / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [2, 7]}))
    manifest.seal(copied, compressed_stories.manifest)
    assert flrc_edge.load(copied).generation_config.eos_token_id == [2, 7]


def test_what_the_files_hold(compressed_stories: Any) -> None:
    folder, plan = compressed_stories.checkpoint, compressed_stories.manifest.plan
    base, factors = load_file(folder / checkpoint.BASE), load_file(folder / checkpoint.FACTORS)
    assert "lm_head.weight" not in base and "model.embed_tokens.weight" in base  # tied: stored once
    factored = {p.name: p for p in plan.projections if not p.dense}
    assert len(factored) > 5
    assert set(factors) == {f"{n}.{side}" for n in factored for side in "UV"}
    for name, p in factored.items():
        assert factors[f"{name}.U"].shape == (p.shape[0], p.ranks[0])
        assert factors[f"{name}.V"].shape == (p.ranks[0], p.shape[1])
        assert f"{name}.weight" not in base
    for p in plan.projections:
        assert not p.dense or base[f"{p.name}.weight"].shape == p.shape
    original = compressed_stories.source.model.state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in base.items())
    stored = sum(t.numel() for n, t in base.items() if ".weight" in n and n[:-7] in plan.by_name())
    assert stored + sum(t.numel() for t in factors.values()) == plan.activated(0)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "flrc.json"):
        assert (folder / name).is_file()
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # both spellings
    assert str(folder.parent) not in (folder / "flrc.json").read_text()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_every_family_comes_back(family: str, family_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Untied heads, biases, qk-norm and sliding windows: a checkpoint of keep 1 is the model itself."""
    source = open_model(str(family_model(family)))
    compress(source, tmp_path / "whole", Settings(keep=(1.0,)))
    assert torch.equal(logits(flrc_edge.load(tmp_path / "whole")), logits(source.model))
    settings = Settings(keep=(0.8,), tokens=1024, window=128, rank_step=8, reuse_statistics=False)
    written = compress(source, tmp_path / "small", settings)
    assert written is not None
    small = flrc_edge.load(tmp_path / "small")
    layers = [m for m in small.modules() if isinstance(m, LowRankLinear)]
    assert len(layers) == sum(not p.dense for p in written.plan.projections) > 0
    base = load_file(tmp_path / "small" / checkpoint.BASE)
    assert ("lm_head.weight" in base) == (family in ("llama", "mistral", "qwen3"))
    if family == "qwen2":
        biased = [m for m in layers if m.bias is not None]
        name = next(n for n, m in small.named_modules() if m is biased[0])
        assert torch.equal(biased[0].bias, source.model.get_parameter(f"{name}.bias"))  # type: ignore[arg-type]


def test_a_bfloat16_model(stories: Path, tmp_path: Path) -> None:
    source = open_model(str(stories), dtype="bfloat16")
    settings = Settings(keep=(0.8,), tokens=4096, window=256, rank_step=8, reuse_statistics=False)
    written = compress(source, tmp_path / "c", settings)
    assert written is not None and written.dtype == "bfloat16"
    model = flrc_edge.load(tmp_path / "c")
    assert logits(model).dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("stage", [3, -1])
def test_no_such_stage(compressed_stories: Any, stage: int) -> None:
    with pytest.raises(UsageError, match=f"stage {stage} does not exist: there are stages 0 to 2"):
        flrc_edge.load(compressed_stories.checkpoint, stage=stage)


def test_no_such_stage_of_a_dense_checkpoint(compressed_stories: Any, tmp_path: Path) -> None:
    compress(compressed_stories.source, tmp_path / "whole", Settings(keep=(1.0,)))
    with pytest.raises(UsageError, match="stage 1 does not exist"):
        flrc_edge.load(tmp_path / "whole", stage=1)


@pytest.mark.parametrize("name", [checkpoint.FACTORS, checkpoint.BASE, "config.json"])
def test_truncated_and_missing_files(copied: Path, name: str) -> None:
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[:-1])
    with pytest.raises(
        VerificationError, match=f"{name} has {len(data) - 1} bytes, {len(data)} were written"
    ):
        flrc_edge.load(copied)
    (copied / name).unlink()
    with pytest.raises(VerificationError, match=f"{name} is missing"):
        flrc_edge.load(copied)


@pytest.mark.parametrize("name", [checkpoint.FACTORS, checkpoint.BASE])
@pytest.mark.parametrize("keep", [0, 5, 100, 0.5])
def test_garbage_of_the_listed_size(copied: Path, name: str, keep: float) -> None:
    """Sizes fit, the header or the data do not."""
    data = (copied / name).read_bytes()
    start = int(keep * len(data)) if keep < 1 else int(keep)
    if keep == 0.5:
        (copied / name).write_bytes(data[:start])
        edit(copied, lambda c: c["files"][name].update(size=start))
    else:
        (copied / name).write_bytes(data[:start] + b"\xff" * (len(data) - start))
    with pytest.raises(FormatError, match=f"copy/{name} is damaged"):
        flrc_edge.load(copied)


def test_config_json_that_is_garbage_of_the_listed_size(copied: Path) -> None:
    path = copied / "config.json"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(FormatError, match=r"config.json cannot be read"):
        flrc_edge.load(copied)


def test_a_config_with_code_of_its_own_is_never_run(compressed_stories: Any, copied: Path) -> None:
    path = copied / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.Config"}}))
    (copied / "evil.py").write_text("raise SystemExit('ran')")
    manifest.seal(copied, compressed_stories.manifest)
    with pytest.raises(FlrcError, match="auto_map"):
        flrc_edge.load(copied)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (checkpoint.FACTORS, lambda t: t.popitem(), r"tensor model\.layers.*\.[UV] is missing"),
        (checkpoint.BASE, lambda t: t.pop("model.norm.weight"), r"tensor model.norm.weight is missing"),
        (checkpoint.BASE, lambda t: t.pop("model.embed_tokens.weight"), r"embed_tokens.weight is missing"),
        (checkpoint.BASE, lambda t: t.update(extra=torch.ones(2)), "tensor extra is not part of its plan"),
        (
            checkpoint.FACTORS,
            lambda t: t.update({next(iter(t)): torch.ones(3, 3)}),
            r"has shape \(3, 3\), the plan says",
        ),
        (
            checkpoint.BASE,
            lambda t: t.update({"model.norm.weight": torch.ones(65)}),
            r"model.norm.weight has shape \(65,\), the plan says \(64,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    compressed_stories: Any, copied: Path, name: str, change: Any, message: str
) -> None:
    tensors = load_file(copied / name)
    change(tensors)
    save_file(tensors, copied / name)
    manifest.seal(copied, compressed_stories.manifest)
    manifest.verify(copied)  # everything is listed: only the content is wrong
    with pytest.raises(FormatError, match=message):
        flrc_edge.load(copied)


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["projections"].pop(),
        lambda plan: plan["projections"][0].update(name="model.layers.0.self_attn.z_proj"),
        lambda plan: plan["projections"][0].update(shape=[64, 65]),
        lambda plan: plan["projections"][0].update(name="../../x"),
    ],
)
def test_a_plan_that_does_not_fit_the_model(copied: Path, change: Any) -> None:
    edit(copied, lambda c: change(c["plan"]))
    with pytest.raises(FormatError, match=r"copy: the plan in flrc.json does not fit config.json"):
        flrc_edge.load(copied)


def test_ranks_that_are_not_stored(copied: Path) -> None:
    def grow(content: dict[str, Any]) -> None:
        p = next(p for p in content["plan"]["projections"] if p["ranks"][0] is not None)
        p["ranks"][0] += 1

    edit(copied, grow)
    with pytest.raises(FormatError, match=r"has shape .*, the plan says"):
        flrc_edge.load(copied)


def test_a_bundle_is_no_checkpoint(stories_bundle: Path) -> None:
    with pytest.raises(FormatError, match="is a bundle, not a checkpoint"):
        flrc_edge.load(stories_bundle)


def test_a_file_that_is_a_link(copied: Path) -> None:
    (copied.parent / "elsewhere").write_bytes((copied / checkpoint.BASE).read_bytes())
    (copied / checkpoint.BASE).unlink()
    (copied / checkpoint.BASE).symlink_to(copied.parent / "elsewhere")
    with pytest.raises(VerificationError, match=r"base.safetensors is not a regular file"):
        flrc_edge.load(copied)


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_no_checkpoint_at_all(tmp_path: Path, folder: str) -> None:
    with pytest.raises(FormatError, match=r"is not a folder|flrc.json is missing"):
        flrc_edge.load(tmp_path / folder)
