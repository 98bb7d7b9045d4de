"""What an analysis says at its end, for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsekv.analysis.names import CLASSES
from sparsekv.analysis.summary import CLASS_FIGURE

Analysis = Mapping[str, Any]


def show(analysis: Analysis) -> None:
    """Print the classes, where the attention is concentrated, and what an adapter changed."""
    measured = f"{analysis['num_samples']} rows of {analysis['max_len']} tokens"
    title = Text(f"Attention by class of token: {analysis['model']}, {measured}")
    Console().print(title, _class_table(analysis), *sentences(analysis), sep="\n", highlight=False)


def sentences(analysis: Analysis) -> list[str]:
    """How much of the attention lies on how few tokens, for each run, and what an adapter moved."""
    said = []
    for run in analysis["runs"]:
        mean = {name: _percent(figure["mean"]) for name, figure in analysis["overall"][run].items()}
        who = f"{run}: " if len(analysis["runs"]) > 1 else ""
        said.append(
            f"{who}anchors hold {mean['anchor_share']} of the attention on {mean['anchor_tokens']} of the tokens, "
            f"the first {analysis['anchors']['sink_size']} tokens alone {mean['zone.sink']}; 80% of the attention lies "
            f"on {mean['tokens_for_80']} of the tokens, 95% on {mean['tokens_for_95']}"
        )
    if analysis["difference"]:
        moved = _interval(analysis["difference"]["overall"]["anchor_share"], "+.2f", 100)
        said.append(f"attention on anchors moved by {moved} percentage points")
    return said


def _class_table(analysis: Analysis) -> Table:
    runs = analysis["runs"]
    arrow = f"\n{' → '.join(runs)}" if len(runs) > 1 else ""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("class", no_wrap=True)
    for heading in ("tokens", f"attention{arrow}", f"× even, off the sink{arrow}"):
        table.add_column(heading, justify="right")
    if analysis["difference"]:
        table.add_column("difference", justify="right", no_wrap=True)
    for name in CLASSES:
        shares = [_percent(analysis["overall"][run][f"share.{name}"]["mean"]) for run in runs]
        relative = [analysis["overall"][run][f"{CLASS_FIGURE}.{name}"] for run in runs]
        times = [_interval(relative[0])] if len(runs) == 1 else [_number(each["mean"], ".2f") for each in relative]
        cells = [name, _percent(analysis["token_shares"][name]), " → ".join(shares), " → ".join(times)]
        if analysis["difference"]:
            cells.append(_interval(analysis["difference"]["overall"][f"{CLASS_FIGURE}.{name}"], "+.2f"))
        table.add_row(*cells)
    return table


def _number(value: float | None, form: str, times: float = 1) -> str:
    return "–" if value is None else f"{value * times:{form}}"


def _percent(value: float | None) -> str:
    return _number(value, ".1%")


def _interval(estimate: Mapping[str, float | None], form: str = ".2f", times: float = 1) -> str:
    """`1.20 (1.10 … 1.30)`; – for what is not known."""
    mean, low, high = (_number(estimate[key], form, times) for key in ("mean", "low", "high"))
    return mean if estimate["low"] is None else f"{mean} ({low} … {high})"
