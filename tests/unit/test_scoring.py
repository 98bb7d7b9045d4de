"""Scores equal kvpress's: against values that its own code gave (tests/data/kvpress_scores.json)."""

import json
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.errors import UserError
from sparsekv.evaluation.benchmarks.hub import HUB
from sparsekv.evaluation.benchmarks.scoring import by_column, infinitebench, longbench, loogle, packages

CASES = json.loads((Path(__file__).parents[1] / "data" / "kvpress_scores.json").read_text("utf-8"))["cases"]
GROUPS = defaultdict(list)
for case in CASES:
    GROUPS[case["benchmark"], case["task"]].append(case)


def row_of(case):
    extra = {name: case[name] for name in ("all_classes", "length", "difficulty") if name in case}
    said = case["prediction"] * case.get("times", 1)
    return {"task": case["task"], "predicted_answer": said, "answer": case["answer"], **extra}


def leaves(value):
    """The numbers of a nested result, by their path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {(): value}
    return {(key, *path): number for key, inner in items for path, number in leaves(inner).items()}


@pytest.fixture(autouse=True)
def nothing_downloaded(monkeypatch):
    """LooGLE without METEOR and BERTScore, whether or not this machine has their files."""
    monkeypatch.setattr(loogle, "_has_wordnet", lambda: False)
    monkeypatch.setattr(loogle, "_bert", lambda rows: {})


@pytest.fixture(autouse=True)
def recursion_limit_of_the_recording():
    """Python's own, where ROUGE of long texts is 0; torch.compile raises it for the rest of a process."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize(("benchmark", "task"), GROUPS, ids=lambda name: name)
def test_the_value_of_a_row_is_kvpresss(benchmark, task):
    for case in GROUPS[benchmark, task]:
        ours = leaves(HUB[benchmark].metrics([row_of(case)]))
        assert ours == pytest.approx(leaves(case["value"]), rel=1e-12, nan_ok=True), case


def test_every_task_has_recorded_values_and_most_are_not_zero():
    tasks = {name: {task for benchmark, task in GROUPS if benchmark == name} for name in HUB}
    assert tasks.pop("zero_scrolls") == set()
    assert tasks["longbench"] == set(longbench.TASKS)
    assert tasks["infinitebench"] == set(infinitebench.MEASURES)
    assert {folder.removesuffix("_e") for folder in HUB["longbench-e"].folders} <= tasks["longbench-e"]
    assert tasks["loogle"] == set(HUB["loogle"].folders)
    for group in GROUPS.values():
        values = Counter(json.dumps(case["value"]) for case in group)
        assert len(values) > 1, group[0]


@pytest.mark.parametrize("benchmark", [name for name in HUB if name not in ("loogle", "zero_scrolls")])
def test_metrics_are_the_mean_of_the_scores_of_rows(benchmark):
    """Where they are rounded, to their two decimals; ROUGE of the needle is a list of rows."""
    scored = HUB[benchmark]
    for task, cases in ((task, cases) for (name, task), cases in GROUPS.items() if name == benchmark):
        rows = [row_of(case) for case in cases]
        mean = fmean(next(iter(scored.score(row).values())) for row in rows)
        result = scored.metrics(rows)
        if benchmark == "needle_in_haystack":
            result = [value["rouge-l"]["f"] for value in result]
        elif benchmark == "longbench-e":
            result = max(value for value in result.values() if not math.isnan(value))  # one length class has rows
        elif isinstance(result, dict):
            result = (
                result[task]["string_match"] if benchmark == "ruler" else result.get("accuracy", result.get("average"))
            )
        result = fmean(result) if isinstance(result, list) else result
        percent = benchmark in ("ruler", "longbench", "longbench-e")
        assert mean == pytest.approx(result if percent else 100 * result, abs=0.00501 if percent else 1e-9), task


def test_loogles_metrics_are_the_mean_of_the_scores_of_rows():
    for task in HUB["loogle"].folders:
        rows = [row_of(case) for case in GROUPS["loogle", task]]
        means = {name: fmean(loogle.score(row)[name] for row in rows) / 100 for name in loogle.score(rows[0])}
        result = loogle.metrics(rows)[task]
        if task != "shortdep_cloze":  # there: masks found in all rows / masks of all rows
            assert result == pytest.approx(means)
        assert result.keys() == means.keys()


def test_masks_are_counted_over_all_rows():
    """kvpress counts one mask of a prediction that is no dictionary when matches are exact, and all when partial."""
    answer = '{"<mask-0>": "Bob Lee", "<mask-1>": "Paris"}'
    rows = [{"task": "shortdep_cloze", "answer": answer, "predicted_answer": said} for said in (answer, "Bob Lee")]
    assert loogle.metrics(rows) == {"shortdep_cloze": {"exact_match": 0.6667, "partial_match": 0.5}}


def test_several_tasks_are_told_apart():
    rows = [row_of(case) for case in CASES if case["benchmark"] == "longbench"]
    result = longbench.metrics(rows)
    assert set(result) == set(longbench.TASKS)
    for task, value in result.items():
        assert value == longbench.metrics([row for row in rows if row["task"] == task])


WORDS = ["the", "A", "B.", "12", "Paris", "中国", "{}", "\n", "boxed{", ":", "is"]
texts = st.text(max_size=60) | st.lists(st.sampled_from(WORDS)).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(case=st.sampled_from(CASES), said=texts)
def test_any_prediction_has_a_score_from_0_to_100(case, said):
    for value in HUB[case["benchmark"]].score({**row_of(case), "predicted_answer": said}).values():
        assert 0 <= value <= 100 + 1e-6


@settings(max_examples=50, deadline=None)
@given(
    answer=st.text(alphabet="abc XYZ.,中é\n", min_size=1, max_size=30), metric=st.sampled_from(list(by_column.METRICS))
)
def test_the_answer_itself_is_right(answer, metric):
    row = {
        "task": "any",
        "answer": [answer, "other words"],
        "predicted_answer": answer + " other words",
        "metric": metric,
    }
    if metric in ("string_match", "string_match_all", "string_match_part"):
        assert by_column.score(row) == {metric: 100}
    row["predicted_answer"] = answer
    value = by_column.score(row)[metric]
    if metric == "exact_match":
        assert value == 100
    elif metric in ("f1", "rouge-l") and any(letter in answer for letter in "bcXYZ中é"):
        assert value == pytest.approx(100, abs=1e-5)


def test_a_users_rows_go_by_rulers_rule_or_by_their_own_metric():
    row = {"answer": ["one", "two"], "predicted_answer": "One, the first"}
    assert by_column.score({**row, "task": "mine"}) == {"string_match": 50}
    assert by_column.score({**row, "task": "qa_mine"}) == {"string_match": 100}
    assert by_column.score({**row, "task": "qa_mine", "metric": "string_match_all"}) == {"string_match_all": 50}
    f1 = by_column.score({**row, "task": "mine", "metric": "f1"})["f1"]
    assert f1 == pytest.approx(100 * 2 / 3)  # "one first" against "one"
    rows = [
        {**row, "task": "mine"},
        {**row, "task": "mine", "metric": "f1"},
        {**row, "task": "mine", "answer": "first"},
    ]
    assert by_column.metrics(rows) == {"mine": {"string_match": 75, "f1": 66.67}}


@pytest.mark.parametrize(("name", "task"), [("rouge", "samsum"), ("jieba", "multifieldqa_zh")])
def test_a_package_that_is_missing_is_one_line_with_the_command(name, task, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    packages.package.cache_clear()
    with pytest.raises(UserError, match=rf"needs the package {name}, .*pip install 'sparsekv\[eval\]'$"):
        longbench.score(row_of(GROUPS["longbench", task][0]))
    packages.package.cache_clear()


def test_loogle_goes_without_meteor_and_bertscore_and_says_so(monkeypatch, caplog):
    monkeypatch.undo()
    loogle._has_wordnet.cache_clear()
    monkeypatch.setenv("NLTK_DATA", "")
    monkeypatch.setattr("nltk.data.path", [])
    packages.package.cache_clear()
    monkeypatch.setitem(sys.modules, "bert_score", None)
    rows = [row_of(case) for case in GROUPS["loogle", "longdep_qa"][:2]]
    assert set(loogle.metrics(rows)["longdep_qa"]) == {"rouge-l", "rouge-1", "rouge-2", "bleu1", "bleu4"}
    said = [record.getMessage() for record in caplog.records]
    assert [text[:20] for text in said] == ["loogle: no METEOR wi", "loogle: no BERTScore"]
    assert not any("\n" in text for text in said)


def test_the_bertscore_of_an_empty_text_is_0(monkeypatch):
    """As bert_score has it, which cannot say so under transformers 5."""
    monkeypatch.undo()

    class Scorer:
        @staticmethod
        def score(answers, predictions, lang):
            assert (answers, predictions, lang) == (("a", "b"), ("x", "y"), "en")
            return None, torch.tensor([0.25, 0.5]), None

    monkeypatch.setattr(loogle, "package", lambda name: Scorer)
    texts = [("a", "x"), ("c", " \n"), ("", "z"), ("b", "y")]
    rows = [{"answer": answer, "predicted_answer": said} for answer, said in texts]
    assert loogle._bert(rows) == {"bert": 0.75 / 4}
    assert loogle._bert(rows[1:3]) == {"bert": 0}


def test_meteor_does_not_depend_on_the_order_of_a_set(monkeypatch):
    """A WordNet without synonyms: words match by themselves and by their stems."""

    class Nothing:
        @staticmethod
        def synsets(word):
            return []

    from nltk.translate import meteor_score

    single = meteor_score.single_meteor_score
    monkeypatch.setattr(meteor_score, "single_meteor_score", lambda r, h: single(r, h, wordnet=Nothing))
    monkeypatch.setattr(loogle, "_has_wordnet", lambda: True)
    row = {"task": "longdep_qa", "answer": "the red fox jumps", "predicted_answer": "red fox jumping high"}
    matches, precision, recall, chunks = 3, 3 / 4, 3 / 4, 1
    mean = precision * recall / (0.9 * precision + 0.1 * recall)  # nltk's α = 0.9, β = 3, γ = 0.5
    assert loogle.score(row)["meteor"] == pytest.approx(100 * mean * (1 - 0.5 * (chunks / matches) ** 3))
