"""Every goal's figure against one worked out by hand, on both sides of its bound."""

from pathlib import Path

import numpy as np
import pytest

from sparsekv.errors import UserError
from sparsekv.evaluation.comparison.goals import goals, read_compare
from tests.comparison import Comparison

NAMES = ["worse", "single", "better", "retention", "base gap", "control gap", "score", "perplexity", "presses", "bound"]


def measured(folder: Path, made: Comparison) -> dict:
    return dict(zip(NAMES, goals(made.read(folder)), strict=True))


def test_all_met(tmp_path: Path) -> None:
    """Two lengths, four presses at 0.7."""
    made = Comparison()
    for length in ("1024", "2048"):
        made.needles("no_press", 0.0, (80, 90, 90), "no difference", data_dir=length)
        made.text("no_press", 0.0, (2.0, 1.9, 1.9), "no difference", data_dir=length)
        for press in ("snapkv", "knorm", "kvzip"):
            made.needles(press, 0.7, (20, 30, 89.5), "better", data_dir=length)
            made.text(press, 0.7, (2.5, 2.4, 1.905), "better", data_dir=length)
        made.needles("anchor", 0.7, (20, 20, 60), "better", data_dir=length, bound=40.0)
        made.text("anchor", 0.7, (2.1, 2.0, 1.95), "no difference", data_dir=length)
    found = measured(tmp_path, made)
    assert [goal.met for goal in found.values()] == [True] * len(NAMES)
    assert [goal.n for goal in found.values()] == [20, 10, 16, 8, 6, 6, 2, 2, 4, 2]
    assert found["worse"].value == found["single"].value == 0
    assert found["better"].value == 14 / 16
    assert found["retention"].value == pytest.approx((3 * 89.5 / 90 + 60 / 90) / 4)
    assert found["retention"].shown == f"{(3 * 20 / 80 + 20 / 80) / 4:.3f} → {(30 / 90 * 3 + 20 / 90) / 4:.3f} → 0.912"
    assert found["base gap"].value == pytest.approx(69.5 / 60)
    assert found["control gap"].value == pytest.approx(59.5 / 60)
    assert found["score"].shown == "+0.0 points"
    assert found["perplexity"].value == 0
    assert found["presses"].shown == "3 (knorm, kvzip, snapkv)"
    assert found["bound"].shown == "2 of 2, on average +20.0 points"


def test_all_missed(tmp_path: Path) -> None:
    made = Comparison()
    made.needles("no_press", 0.0, (80, 90, 88.9), "worse")
    made.text("no_press", 0.0, (2.0, 1.9, 1.911), "no difference")
    for press in ("snapkv", "knorm"):
        made.needles(press, 0.7, (20, 30, 40), "worse" if press == "knorm" else "better")
        made.text(press, 0.7, (2.5, 2.4, 2.3), "better" if press == "knorm" else "no difference")
    made.needles("streaming_llm", 0.7, (40, 40, 40), "no difference", bound=40.0)
    made.needles("anchor", 0.7, (40, 40, 47), "better", bound=45.0)  # its interval begins at 44
    found = measured(tmp_path, made)
    assert [goal.met for goal in found.values()] == [False] * len(NAMES)
    assert (found["worse"].value, found["worse"].n) == (2, 8)  # the full cache too
    assert (found["single"].value, found["single"].n) == (2, 5)
    assert (found["better"].value, found["better"].n) == (3 / 6, 6)
    assert found["base gap"].value == pytest.approx(40 / 120)
    assert found["control gap"].value == pytest.approx(20 / 120)
    assert found["score"].value == pytest.approx(-1.1)
    assert found["perplexity"].value == pytest.approx(np.expm1(0.011))
    assert (found["presses"].value, found["presses"].n) == (0, 2)  # presses with both, needles and text
    assert found["bound"].shown == "0 of 2, on average +1.0 points"


def test_gap_is_that_of_content_based_presses_at_their_own_length(tmp_path: Path) -> None:
    made = Comparison()
    for length, full in (("1024", 100), ("2048", 60)):
        made.needles("no_press", 0.0, (full, full, full), "no difference", data_dir=length)
        made.needles("snapkv", 0.5, (50, 40, 55), "better", data_dir=length)
        made.needles("random", 0.5, (0, 0, 0), "no difference", data_dir=length)
    found = measured(tmp_path, made)
    assert found["base gap"].value == pytest.approx((5 + 5) / (50 + 10))
    assert found["control gap"].value == pytest.approx((15 + 15) / (60 + 20))
    assert found["base gap"].n == 2


def test_room_is_below_ones_own_full_cache_by_more_than_noise(tmp_path: Path) -> None:
    made = Comparison()
    made.needles("no_press", 0.0, (80, 80, 80), "no difference")
    made.needles("snapkv", 0.3, (79, 79, 80), "no difference", retention_high=1.01)  # at the ceiling
    made.needles("snapkv", 0.5, (70, 70, 80), "better", retention_high=0.95)
    made.needles("snapkv", 0.7, (0, 0, 20), "better", retention_high=np.nan)  # all rows are 0
    made.needles("knorm", 0.3, (80, 80, 80), "no difference", retention_high=np.nan)  # all rows are equal
    assert (measured(tmp_path, made)["better"].value, measured(tmp_path, made)["better"].n) == (1.0, 2)


def test_less_than_one_percent_at_every_length_and_measure(tmp_path: Path) -> None:
    made = Comparison()
    for length, kept in (("1024", 79.9), ("2048", 79.0)):
        made.needles("no_press", 0.0, (80, 80, 80), "no difference", data_dir=length)
        made.text("no_press", 0.0, (2.0, 2.0, 2.0), "no difference", data_dir=length)
        made.needles("kvzip", 0.7, (80, 80, 79.9), "no difference", data_dir=length)
        made.text("kvzip", 0.7, (2.0, 2.0, 2.009), "no difference", data_dir=length)
        made.needles("snapkv", 0.7, (80, 80, kept), "no difference", data_dir=length)
        made.text("snapkv", 0.7, (2.0, 2.0, 2.0), "no difference", data_dir=length)
        made.needles("knorm", 0.7, (80, 80, 80), "no difference", data_dir=length)
        made.text("knorm", 0.7, (2.0, 2.0, 2.02), "no difference", data_dir=length)
    assert measured(tmp_path, made)["presses"].shown == "1 (kvzip)"


def test_what_was_not_measured_is_neither_met_nor_missed(tmp_path: Path) -> None:
    made = Comparison()
    made.needles("no_press", 0.0, (80, 80, 80), "no difference")
    made.needles("snapkv", 0.5, (8, 8, 9), "better")
    found = measured(tmp_path, made)
    open_goals = {name: (goal.shown, goal.n) for name, goal in found.items() if goal.met is None}
    assert open_goals == dict.fromkeys(("perplexity", "presses", "bound"), ("–", 0))


def test_a_cell_that_a_run_lacks_does_not_count(tmp_path: Path) -> None:
    made = Comparison()
    made.needles("no_press", 0.0, (80, 80, 80), "no difference")
    made.needles("snapkv", 0.5, (8, 8, 9), "better")
    made.needles("knorm", 0.5, (4, 4, 3), "worse")
    made.rows = [row for row in made.rows if (row["press"], row["run"]) != ("knorm", "base")]
    assert (measured(tmp_path, made)["worse"].value, measured(tmp_path, made)["worse"].n) == (0, 2)


def test_tasks_may_be_called_as_missing_values_are(tmp_path: Path) -> None:
    made = Comparison()
    made.needles("no_press", 0.0, (80, 80, 80), "no difference", tasks=("NA", "null"))
    table = made.read(tmp_path)
    assert set(table.task) == {"NA", "null", "all tasks"}
    assert table[table.run == "base"].diff_control.isna().all()  # no number is still none


def test_what_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no compare\.csv"):
        read_compare(tmp_path / "compare.csv")
    made = Comparison()
    made.needles("no_press", 0.0, (80, 80, 80), "no difference")
    table = made.read(tmp_path)
    for changed, said in ((table[table.run != "control"], "control"), (table.drop(columns="seeds"), "seeds")):
        changed.to_csv(tmp_path / "compare.csv", index=False)
        with pytest.raises(UserError, match=f"lacks {said}; compare base, control and trained"):
            read_compare(tmp_path / "compare.csv")
    for text in ("", "a\n1,2\n1,2,3\n"):
        (tmp_path / "compare.csv").write_text(text)
        with pytest.raises(UserError, match=r"no compare\.csv") as error:
            read_compare(tmp_path / "compare.csv")
        assert "\n" not in str(error.value)
