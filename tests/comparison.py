"""A compare.csv whose figures are known, without a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparsekv.evaluation.comparison.goals import read_compare

ROLES = ("base", "control", "trained")
DIFFERENCES = ("diff_{}", "diff_{}_low", "diff_{}_high", "p_{}", "diff_{}_min", "diff_{}_max", "verdict_{}")


class Comparison:
    """Base, control and trained; control and trained are means of three trainings.

    rows : list of dict
        What was added. The full cache of a length comes before its other cells.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._full: dict[tuple[str, ...], tuple[float, ...]] = {}

    def needles(
        self,
        press: str,
        ratio: float,
        scores: tuple[float, ...],
        verdict: str,
        tasks: tuple[str, ...] = ("vt",),
        **changes: Any,
    ) -> None:
        """A cell of `ruler-local`: percent for each role, of each task and on average."""
        for task in (*tasks, "all tasks"):
            known = {"benchmark": "ruler-local", "task": task, "metric": "string_match", "lower_is_better": False}
            self._add(press, ratio, scores, verdict, **known | changes)

    def text(self, press: str, ratio: float, scores: tuple[float, ...], verdict: str, **changes: Any) -> None:
        """A cell of `perplexity`: nats for each role."""
        known = {"benchmark": "perplexity", "task": "all tasks", "metric": "nll", "lower_is_better": True}
        self._add(press, ratio, scores, verdict, **known | changes)

    def write(self, folder: Path) -> Path:
        """As `sparsekv compare --output` leaves it."""
        folder.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(self.rows).to_csv(folder / "compare.csv", index=False)
        return folder / "compare.csv"

    def read(self, folder: Path) -> pd.DataFrame:
        """As it is read back."""
        return read_compare(self.write(folder))

    def _add(self, press: str, ratio: float, scores: tuple[float, ...], verdict: str, **known: Any) -> None:
        known = {"data_dir": "1024", "bound": np.nan, "headline": True, "seed": 0, "commit": "abc1234"} | known
        place = tuple(known[key] for key in ("benchmark", "data_dir", "metric"))
        full = self._full.setdefault(place, scores)
        for role, score, whole in zip(ROLES, scores, full, strict=True):
            kept = np.exp(whole - score) if known["lower_is_better"] else score / whole
            row = {"run": role, "model": "tiny", "adapter": "" if role == "base" else f"out/{role}/final"}
            row |= {"press": press, "compression_ratio": ratio, "n": 40, "seeds": 1 if role == "base" else 3}
            row |= {"score": score, "ci_low": score - 3, "ci_high": score + 3, "reason": ""}
            row |= {"retention": kept, "retention_low": kept, "retention_high": kept}
            row |= {name.format("control"): np.nan for name in DIFFERENCES}
            if role == "trained":
                more = score - scores[1]
                row |= {"diff_control": more, "diff_control_min": more - 1, "diff_control_max": more + 1}
                row |= {"verdict_control": verdict}
            self.rows.append(row | known)
