#!/usr/bin/env python
"""Put the demo's results between the markers of README.md: `make demo`, then `make readme`."""

import re
import sys
from pathlib import Path

BLOCK = re.compile(r"(<!-- demo -->\n).*?(<!-- /demo -->)", re.DOTALL)


def main(results: Path, readme: Path) -> None:
    """Replace the block; the results' headings become lines in bold, since the README has its own."""
    text = re.sub(r"^#+ (.*)$", r"**\1**", results.read_text(encoding="utf-8").split("\n", 1)[1], flags=re.MULTILINE)
    filled, count = BLOCK.subn(lambda match: match[1] + text.strip() + "\n" + match[2], readme.read_text("utf-8"))
    if count != 1:
        sys.exit(f"{readme}: expected one block between <!-- demo --> and <!-- /demo -->, found {count}")
    readme.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main(Path("out/demo/results.md"), Path("README.md"))
