"""The vocabulary of a GGUF file as a Hugging Face tokenizer that gives llama.cpp's token ids.

Sentencepiece merges whichever neighbours make the token of the highest score; the BPE of ``tokenizers`` does the
same with the pairs of all tokens ranked by score. Equal scores of different tokens are taken in file order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flrc_runtime.errors import FormatError

from .gguf_vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPACE = "\u2581"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# As in the tokenizer.json of the originals; they differ in how many digits stay together.
_SPLITS = {
    "qwen2": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
    "llama3": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
}


def tokenizer_of(vocabulary: Vocabulary, file: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a vocabulary; ``file`` is named in errors.

    Raises:
        FormatError: Its parts do not fit together.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    try:
        backend = _sentencepiece(vocabulary) if vocabulary.kind == "llama" else _byte_level(vocabulary)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise FormatError(f"{file}: its tokenizer cannot be built ({error})") from None
    special, text = [], []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in (CONTROL, UNKNOWN):
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED:  # matched in a text before anything else, and part of an answer
            text.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(text)
    _add_ends(backend, vocabulary)
    ids = {
        "bos_token": vocabulary.bos,
        "eos_token": next(iter(vocabulary.ends), None),
        "unk_token": vocabulary.unknown,
        "pad_token": vocabulary.padding,
    }
    names = {name: vocabulary.tokens[i] for name, i in ids.items() if i is not None}
    tokenizer: PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = vocabulary.template
    return tokenizer


def _sentencepiece(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    unknown = None if vocabulary.unknown is None else vocabulary.tokens[vocabulary.unknown]
    backend = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_ranked_pairs(vocabulary, ids),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.space_prefix:
        # a normalizer sees every stretch between special tokens by itself, and so does llama.cpp's prefix
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    return backend


def _ranked_pairs(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return every pair of tokens that makes a token, the highest score first."""
    pairs = []
    for token, score in zip(vocabulary.tokens, vocabulary.scores, strict=True):
        for cut in range(len(token) - 1, 0, -1):
            # of one token the longer left part first: a run of equal characters is merged from the left
            if token[:cut] in ids and token[cut:] in ids:
                pairs.append((-score, token[:cut], token[cut:]))
    pairs.sort(key=lambda pair: pair[0])
    return [(left, right) for _, left, right in pairs]


def _byte_level(vocabulary: Vocabulary) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocabulary.tokens)},
            merges=vocabulary.merges,
            ignore_merges=vocabulary.pre == "llama3",
        )
    )
    own_regex = vocabulary.pre in _SPLITS
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not own_regex)]
    if own_regex:
        steps.insert(0, pre_tokenizers.Split(Regex(_SPLITS[vocabulary.pre]), behavior="isolated"))
    elif vocabulary.pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if vocabulary.pre == "qwen2":
        backend.normalizer = normalizers.NFC()  # as in the original's tokenizer.json
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_ends(backend: Any, vocabulary: Vocabulary) -> None:
    """Let the backend put BOS before and EOS behind a text, where the file says so."""
    from tokenizers.processors import TemplateProcessing

    first = [vocabulary.bos] if vocabulary.add_bos and vocabulary.bos is not None else []
    last = vocabulary.ends[:1] if vocabulary.add_eos else []
    if first or last:
        begin, end = ([vocabulary.tokens[i] for i in ids] for ids in (first, last))
        backend.post_processor = TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A", *end, *begin, "$B", *end],
            special_tokens=[(vocabulary.tokens[i], i) for i in dict.fromkeys(first + last)],
        )
