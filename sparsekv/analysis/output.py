"""The results of an analysis as files."""

import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsekv.analysis import figures, summary
from sparsekv.analysis.config import AnalysisConfig
from sparsekv.analysis.inputs import Inputs
from sparsekv.analysis.names import ANALYSIS, HEADS
from sparsekv.analysis.recommend import as_yaml, recommend
from sparsekv.analysis.samples import Samples
from sparsekv.anchor_config import AnchorConfig
from sparsekv.files import write_bytes, write_json, write_text
from sparsekv.version import commit

ANCHORS = "anchors.yaml"
FIGURES = "figures"


def write_results(config: AnalysisConfig, inputs: Inputs, samples: Samples) -> dict[str, Any]:
    """Write all results to `output_dir`, each file whole or not at all; returns the analysis, see docs/analysis.md."""
    out = Path(config.output_dir)
    measured = summary.by_run(samples, config.runs)
    analysis = _analysis(config, inputs, samples, measured)
    heads = summary.head_table(measured, inputs.statistics.names)
    for name, picture in figures.draw_all(analysis, heads).items():
        write_bytes(out / FIGURES / f"{name}.png", picture)
    write_text(out / ANCHORS, _anchors(analysis))
    table = io.BytesIO()
    heads.to_parquet(table, index=False)
    write_bytes(out / HEADS, table.getvalue())
    write_json(out / ANALYSIS, analysis)  # last: a reader who finds it finds everything
    return analysis


def _analysis(config: AnalysisConfig, inputs: Inputs, samples: Samples, measured: Mapping[str, Any]) -> dict[str, Any]:
    names = inputs.statistics.names

    def named(estimate: summary.Estimate) -> dict[str, Any]:
        return {name: estimate.as_json(number) for number, name in enumerate(names)}

    overall = {run: named(summary.overall(values)) for run, values in measured.items()}
    layers = {run: named(summary.of_layers(values)) for run, values in measured.items()}
    shares = summary.token_shares(samples)
    anchors, evidence = recommend(overall[config.runs[0]], shares, config.anchors, config.max_len)
    described = {key: value for key, value in inputs.folder.description.items() if key != "figures"}
    return {
        **described,
        "commit": commit(),
        "num_layers": samples.figures.shape[2],
        "num_heads": samples.figures.shape[3],
        "token_shares": shares,
        "descriptions": inputs.statistics.descriptions,
        "overall": {run: overall[run] for run in config.runs},
        "layers": {run: layers[run] for run in config.runs},
        "difference": _difference(overall, layers),
        "recommendation": {"anchors": asdict(anchors), "evidence": evidence},
    }


def _difference(overall: Mapping[str, Any], layers: Mapping[str, Any]) -> dict[str, Any] | None:
    """Adapter − base, where there is one."""
    if summary.DIFFERENCE not in overall:
        return None
    return {"overall": overall[summary.DIFFERENCE], "layers": layers[summary.DIFFERENCE]}


def _anchors(analysis: Mapping[str, Any]) -> str:
    """The recommendation as a file for `--anchors`."""
    recommendation = analysis["recommendation"]
    measured = f"its attention on {analysis['num_samples']} rows of {analysis['max_len']} tokens ({ANALYSIS})"
    heading = f"Anchors for {analysis['model']}, from {measured}; for `sparsekv train --anchors`."
    return as_yaml(AnchorConfig(**recommendation["anchors"]), recommendation["evidence"], heading)
