"""Calibration and evaluation text -> token windows.

A source is a file, a folder of text files, or the name of a sample that ships with the package. Texts are cut
into windows of equal length; nothing is padded and no window crosses two sources.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flrc_edge.errors import UsageError
from flrc_runtime.manifest import TextSource

if TYPE_CHECKING:
    import torch

DATA = Path(__file__).parent / "data"
BUILT_IN = {
    "wikitext2": "wikitext2_calibration.txt",
    "austen": "austen_calibration.txt",
    "wikitext2-heldout": "wikitext2_heldout.txt",
    "austen-heldout": "austen_heldout.txt",
}
SUFFIXES = (".txt", ".md", ".raw", ".jsonl")
WHOLE = 32 * 2**20  # bytes; a larger file is sampled in pieces spread over it, never read whole
PIECE = 2**20


@dataclass(frozen=True)
class WeightedText:
    """A text source and its share of the calibration windows (relative to the other weights)."""

    name: str
    weight: float = 1.0

    @classmethod
    def parse(cls, spec: str) -> WeightedText:
        """Parse ``NAME`` or ``NAME:WEIGHT``.

        Raises:
            UsageError: The weight is not a positive number.
        """
        name, colon, weight = spec.rpartition(":")
        if not colon or not _is_number(weight):
            return cls(spec)
        if not 0 < float(weight) < float("inf"):
            raise UsageError(f"the weight in {spec!r} must be a positive number")
        return cls(name, float(weight))


@dataclass(frozen=True)
class Windows:
    """Token windows ``ids: [windows, length] int64`` and where they come from."""

    ids: torch.Tensor
    sources: tuple[TextSource, ...]


def token_windows(
    tokenizer: Any,
    texts: tuple[WeightedText, ...],
    *,
    windows: int | None,
    length: int,
    seed: int | None = None,
) -> Windows:
    """Cut texts into windows.

    Args:
        tokenizer: A Hugging Face tokenizer; every window starts with its BOS token if it adds one itself.
        texts: The sources; windows are shared out in proportion to their weights.
        windows: How many windows; None takes every whole window there is.
        length: Tokens a window.
        seed: Chooses where the windows start; None takes them from the beginning, without gaps.

    Raises:
        UsageError: A source is missing, not UTF-8, empty, or holds too few tokens.
    """
    import torch

    total = sum(t.weight for t in texts)
    rows: list[torch.Tensor] = []
    sources: list[TextSource] = []
    left = windows
    for i, text in enumerate(texts):
        count = None
        if windows is not None and left is not None:
            last = i == len(texts) - 1
            count = left if last else min(left, round(windows * text.weight / total))
            left -= count
            if count == 0:
                continue
        content = read_text(text.name)
        picked = _cut(tokenizer, content, name=text.name, count=count, length=length, seed=seed)
        rows.append(picked)
        digest = hashlib.sha256(content.encode()).hexdigest()
        sources.append(TextSource(Path(text.name).name, digest, text.weight, picked.numel()))
    return Windows(torch.cat(rows), tuple(sources))


def read_text(name: str) -> str:
    """Read a built-in sample, a UTF-8 file (of a ``.jsonl`` file the field ``text``), or a folder of such files.

    Raises:
        UsageError: There is no such text, or it is empty or not UTF-8.
    """
    path = DATA / BUILT_IN[name] if name in BUILT_IN else Path(name)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise UsageError(f"{name} holds no text file ({', '.join(SUFFIXES)})")
        text = "\n\n".join(_read_file(p) for p in files)
    elif path.is_file():
        text = _read_file(path)
    else:
        raise UsageError(
            f"there is no text {name!r}",
            hint=f"give a file, a folder, or one of {', '.join(BUILT_IN)}",
        )
    if not text.strip():
        raise UsageError(f"the text {name} is empty")
    return text


def _read_file(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size <= WHOLE:
            text = path.read_bytes().decode("utf-8")
        else:
            with path.open("rb") as file:
                pieces = []
                for i in range(WHOLE // PIECE):
                    file.seek(i * (size - PIECE) // (WHOLE // PIECE - 1))
                    # The first and last line of a piece may be torn.
                    pieces.append(file.read(PIECE).split(b"\n", 1)[-1].rsplit(b"\n", 1)[0].decode("utf-8"))
                text = "\n".join(pieces)
        if "\x00" in text:
            raise UsageError(f"the text {path} looks binary (it holds a NUL character)")
        if path.suffix == ".jsonl":
            return "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
    except UnicodeDecodeError:
        raise UsageError(f"the text {path} is not UTF-8") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} must hold one JSON object with a field 'text' on every line") from None
    except OSError as error:
        raise UsageError(f"the text {path} cannot be read: {error.strerror}") from None
    return text


def _cut(
    tokenizer: Any, text: str, *, name: str, count: int | None, length: int, seed: int | None
) -> torch.Tensor:
    import torch

    # The tokenizer warns about texts longer than the model's context; windows are what the model sees.
    ids = torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long
    )
    bos = leading_bos(tokenizer)
    body = length - len(bos)
    have = len(ids) // body
    need = count or 1
    if have < need:
        raise UsageError(
            f"the text {name} holds {len(ids)} tokens, {need * body} are needed",
            hint="give a longer text, fewer tokens, or a shorter window",
        )
    count = have if count is None else count
    if seed is None:
        starts = torch.arange(count) * body
    else:
        # Spread over the whole text: one window in each of `count` equal parts, at a random place of its part.
        part = len(ids) / count
        generator = torch.Generator().manual_seed(seed)
        room = torch.rand(count, generator=generator, dtype=torch.float64) * (part - body)
        starts = (torch.arange(count) * part + room).long()
    prefix = torch.tensor(bos, dtype=torch.long)
    return torch.stack([torch.cat([prefix, ids[s : s + body]]) for s in starts.tolist()])


def leading_bos(tokenizer: Any) -> list[int]:
    """Return the BOS token as a list if the tokenizer puts one in front of every text, else an empty list."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
