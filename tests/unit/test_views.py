"""The view of a context: its file, the text of its tokens, and that it shows what presses and attention do."""

import dataclasses
import gzip
import json
import re
from pydoc_data.topics import topics

import numpy as np
import pandas as pd
import pytest
import torch
from evidence import relative_attention
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from kvpress.utils import compute_n_kept
from tiny import make_tiny_tokenizer, save_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparsekv.anchors import AnchorConfig, AnchorSelector
from sparsekv.errors import UserError
from sparsekv.evaluation.matrix import run as run_module
from sparsekv.evaluation.matrix import view_maker
from sparsekv.evaluation.matrix.config import EvalConfig
from sparsekv.evaluation.matrix.run import evaluate
from sparsekv.evaluation.matrix.token_texts import token_texts
from sparsekv.evaluation.matrix.views import KeptEntries, NotShown, View, encode_received, load_view, save_view
from sparsekv.models import load_config, load_model, load_tokenizer

TEXTS = [text[500:900] for text in topics.values() if len(text) > 900][:3]
PRESSES = "streaming_llm,key_rerotation_streaming_llm,observed_attention,think,decoding_knorm,kvzip,duo_attention"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "base")
    tail = {"answer_prefix": "", "answer": ["e", "a"], "max_new_tokens": 2, "task": "qa"}
    long, *short = TEXTS
    rows = [{"context": text, "question": f"{text[:9]}?", **tail} for text in (long * 5, *short)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(inputs, out, **changes):
    values = {"model": str(inputs / "base"), "benchmark": str(inputs / "mine.jsonl"), "presses": PRESSES}
    return EvalConfig(**{**values, "ratios": "0.5", "device": "cpu", "view_tokens": 500, "out": str(out), **changes})


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert evaluate(config(inputs, out)) is None
    return out


def view_of(out):
    (file,) = (out / "views").glob("*")
    return load_view(file)


# ---- what it shows ----


def test_view_is_of_the_first_context_that_is_short_enough(inputs, made):
    view = view_of(made)
    questions = pd.read_csv(next(made.glob("*no_press*/predictions.csv"))).question.tolist()
    short = {f"{text[:9]}?": text for text in TEXTS[1:]}
    row, question = next((row, question) for row, question in enumerate(questions) if question in short)
    assert (view.benchmark, view.data_dir, view.task, view.row) == ("mine", "", "qa", row)
    assert (view.model, view.adapter) == (str(inputs / "base"), "")
    assert (view.question, view.answer) == (question, ["e", "a"])
    assert "".join(view.tokens) == f"<|user|>{short[question]}"
    tokenizer, model_config = load_tokenizer(view.model), load_config(view.model)
    ids = torch.tensor([tokenizer.encode("".join(view.tokens), add_special_tokens=False)])
    assert len(view.tokens) == len(view.classes) == ids.shape[1]
    selector = AnchorSelector(AnchorConfig(), tokenizer, model_config)
    assert view.anchors.tolist() == selector(ids)[0].tolist()


def test_view_shows_what_presses_keep(made):
    view = view_of(made)
    length = len(view.tokens)
    kept = {cell.press: cell.kept for cell in view.cells}
    assert list(kept) == ["streaming_llm", "key_rerotation_streaming_llm", "observed_attention", "think", "kvzip"]
    recent = length - (compute_n_kept(length, 0.5) - 4)
    expected = [place < 4 or place >= recent for place in range(length)]
    assert (kept["streaming_llm"] == expected).all()
    assert (kept["key_rerotation_streaming_llm"] == expected).all()
    assert (kept["observed_attention"].sum(-1) == compute_n_kept(length, 0.5)).all()
    assert not (kept["observed_attention"] == expected).all()
    assert kept["think"].all()
    assert kept["kvzip"].mean() == pytest.approx(0.5, abs=0.01)
    reasons = {cell.press: cell.reason for cell in view.not_shown}
    assert reasons["decoding_knorm"] == "it evicts while the answer is written"
    assert reasons["duo_attention"].startswith("duo_attention: no attention pattern is published")


def test_view_shows_the_attention_received(made):
    view = view_of(made)
    model = load_model(view.model)
    model.set_attn_implementation("eager")
    ids = load_tokenizer(view.model).encode("".join(view.tokens), return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        layers = model(ids, output_attentions=True).attentions
    length = ids.shape[1]
    uniform = torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]
    for layer, attention in enumerate(layers):
        relative = (attention[0].sum(1) / uniform.sum(0)).view(2, 2, length).mean(1).numpy()
        assert np.abs(np.log2(relative_attention(view)[layer] / relative)).max() <= 1 / 32 + 1e-4


# ---- when it is made ----


def test_view_is_made_once(inputs, made, monkeypatch):
    (file,) = (made / "views").glob("*")
    before = file.read_bytes()
    monkeypatch.setattr(run_module, "load_model", lambda *args: pytest.fail("loaded the model"))
    monkeypatch.setattr(view_maker, "_first_that_fits", lambda *args: pytest.fail("encoded a context"))
    evaluate(config(inputs, made, presses="streaming_llm,think"))  # a part of what is there
    assert file.read_bytes() == before


def test_view_grows_with_the_matrix_and_no_run_is_lost(inputs, tmp_path):
    evaluate(config(inputs, tmp_path, presses="knorm"))
    evaluate(config(inputs, tmp_path, presses="streaming_llm", ratios="0.3"))
    cells = [(cell.press, cell.compression_ratio) for cell in view_of(tmp_path).cells]
    assert cells == [("streaming_llm", 0.3), ("knorm", 0.5)]


@pytest.mark.parametrize("damage", ["corrupt", "made from something else"])
def test_view_that_does_not_fit_is_made_again(inputs, tmp_path, damage):
    evaluate(config(inputs, tmp_path, presses="knorm"))
    (file,) = (tmp_path / "views").glob("*")
    good = file.read_bytes()
    if damage == "corrupt":
        file.write_bytes(good[:-9])
    else:
        save_view(file, dataclasses.replace(load_view(file), fingerprint="other", cells=[]))
    evaluate(config(inputs, tmp_path, presses="knorm"))
    assert file.read_bytes() == good


@pytest.mark.parametrize("tokens", [0, 100])
def test_no_view_without_a_context_that_is_short_enough(inputs, tmp_path, tokens, monkeypatch):
    evaluate(config(inputs, tmp_path, presses="knorm", view_tokens=tokens))
    assert not (tmp_path / "views").exists()
    monkeypatch.setattr(run_module, "load_model", lambda *args: pytest.fail("loaded the model"))
    evaluate(config(inputs, tmp_path, presses="knorm", view_tokens=tokens))


def test_cut_contexts_fit(inputs, tmp_path):
    evaluate(config(inputs, tmp_path, presses="knorm", view_tokens=100, max_context_length=90))
    view = view_of(tmp_path)
    assert (view.row, len(view.tokens)) == (0, 90)


def test_view_that_another_process_makes_is_left_to_it(inputs, tmp_path, monkeypatch):
    evaluate(config(inputs, tmp_path, presses="knorm", view_tokens=0))
    monkeypatch.setattr(run_module, "load_model", lambda *args: pytest.fail("loaded the model"))
    name = next(tmp_path.glob("mine__*knorm*")).name.replace("__knorm__0.50", "")
    with FileLock(tmp_path / ".locks" / f"{name}.view.lock"):
        evaluate(config(inputs, tmp_path, presses="knorm"))
    assert not (tmp_path / "views").exists()


def test_want_of_memory_costs_the_view_and_not_the_run(inputs, tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(view_maker, "_received", fail)
    assert evaluate(config(inputs, tmp_path, presses="knorm")) is None
    assert "mine: no view for the report, for want of memory; lower --view_tokens" in caplog.text
    assert (tmp_path / "summary.md").is_file()


def test_more_cells_than_are_held_at_once(inputs, made, tmp_path, monkeypatch):
    monkeypatch.setattr(view_maker, "AT_ONCE", 1)
    evaluate(config(inputs, tmp_path))
    (one,), (other,) = (out.glob("views/*") for out in (made, tmp_path))
    assert one.read_bytes() == other.read_bytes()


# ---- the file ----


def make_view(**changes):
    draw = np.random.default_rng(0)
    view = View(
        *("ruler-local", "64", "tiny", "a/final", "niah", 3, "f", "abc", "Where?", ["here"]),
        tokens=["a", "", "é\n", "\ud800", "</script>"],
        classes=np.array([0, 1, 5, 3, 2], dtype=np.uint8),
        anchors=np.array([True, False, True, False, False]),
        received=draw.integers(0, 256, (3, 2, 5), dtype=np.uint8),
        cells=[KeptEntries("knorm", 0.5, draw.random((3, 2, 5)) < 0.5)],
        not_shown=[NotShown("kvzip", 0.5, "no")],
    )
    return dataclasses.replace(view, **changes)


def test_saved_and_loaded_is_the_same(tmp_path):
    view = make_view()
    save_view(tmp_path / "one.json.gz", view)
    save_view(tmp_path / "two.json.gz", load_view(tmp_path / "one.json.gz"))
    assert (tmp_path / "one.json.gz").read_bytes() == (tmp_path / "two.json.gz").read_bytes()
    loaded = load_view(tmp_path / "two.json.gz")
    for field in dataclasses.fields(View):
        one, two = getattr(view, field.name), getattr(loaded, field.name)
        if field.name == "cells":
            assert [(cell.press, cell.compression_ratio) for cell in two] == [("knorm", 0.5)]
            one, two = one[0].kept, two[0].kept
        assert np.array_equal(one, two), field.name
        assert not isinstance(one, np.ndarray) or one.dtype == two.dtype


def test_layout_of_the_file(tmp_path):
    """As documented: what other readers rely on."""
    save_view(tmp_path / "view.json.gz", make_view())
    content = json.loads(gzip.decompress((tmp_path / "view.json.gz").read_bytes()))
    assert (content["schema_version"], content["layers"], content["kv_heads"]) == (1, 3, 2)
    assert content["anchors"] == "oA=="  # 10100 000
    assert content["classes"] == "AAEFAwI="
    assert content["cells"][0].keys() == {"press", "compression_ratio", "kept"}


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"tokens": ["a"]},
        {"kv_heads": 3},
        {"received": "AA=="},
        {"cells": [{"press": "a"}]},
        {"cells": [{"press": "a", "compression_ratio": 0.5, "kept": "AA=="}]},
        {"task": None},
        {"anchors": "?"},
        {"classes": None},
    ],
)
def test_other_content_is_one_line(tmp_path, change):
    file = tmp_path / "view.json.gz"
    save_view(file, make_view())
    content = json.loads(gzip.decompress(file.read_bytes())) | change
    file.write_bytes(gzip.compress(json.dumps({k: v for k, v in content.items() if v is not None}).encode()))
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))}: [^\n]+delete") as caught:
        load_view(file)
    if "schema_version" in change:
        assert "has schema_version 2, this version reads 1" in str(caught.value)


def test_attention_in_a_byte():
    relative = np.array([0, 1e-9, 0.5, 1, 2, 2**7.5, 1e9])
    assert encode_received(relative).tolist() == [0, 0, 112, 128, 144, 248, 255]


# ---- the text of tokens ----

TOKENIZER = make_tiny_tokenizer()


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_texts_of_tokens_are_the_text(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    texts = token_texts(TOKENIZER, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text == TOKENIZER.decode(ids)


def test_a_split_character_belongs_to_its_last_token():
    ids = TOKENIZER.encode("a🙂b", add_special_tokens=False)
    assert token_texts(TOKENIZER, ids) == ["a", "", "", "", "🙂", "b"]
    assert "".join(token_texts(TOKENIZER, ids[:3])) == TOKENIZER.decode(ids[:3])  # cut within a character


def test_texts_keep_the_spaces_that_a_decoder_drops_at_the_start():
    vocab = {"▁Hello": 0, "▁world": 1, "s": 2, "▁": 3, "?": 4}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert token_texts(tokenizer, [0, 1, 2, 1]) == ["Hello", " world", "s", " world"]
