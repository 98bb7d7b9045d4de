"""The demo from end to end."""

import json

import pytest
from tiny import save_tiny

from sparsekv.demo import CELLS, DemoConfig, demo


def check(out, samples: int) -> None:
    scores = json.loads((out / "results.json").read_text())
    assert set(scores) == {"base", "control", "trained"}
    assert all(len(group) == 2 * samples * len(CELLS) for group in scores.values())
    text = (out / "results.md").read_text()
    assert text.count("trained against control") == 2
    for name in ("control", "trained"):
        record = json.loads((out / name / "final" / "eit_config.json").read_text())
        assert record["config"]["control"] == (name == "control")


def test_a_second_call_continues_what_is_there(tmp_path, capsys):
    options = {"model": save_tiny(tmp_path / "tiny"), "output_dir": str(tmp_path / "out"), "max_steps": 2}
    config = DemoConfig(**options, num_samples=2, context_length=320)
    demo(config)
    check(tmp_path / "out", 2)
    first = (tmp_path / "out" / "results.json").read_text()
    (tmp_path / "out" / "results.json").unlink()
    capsys.readouterr()
    demo(config)
    assert "training:" not in capsys.readouterr().out
    assert (tmp_path / "out" / "results.json").read_text() == first


@pytest.mark.slow
def test_the_real_model(tmp_path, demo_model, capsys):
    demo(DemoConfig(output_dir=str(tmp_path), max_steps=2, num_samples=2, context_length=128))
    check(tmp_path, 2)
    scores = json.loads((tmp_path / "results.json").read_text())["base"]
    full = [score for score in scores if score["press"] == "no_press"]
    assert all(score["exact"] for score in full if score["task"] == "needle")  # it finds a needle in 128 tokens
    assert all(score["nll"] < 5 for score in full if score["task"] == "text")
