#!/usr/bin/env python
"""Fill the marked blocks of docs/results.md, and one of README.md, from the files under results/.

results/README.md says what makes them.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from sparsekv.errors import UserError
from sparsekv.evaluation.comparison import tables
from sparsekv.evaluation.comparison.compare import ROLES
from sparsekv.evaluation.comparison.goals import goals, read_compare
from sparsekv.evaluation.comparison.levels import ALL_TASKS
from sparsekv.evaluation.comparison.results import CELL, NO_PRESS
from sparsekv.files import fill_block
from sparsekv.training.model_card import describe_data
from sparsekv.training.record import rows_of_a_step

VERDICTS = {None: "not measured", True: "met", False: "**missed**"}
SEEDS = "{0}-0,{0}-1,{0}-2"
# Recipe → commit of its configuration.
NOT_TAKEN = {"more-kl": "c6fb021", "three-kl": "98fdbb8", "recall-teacher": "4594306", "two-parts": "aeb0f40"}
COMMANDS = {  # experiment → what makes its compare.csv
    "headline": f"sparsekv compare out/eval/base {SEEDS.format('out/eval/control')} {SEEDS.format('out/eval/trained')} "
    "--output results/headline",
    "beyond": "sparsekv compare out/WHAT/base out/WHAT/control-0 out/WHAT/trained-0 --output results/beyond/WHAT",
    **{
        name: f"git worktree add ../{name} {commit} && cd ../{name} && PYTHONPATH=$PWD scripts/headline.sh"
        f"   # then copy: results/{name}/README.md"
        for name, commit in NOT_TAKEN.items()
    },
    "ablations": "scripts/short_runs.sh ablations",
}
# Of a training, beside its data and size.
LOSS = ("lambda_kl", "lambda_context", "lambda_ce_context", "lambda_selection")
OPTIONS = (*LOSS, "lr", "lora_r", "num_cuts")
RARE = ("teacher_adapter", "position_gap")  # of a few trainings; the second was an option for a time
LEGEND = (
    "[low, high]: 95% percentile bootstrap over rows. Difference: trained − control, paired by row; ▲ better, ▼ worse, "
    "= no difference (p below 0.05, sign-flip permutation test, Holm over the cells of the run; for ▲ also every "
    "training better)."
)


def main(results: Path, document: Path, readme: Path) -> None:
    """Fill every block; where an experiment's files are absent, say which command makes them."""
    headline = results / "headline" / "compare.csv"
    if headline.is_file():
        table = read_compare(headline)
        blocks = {"goals": goals_block(table), "headline": headline_block(table)}
        effect = effect_block(table)
    else:
        effect = absent(headline, "headline")
        blocks = dict.fromkeys(("goals", "headline"), effect)
    blocks["beyond"] = beyond_block(results / "beyond") or absent(results / "beyond", "beyond")
    for name in NOT_TAKEN:
        blocks[name] = not_taken_block(results / name) or absent(results / name, name)
    blocks["trainings"] = trainings_block(results) or absent(results / "headline" / "training", "headline")
    runs = {file.parent.name: read_compare(file) for file in sorted(results.glob("ablations/*/compare.csv"))}
    blocks["ablations"] = ablations_block(runs) if runs else absent(results / "ablations", "ablations")
    for name, text in blocks.items():
        fill_block(document, name, text)
    fill_block(readme, "effect", effect)


def absent(path: Path, experiment: str) -> str:
    """What is written where nothing is known."""
    about = f"`{path}` is not there yet. After the trainings and evaluations (`results/README.md`) this makes it:"
    return f"{about}\n\n    {COMMANDS[experiment]}"


def goals_block(table: pd.DataFrame) -> str:
    """One row a goal."""
    rows = [[goal.name, goal.goal, goal.shown, VERDICTS[goal.met], str(goal.n)] for goal in goals(table)]
    shown = tables.markdown_table(["", "goal", "figure", "verdict", "n of cells"], rows)
    what = caption(table[table.task == ALL_TASKS])
    return f"{what} A cell: benchmark, length, press and ratio, averaged over tasks.\n\n{shown}"


def caption(table: pd.DataFrame, named: bool = True) -> str:
    """Whose figures these are: model, adapters, rows, seeds and commits."""
    runs = []
    for role in [role for role in ROLES if role in set(table.run)]:
        first = table[table.run == role].iloc[0]
        trained = f" (mean of {first.seeds:.0f} trainings)" if first.seeds > 1 else ""
        runs.append(f"{role} {first.adapter or 'without an adapter'}{trained}")
    first = table.iloc[0]
    places = table.drop_duplicates(["benchmark", "data_dir"]).to_dict("records")
    rows = ", ".join(f"{tables.benchmark_name(row)} (n = {row['n']} rows)" for row in places)
    commits = ", ".join(sorted({commit for commit in table.commit if commit})) or "unknown"
    return "; ".join(
        [first.model, *(runs if named else []), rows, f"evaluation seed {first.seed}", f"commit {commits}."]
    )


def headline_block(table: pd.DataFrame) -> str:
    """A table for each benchmark and length."""
    parts = [LEGEND]
    scored = table[table.reason == ""]
    averages = scored[scored.task == ALL_TASKS]
    for _, rows in averages[averages.headline.astype(bool)].groupby(["benchmark", "data_dir"]):
        same = scored[scored[["benchmark", "data_dir"]].eq(rows.iloc[0][["benchmark", "data_dir"]]).all(axis=1)]
        tasks = same[(same.task != ALL_TASKS) & same.headline.astype(bool)].drop_duplicates("task")
        first = rows.iloc[0]
        less = ", lower is better" if first.lower_is_better else ""
        parts.append(f"**{tables.benchmark_name(first)}: {first.metric}{less}**")
        parts.append(f"{caption(rows)} Tasks: {', '.join(f'{task.task} ({task.n})' for task in tasks.itertuples())}.")
        parts.append(cells_table(rows, averages[averages.metric == "kl"]))
    return "\n\n".join(parts)


def cells_table(rows: pd.DataFrame, divergences: pd.DataFrame) -> str:
    """Press × ratio; beside nll the KL from each run's own full cache."""
    several, bounded = rows.seeds.max() > 1, rows.bound.notna().any()
    beside = rows.iloc[0].metric == "nll" and len(divergences) > 0
    header = ["press, evicted", *ROLES, "trained − control"]
    header += [name for name, there in (("single trainings", several), ("bound", bounded)) if there]
    header += [f"KL: {' → '.join(ROLES)}"] if beside else []
    lines = []
    for _, group in rows.groupby([rows.press != NO_PRESS, "press", "compression_ratio"]):
        first, runs = group.iloc[0], {row["run"]: row for row in group.to_dict("records")}
        trained, form = runs.get("trained", {}), tables.score_form(first)
        line = [tables.cell_name(first)]
        line += [tables.figure_text(runs.get(role, {}), "score", form, "ci") for role in ROLES]
        line.append(tables.difference_text(trained, "control"))
        line += [tables.trainings_text(trained, "control")] if several else []
        line += [tables.figure_text(first, "bound", form)] if bounded else []
        if beside:
            line.append(divergence(divergences, first))
        lines.append(line)
    return tables.markdown_table(header, lines)


def divergence(table: pd.DataFrame, cell: pd.Series) -> str:
    """`0.206 → 0.186 → 0.163 ▲`, of the KL in a cell."""
    return scores_by_run(table[table[CELL].eq(cell[CELL]).all(axis=1)], "{:.3f}")


def scores_by_run(cell: pd.DataFrame, form: str) -> str:
    """`13.5 → 14.6 → 64.9 ▲`, of the rows of one cell and metric, one a run."""
    verdict = dict(zip(cell.run, cell.verdict_control, strict=True)).get("trained")
    return f"{by_run(dict(zip(cell.run, cell.score, strict=True)), form)} {tables.SYMBOLS.get(verdict, '')}".strip()


def by_run(values: Mapping[str, float], form: str) -> str:
    """`13.5 → 14.6 → 64.9`, of role → value."""
    return " → ".join(tables.figure_text({"value": values.get(role)}, "value", form) for role in ROLES)


def effect_block(table: pd.DataFrame) -> str:
    """Needles alone, a press a row and a share evicted a column."""
    rows = table[(table.reason == "") & (table.task == ALL_TASKS) & of_needles(table)]
    ratios = sorted(rows[rows.press != NO_PRESS].compression_ratio.unique())
    lines = []
    for _, cells in rows.groupby([rows.press != NO_PRESS, "press"]):
        first, form = cells.iloc[0], tables.score_form(cells.iloc[0])
        shown = {ratio: scores_by_run(cell, form) for ratio, cell in cells.groupby("compression_ratio")}
        name = tables.cell_name(first) if first.press == NO_PRESS else first.press
        lines.append([name, *(shown.get(ratio, shown.get(0.0, tables.NONE)) for ratio in ratios)])
    header = ["press", *(f"{ratio:.0%} evicted" for ratio in ratios)]
    marks = "base → control → trained; ▲ trained better than control, ▼ worse, = no difference"
    return f"{caption(rows)} Percent, {marks}.\n\n{tables.markdown_table(header, lines)}"


def beyond_block(folder: Path) -> str:
    """One row a benchmark, length and task: means over evicted cells, and verdicts; nothing where there is no file."""
    comparisons = [read_compare(file) for file in sorted(folder.glob("*/compare.csv"))]
    if not comparisons:
        return ""
    lines = []
    for table in comparisons:
        scored = table[(table.reason == "") & table.headline.astype(bool)]
        for _, rows in scored.groupby(["benchmark", "data_dir"]):
            tasks = rows[rows.task != ALL_TASKS].task.unique()
            shown = rows if len(tasks) > 1 else rows[rows.task != ALL_TASKS]
            lines += [beyond_cells(task) for _, task in shown.groupby("task")]
    header = ["benchmark", "task", "n", "full cache", "evicted, mean", "retention, mean", "cells"]
    about = f"{caption(pd.concat(comparisons).query('task == @ALL_TASKS'))} Base → control → trained."
    notes = "Means over all evicted cells. Cells: trained against control, ▲ better, ▼ worse, = no different."
    return "\n\n".join([about, tables.markdown_table(header, lines), notes])


def not_taken_block(folder: Path) -> str:
    """Goals, needles, other lengths and tasks of a recipe; nothing where a file lacks."""
    headline, further = folder / "compare.csv", beyond_block(folder / "beyond")
    if not headline.is_file() or not further:
        return ""
    table = read_compare(headline)
    return "\n\n".join([goals_block(table), effect_block(table), further])


def beyond_cells(rows: pd.DataFrame) -> list[str]:
    """The cells of one task of a benchmark."""
    first, evicted = rows.iloc[0], rows[rows.press != NO_PRESS]

    def of_runs(chosen: pd.DataFrame, column: str, form: str) -> str:
        return by_run(chosen.groupby("run")[column].mean(), form)

    return [
        tables.benchmark_name(first),
        first.task,
        f"{first.n}",
        of_runs(rows[rows.press == NO_PRESS], "score", tables.score_form(first)),
        of_runs(evicted, "score", tables.score_form(first)),
        of_runs(evicted, "retention", "{:.1%}"),
        verdicts(evicted),
    ]


def verdicts(evicted: pd.DataFrame) -> str:
    """`▲ 8 ▼ 0 = 24`: of trained against control."""
    counts = evicted.verdict_control.value_counts()
    counted = " ".join(f"{symbol} {counts.get(verdict, 0)}" for verdict, symbol in tables.SYMBOLS.items())
    return counted if len(counts) else tables.NONE


def trainings_block(results: Path) -> str:
    """One row a training kept under results/: what it was trained on, and its perplexity before and after."""
    rows = [training(file.parent, results) for file in sorted(results.glob("**/training/*/eit_config.json"))]
    header = ["training", "", "seed", "data", "steps × rows × tokens", "options", "full", "evicted", "commit"]
    about = "Full, evicted: perplexity on the training's own validation rows, before → after."
    return f"{about}\n\n{tables.markdown_table(header, rows)}" if rows else ""


def training(folder: Path, results: Path) -> list[str]:
    """A row of the table from eit_config.json and metrics.jsonl."""
    try:
        record = json.loads((folder / "eit_config.json").read_text(encoding="utf-8"))
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        config, data, steps = record["config"], record["config"]["data"], metrics[-1]["step"]
    except (OSError, ValueError, LookupError) as error:
        raise UserError(
            f"{folder}: eit_config.json and metrics.jsonl of a training are wanted here ({error})"
        ) from error
    size = f"{steps} × {rows_of_a_step(record, 1)} × {config['max_seq_len']}"
    has_none = {"lambda_selection"} if config["control"] else set()
    options = [f"{name} {config[name]:g}" for name in OPTIONS if name in config.keys() - has_none]
    options += [f"{name} {config[name]}" for name in RARE if config.get(name)]
    perplexities = []
    for name in ("eval_full_ppl", "eval_evicted_ppl"):
        values = [step[name] for step in metrics if name in step]
        perplexities.append(f"{values[0]:.2f} → {values[-1]:.2f}" if len(values) > 1 else tables.NONE)
    name = "/".join([*folder.parent.parent.relative_to(results).parts, folder.name])
    what = "control" if config["control"] else "trained"
    about = [name, what, str(config["seed"]), describe_data(data), size, ", ".join(options)]
    return [*about, *perplexities, record["commit"] or "unknown"]


def ablations_block(runs: Mapping[str, pd.DataFrame]) -> str:
    """One row a run: means over its evicted cells, each with its difference from the control; then needles by press."""
    controls, trained, control_of = {}, {}, {}
    for name, table in runs.items():
        scored = table[(table.reason == "") & (table.task == ALL_TASKS)]
        base, control, trained[name] = (scored[scored.run == role] for role in ROLES)
        control_of[name] = Path(control.iloc[0].adapter).parent.name
        controls[control_of[name]] = control
    rows = {"base": base, **dict(sorted(controls.items())), **trained}
    first = next(iter(runs.values()))
    evicted = first[(first.press != NO_PRESS) & (first.task == ALL_TASKS) & (first.run == "trained")]
    cells = (
        f"Means over {evicted.headline.sum()} evicted cells of {caption(first[first.task == ALL_TASKS], named=False)}"
    )
    about = f"{cells} Needles: percent, and retention of it; nll and KL: nats a token. One training seed a run."
    notes = (
        "In brackets the difference from the control named beside it. Cells: ▲ better, ▼ worse, = no different from "
        "that. Intervals: compare.md of each run."
    )
    header = ["run", "control", "full nll", "evicted nll", "KL", "full needles", "evicted needles"]
    lines = [
        [name, control_of.get(name, tables.NONE), *means(mine, controls.get(control_of.get(name, "")))]
        for name, mine in rows.items()
    ]
    table = tables.markdown_table([*header, "retention", "cells"], lines)
    return "\n\n".join([about, table, notes, "Needles by press, and by share evicted, in percent:", transfer(rows)])


def transfer(runs: Mapping[str, pd.DataFrame]) -> str:
    """Trained on one press, measured under another: means over ratios; beside them means over presses."""
    needles = {name: table[(table.press != NO_PRESS) & of_needles(table)] for name, table in runs.items()}
    cells = pd.concat(list(needles.values()))
    presses, ratios = sorted(cells.press.unique()), sorted(cells.compression_ratio.unique())

    def line(table: pd.DataFrame) -> list[str]:
        chosen = [table[table.press == press] for press in presses]
        chosen += [table[table.compression_ratio == ratio] for ratio in ratios]
        return [tables.figure_text({"mean": rows.score.mean()}, "mean", "{:.0f}") for rows in chosen]

    header = ["run", *presses, *(f"{ratio:.0%}" for ratio in ratios)]
    return tables.markdown_table(header, [[name, *line(table)] for name, table in needles.items()])


def of_needles(table: pd.DataFrame) -> pd.Series:
    """Bool a row: whether it is a score that counts, and no text."""
    return table.headline.astype(bool) & ~table.lower_is_better.astype(bool)


def means(table: pd.DataFrame, control: pd.DataFrame | None) -> list[str]:
    """nll with the full cache and evicted, KL, needles in the same way, their retention, and verdicts."""

    def mean(rows: pd.DataFrame, evicted: bool, metric: str, column: str) -> float:
        chosen = rows[(rows.press != NO_PRESS) == evicted]
        chosen = chosen[of_needles(chosen) if metric == "needles" else chosen.metric == metric]
        return float(chosen[column].mean())

    def shown(evicted: bool, metric: str, form: str, column: str = "score") -> str:
        value = mean(table, evicted, metric, column)
        text = tables.figure_text({column: value}, column, form)
        if control is None or text == tables.NONE:
            return text
        difference = {column: value - mean(control, evicted, metric, column)}
        return f"{text} ({tables.figure_text(difference, column, form.replace('{:', '{:+'))})"

    return [
        shown(False, "nll", "{:.3f}"),
        shown(True, "nll", "{:.3f}"),
        shown(True, "kl", "{:.3f}"),
        shown(False, "needles", "{:.1f}"),
        shown(True, "needles", "{:.1f}"),
        shown(True, "needles", "{:.1%}", "retention"),
        verdicts(table[(table.press != NO_PRESS) & table.headline.astype(bool)]),
    ]


if __name__ == "__main__":
    try:
        root = Path(__file__).parents[1]
        main(root / "results", root / "docs/results.md", root / "README.md")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
