"""The pictures of ``docs/benchmarks.md``, from the content of ``docs/benchmarks.json``.

What is to be seen where is known without matplotlib; only drawing needs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from flrc_edge.errors import FormatError
from flrc_edge.figures.curves import (
    Role,
    Series,
    cost_figure,
    frontier_figure,
    growth_figure,
    healing_figure,
    healing_series,
)
from flrc_runtime.typed_json import build


@dataclass(frozen=True)
class Picture:
    """One picture of a section.

    Args:
        file: Its name, such as ``frontier-smollm2-135m.svg``.
        alt: What it shows, for readers who do not see it.
        draw: Returns the SVG; raises FlrcError if matplotlib is not installed.
    """

    file: str
    alt: str
    draw: Callable[[], bytes]

    def markdown(self, folder: str) -> str:
        """Return the line that shows the picture in a page beside ``folder``."""
        return f"![{self.alt}]({folder}/{self.file})"


def pictures(section: str, key: str, value: Mapping[str, Any]) -> tuple[Picture, ...]:
    """Return the pictures of one result; none where there is nothing to draw.

    * ``cost`` draws minutes over tokens, and over parameters at the number of tokens that most models share.
    * ``frontier`` draws perplexity over bytes, a picture for each text.
    * ``growth`` and ``healing`` draw ``value["series"]``, a list of the fields of
      :class:`~flrc_edge.figures.curves.Series`.
    * ``healing`` also draws ``value["curve"]``, the points that ``flrc-edge heal`` writes.
    * ``recipes`` draws the growth of ln perplexity over keep, a picture for each text.

    Args:
        section: Of ``benchmarks.json``.
        key: Of the result, for instance the model's name.
        value: The result.

    Raises:
        FormatError: The result names something to draw that is not in that form.
    """
    if section not in _PICTURES:
        return ()
    try:
        return _PICTURES[section](key, value)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise FormatError(f"{section} of {key} is not in a form that can be drawn: {error!r}") from None


def _frontier(key: str, value: Mapping[str, Any]) -> tuple[Picture, ...]:
    found: list[Picture] = []
    for text in dict.fromkeys(p["text"] for p in value["points"]):
        series = frontier_series([p for p in value["points"] if p["text"] == text])
        title = f"Perplexity on {text} against bytes of weights, {key}"
        found += _one(
            "frontier", f"{key}-{text}", f"{title}: {_names(series)}.", series, frontier_figure, title
        )
    return tuple(found)


def frontier_series(points: Sequence[Mapping[str, Any]]) -> list[Series]:
    """Return one series of bytes and perplexity for every series of points, on one text.

    Args:
        points: As ``flrc-edge compare --frontier --save`` writes them.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault(point["series"], []).append(point)
    return [
        Series(
            name,
            tuple(float(p["bytes"]) for p in group),
            tuple(float(p["perplexity"]) for p in group),
            labels=tuple(str(p["label"]) for p in group),
            role=group[0]["role"],
        )
        for name, group in ((n, sorted(g, key=lambda p: p["bytes"])) for n, g in groups.items())
    ]


def _growth(key: str, value: Mapping[str, Any]) -> tuple[Picture, ...]:
    series = _series(value, f"growth of {key}")
    title = f"Growth of ln perplexity over keep, {key}"
    return _one("growth", key, f"{title}: {_names(series)}.", series, growth_figure, title)


def _healing(key: str, value: Mapping[str, Any]) -> tuple[Picture, ...]:
    series = _series(value, f"healing of {key}")
    if not series and value.get("curve"):
        series = healing_series(value["curve"])
    title = f"Healing: KL to the dense model on validation text over minutes, {key}"
    alt = f"{title}: " + ", ".join(f"{s.name} from {s.y[0]:.3f} to {s.y[-1]:.3f} nats" for s in series) + "."
    return _one("healing", key, alt, series, healing_figure, title)


def _recipes(key: str, value: Mapping[str, Any]) -> tuple[Picture, ...]:
    found: list[Picture] = []
    for text in dict.fromkeys(f["text"] for f in value["figures"]):
        series = recipe_series([f for f in value["figures"] if f["text"] == text])
        if max((len(s.x) for s in series), default=0) < 2:
            continue  # a line needs two keeps
        title = f"Growth of ln perplexity over keep on {text}, {key}"
        alt = f"{title}: {_names(series)}; of recipes that differ in the Fisher score only, the best."
        found += _one("recipes", f"{key}-{text}", alt, series, growth_figure, title)
    return tuple(found)


def recipe_series(figures: Sequence[Mapping[str, Any]]) -> list[Series]:
    """Return g over keep of every recipe on one text; of those that differ in the score only, the one with least g.

    Args:
        figures: As ``flrc-edge compare --save`` writes them.
    """
    recipes: dict[str, list[Mapping[str, Any]]] = {}
    for figure in figures:
        recipes.setdefault(figure["recipe"], []).append(figure)
    best: dict[tuple[str, str, str], tuple[float, str]] = {}
    for name, points in recipes.items():
        kind = (points[0]["factorization"], points[0]["ranks"].split()[0], points[0]["storage"])
        mean = fmean(p["growth"] for p in points)
        best[kind] = min(best.get(kind, (mean, name)), (mean, name))
    series = []
    for (_, allocator, _), (_, name) in best.items():
        points = sorted(recipes[name], key=lambda p: -p["keep"])
        role: Role = "baseline" if allocator in ("uniform", "asvd", "fisher") else "ours"
        x, y = tuple(float(p["keep"]) for p in points), tuple(float(p["growth"]) for p in points)
        series.append(Series(name, x, y, role=role))
    return series


def _cost(key: str, value: Mapping[str, Any]) -> tuple[Picture, ...]:
    points = value["points"]
    of_model: dict[str, list[tuple[int, float]]] = {}
    of_tokens: dict[int, list[tuple[int, float]]] = {}
    for p in points:
        minutes = sum(p["seconds"].values()) / 60
        of_model.setdefault(p["model"], []).append((p["tokens"], minutes))
        of_tokens.setdefault(p["tokens"], []).append((p["parameters"], minutes))
    series = [_line(name, found) for name, found in of_model.items() if len(found) > 1]
    title = f"Minutes of {key} over calibration tokens"
    pictures = _one("cost", f"{key}-tokens", f"{title}: {_names(series)}.", series, cost_figure, title)
    tokens, shared = max(of_tokens.items(), key=lambda item: len(item[1]))
    if len(shared) > 1:
        series = [_line(f"{tokens} tokens", [(n // 10**6, minutes) for n, minutes in shared])]
        title = f"Minutes of {key} over parameters"

        def draw(series: Sequence[Series], *, title: str) -> bytes:
            return cost_figure(series, title=title, x_label="million parameters")

        pictures += _one("cost", f"{key}-parameters", f"{title}, at {tokens} tokens.", series, draw, title)
    return pictures


def _line(name: str, points: Sequence[tuple[int, float]]) -> Series:
    ordered = sorted(points)
    return Series(name, tuple(float(x) for x, _ in ordered), tuple(y for _, y in ordered))


_PICTURES: Mapping[str, Callable[[str, Mapping[str, Any]], tuple[Picture, ...]]] = {
    "cost": _cost,
    "frontier": _frontier,
    "growth": _growth,
    "healing": _healing,
    "recipes": _recipes,
}


def write_pictures(found: Sequence[Picture], folder: Path) -> None:
    """Draw pictures into a folder, made if missing; a file that would not change is left alone.

    Raises:
        FlrcError: matplotlib is not installed.
    """
    for picture in found:
        data = picture.draw()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / picture.file
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)


def _series(value: Mapping[str, Any], where: str) -> list[Series]:
    plain = json.loads(json.dumps(value.get("series", [])))  # a result just measured has tuples
    return [build(Series, raw, f"{where}, series {i}") for i, raw in enumerate(plain)]


def _one(
    section: str,
    key: str,
    alt: str,
    series: Sequence[Series],
    figure: Callable[..., bytes],
    title: str,
) -> tuple[Picture, ...]:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{section}-{key}").strip("-")
    alt = re.sub(r"[\[\]\n]", " ", alt)  # would end the link
    return (Picture(f"{name}.svg", alt, lambda: figure(series, title=title)),) if series else ()


def _names(series: Sequence[Series]) -> str:
    return ", ".join(s.name for s in series)
