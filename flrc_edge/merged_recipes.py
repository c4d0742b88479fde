"""Recipes measured in several runs under the same conditions, as one result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flrc_edge.recipes import REFERENCE

CONDITIONS = ("model", "texts", "window", "calibration", "calibration_tokens", "labels", "machine")


def merged(earlier: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Add what a run of ``compare`` measured to what is there.

    Args:
        earlier: A saved result.
        new: What was measured now. Where both hold a recipe at a keep, this one counts.

    Returns:
        The result of both, or the new one alone if it was measured under other conditions.
    """
    if any(_plain(earlier.get(name)) != _plain(new.get(name)) for name in CONDITIONS):
        return dict(new)
    rows = {(f["keep"], f["recipe"], f["text"]): f for f in (*earlier["figures"], *new["figures"])}
    reference = {(k, text): f["growth"] for (k, recipe, text), f in rows.items() if recipe == REFERENCE}
    figures = []
    for (keep, _, text), f in sorted(rows.items(), key=lambda item: -item[0][0]):
        growth = reference.get((keep, text), 0.0)
        figures.append({**f, "ratio": round(f["growth"] / growth, 4) if growth > 0 else None})
    seconds = {
        name: round(earlier["seconds"].get(name, 0.0) + new["seconds"].get(name, 0.0), 2)
        for name in (*earlier["seconds"], *new["seconds"])
    }
    return {
        **new,
        "figures": figures,
        "searches": new["searches"] or earlier["searches"],
        "seconds": seconds,
        "peak_rss_bytes": max(earlier["peak_rss_bytes"], new["peak_rss_bytes"]),
    }


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: a result just measured has tuples."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
