"""benchmarks/scaling.py: what it makes of figures, and a run of it on a CPU with two processes."""

import importlib
import json
from pathlib import Path

import pytest
from tiny import save_tiny

from sparsekv.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TRAINED = {
    "shape": "qwen3-8b",
    "checkpointing": False,
    "processes": 1,
    "distribution": "one process",
    "rows": 8,
    "batch_size": 1,
    "steps": 5,
    "device": "H100",
    "step": "keep 0.3",
    "length": 4096,
    "tokens_per_second": 7000.0,
    "mfu": 0.37,
    "peak": 45.0,
    "loss": 12.0,
    "torch": "2.11",
    "commit": "c0",
}
EVALUATED = {
    "model": "m",
    "context_length": 4096,
    "num_samples": 4,
    "processes": 1,
    "device": "H100",
    "seconds": 100.0,
    "start": 20.0,
    "answers": 52,
    "different": 0,
    "torch": "2.11",
    "commit": "c0",
}


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scaling")


def lines(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|") and "---" not in line]


def test_efficiency_is_against_the_same_run_on_one_gpu(scaling):
    two = TRAINED | {"processes": 2, "distribution": "DDP", "tokens_per_second": 13_300.0, "loss": 12.0012}
    longer = two | {"length": 32_768}
    out_of_memory = {**two, "distribution": "FSDP2", "failed": "out of memory"}
    shared = EVALUATED | {"processes": 2, "seconds": 60.0, "different": 3}
    found = lines(scaling.tables([two, TRAINED, longer, out_of_memory, shared, EVALUATED]))
    assert [line[5:9] for line in found[1:5]] == [
        ["1", "one process", "7,000", "100%"],
        ["2", "DDP", "13,300", "95%"],
        ["2", "FSDP2", "out of memory", "–"],
        ["2", "DDP", "13,300", "–"],
    ]
    assert found[2][-1] == "1.0e-04"
    assert found[4][-1] == "–", "of another length"
    assert found[-1][-3:] == ["100%", "83%", "3"]


def test_a_later_measurement_replaces_only_its_own_kind(scaling):
    records = []
    for new in (TRAINED, EVALUATED, TRAINED | {"step": "mixture"}, TRAINED | {"loss": 11.0, "commit": "c1"}):
        records = scaling.merged(records, new)
    assert records == [EVALUATED, TRAINED | {"step": "mixture"}, TRAINED | {"loss": 11.0, "commit": "c1"}]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("train --rows 3 --gpus 1 2", "^--rows 3: cannot be shared by 2"),
        ("train --rows 2 --batch_size 2 --gpus 2", "^--rows 2: cannot be shared by 2 processes, 2 at a time"),
        ("train --how fsdp2", "^--how fsdp2: accelerate divides"),
        ("tables", "^--results .*: holds nothing yet"),
    ],
)
def test_what_cannot_be_measured(scaling, flags, message, tmp_path, monkeypatch):
    results = ["--device", "cpu", "--results", str(tmp_path / "results.json")]
    monkeypatch.setattr("sys.argv", ["scaling.py", *flags.split(), *results])
    with pytest.raises(UserError, match=message):
        scaling.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_on_a_cpu(scaling, tmp_path, monkeypatch):
    """The losses and answers of two processes are one's, and all calls end in one table."""
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("<!-- scaling cpu -->\n<!-- /scaling cpu -->\n")
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    monkeypatch.setattr(scaling, "print", lambda *args, **kwargs: None, raising=False)
    common = ["--device", "cpu", "--gpus", "1", "2", "--results", str(results), "--doc", str(page)]
    tiny = ["--shape", "tiny", "--lengths", "96", "--rows", "2", "--steps", "1"]
    monkeypatch.setattr("sys.argv", ["scaling.py", "train", *common, *tiny])
    scaling.main()
    one, two = json.loads(results.read_text())
    assert (one["distribution"], two["distribution"]) == ("one process", "DDP")
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert two["rows"] == one["rows"] == 2
    model = save_tiny(tmp_path / "model")
    small = ["--model", model, "--context_length", "768", "--num_samples", "1"]
    monkeypatch.setattr("sys.argv", ["scaling.py", "eval", *common, *small])
    scaling.main()
    one, two = json.loads(results.read_text())[2:]
    assert one["answers"] == two["answers"] == 13 * 13
    assert two["different"] == 0
    assert min(two["start"], two["seconds"]) > 0
    assert len(lines(page.read_text())) == 1 + 2 + 1 + 2
