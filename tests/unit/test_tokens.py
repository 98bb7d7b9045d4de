"""Classes of tokens, on small tokenizers of every family that write the same text in different ways."""

import string
import unicodedata

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from sparsekv import files, tokens
from sparsekv.tokens import TokenClass, classify_text, classify_vocabulary

MULTIBYTE_PUNCTUATION = "“”‘’…—。，《》"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "tokens"


def byte_level(with_decoder=True, added="!?!?"):
    """Byte-level BPE that merges the multi-byte punctuation and a few words, with special and added tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if with_decoder:
        backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<eos>"])
    text = [f"{c} x{c} " for c in MULTIBYTE_PUNCTUATION] + ["the the The cat cat 12 12 \n\n \n\n , ,"]
    backend.train_from_iterator(text * 20, trainer)
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken(added, special=False)])
    backend.add_special_tokens([AddedToken("<turn>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


PIECES = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁▁", "▁the", "the", ",", "▁,", "▁“", "。", "▁12"]


def sentencepiece(model):
    """Metaspace pieces with byte fallback, and the decoder of converted SentencePiece models."""
    if model == "unigram":
        backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in PIECES], unk_id=0, byte_fallback=True))
    else:
        vocab = {piece: i for i, piece in enumerate(PIECES)}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(strip)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def class_of(tokenizer, token, **kwargs):
    return TokenClass(int(classify_vocabulary(tokenizer, **kwargs)[tokenizer.convert_tokens_to_ids(token)]))


# ---- the text rule


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((c, TokenClass.PUNCTUATION) for c in string.punctuation + MULTIBYTE_PUNCTUATION),
        *((f" {c}", TokenClass.PUNCTUATION) for c in MULTIBYTE_PUNCTUATION),
        ('");\n\n  //', TokenClass.PUNCTUATION),
        (" +=", TokenClass.PUNCTUATION),
        ("€", TokenClass.PUNCTUATION),
        ("😀", TokenClass.CONTENT),
        ("©", TokenClass.CONTENT),
        ("\ufffd", TokenClass.CONTENT),
        ("\ufffd.", TokenClass.CONTENT),
        (" \ufffd", TokenClass.CONTENT),
        (".py", TokenClass.CONTENT),
        (" 1984", TokenClass.NUMBER),
        ("½", TokenClass.NUMBER),
        ("٣", TokenClass.NUMBER),
        ("3rd", TokenClass.CONTENT),
        (" \n\t", TokenClass.WHITESPACE),
        ("\u3000", TokenClass.WHITESPACE),
        (" The", TokenClass.STOPWORD),
        ("THE", TokenClass.STOPWORD),
        ("’s", TokenClass.STOPWORD),
        ("theory", TokenClass.CONTENT),
        ("", TokenClass.CONTENT),
    ],
)
def test_text_rule(text, expected):
    assert classify_text(text) is expected


@settings(deadline=None)
@given(st.characters())
def test_punctuation_is_what_unicode_says(char):
    category = unicodedata.category(char)
    expected = (category[0] == "P" or category in {"Sm", "Sc", "Sk"}) and char != "\ufffd"
    assert (classify_text(char) is TokenClass.PUNCTUATION) == expected


@settings(deadline=None)
@given(st.text(min_size=1), st.text(" \n\t\u3000"), st.text(" \n\t\u3000"))
def test_surrounding_space_never_matters(text, before, after):
    assert classify_text(before + text + after) is classify_text(text)


def test_extra_punctuation_may_be_letters_or_spaces():
    assert classify_text("\n\n", "\n") is TokenClass.PUNCTUATION
    assert classify_text(" \n", "\n") is TokenClass.PUNCTUATION
    assert classify_text("  ", "\n") is TokenClass.WHITESPACE
    assert classify_text("x.", "x") is TokenClass.PUNCTUATION
    assert classify_text(" 7", " ") is TokenClass.NUMBER


# ---- tokenizers


def test_byte_level_goes_by_text_and_parts_of_characters_are_content():
    tokenizer = byte_level()
    classes = classify_vocabulary(tokenizer)

    @settings(deadline=None)
    @given(st.characters(exclude_categories=["Cs"]))
    def check(char):
        ids = tokenizer.encode(char, add_special_tokens=False)
        expected = [classify_text(char)] if len(ids) == 1 else [TokenClass.CONTENT] * len(ids)
        assert [TokenClass(c) for c in classes[ids].tolist()] == expected

    check()


@pytest.mark.parametrize("char", MULTIBYTE_PUNCTUATION)
def test_byte_level_multibyte_punctuation(char):
    tokenizer = byte_level()
    ids = tokenizer.encode(char, add_special_tokens=False)
    assert len(ids) == 1, "the test's tokenizer must have it as one token"
    assert classify_vocabulary(tokenizer)[ids].tolist() == [TokenClass.PUNCTUATION]


@pytest.mark.parametrize("token", ["â", "Ģ", "£", "¡", "ľ"])
def test_byte_level_lone_bytes_are_never_punctuation(token):
    assert class_of(byte_level(), token) is TokenClass.CONTENT


@pytest.mark.parametrize("model", ["unigram", "bpe"])
@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("<unk>", TokenClass.SPECIAL),
        ("<s>", TokenClass.SPECIAL),
        ("▁", TokenClass.WHITESPACE),
        ("▁▁", TokenClass.WHITESPACE),
        ("<0x0A>", TokenClass.WHITESPACE),
        ("<0x20>", TokenClass.WHITESPACE),
        ("<0x2E>", TokenClass.PUNCTUATION),
        ("<0x37>", TokenClass.NUMBER),
        ("<0xE2>", TokenClass.CONTENT),
        ("<0x80>", TokenClass.CONTENT),
        ("▁the", TokenClass.STOPWORD),
        (",", TokenClass.PUNCTUATION),
        ("▁,", TokenClass.PUNCTUATION),
        ("▁“", TokenClass.PUNCTUATION),
        ("。", TokenClass.PUNCTUATION),
        ("▁12", TokenClass.NUMBER),
    ],
)
def test_sentencepiece(model, token, expected):
    assert class_of(sentencepiece(model), token) is expected


def test_wordpiece_continuations_lose_their_marks():
    vocab = {token: i for i, token in enumerate(["[UNK]", "the", "##the", "##12", "##ing", "##,", "."])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    classes = classify_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))
    expected = "SPECIAL STOPWORD STOPWORD NUMBER CONTENT PUNCTUATION PUNCTUATION"
    assert [TokenClass(c).name for c in classes.tolist()] == expected.split()


def test_tokenizer_written_in_python():
    tokenizer = ByT5Tokenizer()
    classes = classify_vocabulary(tokenizer)
    ids = tokenizer.encode("a, 7 b“", add_special_tokens=False)
    expected = "STOPWORD PUNCTUATION WHITESPACE NUMBER WHITESPACE CONTENT CONTENT CONTENT CONTENT"
    assert [TokenClass(c).name for c in classes[ids].tolist()] == expected.split()
    assert classes[tokenizer.eos_token_id] == TokenClass.SPECIAL


def test_added_tokens_go_by_text_unless_special():
    tokenizer = byte_level()
    assert class_of(tokenizer, "<turn>") is TokenClass.SPECIAL
    assert class_of(tokenizer, "<eos>") is TokenClass.SPECIAL
    assert class_of(tokenizer, "<think>") is TokenClass.CONTENT
    assert class_of(tokenizer, "!?!?") is TokenClass.PUNCTUATION


def test_special_ids_of_the_configurations():
    tokenizer = byte_level()
    config = LlamaConfig(vocab_size=512, bos_token_id=20, eos_token_id=[21, 22], pad_token_id=-1)
    generation = GenerationConfig(eos_token_id=[23], decoder_start_token_id=24, bos_token_id=None)
    classes = classify_vocabulary(tokenizer, config, generation_config=generation)
    plain = classify_vocabulary(tokenizer)
    assert classes[20:25].tolist() == [TokenClass.SPECIAL] * 5
    assert (plain[20:25] != TokenClass.SPECIAL).all()
    assert torch.equal(classes[25 : len(plain)], plain[25:])
    assert (classes[len(plain) :] == TokenClass.CONTENT).all()


def test_the_table_covers_the_models_vocabulary_and_padded_rows_are_content():
    tokenizer = byte_level()
    classes = classify_vocabulary(tokenizer, LlamaConfig(vocab_size=1000))
    assert classes.dtype == torch.uint8
    assert classes.shape == (1000,)
    assert (classes[len(tokenizer) :] == TokenClass.CONTENT).all()
    assert classify_vocabulary(tokenizer, LlamaConfig(vocab_size=10)).shape == (len(tokenizer),)


# ---- cache


def forbid_classifying(monkeypatch):
    def fail(*args):
        raise AssertionError("classified again")

    monkeypatch.setattr(tokens, "_classify", fail)


def test_an_equal_tokenizer_is_read_from_the_cache(monkeypatch, cache_folder):
    first = classify_vocabulary(byte_level())
    assert [path.suffix for path in cache_folder.iterdir()] == [".safetensors"]
    forbid_classifying(monkeypatch)
    assert torch.equal(classify_vocabulary(byte_level()), first)


@pytest.mark.parametrize("change", ["decoder", "token", "more tokens", "special flag", "config", "extra"])
def test_the_cache_tells_apart_all_that_decides_the_classes(change, cache_folder):
    classify_vocabulary(byte_level())
    tokenizer, kwargs = byte_level(change != "decoder", added="cats" if change == "token" else "!?!?"), {}
    if change == "more tokens":
        tokenizer.add_tokens(["<more>"])
    elif change == "special flag":
        tokenizer.add_tokens([AddedToken("<think>", special=True)], special_tokens=True)
    elif change == "config":
        kwargs = {"config": LlamaConfig(vocab_size=len(tokenizer), bos_token_id=30)}
    elif change == "extra":
        kwargs = {"extra_punctuation": "\n"}
    cached = classify_vocabulary(tokenizer, **kwargs)
    for path in cache_folder.iterdir():
        path.unlink()
    assert torch.equal(cached, classify_vocabulary(tokenizer, **kwargs))


def test_extra_punctuation_has_its_own_cache():
    tokenizer = byte_level()
    for _ in range(2):
        assert class_of(tokenizer, "Ċ", extra_punctuation="\n") is TokenClass.PUNCTUATION
        assert class_of(tokenizer, "Ċ") is TokenClass.WHITESPACE


@pytest.mark.parametrize("damage", ["empty", "cut short", "garbage", "other size", "other type", "no such class"])
def test_a_damaged_cache_is_made_again(damage, cache_folder, monkeypatch):
    good = classify_vocabulary(byte_level())
    (path,) = cache_folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut short": whole[:-9],
            "garbage": b"\xff" * 100,
            "other size": safetensors.torch.save({"classes": good[1:].clone()}),
            "other type": safetensors.torch.save({"classes": good.long()}),
            "no such class": safetensors.torch.save({"classes": good + 6}),
        }[damage]
    )
    assert torch.equal(classify_vocabulary(byte_level()), good)
    assert path.read_bytes() == whole
    forbid_classifying(monkeypatch)
    assert torch.equal(classify_vocabulary(byte_level()), good)


def test_a_write_that_fails_leaves_nothing_and_hurts_nothing(cache_folder, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    assert (classify_vocabulary(byte_level()) == TokenClass.PUNCTUATION).any()
    assert list(cache_folder.iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_hurts_nothing(cache_folder):
    cache_folder.parent.write_text("a file where the folder should be")
    assert (classify_vocabulary(byte_level()) == TokenClass.PUNCTUATION).any()
