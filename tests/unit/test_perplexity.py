"""Perplexity: passages of text as rows of a benchmark."""

import math
from pydoc_data.topics import topics

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparsekv.data import is_held_out
from sparsekv.errors import UserError
from sparsekv.evaluation.benchmarks.perplexity import ANSWER_TOKENS
from sparsekv.evaluation.benchmarks.registry import load_benchmark
from sparsekv.sources import documents

TEXT = "\n\n".join(topics.values())[:60_000] + " “Überraschung” 北京 😀"


def load(tokenizer, path, **options):
    return load_benchmark("perplexity", tokenizer, data_dir=str(path), context_length=64, **options)


def test_passages_are_the_text_in_order_and_of_the_asked_length(tmp_path, tiny_tokenizer):
    path = tmp_path / "some text.txt"
    path.write_text(TEXT, "utf-8")
    benchmark = load(tiny_tokenizer, path, num_samples=10)
    assert (benchmark.kind, benchmark.data_dir) == ("likelihood", "64-some text")
    assert benchmark.lower_is_better == {"nll", "kl"}
    assert TEXT.startswith("".join(row["context"] + row["answer"] for row in benchmark.rows))
    for row in benchmark.rows:
        sizes = [len(tiny_tokenizer(row[part])["input_ids"]) for part in ("context", "answer")]
        assert sizes == pytest.approx([64, ANSWER_TOKENS], abs=2)  # a word at the cut may be cut into other tokens
    rest = {"question": "", "answer_prefix": "", "max_new_tokens": 0, "task": "text"}
    assert all({key: row[key] for key in rest} == rest for row in benchmark.rows)


def test_all_the_text_is_used_but_less_than_a_passage(tmp_path, tiny_tokenizer, caplog):
    path = tmp_path / "a.txt"
    path.write_text(TEXT[-9_000:], "utf-8")
    rows = load(tiny_tokenizer, path, num_samples=1000).rows
    used = sum(len(row["context"] + row["answer"]) for row in rows)
    assert len(tiny_tokenizer(TEXT[-9_000:][used:])["input_ids"]) <= 64 + ANSWER_TOKENS
    assert f"a.txt holds {len(rows)} passages of 64 + {ANSWER_TOKENS} tokens, not 1000" in caplog.text


@pytest.mark.parametrize("size", [1, 100, 100_000])
def test_the_lengths_of_documents_do_not_matter(size, tmp_path, tiny_tokenizer):
    """Documents are joined by blank lines before they are cut."""
    paragraphs = TEXT[:8000].split("\n\n")
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(paragraphs[:size]) + "\n\n" + "\n\n".join(paragraphs[size:]), "utf-8")
    assert load(tiny_tokenizer, text, num_samples=3).rows == load(tiny_tokenizer, text, num_samples=5).rows[:3]


def test_tokens_may_be_long(tmp_path):
    """More of the text is read where a passage is longer than it usually is."""
    backend = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "a.txt"
    path.write_text(f"{'long' * 20} " * 500, "utf-8")
    rows = load(PreTrainedTokenizerFast(tokenizer_object=backend), path).rows
    assert len(rows) == 500 // (64 + ANSWER_TOKENS)
    assert [len(rows[0][part].split()) for part in ("context", "answer")] == [64, ANSWER_TOKENS]


def test_by_default_it_is_text_that_training_never_sees(tiny_tokenizer):
    ours = load_benchmark("perplexity", tiny_tokenizer, context_length=64, num_samples=4)
    assert ours.data_dir == "64"
    used = "".join(row["context"] + row["answer"] for row in ours.rows)
    held_out = ""
    for text in filter(is_held_out, documents("pydoc", 0, None)):
        if len(held_out) > len(used):
            break
        held_out += "\n\n" * bool(held_out) + text
    assert held_out.startswith(used)
    assert load_benchmark("perplexity", tiny_tokenizer, context_length=64, num_samples=2).rows == ours.rows[:2]
    other = load_benchmark("perplexity", tiny_tokenizer, context_length=64, num_samples=4, seed=1)
    assert other.rows != ours.rows


def test_metrics_are_means_and_the_exponential_of_one(tmp_path, tiny_tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(TEXT, "utf-8")
    benchmark = load(tiny_tokenizer, path, num_samples=2)
    rows = [{**row, "nll": nll, "kl": kl} for row, nll, kl in zip(benchmark.rows, (1.0, 2.0), (0.0, 0.5), strict=True)]
    assert benchmark.score(rows[1]) == {"nll": 2.0, "kl": 0.5}
    assert benchmark.metrics(rows) == {"text": {"nll": 1.5, "kl": 0.25, "perplexity": math.exp(1.5)}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder; perplexity takes text files, or pydoc by default"),
        (b"", "the file is empty"),
        (b"caf\xe9 " * 1000, "it is not UTF-8 text (byte 0xe9)"),
        (b"too short", f"it is too short for passages of 64 + {ANSWER_TOKENS} tokens; give more text"),
    ],
)
def test_a_text_that_cannot_be_used_is_one_line(content, message, tmp_path, tiny_tokenizer):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load(tiny_tokenizer, path)
    assert str(error.value).startswith(f"--data_dir {path}: {message}")
    assert "\n" not in str(error.value)


def test_it_has_no_tasks(tiny_tokenizer):
    with pytest.raises(UserError, match=r"^--tasks \('text',\): it has no meaning for --benchmark perplexity$"):
        load_benchmark("perplexity", tiny_tokenizer, tasks=["text"])
