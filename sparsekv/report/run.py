"""`sparsekv report`: from folders of results to a page, and to the files of its charts and tables."""

from __future__ import annotations

from pathlib import Path

from sparsekv.files import write_text, writing
from sparsekv.report.collect import collect
from sparsekv.report.config import ReportConfig
from sparsekv.report.export import write_figures, write_tables
from sparsekv.report.render import build, render


def report(config: ReportConfig) -> list[Path]:
    """Write the page and what was asked for besides; returns the page and the folders.

    Raises
    ------
    UserError
        As `collect`; something cannot be written.
    """
    page = build(collect([Path(folder) for folder in config.results]))
    out = Path(config.out)
    written = [out]
    with writing(out, "--out"):
        write_text(out, render(page))
        if config.figures:
            write_figures(page.sections, config.figures_folder)
            written.append(config.figures_folder)
        if config.latex:
            write_tables(page.sections, config.tables_folder)
            written.append(config.tables_folder)
    return written
