"""Rank maps and stage charts: what is drawn is what the plan says."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest

from flrc_edge.errors import FlrcError, FormatError
from flrc_edge.figures import rank_map, render
from flrc_edge.figures.canvas import DARK, stage_colour
from flrc_edge.figures.maps import draw_bits, draw_importance, draw_shares
from flrc_edge.figures.stages import draw_divergence, draw_kept
from flrc_runtime.manifest import ProjectionPlan, RankPlan, Schedule

SHAPES = {
    "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (16, 8), "mlp.up_proj": (16, 8), "mlp.down_proj": (8, 16),
}  # fmt: skip


def plan(layers: int = 3, stages: int = 2, **change: Any) -> RankPlan:
    """q of every layer falls from rank 3 to 1 (shares .75, .25), the rest is dense; scores count up."""
    projections = tuple(
        ProjectionPlan(
            f"model.layers.{layer}.{kind}",
            shape,
            ((3, 1, 1)[:stages] if kind == "self_attn.q_proj" else (None,) * stages),
        )
        for layer in range(layers)
        for kind, shape in SHAPES.items()
    )
    scores = {p.name: float(i + 1) for i, p in enumerate(projections)}
    return RankPlan(
        **{
            "allocator": "fisher",
            "keep": (0.95, 0.9, 0.9)[:stages],
            "projections": projections,
            "scores": scores,
        }
        | change
    )


def images(figure: Any) -> list[Any]:
    """The maps of a figure, without colour bars."""
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


def test_rows_are_kinds_and_columns_are_layers() -> None:
    shuffled = plan(layers=12, projections=tuple(reversed(plan(layers=12).projections)))
    ranks = rank_map(shuffled)
    assert ranks.kinds == ("q", "k", "v", "o", "gate", "up", "down") and ranks.layers == tuple(range(12))
    cell = ranks.projections[6][10]
    assert cell is not None and cell.name == "model.layers.10.mlp.down_proj"


def test_values_of_the_map() -> None:
    ranks = rank_map(plan())
    np.testing.assert_array_equal(ranks.scores[:, 1], np.arange(8, 15))
    np.testing.assert_allclose(
        ranks.per_parameter[:, 0], [1 / 64, 2 / 32, 3 / 32, 4 / 64, 5 / 128, 6 / 128, 7 / 128]
    )
    np.testing.assert_array_equal(ranks.shares[0][0], [0.75] * 3)
    np.testing.assert_array_equal(ranks.shares[1][0], [0.25] * 3)
    assert (ranks.shares[1][1:] == 1).all() and ranks.dense[1:].all() and not ranks.dense[0].any()
    assert ranks.kept(1) == {"q": 0.25} | dict.fromkeys(("k", "v", "o", "gate", "up", "down"), 1.0)


def test_shares_follow_the_storage_form() -> None:
    pivoted = ProjectionPlan("model.layers.0.mlp.up_proj", (16, 8), (4, 2), "pivoted")
    ranks = rank_map(RankPlan("spectrum", (0.9, 0.5), (pivoted,)))
    assert ranks.shares[1][0, 0] == (2 * 24 - 4) / 128
    assert [s[0, 0] for s in ranks.shares] == [pivoted.parameters(s) / 128 for s in (0, 1)]


def test_bits_are_the_mean_over_what_is_stored() -> None:
    factored = ProjectionPlan("model.layers.0.mlp.up_proj", (16, 8), (2,), "plain", ("int4/32", "int8/64"))
    dense = ProjectionPlan("model.layers.0.mlp.down_proj", (8, 16), (None,), "plain", ("fp32",))
    ranks = rank_map(RankPlan("spectrum", (0.9,), (factored, dense), embedding="int8/32"))
    np.testing.assert_allclose(ranks.bits[:, 0], [(4 * 16 + 8 * 32) / 48, 32])
    figure = draw_bits(ranks)
    np.testing.assert_array_equal(images(figure)[0], ranks.bits)
    assert figure.axes[0].images[0].get_clim() == (2, 32)
    assert np.isnan(rank_map(plan()).bits).all()


def test_a_projection_that_a_layer_lacks() -> None:
    whole = plan()
    ranks = rank_map(plan(projections=whole.projections[:-1]))
    assert ranks.projections[6][2] is None and np.isnan(ranks.shares[0][6, 2]) and not ranks.dense[6, 2]
    assert np.ma.getmaskarray(np.ma.masked_invalid(images(draw_shares(ranks, (1.0, 1.0)))[0]))[6, 2]


@pytest.mark.parametrize(
    "name", ["lm_head", "model.layers.x.mlp.up_proj", "layers." + "9" * 5000 + ".mlp.up_proj"]
)
def test_names_without_a_layer_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match="is not a projection of a decoder layer"):
        rank_map(RankPlan("uniform", (1.0,), (ProjectionPlan(name, (4, 4), (None,)),)))


def test_importance_shows_the_scores_on_log_scales() -> None:
    ranks = rank_map(plan())
    figure = draw_importance(ranks)
    score, per_parameter = images(figure)
    np.testing.assert_array_equal(score, ranks.scores)
    np.testing.assert_array_equal(per_parameter, ranks.per_parameter)
    norm = next(axes for axes in figure.axes if axes.images).images[0].norm
    assert type(norm).__name__ == "LogNorm" and (norm.vmin, norm.vmax) == (1, 21)


def test_scores_that_have_no_logarithm_are_left_blank() -> None:
    whole = plan()
    scores = dict(whole.scores) | {whole.projections[0].name: 0.0, whole.projections[1].name: -2.0}
    score = images(draw_importance(rank_map(plan(scores=scores))))[0]
    assert np.ma.getmaskarray(np.ma.masked_invalid(score)).nonzero()[0].tolist() == [0, 1]
    assert (
        not rank_map(plan(scores={})).scored and not rank_map(plan(scores=dict.fromkeys(scores, 0.0))).scored
    )


@pytest.mark.parametrize(("layers", "stages"), [(3, 1), (3, 3), (30, 2), (1, 3)])
def test_one_map_a_stage_with_dots_where_dense(layers: int, stages: int) -> None:
    ranks = rank_map(plan(layers=layers, stages=stages))
    figure = draw_shares(ranks, (0.9, 0.8, 0.8)[:stages])
    maps = images(figure)
    assert len(maps) == stages
    for stage, values in enumerate(maps):
        np.testing.assert_array_equal(values, ranks.shares[stage])
    axes = next(a for a in figure.axes if a.images)
    dots = axes.collections[-1].get_offsets()
    assert sorted(map(tuple, dots.tolist())) == [(x, y) for x in range(layers) for y in range(1, 7)]
    assert axes.images[0].get_clim() == (0, 1) and next(t.get_text() for t in axes.get_yticklabels()) == "q"


def test_the_maps_and_titles_do_not_overlap() -> None:
    figure = draw_shares(rank_map(plan(layers=1, stages=3)), (0.9, 0.8, 0.8))
    renderer = figure.canvas.get_renderer()
    boxes = [
        box
        for axes in figure.axes
        if axes.images
        for box in (axes.bbox, axes.title.get_window_extent(), axes._left_title.get_window_extent(renderer))
        if box.width > 0
    ]
    whole = figure.bbox
    assert all(b.x0 >= whole.x0 and b.x1 <= whole.x1 and b.y0 >= whole.y0 and b.y1 <= whole.y1 for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_kept_by_stage() -> None:
    axes = draw_kept(rank_map(plan(stages=3)), (0.97, 0.9, 0.9)).axes[0]
    lines = [list(map(float, line.get_ydata())) for line in axes.lines]
    assert (
        lines[0] == [0.75, 0.25, 0.25]
        and lines[1:7] == [[1.0, 1.0, 1.0]] * 6
        and lines[7] == [0.97, 0.9, 0.9]
    )
    assert {"q", "down", "all"} <= {text.get_text() for text in axes.texts}


def thick(axes: Any) -> list[tuple[list[float], list[float]]]:
    """Edges and values of the lines where a stage is used."""
    data = [patch.get_data() for patch in axes.patches if patch.get_linewidth() > 2]
    return [(d.edges.tolist(), d.values.tolist()) for d in data]


def test_divergence_over_positions_and_where_a_stage_is_used() -> None:
    rows = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    axes = draw_divergence(Schedule((20,), 48, rows, 16)).axes[0]
    thin = [patch.get_data() for patch in axes.patches if patch.get_linewidth() < 2]
    assert [d.values.tolist() for d in thin] == [list(r) for r in rows]
    assert thin[0].edges.tolist() == [0, 16, 32, 48]
    assert thick(axes) == [([0, 16, 20], [0.1, 0.2]), ([20, 32, 48], [0.5, 0.6])]
    assert "→ stage 1" in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(
    ("boundaries", "used", "marks"),
    [
        ((8, 8), [([0, 8], [0.1]), ([8, 16, 32], [0.3, 0.3])], ["→ stage 2"]),  # stage 1 is skipped
        ((16, 32), [([0, 16], [0.1]), ([16, 32], [0.2])], ["→ stage 1"]),
        ((40, 2**62), [([0, 16, 32], [0.1, 0.1])], []),
    ],
)
def test_boundaries_that_skip_a_stage_or_lie_beyond(
    boundaries: tuple[int, ...], used: list[Any], marks: list[str]
) -> None:
    rows = ((0.1, 0.1), (0.2, 0.2), (0.3, 0.3))
    axes = draw_divergence(Schedule(boundaries, 32, rows, 16)).axes[0]
    assert thick(axes) == used
    assert [t.get_text() for t in axes.texts if t.get_text().startswith("→")] == marks


@pytest.mark.parametrize("block", [0, -3, 2**62])
def test_odd_blocks_are_drawn(block: int) -> None:
    figure = draw_divergence(Schedule((1,), 0, ((0.0, 0.0), (0.0, -1e-9)), block))
    assert render(figure).startswith(b"<svg")


def test_svg_is_the_same_every_time_and_loads_nothing() -> None:
    first, second = (render(draw_shares(rank_map(plan()), (0.9, 0.8)), title="a < b") for _ in range(2))
    assert first == second
    text = first.decode()
    assert "<title>a &lt; b</title>" in text and "<metadata" not in text and "<script" not in text
    sources = re.findall(r"(?:href|src)=\"([^\"]*)\"", text)
    assert sources and all(s.startswith(("data:image/png;base64,", "#")) for s in sources)
    assert not re.search(r"https?://", re.sub(r' xmlns(:xlink)?="[^"]*"', "", text))


def test_png_is_the_same_every_time() -> None:
    first, second = (render(draw_kept(rank_map(plan()), (0.9, 0.8)), "png") for _ in range(2))
    assert first == second and first.startswith(b"\x89PNG") and b"matplotlib" not in first.lower()


def test_every_colour_of_text_and_lines_has_a_dark_counterpart() -> None:
    figures = (
        draw_importance(rank_map(plan())),
        draw_kept(rank_map(plan()), (0.9, 0.8)),
        draw_divergence(Schedule((20,), 48, ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), 16)),
    )
    for figure in figures:
        text = render(figure).decode()
        head, _, body = text.partition("</style>")
        used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", body))
        assert used and used <= set(DARK)
        for colour in used:
            assert f': {colour}"]' in head and DARK[colour] in head


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", [c for c in DARK if c not in ("#ffffff", "#d9dee4")])
def test_text_and_lines_stand_out_on_both_papers(colour: str) -> None:
    assert contrast(colour, "#ffffff") >= 3 and contrast(DARK[colour], DARK["#ffffff"]) >= 4.5


def test_stage_colours_run_from_first_to_last() -> None:
    assert stage_colour(0, 1) == stage_colour(0, 9) != stage_colour(8, 9) == stage_colour(1, 2)


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 31, "svg.fonttype": "path"}):
        mine = render(draw_kept(rank_map(plan()), (0.9, 0.8)))
        assert matplotlib.rcParams["font.size"] == 31 and matplotlib.rcParams["svg.fonttype"] == "path"
    assert mine == render(draw_kept(rank_map(plan()), (0.9, 0.8)))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FlrcError, match="need the package matplotlib") as error:
        draw_shares(rank_map(plan()), (0.9, 0.8))
    assert error.value.hint == "pip install 'flrc-edge[report]'"
