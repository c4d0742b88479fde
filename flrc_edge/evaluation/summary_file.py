"""Summarization data: files of DialogSum or CNN/DailyMail, their prompts, and a split by hash.

A row holds an id, a source and a reference: ``fname, dialogue, summary`` (DialogSum) or ``id, article, highlights``
(CNN/DailyMail), as lines of JSON (``.jsonl``) or as CSV with a header (``.csv``). Prompts are those of PMPD
(arXiv 2410.13461), whose data and metrics FLRC shares.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from flrc_edge.errors import UsageError

Split = Literal["test", "validation", "all"]


@dataclass(frozen=True)
class _Kind:
    """The fields of one data set, and its prompt."""

    id: str
    source: str
    reference: str
    prompt: str


KINDS = {
    "DialogSum": _Kind(
        "fname",
        "dialogue",
        "summary",
        "For the following dialogue: {}\n\nReturn a summary comprising of 1 or 2 sentences.",
    ),
    "CNN/DM": _Kind(
        "id",
        "article",
        "highlights",
        "For the following article: {}\n\nReturn a summary comprising of around 3 sentences.",
    ),
}


@dataclass(frozen=True)
class Sample:
    """One text to summarize: the prompt around it, and what a person wrote."""

    id: str
    prompt: str
    reference: str


def read_samples(path: str | Path, *, split: Split = "test") -> tuple[str, list[Sample]]:
    """Read the samples of a split, in the order of the file.

    Args:
        path: A ``.jsonl`` or ``.csv`` file.
        split: ``test`` and ``validation`` are halves by the hash of the id; ``all`` is both.

    Returns:
        The name of the data set (``DialogSum`` or ``CNN/DM``) and its samples.

    Raises:
        UsageError: The file is missing, empty, binary, not UTF-8, of another format, or lacks a field; or the
            split is empty.
    """
    if split not in get_args(Split):
        raise UsageError(f"the split {split!r} is not one of {', '.join(get_args(Split))}")
    path = Path(path)
    rows = list(_rows(path))
    if not rows:
        raise UsageError(f"the summarization file {path} holds no rows")
    name, kind = _kind(path, rows[0][1])
    samples = [_sample(path, number, row, kind) for number, row in rows]
    chosen = [s for s in samples if split == "all" or split_of(s.id) == split]
    if not chosen:
        raise UsageError(f"none of the {len(samples)} rows of {path} falls into the split {split!r}")
    return name, chosen


def split_of(sample_id: str) -> Split:
    """Return the split a sample belongs to: ``test`` if the last bit of the SHA-256 of its id is set."""
    return "test" if hashlib.sha256(sample_id.encode()).digest()[-1] & 1 else "validation"


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the rows with their numbers, from 1."""
    if path.suffix not in (".jsonl", ".csv"):
        raise UsageError(f"the summarization file {path} must end in .jsonl or .csv")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"the summarization file {path} is not UTF-8") from None
    except OSError as error:
        raise UsageError(f"the summarization file {path} cannot be read: {error.strerror}") from None
    if "\x00" in text:
        raise UsageError(f"the summarization file {path} looks binary (it holds a NUL character)")
    try:
        if path.suffix == ".csv":
            yield from enumerate(csv.DictReader(io.StringIO(text, newline="")), 1)
            return
        # Not splitlines: a JSON string may hold U+2028 and the like as they are.
        for number, line in enumerate((part for part in text.split("\n") if part.strip()), 1):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UsageError(f"row {number} of {path} is not a JSON object")
            yield number, row
    except json.JSONDecodeError:
        raise UsageError(f"row {number} of {path} is not JSON") from None
    except csv.Error as error:
        raise UsageError(f"{path} is not a CSV file: {error}") from None


def _kind(path: Path, row: Mapping[str, Any]) -> tuple[str, _Kind]:
    for name, kind in KINDS.items():
        if kind.source in row:
            return name, kind
    known = " or ".join(f"{k.id}, {k.source}, {k.reference}" for k in KINDS.values())
    raise UsageError(f"the rows of {path} have none of the fields of a summarization file: {known}")


def _sample(path: Path, number: int, row: Mapping[str, Any], kind: _Kind) -> Sample:
    for field in (kind.id, kind.source, kind.reference):
        value = row.get(field)
        if not isinstance(value, str) or not value.strip():
            raise UsageError(f"row {number} of {path} has no text in the field {field!r}")
    return Sample(row[kind.id], kind.prompt.format(row[kind.source]), row[kind.reference])
