"""The numbers of a rank map: what belongs to each projection, as rows of kinds and columns of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flrc_edge.errors import FormatError
from flrc_runtime.manifest import ProjectionPlan, RankPlan

Grid = npt.NDArray[np.float64]
KINDS = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
_NAME = re.compile(r"(?:.*\.)?layers\.(\d{1,6})\.(.+)")


@dataclass(frozen=True)
class RankMap:
    """A plan as a table of kinds and layers; NaN (None in ``projections``) where there is no such projection.

    Args:
        kinds: Rows: q, k, v, o, gate, up, down.
        layers: Columns: the layers' numbers.
        projections: The plan's entry of every cell.
        scores: ``[kinds, layers]`` Fisher scores, NaN if not measured.
        per_parameter: ``scores`` divided by the parameters ``m n`` of the projection.
        shares: A stage each: ``[kinds, layers]`` parameters activated at the stage divided by ``m n``.
        dense: ``[kinds, layers]`` whether the projection keeps its matrix.
        bits: ``[kinds, layers]`` mean bits of a stored parameter, scales not counted; NaN where the plan names no
            number formats.
    """

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    projections: tuple[tuple[ProjectionPlan | None, ...], ...]
    scores: Grid
    per_parameter: Grid
    shares: tuple[Grid, ...]
    dense: npt.NDArray[np.bool_]
    bits: Grid

    @property
    def scored(self) -> bool:
        """Whether any projection has a positive score, so that a log scale exists."""
        return bool((self.per_parameter > 0).any())

    def kept(self, stage: int) -> dict[str, float]:
        """Return the share of parameters that each kind keeps over all layers at ``stage``."""
        result = {}
        for kind, row in zip(self.kinds, self.projections, strict=True):
            there = [p for p in row if p is not None]
            whole = sum(p.shape[0] * p.shape[1] for p in there)
            result[kind] = sum(p.parameters(stage) for p in there) / whole
        return result


def rank_map(plan: RankPlan) -> RankMap:
    """Arrange a plan by kind and layer.

    Raises:
        FormatError: A projection is not one of a decoder layer.
    """
    cells: dict[tuple[str, int], ProjectionPlan] = {}
    for p in plan.projections:
        match = _NAME.fullmatch(p.name)
        if match is None or (match[2], int(match[1])) in cells:
            raise FormatError(
                f"{p.name!r} is not a projection of a decoder layer, so it has no place in a map"
            )
        cells[match[2], int(match[1])] = p
    found = dict.fromkeys(kind for kind, _ in cells)
    kinds = [k for k in KINDS if k in found] + [k for k in found if k not in KINDS]
    layers = sorted({layer for _, layer in cells})
    grid = tuple(tuple(cells.get((kind, layer)) for layer in layers) for kind in kinds)
    sizes = _values(grid, {p.name: float(p.shape[0] * p.shape[1]) for p in plan.projections})
    scores = _values(grid, plan.scores)
    return RankMap(
        kinds=tuple(KINDS.get(k, k) for k in kinds),
        layers=tuple(layers),
        projections=grid,
        scores=scores,
        per_parameter=scores / sizes,
        shares=tuple(
            _values(grid, {p.name: float(p.parameters(s)) for p in plan.projections}) / sizes
            for s in range(plan.num_stages)
        ),
        dense=np.array([[p is not None and p.dense for p in row] for row in grid]),
        bits=_values(grid, {p.name: _mean_bits(p) for p in plan.projections if p.formats}),
    )


def _values(grid: tuple[tuple[ProjectionPlan | None, ...], ...], values: Mapping[str, float]) -> Grid:
    return np.array(
        [[np.nan if p is None else values.get(p.name, np.nan) for p in row] for row in grid], dtype=np.float64
    )


def _mean_bits(projection: ProjectionPlan) -> float:
    """Return the mean bits of a stored parameter: 32 of ``fp32``, b of ``int<b>/<block>``."""
    sizes = [rows * columns for rows, columns in projection.matrices().values()]
    bits = [32 if f == "fp32" else int(f.removeprefix("int").partition("/")[0]) for f in projection.formats]
    return sum(b * size for b, size in zip(bits, sizes, strict=True)) / sum(sizes)
