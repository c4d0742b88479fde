"""Recipes measured in several runs under the same conditions, as one result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flrc_edge.recipes import REFERENCE

CONDITIONS = ("model", "texts", "window", "calibration", "calibration_tokens", "labels")


def put(results: dict[str, Any], key: str, new: Mapping[str, Any]) -> None:
    """Add what a run of ``compare`` measured to the saved results of its model.

    Args:
        results: By name; one more if the model's were measured under other conditions. Another machine's of the same
            conditions is replaced.
        key: Name of the model.
        new: What was measured now.
    """
    mine = [name for name in results if name == key or name.startswith(f"{key}, ")]
    same = [name for name in mine if _conditions(results[name]) == _conditions(new)]
    if same:
        earlier = results[same[0]]
        results[same[0]] = merged(earlier, new) if earlier["machine"] == new["machine"] else dict(new)
    elif not mine:
        results[key] = dict(new)
    else:
        results[f"{key}, conditions {len(mine) + 1}"] = dict(new)  # which its table tells


def _conditions(result: Mapping[str, Any]) -> list[Any]:
    return [_plain(result.get(name)) for name in CONDITIONS]


def merged(earlier: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of two runs under the same conditions.

    Args:
        earlier: A saved result.
        new: What was measured now. Where both hold a recipe at a keep, this one counts.
    """
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
