"""Labels beside the lines they name, instead of a legend.

:func:`label_ends` stacks the names at the right of their lines' ends; :func:`place_labels` finds for each label the
place where it covers least. Both need final axis limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = npt.NDArray[np.float64]
_GAP = 6.0  # points between a label and its point
_SAMPLE = 3.0  # pixels between two tested points of a line
_CLEAR = 2.0  # pixels that a label wants to itself
# What a place costs: all of it off the axes, all of it on another label, a sample of a line, a pixel away from its
# point, the next of its points.
_OUTSIDE, _ON_LABEL, _ON_LINE, _AWAY, _NEXT_POINT = 400.0, 60.0, 4.0, 0.12, 6.0


@dataclass(frozen=True)
class Label:
    """A text and the data points it may stand at, best first.

    Args:
        text: What it says.
        colour: Of the text.
        points: ``(x, y)`` in data units.
        sides: Where it may stand at a point, best first: ``right``, ``left``, ``above`` and ``below``.
        size: Of the font, in points.
        bold: Whether the font is bold.
    """

    text: str
    colour: str
    points: tuple[tuple[float, float], ...]
    sides: tuple[str, ...] = ("left", "right", "above", "below")
    size: float = 8.5
    bold: bool = False


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Return the common area in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


def label_ends(axes: Axes, labels: Sequence[Label]) -> tuple[Box, ...]:
    """Put every label at the right of its first point, in the order of the points' heights and without overlap.

    Of all such stacks this one moves the labels least in squares (pool adjacent violators).

    Returns:
        The place of every label, in pixels.
    """
    unit = _pixels_a_point(axes)
    sizes = [label_size(_figure(axes), label) for label in labels]
    at = [axes.transData.transform(label.points[0]) for label in labels]
    order = sorted(range(len(labels)), key=lambda i: (at[i][1], i))
    pitch = max((height for _, height in sizes), default=0.0) + 1
    # With equal pitch, "no overlap" is "height minus rank times pitch does not fall".
    pools: list[list[float]] = []
    for rank, i in enumerate(order):
        pools.append([at[i][1] - rank * pitch])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    heights = [float(np.mean(pool)) for pool in pools for _ in pool]
    right = max((x for x, _ in at), default=0.0)
    boxes: dict[int, Box] = {}
    for rank, i in enumerate(order):
        (x, y), (width, height) = at[i], sizes[i]
        middle = heights[rank] + rank * pitch - y
        aside = abs(middle) > 0.3 * height
        left = right - x + _GAP * unit * (1.8 if aside else 1.0)
        _write(axes, labels[i], labels[i].points[0], left, middle, width=width, leader=aside)
        boxes[i] = Box(x + left, y + middle - height / 2, x + left + width, y + middle + height / 2)
    return tuple(boxes[i] for i in range(len(labels)))


def place_labels(axes: Axes, labels: Sequence[Label], lines: Sequence[Points]) -> tuple[Box, ...]:
    """Put every label, in their order, where it covers least.

    Args:
        axes: The axes; labels stay inside if they can.
        labels: The labels.
        lines: ``[N, 2]`` each, in data units: what should not be covered; one point is a marker.

    Returns:
        The place of every label, in pixels.
    """
    room = Box(axes.bbox.x0 + 2, axes.bbox.y0 + 2, axes.bbox.x1, axes.bbox.y1)
    unit = _pixels_a_point(axes)
    taken = np.concatenate([np.empty((0, 2)), *(_sampled(axes.transData.transform(line)) for line in lines)])
    placed: list[Box] = []
    for label in labels:
        width, height = label_size(_figure(axes), label)
        best: tuple[float, tuple[float, float], tuple[float, float], Box] | None = None
        for rank, point in enumerate(label.points):
            x, y = axes.transData.transform(point)
            for cost, left, middle in _candidates(label.sides, width, height, _GAP * unit):
                box = Box(x + left, y + middle - height / 2, x + left + width, y + middle + height / 2)
                total = cost + _NEXT_POINT * rank + _cost(box, room, placed, taken)
                if best is None or total < best[0] - 1e-9:
                    best = (total, point, (left, middle), box)
        assert best is not None, "a label needs a point"
        _, point, (left, middle), box = best
        beside = left > 0 or left + width < 0
        _write(axes, label, point, left, middle, width=width, leader=beside and abs(middle) > 0.7 * height)
        placed.append(box)
    return tuple(placed)


def label_size(figure: Figure, label: Label) -> tuple[float, float]:
    """Return width and height of a label in pixels of the figure."""
    canvas: Any = figure.canvas
    text = figure.text(0, 0, label.text, fontsize=label.size, fontweight=_weight(label))
    box = text.get_window_extent(canvas.get_renderer())
    text.remove()
    return box.width, box.height


def _write(
    axes: Axes,
    label: Label,
    point: tuple[float, float],
    left: float,
    middle: float,
    *,
    width: float,
    leader: bool,
) -> None:
    """Write a label at an offset in pixels from its point, with a thin line to the point if wanted."""
    unit = _pixels_a_point(axes)
    line = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3}
    axes.annotate(
        label.text,
        point,
        (left / unit, middle / unit),
        textcoords="offset points",
        color=label.colour,
        fontsize=label.size,
        fontweight=_weight(label),
        annotation_clip=False,
        ha="left",
        va="center",
        arrowprops={**line, "relpos": (0.0 if left > 0 else 1.0, 0.5)} if leader else None,
    )


def _candidates(
    sides: Sequence[str], width: float, height: float, gap: float
) -> list[tuple[float, float, float]]:
    """Return (cost, left edge, middle) of the places at a point, in pixels from it."""
    found = []
    for rank, side in enumerate(sides):
        if side in ("right", "left"):
            left = gap if side == "right" else -gap - width
            shifts = [sign * step * height / 3 for step in range(9) for sign in (1, -1)[: 1 + (step > 0)]]
            found += [(2.0 * rank + _AWAY * abs(shift), left, shift) for shift in shifts]
        else:
            middle = (1 if side == "above" else -1) * (gap + height / 2)
            for aside in (0.0, 0.25, -0.25, 0.5, -0.5):
                found.append((2.0 * rank + abs(aside), (aside - 0.5) * width, middle))
    return found


def _cost(box: Box, room: Box, placed: Sequence[Box], taken: Points) -> float:
    area = (box.right - box.left) * (box.top - box.bottom)
    grown = Box(box.left - _CLEAR, box.bottom - _CLEAR, box.right + _CLEAR, box.top + _CLEAR)
    x, y = taken[:, 0], taken[:, 1]
    covered = (x > grown.left) & (x < grown.right) & (y > grown.bottom) & (y < grown.top)
    on_labels = sum(grown.overlap(other) for other in placed) / area
    outside = 1 - box.overlap(room) / area
    return _OUTSIDE * outside + _ON_LABEL * on_labels + _ON_LINE * int(covered.sum())


def _sampled(line: Points) -> Points:
    """Return points along a polyline in pixels, ``_SAMPLE`` apart."""
    parts = [line[:1]]
    for start, stop in pairwise(line):
        steps = max(1, int(np.hypot(*(stop - start)) / _SAMPLE))
        parts.append(start + (stop - start) * np.linspace(0, 1, steps + 1)[1:, None])
    return np.concatenate(parts)


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _pixels_a_point(axes: Axes) -> float:
    return _figure(axes).dpi / 72


def _weight(label: Label) -> str:
    return "bold" if label.bold else "normal"
