#!/usr/bin/env python
"""Put the headlines of the demo's comparisons between the markers of README.md: `make demo`, then `make readme`."""

import re
import sys
from pathlib import Path

from sparsekv.errors import UserError, require
from sparsekv.files import fill_block


def headlines(results: Path, with_notes: bool) -> str:
    """The runs, their headlines and perhaps the notes; headings become lines in bold."""
    require(results.is_file(), f"{results}: is not there; `make demo` writes it")
    _, *parts = results.read_text(encoding="utf-8").strip().split("\n\n")
    cells = next(place for place, part in enumerate(parts) if re.match("## (?!Headline)", part))
    notes = max(place for place, part in enumerate(parts) if part.startswith("|")) + 1
    text = "\n\n".join([*parts[:cells], *(parts[notes:] if with_notes else [])])
    return re.sub(r"^#+ (.*)$", r"**\1**", text, flags=re.MULTILINE)


if __name__ == "__main__":
    try:
        demo = headlines(Path("out/demo/compare.md"), with_notes=True)
        shipped = headlines(Path("out/demo/shipped/compare.md"), with_notes=False)
        fill_block(Path("README.md"), "demo", demo)
        fill_block(Path("README.md"), "shipped", shipped)
    except UserError as error:
        sys.exit(str(error))
