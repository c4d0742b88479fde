"""Figures: rank maps of a checkpoint or bundle, and the curves of the benchmark page. Drawing needs matplotlib."""

from flrc_edge.figures.canvas import check_matplotlib, render
from flrc_edge.figures.curves import Series, frontier_figure, growth_figure, healing_figure
from flrc_edge.figures.rank_map import RankMap, rank_map

__all__ = [
    "RankMap",
    "Series",
    "check_matplotlib",
    "frontier_figure",
    "growth_figure",
    "healing_figure",
    "rank_map",
    "render",
]
