"""Where answers stand in their contexts, as the tokenizer has them, and when the file is written."""

import json
import re
import shutil

import pandas as pd
import pytest
import torch
from tiny import make_tiny_tokenizer, save_tiny, save_with_ends

from sparsekv.anchors import AnchorConfig, AnchorSelector
from sparsekv.evaluation.matrix import needles as needles_module
from sparsekv.evaluation.matrix import run as run_module
from sparsekv.evaluation.matrix.config import EvalConfig
from sparsekv.evaluation.matrix.run import evaluate

FILL = "the sea is cold and the sky is far and the road is long "
ROWS = {  # task → context, answers
    "inside": (f"{FILL}code is 4,711 {FILL}", ["4,711"]),
    "beside": (f"{FILL}code is 4711. {FILL}", ["4711"]),
    "two": (f"Alpha {FILL}{FILL}beta {FILL}", ["BETA", "alpha"]),
    "twice": (f"{FILL}zebra {FILL}zebra", ["zebra"]),
    "often": ("fox " * 3 + FILL, ["fox"]),
    "absent": (FILL, ["unicorn"]),
    "accent": (f"🙂🙂 {FILL}Größe 12 {FILL}", "größe 12"),
    "regex": (f"{FILL}a+b {FILL}", ["A+B"]),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "base")
    tail = {"question": "What?", "answer_prefix": "", "max_new_tokens": 1}
    rows = [{"context": text, "answer": answer, "task": task, **tail} for task, (text, answer) in ROWS.items()]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(inputs, out, **changes):
    values = {"model": str(inputs / "base"), "benchmark": str(inputs / "mine.jsonl"), "presses": "knorm"}
    return EvalConfig(**{**values, "ratios": "0.5", "device": "cpu", "view_tokens": 0, "out": str(out), **changes})


def run(inputs, out, **changes):
    assert evaluate(config(inputs, out, **changes)) is None
    files = list(out.glob("needles/*"))
    return pd.read_csv(files[0], dtype={"answer": str}) if files else None


@pytest.fixture(scope="module")
def made(inputs, tmp_path_factory):
    return run(inputs, tmp_path_factory.mktemp("out"))


def test_needles_are_answers_that_occur_once_or_twice(made):
    found = {(needle.task, needle.answer) for needle in made.itertuples()}
    assert found == {
        *(("inside", "4,711"), ("beside", "4711"), ("two", "BETA"), ("two", "alpha")),
        *(("twice", "zebra"), ("accent", "größe 12"), ("regex", "A+B")),
    }
    assert set(made.benchmark) == {"mine"}
    assert made.row.tolist() == sorted(made.row)


def test_position_is_that_of_the_token_with_the_first_character(made):
    """By decoding ever longer beginnings of the context."""
    tokenizer = make_tiny_tokenizer()
    selector = AnchorSelector(AnchorConfig(), tokenizer)
    for needle in made.itertuples():
        text = f"<|user|>{ROWS[needle.task][0]}"
        ids = tokenizer.encode(text, add_special_tokens=False)
        match = re.search(re.escape(needle.answer), text, re.IGNORECASE)
        ends = [len(tokenizer.decode(ids[: place + 1]).rstrip("\ufffd")) for place in range(len(ids))]
        first = next(place for place, end in enumerate(ends) if end > match.start())
        last = next(place for place, end in enumerate(ends) if end >= match.end())
        assert (needle.position, needle.context_tokens) == (first, len(ids)), needle
        assert needle.depth == pytest.approx(first / len(ids))
        anchors = selector.classes(torch.tensor(ids)).nonzero()[:, 0].tolist()
        nearest = min(0 if first <= place <= last else min(abs(place - first), abs(place - last)) for place in anchors)
        assert needle.anchor_distance == nearest, needle
    distance = made.set_index("task").anchor_distance
    assert (distance["inside"], distance["beside"]) == (0, 1)
    assert distance["twice"] > 1


def test_chat_template_and_cut_move_and_remove_needles(inputs, tmp_path, made):
    plain = run(inputs, tmp_path / "plain", chat_template=False)
    shift = made.set_index(["task", "answer"]).position - plain.set_index(["task", "answer"]).position
    bos = 1  # without a template the context follows the BOS token: as many tokens as the template's <|user|>
    assert (shift == 1 - bos).all()
    cut = run(inputs, tmp_path / "cut", max_context_length=30)
    assert (cut.context_tokens == 30).all()
    assert set(cut.answer) == set(made[made.position < 30].answer) != set(made.answer)


def test_what_only_the_model_calls_special_is_an_anchor(inputs, tmp_path, made):
    ends = run(inputs, tmp_path / "out", model=save_with_ends(tmp_path / "model", "zebra"))
    distance = [table.set_index("task").anchor_distance["twice"] for table in (made, ends)]
    assert distance[0] > distance[1] == 0


def test_query_aware_is_a_benchmark_of_its_own(inputs, tmp_path):
    assert set(run(inputs, tmp_path, query_aware=True).benchmark) == {"mine (query-aware)"}
    assert next(tmp_path.glob("needles/*")).name.endswith("__query_aware.csv")


def test_no_file_without_needles(inputs, tmp_path):
    assert run(inputs, tmp_path, tasks="often,absent") is None
    assert not (tmp_path / "needles").exists()


def test_no_needles_where_text_is_scored(inputs, tmp_path):
    assert run(inputs, tmp_path, benchmark="perplexity", context_length=64, num_samples=2) is None


def test_written_once_and_again_for_other_rows(inputs, tmp_path, monkeypatch):
    first = run(inputs, tmp_path)
    monkeypatch.setattr(run_module, "load_model", lambda *args: pytest.fail("loaded the model"))
    with monkeypatch.context() as patched:
        patched.setattr(needles_module, "_needles", lambda *args: pytest.fail("looked for needles again"))
        assert run(inputs, tmp_path).equals(first)
    (file,) = tmp_path.glob("needles/*")
    file.write_text(file.read_text().replace(first.fingerprint[0], "other"))
    assert run(inputs, tmp_path).equals(first)
    file.write_bytes(b"\xff")
    assert run(inputs, tmp_path).equals(first)


def test_needles_of_other_contexts_are_made_anew_or_go(inputs, tmp_path, made):
    for length, wanted in ((30, set(made[made.position < 30].answer)), (2, None)):
        run(inputs, tmp_path)
        for cell in tmp_path.glob("mine__*"):
            shutil.rmtree(cell)
        found = run(inputs, tmp_path, max_context_length=length)
        assert wanted == (None if found is None else set(found.answer))
        shutil.rmtree(tmp_path)
