"""Every figure of the comparison against one worked out by hand or by numpy."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sparsekv.errors import UserError
from sparsekv.evaluation.comparison import statistics, tables
from sparsekv.evaluation.comparison.compare import analyze, compare, write_summary
from sparsekv.evaluation.comparison.levels import ALL_TASKS, largest_family, levels
from sparsekv.evaluation.comparison.results import BOUND_COLUMNS, Results, load_results
from sparsekv.evaluation.comparison.roles import comparisons
from tests.cells import write_cell

TEXT = {"data": ("perplexity", None), "metrics": ("nll", "kl")}


def write_run(out: Path, full: dict, evicted: dict, **options) -> Path:
    """A run with the full cache and snapkv at 0.5."""
    write_cell(out, "no_press", 0.0, full, **options)
    write_cell(out, "snapkv", 0.5, evicted, **options)
    return out


def summarize(results: Results, base: Results | None = None, control: Results | None = None) -> pd.DataFrame:
    """The summary of each run of the results, compared with its base and control."""
    references = {role: [other] for role, other in (("base", base), ("control", control)) if other is not None}
    analyses = [analyze(runs) for runs in comparisons([results], references)]
    return pd.concat([each.summary[each.summary.run == each.role] for each in analyses], ignore_index=True)


def row(summary: pd.DataFrame, press: str = "snapkv", task: str = ALL_TASKS, **where: object) -> pd.Series:
    """The one row of this press and task."""
    chosen = summary[(summary.press == press) & (summary.task == task)]
    for key, value in where.items():
        chosen = chosen[chosen[key] == value]
    assert len(chosen) == 1
    return chosen.iloc[0]


def test_every_task_counts_the_same_and_retention_is_the_ratio_of_the_averages(tmp_path: Path) -> None:
    full = {"vt": [100, 100, 80, 100], "qa": [50, 70]}
    summary = summarize(load_results(write_run(tmp_path, full, {"vt": [100, 0, 40, 100], "qa": [30, 30]})))
    vt, both = row(summary, task="vt"), row(summary)
    assert (vt.n, vt.score, vt.retention) == (4, 60.0, pytest.approx(60 / 95))
    assert (both.n, both.score, both.retention) == (6, 45.0, pytest.approx(45 / 77.5))
    assert both.ci_low < 45.0 < both.ci_high
    assert both.retention_low < both.retention < both.retention_high
    whole = row(summary, "no_press")
    assert whole.retention == 1.0
    assert (whole.model, whole.adapter, whole.seed, whole.commit) == ("tiny", "", "0", "abc1234")
    assert set(summary.columns) >= {"benchmark", "data_dir", "metric", "compression_ratio", "reason"}


def test_generations_are_averaged_before_rows(tmp_path: Path) -> None:
    write_cell(tmp_path, "no_press", 0.0, {"aime": [[100, 0, 0, 0], [100, 100, 100, 100]]})
    summary = summarize(load_results(tmp_path))
    found = row(summary, "no_press", "aime")
    assert (found.n, found.score) == (2, 62.5)
    assert (found.ci_low, found.ci_high) == (25.0, 100.0)  # two rows are drawn, not eight answers


def test_full_cache_that_scores_nothing_has_no_retention(tmp_path: Path) -> None:
    summary = summarize(load_results(write_run(tmp_path, {"qa": [0, 0]}, {"qa": [0, 50]})))
    assert row(summary).score == 25.0
    assert summary[["retention", "retention_low", "retention_high"]].isna().all(axis=None)


@pytest.mark.parametrize("scores", [[70], [70, 70, 70]])
def test_one_row_or_equal_scores_have_no_interval(tmp_path: Path, scores: list[int]) -> None:
    write_run(tmp_path / "a", {"qa": scores}, {"qa": scores})
    results = load_results(tmp_path / "a")
    found = row(summarize(results, results))
    assert (found.score, found.retention, found.diff_base, found.p_base) == (70.0, 1.0, 0.0, 1.0)
    names = ["ci_low", "ci_high", "retention_low", "retention_high", "diff_base_low", "diff_base_high"]
    assert found[names].isna().all()


def test_perplexity_is_retained_and_kl_is_not(tmp_path: Path) -> None:
    full = {"text": [{"nll": 2.0, "kl": 0.1}, {"nll": 3.0, "kl": 0.1}]}
    evicted = {"text": [{"nll": 2.5, "kl": 0.4}, {"nll": 3.1, "kl": 0.2}]}
    write_run(tmp_path / "base", full, evicted, **TEXT)
    better = {"text": [{"nll": 2.2, "kl": 0.1}, {"nll": 3.0, "kl": 0.3}]}
    write_run(tmp_path / "trained", full, better, adapter="a", **TEXT)
    results, base = load_results(tmp_path / "trained"), load_results(tmp_path / "base")
    summary = summarize(results, base)
    nll, kl = row(summary, metric="nll"), row(summary, metric="kl")
    assert nll.retention == pytest.approx(math.exp(2.5) / math.exp(2.6))  # perplexities: full / evicted
    assert nll.diff_base == pytest.approx(-0.2)
    assert (nll.headline, kl.headline, nll.lower_is_better) == (True, False, True)
    assert math.isnan(kl.retention)
    assert kl.score == pytest.approx(0.2)


def test_less_is_better_for_nats(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    nats = rng.normal(3.0, 0.3, 30)
    for name, lost in (("base", 0.6), ("trained", 0.15)):
        full, evicted = ({"text": [{"nll": x} for x in nats + more]} for more in (0, lost + rng.normal(0, 0.01, 30)))
        write_run(tmp_path / name, full, evicted, adapter=None if name == "base" else name, **TEXT)
    compare([str(tmp_path / "base"), str(tmp_path / "trained")], str(tmp_path))
    assert row(pd.read_csv(tmp_path / "compare.csv"), run="trained").verdict_base == "better"
    assert "| 75% [" in (tmp_path / "compare.md").read_text()


def three_runs(out: Path, rows: int = 60) -> list[str]:
    """Base loses half, control the same and some of its full cache, trained loses a quarter."""
    rng = np.random.default_rng(0)
    for name, full, kept in (("base", 80, 40), ("control", 70, 40), ("trained", 80, 60)):
        for press, share, level in (("no_press", 0.0, full), ("snapkv", 0.5, kept), ("knorm", 0.5, 40)):
            scores = {task: (level + rng.normal(0, 5, rows)).tolist() for task in ("vt", "qa")}
            write_cell(out / name, press, share, scores, adapter=None if name == "base" else name)
    return [str(out / name) for name in ("base", "control", "trained")]


def test_paired_differences_and_verdicts(tmp_path: Path) -> None:
    base, control, trained = map(load_results, three_runs(tmp_path))
    summary = summarize(trained, base, control)
    snapkv, knorm = row(summary), row(summary, "knorm")
    assert snapkv.diff_base == pytest.approx(row(summary).score - row(summarize(base)).score)
    assert snapkv.diff_base_low < 20 < snapkv.diff_base_high
    assert (snapkv.verdict_base, snapkv.verdict_control) == ("better", "better")
    assert (knorm.verdict_base, knorm.verdict_control) == ("no difference", "no difference")
    assert row(summary, "no_press").verdict_control == "better"
    regression = row(summarize(control, base), "no_press")
    assert regression.verdict_base == "worse"
    assert regression.diff_base_high < 0
    assert (row(summarize(base, trained)).verdict_base, row(summarize(base, trained)).adapter) == ("worse", "")


def test_holm_counts_the_cells_of_the_comparison(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    full, evicted = rng.normal(80, 9, 40), rng.normal(40, 9, 40)
    write_run(tmp_path / "one" / "base", {"qa": full}, {"qa": evicted})
    write_run(tmp_path / "one" / "trained", {"qa": full}, {"qa": evicted + rng.normal(3, 9, 40)}, adapter="a")
    one = [load_results(tmp_path / "one" / name) for name in ("trained", "base")]
    before = row(summarize(*one)).p_base
    for index in range(8):
        for name, adapter in (("base", None), ("trained", "a")):
            write_cell(tmp_path / "one" / name, f"press{index}", 0.5, {"qa": full}, adapter=adapter)
    many = [load_results(tmp_path / "one" / name) for name in ("trained", "base")]
    assert before < 0.09
    assert row(summarize(*many)).p_base == pytest.approx(min(1.0, before / 2 * 10))  # of 2 cells before, of 10 now


def test_flips_grow_with_the_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SMALLEST", 1e-4)
    runs = three_runs(tmp_path)
    assert largest_family({name: load_results(tmp_path / name) for name in ("base", "control", "trained")}) == 6
    compare(runs, str(tmp_path / "out"))
    summary = pd.read_csv(tmp_path / "out" / "compare.csv")
    assert summary[summary.task != ALL_TASKS].p_control.min() == pytest.approx(6 / 60_000)
    assert "permutation test (59,999 flips)" in (tmp_path / "out" / "compare.md").read_text()


def of_contexts(out: Path, contexts: list[int], tasks: int = 1) -> pd.DataFrame:
    """Base and trained, each row's score of the full cache and of snapkv, the same in every task."""
    rng = np.random.default_rng(4)
    for name, gain in (("base", 0), ("trained", 8)):
        scores = [50 + gain + rng.normal(0, 9, 24) for _ in range(2)]
        full, evicted = ({f"t{task}": each.tolist() for task in range(tasks)} for each in scores)
        write_run(out / name, full, evicted, adapter=None if name == "base" else name, contexts=contexts)
    return summarize(*(load_results(out / name) for name in ("trained", "base")))


def test_rows_of_one_context_are_drawn_together(tmp_path: Path) -> None:
    unknown = of_contexts(tmp_path / "unknown", [])
    own = of_contexts(tmp_path / "own", list(range(24)))
    pd.testing.assert_frame_equal(own, unknown, check_exact=True)
    shared = of_contexts(tmp_path / "shared", [number // 6 for number in range(24)])
    same = ["n", "score", "retention", "diff_base", "diff_base_min"]
    pd.testing.assert_frame_equal(shared[same], own[same])
    assert row(own).p_base < 0.1
    assert row(shared).p_base >= 2 / 2**4  # all signs of four contexts alike
    for name in ("ci", "retention", "diff_base"):
        assert (shared[f"{name}_low"] != own[f"{name}_low"]).any(), name


def test_a_context_of_several_tasks_is_drawn_for_all_of_them(tmp_path: Path) -> None:
    names = ["ci_low", "ci_high", "retention_low", "retention_high", "diff_base_low", "diff_base_high"]
    summary = of_contexts(tmp_path / "shared", [*range(24)] * 2, tasks=2)
    one, both = (summary[summary.task == task][names].reset_index(drop=True) for task in ("t0", ALL_TASKS))
    pd.testing.assert_frame_equal(one, both)  # the second task adds nothing
    assert row(summary).p_base == pytest.approx(row(summary, task="t0").p_base / 2)  # of 2 cells, not of 4
    apart = row(of_contexts(tmp_path / "apart", [*range(48)], tasks=2))
    assert apart.ci_high - apart.ci_low < 0.9 * (both.ci_high - both.ci_low).min()


def test_cells_of_before_contexts_were_numbered_go_by_the_others(tmp_path: Path) -> None:
    contexts = [number // 6 for number in range(24)]
    before = of_contexts(tmp_path, contexts)
    (file,) = (tmp_path / "base").glob("*no_press*/predictions.csv")
    pd.read_csv(file).drop(columns="context").to_csv(file, index=False)
    after = summarize(*(load_results(tmp_path / name) for name in ("trained", "base")))
    pd.testing.assert_frame_equal(after, before)


def test_gap_closed_is_the_share_of_what_base_lost(tmp_path: Path) -> None:
    base, control, trained = three_runs(tmp_path)
    compare([base, control, trained], str(tmp_path / "out"))
    score = {name: summarize(load_results(tmp_path / name)) for name in ("base", "control", "trained")}

    def mean(name: str, press: str) -> float:
        return row(score[name], press).score

    gained = sum(mean("trained", press) - mean("base", press) for press in ("snapkv", "knorm"))
    gap = sum(mean("base", "no_press") - mean("base", press) for press in ("snapkv", "knorm"))
    kept = np.mean([mean("trained", press) / mean("trained", "no_press") for press in ("snapkv", "knorm")])
    lines = [line.strip("| ").split(" | ") for line in (tmp_path / "out" / "compare.md").read_text().splitlines()]
    figures = {line[0]: line[-1] for line in lines[::-1]}  # the headline comes first
    assert "## Headline of ruler-local 4096: string_match (n = 120)" in figures
    assert figures["full cache"].startswith(f"{mean('trained', 'no_press'):.1f} [")
    assert figures["share of base's gap closed"].startswith(f"{gained / gap:.0%} [")
    assert figures["mean retention of evicted cells (2)"].startswith(f"{kept:.1%} [")
    assert figures["evicted cells against base"] == figures["evicted cells against control"] == "▲ 1 ▼ 0 = 1"
    assert figures["full cache − control"].startswith("▲ +")


def test_no_gap_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "trained"):
        write_run(tmp_path / name, {"qa": [10, 20]}, {"qa": [20, 30]}, adapter=None if name == "base" else name)
    compare([str(tmp_path / "base"), str(tmp_path / "trained")], str(tmp_path / "out"))
    assert "no gap to close" in (tmp_path / "out" / "compare.md").read_text()
    assert not (tmp_path / "trained" / "compare.md").exists()
    assert "full cache" in capsys.readouterr().out


def test_full_cache_regression_shows_where_retention_rises(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", {"qa": [90.0, 85, 95] * 10}, {"qa": [40.0, 45, 35] * 10})
    trained = write_run(tmp_path / "t", {"qa": [50.0, 44, 57] * 10}, {"qa": [40.0, 45, 35] * 10}, adapter="t")
    compare([str(base), str(trained)], str(tmp_path))
    text = (tmp_path / "compare.md").read_text()
    table = pd.read_csv(tmp_path / "compare.csv")
    assert row(table, run="trained").retention > row(table, run="base").retention
    assert "| 50.3 [" in text
    assert "| ▼ -39.7 [" in text


def test_what_is_unpaired_is_refused(tmp_path: Path) -> None:
    base = load_results(write_run(tmp_path / "base", {"qa": [1, 2]}, {"qa": [1, 2]}))
    other = load_results(write_run(tmp_path / "g", {"qa": [1, 2]}, {"qa": [1, 2]}, benchmark_fingerprint="g"))
    with pytest.raises(UserError, match=r"g/ruler-local.*benchmark_fingerprint is g, but f"):
        summarize(other, base)
    short = load_results(write_run(tmp_path / "short", {"qa": [1]}, {"qa": [1]}))
    with pytest.raises(UserError, match="lacks 1 of the 2 rows"):
        summarize(short, base)


def test_compare_refuses_what_it_cannot_compare(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", {"qa": [1, 2]}, {"qa": [1, 2]})
    elsewhere = write_run(tmp_path / "else", {"qa": [1, 2]}, {"qa": [1, 2]}, data=("loogle", None))
    with pytest.raises(UserError, match="1 folders given"):
        compare([str(base)])
    with pytest.raises(UserError, match="no finished cell in common"):
        compare([str(base), str(elsewhere)])
    with pytest.raises(UserError, match="no cell folder"):
        compare([str(base), str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="names no folder before or after a comma"):
        compare([str(base), f"{base},"])
    with pytest.raises(UserError, match=f"^compare: {base} stands for two runs; give each its own folder$"):
        compare([str(elsewhere), str(base), f"{tmp_path}/else/../base"])
    with pytest.raises(UserError, match="the first has an adapter and the last none; base first"):
        compare([str(write_run(tmp_path / "run", {"qa": [1, 2]}, {"qa": [1, 2]}, adapter="a")), str(base)])


def test_an_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = three_runs(tmp_path, rows=3)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"^--output {tmp_path / 'file'}: .* is a file; name a folder"):
        compare(folders, str(tmp_path / "file"))
    assert not capsys.readouterr().out, "no tables before it is known"


def test_each_run_is_compared_with_the_same_model(tmp_path: Path) -> None:
    for model, level in (("small", 10), ("large", 20)):
        write_run(tmp_path / "base", {"qa": [90, 80]}, {"qa": [level, level]}, model=model)
        write_run(tmp_path / "trained", {"qa": [90, 80]}, {"qa": [50, 50]}, model=model, adapter="a")
    results, base = load_results(tmp_path / "trained"), load_results(tmp_path / "base")
    summary = summarize(results, base)
    assert row(summary, model="small").diff_base == 40
    assert row(summary, model="large").diff_base == 30
    with pytest.raises(UserError, match=r"holds several runs \(large; small\)"):
        summarize(load_results(write_run(tmp_path / "x", {"qa": [1, 2]}, {"qa": [1, 2]}, model="merged")), base)


def test_context_lengths_stay_apart_and_parts_that_are_tasks_are_averaged(tmp_path: Path) -> None:
    for length, task, score in ((4096, "vt", 80), (8192, "qa", 60)):
        write_cell(tmp_path, "no_press", 0.0, {task: [score, score]}, data=("ruler", length))
    for task, metric, score in (("hotpotqa", "f1", 50), ("qmsum", "rouge", 20)):
        write_cell(tmp_path, "no_press", 0.0, {task: [score, score]}, data=("longbench", task), metrics=[metric])
    write_cell(tmp_path, "tova", 0.5, {"hotpotqa": [10, 10]}, data=("longbench", "hotpotqa"), metrics=["f1"])
    average = summarize(load_results(tmp_path)).query("task == @ALL_TASKS").set_index(["benchmark", "data_dir"])
    assert average.loc[("ruler", "4096")].score == 80
    assert average.loc[("ruler", "8192")].score == 60
    longbench = average.loc[("longbench", "")]  # tova lacks a task: it has no average
    assert (longbench.press, longbench.score, longbench.metric) == ("no_press", 35, "f1, rouge")


def test_average_is_over_the_tasks_that_both_runs_have(tmp_path: Path) -> None:
    for name, tasks in (("base", ("hotpotqa", "qmsum", "trec")), ("trained", ("hotpotqa", "qmsum"))):
        for index, task in enumerate(tasks):
            adapter = None if name == "base" else name
            write_cell(tmp_path / name, "no_press", 0.0, {task: [index, index]}, data=("lb", task), adapter=adapter)
    runs = {name: load_results(tmp_path / name) for name in ("base", "trained")}
    [average] = [level for level in levels(runs) if level.task == ALL_TASKS]
    assert average.n == 4
    assert average.means.value.tolist() == [0.5, 0.5]


def test_figures_of_a_task_do_not_depend_on_what_else_is_there(tmp_path: Path) -> None:
    scores = {"qa": [1, 5, 9, 2, 7]}
    write_run(tmp_path, scores, scores)
    before = row(summarize(load_results(tmp_path)), task="qa")
    write_cell(tmp_path, "adakv", 0.5, {"qa": [3, 3, 4, 5, 9]})
    write_run(tmp_path, {"a": [4, 2]}, {"a": [4, 1]}, data=("another", None))
    pd.testing.assert_series_equal(row(summarize(load_results(tmp_path)), task="qa"), before, check_names=False)


def test_summary_files(tmp_path: Path) -> None:
    write_run(tmp_path, {"vt": [90, 80, 85], "qa": [50, 40, 70]}, {"vt": [60, 70, 50], "qa": [20, 0, 10]})
    folder = write_cell(tmp_path, "duo", 0.5, {"vt": [1], "qa": [1]})
    (folder / "profile.json").unlink()
    (folder / "unavailable.json").write_text('{"reason": "no | pattern"}')
    write_summary(tmp_path)
    table, parquet = pd.read_csv(tmp_path / "summary.csv"), pd.read_parquet(tmp_path / "summary.parquet")
    assert len(table) == len(parquet) == 2 * 3 + 1
    assert row(table, "duo").reason == "no | pattern"
    assert math.isnan(row(parquet, "duo").score)
    assert "diff_base" not in table
    text = (tmp_path / "summary.md").read_text()
    assert "- run: tiny, no adapter; seed 0; commit abc1234" in text
    assert "| full cache | 69.2 [" in text
    assert "vt (n = 3)" in text
    assert "no \\| pattern" in text
    assert "bootstrap interval" in text
    first = {name: (tmp_path / name).read_bytes() for name in ("summary.csv", "summary.md")}
    write_summary(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in first} == first
    assert not list(tmp_path.glob(".summary*"))


def test_summary_compares_a_trained_run_with_its_own_base(tmp_path: Path) -> None:
    write_run(tmp_path / "base", {"qa": [90, 80]}, {"qa": [10, 20]})
    write_run(tmp_path / "trained", {"qa": [90, 80]}, {"qa": [40, 50]}, adapter="a")
    write_summary(tmp_path)
    table = pd.read_csv(tmp_path / "summary.csv", keep_default_na=False, na_values=[""]).fillna({"adapter": ""})
    assert row(table, adapter="a").diff_base == 30
    assert math.isnan(row(table, adapter="").diff_base)


def test_summary_without_any_finished_cell(tmp_path: Path) -> None:
    (write_cell(tmp_path, "tova", 0.5, {"qa": [1]}) / "metrics.json").unlink()
    write_summary(tmp_path)
    assert pd.read_csv(tmp_path / "summary.csv").reason.tolist() == ["not finished"]
    assert "tova, 50%" in (tmp_path / "summary.md").read_text()


# ---- several trainings of a role ----


def write_seeds(out: Path, role: str, scores: np.ndarray, adapter: bool = True, **options: object) -> str:
    """A run of the full cache and snapkv for each seed; scores are [seeds, cells, rows]. Returns their folders."""
    folders = []
    for seed, (full, evicted) in enumerate(scores.tolist()):
        name = f"{role}-{seed}"
        weights = {"adapter": name, "adapter_fingerprint": name} if adapter else {}
        halves = [{"vt": cell[::2], "qa": cell[1::2]} for cell in (full, evicted)]
        folders.append(str(write_run(out / name, *halves, **weights, **options)))
    return ",".join(folders)


def written(folders: list[str], out: Path) -> pd.DataFrame:
    compare(folders, str(out))
    return pd.read_csv(out / "compare.csv")


def test_several_trainings_are_one_run_of_their_means(tmp_path: Path) -> None:
    """Every figure but those about single trainings is that of a run whose scores are the means."""
    rng = np.random.default_rng(3)
    scores = {role: rng.normal(60, 20, (seeds, 2, 40)) for role, seeds in (("control", 3), ("trained", 3))}
    base = write_seeds(tmp_path, "base", rng.normal(50, 20, (1, 2, 40)), adapter=False)
    several = [base, *(write_seeds(tmp_path, role, values) for role, values in scores.items())]
    single = [base, *(write_seeds(tmp_path / "m", r, v.mean(axis=0, keepdims=True)) for r, v in scores.items())]
    found, wanted = written(several, tmp_path / "several"), written(single, tmp_path / "single")
    own = ["adapter", "seeds", *(f"{name}_{other}{end}" for other in ("base", "control") for name, end in OWN)]
    pd.testing.assert_frame_equal(found.drop(columns=own), wanted.drop(columns=own), rtol=1e-5)
    assert found.groupby("run").seeds.unique().map(list).to_dict() == {"base": [1], "control": [3], "trained": [3]}
    singles = scores["trained"].mean(axis=2)[:, 1] - scores["control"].mean(axis=2)[:, 1]  # tasks of as many rows
    cell = row(found, run="trained")
    assert (cell.diff_control_min, cell.diff_control_max) == pytest.approx((singles.min(), singles.max()), rel=1e-5)
    assert cell.diff_control == pytest.approx(singles.mean(), rel=1e-4)
    alone = row(wanted, run="trained")
    assert alone.diff_control_min == alone.diff_control == alone.diff_control_max
    text = (tmp_path / "several" / "compare.md").read_text()
    assert "- trained: tiny with adapter trained-0, trained-1, trained-2; mean of 3 trainings; seed 0" in text
    assert f"| {singles.min():+.1f} … {singles.max():+.1f} |" in text
    assert "single trainings" not in (tmp_path / "single" / "compare.md").read_text()


OWN = [("diff", "_min"), ("diff", "_max"), ("verdict", "")]


@pytest.mark.parametrize(
    ("gains", "verdict"), [((30, 30, 1), "better"), ((30, 30, -1), "no difference"), ((-30, -30, 1), "worse")]
)
def test_better_in_every_training(tmp_path: Path, gains: tuple[int, ...], verdict: str) -> None:
    noise = np.random.default_rng(4).normal(0, 1, (3, 2, 40))
    base = write_seeds(tmp_path, "base", noise[:1] + 50, adapter=False)
    control = write_seeds(tmp_path, "control", noise + 50)
    trained = write_seeds(tmp_path, "trained", noise + 50 + np.reshape(gains, (3, 1, 1)))
    found = written([base, control, trained], tmp_path / "out")
    cell = row(found, run="trained")
    assert (cell.p_control < 0.001, cell.verdict_control) == (True, verdict)
    assert (cell.diff_control_min, cell.diff_control_max) == pytest.approx((min(gains), max(gains)), abs=1e-4)


def test_worse_in_every_training(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    base = write_seeds(tmp_path, "base", rng.normal(50, 1, (1, 2, 40)), adapter=False)
    trained = write_seeds(tmp_path, "trained", rng.normal(40, 1, (2, 2, 40)))
    assert row(written([base, trained], tmp_path / "out"), run="trained").verdict_base == "worse"


def test_trainings_that_do_not_belong_together(tmp_path: Path) -> None:
    scores = np.full((3, 2, 4), 50.0)
    base = write_seeds(tmp_path, "base", scores[:1], adapter=False)
    control, trained = write_seeds(tmp_path, "control", scores[:2]), write_seeds(tmp_path, "trained", scores)
    with pytest.raises(UserError, match="control: 2 seeds, trained: 3; give as many of both, or one control"):
        compare([base, control, trained])
    first, second, third = trained.split(",")
    with pytest.raises(UserError, match=rf"trained: {first} and {first} hold the same weights"):
        compare([base, ",".join([first, second, first])])
    plain = write_seeds(tmp_path / "plain", "base", scores[:1], adapter=False)
    with pytest.raises(UserError, match=rf"^trained: {first} has an adapter and {plain} has none; only trainings of"):
        compare([base, ",".join([plain, first])])
    write_cell(Path(third), "knorm", 0.5, {"vt": [1], "qa": [1]}, adapter="trained-2", adapter_fingerprint="trained-2")
    with pytest.raises(UserError, match=rf"knorm 0.5 has scores in {third}, but not in {first}"):
        compare([base, trained])
    other = write_seeds(tmp_path / "other", "trained", scores[:2], benchmark_fingerprint="g").split(",")[1]
    with pytest.raises(UserError, match="benchmark_fingerprint is g, but f"):
        compare([base, f"{first},{other}"])


# ---- bounds ----


def write_bounds(out: Path, **changes: object) -> None:
    common = {"benchmark": "ruler-local", "data_dir": "4096", "model": "tiny", "benchmark_fingerprint": "f"}
    common |= {"fingerprint": "h", "press": "snapkv", "compression_ratio": 0.5, "n": 20}
    rows = [common | {"task": "vt", "bound": 30.0} | changes, common | {"task": "qa", "bound": 50.0} | changes]
    (out / "bounds").mkdir()
    pd.DataFrame(rows)[BOUND_COLUMNS].to_csv(out / "bounds" / "x.csv", index=False)


def test_bounds_stand_beside_their_cells(tmp_path: Path) -> None:
    folders = [write_seeds(tmp_path, "base", np.full((1, 2, 4), 5.0), adapter=False)]
    folders.append(write_seeds(tmp_path, "trained", np.full((1, 2, 4), 6.0)))
    write_bounds(tmp_path / "base-0")
    found = written(folders, tmp_path / "out")
    assert row(found, run="trained", task="vt").bound == 30
    assert row(found, run="trained").bound == row(found, run="base").bound == 40
    assert found[found.press == "no_press"].bound.isna().all()
    assert "| bound |" in (tmp_path / "out" / "compare.md").read_text()


@pytest.mark.parametrize("other", [{"benchmark_fingerprint": "g"}, {"data_dir": "8192"}, {"compression_ratio": 0.3}])
def test_bounds_of_other_rows_or_cells_do_not_count(tmp_path: Path, other: dict) -> None:
    write_seeds(tmp_path, "base", np.full((1, 2, 4), 5.0), adapter=False)
    write_bounds(tmp_path / "base-0", **other)
    assert summarize(load_results(tmp_path / "base-0")).bound.isna().all()


def test_corrupt_bounds_are_named(tmp_path: Path) -> None:
    write_seeds(tmp_path, "base", np.full((1, 2, 4), 5.0), adapter=False)
    write_bounds(tmp_path / "base-0", bound="many")
    with pytest.raises(UserError, match=r"bounds/x.csv: corrupt .*; delete .* run the same `sparsekv eval` again"):
        load_results(tmp_path / "base-0")
    file = tmp_path / "base-0" / "bounds" / "x.csv"
    file.write_text("task,n\n")
    with pytest.raises(UserError, match=r"corrupt \(no column benchmark, data_dir, model, .*, bound\); delete"):
        load_results(tmp_path / "base-0")
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=rf"^{file}: it cannot be read \(Is a directory\)$"):
        load_results(tmp_path / "base-0")


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (-0.0003, "{:.3f}", "0.000"),
        (-0.0003, "{:+.3f}", "+0.000"),
        (-0.0004, "{:.1%}", "0.0%"),
        (-0.5, "{:+.1f}", "-0.5"),
    ],
)
def test_a_zero_has_no_minus(value, form, text):
    assert tables.figure_text({"x": value}, "x", form) == text
    interval = tables.figure_text({"x": 1.0, "x_low": value, "x_high": 2.0}, "x", form)
    assert interval == f"{form.format(1.0)} [{text}, {form.format(2.0)}]"
