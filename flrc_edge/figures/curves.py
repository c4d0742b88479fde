"""Curves with direct labels: quality against bytes (the frontier), healing over time, growth of ln ppl over keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from flrc_edge.errors import FormatError
from flrc_edge.figures import canvas
from flrc_edge.figures.canvas import Format, add_axes, house_style, new_figure, render
from flrc_edge.figures.direct_labels import Label, label_ends, label_size, place_labels
from flrc_edge.figures.log_scale import plain_log_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Role = Literal["ours", "baseline", "dense"]
# Colour and marker of the first, second, … series of each role.
_LOOKS: dict[str, tuple[tuple[str, str], ...]] = {
    "ours": ((canvas.BLUE, "o"), (canvas.TEAL, "o"), (canvas.VIOLET, "o")),
    "baseline": (
        (canvas.ORANGE, "^"),
        (canvas.OCHRE, "v"),
        (canvas.ROSE, "D"),
        (canvas.SLATE, "<"),
        (canvas.BROWN, ">"),
    ),
    "dense": ((canvas.INK, "s"), (canvas.MUTED, "s")),
}
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 8.0, 4.4, 0.65, 0.4, 0.55  # inches
_LINES = ("-", (0, (5, 2)), (0, (2, 1.5)))  # once a role has used up its colours


@dataclass(frozen=True)
class Series:
    """One line of a figure.

    Args:
        name: Written beside the line.
        x: Of the points, in the order they are joined in.
        y: As many.
        labels: A short label a point (such as its keep), or empty.
        role: ``ours``, ``baseline`` or ``dense``; decides colours and emphasis.
        low: Lower ends of the points' intervals, or empty.
        high: Upper ends.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    labels: tuple[str, ...] = ()
    role: Role = "ours"
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.x or len(self.x) != len(self.y):
            raise FormatError(
                f"series {self.name!r} has {len(self.x)} x and {len(self.y)} y, and needs one or more of both"
            )
        for field in ("labels", "low", "high"):
            if len(getattr(self, field)) not in (0, len(self.x)):
                raise FormatError(
                    f"series {self.name!r} has {len(self.x)} points and {len(getattr(self, field))} {field}"
                )
        if len(self.low) != len(self.high):
            raise FormatError(f"series {self.name!r} has {len(self.low)} low and {len(self.high)} high")
        if not all(math.isfinite(v) for v in (*self.x, *self.y, *self.low, *self.high)):
            raise FormatError(f"series {self.name!r} holds a number that is not finite")
        if self.role not in get_args(Role):
            raise FormatError(
                f"series {self.name!r}: role {self.role!r} is not one of {', '.join(get_args(Role))}"
            )


def frontier_figure(series: Sequence[Series], *, title: str = "", format: Format = "svg") -> bytes:
    """Return the figure of quality against size: perplexity over the bytes of the weight file, both on log axes.

    A log axis of perplexity is a linear one of ln ppl. Lower left is better.

    Args:
        series: x in bytes, y perplexities; labels such as ``.8`` or ``int4``.
        title: Above the figure, and what a screen reader says.
        format: ``svg`` or ``png``.
    """
    return render(draw_frontier(series, title=title), format, title=title)


def draw_frontier(series: Sequence[Series], *, title: str = "") -> Figure:
    """Draw :func:`frontier_figure`."""
    return _draw(
        series,
        title=title,
        x_label="weight file, MB",
        y_label="perplexity",
        x_scale=lambda v: v / 1e6,
        log_x=True,
        log_y=True,
        free_labels=True,
    )


def healing_series(points: Sequence[Mapping[str, Any]]) -> list[Series]:
    """Return a line for each stage from the points of a curve that ``flrc-edge heal`` writes."""
    minutes = tuple(float(p["minutes"]) for p in points)
    return [
        Series(f"stage {s}", minutes, tuple(float(p["validation"][s]) for p in points))
        for s in range(len(points[0]["validation"]))
    ]


def healing_figure(series: Sequence[Series], *, title: str = "", format: Format = "svg") -> bytes:
    """Return the figure of healing: KL to the dense model on validation text (nats) over minutes of training.

    Args:
        series: x in minutes, y in nats.
        title: Above the figure, and what a screen reader says.
        format: ``svg`` or ``png``.
    """
    return render(draw_healing(series, title=title), format, title=title)


def draw_healing(series: Sequence[Series], *, title: str = "") -> Figure:
    """Draw :func:`healing_figure`."""
    return _draw(series, title=title, x_label="minutes", y_label="KL to dense, nats a token")


def cost_figure(
    series: Sequence[Series], *, title: str = "", x_label: str = "calibration tokens", format: Format = "svg"
) -> bytes:
    """Return the figure of what compressing takes: minutes over calibration tokens, or over parameters.

    Args:
        series: y in minutes.
        title: Above the figure, and what a screen reader says.
        x_label: What x is.
        format: ``svg`` or ``png``.
    """
    figure = _draw(series, title=title, x_label=x_label, y_label="minutes", ticks_x=True)
    return render(figure, format, title=title)


def growth_figure(series: Sequence[Series], *, title: str = "", format: Format = "svg") -> bytes:
    """Return the figure of ``g = ln ppl - ln ppl(dense)`` over keep, which falls to the right.

    Args:
        series: x is keep in (0, 1], y is g in nats.
        title: Above the figure, and what a screen reader says.
        format: ``svg`` or ``png``.
    """
    return render(draw_growth(series, title=title), format, title=title)


def draw_growth(series: Sequence[Series], *, title: str = "") -> Figure:
    """Draw :func:`growth_figure`; g has a log axis unless one is not positive."""
    return _draw(
        series,
        title=title,
        x_label="keep",
        y_label="g = ln ppl − ln ppl(dense)",
        log_y=all(v > 0 for s in series for v in (*s.y, *s.low)),
        falling_x=True,
        ticks_x=True,
    )


def _draw(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_scale: Callable[[float], float] = lambda v: v,
    log_x: bool = False,
    log_y: bool = False,
    falling_x: bool = False,
    ticks_x: bool = False,
    free_labels: bool = False,
) -> Figure:
    if not series:
        raise FormatError("a figure needs at least one series")
    for s in series:
        if (log_x and min(s.x) <= 0) or (log_y and min((*s.y, *s.low)) <= 0):
            raise FormatError(
                f"series {s.name!r} has a value that is not positive, and the axis is logarithmic"
            )
    with house_style():
        figure = new_figure(_WIDTH, _HEIGHT)
        widths = [label_size(figure, Label(s.name, "", (), bold=s.role == "ours"))[0] for s in series]
        right = 0.3 if free_labels else min(max(widths) / figure.dpi + 0.3, 0.4 * _WIDTH)
        axes = add_axes(figure, _LEFT, _TOP, _WIDTH - _LEFT - right, _HEIGHT - _TOP - _BOTTOM)
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y")
        if log_x:
            axes.set_xscale("log")
        if log_y:
            axes.set_yscale("log")
        lines, names, marks = [], [], []
        for s, (colour, marker, style) in zip(series, looks(series), strict=True):
            points = tuple((x_scale(x), y) for x, y in zip(s.x, s.y, strict=True))
            lines.append(np.array(points))
            axes.plot(
                lines[-1][:, 0],
                s.y,
                color=colour,
                marker=marker,
                linestyle=style,
                linewidth=2.0 if s.role == "ours" else 1.3,
                markeredgecolor=canvas.PAPER,
                markeredgewidth=0.6,
                zorder=3 if s.role == "ours" else 2,
            )
            if s.low:
                axes.vlines(lines[-1][:, 0], s.low, s.high, color=colour, linewidth=0.9)
            from_left = sorted(points, reverse=falling_x)
            ends = (from_left[0], *from_left[:0:-1]) if free_labels else (from_left[-1],)
            names.append(Label(s.name, colour, ends, bold=s.role == "ours"))
            marks += [
                Label(text, canvas.MUTED, (point,), ("below", "above", "right", "left"), size=7)
                for text, point in zip(s.labels, points, strict=bool(s.labels))
            ]
        if falling_x:
            axes.invert_xaxis()
        if not log_y:
            axes.set_ylim(bottom=min(0.0, *(v for s in series for v in (*s.y, *s.low))))
        if ticks_x and len(values := sorted({x_scale(v) for s in series for v in s.x})) <= 12:
            axes.set_xticks(values, [f"{v:g}" for v in values])
        if free_labels:
            _make_room(figure, axes, names)
        plain_log_axes(axes)
        if free_labels:
            place_labels(axes, [*marks, *names], lines)
        else:
            place_labels(axes, marks, lines)
            label_ends(axes, names)
        return figure


def looks(series: Sequence[Series]) -> list[tuple[str, str, Any]]:
    """Return colour, marker and line style of every series, by its role and its place among those of that role."""
    seen: dict[str, int] = {}
    result = []
    for s in series:
        i = seen.get(s.role, 0)
        seen[s.role] = i + 1
        choices = _LOOKS[s.role]
        result.append((*choices[i % len(choices)], _LINES[i // len(choices) % len(_LINES)]))
    return result


def _make_room(figure: Figure, axes: Axes, names: Sequence[Label]) -> None:
    """Move the left limit of a log x axis, so that each name fits at the left of its line's left end."""
    axes.margins(y=0.08)
    low, high = np.log(axes.get_xlim())
    span, width = high - low, axes.bbox.width
    for name in names:
        wanted = label_size(figure, name)[0] + 14
        ahead = (np.log(name.points[0][0]) - low) / span * width
        if wanted > ahead and wanted < width / 2:
            # All points move right when the limit does: solve (ahead + w) / (width + w) = wanted / width.
            more = (wanted - ahead) * width / (width - wanted)
            low, span = low - more * span / width, span * (1 + more / width)
    axes.set_xlim(np.exp(low), np.exp(high))
