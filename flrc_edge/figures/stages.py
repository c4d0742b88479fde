"""What the stages keep and what they cost: kept share of each kind of projection, and measured divergence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flrc_edge.figures import canvas
from flrc_edge.figures.canvas import add_axes, house_style, new_figure, stage_colour
from flrc_edge.figures.direct_labels import Label, label_ends
from flrc_edge.figures.rank_map import RankMap
from flrc_runtime.manifest import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KIND_COLOURS = {
    "q": canvas.BLUE,
    "k": canvas.BLUE,
    "v": canvas.BLUE,
    "o": canvas.BLUE,
    "gate": canvas.ORANGE,
    "up": canvas.ORANGE,
    "down": canvas.ORANGE,
}


def draw_kept(ranks: RankMap, keep: Sequence[float]) -> Figure:
    """Draw the share of its parameters that each kind of projection keeps, over the stages.

    Args:
        ranks: The map; of two stages or more, for there is no line through one.
        keep: The activated share of all projections at each stage.
    """
    stages = list(range(len(keep)))
    kept = [ranks.kept(s) for s in stages]
    with house_style():
        figure, axes = _sheet(width=min(6.2, 2.4 + 1.1 * (len(stages) - 1)), room=0.9)
        axes.set_title("Share of parameters kept")
        labels = []
        for kind in ranks.kinds:
            y = [k[kind] for k in kept]
            colour = _KIND_COLOURS.get(kind, canvas.VIOLET)
            axes.plot(stages, y, color=colour, marker="o", linewidth=1.3, markersize=3.5)
            labels.append(Label(kind, colour, ((stages[-1], y[-1]),)))
        axes.plot(stages, keep, color=canvas.INK, marker="o", linewidth=2.2)
        labels.append(Label("all", canvas.INK, ((stages[-1], keep[-1]),), bold=True))
        axes.set_xlim(-0.15, stages[-1] + 0.15)
        low = min(*keep, *(v for k in kept for v in k.values()))
        axes.set_ylim(max(0.0, low - 0.08 * (1 - low) - 0.01), 1.0 + 0.04 * (1 - low) + 0.005)
        step = -(-len(stages) // 12)
        axes.set_xticks(stages[::step], [f"stage {s}" if step == 1 else str(s) for s in stages[::step]])
        if step > 1:
            axes.set_xlabel("stage")
        label_ends(axes, labels)
        return figure


def draw_divergence(schedule: Schedule) -> Figure:
    """Draw the measured divergence of every stage over answer positions, and where the schedule uses which."""
    rows, block = schedule.divergence, max(schedule.block, 1)
    stages, last = len(rows), len(rows[0]) * block
    edges = [float(block * i) for i in range(len(rows[0]) + 1)]
    starts = [0, *schedule.boundaries]
    with house_style():
        figure, axes = _sheet(width=6.6, room=1.1)
        axes.set_title("Mean KL(dense ‖ stage), nats a token")
        axes.set_xlabel("position in the answer, tokens")
        labels = []
        for stage, row in enumerate(rows):
            colour = stage_colour(stage, stages)
            axes.stairs(row, edges, color=colour, linewidth=1.0, baseline=None)
            start, stop = starts[stage], ([*starts, last][stage + 1])
            _used(axes, row, block=block, start=start, stop=min(stop, last), colour=colour)
            labels.append(
                Label(f"stage {stage}", colour, ((edges[-1], row[-1]),), bold=start < min(stop, last))
            )
        top = max(v for row in rows for v in row)
        low = min(0.0, *(v for row in rows for v in row))
        axes.set_xlim(0, edges[-1])
        axes.set_ylim(low * 1.08, 1.12 * top or 1.0)
        for boundary in sorted({b for b in schedule.boundaries if b < last}):
            axes.axvline(boundary, color=canvas.MUTED, linewidth=0.7, linestyle=(0, (2, 2)), zorder=1)
            axes.annotate(
                f"→ stage {schedule.stage_at(boundary)}", (boundary, 1), (3, -3), ("data", "axes fraction"),
                "offset points", va="top", fontsize=7.5, color=canvas.MUTED,
            )  # fmt: skip
        axes.set_xticks(sorted({*edges[:: -(-len(rows[0]) // 12)], edges[-1]}))
        label_ends(axes, labels)
        return figure


def _used(axes: Axes, row: Sequence[float], *, block: int, start: int, stop: int, colour: str) -> None:
    """Draw a stage's line thick from token ``start`` to token ``stop``."""
    if start >= stop:
        return
    first, last = start // block, (stop - 1) // block
    edges = [float(e) for e in (start, *(block * i for i in range(first + 1, last + 1)), stop)]
    axes.stairs(row[first : last + 1], edges, color=colour, linewidth=3.2, baseline=None)


def _sheet(*, width: float, room: float) -> tuple[Figure, Axes]:
    """Return a figure whose axes are ``width`` inches wide, with ``room`` for labels at their right."""
    figure = new_figure(0.55 + width + room, 3.3)
    axes = add_axes(figure, 0.55, 0.35, width, 2.5)
    axes.grid(axis="y")
    return figure, axes
