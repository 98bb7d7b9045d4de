"""`sparsekv demo`: the whole idea on a small real model, on any machine, in minutes.

Trains a control and an eviction-invariant adapter on the same data, then scores base, control and trained with the full
cache and with caches that presses have evicted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sparsekv.data import build_datasets
from sparsekv.errors import UserError
from sparsekv.evaluation.evicted import NO_PRESS, Sample, Score, evaluate_cells
from sparsekv.evaluation.needle import needle_samples, text_samples
from sparsekv.evaluation.summary import TASKS, summarize
from sparsekv.files import write_json, write_text
from sparsekv.models import load_model, load_tokenizer
from sparsekv.training.config import TrainConfig
from sparsekv.training.output import FINAL
from sparsekv.training.run import train
from sparsekv.version import commit

PRESSES = ("snapkv", "streaming_llm", "knorm", "keydiff")
RATIOS = (0.5,)
CELLS = [(NO_PRESS, 0.0), *((press, ratio) for press in PRESSES for ratio in RATIOS)]
SUFFIX = 48  # tokens predicted after the cut in the text task
TRAINING_ROW = 320


@dataclass
class DemoConfig:
    """Options of the demo.

    Parameters
    ----------
    model
        Hub name, local folder, or smollm2-135m.
    output_dir
        Folder of the two runs and the results; a second call continues what is there.
    max_steps
        Optimizer steps of each of the two runs.
    batch_size
        Rows a step, of 320 tokens.
    num_samples
        Samples a task and cell.
    context_length
        Tokens before the cut in the evaluation.
    seed
        Of data, training and evaluation.
    """

    model: str = "smollm2-135m"
    output_dir: str = "out/demo"
    max_steps: int = 24
    batch_size: int = 2
    num_samples: int = 16
    context_length: int = 320
    seed: int = 0

    def __post_init__(self) -> None:
        for flag, least in (("max_steps", 1), ("batch_size", 1), ("num_samples", 2), ("context_length", 96)):
            value = getattr(self, flag)
            if value < least:
                raise UserError(f"--{flag} {value}: must be at least {least}")


def demo(config: DemoConfig) -> bool:
    """Train, evaluate, print the tables and write `results.md` and `results.json`; False when a signal stopped it."""
    disable_progress_bars()
    console = Console()
    out = Path(config.output_dir)
    adapters: dict[str, str | None] = {"base": None}
    for name in ("control", "trained"):
        folder = out / name
        if not (folder / FINAL).exists():
            console.rule(f"training: {name} ({config.max_steps} steps of {config.batch_size} × {TRAINING_ROW} tokens)")
            if train(training_config(config, folder, control=name == "control")) is None:
                return False
        adapters[name] = str(folder / FINAL)
    samples = evaluation_samples(config)
    console.rule(f"evaluating: {len(adapters)} models × {len(CELLS)} cells × {len(samples)} samples")
    with Progress(console=console) as progress:
        task = progress.add_task("samples", total=len(adapters) * len(samples))
        scores = {
            name: score_model(config, adapter, samples, lambda: progress.advance(task))
            for name, adapter in adapters.items()
        }
    write_results(config, scores, out, console)
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


def evaluation_samples(config: DemoConfig) -> list[Sample]:
    """Both tasks, on text from documents that training did not see."""
    tokenizer = load_tokenizer(config.model)
    length = config.context_length + SUFFIX
    rows = build_datasets("pydoc", tokenizer, length, 1, config.num_samples, config.seed)[1]["input_ids"]
    needles = needle_samples(tokenizer, rows, config.context_length, config.num_samples, config.seed)
    return [*needles, *text_samples(rows, config.context_length, config.num_samples)]


def score_model(
    config: DemoConfig, adapter: str | None, samples: Sequence[Sample], progress: Callable[[], None]
) -> list[Score]:
    """Scores of every sample in every cell, for the base or an adapter merged into it."""
    model: Any = load_model(config.model, fastest_dtype())
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return list(evaluate_cells(model, samples, CELLS, progress))


def write_results(config: DemoConfig, scores: dict[str, list[Score]], out: Path, console: Console) -> None:
    """Print both tables; write them as Markdown, and every score as JSON."""
    note = (
        f"{config.model}, {fastest_dtype()}; {config.max_steps} steps of {config.batch_size} × {TRAINING_ROW} tokens; "
        f"context {config.context_length} tokens of held-out Python documentation, prefilled with full attention, then "
        f"evicted; n = {config.num_samples} a cell; seed {config.seed}; [95% interval over samples, those of the last "
        f"column paired]; commit {commit() or 'unknown'}."
    )
    text = [f"# SparseKV demo\n\n{note}\n"]
    for task, title in TASKS.items():
        header, *body = summarize(task, scores, CELLS)
        table = Table(*header, title=title)
        for row in body:
            table.add_row(*row)
        console.print(table)
        lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *body]]
        text.append(f"## {title}\n\n" + "\n".join(lines) + "\n")
    console.print(note, highlight=False)
    write_text(out / "results.md", "\n".join(text))
    write_json(out / "results.json", {name: [vars(score) for score in group] for name, group in scores.items()})
    console.print(f"written: {out / 'results.md'}")
