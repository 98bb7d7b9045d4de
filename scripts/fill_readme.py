#!/usr/bin/env python
"""Put the headlines of the demo's comparisons between the markers of README.md: `make demo`, then `make readme`."""

import re
import sys
from pathlib import Path

from sparsekv.errors import UserError
from sparsekv.files import fill_block


def main(results: Path, readme: Path, block: str, with_notes: bool) -> None:
    """Replace a block by the runs, their headlines and perhaps the notes; headings become lines in bold."""
    _, *parts = results.read_text(encoding="utf-8").strip().split("\n\n")
    cells = next(place for place, part in enumerate(parts) if re.match("## (?!Headline)", part))
    notes = max(place for place, part in enumerate(parts) if part.startswith("|")) + 1
    text = "\n\n".join([*parts[:cells], *(parts[notes:] if with_notes else [])])
    fill_block(readme, block, re.sub(r"^#+ (.*)$", r"**\1**", text, flags=re.MULTILINE))


if __name__ == "__main__":
    try:
        main(Path("out/demo/compare.md"), Path("README.md"), "demo", with_notes=True)
        main(Path("out/demo/shipped/compare.md"), Path("README.md"), "shipped", with_notes=False)
    except UserError as error:
        sys.exit(str(error))
