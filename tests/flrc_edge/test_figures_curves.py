"""Frontier, growth and healing: values, axes, and labels that cover nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flrc_edge.errors import FormatError
from flrc_edge.figures import Series, frontier_figure, growth_figure, healing_figure
from flrc_edge.figures.canvas import add_axes, house_style, new_figure
from flrc_edge.figures.curves import draw_frontier, draw_growth, draw_healing, looks
from flrc_edge.figures.direct_labels import Box, Label, label_ends, place_labels
from flrc_edge.figures.log_scale import log_ticks

FRONTIER = (
    Series("dense", (152e6, 99.6e6, 85.5e6, 58e6), (23.3, 27.1, 29, 210), ("int8", "mixed", "int4", "int2"), "dense"),
    Series("ours, int8", (146e6, 133e6, 120e6, 107e6), (24.1, 26, 30, 41), (".9", ".8", ".7", ".6")),
    Series("ours, int4", (80e6, 73e6, 66e6, 58e6), (26.1, 28.2, 32, 44), (".9", ".8", ".7", ".6")),
    Series("SVD-LLM, int4", (80e6, 73e6, 66e6, 58e6), (58, 81, 130, 220), (), "baseline"),
    Series("ASVD, int4", (80e6, 73e6, 66e6, 58e6), (68, 110, 180, 420), (), "baseline"),
)  # fmt: skip


def text_boxes(figure: Any) -> dict[str, Any]:
    renderer = figure.canvas.get_renderer()
    return {t.get_text(): t.get_window_extent(renderer) for axes in figure.axes for t in axes.texts}


def test_frontier_values_and_axes() -> None:
    axes = draw_frontier(FRONTIER, title="t").axes[0]
    for line, series in zip(axes.lines, FRONTIER, strict=True):
        np.testing.assert_allclose(line.get_xdata(), np.array(series.x) / 1e6)
        np.testing.assert_allclose(line.get_ydata(), series.y)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_xlabel() == "weight file, MB" and axes.get_title(loc="left") == "t"


def test_frontier_names_every_series_and_point_without_overlap() -> None:
    figure = draw_frontier(FRONTIER)
    shown = [t.get_text() for t in figure.axes[0].texts]
    assert sorted(shown) == sorted(
        [s.name for s in FRONTIER] + [label for s in FRONTIER for label in s.labels]
    )
    renderer = figure.canvas.get_renderer()
    boxes = [t.get_window_extent(renderer) for t in figure.axes[0].texts if t.arrow_patch is None]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    room = figure.axes[0].bbox
    assert all(b.x0 > room.x0 and b.x1 < figure.bbox.x1 for b in boxes)


def test_svg_and_png() -> None:
    svg = frontier_figure(FRONTIER, title="Perplexity & size")
    assert svg == frontier_figure(FRONTIER, title="Perplexity & size")
    assert svg.startswith(b"<svg") and b"<title>Perplexity &amp; size</title>" in svg and len(svg) < 60_000
    for name in (b">ours, int4<", b">SVD-LLM, int4<", b">weight file, MB<"):
        assert name in svg
    assert healing_figure([Series("a", (0, 1), (2, 1))], format="png").startswith(b"\x89PNG")


def test_dollars_are_not_formulas() -> None:
    assert b">$x_{$<" in growth_figure([Series("$x_{$", (0.9, 0.8), (0.1, 0.2))])


def test_growth_falls_to_the_right_on_a_log_axis() -> None:
    figure = draw_growth([Series("a", (0.9, 0.8, 0.6), (0.1, 0.3, 0.9)), Series("b", (0.9, 0.6), (0.2, 1.8))])
    axes = figure.axes[0]
    assert axes.xaxis_inverted() and axes.get_yscale() == "log"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0.6", "0.8", "0.9"]
    boxes = text_boxes(figure)
    assert boxes["b"].y0 > boxes["a"].y1 and boxes["a"].x0 > axes.transData.transform((0.6, 1))[0]


def test_growth_below_the_dense_model_has_a_linear_axis() -> None:
    axes = draw_growth([Series("a", (0.9, 0.8), (-0.1, 0.3))]).axes[0]
    assert axes.get_yscale() == "linear" and axes.get_ylim()[0] <= -0.1


def test_healing_starts_at_zero_and_shows_intervals() -> None:
    series = Series("a", (0, 10, 20), (0.5, 0.3, 0.2), low=(0.4, 0.2, 0.1), high=(0.6, 0.4, 0.3))
    axes = draw_healing([series]).axes[0]
    assert axes.get_ylim()[0] == 0
    segments = axes.collections[0].get_segments()
    np.testing.assert_allclose([s[:, 1] for s in segments], [[0.4, 0.6], [0.2, 0.4], [0.1, 0.3]])


def test_one_point_is_enough() -> None:
    figure = draw_frontier([Series("dense int8", (150e6,), (20.0,), role="dense")])
    assert "dense int8" in text_boxes(figure)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (), "y": ()}, "0 x and 0 y"),
        ({"y": (1.0,)}, "2 x and 1 y"),
        ({"labels": ("a",)}, "2 points and 1 labels"),
        ({"low": (0.1, 0.2)}, "2 low and 0 high"),
        ({"y": (1.0, float("nan"))}, "not finite"),
        ({"role": "best"}, "not one of ours, baseline, dense"),
    ],
)
def test_series_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Series(**{"name": "s", "x": (1.0, 2.0), "y": (1.0, 2.0)} | change)


def test_figures_that_make_no_sense() -> None:
    with pytest.raises(FormatError, match="at least one series"):
        frontier_figure([])
    with pytest.raises(FormatError, match="'s' has a value that is not positive"):
        frontier_figure([Series("s", (0.0,), (1.0,))])


def test_looks_differ() -> None:
    many = [Series(str(i), (1.0,), (1.0,), role="baseline") for i in range(10)]
    assert len({(colour, str(style)) for colour, _, style in looks(many)}) == 10
    assert {looks(many)[0][0]}.isdisjoint({colour for colour, *_ in looks(FRONTIER[1:3])})


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (9, 1100, [10, 20, 50, 100, 200, 500, 1000]),
        (45, 600, [50, 70, 100, 150, 200, 300, 500]),
        (0.9, 1e5, [1, 10, 100, 1e3, 1e4, 1e5]),
    ],
)
def test_log_ticks(low: float, high: float, ticks: list[float]) -> None:
    np.testing.assert_allclose(log_ticks(low, high), ticks)


def test_log_ticks_over_hundreds_of_decades() -> None:
    assert 2 <= len(log_ticks(1e-300, 1e300)) <= 9


def axes_from_0_to_1() -> Any:
    with house_style():
        axes = add_axes(new_figure(5, 4), 0.5, 0.5, 3, 3)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        return axes


def test_ends_that_are_apart_stay_where_they_are() -> None:
    axes = axes_from_0_to_1()
    with house_style():
        boxes = label_ends(axes, [Label("a", "k", ((1.0, 0.2),)), Label("b", "k", ((1.0, 0.8),))])
    for box, y in zip(boxes, (0.2, 0.8), strict=True):
        assert (box.top + box.bottom) / 2 == pytest.approx(axes.transData.transform((1, y))[1])
        assert box.left > axes.transData.transform((1, y))[0]


def test_ends_that_meet_are_spread_evenly_in_order() -> None:
    axes = axes_from_0_to_1()
    heights = (0.5, 0.502, 0.498, 0.5)
    with house_style():
        boxes = label_ends(axes, [Label(str(i), "k", ((1.0, y),)) for i, y in enumerate(heights)])
    middles = [(b.top + b.bottom) / 2 for b in boxes]
    assert [middles.index(m) for m in sorted(middles)] == [2, 0, 3, 1]
    assert not any(a.overlap(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert sum(middles) / 4 == pytest.approx(axes.transData.transform((1, 0.5))[1], abs=0.5)


def test_a_label_keeps_clear_of_a_line() -> None:
    axes = axes_from_0_to_1()
    line = np.array([[0.5, 0.5], [0.9, 0.5]])  # to the right of the point
    with house_style():
        (box,) = place_labels(axes, [Label("label", "k", ((0.5, 0.5),), ("right", "left"))], [line])
    x, y = axes.transData.transform((0.5, 0.5))
    assert box.right < x or box.bottom > y or box.top < y


def test_a_label_stays_inside() -> None:
    axes = axes_from_0_to_1()
    with house_style():
        (box,) = place_labels(axes, [Label("a long label", "k", ((0.02, 0.5),))], [np.array([[0.02, 0.5]])])
    assert box.left > axes.bbox.x0


def test_overlap() -> None:
    assert Box(0, 0, 2, 2).overlap(Box(1, 1, 3, 3)) == 1 and Box(0, 0, 1, 1).overlap(Box(1, 0, 2, 1)) == 0
