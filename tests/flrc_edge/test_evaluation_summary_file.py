"""Summarization files: formats, prompts, the split, and every way to be wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from flrc_edge.errors import UsageError
from flrc_edge.evaluation.summary_file import read_samples, split_of


def row(i: int, **change: Any) -> dict[str, Any]:
    return {
        "fname": f"d{i}",
        "dialogue": f"#Person1#: {i} {{}}\n#Person2#: No.",
        "summary": f"Sum {i}.",
        **change,
    }


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    return path


def test_dialogsum(tmp_path: Path) -> None:
    name, samples = read_samples(jsonl(tmp_path / "d.jsonl", [row(i) for i in range(3)]), split="all")
    assert name == "DialogSum" and [s.id for s in samples] == ["d0", "d1", "d2"]
    assert samples[1].reference == "Sum 1."
    assert samples[1].prompt == (
        "For the following dialogue: #Person1#: 1 {}\n#Person2#: No.\n\n"
        "Return a summary comprising of 1 or 2 sentences."
    )


def test_cnn(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "id", "article", "highlights"])
        writer.writerow(["0", "ab12", 'A "long", story\nin two lines.', "It is long .\nIt ends ."])
    name, (sample,) = read_samples(path, split="all")
    assert name == "CNN/DM" and sample.id == "ab12" and sample.reference == "It is long .\nIt ends ."
    assert sample.prompt == (
        'For the following article: A "long", story\nin two lines.\n\n'
        "Return a summary comprising of around 3 sentences."
    )


def test_the_split_is_by_the_id_alone(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [row(i) for i in range(200)])
    found = {
        split: [s.id for s in read_samples(path, split=split)[1]] for split in ("test", "validation", "all")
    }
    assert sorted(found["test"] + found["validation"]) == sorted(found["all"]) and len(found["all"]) == 200
    assert 70 < len(found["test"]) < 130 and all(split_of(i) == "test" for i in found["test"])
    shuffled = jsonl(tmp_path / "e.jsonl", [row(i, dialogue="other") for i in reversed(range(200))])
    assert [s.id for s in read_samples(shuffled, split="test")[1]] == found["test"][::-1]
    assert [split_of(f"d{i}") for i in range(4)] == ["test", "test", "validation", "validation"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.csv", b"", "holds no rows"),
        ("a.csv", b"id,article,highlights\n", "holds no rows"),
        ("a.jsonl", b"\xff\xfe{}", "is not UTF-8"),
        ("a.jsonl", b'{"fname": "\x00"}', "looks binary"),
        ("a.jsonl", b"{nonsense", "row 1 of .* is not JSON"),
        ("a.jsonl", b"[1]", "row 1 of .* is not a JSON object"),
        ("a.jsonl", b'{"text": "x"}', "none of the fields of a summarization file"),
        ("a.csv", b"id,text\n1,x\n", "none of the fields of a summarization file"),
        ("a.csv", b"id,article,highlights\n1,x\n", "row 1 of .* has no text in the field 'highlights'"),
        ("a.csv", b"article,highlights\nx,y\n", "row 1 of .* has no text in the field 'id'"),
        ("a.txt", b"x", "must end in .jsonl or .csv"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_samples(path, split="all")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"summary": None}, "summary"),
        ({"dialogue": " "}, "dialogue"),
        ({"fname": 3}, "fname"),
        ({"summary": ["a"]}, "summary"),
    ],
)
def test_a_row_without_a_field(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    path = jsonl(tmp_path / "d.jsonl", [row(0), row(1), row(2, **change)])
    with pytest.raises(UsageError, match=rf"row 3 of .* has no text in the field '{field}'"):
        read_samples(path, split="all")
    without = {k: v for k, v in row(1).items() if k != field}
    with pytest.raises(UsageError, match=rf"row 2 of .* has no text in the field '{field}'"):
        read_samples(jsonl(path, [row(0), without]), split="all")


def test_a_file_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_samples(tmp_path / "none.jsonl")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_samples(tmp_path / "folder.csv")


def test_an_empty_or_unknown_split(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [row(1)])
    with pytest.raises(UsageError, match=r"none of the 1 rows of .* falls into the split 'validation'"):
        read_samples(path, split="validation")
    with pytest.raises(UsageError, match="the split 'train' is not one of"):
        read_samples(path, split="train")  # type: ignore[arg-type]
