"""Loss over kept parameters of every projection: a panel for each kind, a line for each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flrc_edge.figures.canvas import COLOUR_MAP, INK, PAPER, add_axes, house_style, new_figure
from flrc_edge.figures.log_scale import label_decades
from flrc_edge.figures.rank_map import RankMap
from flrc_edge.loss_curves import LossCurves
from flrc_runtime.manifest import factor_parameters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEFT, _TOP, _WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 0.62, 0.35, 1.55, 1.3, 0.2, 0.62  # inches
_COLUMNS = 4


def draw_loss_curves(ranks: RankMap, curves: LossCurves) -> Figure:
    """Draw the growth of the token loss (nats, log scale) over the share of parameters that a projection keeps.

    Dots are the choice for stage 0. Points that do not lose anything are left out.

    Args:
        ranks: The map of the plan.
        curves: Of its projections; those it has none of are left out.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    # The ends of the map would vanish on a dark or a light page.
    colours = LinearSegmentedColormap.from_list("layers", colormaps[COLOUR_MAP](np.linspace(0.3, 0.88, 64)))
    count = len(ranks.kinds)
    columns, rows = min(_COLUMNS, count), -(-count // _COLUMNS)
    norm = Normalize(ranks.layers[0], max(ranks.layers[-1], ranks.layers[0] + 1))
    positive = [loss for c in curves.projections.values() for loss in c.losses if loss > 0]
    high = max(positive, default=1.0) * 1.5
    low = max(min(positive, default=1e-6), high * 1e-6) / 1.5
    with house_style():
        figure = new_figure(
            _LEFT + columns * (_WIDTH + _GAP_X) + 0.75, _TOP + rows * (_HEIGHT + _GAP_Y) + 0.05
        )
        for k, kind in enumerate(ranks.kinds):
            row, column = divmod(k, _COLUMNS)
            axes = add_axes(
                figure,
                _LEFT + column * (_WIDTH + _GAP_X),
                _TOP + row * (_HEIGHT + _GAP_Y),
                _WIDTH,
                _HEIGHT,
            )
            axes.set_yscale("log")
            axes.set_ylim(low, high)
            axes.set_xlim(0, 1.02)
            axes.grid(axis="y")
            axes.minorticks_off()
            label_decades(axes)
            axes.set_title(kind)
            axes.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
            if column:
                axes.tick_params(labelleft=False)
            if k + _COLUMNS >= count:
                axes.set_xlabel("share kept")
            for i, p in enumerate(ranks.projections[k]):
                if p is None or p.name not in curves.projections:
                    continue
                curve = curves.projections[p.name]
                size = p.shape[0] * p.shape[1]
                x = np.array([factor_parameters(p.shape, r, storage=p.storage) / size for r in curve.ranks])
                y = np.array(curve.losses)
                shown = y > 0
                colour = colours(norm(ranks.layers[i]))
                axes.plot(x[shown], y[shown], color=colour, linewidth=0.8)
                rank = p.ranks[0]
                if rank is not None and shown.any():
                    at = np.exp(np.interp(rank, np.array(curve.ranks)[shown], np.log(y[shown])))
                    share = factor_parameters(p.shape, rank, storage=p.storage) / size
                    axes.scatter([share], [at], s=9, color=[colour], edgecolors=INK, linewidths=0.4, zorder=3)
        bar = figure.colorbar(
            ScalarMappable(norm, colours),
            cax=add_axes(figure, _LEFT + columns * (_WIDTH + _GAP_X) + 0.02, _TOP, 0.11, _HEIGHT),
        )
        bar.outline.set_visible(False)
        bar.outline.set_edgecolor(PAPER)
        bar.minorticks_off()
        bar.ax.tick_params(length=0, pad=4)
        bar.set_label("layer", labelpad=5)
        return figure
