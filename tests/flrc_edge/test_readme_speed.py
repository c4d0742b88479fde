"""The table of speeds in README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flrc_edge.errors import FormatError
from flrc_edge.readme_speed import BEGIN, END, readme_speed, write_readme


def row(bundle: str, test: str, tokens: int, ms: float, **more: Any) -> dict[str, Any]:
    same = {"stage": "", "keep": None, "samples": 8, "ms_spread": 0.1, "tokens_per_second": 1e3 / ms}
    return {"bundle": bundle, "test": test, "tokens": tokens, "ms_per_token": ms, **same, **more}


def ours(bundle: str, keep: float, ms: float, ratio: float, stage: str = "0") -> dict[str, Any]:
    return row(bundle, "decode", 64, ms, stage=stage, keep=keep, ratio=ratio)


RESULT = {
    "rows": [
        row("dense", "prompt", 512, 1.0, stage="0", keep=1.0, ratio=1.0),
        row("genai: g", "prompt", 512, 2.0, ratio=2.0),
        row("llama.cpp: q (2 threads)", "prompt", 512, 1.5, ratio=1.5, ratio_low=1.4, ratio_high=1.625),
        row("llama.cpp: q (1 thread)", "prompt", 512, 3.0, ratio=3.0),
        ours("dense", 1.0, 3.0, 1.0),
        ours("stages", 0.8, 2.9, 0.9),
        ours("stages", 0.6, 2.8, 0.85, "1"),
        ours("one", 0.795, 2.5, 0.81),
        row("genai: g", "decode", 64, 6.6, ratio=2.2),
        row("llama.cpp: q (2 threads)", "decode", 64, 6.6, ratio=2.2),
        row("llama.cpp: q (1 thread)", "decode", 64, 6.0, ratio=2.0),
        row("dense", "decode", 1024, 4.0, stage="0", keep=1.0, ratio=1.0),
    ],
    "moves": [], "beside": [], "loading": [], "operators": [],
    "bandwidth": 1e10, "decode_tokens": 32, "repetitions": 8, "threads": 2, "machine": "m", "versions": {},
}  # fmt: skip


def test_a_row_for_every_model() -> None:
    line = readme_speed({"small": RESULT}).splitlines()[-1]
    assert line == "| small | 3.00 | 0.81 | – | – | 2.20 | 2.00 | 512 | 2.00 | 1.50 [1.40, 1.62] |"


def test_it_takes_the_earlier_tables_place(tmp_path: Path) -> None:
    readme, figures = tmp_path / "README.md", tmp_path / "figures.json"
    figures.write_text(json.dumps({"speed": {"small": RESULT}}))
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        write_readme(readme, figures)
        text = readme.read_text()
        assert text.startswith(f"before\n{BEGIN}\n| | dense, ms |") and text.endswith(f"|\n{END}\nafter\n")
    readme.write_text("no marks")
    with pytest.raises(FormatError, match="between which the table goes"):
        write_readme(readme, figures)


def test_the_readme_has_the_marks_and_figures_are_in_form() -> None:
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text("utf-8")
    assert text.index(BEGIN) < text.index(END)
    assert readme_speed(json.loads((root / "docs" / "benchmarks.json").read_text())["speed"])
