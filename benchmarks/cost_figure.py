"""How the cost of training grows with length, model and share kept: floors as lines, measured steps as points.

    python benchmarks/cost_figure.py --output docs/training_cost.png

The lines are operations (docs/performance.md, The floor) at the rate of a large matrix product on one H100, evicted
attention counted as what it computes; the points are the compiled rows of an 8B's shape in docs/performance.md.
"""

import argparse
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RATE = 787e12  # FLOP/s of an 8192³ product in bfloat16
CUTS = (0.375, 0.525, 0.675, 0.825)  # of a row: the middle of where training draws each
LENGTHS = [2**power for power in range(9, 18)]
KEEPS = {1.0: "-", 0.3: "--", 0.1: ":"}


class Shape(NamedTuple):
    """Qwen3's: heads are 128 wide, 8 of them hold keys and values."""

    layers: int
    hidden: int
    heads: int
    inner: int
    vocabulary: int = 151_936

    @property
    def parameters(self) -> int:
        """Of the decoder layers."""
        return self.layers * (self.hidden * 128 * 2 * (self.heads + 8) + 3 * self.hidden * self.inner)


SHAPES = {
    "1.7B": Shape(28, 2048, 16, 6144),
    "8B": Shape(36, 4096, 32, 12_288),
    "32B": Shape(64, 5120, 64, 25_600),
}


def operations(shape: Shape, length: int, keep: float) -> float:
    """Of a step with an adapter on one row; `keep` is the share of the context kept at each of four cuts."""
    bounds = [0.0, *CUTS, 1.0]
    pairs = sum((stop - start) ** 2 / 2 + (keep * start * (stop - start)) for start, stop in itertools.pairwise(bounds))
    attention = (2 / 2 + 7 * pairs) * length**2 * 2 * shape.heads * 128 * shape.layers  # the teacher sees everything
    return 6 * (shape.parameters + shape.hidden * shape.vocabulary) * length + attention


def measured(document: Path) -> list[tuple[str, int, float]]:
    """(step, tokens of a row, tokens/s) of the compiled rows in the page's tables."""
    row = re.compile(r"^\| (control|keep 0\.3), compiled \| ([\d,]+) \| [\d,]+ \| ([\d,]+) \|", flags=re.MULTILINE)
    found = row.findall(document.read_text("utf-8"))
    return [(step, int(tokens.replace(",", "")), float(rate.replace(",", ""))) for step, tokens, rate in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/training_cost.png"))
    parser.add_argument("--doc", type=Path, default=Path("docs/performance.md"))
    options = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, shape), color in zip(SHAPES.items(), ("C0", "C1", "C2"), strict=True):
        for keep, style in KEEPS.items():
            seconds = [1e6 / length * operations(shape, length, keep) / RATE for length in LENGTHS]
            label = f"{name}, {'full cache' if keep == 1 else f'{keep:.0%} kept'}"
            axes.plot(LENGTHS, seconds, style, color=color, label=label)
    for step, marker in (("control", "o"), ("keep 0.3", "x")):
        points = [(tokens, 1e6 / rate) for name, tokens, rate in measured(options.doc) if name == step]
        axes.plot(*zip(*points, strict=True), marker, color="C1", label=f"8B measured, {step}")
    axes.set(xscale="log", yscale="log", xlabel="tokens of a row", ylabel="seconds of one H100, a million tokens")
    axes.set_xticks(LENGTHS, [f"{length // 1024}k" if length >= 1024 else str(length) for length in LENGTHS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(options.output, dpi=130, metadata={"Software": None})
    print(options.output)


if __name__ == "__main__":
    main()
