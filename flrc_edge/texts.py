"""Calibration and evaluation text -> token windows.

A source is a file, a folder of text files, or the name of a sample that ships with the package. Texts are cut
into windows of equal length; nothing is padded and no window crosses two sources.
"""

from __future__ import annotations

import hashlib
import json
from codecs import getincrementaldecoder
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from flrc_edge.errors import UsageError
from flrc_runtime.manifest import TextSource

if TYPE_CHECKING:
    import torch

DATA = Path(__file__).parent / "data"
BUILT_IN = {
    "wikitext2": "wikitext2_calibration.txt",
    "austen": "austen_calibration.txt",
    "chat": "chat_calibration.jsonl",
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
            name, weight = spec, "1"
        if not name:
            raise UsageError(f"{spec!r} names no text")
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
    vocab_size: int | None = None,
) -> Windows:
    """Cut texts into windows.

    Args:
        tokenizer: A Hugging Face tokenizer; every window starts with its BOS token if it adds one itself.
        texts: The sources; windows are shared out in proportion to their weights.
        windows: How many windows; None takes every whole window there is.
        length: Tokens a window.
        seed: Chooses where the windows start; None takes them from the beginning, without gaps.
        vocab_size: Rows of the model's embedding; None if no token can lie beyond them.

    Raises:
        UsageError: A source is missing, not UTF-8, empty, holds too few tokens, or one that the model has no embedding
            of; none, or no window, is asked for.
    """
    import torch

    if not texts:
        raise UsageError("name at least one text")
    if windows is not None and windows < 1:
        raise UsageError(f"the number of windows must be at least 1, not {windows}")
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
        content = read_text(text.name, tokenizer)
        picked = _cut(tokenizer, content, name=text.name, count=count, length=length, seed=seed)
        check_ids(picked, tokenizer, vocab_size, where=f"the text {text.name}")
        rows.append(picked)
        digest = hashlib.sha256(content.encode()).hexdigest()
        sources.append(TextSource(Path(text.name).name, digest, text.weight, picked.numel()))
    return Windows(torch.cat(rows), tuple(sources))


def read_text(name: str, tokenizer: Any = None) -> str:
    """Read a built-in sample, a UTF-8 file, or a folder of such files.

    A line of a ``.jsonl`` file holds ``text``, or ``messages`` (role and content), which are written as the
    tokenizer's chat template says.

    Args:
        name: Of the sample, file or folder.
        tokenizer: A Hugging Face tokenizer; without one, or without a template, messages become plain lines.

    Raises:
        UsageError: There is no such text, or it is empty or not UTF-8.
    """
    path = DATA / BUILT_IN[name] if name in BUILT_IN else Path(name)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise UsageError(f"{name} holds no text file ({', '.join(SUFFIXES)})")
        text = "\n\n".join(_read_file(p, tokenizer) for p in files)
    elif path.is_file():
        text = _read_file(path, tokenizer)
    else:
        raise UsageError(
            f"there is no text {name!r}",
            hint=f"give a file, a folder, or one of {', '.join(BUILT_IN)}",
        )
    if not text.strip():
        raise UsageError(f"the text {name} is empty")
    return text


def _read_file(path: Path, tokenizer: Any) -> str:
    try:
        size = path.stat().st_size
        text = path.read_bytes().decode("utf-8-sig") if size <= WHOLE else _read_pieces(path, size)
        if "\x00" in text:
            raise UsageError(f"the text {path} looks binary (it holds a NUL character)")
    except UnicodeDecodeError:
        raise UsageError(f"the text {path} is not UTF-8") from None
    except OSError as error:
        raise UsageError(f"the text {path} cannot be read: {error.strerror}") from None
    if path.suffix != ".jsonl":
        return text
    # Not splitlines: a JSON string may hold U+2028 and the like as they are.
    lines, read = enumerate(text.split("\n"), 1), "" if size <= WHOLE else " of what is read of it"
    return "".join(_document(line, tokenizer, f"{path}, line {i}{read}") for i, line in lines if line.strip())


def _read_pieces(path: Path, size: int) -> str:
    """Read pieces spread over a large file, without the lines (or, in a text without lines, characters) they tear."""
    count = max(2, WHOLE // PIECE)
    lines = path.suffix == ".jsonl"
    pieces = []
    with path.open("rb") as file:
        for i in range(count):
            file.seek(i * (size - PIECE) // (count - 1))
            piece = file.read(PIECE)
            if i > 0:
                head, newline, rest = piece.partition(b"\n")
                piece = rest if newline or lines else head.lstrip(bytes(range(0x80, 0xC0)))
            if i < count - 1:
                whole, newline, _ = piece.rpartition(b"\n")
                piece = whole if newline or lines else piece
            pieces.append(getincrementaldecoder("utf-8")().decode(piece))
    if not any(pieces):
        raise UsageError(f"the text {path} holds no line shorter than the {PIECE} bytes read at a time")
    return "\n".join(pieces).removeprefix("\ufeff")


def _document(line: str, tokenizer: Any, where: str) -> str:
    """Return the text of one line of a ``.jsonl`` file."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is no JSON: {error}") from None
    document = value if isinstance(value, dict) else {}
    if "messages" in document:
        return _chat(document["messages"], tokenizer, where)
    if not isinstance(document.get("text"), str):
        raise UsageError(f"{where} must be a JSON object with a field 'text' (a text) or 'messages'")
    return f"{document['text']}\n\n"


def _chat(messages: Any, tokenizer: Any, where: str) -> str:
    """Return a chat as the template writes it, or as plain lines where there is none."""
    said = messages if isinstance(messages, list) else []
    if not said or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in said):
        raise UsageError(f"{where}: 'messages' must be a list of objects with a role and a content")
    for message in said:  # a turn of tool calls may have none
        if not isinstance(message.get("content"), str | list | None):
            raise UsageError(f"{where}: the content of a message is no text")
    if has_template(tokenizer):
        try:
            rendered: str = tokenizer.apply_chat_template(said, tokenize=False)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise UsageError(f"{where}: the chat template refuses the messages: {error}") from None
        return rendered
    if not all(isinstance(m.get("content"), str) for m in said):
        raise UsageError(f"{where}: the content of a message is no text, and there is no chat template")
    return "".join(f"{m['role'].capitalize()}: {m['content']}\n\n" for m in said)


def has_template(tokenizer: Any) -> bool:
    """Whether a Hugging Face tokenizer writes chats: of several templates, the one called default does."""
    template = getattr(tokenizer, "chat_template", None)
    return "default" in template if isinstance(template, dict) else bool(template)


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


def check_ids(ids: torch.Tensor, tokenizer: Any, vocab_size: int | None, *, where: str) -> None:
    """Refuse token ids beyond the embedding: a tokenizer may have tokens that its model never got.

    Raises:
        UsageError: ``where`` holds one.
    """
    largest = int(ids.max()) if vocab_size is not None and ids.numel() else -1
    if vocab_size is not None and largest >= vocab_size:
        raise UsageError(
            f"{where} holds {tokenizer.convert_ids_to_tokens(largest)!r}, token {largest}, "
            f"and the model's embedding has {vocab_size} rows",
            hint="leave it out of the text, or resize the model's embedding to its tokenizer",
        )


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
