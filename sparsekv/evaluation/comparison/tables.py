"""The figures of `compare` as tables: the same for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from sparsekv.evaluation.comparison.levels import ALL_TASKS
from sparsekv.evaluation.comparison.results import NO_PRESS
from sparsekv.evaluation.comparison.statistics import CONFIDENCE, DRAWS

if TYPE_CHECKING:
    from sparsekv.evaluation.comparison.compare import Analysis

SYMBOLS = {"better": "▲", "worse": "▼", "no difference": "="}
STYLES = {"▲": "bold blue", "▼": "bold yellow"}  # told apart by shape, and by colour with any colour vision
NONE = "–"
NOTES = f"""\
Score [low, high]: mean over rows (generations of a row are averaged first) with its {CONFIDENCE:.0%} percentile \
bootstrap interval ({DRAWS:,} draws of rows, those of one context together, tasks drawn apart, fixed seed); no \
interval where all rows are equal.
{ALL_TASKS}: every task counts the same.
Retention: score / full-cache score of the same run and rows; for nll, perplexity of the full cache / of the evicted \
one; {NONE} where the full cache scores 0.
Of several trainings, a score is the mean over them, an interval is over rows, and ▲ needs every training to be \
better.
Bound: the score that a press which goes by position alone reaches by copying the answers that it keeps.
Gap closed: Σ (run − base) / Σ (base with the full cache − base) over the evicted cells.
▲ better, ▼ worse, = no difference: p below 0.05, two-sided paired sign-flip permutation test ({{flips}} flips), \
Holm-adjusted over the cells of a run."""


@dataclass(frozen=True)
class Table:
    """Cells of text under a header."""

    title: str
    header: list[str]
    rows: list[list[str]]


def markdown(title: str, analyses: Sequence[Analysis]) -> str:
    """A document that can be read on its own."""
    parts = [f"# {title}"]
    for analysis in analyses:
        parts += ["\n".join(f"- {line}" for line in describe(analysis))]
        for table in report(analysis):
            parts += [f"## {table.title}", markdown_table(table.header, table.rows)]
    return "\n\n".join([*parts, notes(analyses).replace("\n", "\n\n")]) + "\n"


def notes(analyses: Sequence[Analysis]) -> str:
    """What the figures are."""
    return NOTES.format(flips=" or ".join(f"{flips:,}" for flips in sorted({analysis.flips for analysis in analyses})))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its cells as they are."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def show(analyses: Sequence[Analysis], console: Console) -> None:
    """Print the same to a terminal."""
    for analysis in analyses:
        for line in describe(analysis):
            console.print(line, markup=False, highlight=False)
        for table in report(analysis):
            shown = RichTable(title=Text(table.title), title_justify="left")
            for name in table.header:
                shown.add_column(name, overflow="fold")
            for row in table.rows:
                shown.add_row(*(Text(cell, style=STYLES.get(cell[:1], "")) for cell in row))
            console.print(shown)
    console.print(notes(analyses), markup=False, highlight=False)


def describe(analysis: Analysis) -> list[str]:
    """One line for each run: what it is and where its figures come from."""
    lines = []
    for run, table in analysis.summary.groupby("run"):
        first = table.iloc[0]
        adapter = f" with adapter {first.adapter}" if first.adapter else ", no adapter"
        trained = f"; mean of {first.seeds:.0f} trainings" if first.seeds > 1 else ""
        lines.append(f"{run}: {first.model}{adapter}{trained}; seed {first.seed}; commit {first.commit or 'unknown'}")
    return lines


def report(analysis: Analysis) -> Iterator[Table]:
    """The headline, every benchmark's cells and tasks, and the cells that have no score."""
    yield from headlines(analysis).values()
    summary, role = analysis.summary, analysis.role
    scored, unscored = summary[summary.reason == ""], summary[summary.reason != ""]
    averages, tasks = scored[scored.task == ALL_TASKS], scored[scored.task != ALL_TASKS]
    for _, table in averages.groupby(["benchmark", "data_dir", "metric"], sort=False):
        yield _cells(table, role)
    tasks = tasks[tasks.headline & (tasks.run == role)]
    suite = tasks.data_dir.where(tasks.data_dir.isin(averages.data_dir), "")  # see `levels`
    for (benchmark, within), table in tasks.groupby(["benchmark", suite]):
        if table.groupby(["data_dir", "task"]).ngroups > 1:
            yield _tasks(" ".join(filter(None, [f"Single tasks of {role}:", benchmark, within])), table)
    if not unscored.empty:
        rows = [[row["run"], benchmark_name(row), cell_name(row), row["reason"]] for row in unscored.to_dict("records")]
        yield Table("Cells without a score", ["run", "benchmark", "press, evicted", "why"], rows)


def headlines(analysis: Analysis) -> dict[tuple[str, str], Table]:
    """(benchmark, data_dir) → a table with a column for each run."""
    summary, headline = analysis.summary, analysis.headline
    if headline.empty:
        return {}
    averages = summary[(summary.reason == "") & (summary.task == ALL_TASKS)]
    overall = headline[(headline.task == ALL_TASKS) & headline.headline]
    return {place: _headline(runs, averages) for place, runs in overall.groupby(["benchmark", "data_dir"])}


def _headline(runs: pd.DataFrame, averages: pd.DataFrame) -> Table:
    """A column for each run; its full cache comes first, so that retention cannot hide what it lost."""
    first = runs.iloc[0]
    others = [role for role in ("base", "control") if f"better_{role}" in runs and runs[f"better_{role}"].notna().any()]
    same = averages[["benchmark", "data_dir", "metric"]].eq(first[["benchmark", "data_dir", "metric"]]).all(axis=1)
    full = averages[same & (averages.press == NO_PRESS)].set_index("run").to_dict("index")
    names = ["full cache", f"mean retention of evicted cells ({first.cells})"]
    names += [name for role in others for name in (f"full cache − {role}", f"evicted cells against {role}")]
    names += ["share of base's gap closed"] if others else []
    columns = []
    for run in runs.to_dict("records"):
        figures = [figure_text(run, "full", score_form(run)), figure_text(run, "retention", "{:.1%}")]
        for role in others:
            figures += [difference_text(full.get(run["run"], {}), role), _counted(run, role)]
        figures += [run["note"] or figure_text(run, "gap_closed", "{:.0%}")] if others else []
        columns.append(figures)
    title = f"Headline of {benchmark_name(first)}: {first.metric} (n = {first.n})"
    return Table(title, ["", *runs.run], [list(row) for row in zip(names, *columns, strict=True)])


def _counted(row: Mapping[str, Any], role: str) -> str:
    """`▲ 3 ▼ 0 = 9`."""
    counts = [row[f"{name}_{role}"] for name in ("better", "worse", "same")]
    if pd.isna(counts[0]):
        return NONE
    return " ".join(f"{symbol} {count:.0f}" for symbol, count in zip(SYMBOLS.values(), counts, strict=True))


def _cells(table: pd.DataFrame, role: str) -> Table:
    """A row for each press and ratio: score and retention of each run, and how the last differs from the others."""
    first, roles = table.iloc[0], sorted(table.run.unique())
    others = [other for other in roles if f"p_{other}" in table and other != role]
    header = ["press, evicted", *(f"{run}: score, retention" for run in roles)]
    single = ["single trainings"] if table.seeds.max() > 1 else []
    header += [name for other in others for name in (f"{role} − {other}", *single, "p")]
    bounded = table.bound.notna().any()
    header += ["bound"] if bounded else []
    rows = []
    for _, group in table.groupby([table.press != NO_PRESS, "press", "compression_ratio"]):
        runs = {row["run"]: row for row in group.to_dict("records")}
        scores = [_score(runs[run], alone=len(roles) == 1) if run in runs else NONE for run in roles]
        line = [cell_name(group.iloc[0]), *scores]
        for other in others:
            row = runs.get(role, {})
            line += [difference_text(row, other), *(trainings_text(row, other) for _ in single), p_text(row, other)]
        if bounded:
            line.append(figure_text(group.iloc[0], "bound", score_form(first)))
        rows.append(line)
    less = ", lower is better" if first.lower_is_better else ""
    return Table(f"{benchmark_name(first)}, {first.task}: {first.metric}{less} (n = {first.n})", header, rows)


def _tasks(title: str, table: pd.DataFrame) -> Table:
    """A row for each press and ratio, a column for each task."""
    table = table.assign(column=task_names(table))
    sizes = table.groupby("column", sort=False).n.first()
    rows = []
    for _, group in table.groupby([table.press != NO_PRESS, "press", "compression_ratio"]):
        found = {row["column"]: score_form(row).format(row["score"]) for row in group.to_dict("records")}
        rows.append([cell_name(group.iloc[0]), *(found.get(name, NONE) for name in sizes.index)])
    return Table(title, ["press, evicted", *(f"{name} (n = {n})" for name, n in sizes.items())], rows)


def task_names(table: pd.DataFrame) -> pd.Series:
    """For each row the name of its task within the benchmark: with the data_dir where that tells tasks apart."""
    alone = (table.data_dir == table.task) | (table.groupby("task").data_dir.transform("nunique") == 1)
    return table.task.where(alone, table.data_dir + " " + table.task)


def benchmark_name(row: Mapping[str, Any]) -> str:
    """`ruler-local 4096`."""
    return " ".join(filter(None, [row["benchmark"], row["data_dir"]]))


def cell_name(row: Mapping[str, Any]) -> str:
    """`snapkv, 50%`; cells of different ratios never share a name."""
    return "full cache" if row["press"] == NO_PRESS else f"{row['press']}, {100 * row['compression_ratio']:.10g}%"


def score_form(row: Mapping[str, Any], sign: str = "") -> str:
    """How a score is written: percent with one decimal, nats with three."""
    return f"{{:{sign}.3f}}" if row["lower_is_better"] else f"{{:{sign}.1f}}"


def _score(row: Mapping[str, Any], alone: bool) -> str:
    """`62.1 [50.0, 73.0], 81.0% [71.6%, 88.0%]` of a run that stands alone; beside others, without the intervals."""
    shown = row if alone else {"score": row["score"], "retention": row["retention"]}
    return f"{figure_text(shown, 'score', score_form(row), 'ci')}, {figure_text(shown, 'retention', '{:.1%}')}"


def difference_text(row: Mapping[str, Any], role: str) -> str:
    """`▲ +2.1 [+0.3, +4.0]`."""
    if pd.isna(row.get(f"diff_{role}")):
        return NONE
    return f"{SYMBOLS[row[f'verdict_{role}']]} {figure_text(row, f'diff_{role}', score_form(row, '+'))}"


def trainings_text(row: Mapping[str, Any], role: str) -> str:
    """`+1.2 … +3.0`: the smallest and the largest difference of a single training."""
    if pd.isna(row.get(f"diff_{role}_min")):
        return NONE
    form = score_form(row, "+")
    return " … ".join(form.format(row[f"diff_{role}_{end}"]) for end in ("min", "max"))


def p_text(row: Mapping[str, Any], role: str) -> str:
    p = row.get(f"p_{role}", np.nan)
    return NONE if pd.isna(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def figure_text(row: Mapping[str, Any], name: str, form: str, bounds: str = "") -> str:
    """A value with its interval, as far as they are known."""
    value, low, high = (row.get(key, np.nan) for key in (name, f"{bounds or name}_low", f"{bounds or name}_high"))
    if pd.isna(value):
        return NONE
    return _number(value, form) + ("" if pd.isna(low) else f" [{_number(low, form)}, {_number(high, form)}]")


def _number(value: float, form: str) -> str:
    """A zero has no minus."""
    text = form.format(value)
    return text if text.strip("-0.%") else form.format(0.0)
