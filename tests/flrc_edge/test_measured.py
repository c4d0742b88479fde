"""Measured losses against brute force on a real model, and what allocators make of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from flrc_edge import allocation
from flrc_edge.calibration import calibrate
from flrc_edge.errors import NumericalError
from flrc_edge.factorization import Factors
from flrc_edge.measured import measured_losses
from flrc_edge.measurements import calibration_windows, with_losses
from flrc_edge.planning import factorize_all
from flrc_edge.settings import Settings

NAMES = ("model.layers.0.self_attn.k_proj", "model.layers.2.mlp.gate_proj", "model.layers.4.mlp.down_proj")


@pytest.fixture(scope="module")
def setting(compressed_stories: Any) -> tuple[Any, torch.Tensor, dict[str, Factors]]:
    loaded = compressed_stories.source
    settings = replace(compressed_stories.settings, tokens=1024)
    ids = calibration_windows(loaded, settings).ids
    statistics = calibrate(loaded.model, [p.name for p in loaded.config.projections()], ids)
    return loaded, ids, factorize_all(loaded, statistics.moments, storage="pivoted")


@pytest.mark.parametrize("full_rank", [True, False], ids=["all directions", "directions below break-even"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_second_moment_of_first_order_changes(
    setting: Any, name: str, full_rank: bool, whole_backward: Any
) -> None:
    loaded, ids, factors = setting
    f = factors[name]
    if not full_rank:
        f = replace(f, U=f.U[:, :12], V=f.V[:12])
    found = measured_losses(loaded.model, {name: f}, ids)[name]
    # Brute force: the gradient and input of every token, and the whole matrix that a rank drops.
    module, seen = loaded.model.get_submodule(name), {}
    handles = [
        module.register_forward_hook(lambda _, i, o: seen.update(x=i[0][0].detach())),
        module.register_full_backward_hook(lambda _, __, g: seen.update(g=g[0][0].detach())),
    ]
    module.weight.requires_grad_(True)
    sums = torch.zeros(f.U.shape[1] + 1, dtype=torch.float64)
    for i, window in enumerate(ids):
        whole_backward(loaded.model, window, labels="sampled", seed=i)
        for rank in range(len(sums)):
            dropped = module.weight.detach().double() - f.U[:, :rank].double() @ f.V[:rank].double()
            sums[rank] += ((seen["x"].double() @ dropped.T) * seen["g"].double()).sum(1).square().sum()
    module.weight.grad = None
    module.weight.requires_grad_(False)
    for handle in handles:
        handle.remove()
    expected = 0.5 * sums / (ids.shape[0] * (ids.shape[1] - 1))
    running = torch.flip(torch.cummax(torch.flip(expected, [0]), 0).values, [0])
    assert torch.allclose(found, running, rtol=1e-3, atol=1e-7)


def test_the_model_is_left_as_it_was(setting: Any) -> None:
    loaded, ids, factors = setting
    before = {n: (p.requires_grad, p.grad) for n, p in loaded.model.named_parameters()}
    measured_losses(loaded.model, factors, ids[:1])
    assert before == {n: (p.requires_grad, p.grad) for n, p in loaded.model.named_parameters()}
    assert not any(m._forward_hooks for m in loaded.model.modules())


def test_losses_fall_to_nothing_and_repeat(setting: Any) -> None:
    loaded, ids, factors = setting
    a, b = (measured_losses(loaded.model, factors, ids[:2]) for _ in range(2))
    for name, losses in a.items():
        assert torch.equal(losses, b[name])
        assert all(x >= y for x, y in pairwise(losses.tolist())), name
        assert losses[-1] < 1e-6 * losses[0], name


def test_not_finite_is_an_error(setting: Any) -> None:
    loaded, ids, factors = setting
    head = loaded.model.model.norm.weight
    kept = head.detach().clone()
    with torch.no_grad():
        head[0] = float("nan")
    try:
        with pytest.raises(NumericalError, match="window 0"):
            measured_losses(loaded.model, factors, ids[:1])
    finally:
        with torch.no_grad():
            head.copy_(kept)


def test_the_cache_gives_the_same_losses(setting: Any, cache: Any) -> None:
    loaded, _, factors = setting
    settings = Settings(keep=(0.8,), tokens=1024, window=256, rank_step=8, storage="pivoted")
    first = with_losses(loaded, settings, factors, "f")
    assert len(list((cache / "losses").iterdir())) == 1
    again = with_losses(loaded, settings, factors, "f")
    assert all(torch.equal(first[n].measured, again[n].measured) for n in factors)  # type: ignore[arg-type]
    with_losses(loaded, settings, factors, "g")
    assert len(list((cache / "losses").iterdir())) == 2


def test_curves_take_them(setting: Any) -> None:
    loaded, ids, factors = setting
    with pytest.raises(ValueError, match="not measured"):
        allocation.measured_curves(factors, step=8)
    losses = measured_losses(loaded.model, factors, ids[:1])
    known = {n: replace(f, measured=losses[n]) for n, f in factors.items()}
    for curve in allocation.measured_curves(known, step=8, storage="pivoted"):
        assert curve.losses[-1] == 0 and curve.losses[0] == losses[curve.name][curve.ranks[0]]


@pytest.mark.parametrize("labels", ["sampled", "text"])
def test_labels(setting: Any, labels: Any) -> None:
    loaded, ids, _ = setting
    names = list(NAMES)
    a, b = (calibrate(loaded.model, names, ids[:2], labels=labels) for _ in range(2))
    assert a.loss == b.loss and torch.equal(a.moments[names[0]].gradient, b.moments[names[0]].gradient)
    other = calibrate(loaded.model, names, ids[:2], labels="text" if labels == "sampled" else "sampled")
    assert a.loss != other.loss
    # What is measured on activations does not depend on the labels.
    assert torch.equal(a.moments[names[0]].energy, other.moments[names[0]].energy)


def test_sampled_labels_have_the_entropy_of_the_model(setting: Any) -> None:
    """The expected loss of sampled labels is the entropy of the prediction."""
    loaded, ids, _ = setting
    with torch.no_grad():
        log_probs = torch.cat([loaded.model(w[None]).logits[0, :-1].log_softmax(-1) for w in ids])
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean().item()
    found = calibrate(loaded.model, list(NAMES[:1]), ids, labels="sampled").loss
    spread = log_probs.exp().mul(log_probs.square()).sum(-1).mean().item() ** 0.5 / len(log_probs) ** 0.5
    assert abs(found - entropy) < 4 * spread
