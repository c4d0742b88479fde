"""Recipes and number formats side by side, on stories260k."""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch

from flrc_edge import measurements, recipe_bench
from flrc_edge.baselines.rank_search import Search
from flrc_edge.baselines.sensitivity_store import Truncation
from flrc_edge.calibration import Moments
from flrc_edge.compare import Comparison, compare
from flrc_edge.compression import compress
from flrc_edge.errors import UsageError
from flrc_edge.evaluation.perplexity import perplexity, torch_logits
from flrc_edge.formats import compare_formats
from flrc_edge.planning import plan_ranks
from flrc_edge.recipes import RECIPES, Recipe
from flrc_edge.settings import Settings
from flrc_edge.texts import WeightedText, token_windows

TEXTS = ("austen-heldout", "wikitext2-heldout")
SEARCH = Search(samples=2, window=64)
BY_NAME = {r.name: r for r in RECIPES}


def dense_perplexity(source: Any, text: str, windows: int) -> float:
    ids = token_windows(source.tokenizer, (WeightedText(text),), windows=windows, length=256).ids
    return perplexity(torch_logits(source.model), ids)


@pytest.fixture(scope="module")
def everything(compressed_stories: Any) -> Comparison:
    """All recipes at two keeps on two texts, and the pivoted form of one."""
    settings = replace(compressed_stories.settings, reuse_statistics=False)
    source = compressed_stories.source
    kinds = [type(m) for m in source.model.modules()]
    result = compare(
        source,
        settings,
        keeps=(0.9, 0.7),
        texts=TEXTS,
        windows=2,
        recipes=(*RECIPES, BY_NAME["svd-llm"].stored("pivoted")),
        search=SEARCH,
    )
    assert kinds == [type(m) for m in source.model.modules()]
    return result


def test_every_recipe_at_every_keep_on_every_text(compressed_stories: Any, everything: Comparison) -> None:
    names = [*BY_NAME, "svd-llm-pivoted"]
    assert [(f.keep, f.recipe, f.text) for f in everything.figures] == [
        (keep, name, text) for keep in (0.9, 0.7) for name in names for text in TEXTS
    ]
    assert everything.window == 256 and everything.calibration_tokens == 14 * 256
    assert everything.labels == "sampled"  # and two of 16 windows are held out for the search
    assert everything.model == "stories260k" and [t.name for t in everything.texts] == [*TEXTS]
    dense = {}
    for t in everything.texts:
        dense[t.name] = dense_perplexity(compressed_stories.source, t.name, 2)
        assert t.tokens == 512 and t.dense_perplexity == pytest.approx(dense[t.name], abs=1e-3)
    reference = {(f.keep, f.text): f for f in everything.figures if f.recipe == "svd-llm"}
    for f in everything.figures:
        assert f.growth == pytest.approx(log(f.perplexity) - log(dense[f.text]), abs=1e-4)
        base = reference[f.keep, f.text].growth
        assert f.ratio == (pytest.approx(f.growth / base, rel=1e-2) if base > 0 else None)
    assert {f.storage for f in everything.figures if f.recipe == "svd-llm-pivoted"} == {"pivoted"}
    assert {"calibrate", "channel means", "asvd search", "factorize svd", "perplexity"} <= set(
        everything.seconds
    )


def test_all_recipes_hold_the_same_parameters(everything: Comparison) -> None:
    total = 5 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 172)
    for keep in (0.9, 0.7):
        sizes = {f.recipe: f.parameters for f in everything.figures if f.keep == keep}
        # Within one rank of the widest projection and the gap between break-even and dense.
        assert all(0.994 * keep * total < size <= keep * total for size in sizes.values()), sizes
        assert all(f.kept == round(f.parameters / total, 5) for f in everything.figures if f.keep == keep)


def test_the_order_that_is_known(everything: Comparison) -> None:
    """On WikiText-2, where stories260k loses most: plain SVD is worst, whitening and spectra help, pivoting too."""
    growth = {f.recipe: f.growth for f in everything.figures if (f.keep, f.text) == (0.7, TEXTS[1])}
    assert max(growth, key=lambda name: growth[name]) == "svd"
    assert growth["svd"] > growth["asvd"] > growth["svd-llm"] > growth["spectrum-one-sided"]
    assert growth["svd-llm-pivoted"] < growth["svd-llm"]
    less = {f.recipe: f.growth for f in everything.figures if (f.keep, f.text) == (0.9, TEXTS[1])}
    assert all(less[name] < growth[name] for name in growth)


def test_rank_search_times(everything: Comparison) -> None:
    rows = {(s.search, s.counted): s for s in everything.searches}
    assert everything.searches[0].search == "asvd" and len(rows) == 1 + 3 * 3 + 2 * 2
    seconds = everything.seconds
    asvd = everything.searches[0]
    assert asvd.tokens == 128 and "perplexities" in asvd.counted and "earlier" not in asvd.counted
    parts = seconds["channel means"] + seconds["factorize asvd"] + seconds["asvd search"]
    assert 0.7 * parts - 0.05 < asvd.seconds < parts + 0.1
    for search in ("fisher", "spectrum, one-sided", "spectrum, two-sided"):
        alone, samples, whole = (s for s in everything.searches if s.search == search)
        assert (alone.tokens, samples.tokens, whole.tokens) == (0, 128, 14 * 256)
        assert 0 < alone.seconds < samples.seconds and alone.seconds < 0.5 * asvd.seconds
        assert whole.seconds >= seconds["calibrate"] - 0.006  # which is rounded to hundredths
        assert ("factors" in samples.counted) == (search != "fisher")
    for search in ("measured, two-sided", "search, two-sided"):
        alone, whole = (s for s in everything.searches if s.search == search)
        assert "factors, losses of every rank" in whole.counted and whole.tokens == 14 * 256
        assert whole.seconds >= seconds["calibrate"] + seconds["measure two-sided"] - 0.011
    assert not any("uniform" in s.search for s in everything.searches)


def test_the_search_is_run_once_and_remembered(
    compressed_stories: Any, monkeypatch: pytest.MonkeyPatch, cache: Any
) -> None:
    calls = []
    real = recipe_bench.sensitivities

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(options["store"])
        return real(*arguments, **options)

    monkeypatch.setattr(recipe_bench, "sensitivities", counted)
    options: dict[str, Any] = {
        "keeps": (0.9, 0.7), "texts": TEXTS[:1], "windows": 1, "recipes": (BY_NAME["asvd"],), "search": SEARCH,
    }  # fmt: skip
    source, settings = compressed_stories.source, compressed_stories.settings
    first = compare(source, settings, **options)
    assert len(calls) == 1 and not calls[0].resumed
    assert [f.ratio for f in first.figures] == [None] * 2  # svd-llm was not measured
    again = compare(source, settings, **options)
    assert len(calls) == 2 and calls[1].resumed and again.figures == first.figures
    assert "partly measured by an earlier run" in again.searches[0].counted
    assert again.searches[0].seconds > 5 * again.seconds["asvd search"]
    files = {*(cache / "sensitivities").iterdir()}

    def stop(*_: Any, **options: Any) -> None:
        options["store"].put([Truncation("a", 1, 2.0)])
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe_bench, "sensitivities", stop)
    for search in (replace(SEARCH, window=32), replace(SEARCH, alpha=0.25)):
        with pytest.raises(KeyboardInterrupt):
            compare(source, settings, **{**options, "search": search})
    assert len(files) == 1 and len({*(cache / "sensitivities").iterdir()} - files) == 2


def test_cached_losses_are_not_timed(
    compressed_stories: Any, monkeypatch: pytest.MonkeyPatch, cache: Any
) -> None:
    measured = measurements.measured_losses
    calls = []
    monkeypatch.setattr(measurements, "measured_losses", lambda *a, **k: calls.append(1) or measured(*a, **k))
    options: dict[str, Any] = {"keeps": (0.9,), "texts": TEXTS[:1], "windows": 1, "search": SEARCH}
    source, settings = compressed_stories.source, compressed_stories.settings
    ours = BY_NAME["measured-two-sided"]
    compare(source, settings, recipes=(ours,), **options)
    compare(source, settings, recipes=(ours,), **options)
    assert len(calls) == 1  # once, then from the cache
    result = compare(source, settings, recipes=(BY_NAME["asvd"], ours), **options)
    assert len(calls) == 2
    (whole,) = (s for s in result.searches if s.counted.endswith("statistics given"))
    assert whole.seconds >= result.seconds["measure two-sided"] > 0


def test_no_search_no_timing(compressed_stories: Any) -> None:
    result = compare(
        compressed_stories.source,
        compressed_stories.settings,
        keeps=(0.9,),
        texts=TEXTS[:1],
        windows=1,
        recipes=(BY_NAME["flra-gw2"],),
    )
    assert result.searches == () and "channel means" not in result.seconds and len(result.figures) == 1


@pytest.mark.parametrize(
    "recipe",
    [
        BY_NAME["svd-llm"],
        BY_NAME["flra-g2-mean"],
        BY_NAME["flra-gw2-two-sided"].stored("pivoted"),
        BY_NAME["spectrum-two-sided"],
        BY_NAME["search-two-sided"],
    ],
    ids=lambda r: r.name,
)
def test_a_figure_is_what_the_checkpoint_has(compressed_stories: Any, tmp_path: Any, recipe: Recipe) -> None:
    import flrc_edge

    source, settings = compressed_stories.source, replace(compressed_stories.settings, keep=(0.8,))
    result = compare(source, settings, keeps=(0.8,), texts=TEXTS[:1], windows=2, recipes=(recipe,))
    chosen = replace(
        settings,
        allocator=recipe.allocator,
        score=recipe.score,
        factorization=recipe.factorization,
        storage=recipe.storage,
    )
    made = compress(source, tmp_path / "c", chosen)
    assert made is not None
    ids = token_windows(source.tokenizer, (WeightedText(TEXTS[0]),), windows=2, length=256).ids
    value = perplexity(torch_logits(flrc_edge.load(tmp_path / "c")), ids)
    assert [(f.perplexity, f.parameters) for f in result.figures] == [
        (pytest.approx(value, rel=1e-4), made.plan.activated(0))
    ]


TOY = {"a": (64, 64), "b": (64, 192)}  # a rank costs 128 and 256, of 4096 and 12288


@pytest.mark.parametrize(
    ("recipe", "budget", "ranks"),
    [
        # ΣG² 4096 and 110592: 1 to 27; the mean of a weight 1 to 9, its root 1 to 3.
        ("flra-g2-sum", 1 * 128 + 27 * 256, (1, 27)),
        ("flra-g2-mean", 4 * 128 + 36 * 256, (4, 36)),
        ("flra-g2-rms", 10 * 128 + 30 * 256, (10, 30)),
        # Σ(G∘W)² 5 and 60: 1 to 12; root of the mean 1 to 2.
        ("flra-gw2", 3 * 128 + 36 * 256, (3, 36)),
        ("flra-gw2-rms", 15 * 128 + 30 * 256, (15, 30)),
        # 1 to 27 would be beyond break-even: b is dense and a has what is left.
        ("flra-g2-sum", 12288 + 6 * 128, (6, None)),
    ],
)
def test_flra_ranks_are_proportional_to_the_score(
    recipe: str, budget: int, ranks: tuple[int | None, ...]
) -> None:
    nothing = torch.zeros(64, 64, dtype=torch.float64)
    moments = {
        "a": Moments(nothing, nothing, 1.0, fisher_g2=4096.0, fisher_gw2=5.0),
        "b": Moments(nothing, nothing, 1.0, fisher_g2=110592.0, fisher_gw2=60.0),
    }
    chosen = BY_NAME[recipe]
    assert chosen.allocator == "fisher" and chosen.factorization == "one-sided"
    settings = Settings(
        keep=(budget / 16384,), allocator="fisher", score=chosen.score, storage="plain", rank_step=1
    )
    plan = plan_ranks(TOY, settings, moments, {})
    assert tuple(p.ranks[0] for p in plan.projections) == ranks


def test_what_cannot_be_met_is_refused_before_calibration(
    compressed_stories: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe_bench, "measure", lambda *a, **k: pytest.fail("calibrated"))
    good: dict[str, Any] = {"keeps": (0.9,), "texts": TEXTS}
    for change, message in [
        ({"keeps": (0.9, 0.01)}, r"keep 0\.01 is below"),
        ({"texts": ("nowhere",)}, "there is no text"),
        ({"texts": ()}, "name at least one text"),
        ({"recipes": ()}, "name at least one recipe"),
        ({"keeps": ()}, "one keep"),
        ({"texts": (TEXTS[0], TEXTS[0])}, "the text austen-heldout is named twice"),
        ({"recipes": RECIPES[:1] * 2}, "the recipe svd is named twice"),
        ({"search": Search(samples=100_000)}, "tokens, "),
    ]:
        with pytest.raises(UsageError, match=message):
            compare(compressed_stories.source, compressed_stories.settings, **{**good, **change})
    small = replace(compressed_stories.settings, rank_step=1)
    with pytest.raises(UsageError, match=r"keep 0\.05 is below .*, the least that ASVD's truncations leave"):
        compare(compressed_stories.source, small, keeps=(0.05,), texts=TEXTS, recipes=(BY_NAME["asvd"],))


def test_recipes() -> None:
    assert len(BY_NAME) == len(RECIPES) == 14 and {r.storage for r in RECIPES} == {"plain"}
    recipe = BY_NAME["spectrum-two-sided"]
    assert recipe.stored("plain") is recipe
    assert recipe.stored("pivoted") == Recipe(
        "spectrum-two-sided-pivoted", "two-sided", "spectrum", storage="pivoted"
    )
    assert recipe.ranks == "spectrum" and BY_NAME["flra-g2-rms"].ranks == "fisher g2-rms"


def test_formats(compressed_stories: Any) -> None:
    source = compressed_stories.source
    result = compare_formats(source, text="austen-heldout", windows=2, window=128)
    by_name = {(f.dtype, f.head, f.compensated): f for f in result.formats}
    exact = by_name["fp32", "fp32", False]
    assert exact.mean_kl == 0 and exact.top1 == 1
    ids = token_windows(source.tokenizer, (WeightedText("austen-heldout"),), windows=2, length=128).ids
    assert exact.perplexity == pytest.approx(perplexity(torch_logits(source.model), ids), rel=1e-3)
    sizes = [f.weight_bytes for f in result.formats]
    assert (
        sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    )  # with compensation or without, in blocks of 32 or of 128
    kls = [f.mean_kl for f in result.formats]
    assert 0 < kls[1] < 0.01 and kls[1] < kls[2] <= kls[3] < 1
    for dtype in ("int4", "int4/128"):
        assert by_name[dtype, dtype, True].mean_kl < 0.8 * by_name[dtype, dtype, False].mean_kl
    assert all(0.5 < f.top1 <= 1 for f in result.formats) and result.tokens == 256
