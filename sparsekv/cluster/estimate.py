"""What a phase will cost: tokens × parameters / measured rate. An order of magnitude, which says what it assumes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sparsekv.analysis.config import AnalysisConfig
from sparsekv.cluster.artefacts import State
from sparsekv.cluster.cells import suite_name
from sparsekv.cluster.phases import Phase
from sparsekv.cluster.pipeline import Throughput, Workload
from sparsekv.evaluation.matrix.config import EvalConfig, Suite, split
from sparsekv.training.config import TrainConfig

HOUR = 3600


@dataclass(frozen=True)
class Estimate:
    """Of what is missing of a phase.

    Attributes
    ----------
    hours : float
        Of one GPU at work.
    gpu_hours : float
        Of all GPUs that are held.
    work : str
        What was counted.
    """

    hours: float
    gpu_hours: float
    work: str


def estimate(phase: Phase, state: State, parameters: float, rates: Throughput) -> Estimate:
    """Cost of what is missing of a phase of a model with so many parameters."""
    if state.done:
        return Estimate(0, 0, "done")
    if isinstance(phase.config, EvalConfig):
        return _evaluation(phase.config, state, parameters, rates)
    if isinstance(phase.config, TrainConfig):
        tokens, work = _training_tokens(phase.config, phase.needs.gpus)
        hours = parameters * tokens / rates.train / HOUR
        return Estimate(hours, hours, work)
    tokens, work = _analysis_tokens(phase.config)
    hours = parameters * tokens / rates.analyze / HOUR
    return Estimate(hours, hours * phase.needs.gpus, work)  # layers on several GPUs work one after the other


def _analysis_tokens(config: AnalysisConfig) -> tuple[int, str]:
    runs = "" if len(config.runs) == 1 else f" × {len(config.runs)} models"
    tokens = config.num_samples * config.max_len * len(config.runs)
    return tokens, f"{config.num_samples:,} rows of {config.max_len:,} tokens{runs}"


def _training_tokens(config: TrainConfig, gpus: int) -> tuple[float, str]:
    """Each GPU takes rows of its own, so a given number of steps has as many times the rows."""
    rows = config.num_train_samples * config.num_train_epochs
    if config.max_steps > 0:
        rows = config.max_steps * config.batch_size * config.grad_accum * gpus
    return rows * config.max_seq_len, f"{rows:,.0f} rows of {config.max_seq_len:,} tokens"


def _evaluation(config: EvalConfig, state: State, parameters: float, rates: Throughput) -> Estimate:
    seconds = {suite_name(suite): _cell_seconds(parameters, rates, suite) for suite in config.suites()}
    missing = [cell for cell in state.cells if cell.state in ("missing", "begun")]
    hours = sum(seconds[cell.benchmark] for cell in missing) / HOUR
    parts = []
    for name, each in seconds.items():
        count = sum(cell.benchmark == name for cell in missing)
        if count:
            parts.append(f"{name}: {count} cells × {rounded(each / HOUR)} h")
    return Estimate(hours, hours, "; ".join(parts))


def _cell_seconds(parameters: float, rates: Throughput, suite: Suite) -> float:
    """Of one cell of a benchmark."""
    size = rates.workload(suite_name(suite))
    rows = size.rows
    if suite.num_samples is not None:
        rows = suite.num_samples * max(1, len(split(suite.tasks)))
    length: Any = suite.context_length or suite.data_dir
    context = int(length) if str(length).isdecimal() else size.context
    context = min(context, suite.max_context_length or context)
    return rows * (parameters * context / rates.evaluate + size.steps * rates.step_seconds)


def assumptions(rates: Throughput, phases: Iterable[Phase]) -> list[str]:
    """What the figures stand on."""
    configs = [phase.config for phase in phases]
    benchmarks = {
        suite_name(suite): suite for config in configs if isinstance(config, EvalConfig) for suite in config.suites()
    }
    unknown = [name for name in benchmarks if name not in rates.workloads]
    plain = Workload()
    lines = [
        "seconds of one GPU = parameters × tokens / rate; loading, waiting in the queue and requeues are not counted",
        f"rates (parameters × tokens a second): train {rates.train:.2g}, analyze {rates.analyze:.2g}, "
        f"evaluate {rates.evaluate:.2g} (tokens: contexts × cells); decoding step {rates.step_seconds:g} s",
        f"measured: {rates.measured or 'not said; the rates of one H100 and an 8B model are assumed'}",
    ]
    if unknown:
        size = f"{plain.rows:,} rows of {plain.context:,} tokens are assumed where nothing else is given"
        lines.append(f"size not listed: {', '.join(unknown)}; {size}")
    return lines


def rounded(hours: float) -> str:
    """Two digits."""
    if hours >= 10:
        return f"{hours:,.0f}"
    return f"{hours:.1f}" if hours >= 1 else f"{hours:.2f}" if hours >= 0.01 else "0.01"
