"""What the estimate counts, and that it says what it assumes."""

from pathlib import Path

import pytest
import yaml
from fake_slurm import make_experiment

from sparsekv.cluster.artefacts import state
from sparsekv.cluster.estimate import Estimate, assumptions, estimate
from sparsekv.cluster.phases import make_phases
from sparsekv.cluster.pipeline import Throughput, load_pipeline

PARAMETERS = 8e9
RATES = Throughput(train=4e13, evaluate=2e14, analyze=5e13)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_experiment(tmp_path)
    return tmp_path


def change(file: Path, **values):
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | values))


def cost(name: str, rates: Throughput = RATES) -> Estimate:
    phase = make_phases(load_pipeline(Path("configs/pipeline.yaml")), "tiny")[name]
    return estimate(phase, state(phase), PARAMETERS, rates)


def said(rates: Throughput) -> str:
    return "\n".join(assumptions(rates, make_phases(load_pipeline(Path("configs/pipeline.yaml")), "tiny").values()))


@pytest.mark.parametrize("gpus", [1, 4])
def test_a_training_shares_its_rows(folder, gpus):
    """As many GPUs as there are take rows of their own: the same rows cost the same, the same steps more."""
    change(folder / "configs/pipeline.yaml", resources={"train": {"gpus": gpus}})
    change(folder / "configs/train.yaml", num_train_samples=1000, max_seq_len=2048)
    hours = PARAMETERS * 1000 * 2048 / 4e13 / 3600
    assert cost("train").gpu_hours == pytest.approx(hours)
    change(folder / "configs/train.yaml", max_steps=125, batch_size=2, grad_accum=4)
    assert cost("train").gpu_hours == pytest.approx(gpus * hours)


def test_an_analysis_holds_all_its_gpus(folder):
    one = cost("analyze").gpu_hours
    change(folder / "configs/pipeline.yaml", resources={"analyze": {"gpus": 2}})
    assert cost("analyze").gpu_hours == pytest.approx(2 * one)


def test_long_answers_are_counted(folder):
    size = {"rows": 30, "context": 200, "steps": 15000}
    short = cost("baseline", Throughput(workloads={"ruler:4096": {**size, "steps": 0}}))
    long = cost("baseline", Throughput(step_seconds=0.1, workloads={"ruler:4096": size}))
    assert long.hours - short.hours == pytest.approx(2 * 30 * 15000 * 0.1 / 3600)


def test_where_nothing_was_measured_it_says_so(folder):
    assert "not said; the rates of one H100 and an 8B model are assumed" in said(Throughput())
    assert "size not listed: ruler:4096; 500 rows of 4,096 tokens are assumed" in said(Throughput())
    known = said(Throughput(measured="here", workloads={"ruler:4096": {"rows": 10}}))
    assert "measured: here" in known
    assert "assumed" not in known
