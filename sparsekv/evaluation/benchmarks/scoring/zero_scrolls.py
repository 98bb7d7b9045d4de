"""ZeroSCROLLS (Shaham et al. 2023): its answers are not public; predictions are sent to its site to be scored."""

from collections.abc import Sequence

from sparsekv.evaluation.benchmarks.schema import Row


def score(row: Row) -> dict[str, float]:
    """Nothing."""
    return {}


def metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Nothing."""
    return {}
