"""The demo from end to end."""

import json

import pandas as pd
import pytest
from tiny import save_tiny

from sparsekv.demo import PRESSES, DemoConfig, demo


def check(out, samples: int) -> pd.DataFrame:
    figures = pd.read_csv(out / "compare.csv")
    assert set(figures.run) == {"base", "control", "trained"}
    for benchmark in ("ruler-local", "perplexity"):
        cells = figures[(figures.benchmark == benchmark) & (figures.run == "trained") & (figures.task != "all tasks")]
        assert set(cells.press) == {"no_press", *PRESSES}
        assert set(cells.n) == {samples}
        assert cells.diff_control.notna().all()
    text = (out / "compare.md").read_text()
    assert "Headline of ruler-local" in text
    assert "trained − control" in text
    for name in ("control", "trained"):
        record = json.loads((out / name / "final" / "eit_config.json").read_text())
        assert record["config"]["control"] == (name == "control")
    return figures


def test_a_second_call_continues_what_is_there(tmp_path, capsys, caplog):
    options = {"model": save_tiny(tmp_path / "tiny"), "output_dir": str(tmp_path / "out"), "max_steps": 2}
    config = DemoConfig(**options, num_samples=2, context_length=480)
    assert demo(config)
    check(tmp_path / "out", 2)
    first = (tmp_path / "out" / "compare.csv").read_text()
    (tmp_path / "out" / "compare.csv").unlink()
    capsys.readouterr()
    with caplog.at_level("INFO", logger="sparsekv"):
        assert demo(config)
    assert "training:" not in capsys.readouterr().out
    assert "5 cells: 5 done" in caplog.text
    assert (tmp_path / "out" / "compare.csv").read_text() == first


@pytest.mark.slow
def test_the_real_model(tmp_path, demo_model, capsys):
    assert demo(DemoConfig(output_dir=str(tmp_path), max_steps=2, num_samples=2, context_length=160))
    figures = check(tmp_path, 2)
    full = figures[(figures.run == "base") & (figures.press == "no_press")].set_index("metric").score
    assert (full["string_match"] == 100).all()  # it finds a needle in 160 tokens
    assert (full["nll"] < 5).all()
