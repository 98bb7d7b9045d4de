#!/usr/bin/env python
"""`sparsekv train` under the flat names of the first experiments: --sink_size and --recent_size besides every flag."""

import sys

from sparsekv.cli import main

NESTED = {"--sink_size": "--anchors.sink_size", "--recent_size": "--anchors.recent_size"}


def rename(argument: str) -> str:
    """`--sink_size=8` → `--anchors.sink_size=8`; anything else unchanged."""
    flag, equals, value = argument.partition("=")
    return NESTED.get(flag, flag) + equals + value


if __name__ == "__main__":
    main(["train", *map(rename, sys.argv[1:])])
