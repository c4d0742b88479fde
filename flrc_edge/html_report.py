"""One HTML page with figures and tables that holds everything it shows: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

MARK = "<!-- written by flrc-edge report -->"
# Even a figure could load nothing: the browser is told so.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_COLOURS = 4  # of stages; then again from the first
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --muted: #59636e; --line: #d9dee4;
  --stage-0: #1f2328; --stage-1: #0a5fa8; --stage-2: #b04a08; --stage-3: #7a4bb3; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --muted: #9aa4af; --line: #2d333b;
    --stage-0: #e6edf3; --stage-1: #6cb6ff; --stage-2: #ff9d57; --stage-3: #c4a1ff; }
}
body { margin: 0 auto; max-width: 52rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 3rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .25rem 0 1rem; max-width: 44rem; }
.lead { color: var(--muted); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 1.25rem 0; font-size: .9rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; }
@media (max-width: 40rem) { figure img { max-width: none; width: 38rem; } }
details { margin: .5rem 0; font-size: .85rem; }
summary { cursor: pointer; color: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1.25rem; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding: .4rem 0; }
th, td { text-align: right; padding: .15rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; margin-bottom: .25rem; }
.answer sup { font-size: .65em; padding-right: .1em; }
.stage-0 { color: var(--stage-0); } .stage-1 { color: var(--stage-1); } .stage-2 { color: var(--stage-2); }
.stage-3 { color: var(--stage-3); }
@media print { details > .scroll { display: block; } }
"""


@dataclass(frozen=True)
class Table:
    """Numbers as they are shown; the first column names the rows."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """A figure with what it shows in one sentence, and its numbers.

    Args:
        name: Of the figure's file, without ending.
        title: The heading.
        sentence: What the figure shows.
        alt: What kind of figure it is, for readers who do not see it.
        svg: The figure.
        tables: Its numbers.
    """

    name: str
    title: str
    sentence: str
    alt: str
    svg: bytes
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Piece:
    """A part of an answer that one stage computed."""

    stage: int
    text: str


@dataclass(frozen=True)
class AnswerSection:
    """Answers whose parts are coloured, and numbered, by stage.

    Args:
        name: Of the section.
        title: The heading.
        sentence: What is to be seen.
        answers: Prompt, pieces, and a remark on each.
    """

    name: str
    title: str
    sentence: str
    answers: tuple[tuple[str, tuple[Piece, ...], str], ...]


def html_page(
    title: str,
    lead: str,
    *,
    facts: Sequence[tuple[str, str]],
    summary: Table,
    sections: Sequence[Section | AnswerSection],
    notes: Sequence[str] = (),
) -> str:
    """Return the page.

    Args:
        title: The first heading.
        lead: A sentence below it.
        facts: Names and values, in pairs.
        summary: A table that is always open.
        sections: The figures.
        notes: Sentences on what is not shown.
    """
    parts = [
        "<!doctype html>",
        MARK,
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(lead)}</p>',
        _table(summary),
        *(_section(s) if isinstance(s, Section) else _answers(s) for s in sections),
        *(f'<p class="lead">{escape(note)}</p>' for note in notes),
        "<h2>Where this comes from</h2>",
        "<dl>",
        *(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts),
        "</dl>",
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _section(section: Section) -> str:
    picture = base64.b64encode(section.svg).decode()
    tables = "\n".join(map(_table, section.tables))
    return "\n".join(
        [
            "<section>",
            f"<h2>{escape(section.title)}</h2>",
            "<figure>",
            f"<figcaption><p>{escape(section.sentence)}</p></figcaption>",
            f'<div class="scroll" role="region" tabindex="0" aria-label="Figure: {escape(section.title)}">',
            f'<img src="data:image/svg+xml;base64,{picture}" alt="{escape(section.alt)}">',
            "</div>",
            "</figure>",
            f"<details><summary>Numbers</summary>\n{tables}\n</details>",
            "</section>",
        ]
    )


def _answers(section: AnswerSection) -> str:
    parts = ["<section>", f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.sentence)}</p>"]
    for prompt, pieces, remark in section.answers:
        text = "".join(
            f'<span class="stage-{piece.stage % _COLOURS}"><sup title="stage {piece.stage}">{piece.stage}</sup>'
            f"{escape(piece.text)}</span>"
            for piece in pieces
        )
        parts += [
            f"<h3>{escape(prompt)}</h3>",
            f'<p class="answer">{text}</p>',
            f'<p class="lead">{escape(remark)}</p>',
        ]
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    header = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(c)}</td>" for c in rest) + "</tr>"
        for first, *rest in table.rows
    )
    caption = escape(table.caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table>\n'
        f"<caption>{caption}</caption>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )
