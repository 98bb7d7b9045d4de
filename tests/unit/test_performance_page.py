"""docs/performance.md: its table of costs is the estimate of `sparsekv submit --dry-run`."""

import re
from pathlib import Path

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
