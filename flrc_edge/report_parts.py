"""A section of the report before its figure is turned into a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flrc_edge.figures.canvas import render
from flrc_edge.html_report import Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Part:
    """A figure with what it shows.

    Args:
        name: Of the figure's file, without ending.
        title: The heading.
        sentence: What the figure shows.
        alt: What kind of figure it is, for readers who do not see it.
        figure: The figure.
        tables: Its numbers.
    """

    name: str
    title: str
    sentence: str
    alt: str
    figure: Figure
    tables: tuple[Table, ...]

    def section(self) -> Section:
        """Return it with the figure as SVG."""
        svg = render(self.figure, "svg", title=self.alt)
        return Section(self.name, self.title, self.sentence, self.alt, svg, self.tables)
