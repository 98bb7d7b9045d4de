"""docs/performance.md: its table of costs is the estimate of `sparsekv submit --dry-run`."""

import importlib
import re
from pathlib import Path

import pytest

from sparsekv.cluster.artefacts import State
from sparsekv.cluster.estimate import estimate, rounded
from sparsekv.cluster.phases import make_phases
from sparsekv.cluster.pipeline import load_pipeline

ROOT = Path(__file__).parents[2]


def test_the_cost_of_10_000_rows_of_4_096_tokens(monkeypatch):
    monkeypatch.chdir(ROOT)
    pipeline = load_pipeline(Path("configs/pipeline.yaml"))
    phase, rates = make_phases(pipeline, "qwen3")["train"], pipeline.rates()
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    section = text.split("\n## The cost model\n")[1].split("\n## ")[0]
    assert f"{rates.train:.1e}".replace("+", "") in section
    rows = re.findall(r"^\| ([\d.]+) \| (.+) \|$", section, flags=re.MULTILINE)
    assert len(rows) > 3
    for billions, cells in rows:
        found = estimate(phase, State(False, ""), float(billions) * 1e9, rates)
        assert "10,000 rows of 4,096 tokens" in found.work
        wanted = [*(rounded(found.hours / gpus) for gpus in (1, 2, 4, 8)), rounded(found.gpu_hours)]
        assert cells.split(" | ") == wanted, billions


@pytest.fixture
def cost_figure(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("cost_figure")


def test_the_figures_lines_are_the_floor_and_fall_with_what_is_evicted(cost_figure):
    step_costs, shapes = importlib.import_module("step_costs"), importlib.import_module("shapes")
    base = shapes.make_model("qwen3-8b", "bfloat16", "meta")
    shape = cost_figure.SHAPES["8B"]
    for length in (2048, 32_768):
        full, third, tenth = (cost_figure.operations(shape, length, keep) for keep in (1.0, 0.3, 0.1))
        assert full == pytest.approx(step_costs.step_flops(base, 1, length), rel=1e-3)
        assert full > third > tenth


def test_the_figures_points_are_the_pages(cost_figure):
    points = cost_figure.measured(ROOT / "docs/performance.md")
    assert {(step, tokens) for step, tokens, _ in points} == {
        (step, tokens) for step in ("control", "keep 0.3") for tokens in (2048, 4096, 32_768)
    }
