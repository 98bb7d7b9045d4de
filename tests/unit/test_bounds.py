"""Bounds of presses that go by position: by kvpress's own eviction, and by hand."""

import json
import shutil

import pandas as pd
import pytest
import torch
from tiny import make_tiny, make_tiny_tokenizer, save_tiny, save_with_ends
from transformers import DynamicCache

from sparsekv.anchors import AnchorSelector
from sparsekv.errors import UserError
from sparsekv.evaluation.comparison.results import BOUND_COLUMNS
from sparsekv.evaluation.matrix import bounds as bounds_module
from sparsekv.evaluation.matrix.bounds import kept
from sparsekv.evaluation.matrix.config import EvalConfig
from sparsekv.evaluation.matrix.run import evaluate
from sparsekv.presses import AnchorPress, make_press

FILL = "the sea is cold and the sky is far and the road is long " * 2
ROWS = [  # task, context, answers
    ("late", f"{FILL}code is 4711", ["4711"]),
    ("late", f"{FILL}zebra", ["Zebra"]),
    ("early", f"code is 4711 {FILL}", ["4711"]),
    ("both", f"fox {FILL} fox", ["fox"]),
    ("half", f"one yak {FILL} two emu", ["yak", "emu"]),
    ("qa_1", f"one yak {FILL} two emu", ["yak", "emu"]),
    ("partly", f"{FILL}zebra", ["zebra"]),
    ("partly", FILL, ["unicorn"]),
    ("often", f"{FILL}{'fox ' * 3}", ["fox"]),
]
WANTED = {"late": 100, "early": 0, "both": 100, "half": 50, "qa_1": 100}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "base")
    tail = {"question": "What?", "answer_prefix": "", "max_new_tokens": 1}
    rows = [{"context": text, "answer": answer, "task": task, **tail} for task, text, answer in ROWS]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(inputs, out, **changes):
    values = {"model": str(inputs / "base"), "benchmark": str(inputs / "mine.jsonl"), "presses": "streaming_llm"}
    values |= {"ratios": "0.5", "device": "cpu", "view_tokens": 0, "out": str(out)}
    assert evaluate(EvalConfig(**{**values, **changes})) is None
    files = list(out.glob("bounds/*"))
    return pd.read_csv(files[0]) if files else None


@pytest.mark.parametrize("spec", ["streaming_llm", "streaming_llm:n_sink=9", "anchor", "anchor:recent_size=5"])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_kept_is_what_kvpress_leaves_in_the_cache(spec, ratio):
    model, tokenizer = make_tiny("llama"), make_tiny_tokenizer()
    ids = torch.tensor(tokenizer.encode(f"One, two. {FILL}", add_special_tokens=False))
    full, evicted = DynamicCache(), DynamicCache()
    press = make_press(spec, ratio, tokenizer)
    with torch.no_grad():
        model.model(ids[None], past_key_values=full)
        with press(model):
            model.model(ids[None], past_key_values=evicted)
    if isinstance(press, AnchorPress):
        press.selector = AnchorSelector(press.anchors, tokenizer)
    keep = kept(press, ids)
    for layer, left in zip(full.layers, evicted.layers, strict=True):
        wanted = {tuple(key) for key in layer.keys[0, 0, keep].tolist()}
        assert {tuple(key) for key in left.keys[0, 0].tolist()} == wanted
        assert len(wanted) == keep.sum() < len(ids)


def test_a_bound_is_the_score_of_the_answers_that_are_kept(inputs, tmp_path):
    made = run(inputs, tmp_path)
    assert made.columns.tolist() == BOUND_COLUMNS
    assert made.set_index("task").bound.to_dict() == WANTED  # partly and often: not all answers are needles
    assert made.set_index("task").n.to_dict() == {task: 2 if task == "late" else 1 for task in WANTED}
    summary = pd.read_csv(tmp_path / "summary.csv")
    shown = summary[(summary.press == "streaming_llm") & summary.bound.notna()].set_index("task").bound
    assert shown.to_dict() == WANTED  # and none for all tasks, of which some have no bound


def test_what_is_cut_off_is_not_kept(inputs, tmp_path):
    made = run(inputs, tmp_path, max_context_length=30, presses="streaming_llm:n_sink=29", ratios="0.0")
    assert made.set_index("task").bound[["late", "early", "both"]].tolist() == [0, 100, 100]


def test_cells_are_added_and_what_is_there_is_not_done_again(inputs, tmp_path, monkeypatch):
    first = run(inputs, tmp_path)
    both = run(inputs, tmp_path, presses="streaming_llm,anchor,knorm", ratios="0.5,0.7")
    assert set(zip(both.press, both.compression_ratio, strict=True)) == {
        *(("streaming_llm", 0.5), ("streaming_llm", 0.7), ("anchor", 0.5), ("anchor", 0.7))
    }
    again = both[(both.press == "streaming_llm") & (both.compression_ratio == 0.5)]
    pd.testing.assert_frame_equal(again.reset_index(drop=True), first)
    with monkeypatch.context() as patched:
        patched.setattr(bounds_module, "locate", lambda *args: pytest.fail("looked for needles again"))
        assert run(inputs, tmp_path, presses="anchor", ratios="0.7").equals(both)
    (file,) = tmp_path.glob("bounds/*")
    file.write_text(file.read_text().replace(first.fingerprint[0], "other"))
    assert run(inputs, tmp_path).equals(first)  # of something else: made anew
    pd.read_csv(file).drop(columns="fingerprint").assign(bound=7.0).to_csv(file, index=False)  # an older file
    assert run(inputs, tmp_path).equals(first)
    file.write_text("no table")
    with pytest.raises(UserError, match=f"{file.name}: corrupt .*; delete"):
        run(inputs, tmp_path)
    file.unlink()
    assert run(inputs, tmp_path).equals(first)


def test_what_only_the_model_calls_special_is_an_anchor(inputs, tmp_path):
    model = save_with_ends(tmp_path / "model", "4711")
    plain = run(inputs, tmp_path / "plain", presses="anchor:recent_size=5").set_index("task").bound
    made = run(inputs, tmp_path / "ends", presses="anchor:recent_size=5", model=model).set_index("task").bound
    assert (plain["early"], made["early"]) == (0, 100)


def again_from_the_start(inputs, out, **changes):
    """What the refusal of another configuration says to do: the same folder without its cells."""
    for cell in out.glob("mine__*"):
        shutil.rmtree(cell)
    return run(inputs, out, **changes)


def test_bounds_of_other_contexts_are_made_anew(inputs, tmp_path):
    before = run(inputs, tmp_path / "a")
    made = again_from_the_start(inputs, tmp_path / "a", max_context_length=60)
    assert made.equals(run(inputs, tmp_path / "fresh", max_context_length=60))
    assert made.bound.tolist() != before.bound.tolist()
    plain = again_from_the_start(inputs, tmp_path / "a", chat_template=False)
    assert len({table.fingerprint[0] for table in (before, made, plain)}) == 3


def test_bounds_of_other_contexts_go_where_there_are_none(inputs, tmp_path):
    press = "streaming_llm:n_sink=40"
    assert run(inputs, tmp_path, presses=press) is not None
    assert again_from_the_start(inputs, tmp_path, presses=press, max_context_length=30) is None


def test_bounds_stay_where_the_same_rows_are_named_otherwise(inputs, tmp_path):
    run(inputs, tmp_path)
    made = run(inputs, tmp_path, presses="anchor", tasks=",".join(dict.fromkeys(task for task, *_ in ROWS)))
    assert set(made.press) == {"streaming_llm", "anchor"}


def test_a_press_that_contexts_are_too_short_for_has_no_bound(inputs, tmp_path):
    made = run(inputs, tmp_path, presses="streaming_llm,streaming_llm:n_sink=500")
    assert set(made.press) == {"streaming_llm"}


def test_no_file_without_a_positional_press_or_needles(inputs, tmp_path):
    assert run(inputs, tmp_path / "a", presses="knorm,snapkv") is None
    assert run(inputs, tmp_path / "b", tasks="often,partly") is None
