"""The look of all figures, and their bytes: the same input gives the same bytes, and nothing global is changed.

An SVG carries two palettes: where the reader's browser prefers dark, a style sheet inside exchanges each colour. The
background is part of the figure, so it stays readable on any page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from flrc_edge.errors import FlrcError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Format = Literal["svg", "png"]

PAPER = "#ffffff"
INK = "#1f2328"
MUTED = "#59636e"
FAINT = "#d9dee4"
BLUE, TEAL, VIOLET = "#0a5fa8", "#0f7b6c", "#7a4bb3"
ORANGE, OCHRE, ROSE = "#c2540a", "#8f6a00", "#b3325f"
SLATE, BROWN = "#5c6f8a", "#83533a"
STAGES = ("#08306b", "#1a5fa0", "#2f82bd", "#4a97cc")  # of the first stage to the last

# The counterpart of each colour on a dark page, of about the same contrast.
DARK = {
    PAPER: "#0d1117",
    INK: "#e6edf3",
    MUTED: "#9aa4af",
    FAINT: "#2d333b",
    BLUE: "#6cb6ff",
    TEAL: "#4fd1b5",
    VIOLET: "#c4a1ff",
    ORANGE: "#ff9d57",
    OCHRE: "#e0bd4a",
    ROSE: "#ff8fb3",
    SLATE: "#a9bad1",
    BROWN: "#d3a184",
    STAGES[0]: "#dbeafb",
    STAGES[1]: "#a3ccf5",
    STAGES[2]: "#6fa8e0",
    STAGES[3]: "#4a80b8",
}

COLOUR_MAP = "viridis"  # perceptually uniform, and readable without colour vision
PNG_DPI = 200
_FONTS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
_STYLE: Any = {
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that layouts do not depend on the machine
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold a dollar sign
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "flrc-edge",  # ids that are not random
}


class MissingPackageError(FlrcError):
    """matplotlib is not installed."""


def check_matplotlib() -> None:
    """Make sure figures can be drawn.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingPackageError(
            "figures need the package matplotlib, which is not installed",
            hint="pip install 'flrc-edge[report]'",
        ) from None


@contextmanager
def house_style() -> Iterator[None]:
    """Draw with this project's settings, whatever the user's matplotlibrc says, while the block runs."""
    check_matplotlib()
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches; call it inside :func:`house_style`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)  # measures text
    return figure


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Return axes at a place in inches from the figure's upper left corner."""
    whole_width, whole_height = figure.get_size_inches()
    return figure.add_axes(
        (
            left / whole_width,
            1 - (top + height) / whole_height,
            width / whole_width,
            height / whole_height,
        )
    )


def stage_colour(stage: int, stages: int) -> str:
    """Return the colour of a stage: dark for the first, light for the last."""
    return STAGES[round(stage * (len(STAGES) - 1) / max(stages - 1, 1))]


def render(figure: Figure, format: Format = "svg", *, title: str = "") -> bytes:
    """Return the file of a figure, without dates, versions or random ids.

    Args:
        figure: From one of the ``draw_…`` functions.
        format: ``svg`` (light and dark) or ``png`` (light, 200 dots an inch).
        title: What a screen reader says of an SVG.
    """
    out = io.BytesIO()
    with house_style():
        if format == "png":
            figure.savefig(out, format="png", dpi=PNG_DPI, metadata={"Software": None})
            return out.getvalue()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
    return _finish_svg(out.getvalue().decode(), title).encode()


def _finish_svg(svg: str, title: str) -> str:
    """Drop what no viewer needs, name the reader's own fonts and add the dark palette."""
    start = svg.index("<svg")
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg[start:], flags=re.DOTALL)
    svg = re.sub(r"(font(?:-family)?: [^;\"]*)'DejaVu Sans'", lambda m: m[1] + _FONTS, svg)
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
        if f"{kind}: {light}" in svg
    )
    head = f"<title>{escape(title)}</title>\n " if title else ""
    style = f"<style>@media (prefers-color-scheme:dark){{{rules}}}</style>"
    return re.sub(r"(<svg[^>]*>)", lambda m: f"{m[1]}\n {head}{style}", svg, count=1)
