import itertools
import json
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparsekv import data, sources
from sparsekv.data import build_datasets, is_held_out, parse_sources
from sparsekv.errors import UserError

EOS = 0
LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer():
    """One id a byte, so that text can be read back from any row."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={"<eos>": EOS, **{char: i + 1 for i, char in enumerate(alphabet)}}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


def document(i):
    return f"Document {i} tells of the number {i * 7919} and of nothing else at all.\n"


@pytest.fixture
def folder(tmp_path):
    """60 documents in three kinds of files."""
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(document(i))
    with open(tmp_path / "lines.jsonl", "w") as file:
        file.writelines(json.dumps({"text": document(i), "id": i}) + "\n\n" for i in range(20, 40))
    (tmp_path / "deep").mkdir()
    table = {"id": list(range(20)), "text": [document(i) for i in range(40, 60)]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "deep" / "table.parquet")
    return tmp_path


def split(source, tokenizer, need):
    """The texts that training and validation are packed from."""
    sides = data._Loader(tokenizer, LENGTH, 0, None)._split(str(source), need)
    return {side: [tokenizer.decode(tokens).removesuffix("<eos>") for tokens in sides[side]] for side in sides}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


@given(st.dictionaries(st.text("abc/._", min_size=1), st.floats(1e-3, 1e3), min_size=1))
def test_weights_sum_to_one_and_keep_their_ratios(weights):
    parsed = parse_sources(weights)
    assert sum(parsed.values()) == pytest.approx(1)
    first = next(iter(weights))
    assert all(parsed[name] * weights[first] == pytest.approx(parsed[first] * weights[name]) for name in weights)


def test_a_single_name_is_a_source():
    assert parse_sources("pydoc") == {"pydoc": 1.0}


@pytest.mark.parametrize(
    "value",
    ["", "  ", {}, {"pydoc": 0}, {"pydoc": -1}, {"pydoc": float("nan")}, {"pydoc": "1"}, {"pydoc": True}, ["x"]],
)
def test_bad_weights_are_user_errors(value):
    with pytest.raises(UserError, match="--data"):
        parse_sources(value)


@pytest.mark.parametrize("value", ["[pydoc, recall]", ["pydoc", "recall"]])
def test_a_list_is_no_mixture(value):
    with pytest.raises(UserError, match=r"^--data \[.*\]: a mixture is a mapping, such as {pydoc: 0.5, recall: 0.5}$"):
        parse_sources(value)


@pytest.mark.parametrize("weights", [{"pydoc": 1.0}, {"recall": 1.0}, {str(Path(__file__)): 1.0, "pydoc": 1.0}])
def test_a_subset_of_no_hub_dataset_is_refused(weights, tokenizer):
    with pytest.raises(UserError, match=r"^--data_subset part: is of a Hub dataset, and --data .* is none"):
        build_datasets(weights, tokenizer, LENGTH, 4, 1, 0, data_subset="part")
    data.check_subset(weights, None)
    data.check_subset({**weights, "some/dataset": 1.0}, "part")


@given(st.integers(0, 10_000), st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
@settings(max_examples=50)
def test_rows_are_shared_out_completely_and_fairly(total, weights):
    weights = [weight / sum(weights) for weight in weights]
    counts = data._share_out(total, weights)
    assert sum(counts) == total
    assert all(abs(count - total * weight) < 1 + 1e-6 for count, weight in zip(counts, weights, strict=True))


def test_rows_have_exact_length_count_and_order_from_the_seed(folder, tokenizer):
    def build(seed):
        return build_datasets({str(folder): 1.0}, tokenizer, LENGTH, 50, 3, seed)

    (train, validation, mark), (again, _, same), (other, _, changed) = build(0), build(0), build(1)
    assert len(train) == 50
    assert len(validation) == 3
    assert train.column_names == validation.column_names == ["input_ids"]
    assert {len(row) for row in [*train["input_ids"], *validation["input_ids"]]} == {LENGTH}
    assert isinstance(train[0]["input_ids"][0], int)
    assert (train["input_ids"], mark) == (again["input_ids"], same)
    assert train["input_ids"] != other["input_ids"]
    assert mark != changed
    assert len(mark) == 64


def test_no_document_is_in_training_and_validation(folder, tokenizer):
    sides = split(folder, tokenizer, {False: 10**6, True: 10**6})
    everything = {document(i) for i in range(60)}
    assert set(sides[True]) == {text for text in everything if is_held_out(text)}
    assert set(sides[False]) == everything - set(sides[True])
    assert len(sides[True]) >= 2

    train, validation, _ = build_datasets(str(folder), tokenizer, LENGTH, 500, 25, 0)
    for dataset, own, other in ((train, sides[False], sides[True]), (validation, sides[True], sides[False])):
        text = "".join(tokenizer.decode(row) + "|" for row in dataset["input_ids"])
        names = [f" number {int(part.split()[1]) * 7919} and" for part in own + other]
        found = [name in text for name in names]
        assert any(found[: len(own)])
        assert not any(found[len(own) :])


def test_duplicates_stay_on_one_side(tmp_path, tokenizer):
    held, kept = (next(document(i) for i in range(99) if is_held_out(document(i)) == side) for side in (True, False))
    for i in range(5):
        write(tmp_path / f"{i}.txt", held)
        write(tmp_path / f"again{i}.txt", f"\n{held}\n")
        write(tmp_path / f"kept{i}.txt", kept)
    train, validation, _ = build_datasets(str(tmp_path), tokenizer, LENGTH, 9, 9, 0)
    assert held[:20] not in tokenizer.decode(list(itertools.chain(*train["input_ids"])))
    assert kept[:20] not in tokenizer.decode(list(itertools.chain(*validation["input_ids"])))


def test_about_a_tenth_is_held_out():
    assert 0.08 < np.mean([is_held_out(str(i)) for i in range(5000)]) < 0.12


def test_documents_are_closed_by_eos_and_nothing_is_padded(folder, tokenizer):
    train, _, _ = build_datasets(str(folder), tokenizer, 1024, 2, 0, 0)
    for row in train["input_ids"]:
        text = tokenizer.decode(row)
        inner = text.split("<eos>")[1:-1]
        assert len(inner) > 5
        assert all(part in {document(i) for i in range(60)} for part in inner)


def test_a_source_too_small_is_used_again_in_training_but_not_in_validation(folder, tokenizer, caplog):
    train, validation, _ = build_datasets(str(folder), tokenizer, LENGTH, 1000, 1000, 0)
    assert len(train) == 1000
    assert 3 <= len(validation) < 60
    assert sum("used" in record.message for record in caplog.records) == 1
    assert len({tuple(row) for row in train["input_ids"]}) > 300  # a new order makes new rows


def test_every_further_epoch_has_a_new_order():
    documents = [np.array([i]) for i in range(20)]
    order = [int(tokens[0]) for tokens in itertools.islice(data._reshuffled(documents, np.random.default_rng(0)), 60)]
    epochs = [order[:20], order[20:40], order[40:]]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_one_file_is_split_into_passages(tmp_path, tokenizer, caplog):
    path = write(tmp_path / "book.txt", "\n".join(document(i) for i in range(60)))
    train, validation, _ = build_datasets(path, tokenizer, LENGTH, 40, 3, 0)
    assert (len(train), len(validation)) == (40, 3)
    assert "passages of the same" in caplog.text
    sides = split(path, tokenizer, {False: 10**6, True: 10**6})
    assert not set(sides[False]) & set(sides[True])
    assert sum(map(len, sides[False] + sides[True])) == len((tmp_path / "book.txt").read_text())
    assert len(sides[False]) > 3 * len(sides[True]) > 0


@given(st.text("ab \n", max_size=300), st.integers(1, 50))
def test_passages_and_pieces_lose_nothing(text, size):
    assert "".join(data._passages([text], size)) == text
    assert "".join(piece for _, piece, _ in data._pieces([text], 0.1)) == text


def test_long_documents_are_tokenized_only_as_far_as_needed(tmp_path, tokenizer, monkeypatch):
    for i in range(20):
        write(tmp_path / f"{i}.txt", document(i) * 20_000)
    seen = []
    encode = tokenizer._encode_plus
    monkeypatch.setattr(tokenizer, "_encode_plus", lambda text, **kw: seen.extend(map(len, text)) or encode(text, **kw))
    build_datasets(str(tmp_path), tokenizer, LENGTH, 10, 0, 0)
    assert 0 < sum(seen) <= data.BATCH_CHARS + 2 * data.PIECE_CHARS


def test_weights_share_out_rows(folder, tokenizer, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for i in range(40):
        write(other / f"{i}.jsonl", json.dumps({"text": "z" * (i + 10)}))
    mixed, _, _ = build_datasets({str(folder / "deep"): 3, str(other): 1}, tokenizer, 8, 40, 0, 0)
    from_other = ["z" in tokenizer.decode(row) for row in mixed["input_ids"]]
    assert sum(from_other) == 10
    assert not all(from_other[:10])  # shuffled
    assert not all(from_other[-10:])


def test_recall_mixes_with_text_and_has_its_own_validation(folder, tokenizer):
    train, validation, _ = build_datasets({str(folder): 0.5, "recall": 0.5}, tokenizer, 1024, 8, 2, 0)
    assert (len(train), len(validation)) == (8, 2)
    assert {len(row) for row in [*train["input_ids"], *validation["input_ids"]]} == {1024}
    again, _, _ = build_datasets({str(folder): 0.5, "recall": 0.5}, tokenizer, 1024, 8, 2, 0)
    assert train["input_ids"] == again["input_ids"]


def test_recall_gets_facts_and_text_of_its_own_side(folder, tokenizer, monkeypatch):
    calls = []

    def record(tokenizer, filler, max_seq_len, num_rows, seed, accept):
        calls.append((filler, seed, [accept(str(i)) for i in range(100)]))
        return [[1] * max_seq_len] * num_rows

    monkeypatch.setattr(data, "recall_rows", record)
    train, validation, _ = build_datasets({str(folder): 0.5, "recall": 0.5}, tokenizer, LENGTH, 8, 4, 0)
    for (filler, _, accepted), rows, side in zip(calls, (train, validation), (False, True), strict=True):
        assert accepted == [is_held_out(str(i)) == side for i in range(100)]
        text = sorted(token for row in rows["input_ids"] if row != [1] * LENGTH for token in row if token != EOS)
        assert sorted(filler) == text
    assert calls[0][1] != calls[1][1]


def test_a_long_reading_says_how_far_it_is_in_one_process_of_a_launcher(folder, tokenizer, monkeypatch, caplog):
    def said() -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO", logger="sparsekv"):
            build_datasets({str(folder): 0.5, "recall": 0.5}, tokenizer, 512, 4, 2, 0)
        return [message.partition(",")[0] for message in caplog.messages if "minutes left" in message]

    monkeypatch.setattr("sparsekv.progress.EVERY", 0)
    lines = said()
    drawn = [line for line in lines if "recall" in line]
    assert drawn == ["1 of 2 recall rows", "2 of 2 recall rows", "1 of 1 recall rows"]
    assert f"{3 * 512} of {3 * 512} tokens of {folder}" in lines
    monkeypatch.setenv("RANK", "1")
    assert said() == []


def test_recall_alone_takes_its_text_from_pydoc(tokenizer):
    train, validation, _ = build_datasets("recall", tokenizer, 1024, 2, 1, 0)
    assert (len(train), len(validation)) == (2, 1)
    assert EOS not in itertools.chain(*train["input_ids"])


def test_pydoc_reads_reference_and_docstrings_without_importing(tokenizer):
    texts = [record["text"] for record in sources._read_pydoc(["assert", json.__file__])]
    assert "Assert" in texts[0]
    assert texts[1].startswith("json\n\n")
    assert "\n\njson.dumps\n\n" in texts[1]
    assert "Serialize ``obj`` to a JSON formatted" in texts[1]
    files = sources._library_files()
    assert json.__file__ in files
    assert not any("site-packages" in file or "/test/" in file for file in files)
    train, validation, _ = build_datasets("pydoc", tokenizer, 256, 20, 3, 0)
    assert (len(train), len(validation)) == (20, 3)


def test_docstrings_are_parsed_once(tmp_path, monkeypatch):
    library, read = tmp_path / "library", []
    (library / "pack").mkdir(parents=True)
    (library / "pack" / "__init__.py").write_text('"""Of a pack."""')
    (library / "lone.py").write_text('def f():\n    """Alone."""')
    monkeypatch.setenv("SPARSEKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda _: str(library))
    parse = sources._docstrings
    monkeypatch.setattr(sources, "_docstrings", lambda file, module: read.append(module) or parse(file, module))

    def found():
        sources._library_docstrings.cache_clear()  # as a new process
        return {Path(file).name: text for file, text in sources._library_docstrings().items()}

    wanted = {"lone.py": "lone.f\n\nAlone.", "__init__.py": "pack\n\nOf a pack."}
    try:
        assert found() == found() == wanted
        assert read == ["lone", "pack"]
        (kept,) = (tmp_path / "cache" / "pydoc").iterdir()
        kept.write_text('{"damaged')
        assert found() == wanted
        (library / "lone.py").write_text('def f():\n    """Another, longer."""')
        assert found()["lone.py"] == "lone.f\n\nAnother, longer."
        assert read == ["lone", "pack"] * 3
        monkeypatch.setenv("SPARSEKV_CACHE", str(kept / "no folder"))
        assert found()["__init__.py"] == wanted["__init__.py"]  # a cache that cannot be written costs time alone
    finally:
        sources._library_docstrings.cache_clear()


def test_a_file_that_is_no_python_has_no_docstrings(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text('"""Doc."""\ndef (')
    assert sources._docstrings(path, "broken") == ""


BAD_FILES = {
    "empty.txt": (b"", "empty.txt: the file is empty"),
    "blank.txt": (b" \n", "blank.txt: the file is empty"),
    "latin.txt": ("café crème".encode("latin-1"), "latin.txt: it is not UTF-8"),
    "latin.jsonl": ('{"text": "café"}'.encode("latin-1"), "latin.jsonl: it is not UTF-8"),
    "fields.jsonl": (b'{"text": "a"}\n\n{"body": "b"}\n', 'fields.jsonl, line 3: it has no "text"'),
    "number.jsonl": (b'{"text": 3}\n', 'number.jsonl, line 1: it has no "text"'),
    "broken.jsonl": (b'{"text": "a"}\n{"text"\n', "broken.jsonl, line 2: it is not JSON"),
    "half.jsonl": (b'{"text": "a \\ud800 b"}\n', 'half.jsonl, line 1: it has no "text" field that holds Unicode text'),
    "digits.jsonl": (b'{"text": ' + b"1" * 5000 + b"}\n", "digits.jsonl, line 1: it is not JSON"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", "deep.jsonl, line 1: it is not JSON"),
    "no.parquet": (b"hello", "no.parquet: it is not a parquet file"),
    "kind.csv": (b"a,b", "kind.csv: its kind is not known"),
    "short.txt": (b"hi", "short.txt holds 3 tokens, which do not make one row of --max_seq_len 32"),
    "barely.txt": (
        b"x" * 40,
        "barely.txt holds 41 tokens, which do not make a training and a validation row of --max_seq_len 32",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named(name, tmp_path, tokenizer):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        build_datasets(str(tmp_path / name), tokenizer, LENGTH, 4, 1, 0)
    assert message in str(error.value)
    assert str(error.value).startswith("--data")
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_text_and_an_empty_folder_are_named(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"the folder holds no \.txt"):
        build_datasets(str(tmp_path), tokenizer, LENGTH, 4, 1, 0)
    datasets.Dataset.from_dict({"body": ["a"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'a\.parquet: it has no string column "text"; it has body'):
        build_datasets(str(tmp_path), tokenizer, LENGTH, 4, 1, 0)


def test_a_tokenizer_without_eos_is_a_user_error(folder, tokenizer):
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="end-of-sequence"):
        build_datasets(str(folder), without, LENGTH, 4, 1, 0)


@pytest.mark.parametrize("name", ["no/such/folder", "missing.txt", "./missing", "/missing", "a b"])
def test_a_missing_path_is_not_looked_for_on_the_hub(name, tokenizer, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(UserError, match="no such file or folder"):
        build_datasets(name, tokenizer, LENGTH, 4, 1, 0)


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_that_cannot_be_reached_is_a_user_error(offline, tokenizer, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("nobody there\nat all")

    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable if offline else None)
    with pytest.raises(UserError) as error:
        build_datasets("some/dataset", tokenizer, LENGTH, 4, 1, 0, data_subset="part")
    assert str(error.value).startswith("--data some/dataset --data_subset part: neither")
    assert str(error.value).endswith("(nobody there)")


def hub(monkeypatch, records):
    """Make `records` (a generator function) the training split of every Hub dataset."""
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: None)
    stream = datasets.IterableDataset.from_generator(records)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split, streaming: stream)


def test_a_hub_dataset_is_streamed_only_as_far_as_needed(tokenizer, monkeypatch):
    read = []

    def endless():
        for i in itertools.count():
            read.append(i)
            yield {"text": document(i)}

    hub(monkeypatch, endless)
    train, validation, _ = build_datasets("some/dataset", tokenizer, LENGTH, 20, 2, 0)
    assert (len(train), len(validation)) == (20, 2)
    assert len(read) < 2 * sources.SHUFFLE_BUFFER


def test_a_hub_dataset_without_text_is_a_user_error(tokenizer, monkeypatch):
    def records():
        yield {"body": "a"}

    hub(monkeypatch, records)
    with pytest.raises(UserError, match='it has no column "text"; it has body'):
        build_datasets("some/dataset", tokenizer, LENGTH, 4, 1, 0)
