"""The documents against the code: links, command lines and the fields of the manifest."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest

from flrc_edge.cli import COMMANDS, group
from flrc_runtime import manifest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    p
    for p in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "flrc_edge" / "data").glob("*.md"))
    if p.is_file()
)
MANUALS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken_links(path: Path) -> list[str]:
    text = path.read_text("utf-8")
    prose = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))
    broken = []
    for inline, reference in _LINK.findall(prose):
        target = inline or reference
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        if not there.exists() or (anchor and anchor not in anchors(there.read_text("utf-8"))):
            broken.append(target)
    return broken


def command_lines(text: str) -> Iterator[str]:
    """Every ``flrc-edge …`` of the code blocks (continued lines joined) and of inline code."""
    for block in _FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if line.startswith("flrc-edge "):
                yield line
    for code in re.findall(r"`([^`\n]+)`", _FENCE.sub("", text)):
        if code.startswith("flrc-edge "):
            yield code


def mistakes(line: str) -> list[str]:
    """What a command line names that the command line does not have."""
    words = shlex.split(line, comments=True)[1:]
    ends = [i for i, word in enumerate(words) if word in ("|", ">", "&&", ";", "2>")]
    words = words[: min(ends, default=len(words))]
    known = {option for p in group.params for option in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}
    found = []
    while words and words[0].startswith("-"):
        option = words.pop(0)
        if option not in known:
            found.append(f"no option {option}")
    if not words:
        return found
    command = group.get_command(click.Context(group), words[0])
    if command is None:
        return [*found, f"no command {words[0]}"]
    known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}
    for word in words[1:]:
        option = word.partition("=")[0]
        if re.match(r"--?[A-Za-z]", option) and option not in known:
            found.append(f"{words[0]} has no option {option}")
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_resolve(path: Path) -> None:
    assert broken_links(path) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A b\n[x](#a-b) [x](#none) [x](missing.md) [x](https://example.org) `[x](code.md)`\n[y]: gone.md\n"
    )
    assert broken_links(page) == ["#none", "missing.md", "gone.md"]


@pytest.mark.parametrize("path", MANUALS, ids=name)
def test_command_lines_exist(path: Path) -> None:
    wrong = {line: mistakes(line) for line in command_lines(path.read_text("utf-8"))}
    assert {line: found for line, found in wrong.items() if found} == {}


def test_a_wrong_command_line_is_found() -> None:
    page = (
        "```sh\nflrc-edge compress x -o y \\\n  --keeep .8  # a note\n$ flrc-edge nonsense\n```\n"
        "`flrc-edge verify`\n"
    )
    lines = list(command_lines(page))
    assert [mistakes(line) for line in lines] == [
        ["compress has no option --keeep"],
        ["no command nonsense"],
        [],
    ]
    assert mistakes("flrc-edge --loud bench b") == ["no option --loud"]
    assert mistakes('flrc-edge -q generate b "what is -x?" --show-stages | head -3') == []


def requests_of(picture: str) -> list[str]:
    """What a browser that shows an SVG file would ask the network for."""
    attributes = [
        (a.rpartition("}")[2], v) for e in ElementTree.fromstring(picture).iter() for a, v in e.items()
    ]
    links = [v for a, v in attributes if a in ("href", "src") and not v.startswith(("#", "data:"))]
    return links + re.findall(r"@import[^;]*|url\([\"']?(?![#\"'])[^)]*\)", picture)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "images").glob("*.svg")), ids=name)
def test_pictures_ask_the_network_for_nothing(path: Path) -> None:
    assert requests_of(path.read_text("utf-8")) == []


def test_a_request_of_a_picture_is_found() -> None:
    font = "<svg xmlns='http://www.w3.org/2000/svg'><style>@font-face { src: url(\"https://x.org/a\") }</style></svg>"
    assert requests_of(font) == ['url("https://x.org/a")']
    assert requests_of(
        "<svg><style>@import 'x.css';</style><image href='https://x.org/b'/><a href='#c'/></svg>"
    ) == [
        "https://x.org/b",
        "@import 'x.css'",
    ]


def test_the_manuals_show_every_command() -> None:
    text = "\n".join(p.read_text("utf-8") for p in [*MANUALS, ROOT / "CHANGELOG.md"])
    assert [c for c in COMMANDS if f"flrc-edge {c}" not in text] == []


def test_format_names_every_field() -> None:
    kinds = [
        k
        for k in vars(manifest).values()
        if isinstance(k, type) and is_dataclass(k) and k.__module__ == manifest.__name__
    ]
    assert len(kinds) >= 9
    text = (ROOT / "docs" / "format.md").read_text("utf-8")
    missing = [f"{k.__name__}.{f.name}" for k in kinds for f in fields(k) if f"`{f.name}`" not in text]
    assert missing == []


def test_format_states_the_version_and_limits() -> None:
    text = (ROOT / "docs" / "format.md").read_text("utf-8")
    assert f"Schema version {manifest.SCHEMA_VERSION}." in text
    assert f"1 to {manifest.MAX_STAGES} stages" in text


def test_every_test_that_reliability_names_is_there() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`test" in line]
    assert len(rows) > 40
    for row in rows:
        file = None
        for name in re.findall(r"`((?:tests/[\w/]+\.py::)?test_\w+)`", row):
            path, _, function = name.rpartition("::")
            file = path or file
            assert file is not None, row
            assert re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.M), name
