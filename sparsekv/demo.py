"""`sparsekv demo`: the whole idea on a small real model, on any machine, in minutes.

Trains a control and an eviction-invariant adapter on the same data, compares base, control and trained with the full
cache and with caches that presses have evicted, looks at the attention before and after, and makes a page of it all.
The adapter that the repository ships, trained for longer, answers the same rows.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from rich.console import Console

from sparsekv.analysis.config import AnalysisConfig
from sparsekv.analysis.run import analyze
from sparsekv.demo_model import DEMO_MODEL
from sparsekv.errors import UserError
from sparsekv.evaluation.comparison.compare import ROLES, compare
from sparsekv.evaluation.matrix.config import EvalConfig, RunConfig
from sparsekv.evaluation.matrix.run import evaluate
from sparsekv.files import FINAL
from sparsekv.report.config import ReportConfig
from sparsekv.report.run import report
from sparsekv.training.config import TrainConfig
from sparsekv.training.run import train

PRESSES = ("snapkv", "streaming_llm", "knorm", "keydiff")
RATIO = 0.5
NEEDLE = "niah_single_2"  # a number hidden in natural text
SHIPPED = Path(__file__).parents[1] / "assets/smollm2-135m-eit"  # an installed package comes without it
TRAINING_ROW = 320
ANALYZED_ROWS = 6


@dataclass
class DemoConfig:
    """Options of the demo.

    Parameters
    ----------
    model
        Hub name, local folder, or smollm2-135m.
    output_dir
        Folder of the two adapters and the results; a second call continues what is there.
    max_steps
        Optimizer steps of each of the two runs.
    batch_size
        Rows a step, of 320 tokens.
    num_samples
        Rows of each of the two benchmarks.
    context_length
        Tokens before the cut in the evaluation.
    seed
        Of data, training and evaluation.
    """

    model: str = DEMO_MODEL
    output_dir: str = "out/demo"
    max_steps: int = 24
    batch_size: int = 2
    num_samples: int = 16
    context_length: int = 320
    seed: int = 0

    def __post_init__(self) -> None:
        for flag, least in (("max_steps", 1), ("batch_size", 1), ("num_samples", 2), ("context_length", 128)):
            value = getattr(self, flag)
            if value < least:
                raise UserError(f"--{flag} {value}: must be at least {least}")


def demo(config: DemoConfig) -> bool:
    """Train, evaluate, compare, analyze and report, all into one folder; False when a signal stopped it."""
    disable_progress_bars()
    console = Console()
    out = Path(config.output_dir)
    for name in ("control", "trained"):
        folder = out / name
        if not (folder / FINAL).exists():
            console.rule(f"training: {name} ({config.max_steps} steps of {config.batch_size} × {TRAINING_ROW} tokens)")
            if train(training_config(config, folder, control=name == "control")) is None:
                return False
    matrix = evaluation_config(config, out)
    console.rule(f"evaluating: {', '.join(matrix.runs)}")
    if evaluate(matrix) is not None:
        return False
    folders = {folder.name: str(folder) for folder in matrix.folders()}
    compare([folders[role] for role in ROLES], str(out))
    if "shipped" in folders:
        console.rule(f"{SHIPPED.parent.name}/{SHIPPED.name} on the same rows, against base")
        compare([folders["base"], folders["shipped"]], str(out / "shipped"))
    console.rule("analyzing the attention: base, trained")
    if analyze(analysis_config(config, out)) is not None:
        return False
    console.rule("written")
    shown = [*(folders[role] for role in ROLES), *(str(out / name) for name in ("control", "trained", "attention"))]
    for path in (out / "compare.md", *report(ReportConfig(shown, str(out / "report.html"), figures=True))):
        console.print(str(path), highlight=False)
    return True


def training_config(config: DemoConfig, folder: Path, control: bool) -> TrainConfig:
    """The run of the control or the trained adapter: they differ in nothing but `control`."""
    return TrainConfig(
        model=config.model,
        output_dir=str(folder),
        resume=True,
        control=control,
        data={"pydoc": 0.5, "recall": 0.5},
        max_seq_len=TRAINING_ROW,
        num_train_samples=config.max_steps * config.batch_size,
        num_validation_samples=8,
        max_steps=config.max_steps,
        batch_size=config.batch_size,
        grad_accum=1,
        lr=5e-4,
        dtype=fastest_dtype(),
        eval_steps=0,
        logging_steps=5,
        seed=config.seed,
    )


def fastest_dtype() -> str:
    """bfloat16 where this machine multiplies in it, else float32."""
    cpu: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = torch.cuda.is_available() or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return "bfloat16" if fast else "float32"


def evaluation_config(config: DemoConfig, out: Path) -> EvalConfig:
    """Base, control, trained and what is shipped; two benchmarks on text that training did not see, four presses."""
    adapters = {"base": None, **{name: str(out / name / FINAL) for name in ("control", "trained")}}
    if config.model == DEMO_MODEL and SHIPPED.is_dir():
        adapters["shipped"] = os.path.relpath(SHIPPED)
    sized: dict[str, Any] = {"context_length": config.context_length, "num_samples": config.num_samples}
    return EvalConfig(
        runs={name: RunConfig(config.model, adapter) for name, adapter in adapters.items()},
        benchmarks=[
            {"name": "ruler-local", "tasks": [NEEDLE], "max_new_tokens": 24, **sized},
            {"name": "perplexity", **sized},
        ],
        presses=list(PRESSES),
        ratios=RATIO,
        out=str(out / "evaluation"),
        dtype=fastest_dtype(),
        seed=config.seed,
    )


def analysis_config(config: DemoConfig, out: Path) -> AnalysisConfig:
    """The trained adapter's attention, and what it was before."""
    return AnalysisConfig(
        model=config.model,
        adapter=str(out / "trained" / FINAL),
        num_samples=ANALYZED_ROWS,
        max_len=config.context_length,
        output_dir=str(out / "attention"),
        bf16=fastest_dtype() == "bfloat16",
        seed=config.seed,
    )
