"""The table of speeds in README.md from ``docs/benchmarks.json``: ``python -m flrc_edge.readme_speed README JSON``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flrc_edge.errors import FormatError
from flrc_runtime.bench import BenchResult, Row
from flrc_runtime.files import read_json
from flrc_runtime.typed_json import build

BEGIN, END = "<!-- speed: make benchmarks-speed -->", "<!-- /speed -->"
KEEPS = (0.8, 0.6, 0.4)
PROMPT = 512


def readme_speed(speed: Mapping[str, Any]) -> str:
    """Return the table, a row a model: its dense bundle's time a token, and what the others take relative to it.

    Args:
        speed: The section of ``benchmarks.json``, by model.

    Raises:
        FormatError: It is not in the form that ``flrc-edge bench --save`` writes.
    """
    header = (
        "| | dense, ms | "
        + " | ".join(f"keep {keep:g}".replace("0.", ".") for keep in KEEPS)
        + f" | onnxruntime-genai | llama.cpp | prompt of {PROMPT}: dense, ms | onnxruntime-genai | llama.cpp |"
    )
    lines = [header, "|---" * (len(KEEPS) + 7) + "|"]
    for model, raw in sorted(speed.items()):
        result = build(BenchResult, json.loads(json.dumps(raw)), f"speed of {model}")
        context = min(row.tokens for row in result.rows if row.test == "decode")
        decode = [r for r in result.rows if r.test == "decode" and r.tokens == context]
        prompt = [r for r in result.rows if r.test == "prompt" and r.tokens == PROMPT]
        cells = [_ms(decode, 1), *(_stage(decode, keep) for keep in KEEPS), *_peers(decode)]
        lines.append(f"| {' | '.join([model, *cells, _ms(prompt, PROMPT), *_peers(prompt)])} |")
    return "\n".join(lines)


def _ms(rows: list[Row], tokens: int) -> str:
    return f"{rows[0].ms_per_token * tokens:.{2 if tokens == 1 else 0}f}" if rows else "–"


def _stage(rows: list[Row], keep: float) -> str:
    """Return the ratio of the bundle of one stage that keeps so much."""
    stages = {row.bundle: sum(other.bundle == row.bundle for other in rows) for row in rows}
    found = [r for r in rows if r.keep is not None and abs(r.keep - keep) < 0.02 and stages[r.bundle] == 1]
    return _ratio(found[0]) if found else "–"


def _peers(rows: list[Row]) -> list[str]:
    """Return the ratios of onnxruntime-genai and of llama.cpp at its best number of threads."""
    cells = []
    for name in ("genai: ", "llama.cpp: "):
        found = [row for row in rows if row.bundle.startswith(name)]
        cells.append(_ratio(min(found, key=lambda row: row.ratio or row.ms_per_token)) if found else "–")
    return cells


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return "–"
    interval = "" if row.ratio_low is None else f" [{row.ratio_low:.2f}, {row.ratio_high:.2f}]"
    return f"{row.ratio:.2f}{interval}"


def write_readme(readme: Path, benchmarks: Path) -> None:
    """Put the table between its marks in a Markdown file.

    Raises:
        FormatError: The marks are not there, or the figures are in another form.
    """
    text = readme.read_text("utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FormatError(f"{readme} has no lines {BEGIN} and {END}, between which the table goes")
    content: Any = read_json(benchmarks)
    table = readme_speed(content.get("speed", {}))
    readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    write_readme(Path(sys.argv[1]), Path(sys.argv[2]))
