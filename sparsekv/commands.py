"""What each command is: a line about it, the schema of its options, and what it runs. Imports come with the call."""

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsekv.errors import require

STOPPED = 128 + signal.SIGTERM

Values = dict[str, Any]  # option → value


@dataclass
class MergeConfig:
    """Write the merged model of an adapter, equal to it in logits.

    Parameters
    ----------
    model
        The base: Hub name, local folder, or smollm2-135m.
    adapter
        Folder of the adapter, such as out/final.
    output_dir
        New folder for the merged model.
    """

    model: str = ""
    adapter: str = ""
    output_dir: str = ""

    def __post_init__(self) -> None:
        require(bool(self.model), "--model is missing: the base of the adapter")
        require(bool(self.adapter), "--adapter is missing: the folder of an adapter, such as out/final")
        require(bool(self.output_dir), "--output_dir is missing: the new folder of the merged model")


def train(values: Values) -> int:
    from sparsekv.progress import speaks
    from sparsekv.training.config import TrainConfig
    from sparsekv.training.run import train

    final = train(TrainConfig(**values))
    if final is None:
        return _stopped(STOPPED, "the same command with --resume continues from the checkpoint just written")
    if speaks():
        print(final)
    return 0


def evaluate(values: Values) -> int:
    from sparsekv.evaluation.matrix.config import EvalConfig
    from sparsekv.evaluation.matrix.run import evaluate

    number = evaluate(EvalConfig(**values))
    return 0 if number is None else _stopped(128 + number)


def analyze(values: Values) -> int:
    from sparsekv.analysis.config import AnalysisConfig
    from sparsekv.analysis.run import analyze

    number = analyze(AnalysisConfig(**values))
    return 0 if number is None else _stopped(128 + number)


def compare(values: Values) -> int:
    from sparsekv.evaluation.comparison.compare import compare

    compare(values["folders"], values["output"])
    return 0


def report(values: Values) -> int:
    from sparsekv.report.config import ReportConfig
    from sparsekv.report.run import report

    for path in report(ReportConfig(**values)):
        print(path)
    return 0


def merge(values: Values) -> int:
    from sparsekv.adapters import merge_adapter

    config = MergeConfig(**values)
    merge_adapter(config.model, config.adapter, config.output_dir)
    print(config.output_dir)
    return 0


def generate(values: Values) -> int:
    from sparsekv.inference.config import GenerateConfig
    from sparsekv.inference.generate import generate

    generate(GenerateConfig(**values))
    return 0


def chat(values: Values) -> int:
    from sparsekv.inference.chat import chat
    from sparsekv.inference.config import ChatConfig

    chat(ChatConfig(**values))
    return 0


def export(values: Values) -> int:
    from sparsekv.inference.config import ExportConfig
    from sparsekv.inference.export import export

    print(export(ExportConfig(**values)))
    return 0


def demo(values: Values) -> int:
    from sparsekv.demo import DemoConfig, demo

    return 0 if demo(DemoConfig(**values)) else _stopped(STOPPED)


def submit(values: Values) -> int:
    from sparsekv.cluster.config import SubmitConfig
    from sparsekv.cluster.submit import submit

    return submit(SubmitConfig(**values))


def status(values: Values) -> int:
    from sparsekv.cluster.config import StatusConfig
    from sparsekv.cluster.status import status

    status(StatusConfig(**values))
    return 0


def cancel(values: Values) -> int:
    from sparsekv.cluster.config import StatusConfig
    from sparsekv.cluster.status import cancel

    cancel(StatusConfig(**values))
    return 0


def _stopped(status: int, way_on: str = "the same command continues") -> int:
    print(f"stopped; {way_on}", file=sys.stderr)
    return status


@dataclass(frozen=True)
class Command:
    """A command of `sparsekv`.

    Parameters
    ----------
    summary : str
    run : callable
        Takes the values of its options, returns the exit status.
    schema : str, optional
        Where the dataclass of its options is, as module:name; without one the parser names its arguments.
    """

    summary: str
    run: Callable[[Values], int]
    schema: str | None = None


COMMANDS = {
    "train": Command(
        "Eviction-invariant training: from text to an adapter.", train, "sparsekv.training.config:TrainConfig"
    ),
    "eval": Command(
        "The press × ratio matrix: what eviction costs a model.",
        evaluate,
        "sparsekv.evaluation.matrix.config:EvalConfig",
    ),
    "analyze": Command(
        "What a model attends to, by token class, position, layer and head.",
        analyze,
        "sparsekv.analysis.config:AnalysisConfig",
    ),
    "compare": Command("Results of base, control and trained side by side: what training changed.", compare),
    "report": Command("A page of pictures and tables of what was found: one HTML file.", report),
    "merge": Command("Merge an adapter into its base model.", merge, "sparsekv.commands:MergeConfig"),
    "generate": Command(
        "Continue a text, or answer a question about it, with a cache that keeps little.",
        generate,
        "sparsekv.inference.config:GenerateConfig",
    ),
    "chat": Command("Talk to a model whose cache keeps little.", chat, "sparsekv.inference.config:ChatConfig"),
    "export": Command(
        "A folder with the model and its cache, for transformers without this package.",
        export,
        "sparsekv.inference.config:ExportConfig",
    ),
    "submit": Command("Phases of the experiment as Slurm jobs, or on this machine; what is done is left out.", submit),
    "status": Command("How far each phase is, and why not further.", status),
    "cancel": Command("Cancel what waits or runs; a later submit continues it.", cancel),
    "demo": Command(
        "Train a small real model here, compare base, control and trained, make a page.",
        demo,
        "sparsekv.demo:DemoConfig",
    ),
}
