"""Benchmarks of the Hub, read from folders laid out like its repositories: parquet files, and a README naming them."""

import dataclasses
import json

import datasets
import pytest

from sparsekv.errors import UserError
from sparsekv.evaluation.benchmarks import hub, registry
from sparsekv.evaluation.benchmarks.haystack import DEPTHS
from sparsekv.evaluation.benchmarks.registry import load_benchmark
from sparsekv.evaluation.benchmarks.schema import COLUMNS

BASE = {"context": "Read this.\n\n", "question": "Who?\n", "answer_prefix": "Answer:", "max_new_tokens": 52}
LONGBENCH = {"answers": ["Bob", "Robert"], "length": 4200, "dataset": "x", "language": "en", "all_classes": None}


def longbench(task, number):
    classes = ["LOC", "HUM"] if task == "trec" else None
    answers = ["HUM"] if task == "trec" else LONGBENCH["answers"]
    return {**BASE, **LONGBENCH, "answers": answers, "all_classes": classes, "_id": str(number), "task": task}


NUMBERS = {"math_find": ["12"], "math_calc": ["1", "4"], "code_run": ["-3"], "code_debug": ["C"]}
RECORDS = {  # benchmark → folder, task, number → one record with the columns of the Hub's dataset
    "ruler": lambda folder, n: {**BASE, "answer": ["12", "7"], "task": ("vt", "qa_1")[n % 2]},
    "longbench": lambda folder, n: longbench(folder, n),
    "longbench-e": lambda folder, n: longbench(folder.removesuffix("_e"), n),
    "longbench-v2": lambda folder, n: {**BASE, "answer": "A", "difficulty": "hard", "length": "long", "domain": "x"},
    "infinitebench": lambda folder, n: {**BASE, "answer": NUMBERS.get(folder, ["Bob"]), "task": folder},
    "loogle": lambda folder, n: {**BASE, "answer": '{"<mask-0>": "Bob"}', "task": folder},
    "zero_scrolls": lambda folder, n: {**BASE, "answer": "", "task": ("qmsum", "qasper")[n % 2], "pid": "p"},
    "needle_in_haystack": lambda folder, n: {**BASE, "context": f"Essay {n}. " * 200, "needle": "Eat a sandwich."},
    "aime25": lambda folder, n: {**BASE, "context": " ", "answer": 70 + n},
    "math500": lambda folder, n: {**BASE, "context": " ", "answer": r"\frac{1}{2}", "level": 3},
}
FOLDERS = {"longbench-v2": ("0shot",)}
FIRST = {name: folders[0] for name, item in hub.HUB.items() if (folders := item.folders)}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Factory: write some folders of a benchmark's repository and make it the one that is asked."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name, *folders, count=3):
        root = tmp_path / "owner" / name
        configs = []
        for folder in folders or hub.HUB[name].folders or FOLDERS.get(name, ("data",)):
            records = [{"context": "", **RECORDS[name](folder, n), "question": f"{n}?"} for n in range(count)]
            (root / folder).mkdir(parents=True)
            datasets.Dataset.from_list(records).to_parquet(root / folder / "test-00000-of-00001.parquet")
            config = "default" if folder == "data" else folder
            configs.append({"config_name": config, "data_files": [{"split": "test", "path": f"{folder}/test-*"}]})
        (root / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
        monkeypatch.setitem(hub.HUB, name, dataclasses.replace(hub.HUB[name], repository=str(root)))
        return root

    return write


@pytest.mark.parametrize("name", [name for name in hub.HUB if name != "needle_in_haystack"])
def test_rows_are_those_of_kvpresss_own_call(name, repository, tiny_tokenizer):
    """`load_dataset(id, data_dir=…, split="test")`, with the columns that the schema and the scorer need."""
    folder = FIRST.get(name)
    root = repository(name, *([folder] if folder else []))
    benchmark = load_benchmark(name, tiny_tokenizer, data_dir=folder, seed=3)
    assert (benchmark.name, benchmark.data_dir, benchmark.grows) == (name, folder, name in ("aime25", "math500"))
    raw = datasets.load_dataset(str(root), data_dir=folder, split="test").to_list()
    source = hub.HUB[name].answer
    for row in benchmark.rows:
        record = next(record for record in raw if record["question"] == row["question"])
        assert set(row) == {*COLUMNS, *hub.HUB[name].extra}
        answer = record[source] if isinstance(record[source], list) else str(record[source])
        assert row == {**{key: record.get(key) for key in row}, "answer": answer, "task": record.get("task", name)}
    assert len(benchmark.rows) == len(raw)


@pytest.mark.parametrize("name", ["longbench", "longbench-e", "infinitebench", "loogle"])
def test_without_a_part_all_of_them_are_read_and_scored(name, repository, tiny_tokenizer):
    repository(name, count=1)
    benchmark = load_benchmark(name, tiny_tokenizer)
    tasks = [row["task"] for row in benchmark.rows]
    assert tasks == [folder.removesuffix("_e") for folder in hub.HUB[name].folders]
    said = [{**row, "predicted_answer": "Bob -3"} for row in benchmark.rows]
    if name != "loogle":  # its BERTScore would be looked for
        assert set(benchmark.metrics(said)) == set(tasks)
    assert all(len(benchmark.score(row)) for row in said)


def test_numbers_that_the_hub_stores_as_text_are_compared_as_numbers(repository, tiny_tokenizer):
    repository("infinitebench", *NUMBERS)
    for task, said in {"math_find": "12.", "math_calc": "1, 4", "code_run": "It is -3.", "code_debug": "C"}.items():
        benchmark = load_benchmark("infinitebench", tiny_tokenizer, data_dir=task)
        assert benchmark.score({**benchmark.rows[0], "predicted_answer": said}) == {"score": 100}, task


def test_rulers_part_is_its_context_length(repository, tiny_tokenizer):
    repository("ruler", "4096", "8192")
    by_part = load_benchmark("ruler", tiny_tokenizer, data_dir="8192")
    by_length = load_benchmark("ruler", tiny_tokenizer, context_length=8192)
    assert by_part.data_dir == by_length.data_dir == "8192"
    assert by_part.fingerprint == by_length.fingerprint
    assert load_benchmark("ruler", tiny_tokenizer).data_dir == "4096"
    with pytest.raises(UserError, match=r"^--data_dir 4096: it is not the --context_length 8192; give one of them$"):
        load_benchmark("ruler", tiny_tokenizer, data_dir="4096", context_length=8192)


def test_the_needle_lies_at_each_depth_of_the_first_essay(repository, tiny_tokenizer):
    repository("needle_in_haystack")
    benchmark = load_benchmark("needle_in_haystack", tiny_tokenizer, context_length=400)
    assert benchmark.data_dir == "400"
    assert sorted(row["needle_depth"] for row in benchmark.rows) == list(DEPTHS)
    for row in benchmark.rows:
        before, after = row["context"].split("Eat a sandwich.")
        assert before.startswith("This is a very long story book: <book> ")
        assert after.endswith(" </book>.")
        assert "Essay 1" not in row["context"]
        before, after = (len(tiny_tokenizer.encode(part)) for part in (before[39:], after[:-9]))
        assert before / (before + after) == pytest.approx(row["needle_depth"] / 100, abs=0.02)
        assert before + after + len(tiny_tokenizer.encode("Eat a sandwich.")) == pytest.approx(400 - 150, abs=4)
        assert benchmark.score({**row, "predicted_answer": "Eat a sandwich."})["rouge-l"] == pytest.approx(100)
    chosen = load_benchmark("needle_in_haystack", tiny_tokenizer, context_length=400, data_dir="0,50")
    assert sorted(row["needle_depth"] for row in chosen.rows) == [0, 50]
    assert chosen.data_dir == "400-0,50"


def test_fewer_rows_are_the_first_of_more(repository, tiny_tokenizer):
    repository("ruler", "4096", count=20)
    load = lambda **options: load_benchmark("ruler", tiny_tokenizer, **options).rows  # noqa: E731
    everything = load()
    assert len(everything) == 20
    assert [row["task"] for row in everything] == ["vt"] * 10 + ["qa_1"] * 10
    assert load(num_samples=3) == everything[:3] + everything[10:13]
    assert load(num_samples=3, tasks=["qa_1"]) == everything[10:13]
    assert load() == everything
    assert load(seed=1) != everything
    assert sorted(row["question"] for row in load(seed=1)) == sorted(row["question"] for row in everything)


def test_the_fingerprint_tells_every_change(repository, tiny_tokenizer):
    repository("ruler", "4096")
    benchmark = load_benchmark("ruler", tiny_tokenizer)
    changes = [{"name": "x"}, {"data_dir": "8192"}, {"rows": benchmark.rows[::-1]}]
    changes += [{"rows": [{**benchmark.rows[0], key: "?"}, *benchmark.rows[1:]]} for key in benchmark.rows[0]]
    prints = {dataclasses.replace(benchmark, **change).fingerprint for change in changes}
    assert len(prints | {benchmark.fingerprint}) == len(changes) + 1
    assert dataclasses.replace(benchmark).fingerprint == benchmark.fingerprint


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ruler", {"data_dir": "5000"}, r"^--data_dir 5000: ruler has no such part; give one of 4096, 8192, 16384$"),
        ("ruler", {"context_length": 512}, r"^--context_length 512: give one of 4096, 8192, 16384$"),
        ("aime25", {"data_dir": "I"}, r"^--data_dir I: aime25 has no such part; it has no parts to choose from$"),
        ("longbench", {"data_dir": "qasper", "context_length": 9}, r"^--context_length 9: it has no meaning for "),
        (
            "ruler",
            {"tasks": ["qa"]},
            r"^--tasks qa: it is not known; did you mean qa_1\? ruler has the tasks vt,",
        ),
        ("needle_in_haystack", {"data_dir": "deep"}, r"^--data_dir deep: for needle_in_haystack give depths"),
        ("needle_in_haystack", {"data_dir": "0,101"}, r"^--data_dir 0,101: for needle_in_haystack give depths"),
        ("needle_in_haystack", {"context_length": 99}, r"^--context_length 99: needle_in_haystack needs 1\d\d tokens"),
        (
            "longbench",
            {"data_dir": "lcc"},
            r"^--benchmark longbench: \S+longbench/lcc cannot be loaded from the ",
        ),
    ],
)
def test_what_cannot_be_asked_of_a_benchmark(name, options, message, repository, tiny_tokenizer):
    repository(name, *([FIRST[name], "qasper"] if name == "longbench" else [FIRST[name]] if name in FIRST else []))
    with pytest.raises(UserError, match=message) as error:
        load_benchmark(name, tiny_tokenizer, **options)
    assert "\n" not in str(error.value)


def test_a_dataset_that_changed_is_one_line(repository, tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(RECORDS, "aime25", lambda folder, n: {**BASE, "solution": "70"})
    repository("aime25")
    with pytest.raises(UserError, match=r"^--benchmark aime25: \S+aime25 has no column answer; it has task, context"):
        load_benchmark("aime25", tiny_tokenizer)


def test_a_damaged_dataset_is_one_line(repository, tiny_tokenizer):
    root = repository("aime25")
    next(root.rglob("*.parquet")).write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match=r"^--benchmark aime25: \S+aime25 cannot be loaded from the Hub \([^\n]+$"):
        load_benchmark("aime25", tiny_tokenizer)


@pytest.mark.parametrize("name", list(hub.HUB))
def test_without_the_hub_there_is_one_line(name, tiny_tokenizer, tmp_path, monkeypatch):
    """Offline, as all tests are, with nothing downloaded before."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError) as error:
        load_benchmark(name, tiny_tokenizer)
    line = str(error.value)
    assert line.startswith(f"--benchmark {name}: {hub.HUB[name].repository}")
    assert line.endswith("); ruler-local and perplexity need no Hub")
    assert "\n" not in line


def test_an_unreachable_hub_is_asked_once(tiny_tokenizer, monkeypatch):
    """load_dataset alone would try again and again."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)

    def unreachable(self, name, timeout):
        raise ConnectionError("nobody there\nat all")

    monkeypatch.setattr(hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(
        UserError, match=r"^--benchmark aime25: alessiodevoto/aime25 cannot be loaded .*\(nobody there\);"
    ):
        load_benchmark("aime25", tiny_tokenizer)


def test_every_name_of_the_registry_has_a_builder_and_kvpress_knows_the_rest():
    assert set(registry.BENCHMARKS) == {*hub.HUB, "ruler-local", "perplexity"}
