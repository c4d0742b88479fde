"""ASVD's rank search: hand-computed plans, a model whose insensitive projections are known, and its memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flrc_edge.baselines import rank_search
from flrc_edge.baselines.rank_search import (
    Search,
    check_reachable,
    search_ranks,
    sensitivities,
    truncation_ranks,
)
from flrc_edge.baselines.sensitivity_store import SensitivityStore, Truncation
from flrc_edge.baselines.svd import svd_factors
from flrc_edge.errors import UsageError
from flrc_edge.evaluation.perplexity import perplexity, torch_logits
from flrc_edge.models import open_model

STORIES = Path(__file__).parents[1] / "data" / "stories260k"


@pytest.mark.parametrize(
    ("shape", "step", "storage", "ranks"),
    [
        # A ratio of .1 is rank 28.8 of 576 × 576, of .5 144: halfway, so the smaller one.
        ((576, 576), 32, "plain", (32, 64, 96, 128, 160, 192, 224, 256)),
        ((192, 576), 32, "plain", (32, 64, 96, 128)),
        ((40, 40), 1, "plain", (2, 4, 6, 8, 10, 12, 14, 16, 18)),
        # r (m + n) - r² = ratio · m n: (1 - r / 40)² = 1 - ratio
        ((40, 40), 1, "pivoted", (2, 4, 7, 9, 12, 15, 18, 22, 27)),
        ((8, 8), 32, "plain", ()),
    ],
)
def test_truncation_ranks(shape: tuple[int, int], step: int, storage: Any, ranks: tuple[int, ...]) -> None:
    assert truncation_ranks(shape, step=step, storage=storage) == ranks


SQUARE = {"a": (40, 40), "b": (40, 40), "c": (40, 40)}  # 1600 parameters each, a rank costs 80


def curve(name: str, values: dict[int, float]) -> list[Truncation]:
    return [Truncation(name, rank, value) for rank, value in values.items()]


SENSITIVE = [
    *curve("a", {4: 30.0, 8: 20.0, 16: 15.0}),
    *curve("b", {4: 11.0, 8: 10.5, 16: 10.1}),  # hardly matters
    *curve("c", {4: 90.0, 8: 60.0, 16: 40.0}),  # matters most
]


@pytest.mark.parametrize(
    ("keep", "ranks"),
    [
        (1.0, (None, None, None)),
        (0.94, (None, 16, None)),  # 4480 of 4512
        (0.8, (None, 8, None)),  # 3840 of 3840
        (0.75, (None, 5, None)),  # b at 4 leaves 80: a rank more
        (0.66, (15, 4, None)),  # a at 16 makes 3200, too many; at 8 it leaves 608: back to 15
        (0.5, (6, 4, None)),
        (0.4, (4, 4, 16)),
        (0.35, (4, 4, 13)),
        (0.2, (4, 4, 4)),
    ],
)
def test_the_insensitive_projection_is_truncated_first(keep: float, ranks: tuple[int | None, ...]) -> None:
    plan = search_ranks(SQUARE, SENSITIVE, keep, step=1)
    assert tuple(p.ranks[0] for p in plan.projections) == ranks
    assert [p.name for p in plan.projections] == ["a", "b", "c"]
    assert keep * 4800 - 80 < plan.activated(0) <= keep * 4800
    assert plan.allocator == "asvd" and plan.keep == (keep,)


def test_the_order_of_the_measurements_does_not_matter() -> None:
    shuffled = SENSITIVE[::-2] + SENSITIVE[-2::-2]
    assert len(shuffled) == len(SENSITIVE)
    assert search_ranks(SQUARE, shuffled, 0.5, step=1) == search_ranks(SQUARE, SENSITIVE, 0.5, step=1)


def test_a_smaller_rank_that_measures_better_is_taken() -> None:
    found = [*curve("a", {4: 10.0, 8: 20.0, 16: 30.0}), *curve("b", {4: 50.0}), *curve("c", {4: 60.0})]
    plan = search_ranks(SQUARE, found, 0.74, step=1)  # 3552: a at 4 leaves 32
    assert [p.ranks[0] for p in plan.projections] == [4, None, None]


def test_given_back_in_rank_steps_and_pivoted_costs() -> None:
    plan = search_ranks(SQUARE, SENSITIVE, 0.66, step=4)
    assert [p.ranks[0] for p in plan.projections] == [12, 4, None]  # a at 15 is no multiple of 4
    pivoted = search_ranks(SQUARE, SENSITIVE, 0.66, step=1, storage="pivoted")
    # r (m + n) - r²: b at 4 304, a at 16 1024: 2928, and of the 240 left a takes 1264 - 1024: rank 21 costs 1239.
    assert [(p.ranks[0], p.storage) for p in pivoted.projections] == [
        (21, "pivoted"), (4, "pivoted"), (None, "plain"),
    ]  # fmt: skip
    assert pivoted.activated(0) == 1239 + 304 + 1600


def test_a_keep_that_no_truncation_meets() -> None:
    with pytest.raises(
        UsageError, match=r"keep 0\.19 is below 0\.200, the least that ASVD's truncations leave"
    ):
        search_ranks(SQUARE, SENSITIVE, 0.19, step=1)
    with pytest.raises(UsageError, match=r"keep must lie in \(0, 1\], not 0"):
        search_ranks(SQUARE, SENSITIVE, 0.0, step=1)
    check_reachable(SQUARE, (1.0, 0.1), step=1)  # rank 2 of 40 × 40 is a tenth
    with pytest.raises(UsageError, match=r"keep 0\.05 is below 0\.100"):
        check_reachable(SQUARE, (0.9, 0.05), step=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "the search's samples must be at least 1, not 0"),
        ({"window": 1}, "the search's window must be at least 2, not 1"),
        ({"alpha": -1.0}, "alpha must be 0 or more, not -1"),
        ({"alpha": float("nan")}, "alpha must be 0 or more, not nan"),
    ],
)
def test_search_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Search(**fields)


DEAD = "model.layers.4.mlp.down_proj"  # its weight is 0, so gate and up of its layer do not matter either
IRRELEVANT = {DEAD, "model.layers.4.mlp.gate_proj", "model.layers.4.mlp.up_proj"}
RATIOS = (0.1, 0.4)


@pytest.fixture(scope="module")
def toy() -> Any:
    """stories260k with a dead MLP, text it wrote itself, SVD factors, and its sensitivities."""
    torch.set_num_threads(1)
    loaded = open_model(str(STORIES))
    with torch.no_grad():
        loaded.model.get_parameter(f"{DEAD}.weight").zero_()
    torch.manual_seed(0)
    model: Any = loaded.model
    start = torch.full((2, 1), loaded.tokenizer.bos_token_id)
    ids = model.generate(start, max_length=128, min_length=128, do_sample=True, pad_token_id=0)
    names = [p.name for p in loaded.config.projections()]
    factors = {n: svd_factors(loaded.model.get_parameter(f"{n}.weight").detach(), name=n) for n in names}
    kinds = [type(m) for m in model.modules()]
    found = sensitivities(loaded, factors, ids, step=4, ratios=RATIOS)
    assert kinds == [type(m) for m in model.modules()]
    return loaded, factors, ids, found


def test_sensitivities_are_perplexities_of_single_truncations(toy: Any) -> None:
    loaded, factors, ids, found = toy
    dense = perplexity(torch_logits(loaded.model), ids)
    assert len(found) == 2 * 35 and all(t.seconds > 0 for t in found)
    for t in found:
        if t.name in IRRELEVANT:
            assert t.perplexity == pytest.approx(dense, rel=1e-6)
        else:
            assert abs(t.perplexity / dense - 1) > 1e-6
    name = "model.layers.1.mlp.up_proj"
    weight = loaded.model.get_parameter(f"{name}.weight")
    before = weight.detach().clone()
    for t in found:
        if t.name == name:
            f = factors[name]
            with torch.no_grad():
                weight.copy_(f.U[:, : t.rank] @ f.V[: t.rank])
            assert t.perplexity == pytest.approx(perplexity(torch_logits(loaded.model), ids), rel=1e-4)
            with torch.no_grad():
                weight.copy_(before)


def test_projections_that_do_not_matter_are_truncated_first(toy: Any) -> None:
    loaded, _, _, found = toy
    shapes = {p.name: p.shape for p in loaded.config.projections()}
    total = sum(m * n for m, n in shapes.values())
    least = {name: min(t.rank for t in found if t.name == name) for name in IRRELEVANT}
    freed = sum(shapes[n][0] * shapes[n][1] - r * sum(shapes[n]) for n, r in least.items())
    plan = search_ranks(shapes, found, 1 - freed / total + 1e-6, step=4)
    assert {p.name for p in plan.projections if not p.dense} == IRRELEVANT
    assert {p.name: p.ranks[0] for p in plan.projections if not p.dense} == least


def test_what_was_measured_is_not_measured_again(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, factors, ids, found = toy
    path = tmp_path / "new" / "s.json"
    store, count = SensitivityStore(path), 0
    assert not store.resumed

    def stopping(*arguments: Any) -> float:
        nonlocal count
        count += 1
        if count > 5:
            raise KeyboardInterrupt
        return perplexity(*arguments)

    monkeypatch.setattr(rank_search, "perplexity", stopping)
    with pytest.raises(KeyboardInterrupt):
        sensitivities(loaded, factors, ids, step=4, ratios=RATIOS, store=store)
    assert not store.resumed and len(json.loads(path.read_text())) == 4  # two whole projections
    assert perplexity(torch_logits(loaded.model), ids) < found[0].perplexity  # the dense layer is back

    monkeypatch.setattr(rank_search, "perplexity", lambda *_: 7.0)
    store = SensitivityStore(path)
    resumed = sensitivities(loaded, factors, ids, step=4, ratios=RATIOS, store=store)
    assert store.resumed
    assert [t.perplexity for t in resumed[:4]] == [pytest.approx(t.perplexity) for t in found[:4]]
    assert {t.perplexity for t in resumed[4:]} == {7.0}
    monkeypatch.setattr(rank_search, "perplexity", lambda *_: pytest.fail("measured again"))
    assert sensitivities(loaded, factors, ids, step=4, ratios=RATIOS, store=SensitivityStore(path)) == resumed


@pytest.mark.parametrize("content", ["{", "[1]", '[{"name": "a"}]', '{"a": 1}', "3"])
def test_a_damaged_store_is_no_error(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "s.json"
    path.write_text(content)
    store = SensitivityStore(path)
    assert store.get("a", 1) is None and "damaged" in caplog.text
    store.put([Truncation("a", 1, 2.5, 0.5)])
    assert SensitivityStore(path).get("a", 1) == Truncation("a", 1, 2.5, 0.5)


def test_a_store_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = SensitivityStore(tmp_path / "file" / "s.json")
    store.put([Truncation("a", 1, 2.5)])
    store.put([Truncation("a", 2, 2.5)])
    assert store.get("a", 1) == Truncation("a", 1, 2.5) and caplog.text.count("could not be stored") == 1
