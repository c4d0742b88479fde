"""Joint factors against separate ones: cases with a known answer, and the real model's statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flrc_edge.calibration import Moments
from flrc_edge.errors import UsageError
from flrc_edge.factorization import factorize
from flrc_edge.joint_factors import compare_joint, group_spectra


def moments_of(weight: Tensor, inputs: Tensor) -> Moments:
    """Statistics of a wide matrix whose output gradients are white."""
    m = len(weight)
    eye = torch.eye(m, dtype=torch.float64)
    return Moments(weight @ inputs @ weight.T, eye, float(m), 1.0, 1.0)


def test_equal_matrices_share_all_directions_and_others_none() -> None:
    torch.manual_seed(0)
    inputs = torch.eye(12, dtype=torch.float64)
    first = torch.randn(4, 12, dtype=torch.float64)
    (alone, _), joint = group_spectra([first, first], [moments_of(first, inputs)] * 2, inputs)
    assert joint == pytest.approx(2 * alone)  # half the V's for the same loss
    q = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    apart = [q[:, :4].T.contiguous(), 2 * q[:, 4:8].T]
    (a, b), joint = group_spectra(apart, [moments_of(w, inputs) for w in apart], inputs)
    assert joint[:8] == pytest.approx(
        sorted([*a[:4], *b[:4]], reverse=True)
    )  # a rank of the whole serves one only


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_spectrum_alone_is_that_of_two_sided_factors(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    w = torch.randn(shape, dtype=torch.float64)
    x, g = torch.randn(200, shape[1], dtype=torch.float64), torch.randn(200, shape[0], dtype=torch.float64)
    inputs, outputs = x.T @ x / 200, g.T @ g / 200
    wide = shape[0] <= shape[1]
    energy = w @ inputs @ w.T if wide else inputs
    gradient = outputs if wide else w.T @ outputs @ w
    moments = Moments(energy, gradient, float(outputs.trace()), 1.0, 1.0)
    (alone,), joint = group_spectra([w], [moments], inputs)
    factors = factorize(w.float(), moments, storage="pivoted")
    for rank in range(min(shape)):
        assert alone[rank:].sum() == pytest.approx(factors.loss(rank), rel=1e-4)
    assert joint == pytest.approx(alone)


def test_on_a_real_model_more_choice_never_loses(compressed_stories: Any) -> None:
    settings = replace(compressed_stories.settings, allocator="measured", reuse_statistics=False)
    result = compare_joint(compressed_stories.source, settings, keeps=(0.9, 0.6))
    assert result.groups == 10  # q-k-v and gate-up of five layers
    assert [(f.storage, f.keep) for f in result.figures] == [
        (s, k) for s in ("plain", "pivoted") for k in (0.9, 0.6)
    ]
    for f in result.figures:
        assert 0 < f.joint <= f.separate and 0 <= f.chosen <= 10
        assert f.chosen > 0 or f.joint == f.separate
    plain, pivoted = result.figures[1], result.figures[3]
    assert pivoted.separate < plain.separate  # fewer parameters for the same rank


def test_a_keep_that_no_rank_reaches_is_refused(compressed_stories: Any) -> None:
    with pytest.raises(UsageError, match="is below"):
        compare_joint(compressed_stories.source, compressed_stories.settings, keeps=(0.001,))
    with pytest.raises(UsageError, match="at least one keep"):
        compare_joint(compressed_stories.source, compressed_stories.settings, keeps=())
