"""One HTML page with figures and tables that holds everything it shows: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

MARK = "<!-- written by flrc-edge report -->"
# Even a figure could load nothing: the browser is told so.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --muted: #59636e; --line: #d9dee4; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --muted: #9aa4af; --line: #2d333b; }
}
body { margin: 0 auto; max-width: 52rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 3rem 0 .5rem; }
p { margin: .25rem 0 1rem; max-width: 44rem; }
.lead { color: var(--muted); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 1.25rem 0; font-size: .9rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; }
details { margin: .5rem 0; font-size: .85rem; }
summary { cursor: pointer; color: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0 1.25rem; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding: .4rem 0; }
th, td { text-align: right; padding: .15rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
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


def html_page(
    title: str,
    lead: str,
    *,
    facts: Sequence[tuple[str, str]],
    summary: Table,
    sections: Sequence[Section],
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
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(lead)}</p>',
        _table(summary),
        *map(_section, sections),
        *(f'<p class="lead">{escape(note)}</p>' for note in notes),
        "<h2>Where this comes from</h2>",
        "<dl>",
        *(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts),
        "</dl>",
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
            f'<img src="data:image/svg+xml;base64,{picture}" alt="{escape(section.alt)}">',
            "</figure>",
            f"<details><summary>Numbers</summary>\n{tables}\n</details>",
            "</section>",
        ]
    )


def _table(table: Table) -> str:
    header = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(c)}</td>" for c in rest) + "</tr>"
        for first, *rest in table.rows
    )
    return (
        f'<div class="scroll"><table>\n<caption>{escape(table.caption)}</caption>\n'
        f"<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )
