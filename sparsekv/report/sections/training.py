"""How the runs were trained: loss, keep ratio, and perplexity with the full and the evicted cache, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go

from sparsekv.report.chart import Chart, Section
from sparsekv.report.collect import Evidence, Training
from sparsekv.report.look import one_legend, panel_axes, panels, paper_legend, plain, run_looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure as PaperFigure

METRICS = "metrics.jsonl"
Panels = dict[str, str]  # key in metrics.jsonl → title of its panel
PERPLEXITY: Panels = {"eval_full_ppl": "Full cache", "eval_evicted_ppl": "Evicted cache"}
LOSS: Panels = {"ce": "Cross-entropy (nats)", "kl": "KL from the full cache (nats)", "learning_rate": "Learning rate"}
KEEP_RATIO: Panels = {
    "requested_keep_ratio": "Keep ratio drawn",
    "actual_keep_ratio": "Share really kept",
    "anchor_share": "Share of anchors",
}
CHARTS = (
    (
        "training_perplexity",
        "Perplexity of the validation rows",
        PERPLEXITY,
        "By optimizer step, with the full cache and with the cache evicted to the smallest keep ratio. Lower is "
        "better. Few rows and no interval: a figure of the run, not a benchmark.",
    ),
    (
        "training_loss",
        "What is minimised",
        LOSS,
        "Means over the optimizer steps since the last point, per token. The KL divergence is that of the student from "
        "the model before training with its full cache. The student's cache is evicted; a control's is not.",
    ),
    (
        "training_keep_ratio",
        "How much was kept in training",
        KEEP_RATIO,
        "Means over the optimizer steps since the last point: the keep ratios drawn, the share of context entries that "
        "the rules really kept, and the share of the context that is anchors.",
    ),
)


def build(evidence: Evidence) -> Section:
    """The trainings beside each other, one colour each."""
    title = "Training"
    if not evidence.trainings:
        return Section("training", title, missing="No training here: `sparsekv train --output_dir DIR` makes one.")
    charts = [chart(evidence.trainings, *each) for each in CHARTS]
    return Section("training", title, _intro(evidence.trainings), [each for each in charts if each is not None])


def _intro(trainings: Sequence[Training]) -> str:
    described = []
    for each in trainings:
        steps = int(each.metrics.step.max())
        kind = "the same data without eviction" if each.config.get("control") else "eviction-invariant training"
        described.append(f"{each.name}: {steps} steps of {kind}")
    return f"{'; '.join(described)}. Eviction is learned when the evicted cache's perplexity falls to the full cache's."


def chart(trainings: Sequence[Training], name: str, title: str, keys: Panels, caption: str) -> Chart | None:
    """A panel for each key that some training has logged; None where there is no such key."""
    data = points(trainings, keys)
    if data.empty:
        return None
    logged = {key: label for key, label in keys.items() if key in set(data.figure)}
    looks = run_looks(dict.fromkeys(data.training))

    def draw(figure: PaperFigure) -> None:
        figure.set_size_inches(2.4 * len(logged), 2.2)
        for axes, (key, label) in zip(figure.subplots(1, len(logged), squeeze=False)[0], logged.items(), strict=True):
            for run, group in data[data.figure == key].groupby("training", sort=False):
                axes.plot(group.step, group.value, color=looks[str(run)][0], label=str(run), marker=".")
            axes.set(title=label, xlabel="step")
        paper_legend(figure)

    sources = tuple(each.folder / METRICS for each in trainings)
    return Chart(name, title, caption, sources, data, _page(data, logged), draw)


def points(trainings: Sequence[Training], keys: Panels) -> pd.DataFrame:
    """One row a training, figure and step: columns training, figure, step, value."""
    tables = [
        each.metrics[["step", key]].dropna().rename(columns={key: "value"}).assign(training=each.name, figure=key)
        for key in keys
        for each in trainings
        if key in each.metrics
    ]
    columns = ["training", "figure", "step", "value"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def _page(data: pd.DataFrame, logged: Panels) -> go.Figure:
    figure = panels(list(logged.values()), x_title="step")
    looks = run_looks(dict.fromkeys(data.training))
    for number, key in enumerate(logged):
        for run, group in data[data.figure == key].groupby("training", sort=False):
            colour, marker = looks[str(run)]
            trace = go.Scatter(
                x=group.step,
                y=group.value,
                name=plain(run),
                legendgroup=str(run),
                mode="lines+markers",
                line={"color": colour},
                marker={"symbol": marker, "size": 7},
                hovertemplate="step %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
            )
            figure.add_trace(trace.update(panel_axes(number)))
    one_legend(figure).update_xaxes(rangemode="tozero")
    return figure.update_yaxes(exponentformat="e", tickformat=".2~%" if logged.keys() <= KEEP_RATIO.keys() else "")
