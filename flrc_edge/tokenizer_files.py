"""The one owner of a model's tokenizer: what transformers makes of a folder's files, and the files written of it.

transformers merges up to five files (tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json,
chat templates). What comes out is written as tokenizer.json, tokenizer_config.json and perhaps chat_template.jinja, in
which transformers 4 and 5, the runtime and the Java engine each find all of it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flrc_runtime.chat_template import ChatTemplate
from flrc_runtime.errors import FlrcError, FormatError, UnsupportedModelError
from flrc_runtime.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_SLOW = (
    "tokenizer.model",
    "vocab.json",
    "tekken.json",
    "vocab.txt",
)  # what older and other tokenizers are kept in
_LONGEST = 2**31  # a model_max_length beyond it means that none was given
# Spaces, digits, signs, other scripts, and special tokens amid words: where one class splits otherwise than another.
_PROBES = (
    "Once upon a time",
    " a  b\n\n\tc",
    "I'll pay 12345.67€, don't!",
    "日本語 👍 naïve",
    "x = [i**2]\n    return x",
)
_PROBED_TOKENS = 4
_log = logging.getLogger(__name__)


def open_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer as transformers reads it, without the truncation and padding that training may have left.

    Not AutoTokenizer: from transformers 5 on, a model's own class may rebuild the pre-tokenizer in place of the one in
    tokenizer.json, which is what transformers 4, other runtimes and the device read. See :func:`check_own_class`.

    Args:
        folder: A Hugging Face folder, a checkpoint or a bundle.

    Raises:
        FlrcError: There is no tokenizer.json.
        FormatError: A file cannot be read.
        UnsupportedModelError: The tokenizer splits the special tokens of a text.
    """
    from transformers import PreTrainedTokenizerFast

    check_files(folder)
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True
        )
    except (
        Exception
    ) as error:  # the tokenizers library raises bare Exception, transformers whatever a file leads to
        first = str(error).strip().partition("\n")[0]
        raise FormatError(
            f"{folder.name}: the tokenizer cannot be read ({type(error).__name__}: {first})"
        ) from error
    if tokenizer.split_special_tokens:
        raise UnsupportedModelError(
            f"{folder.name}/{CONFIG}: split_special_tokens is set, which no chat template works with",
            hint="remove it from the file",
        )
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    _flag_special(tokenizer, folder)
    return tokenizer


def check_files(folder: Path) -> None:
    """Refuse a folder without a tokenizer.json.

    Raises:
        FlrcError: There is none.
    """
    if (folder / TOKENIZER).is_file():
        return
    slow = next((name for name in _SLOW if (folder / name).is_file()), None)
    holds = (
        f"holds no {TOKENIZER}" if slow is None else f"holds its tokenizer as {slow}, without a {TOKENIZER}"
    )
    raise FlrcError(
        f"{folder} {holds}",
        hint="save it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a tokenizer so that transformers 4 and 5, and every other reader, find the same in it.

    The class is the one that takes tokenizer.json as it is; special tokens are spelled out, and flagged there.
    """
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens_map}
    unnamed = [str(token) for token in tokenizer.extra_special_tokens]
    if unnamed:  # transformers 5 has another name for them, and reads this one
        config["additional_special_tokens"] = unnamed
    if tokenizer.model_max_length < _LONGEST:
        config["model_max_length"] = tokenizer.model_max_length
    # transformers 4 would take spaces out of what it decodes; transformers 5 and the runtime never do
    config["clean_up_tokenization_spaces"] = False
    template = tokenizer.chat_template
    if isinstance(template, dict):  # by name
        config["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
    elif template is not None:
        (folder / TEMPLATE).write_text(template, "utf-8", newline="")
    write_json(folder / CONFIG, config)


def end_tokens(tokenizer: PreTrainedTokenizerFast, named: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens that end an answer: those a configuration names, and the tokenizer's own."""
    own = tokenizer.eos_token_id
    return tuple(dict.fromkeys([*named, *([own] if isinstance(own, int) else [])]))


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int, *, name: str) -> None:
    """Warn of tokens that the model has no embedding of; texts that hold one are refused when they are read."""
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= vocab_size}
    if beyond:
        first = min(beyond)
        _log.warning(
            "%s: the tokenizer has tokens beyond the %d rows of the embedding (%s is %d); texts must not hold them",
            name,
            vocab_size,
            beyond[first],
            first,
        )


def check_template(tokenizer: PreTrainedTokenizerFast, ends: Sequence[int], *, name: str) -> None:
    """Warn if the chat template has no default, or closes an answer with a special token that ends none.

    Raises:
        FormatError: It is too long or not a template.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict) and "default" not in template:
        _log.warning(
            "%s has chat templates (%s), none of them called default: it will not chat",
            name,
            ", ".join(template),
        )
    elif template is not None:
        ChatTemplate(template["default"] if isinstance(template, dict) else template, {})
        closing = _closing_token(tokenizer)
        if closing is not None and closing not in ends:
            _log.warning(
                "%s: its chat template closes an answer with %s (%d), which is no end token: answers will not end "
                "there; name it as eos_token_id in generation_config.json",
                name,
                tokenizer.convert_ids_to_tokens(closing),
                closing,
            )


def check_own_class(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Warn if AutoTokenizer of the installed transformers reads texts otherwise than tokenizer.json says."""
    from transformers import AutoTokenizer

    try:
        own: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a class with code of its own, or of a package that is not here
        _log.debug("AutoTokenizer does not open %s: %s", folder, error)
        return
    if type(own) is type(tokenizer):
        return
    special = tokenizer.all_special_tokens[:_PROBED_TOKENS]
    probes = [*_PROBES, *(f"Hi{token}\nuser {token}ok" for token in special)]
    for text in probes:
        if own(text)["input_ids"] != tokenizer(text)["input_ids"]:
            _log.warning(
                "%s: transformers' %s reads %r otherwise than tokenizer.json says; tokenizer.json is taken",
                folder.name,
                type(own).__name__,
                text,
            )
            return


def _flag_special(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Flag every token as special that any of the files calls so: decoding is to leave them all out."""
    from tokenizers import AddedToken

    backend = tokenizer.backend_tokenizer
    listed = (
        json.loads((folder / TOKENIZER).read_bytes()).get("added_tokens") or ()
    )  # the library has read it
    flagged = {
        token["content"] for token in listed if token.get("special")
    }  # the library numbers them itself
    flagged |= set(tokenizer.all_special_tokens)
    for token in backend.get_added_tokens_decoder().values():
        if token.content in flagged and not token.special:
            backend.add_special_tokens(
                [
                    AddedToken(
                        token.content,
                        single_word=token.single_word,
                        lstrip=token.lstrip,
                        rstrip=token.rstrip,
                        normalized=token.normalized,
                        special=True,
                    )
                ]
            )


def _closing_token(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the special token that the template writes right behind an answer; None if it writes another text."""
    mark = "⟦answer⟧"
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": mark},
        {"role": "user", "content": "Go"},
    ]
    try:
        text: Any = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # what a stranger's template raises
        return None
    behind = str(text).partition(mark)[2].lstrip()
    added = sorted(tokenizer.added_tokens_decoder.items(), key=lambda item: -len(item[1].content))
    return next((i for i, token in added if token.special and behind.startswith(token.content)), None)
