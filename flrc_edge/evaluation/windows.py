"""The windows perplexity is measured on, and which of their tokens count.

Windows start every ``stride`` tokens, each with BOS if the tokenizer adds one. Every token after the first of the
first window counts once; with ``stride`` equal to the window, every token after each window's first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flrc_edge.errors import UsageError
from flrc_edge.texts import check_ids, leading_bos, read_text


@dataclass(frozen=True)
class TextWindows:
    """Windows of one text.

    Attributes:
        name: Of the text.
        ids: ``[windows, length]`` int64.
        first: Of each window, the index of the first token that counts.
        bytes: Of each window, the UTF-8 bytes of the tokens that count.
        stride: Tokens from one window's start to the next.
        bos: Whether each window starts with BOS.
    """

    name: str
    ids: Tensor
    first: tuple[int, ...]
    bytes: tuple[int, ...]
    stride: int
    bos: bool

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return sum(self.ids.shape[1] - f for f in self.first)


def text_windows(
    tokenizer: Any,
    name: str,
    *,
    windows: int | None,
    length: int,
    stride: int | None = None,
    vocab_size: int | None = None,
) -> TextWindows:
    """Cut a text into windows from its beginning.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        name: A file, a folder of text files or a built-in sample.
        windows: How many; None for all that are whole.
        length: Tokens of each, BOS included.
        stride: Tokens from one window's start to the next; None for no overlap.
        vocab_size: Rows of the model's embedding; None if no token can lie beyond them.

    Raises:
        UsageError: The text is missing, empty, binary, not UTF-8, too short, or holds a token that the model has no
            embedding of; or a number is out of range.
    """
    if length < 2:
        raise UsageError(f"a window must hold at least 2 tokens, not {length}")
    if windows is not None and windows < 1:
        raise UsageError(f"the number of windows must be at least 1, not {windows}")
    bos = leading_bos(tokenizer)
    body = length - len(bos)
    step = body if stride is None else min(stride, body)
    if step < 1:
        raise UsageError(f"the stride must be at least 1 token, not {stride}")
    text = read_text(name, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    have = (len(ids) - body) // step + 1 if len(ids) >= body else 0
    need = 1 if windows is None else windows
    if have < need:
        raise UsageError(
            f"the text {name} holds {len(ids)} tokens, {body + (need - 1) * step} are needed",
            hint="give a longer text, fewer windows, or a shorter window",
        )
    rows, firsts, sizes = [], [], []
    done = 0  # tokens of the text that no later window counts
    for start in range(0, (have if windows is None else windows) * step, step):
        stop = start + body
        first = max(done, start if bos else start + 1)
        rows.append([*bos, *ids[start:stop]])
        firsts.append(first - start + len(bos))
        sizes.append(len(text[ends[first - 1] if first else 0 : ends[stop - 1]].encode()))
        done = stop
    cut = torch.from_numpy(np.array(rows, np.int64))
    check_ids(cut, tokenizer, vocab_size, where=f"the text {name}")
    return TextWindows(
        Path(name).name,
        cut,
        tuple(firsts),
        tuple(sizes),
        step,
        bool(bos),
    )
