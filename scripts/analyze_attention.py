#!/usr/bin/env python
"""`sparsekv analyze`, with the same flags."""

import sys

from sparsekv.cli import main

if __name__ == "__main__":
    main(["analyze", *sys.argv[1:]])
