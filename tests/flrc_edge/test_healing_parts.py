"""The parts of healing: KL and its gradient, order of windows and stages, learning rate."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import flrc_edge
from flrc_edge.chunks import Chunk
from flrc_edge.healing import distillation
from flrc_edge.healing.balance import balance, balanced, stored_tensors
from flrc_edge.healing.distillation import Arithmetic, Distiller, fast_bfloat16
from flrc_edge.healing.session import stage_order
from flrc_edge.healing.trainer import rate
from flrc_edge.healing.windows import TrainingWindows, training_windows
from flrc_edge.lowrank import LowRankLinear
from flrc_edge.pivoting import pivot
from flrc_edge.texts import WeightedText

CPU = torch.device("cpu")


@pytest.mark.parametrize("logits", [512 * 7, distillation.LOGITS])
def test_gradient_is_that_of_the_kl(stories: Path, monkeypatch: pytest.MonkeyPatch, logits: int) -> None:
    """Also where the last chunk of tokens is shorter than the others."""
    monkeypatch.setattr(distillation, "LOGITS", logits)
    teacher, student = (flrc_edge.open_model(str(stories)).model for _ in range(2))
    torch.manual_seed(0)
    weight = student.get_parameter("model.layers.2.mlp.up_proj.weight")
    with torch.no_grad():
        weight += 0.05 * torch.randn_like(weight)
    ids = torch.randint(3, 512, (2, 30))
    total = Distiller(student, teacher, Arithmetic.of("float32", CPU)).backward(ids, tokens=60)
    found = weight.grad
    assert found is not None
    weight.grad = None
    with torch.no_grad():
        target = teacher(ids).logits.log_softmax(-1)
    expected = F.kl_div(student(ids).logits.log_softmax(-1), target, log_target=True, reduction="sum")
    (expected / 60).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-4) and total.item() > 1
    assert weight.grad is not None
    assert (found - weight.grad).norm() < 1e-4 * weight.grad.norm()


def test_the_same_model_does_not_diverge(stories: Path) -> None:
    model = flrc_edge.open_model(str(stories)).model
    distiller = Distiller(model, model, Arithmetic.of("float32", CPU))
    ids = torch.arange(3, 35)[None]
    assert distiller.divergence(ids, distiller.target(ids)).item() == pytest.approx(0, abs=1e-6)


def test_precision() -> None:
    assert Arithmetic.of("float32", CPU).dtype == torch.float32
    assert Arithmetic.of("bfloat16", CPU).dtype == torch.bfloat16
    fast = fast_bfloat16(CPU)
    assert Arithmetic.of("auto", CPU).dtype == (torch.bfloat16 if fast else torch.float32)


def test_rate() -> None:
    assert rate(0.0, 0.1) == 0 and rate(0.05, 0.1) == pytest.approx(0.5) and rate(0.1, 0.1) == 1
    assert rate(0.55, 0.1) == pytest.approx(0.5) and rate(1.0, 0.1) == pytest.approx(0, abs=1e-12)
    assert rate(0.0, 0.0) == 1 and rate(1.5, 0.0) == pytest.approx(0, abs=1e-12)
    falling = [rate(0.1 + i / 100, 0.1) for i in range(91)]
    assert falling == sorted(falling, reverse=True)


def test_stages_take_turns() -> None:
    assert list(islice(stage_order((1, 1, 1)), 6)) == [0, 1, 2, 0, 1, 2]
    weighted = list(islice(stage_order((2, 1, 1)), 40))
    assert Counter(weighted) == {0: 20, 1: 10, 2: 10}
    assert all(Counter(weighted[i : i + 4])[0] == 2 for i in range(0, 40, 4))


def windows_of(*counts: int) -> TrainingWindows:
    """Windows of one token that says which text and which window they are."""
    train = tuple(torch.arange(100 * t, 100 * t + n)[:, None] for t, n in enumerate(counts))
    return TrainingWindows(train, tuple(float(n) for n in counts), torch.zeros(1, 1), ())


def test_no_window_comes_again_before_the_text_is_used_up() -> None:
    drawn = [int(w) for w in islice(windows_of(20, 5).draw(0), 200)]
    for text, count in ((0, 20), (1, 5)):
        of_text = [w for w in drawn if w // 100 == text]
        assert len(of_text) > 2 * count
        rounds = [of_text[i : i + count] for i in range(0, len(of_text) - count, count)]
        assert all(len(set(r)) == count for r in rounds) and rounds[0] != rounds[1]
    share = sum(w >= 100 for w in drawn) / 200
    assert 0.1 < share < 0.3


def test_the_seed_decides_the_order() -> None:
    def draw(seed: int) -> list[int]:
        return [int(w) for w in islice(windows_of(20, 5).draw(seed), 50)]

    assert draw(1) == draw(1) != draw(2)


def test_held_out_windows_are_never_drawn(stories: Path) -> None:
    tokenizer = flrc_edge.open_model(str(stories)).tokenizer
    texts = (WeightedText("wikitext2", 3), WeightedText("austen"))
    windows = training_windows(tokenizer, texts, length=96, validation=8)
    assert len(windows.validation) == 8 and windows.weights == (3, 1)
    assert [s.name for s in windows.sources] == ["wikitext2", "austen"]
    held = {tuple(w.tolist()) for w in windows.validation}
    drawn = {tuple(w.tolist()) for part in windows.train for w in part}
    assert len(held) == 8 and not held & drawn
    assert all(w[0] == tokenizer.bos_token_id for w in windows.validation)
    few = training_windows(tokenizer, texts, length=96, validation=1)
    assert len(few.validation) == 2  # at least one of each text


@pytest.mark.parametrize("storage", ["plain", "pivoted"])
@pytest.mark.parametrize(("m", "n", "r"), [(12, 20, 5), (20, 12, 12), (7, 7, 7)])
def test_balanced_factors(storage: str, m: int, n: int, r: int) -> None:
    generator = torch.Generator().manual_seed(m)
    u, v = torch.randn(m, r, generator=generator), 100 * torch.randn(r, n, generator=generator)
    chunk = Chunk(v, u)
    if storage == "pivoted":
        rows, coefficients, order = pivot(u, v)
        chunk = Chunk(rows, coefficients, order)
    new_u, new_v = balanced(chunk)
    assert new_u.shape == (m, r) and new_v.shape == (r, n)
    assert (new_u @ new_v - u @ v).norm() < 1e-5 * (u @ v).norm()
    gram = new_u.T @ new_u
    assert (gram - new_v @ new_v.T).norm() < 1e-4 * gram.norm()
    assert (gram - gram.diag().diag()).norm() < 1e-4 * gram.norm()


@pytest.mark.parametrize("pivoted", [set[str](), {"layer"}])
def test_trained_factors_are_stored_as_the_plan_says(pivoted: set[str]) -> None:
    torch.manual_seed(1)
    u, v, x = torch.randn(9, 4), torch.randn(4, 6), torch.randn(3, 6)
    model = torch.nn.ModuleDict({"layer": LowRankLinear([Chunk(v, u)], ranks=(4,))})
    expected = model["layer"](x)
    balance(model)
    assert torch.allclose(model["layer"](x), expected, atol=1e-4)
    tensors = dict(stored_tensors(model, pivoted))
    found = Chunk(*(tensors.get(f"layer.chunks.0.{part}") for part in ("V", "U", "order")))  # type: ignore[arg-type]
    assert found.U.shape == ((5, 4) if pivoted else (9, 4)) and (found.order is not None) == bool(pivoted)
    assert torch.allclose(LowRankLinear([found], ranks=(4,))(x), expected, atol=1e-4)
    if not pivoted:
        assert torch.allclose(found.U.norm(dim=0), torch.ones(4))
