"""Round plain numbers on log axes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def log_ticks(low: float, high: float) -> list[float]:
    """Return at most 9 round numbers between two positive limits, about even on a log scale."""
    steps = (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        (1, 1.2, 1.4, 1.7, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
    )
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    best: list[float] = []
    for digits in steps:
        ticks = [d * 10.0**e for e in decades for d in digits if low <= d * 10.0**e <= high]
        if len(ticks) > 9:
            return best or ticks[:: -(-len(ticks) // 9)]
        best = ticks
    return best


def plain_log_axes(axes: Axes) -> None:
    """Give log axes plain round numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for axis, scale, limits in (
        (axes.xaxis, axes.get_xscale(), axes.get_xlim()),
        (axes.yaxis, axes.get_yscale(), axes.get_ylim()),
    ):
        if scale == "log":
            axis.set_major_locator(FixedLocator(log_ticks(min(limits), max(limits))))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())


def label_decades(axes: Axes) -> None:
    """Label a log axis 10⁻², 10⁻¹ … in plain text, at most six of them; plain numbers within two."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    low, high = axes.get_ylim()
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, -(-(last - first + 1) // 6))
    decades = {10.0**e: "10" + str(e).translate(_SUPERSCRIPT) for e in range(first, last + 1, step)}
    labels = decades if len(decades) > 2 else {t: f"{t:.3g}" for t in log_ticks(low, high) or [low]}
    axes.yaxis.set_major_locator(FixedLocator(list(labels)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: list(labels.values())[place or 0]))
