"""The walk through the layers and input correction, on a real model."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from flrc_edge.correction import corrected, fit_corrected
from flrc_edge.factorization import factorize
from flrc_edge.layerwise import GroupInputs, walk
from flrc_edge.measurements import calibration_windows, measure
from flrc_edge.placement import compressed, placed
from flrc_edge.planning import factorize_all, plan_ranks


@pytest.fixture(scope="module")
def setting(compressed_stories: Any) -> Any:
    loaded = compressed_stories.source
    settings = replace(compressed_stories.settings, keep=(0.6,), allocator="spectrum", tokens=4096)
    statistics, _ = measure(loaded, settings)
    factors = factorize_all(loaded, statistics.moments)
    shapes = {p.name: p.shape for p in loaded.config.projections()}
    plan = plan_ranks(shapes, settings, statistics.moments, factors)
    return loaded, settings, statistics.moments, factors, plan


def groups(loaded: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for p in loaded.config.projections():
        found.setdefault(p.group, []).append(p.name)
    return found


def test_an_unchanged_model_sees_the_same_inputs(setting: Any) -> None:
    loaded, _, _, _, _ = setting
    ids = calibration_windows(loaded, setting[1]).ids[:3]
    seen: list[str] = []

    def fit(inputs: GroupInputs) -> dict[str, nn.Module]:
        seen.extend(inputs.names)
        assert torch.allclose(inputs.energy, inputs.cross, rtol=1e-5, atol=1e-9)
        return {}

    walk(loaded.model, groups(loaded), ids, fit)
    assert seen == [p.name for p in loaded.config.projections()]


def test_moments_are_those_of_calibration(setting: Any) -> None:
    """gate_proj keeps E[x xᵀ] itself, so both ways of measuring must agree."""
    loaded, settings, moments, _, _ = setting
    found = {}

    def fit(inputs: GroupInputs) -> dict[str, nn.Module]:
        found.update(dict.fromkeys(inputs.names, inputs.energy))
        return {}

    walk(loaded.model, groups(loaded), calibration_windows(loaded, settings).ids, fit)
    name = "model.layers.3.mlp.gate_proj"
    assert torch.allclose(found[name], moments[name].energy, rtol=1e-4, atol=1e-8)


def test_later_groups_see_what_was_replaced(setting: Any) -> None:
    loaded, settings, *_ = setting
    ids = calibration_windows(loaded, settings).ids[:2]
    changed = "model.layers.1.mlp.gate_proj"
    differs = {}

    def fit(inputs: GroupInputs) -> dict[str, nn.Module]:
        differs[inputs.names[0]] = not torch.allclose(inputs.energy, inputs.cross, rtol=1e-4, atol=1e-7)
        if changed not in inputs.names:
            return {}
        linear = deepcopy(loaded.model.get_submodule(changed))
        linear.weight.data *= 1.5
        return {changed: linear}

    before = deepcopy(loaded.model.state_dict())
    walk(loaded.model, groups(loaded), ids, fit)
    order = list(differs)
    after = order.index(changed) + 1
    assert not any(differs[n] for n in order[:after]) and all(differs[n] for n in order[after:])
    assert all(torch.equal(v, before[k]) for k, v in loaded.model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in loaded.model.modules())


def test_correction_is_the_regression_on_the_new_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=generator, dtype=torch.float64)
    seen = x @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + 0.3 * torch.randn(
        4000, 6, generator=generator, dtype=torch.float64
    )
    inputs = GroupInputs(("p",), seen.T @ seen / 4000, x.T @ seen / 4000)
    for m in (4, 9):  # wide and tall
        weight = torch.randn(m, 6, generator=generator, dtype=torch.float64)
        gradient = torch.eye(min(m, 6), dtype=torch.float64)
        from flrc_edge.calibration import Moments

        moments = Moments(torch.eye(min(m, 6), dtype=torch.float64), gradient, 1.0, 1.0, 1.0)
        found, changed = corrected(weight, moments, inputs, ridge=0.0)
        expected = torch.linalg.lstsq(seen, x @ weight.T).solution.T
        assert torch.allclose(found, expected, atol=1e-8)
        own = found @ inputs.energy @ found.T if m <= 6 else inputs.energy
        assert torch.allclose(changed.energy, own)
        unchanged, _ = corrected(weight, moments, inputs, ridge=1e12)
        assert torch.allclose(unchanged, weight, atol=1e-6)


def test_correction_brings_layer_outputs_nearer(setting: Any) -> None:
    loaded, settings, moments, factors, plan = setting
    windows = calibration_windows(loaded, settings)
    chunks = fit_corrected(loaded, plan, moments, windows, ridge=0.01)
    assert set(chunks) == {p.name for p in plan.projections if not p.dense}

    def error(context: Any) -> float:
        with torch.no_grad(), context as model:
            return sum(
                (model.model(w[None]).last_hidden_state - hidden).square().mean().item()
                for w, hidden in zip(windows.ids, reference, strict=True)
            )

    with torch.no_grad():
        reference = [loaded.model.model(w[None]).last_hidden_state for w in windows.ids]
    assert error(placed(loaded, plan, chunks)) < error(compressed(loaded, plan, factors))


def test_without_a_change_correction_is_plain_factorization(setting: Any) -> None:
    """The first projection sees the original's inputs, so nothing is to be corrected there."""
    loaded, _, moments, _, plan = setting
    first = next(p for p in plan.projections if not p.dense)
    inputs_energy = torch.eye(first.shape[1], dtype=torch.float64)
    weight = loaded.model.get_parameter(f"{first.name}.weight").detach()
    same, statistics = corrected(
        weight, moments[first.name], GroupInputs((first.name,), inputs_energy, inputs_energy)
    )
    assert torch.allclose(same, weight.double(), atol=1e-12)
    assert factorize(same, statistics).V.shape[1] == first.shape[1]
