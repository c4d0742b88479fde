"""The whole offline way: nothing half-written, nothing changed, the same bytes twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flrc_edge import checkpoint
from flrc_edge.compression import compress
from flrc_edge.errors import FlrcError, NumericalError, UsageError
from flrc_edge.evaluation.perplexity import perplexity, torch_logits
from flrc_edge.lowrank import set_stage
from flrc_edge.measurements import measure
from flrc_edge.models import open_model
from flrc_edge.placement import compressed
from flrc_edge.planning import factorize_all, plan_ranks
from flrc_edge.progress import Timings
from flrc_edge.settings import Settings
from flrc_edge.texts import WeightedText, token_windows
from flrc_exporters.bundle import export
from flrc_exporters.weight_table import file_size
from flrc_runtime import manifest
from flrc_runtime.files import sha256_of

FAST = Settings(keep=(0.8,), allocator="spectrum", tokens=2816, window=256, rank_step=8)


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: sha256_of(p) for p in sorted(folder.iterdir())}


def test_the_same_bytes_twice(compressed_stories: Any, tmp_path: Path) -> None:
    fresh = replace(compressed_stories.settings, reuse_statistics=False)
    compress(str(compressed_stories.source.path), tmp_path / "again", fresh)
    assert hashes(tmp_path / "again") == hashes(compressed_stories.checkpoint)
    cached = replace(fresh, reuse_statistics=True)
    for name in ("stores them", "finds them"):
        compress(str(compressed_stories.source.path), tmp_path / name, cached)
        assert hashes(tmp_path / name) == hashes(compressed_stories.checkpoint)
    order = [p.name for p in compressed_stories.source.config.projections()]
    assert [p.name for p in manifest.read(tmp_path / "finds them").plan.projections] == order


def test_another_seed_gives_other_factors(compressed_stories: Any, tmp_path: Path) -> None:
    compress(compressed_stories.source, tmp_path / "a", FAST)
    compress(compressed_stories.source, tmp_path / "b", replace(FAST, seed=1))
    a, b = hashes(tmp_path / "a"), hashes(tmp_path / "b")
    assert a["factors.safetensors"] != b["factors.safetensors"] and a["tokenizer.json"] == b["tokenizer.json"]


@pytest.mark.parametrize("dtype", ["float", "int4"])
def test_correction_lowers_what_is_lost(compressed_stories: Any, tmp_path: Path, dtype: Any) -> None:
    """On other text than it is fitted to, and not at the expense of the later stage."""
    source = compressed_stories.source
    settings = replace(FAST, keep=(0.7, 0.5), boundaries=(8,), dtype=dtype)
    ids = token_windows(source.tokenizer, (WeightedText("chat"),), windows=8, length=256, seed=3).ids
    found = {}
    for correct in (False, True):
        folder = tmp_path / str(correct)
        compress(source, folder, replace(settings, correct=correct))
        model = checkpoint.load(folder)
        for stage in (0, 1):
            set_stage(model, stage)
            found[correct, stage] = perplexity(torch_logits(model), ids)
    assert found[True, 0] < found[False, 0]
    assert found[True, 1] < 1.02 * found[False, 1]


def test_the_manifest_says_what_was_done(compressed_stories: Any) -> None:
    content = manifest.verify(compressed_stories.checkpoint)
    assert content == compressed_stories.manifest
    assert content.kind == "checkpoint" and content.dtype == "float32" and content.stages == ()
    settings = compressed_stories.settings
    assert (content.factorization, content.plan.allocator) == (settings.factorization, settings.allocator)
    assert content.calibration is not None
    assert content.calibration.tokens == sum(t.tokens for t in content.calibration.texts) == 4096
    assert content.calibration.window == 256 and len(content.calibration.fingerprint) == 64
    assert set(content.plan.scores) == set(content.plan.by_name())
    assert all(score > 0 for score in content.plan.scores.values())
    assert {"flrc-edge", "torch", "transformers"} <= set(content.versions)
    assert content.model.name == "stories260k" and content.model.parameters == sum(
        p.numel() for p in compressed_stories.source.model.parameters()
    )
    for stage, keep in enumerate((0.9, 0.8, 0.7)):
        assert keep - 0.03 < content.plan.kept(stage) <= keep


def test_a_loaded_model_is_left_as_it_was(stories: Path, tmp_path: Path) -> None:
    loaded = open_model(str(stories))
    model = loaded.model
    names = [n for n, _ in model.named_modules()]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    kinds = [type(m) for m in model.modules()]
    compress(loaded, tmp_path / "a", replace(FAST, keep=(0.8, 0.7), reuse_statistics=False))
    assert names == [n for n, _ in model.named_modules()] and kinds == [type(m) for m in model.modules()]
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters()) and not model.training


def test_compressed_restores_the_model_after_an_error(compressed_stories: Any) -> None:
    loaded, plan = compressed_stories.source, compressed_stories.manifest.plan
    statistics, _ = measure(loaded, compressed_stories.settings)
    factors = factorize_all(loaded, statistics.moments)
    kinds = [type(m) for m in loaded.model.modules()]
    with pytest.raises(KeyError), compressed(loaded, plan, factors):
        raise KeyError
    assert kinds == [type(m) for m in loaded.model.modules()]
    last = [p.name for p in plan.projections if not p.dense][-1]
    del factors[last]  # fails half-way through replacing
    with pytest.raises(KeyError), compressed(loaded, plan, factors):
        pass
    assert kinds == [type(m) for m in loaded.model.modules()]


@pytest.mark.parametrize("allocator", ["uniform", "fisher", "spectrum"])
@pytest.mark.parametrize(
    ("factorization", "storage"), [("one-sided", "plain"), ("two-sided", "plain"), ("two-sided", "pivoted")]
)
def test_every_rule_compresses_sensibly(
    compressed_stories: Any, tmp_path: Path, allocator: Any, factorization: Any, storage: Any
) -> None:
    """A random choice of directions of the same size would give a perplexity in the hundreds."""
    import flrc_edge

    source = compressed_stories.source
    ids = token_windows(source.tokenizer, (WeightedText("austen-heldout"),), windows=4, length=256).ids
    settings = replace(FAST, keep=(0.9,), allocator=allocator, factorization=factorization, storage=storage)
    written = compress(source, tmp_path / "c", settings)
    assert written is not None and 0.87 < written.plan.kept(0) <= 0.9
    value = perplexity(torch_logits(flrc_edge.load(tmp_path / "c")), ids)
    dense = perplexity(torch_logits(source.model), ids)
    assert 0.8 * dense < value < 2.5 * dense


def test_pivoted_storage_predicts_less_loss_at_every_keep(compressed_stories: Any) -> None:
    source = compressed_stories.source
    shapes = {p.name: p.shape for p in source.config.projections()}
    statistics, _ = measure(source, compressed_stories.settings)
    factors = factorize_all(source, statistics.moments, storage="pivoted")
    for keep in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
        losses = {}
        for storage in ("plain", "pivoted"):
            settings = replace(FAST, keep=(keep,), storage=storage)
            plan = plan_ranks(shapes, settings, statistics.moments, factors)
            losses[storage] = sum(factors[p.name].loss(p.ranks[0]) for p in plan.projections if p.ranks[0])
            assert keep - 0.03 < plan.kept(0) <= keep
        assert losses["pivoted"] < losses["plain"]


@pytest.mark.parametrize(
    "where", ["measure", "factorize_all", "plan_ranks", "checkpoint.save_file", "manifest.write_json"]
)
@pytest.mark.parametrize("error", [NumericalError("stop"), KeyboardInterrupt(), OSError(28, "No space left")])
def test_nothing_is_left_behind(
    compressed_stories: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: BaseException,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    homes = {"checkpoint": "flrc_edge.checkpoint", "manifest": "flrc_runtime.manifest"}
    home, _, name = where.rpartition(".")
    monkeypatch.setattr(f"{homes.get(home, 'flrc_edge.compression')}.{name}", fail)
    expected = FlrcError if isinstance(error, OSError) and home else type(error)
    with pytest.raises(expected):
        compress(compressed_stories.source, tmp_path / "out" / "c", FAST)
    assert not (tmp_path / "out" / "c").exists()
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_an_interrupted_overwrite_keeps_the_old_checkpoint(
    compressed_stories: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(compressed_stories.source, tmp_path / "c", FAST)
    before = hashes(tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr("flrc_runtime.manifest.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compress(compressed_stories.source, tmp_path / "c", replace(FAST, seed=3), overwrite=True)
    assert hashes(tmp_path / "c") == before and len(list(tmp_path.iterdir())) == 1
    compress(compressed_stories.source, tmp_path / "c", replace(FAST, seed=3), overwrite=True)
    assert hashes(tmp_path / "c") != before and len(list(tmp_path.iterdir())) == 1


def test_an_existing_output_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flrc_edge.compression.open_model", lambda name: pytest.fail("the model was loaded"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        compress("anything", tmp_path / "c", FAST)
    with pytest.raises(UsageError, match="was not written by flrc-edge"):
        compress("anything", tmp_path / "c", FAST, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not a folder"):
        compress("anything", tmp_path / "file", FAST, overwrite=True)
    assert (tmp_path / "c" / "notes.txt").read_text() == "mine"


def test_a_keep_that_cannot_be_met_is_refused_before_calibration(
    compressed_stories: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flrc_edge.compression.measure", lambda *a, **k: pytest.fail("calibrated"))
    with pytest.raises(UsageError, match=r"keep 0.05 is below 0\.\d+, the least that ranks of 8 allow"):
        compress(compressed_stories.source, tmp_path / "c", replace(FAST, keep=(0.05,)))


def test_windows_are_no_longer_than_the_context(compressed_stories: Any, tmp_path: Path) -> None:
    written = compress(compressed_stories.source, tmp_path / "c", replace(FAST, tokens=4096, window=1024))
    assert written is not None and written.calibration is not None
    assert written.calibration.window == 512 and written.calibration.tokens == 4096


def test_keep_one_is_the_dense_model(compressed_stories: Any, tmp_path: Path) -> None:
    written = compress(compressed_stories.source, tmp_path / "c", Settings(keep=(1.0,)))
    assert written is not None and written.calibration is None
    assert all(p.dense for p in written.plan.projections) and written.plan.kept(0) == 1


def test_given_boundaries_are_taken(compressed_stories: Any, tmp_path: Path) -> None:
    settings = replace(compressed_stories.settings, boundaries=(5, 9))
    written = compress(compressed_stories.source, tmp_path / "c", settings)
    assert written is not None and written.schedule.boundaries == (5, 9)
    assert written.schedule.divergence == ()
    assert written.plan == compressed_stories.manifest.plan


def test_progress_and_timings(compressed_stories: Any, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    timings = Timings()
    compress(
        compressed_stories.source,
        tmp_path / "c",
        replace(FAST, reuse_statistics=False),
        progress=lambda *call: calls.append(call),
        timings=timings,
    )
    assert [c for c in calls if c[0] == "calibrate"] == [
        ("calibrate", i, 66) for i in range(67)
    ]  # 11 windows forward, and backward through 5 layers
    assert [c for c in calls if c[0] == "factorize"][-1] == ("factorize", 35, 35)
    name, done, total = calls[-1]
    assert (name, done) == ("store", total)
    phases = ["load", "tokenize", "calibrate", "factorize", "allocate", "store", "schedule", "write"]
    assert list(timings.seconds) == phases and all(s >= 0 for s in timings.seconds.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": ()}, "at least one keep"),
        ({"keep": (1.1,)}, r"keep must lie in \(0, 1\]"),
        ({"keep": (0.8, 0.9)}, "below the one before"),
        ({"allocator": "best"}, "allocator 'best' is not one of"),
        ({"score": "best"}, "score 'best' is not one of"),
        ({"factorization": "svd"}, "factorization 'svd' is not one of"),
        ({"storage": "sparse"}, "storage 'sparse' is not one of plain, pivoted"),
        ({"tokens": 1}, "tokens must be at least 2, not 1"),
        ({"window": 1}, "window must be at least 2, not 1"),
        ({"rank_step": 0}, "rank_step must be at least 1, not 0"),
        ({"tokens": 100}, "100 calibration tokens do not fill one window of 256"),
        ({"texts": ()}, "at least one calibration text"),
        ({"seed": -1}, "seed must lie between"),
        ({"seed": 2**70}, "seed must lie between"),
        ({"boundaries": (3,)}, "1 stages need 0 boundaries"),
        ({"keep": (0.9, 0.8, 0.7), "boundaries": (8, 4)}, "must not fall"),
        ({"keep": (0.9, 0.8), "boundaries": (0,)}, "at least 1"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(FAST, **change)


@pytest.fixture(scope="module")
def large(family_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random llama whose weights outweigh scales, norms and rotary tables."""
    import shutil

    import transformers

    folder = tmp_path_factory.mktemp("large") / "llama"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(family_model("llama") / name, folder / name)
    return open_model(str(folder))


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("int8", 7.5),
        ("int8", 5.5),
        ("int4", 3.6),
        ("float", 23),
        pytest.param("mixed", 6, marks=pytest.mark.full),  # takes a minute, as the next one
        ("mixed", 4),
    ],
)
def test_target_size_is_met_from_below(large: Any, tmp_path: Path, dtype: Any, bits: float) -> None:
    target = int(bits / 8 * large.config.parameters())
    settings = Settings(sizes=(target,), dtype=dtype, tokens=8192, window=256, storage="pivoted")
    written = compress(large, tmp_path / "c", settings)
    assert (
        written is not None and written.plan.num_stages == 1 and written.plan.keep[0] >= written.plan.kept(0)
    )
    export(tmp_path / "c", tmp_path / "b", dtype="fp32" if dtype == "float" else None)
    size = (tmp_path / "b" / "weights.bin").stat().st_size
    assert 0.94 * target <= size <= target
    if dtype != "float":
        assert size == file_size(large.config, written.plan, context=large.config.export_context())


def test_a_size_for_each_stage(large: Any, tmp_path: Path) -> None:
    sizes = tuple(int(b / 8 * large.config.parameters()) for b in (4.5, 4))
    settings = Settings(sizes=sizes, dtype="mixed", tokens=8192, window=256, boundaries=(8,))
    written = compress(large, tmp_path / "c", settings)
    assert written is not None
    bundle = export(tmp_path / "c", tmp_path / "b")
    assert (tmp_path / "b" / "weights.bin").stat().st_size <= sizes[0]
    assert bundle.stages[1].bytes < sizes[1]
    assert bundle.stages[1].bytes < bundle.stages[0].bytes


def test_target_sizes_out_of_reach(large: Any, tmp_path: Path) -> None:
    """Refused before anything is measured."""
    settings = Settings(sizes=(10_000,), dtype="int8", tokens=8192, window=256)
    seen: list[str] = []
    with pytest.raises(UsageError, match=r"is below .* the least"):
        compress(large, tmp_path / "c", settings, progress=lambda phase, *_: seen.append(phase))
    assert not seen
    assert not (tmp_path / "c").exists()


def test_a_size_larger_than_the_model_keeps_it_dense(large: Any, tmp_path: Path) -> None:
    settings = Settings(sizes=(10**9,), dtype="int8", tokens=8192, window=256)
    written = compress(large, tmp_path / "c", settings)
    assert written is not None and all(p.dense for p in written.plan.projections)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "mixed"}, "chosen for a size"),
        ({"sizes": (9,), "allocator": "fisher"}, "cannot meet a size"),
        ({"sizes": (9, 8), "boundaries": (1, 2)}, "2 stages need 1"),
        ({"dtype": "int3"}, "int3"),
    ],
)
def test_settings_of_sizes(wrong: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings(**wrong)


@pytest.mark.parametrize("name", ["compress", "load", "open_model", "set_stage"])
def test_the_public_functions_are_no_modules(name: str) -> None:
    """A module of the same name would take the function's place once it is imported."""
    import subprocess
    import sys

    program = (
        "import flrc_edge, importlib, pkgutil\n"
        f"assert callable(flrc_edge.{name})\n"
        "for module in pkgutil.iter_modules(flrc_edge.__path__, 'flrc_edge.'):\n"
        "    assert not module.name.endswith('.' + " + repr(name) + "), module.name\n"
        f"assert callable(flrc_edge.{name}) and flrc_edge.{name}.__name__ == {name!r}\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
