"""Options of `sparsekv report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsekv.errors import require
from sparsekv.files import check_writable


@dataclass
class ReportConfig:
    """What to report, and where to.

    Parameters
    ----------
    results
        Folders of eval, train, analyze or demo; all that is below them is found.
    out
        The page to write.
    figures
        Also write every chart as PNG, SVG and CSV into a folder beside the page, NAME_figures.
    latex
        Also write every table as LaTeX and Markdown into a folder beside the page, NAME_tables.
    """

    results: list[str]
    out: str = "report.html"
    figures: bool = False
    latex: bool = False

    def __post_init__(self) -> None:
        page = Path(self.out)
        require(page.suffix == ".html", f"--out {self.out}: name a file that ends with .html")
        require(not page.is_dir(), f"--out {self.out}: is a folder; name a file in it")
        file = next((parent for parent in page.parents if parent.is_file()), None)
        require(file is None, f"--out {self.out}: {file} is a file, not a folder; name a page in a folder")
        for folder in (page.parent, self.figures_folder, self.tables_folder):
            check_writable(folder, "--out")

    @property
    def figures_folder(self) -> Path:
        """Where --figures go."""
        return Path(self.out.removesuffix(".html") + "_figures")

    @property
    def tables_folder(self) -> Path:
        """Where --latex tables go."""
        return Path(self.out.removesuffix(".html") + "_tables")
