"""What was measured at each stage: perplexity, divergence and time a token, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flrc_edge.figures import canvas
from flrc_edge.figures.canvas import add_axes, house_style, new_figure, stage_colour
from flrc_edge.figures.direct_labels import Label, label_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TOP, _WIDTH, _ROW, _GAP, _BOTTOM = 0.38, 2.6, 0.34, 0.55, 0.5  # inches


@dataclass(frozen=True)
class Panel:
    """Values of the same rows in one unit.

    Args:
        title: What they are, with the unit.
        values: One for each row.
        low: Lower ends of their intervals.
        high: Upper ends.
        reference: A value to compare with (that of the dense model), or None.
    """

    title: str
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    reference: float | None = None


def draw_panels(rows: Sequence[str], panels: Sequence[Panel], *, from_zero: bool) -> Figure:
    """Draw dots with intervals, a row for each stage, the panels side by side, two at most.

    Args:
        rows: Names of the rows, stages first.
        panels: One at least.
        from_zero: Draw bars that begin at zero instead, for quantities such as times.
    """
    columns = min(2, len(panels))
    height = _ROW * len(rows)
    step_x, step_y = _WIDTH + _GAP, _TOP + height + _BOTTOM
    with house_style():
        size = max(label_size(new_figure(1, 1), Label(row, "", ()))[0] for row in rows)
        left = size / 100 + 0.2  # of a figure of 100 dots an inch
        figure = new_figure(left + columns * step_x, -(-len(panels) // columns) * step_y)
        for i, panel in enumerate(panels):
            row, column = divmod(i, columns)
            axes = add_axes(figure, left + column * step_x, row * step_y + _TOP, _WIDTH, height)
            axes.set_title(panel.title)
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_yticks(range(len(rows)), rows if column == 0 else [""] * len(rows))
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.grid(axis="x")
            for place, value in enumerate(panel.values):
                colour = stage_colour(place, len(rows))
                if from_zero:
                    axes.barh(place, value, height=0.55, color=colour)
                else:
                    axes.plot([value], [place], marker="o", markersize=6, color=colour)
                axes.plot(
                    [panel.low[place], panel.high[place]], [place, place], color=canvas.MUTED, linewidth=1.2
                )
            if panel.reference is not None:
                axes.axvline(panel.reference, color=canvas.ORANGE, linewidth=1.3, linestyle=(0, (4, 2)))
                axes.annotate(
                    "dense",
                    (panel.reference, 0),
                    (3, -26),
                    ("data", "axes fraction"),
                    "offset points",
                    fontsize=8,
                    color=canvas.ORANGE,
                )
            ends = [*panel.values, *panel.low, *panel.high]
            ends += [] if panel.reference is None else [panel.reference]
            span = (max(ends) - min(ends)) or max(abs(max(ends)), 1e-9)
            axes.set_xlim(0 if from_zero else min(ends) - 0.08 * span, max(ends) + 0.08 * span)
        return figure
