"""The options that say how to compress, shared by ``compress``, ``demo`` and ``compare``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import click

from flrc_edge.errors import UsageError

F = TypeVar("F", bound=Callable[..., object])
# Number formats of integers: bits, and inputs that share a scale where that is not 32. Those of
# flrc_exporters.number_format, which need not be imported to show a help page.
INTEGERS = ("int8", "int8/64", "int8/128", "int4", "int4/64", "int4/128")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def parse_keeps(text: str) -> tuple[float, ...]:
    """Parse ``.9,.8,.7``.

    Raises:
        UsageError: A part is not a number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{text!r} is not a list of numbers such as .9,.8,.7") from None


def parse_integers(text: str) -> tuple[int, ...]:
    """Parse ``16,64``.

    Raises:
        UsageError: A part is not a whole number.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{text!r} is not a list of whole numbers such as 16,64") from None


def parse_size(text: str) -> int:
    """Parse ``600MB`` or ``1.5g`` into bytes (decimal units).

    Raises:
        UsageError: It is not a positive size.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kmg]?)b?", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"{text!r} is not a size such as 600MB")
    return int(float(match[1]) * _UNITS[match[2]])


def calibration_options(function: F) -> F:
    """Add the options that say what to calibrate on."""
    options = [
        click.option(
            "--calibration",
            "texts",
            metavar="TEXT[:WEIGHT]",
            multiple=True,
            help="File, folder or built-in text (chat, wikitext2, austen); repeatable. "
            "By default half chat and a quarter each of the others.",
        ),
        click.option("--tokens", default=32768, show_default=True, help="Calibration tokens."),
        click.option("--window", default=1024, show_default=True, help="Tokens of a calibration window."),
        click.option("--seed", default=0, show_default=True, help="Chooses the calibration windows."),
        click.option("--rank-step", default=32, show_default=True, help="Ranks are multiples of it."),
        click.option("--no-cache", is_flag=True, help="Measure statistics again, and do not keep them."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def factor_options(function: F) -> F:
    """Add the options that say how to fit and store the factors."""
    options = [
        click.option(
            "--factorization",
            type=click.Choice(["two-sided", "one-sided"]),
            default="two-sided",
            show_default=True,
            help="Gradient-aware, or activation-aware (SVD-LLM).",
        ),
        click.option(
            "--storage",
            type=click.Choice(["pivoted", "plain"]),
            help="Pivoted factors hold r² fewer parameters at the same rank, but do not take 4 bits well.  [default: "
            "plain for 4 bits, else pivoted]",
        ),
        click.option(
            "--labels",
            type=click.Choice(["sampled", "text"]),
            default="sampled",
            show_default=True,
            help="What gradients predict: tokens sampled from the model (true Fisher) or the text's own.",
        ),
        click.option(
            "--correct",
            is_flag=True,
            help="Fit every projection again to what the compressed layers before it have lost: less loss, more time.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function
