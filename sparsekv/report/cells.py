"""Which cells a chart is about: its name, and the files that its numbers come from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparsekv.evaluation.comparison.cell_files import FINISHED
from sparsekv.evaluation.comparison.compare import Analysis
from sparsekv.report.collect import Evidence


def chart_name(kind: str, analysis: Analysis, row: Mapping[str, Any], *more: str) -> str:
    """`retention_trained_ruler-local_4096`: the stem of a chart's files."""
    return file_stem(kind, analysis.role, row["benchmark"], row["data_dir"], *more)


def file_stem(*parts: str) -> str:
    """The parts that are not empty, each without what a file's name should not hold."""
    return "_".join(re.sub(r"[^\w.-]+", "-", part, flags=re.ASCII).strip("-") for part in parts if part)


def predictions(evidence: Evidence, roles: Iterable[str], row: Mapping[str, Any]) -> tuple[Path, ...]:
    """The files whose scores stand behind the rows of one benchmark; its data_dir is "" where it is over several."""
    files: list[Path] = []
    for role in roles:
        cells = evidence.runs[role].results.cells
        cells = cells[(cells.benchmark == row["benchmark"]) & (cells.reason == "")]
        own = cells[cells.data_dir == row["data_dir"]]
        files += sorted(folder / FINISHED[0] for folder in (cells if own.empty else own).folder)
    return tuple(files)
