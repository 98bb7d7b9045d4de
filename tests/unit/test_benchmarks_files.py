"""A user's own file as a benchmark."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsekv.errors import UserError
from sparsekv.evaluation.benchmarks.registry import load_benchmark
from sparsekv.evaluation.comparison.levels import ALL_TASKS

ROW = {
    "context": "Bob lives in 北京.",
    "question": "Where does Bob live?",
    "answer_prefix": "",
    "answer": "北京",
    "max_new_tokens": 8,
    "task": "cities",
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_both_kinds_of_file_give_the_same_rows(tmp_path, tiny_tokenizer):
    rows = [{**ROW, "answer": ["北京", str(number)], "id": number} for number in range(5)]
    lines = load_benchmark(write(tmp_path / "mine.jsonl", rows), tiny_tokenizer)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "mine.parquet")
    table = load_benchmark(str(tmp_path / "mine.parquet"), tiny_tokenizer)
    assert (lines.name, lines.data_dir, lines.kind, lines.grows) == ("mine", None, "generate", False)
    assert lines.rows == table.rows
    assert lines.fingerprint == table.fingerprint
    assert sorted(row["answer"][1] for row in lines.rows) == list("01234")
    assert lines.score({**lines.rows[0], "predicted_answer": "In 北京!"}) == {"string_match": 50}


def test_rows_may_name_their_metric(tmp_path, tiny_tokenizer):
    rows = [{**ROW, "task": task, "metric": metric} for task, metric in (("a", "exact_match"), ("b", None))]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "mine.parquet")
    benchmark = load_benchmark(str(tmp_path / "mine.parquet"), tiny_tokenizer)
    said = [{**row, "predicted_answer": "In 北京."} for row in benchmark.rows]
    assert benchmark.metrics(said) == {"a": {"exact_match": 0}, "b": {"string_match": 100}}


def test_a_mark_of_byte_order_and_empty_lines_do_no_harm(tmp_path, tiny_tokenizer):
    (tmp_path / "mine.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\r\n \n")
    assert load_benchmark(str(tmp_path / "mine.jsonl"), tiny_tokenizer).rows == [ROW]


def test_rows_of_ruler_local_are_a_file_too(tmp_path, tiny_tokenizer):
    """Written out and read again they are scored as before."""
    tasks = ("niah_single_1", "qa_1")
    tasks = ("niah_single_1", "qa_1")
    local = load_benchmark("ruler-local", tiny_tokenizer, context_length=1024, tasks=tasks, num_samples=2)
    mine = load_benchmark(write(tmp_path / "mine.jsonl", local.rows), tiny_tokenizer)
    said = [{**row, "predicted_answer": row["answer"][0]} for row in mine.rows]
    assert (
        mine.metrics(said) == local.metrics(said) == {task: {"string_match": 100} for task in ("niah_single_1", "qa_1")}
    )


def without(column):
    return {key: value for key, value in ROW.items() if key != column}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "it is no object with the columns context, question,"),
        (3, "it is no object"),
        (without("question"), "it has no question; a row needs context, question, answer_prefix, answer, max_new_"),
        ({}, "it has no context, question, answer_prefix, answer, max_new_tokens, task; "),
        ({**ROW, "answer": ""}, "answer is ''; it must be a text or a list of texts, none of them empty"),
        ({**ROW, "answer": " \n"}, r"answer is ' \\n'; it must be"),
        ({**ROW, "answer": "\u0001"}, r"answer is '\\x01'; it must be"),
        ({**ROW, "answer": []}, r"answer is \[\]; it must be"),
        ({**ROW, "answer": ["x", ""]}, r"answer is \['x', ''\]; it must be"),
        ({**ROW, "answer": None}, "answer is None; it must be"),
        ({**ROW, "answer": 7}, "answer is 7; it must be"),
        ({**ROW, "answer": "\ud800"}, r"answer is '\\ud800'; it must be"),
        ({**ROW, "context": ""}, "context is empty"),
        ({**ROW, "context": ["x" * 90]}, r"context is \['x{38}…; it must be Unicode text"),
        ({**ROW, "question": None}, "question is None; it must be Unicode text"),
        ({**ROW, "question": "\udc00"}, r"question is '\\udc00'; it must be Unicode text"),
        ({**ROW, "task": " "}, "task is empty"),
        ({**ROW, "task": ALL_TASKS}, "task is 'all tasks', which is the name of the average over tasks; give it an"),
        ({**ROW, "max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number above 0"),
        ({**ROW, "max_new_tokens": 10**20}, "max_new_tokens is 1000.*; it must be a whole number above 0 and at most"),
        ({**ROW, "max_new_tokens": True}, "max_new_tokens is True; it must be"),
        ({**ROW, "max_new_tokens": 1.5}, "max_new_tokens is 1.5; it must be"),
        ({**ROW, "max_new_tokens": "9"}, "max_new_tokens is '9'; it must be"),
        ({**ROW, "metric": "bleu"}, "metric is 'bleu'; give one of string_match, string_match_all, string_match_part"),
        ({**ROW, "metric": ["f1"]}, r"metric is \['f1'\]; give one of"),
    ],
)
def test_a_bad_row_is_named(row, message, tmp_path, tiny_tokenizer):
    path = write(tmp_path / "mine.jsonl", [ROW, row, ROW])
    with pytest.raises(UserError, match=rf"^--benchmark {path}, line 2: {message}") as error:
        load_benchmark(path, tiny_tokenizer)
    assert "\n" not in str(error.value)
    str(error.value).encode()  # can be printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": the file is empty"),
        (b"\n \n", ": the file is empty"),
        (b"{}\n{", ", line 1: it has no context"),
        (json.dumps(ROW).encode() + b"\n{", ", line 2: it is not JSON (Expecting property name"),
        (json.dumps(ROW).encode() + b"\n" + b"[" * 100_000, ", line 2: it is not JSON (maximum recursion"),
        (json.dumps(ROW).encode() + b'\n{"context": "caf\xe9"}', ", line 2: it is not UTF-8 text (byte 0xe9)"),
    ],
)
def test_a_bad_file_of_lines_is_named(content, message, tmp_path, tiny_tokenizer):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_benchmark(str(path), tiny_tokenizer)
    assert str(error.value).startswith(f"--benchmark {path}{message}")
    assert "\n" not in str(error.value)


def test_a_bad_table_is_named(tmp_path, tiny_tokenizer):
    path = tmp_path / "mine.parquet"

    def refused(message):
        with pytest.raises(UserError) as error:
            load_benchmark(str(path), tiny_tokenizer)
        assert str(error.value).startswith(f"--benchmark {path}{message}")

    refused(": it cannot be read (No such file")
    path.write_bytes(b"PAR1 torn")
    refused(": it is not a parquet file")
    datasets.Dataset.from_list([ROW, {**ROW, "answer": ""}]).to_parquet(path)
    refused(", row 1: answer is ''; it must be")
    datasets.Dataset.from_list([without("task")]).to_parquet(path)
    refused(", row 0: it has no task; a row needs")
    datasets.Dataset.from_list([ROW]).select([]).to_parquet(path)
    refused(": the file is empty")
    columns = {name: [value] for name, value in ROW.items()}
    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xe9")])
    pq.write_table(pa.Table.from_arrays([*columns.values(), ["t"]], [*columns, "task"]), path)
    refused(": it has the column task twice")
    pq.write_table(pa.table({**columns, "context": text}), path)
    refused(": it holds text that is not UTF-8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rulr", r"^--benchmark rulr: it is not known; did you mean ruler\? give a \.jsonl or \.parquet file or one"),
        ("gone.jsonl", r"^--benchmark gone\.jsonl: it cannot be read \(No such file or directory\)$"),
        ("folder.jsonl", r"^--benchmark folder\.jsonl: it cannot be read \(Is a directory\)$"),
        ("folder.parquet", r"^--benchmark folder\.parquet: it cannot be read \(Is a directory\)$"),
        ("notes.txt", r"^--benchmark notes\.txt: its kind is not known; give a \.jsonl or \.parquet file$"),
    ],
)
def test_an_unknown_name_is_one_line(name, message, tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=message) as error:
        load_benchmark(name, tiny_tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, r"^--num_samples 0: give a number above 0$"),
        ({"context_length": -1}, r"^--context_length -1: give a number above 0$"),
        ({"context_length": 64}, r"^--context_length 64: it has no meaning for --benchmark "),
        ({"data_dir": "4096"}, r"^--data_dir 4096: it has no meaning for --benchmark "),
        ({"tasks": ["city"]}, r"^--tasks city: it is not known; did you mean cities\? "),
    ],
)
def test_options_that_a_file_cannot_heed(options, message, tmp_path, tiny_tokenizer):
    with pytest.raises(UserError, match=message):
        load_benchmark(write(tmp_path / "mine.jsonl", [ROW]), tiny_tokenizer, **options)


def test_a_package_that_a_metric_needs_is_missed_at_once(tmp_path, tiny_tokenizer, monkeypatch):
    from sparsekv.evaluation.benchmarks.scoring.packages import package

    monkeypatch.setitem(__import__("sys").modules, "rouge", None)
    package.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'sparsekv\[eval\]'$"):
        load_benchmark(write(tmp_path / "mine.jsonl", [{**ROW, "metric": "rouge-l"}]), tiny_tokenizer)
    package.cache_clear()
