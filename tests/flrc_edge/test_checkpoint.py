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
from flrc_edge.compression import compress
from flrc_edge.errors import FlrcError, FormatError, UsageError, VerificationError
from flrc_edge.lowrank import LowRankLinear, set_stage
from flrc_edge.measurements import measure
from flrc_edge.models import open_model
from flrc_edge.placement import compressed
from flrc_edge.planning import factorize_all
from flrc_edge.settings import Settings
from flrc_runtime import manifest

IDS = torch.arange(3, 67)[None]


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits
    return result


@pytest.fixture(params=["compressed_stories", "pivoted_stories"], ids=["plain", "pivoted"])
def stored(request: pytest.FixtureRequest) -> Any:
    """The three stages of stories260k in both forms of storage."""
    return request.getfixturevalue(request.param)


def products(folder: Path, plan: manifest.RankPlan, stage: int) -> dict[str, torch.Tensor]:
    """The dense matrix of every factored projection at a stage, from the tensors of the checkpoint."""
    t = {
        name: x.double() if x.is_floating_point() else x
        for name, x in load_file(folder / checkpoint.FACTORS).items()
    }
    result = {}
    for p in plan.projections:
        for i, (_, stop) in enumerate(p.chunks()):
            if stop <= (p.ranks[stage] or 0):
                rows, key = t[f"{p.name}.chunks.{i}.V"], f"{p.name}.chunks.{i}.order"
                product = t[f"{p.name}.chunks.{i}.U"] @ rows
                if p.storage == "pivoted":
                    product = torch.cat([rows, product])[t[key]]
                result[p.name] = result.get(p.name, 0) + product
    return result


def dense_model(source: Any, weights: dict[str, torch.Tensor]) -> Any:
    """The original model in float32 with some weights replaced."""
    model: Any = open_model(str(source.path)).model
    for name, weight in weights.items():
        with torch.no_grad():
            model.get_parameter(f"{name}.weight").copy_(weight)
    return model


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


def test_a_stage_equals_the_compressed_model_in_memory(stored: Any) -> None:
    source, plan = stored.source, stored.manifest.plan
    statistics, _ = measure(source, stored.settings)
    factors = factorize_all(source, statistics.moments, storage=stored.settings.storage)
    seen = []
    for stage in range(3):
        loaded = flrc_edge.load(stored.checkpoint, stage=stage)
        with compressed(source, plan, factors) as model:
            set_stage(model, stage)
            assert torch.equal(logits(loaded), logits(model))
        seen.append(logits(loaded))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_a_stage_equals_dense_layers_of_its_chunks(stored: Any) -> None:
    for stage in range(3):
        dense = dense_model(stored.source, products(stored.checkpoint, stored.manifest.plan, stage))
        loaded = flrc_edge.load(stored.checkpoint, stage=stage)
        assert (logits(loaded) - logits(dense)).abs().max() < 1e-3


def test_switching_back_and_forth(stored: Any) -> None:
    model = flrc_edge.load(stored.checkpoint)
    first = logits(model)
    flrc_edge.set_stage(model, 2)
    assert torch.equal(logits(model), logits(flrc_edge.load(stored.checkpoint, stage=2)))
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


def test_what_the_files_hold(stored: Any) -> None:
    folder, plan = stored.checkpoint, stored.manifest.plan
    base, factors = load_file(folder / checkpoint.BASE), load_file(folder / checkpoint.FACTORS)
    assert "lm_head.weight" not in base and "model.embed_tokens.weight" in base  # tied: stored once
    factored = {p.name: p for p in plan.projections if not p.dense}
    assert len(factored) > 5
    pivoted = stored.settings.storage == "pivoted"
    assert {p.storage for p in factored.values()} == {stored.settings.storage}
    kinds = ("V", "U", "order") if pivoted else ("V", "U")
    assert set(factors) == {
        f"{n}.chunks.{i}.{kind}"
        for n, p in factored.items()
        for i in range(len(p.chunks()))
        for kind in kinds
    }
    assert any(len(p.chunks()) == 2 for p in factored.values())
    for name, p in factored.items():
        m, n = p.shape
        for i, (start, stop) in enumerate(p.chunks()):
            rank = stop - start
            assert factors[f"{name}.chunks.{i}.V"].shape == (rank, n)
            assert factors[f"{name}.chunks.{i}.U"].shape == (m - rank if pivoted else m, rank)
            if pivoted:
                assert sorted(factors[f"{name}.chunks.{i}.order"].tolist()) == list(range(m))
        assert f"{name}.weight" not in base
    assert {t.dtype for t in factors.values() if t.is_floating_point()} == {torch.float32}
    for p in plan.projections:
        assert not p.dense or base[f"{p.name}.weight"].shape == p.shape
    original = stored.source.model.state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in base.items())
    whole = sum(t.numel() for n, t in base.items() if ".weight" in n and n[:-7] in plan.by_name())
    assert whole + sum(t.numel() for t in factors.values() if t.is_floating_point()) == plan.activated(0)
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


@pytest.mark.parametrize("storage", ["plain", "pivoted"])
@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 1.5e-3), ("float16", 3e-5)])
def test_a_model_of_half_precision(
    stories: Path, tmp_path: Path, dtype: str, most: float, storage: Any
) -> None:
    """Factors are stored in float32 and rounded when they are loaded, which pivoting does not make much worse."""
    source = open_model(str(stories), dtype=dtype)
    settings = Settings(
        keep=(0.8,), tokens=4096, window=256, rank_step=8, reuse_statistics=False, storage=storage
    )
    written = compress(source, tmp_path / "c", settings)
    assert written is not None and written.dtype == dtype
    model = flrc_edge.load(tmp_path / "c")
    kind = getattr(torch, dtype)
    assert logits(model).dtype == kind and {p.dtype for p in model.parameters()} == {kind}
    whole = load_file(tmp_path / "c" / checkpoint.FACTORS)
    assert {t.dtype for t in whole.values()} <= {torch.float32, torch.int64}
    p = logits(dense_model(source, products(tmp_path / "c", written.plan, 0))).double().log_softmax(-1)
    q = logits(model).double().log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) <= most


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
        p["ranks"] = [rank + (rank == p["ranks"][0]) for rank in p["ranks"]]

    edit(copied, grow)
    with pytest.raises(FormatError, match=r"has shape .*, the plan says"):
        flrc_edge.load(copied)


def test_chunks_that_are_not_stored(copied: Path) -> None:
    def split(content: dict[str, Any]) -> None:
        p = next(p for p in content["plan"]["projections"] if len(set(p["ranks"])) == 2)
        p["ranks"][2 if p["ranks"][1] == p["ranks"][2] else 1] -= 1

    edit(copied, split)
    with pytest.raises(FormatError, match=r"tensor model\.layers.*\.chunks\.2\.U is missing"):
        flrc_edge.load(copied)


@pytest.mark.parametrize("storage", ["plain", "pivoted"])
def test_another_storage_than_the_stored_one(stored: Any, tmp_path: Path, storage: str) -> None:
    folder = Path(shutil.copytree(stored.checkpoint, tmp_path / "copy"))
    edit(folder, lambda c: [p.update(storage=storage) for p in c["plan"]["projections"]])
    if storage == stored.settings.storage:  # without meaning where a projection is dense
        assert torch.equal(logits(flrc_edge.load(folder)), logits(flrc_edge.load(stored.checkpoint)))
    else:
        with pytest.raises(FormatError, match=r"has shape|is missing|is not part of its plan"):
            flrc_edge.load(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda order: order.float(),
        lambda order: order.int(),
        lambda order: torch.cat([order[:1], order[:-1]]),
        lambda order: order + 1,
        lambda order: order - len(order),
    ],
    ids=["float", "int32", "twice", "beyond", "negative"],
)
def test_an_order_that_is_no_permutation(pivoted_stories: Any, tmp_path: Path, wrong: Any) -> None:
    folder = Path(shutil.copytree(pivoted_stories.checkpoint, tmp_path / "copy"))
    tensors = load_file(folder / checkpoint.FACTORS)
    name = max(name for name in tensors if name.endswith(".order"))
    save_file({**tensors, name: wrong(tensors[name]).contiguous()}, folder / checkpoint.FACTORS)
    manifest.seal(folder, pivoted_stories.manifest)
    with pytest.raises(FormatError, match=f"copy: tensor {name} is not a permutation"):
        flrc_edge.load(folder)


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
