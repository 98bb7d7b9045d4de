#!/usr/bin/env python
"""Put the demo's results between the markers of README.md: `make demo`, then `make readme`."""

import re
import sys
from pathlib import Path

from sparsekv.errors import UserError
from sparsekv.files import fill_block


def main(results: Path, readme: Path) -> None:
    """Replace the block; the results' headings become lines in bold, since the README has its own."""
    body = results.read_text(encoding="utf-8").split("\n", 1)[1]
    fill_block(readme, "demo", re.sub(r"^#+ (.*)$", r"**\1**", body, flags=re.MULTILINE))


if __name__ == "__main__":
    try:
        main(Path("out/demo/compare.md"), Path("README.md"))
    except UserError as error:
        sys.exit(str(error))
