"""Heat maps over projections and layers: importance (in the manner of Figure 2 of the FLRC paper) and kept shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flrc_edge.figures.canvas import COLOUR_MAP, INK, MUTED, PAPER, add_axes, house_style, new_figure
from flrc_edge.figures.log_scale import label_decades
from flrc_edge.figures.rank_map import Grid, RankMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# All in inches.
_WIDTH = 6.3  # of a map of many layers
_CELL_WIDTH, _CELL_HEIGHT = 0.4, 0.2  # at most; exactly
_LEFT, _TOP, _BOTTOM, _BAR = (
    0.55,
    0.32,
    0.33,
    1.0,
)  # around a map: row names, title, layer numbers, colour bar
_TITLE = 1.85  # what a title needs
_DENSE = "#1b1b2a"  # a dot on the bright end of the colour map, on any page


def draw_importance(ranks: RankMap) -> Figure:
    """Draw the Fisher scores, as measured and per parameter, each on its own log colour scale."""
    from matplotlib.colors import LogNorm

    panels = [
        ("Fisher score", ranks.scores),
        ("Fisher score per parameter", ranks.per_parameter),
    ]
    width, height = _map_size(ranks)
    columns = 2 if 2 * (_LEFT + width + _BAR) <= _LEFT + _WIDTH + _BAR else 1
    with house_style():
        figure, places = _sheet(width, height, panels=2, columns=columns, between=_BAR)
        for (title, values), (left, top) in zip(panels, places, strict=True):
            positive = values[values > 0]
            low, high = float(positive.min()), float(positive.max())
            axes = add_axes(figure, left, top, width, height)
            image = _heat_map(
                axes, ranks, np.where(values > 0, values, np.nan), norm=LogNorm(low, max(high, 1.001 * low))
            )
            axes.set_title(title)
            bar = figure.colorbar(image, cax=add_axes(figure, left + width + 0.14, top, 0.11, height))
            _plain_bar(bar)
            label_decades(bar.ax)
        return figure


def draw_shares(ranks: RankMap, keep: Sequence[float]) -> Figure:
    """Draw the share of its parameters that every projection keeps, one map a stage, on one scale from 0 to 1.

    Args:
        ranks: The map.
        keep: The activated share of all projections at each stage, for the titles.
    """
    stages = len(ranks.shares)
    width, height = _map_size(ranks)
    columns = max(1, min(stages, int((_WIDTH + _LEFT) / (max(width, _TITLE) + _LEFT))))
    with house_style():
        figure, places = _sheet(width, height, panels=stages, columns=columns, between=0.12)
        for stage, (left, top) in enumerate(places):
            axes = add_axes(figure, left, top, width, height)
            image = _heat_map(axes, ranks, ranks.shares[stage], vmin=0.0, vmax=1.0)
            rows, layers = np.nonzero(ranks.dense)
            axes.scatter(layers, rows, s=4, color=_DENSE, linewidths=0)
            axes.set_title(
                f"stage {stage} · keep {keep[stage]:.3f}" if stages > 1 else f"keep {keep[stage]:.3f}"
            )
        right = max(left for left, _ in places) + width
        top = places[0][1]
        bar = figure.colorbar(image, cax=add_axes(figure, right + 0.14, top, 0.11, height))
        _plain_bar(bar)
        bar.set_ticks([0, 0.5, 1])
        bar.set_label("share kept", labelpad=5)
        if ranks.dense.any():
            key = add_axes(figure, right + 0.14, top + height + 0.1, 0.7, 0.2)
            key.set_axis_off()
            key.set_xlim(0, 0.7)
            key.scatter([0.055], [0], s=9, color=INK, linewidths=0)
            key.text(0.16, 0, "dense", va="center", fontsize=8, color=MUTED)
        return figure


def draw_bits(ranks: RankMap) -> Figure:
    """Draw the mean bits of a stored parameter of every projection, on a scale from 2 to 8 or more."""
    width, height = _map_size(ranks)
    with house_style():
        figure, [(left, top)] = _sheet(width, height, panels=1, columns=1, between=0)
        axes = add_axes(figure, left, top, width, height)
        image = _heat_map(axes, ranks, ranks.bits, vmin=2.0, vmax=max(8.0, float(np.nanmax(ranks.bits))))
        axes.set_title("Bits a stored parameter")
        bar = figure.colorbar(image, cax=add_axes(figure, left + width + 0.14, top, 0.11, height))
        _plain_bar(bar)
        return figure


def _map_size(ranks: RankMap) -> tuple[float, float]:
    return min(_WIDTH, _CELL_WIDTH * len(ranks.layers)), _CELL_HEIGHT * len(ranks.kinds)


def _sheet(
    width: float, height: float, *, panels: int, columns: int, between: float
) -> tuple[Figure, list[tuple[float, float]]]:
    """Return a figure for ``panels`` maps in ``columns``, and the upper left corner of each, in inches."""
    step_x, step_y = _LEFT + max(width + between, _TITLE), _TOP + height + _BOTTOM
    rows = -(-panels // columns)
    figure = new_figure((columns - 1) * step_x + _LEFT + max(width + _BAR, _TITLE), rows * step_y)
    return figure, [(_LEFT + (i % columns) * step_x, _TOP + (i // columns) * step_y) for i in range(panels)]


def _heat_map(axes: Axes, ranks: RankMap, values: Grid, **scale: Any) -> Any:
    image = axes.imshow(values, cmap=COLOUR_MAP, aspect="auto", interpolation="none", **scale)
    layers, kinds = len(ranks.layers), len(ranks.kinds)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    axes.set_yticks(range(kinds), ranks.kinds)
    step = next(
        s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, layers) if layers / s <= 12 or s >= layers
    )
    ticks = range(0, layers, step)
    axes.set_xticks(ticks, [str(ranks.layers[i]) for i in ticks])
    axes.tick_params(axis="x", pad=4)
    axes.annotate(
        "layer",
        (0, 0),
        (-3.5, -4),
        "axes fraction",
        "offset points",
        ha="right",
        va="top",
        fontsize=8,
        color=MUTED,
    )
    axes.autoscale(False)
    axes.vlines(np.arange(1, layers) - 0.5, -0.5, kinds - 0.5, color=PAPER, linewidth=min(1.0, 75 / layers))
    # Attention above, MLP below.
    between = [3.0 if kind == "gate" else 1.0 for kind in ranks.kinds[1:]]
    axes.hlines(np.arange(1, kinds) - 0.5, -0.5, layers - 0.5, color=PAPER, linewidth=between)
    return image


def _plain_bar(bar: Any) -> None:
    bar.outline.set_visible(False)
    bar.minorticks_off()
    bar.ax.tick_params(length=0, pad=4)
