"""Token id → class, decided by the text that the token decodes to.

The raw strings of a vocabulary mislead: byte-level BPE writes ``“`` as ``âĢľ`` and a lone byte as a Latin letter,
SentencePiece writes a space as ``▁`` and a newline as ``<0x0A>``. Only the tokenizer's own decoder knows what a token
says, so every id is decoded once and the answer is kept on disk.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Collection, Iterator
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from safetensors import SafetensorError

from sparsekv.files import cache_folder, keep_in_cache
from sparsekv.token_classes import TokenClass

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

_RULES_VERSION = 1  # part of the cache key: raise it when a rule or word list below changes

# The categories that ASCII punctuation spans: all of P*, and with it + = < (Sm), $ (Sc), ^ ` (Sk). The remaining one,
# So (emoji, ©, №, box drawing), is left out: such tokens carry meaning, not structure, and would use up the budget.
# U+FFFD, which decoders write for a part of a character, is So too.
_PUNCTUATION_CATEGORIES = frozenset({"Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk"})

_ENGLISH = """
    a about after all also an and any are as at be because been before being between both but by can could did do
    does doing down during each few for from further had has have having he her here hers him his how i if in into is
    it its just me more most my no nor not of off on once only or other our ours out over own same she should so some
    such than that the their theirs them then there these they this those through to too under until up very was we
    were what when where which while who whom whose why will with would you your yours
    's 't 're 've 'll 'm 'd n't
"""
STOPWORDS = frozenset(_ENGLISH.split())


def classify_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig | None = None,
    extra_punctuation: str = "",
    generation_config: GenerationConfig | None = None,
) -> torch.Tensor:
    """Classify every vocabulary id, from the disk cache when the same tokenizer was seen before.

    Special are the ids that the tokenizer calls special, its added tokens flagged so, and every ``*_token_id(s)`` of
    the two configurations. All other tokens, added ones included, go by their text (see `classify_text`). Ids without
    a token (padded rows of the embedding) never occur in text and count as content.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    config : PretrainedConfig, optional
        The model's configuration: its special ids, and its ``vocab_size`` where larger than the tokenizer's.
    extra_punctuation : str
        Further characters to count as punctuation (``"\\n"`` makes newlines punctuation).
    generation_config : GenerationConfig, optional
        The model's generation configuration: further special ids (chat models often list several ends of a turn).

    Returns
    -------
    UInt8[V]
        A `TokenClass` per id, on the CPU; V covers the tokenizer and ``config.vocab_size``.
    """
    vocab = tokenizer.get_vocab()
    text_config = getattr(config, "get_text_config", lambda: config)()
    size = max([len(tokenizer), getattr(text_config, "vocab_size", 0), *(i + 1 for i in vocab.values())])
    special = {i for i in tokenizer.all_special_ids if i is not None}
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {i for source in (config, text_config, generation_config) for i in _token_ids(source)}
    special = {i for i in special if 0 <= i < size}

    key = _fingerprint(tokenizer, vocab, size, special, extra_punctuation)
    path = cache_folder() / "tokens" / f"{key}.safetensors"
    classes = _read_cache(path, size)
    if classes is None:
        classes = _classify(tokenizer, vocab, size, special, extra_punctuation)
        keep_in_cache(path, safetensors.torch.save({"classes": classes}))
    return classes


def classify_text(text: str, extra_punctuation: Collection[str] = "") -> TokenClass:
    """Class of a token that decodes to `text`; never ``SPECIAL``, which is a matter of ids.

    Spaces around and within do not matter: ``" ("`` and ``");\\n\\n"`` are punctuation. A token is punctuation when all
    its other characters are (Unicode P*, Sm, Sc, Sk, and `extra_punctuation`), a number when all are numeric (N*), a
    stopword when it is in `STOPWORDS` in any case. A token with an incomplete UTF-8 sequence (U+FFFD) or without any
    text is content.
    """
    if not text:
        return TokenClass.CONTENT
    # An extra character may itself be a space, such as a newline.
    if (marks := [c for c in text if c in extra_punctuation or not c.isspace()]) and all(
        c in extra_punctuation or _category(c) in _PUNCTUATION_CATEGORIES for c in marks
    ):
        return TokenClass.PUNCTUATION
    word = "".join(text.split())
    if not word:
        return TokenClass.WHITESPACE
    if all(_category(c)[0] == "N" for c in word):
        return TokenClass.NUMBER
    if text.strip().lower().replace("’", "'") in STOPWORDS:
        return TokenClass.STOPWORD
    return TokenClass.CONTENT


_category = functools.cache(unicodedata.category)


def _token_ids(config: object | None) -> Iterator[int]:
    """Every id under a ``*_token_id`` or ``*_token_ids`` of a configuration; each may hold None, an int or a list."""
    for name, value in vars(config).items() if config is not None else ():
        if name.endswith(("_token_id", "_token_ids")):
            yield from (i for i in (value if isinstance(value, list | tuple) else [value]) if isinstance(i, int))


def _classify(
    tokenizer: PreTrainedTokenizerBase, vocab: dict[str, int], size: int, special: set[int], extra_punctuation: str
) -> torch.Tensor:
    classes = [TokenClass.CONTENT] * size
    ids = sorted(set(vocab.values()) - special)
    for i, text in zip(ids, _decode_each(tokenizer, vocab, ids), strict=True):
        classes[i] = classify_text(text, extra_punctuation)
    for i in special:
        classes[i] = TokenClass.SPECIAL
    return torch.tensor(classes, dtype=torch.uint8)


def _decode_each(tokenizer: PreTrainedTokenizerBase, vocab: dict[str, int], ids: list[int]) -> list[str]:
    """Text of every id as it reads after a plain word.

    Decoders treat the first token apart (SentencePiece drops its space, WordPiece keeps its ``##``), so each id is
    decoded behind a word that is then cut off.
    """
    words = (i for token, i in vocab.items() if (word := token.lstrip("▁")).isascii() and word.isalpha())
    lead = sorted(words)[:1]
    batch = [lead, *([*lead, i] for i in ids)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        prefix, *texts = backend.decode_batch(batch, skip_special_tokens=False)
    else:
        decode = functools.partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        prefix, *texts = map(decode, batch)
    return [text.removeprefix(prefix) for text in texts]


def _fingerprint(
    tokenizer: PreTrainedTokenizerBase, vocab: dict[str, int], size: int, special: set[int], extra_punctuation: str
) -> str:
    """Hex digest of all that decides the classes: content, never names or paths."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    rules = (_RULES_VERSION, unicodedata.unidata_version, size, sorted(special), sorted(set(extra_punctuation)))
    decoding = decoder.__getstate__() if decoder is not None else type(tokenizer).__qualname__
    digest = hashlib.sha256(repr((rules, decoding)).encode())
    digest.update(repr(sorted(vocab.items(), key=itemgetter(1))).encode())
    return digest.hexdigest()


def _read_cache(path: Path, size: int) -> torch.Tensor | None:
    """The cached table, or None where there is none or it is damaged."""
    try:
        classes = safetensors.torch.load(path.read_bytes())["classes"]
    except (OSError, KeyError, ValueError, SafetensorError):
        return None
    valid = classes.dtype == torch.uint8 and classes.shape == (size,) and bool((classes <= max(TokenClass)).all())
    return classes if valid else None
