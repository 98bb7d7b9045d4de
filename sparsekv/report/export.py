"""A page's charts and tables as files for a paper."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from sparsekv.evaluation.comparison.tables import markdown_table
from sparsekv.files import write_bytes, write_text
from sparsekv.report.chart import Chart, Section, TextTable
from sparsekv.style import paper_style

# What LaTeX reads as its own (after the end of a row a bracket too), and what its fonts lack.
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": "$<$", ">": "$>$", "[": "{[}"}
    | {"−": "$-$", "–": "--", "→": r"$\to$", "×": r"$\times$", "▲": r"$\blacktriangle$", "▼": r"$\blacktriangledown$"}
)


def write_figures(sections: Sequence[Section], folder: Path) -> None:
    """Every chart as NAME.png, NAME.svg and NAME.csv."""
    for chart in (chart for section in sections for chart in section.charts):
        _write_chart(chart, folder)


def _write_chart(chart: Chart, folder: Path) -> None:
    with paper_style():
        figure = Figure()
        chart.draw(figure)
        for kind, metadata in (("png", None), ("svg", {"Date": None})):  # the same figure gives the same file
            picture = io.BytesIO()
            figure.savefig(picture, format=kind, metadata=metadata)
            write_bytes(folder / f"{chart.name}.{kind}", picture.getvalue())
    write_text(folder / f"{chart.name}.csv", chart.data.to_csv(index=False, float_format="%.6g"))


def write_tables(sections: Sequence[Section], folder: Path) -> None:
    """Every table as NAME.tex and NAME.md."""
    for table in (table for section in sections for table in section.tables):
        write_text(folder / f"{table.name}.tex", latex(table))
        write_text(folder / f"{table.name}.md", markdown(table))


def latex(table: TextTable) -> str:
    """A table for `\\input`; needs the packages booktabs and amssymb."""
    header, *rows = (" & ".join(map(_escaped, line)) + r" \\" for line in (table.header, *table.rows))
    lines = [
        *(f"% {_in_one_line(path)}" for path in table.sources),
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(table.title)}. {_escaped(table.caption)}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.header)}}}",
        r"\toprule",
        header,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def markdown(table: TextTable) -> str:
    """A heading, the table, its caption and its files."""
    files = "From: " + ", ".join(f"`{path}`" for path in table.sources)
    rows = [list(map(_in_one_line, row)) for row in table.rows]
    parts = [f"## {table.title}", markdown_table(table.header, rows), table.caption, files]
    return "\n\n".join(part for part in parts if part) + "\n"


def _escaped(text: str) -> str:
    return _in_one_line(text).translate(LATEX)


def _in_one_line(text: object) -> str:
    return " ".join(str(text).split())
