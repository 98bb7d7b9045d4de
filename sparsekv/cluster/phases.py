"""The phases of one model: which job does each, with which arguments, after which others."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError

from sparsekv.analysis.config import AnalysisConfig
from sparsekv.cluster.pipeline import Model, Pipeline, Resources
from sparsekv.cluster.schema import from_options
from sparsekv.errors import UserError, require
from sparsekv.evaluation.matrix.config import EvalConfig
from sparsekv.files import FINAL
from sparsekv.fingerprint import fingerprint_of
from sparsekv.training.config import TrainConfig

COMMANDS = {"analyze": "analyze", "baseline": "eval", "trained": "eval"} | dict.fromkeys(
    ("teacher", "control", "train"), "train"
)
NUMBERS = {"analyze": 0, "baseline": 1, "teacher": 2, "control": 2, "train": 2, "trained": 3}
SCRIPTS = {
    "analyze": "scripts/slurm_phase0_analyze.sh",
    "baseline": "scripts/slurm_phase1_baseline.sh",
    "teacher": "scripts/slurm_phase2_train.sh",  # which takes any configuration
    "trained": "scripts/slurm_phase3_eval_trained.sh",
}


@dataclass(frozen=True)
class Phase:
    """A phase of a model.

    Attributes
    ----------
    key : str
        Of the model.
    name : str
        Of `pipeline.PHASES`.
    script : str
        The job, relative to the repository.
    arguments : tuple of str
        Handed to the job, and by it to the command.
    config : AnalysisConfig, EvalConfig or TrainConfig
        What the command makes of them.
    needs : Resources
    after : tuple of str
        Names of the phases that come before.
    """

    key: str
    name: str
    script: str
    arguments: tuple[str, ...]
    config: AnalysisConfig | EvalConfig | TrainConfig
    needs: Resources
    after: tuple[str, ...]

    @property
    def command(self) -> str:
        """Of `sparsekv`."""
        return COMMANDS[self.name]

    @property
    def label(self) -> str:
        """`phase 2 train`."""
        return f"phase {NUMBERS[self.name]} {self.name}"

    @property
    def out(self) -> Path:
        """Where its artefacts are."""
        return Path(self.config.out if isinstance(self.config, EvalConfig) else self.config.output_dir)

    @property
    def fingerprint(self) -> str:
        """Of all that its configuration says: a queued job is this phase's only if it was submitted with the same."""
        decisive = {name: value for name, value in asdict(self.config).items() if name != "resume"}
        return fingerprint_of([self.name, decisive])[:16]


def make_phases(pipeline: Pipeline, key: str) -> dict[str, Phase]:
    """Every phase of a model, in order.

    Raises
    ------
    UserError
        An unknown key; a configuration that the phase's command would refuse; a matrix without the model's runs.
    """
    model = pipeline.model(key)
    matrix = _options(
        EvalConfig, ["--config", model.matrix, "--out", str(Path(model.results) / "matrix")], model.matrix
    )
    _check_runs(key, model, matrix)
    phases: dict[str, Phase] = {}
    before: tuple[str, ...] = ()
    for stage in _stages(model):
        for name in stage:
            arguments = _arguments(name, model, matrix)
            schema = {"analyze": AnalysisConfig, "eval": EvalConfig, "train": TrainConfig}[COMMANDS[name]]
            config: Any = _options(schema, arguments, f"models: {key}: {name}")
            script = SCRIPTS.get(name, model.train_script)
            phases[name] = Phase(key, name, script, tuple(arguments), config, pipeline.needs(key, name), before)
        before = stage
    _check_trainings(key, model, phases)
    return phases


def _stages(model: Model) -> list[tuple[str, ...]]:
    """The phases that a model has; each waits for those of the stage before."""
    first = [("teacher",)] if model.teacher else []
    return [("analyze",), ("baseline",), *first, ("control", "train") if model.control else ("train",), ("trained",)]


def _arguments(name: str, model: Model, matrix: EvalConfig) -> list[str]:
    """What the phase's command is given."""
    if COMMANDS[name] == "eval":
        runs = [model.base] if name == "baseline" else [run for run in (model.control, model.trained) if run]
        return ["--config", model.matrix, "--only", ",".join(runs), "--out", matrix.out]
    if COMMANDS[name] == "train":
        trained = Path(str(matrix.runs[model.trained].adapter)).parent
        teacher = trained.with_name(f"{trained.name}-teacher")
        if name == "teacher":
            return ["--config", str(model.teacher), "--output_dir", str(teacher)]
        out = Path(str(matrix.runs[str(model.control)].adapter)).parent if name == "control" else trained
        held_to = ["--teacher_adapter", str(teacher / FINAL)] if model.teacher else []
        switch = ["--control", "true"] if name == "control" else []
        return ["--config", model.train, "--output_dir", str(out), *held_to, *switch]
    options = {"model": model.model, "output_dir": str(Path(model.results) / "analysis")} | model.analyze
    return [word for option, value in options.items() for word in (f"--{option}", _as_text(value))]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _options(schema: type, arguments: list[str], where: str) -> Any:
    try:
        return from_options(schema, arguments)
    except (UserError, ArgumentError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error


def _check_runs(key: str, model: Model, matrix: EvalConfig) -> None:
    """The matrix must have the model's runs: base without an adapter, the others with one that a training leaves."""
    names = [name for name in (model.base, model.control, model.trained) if name]
    require(len({*names}) == len(names), f"models: {key}: base, control and trained must be different runs")
    for name in names:
        there = ", ".join(matrix.runs) or "none"
        require(name in matrix.runs, f"models: {key}: {model.matrix} has no run {name!r}; there are {there}")
        run = matrix.runs[name]
        same = run.model == model.model
        require(same, f"models: {key}: run {name!r} of {model.matrix} is of {run.model!r}, not {model.model!r}")
        where = f"models: {key}: the adapter of run {name!r} in {model.matrix}"
        if name == model.base:
            require(run.adapter is None, f"{where}: base must have none")
        else:
            left = run.adapter is not None and Path(run.adapter).name == FINAL
            require(left, f"{where} must be the `{FINAL}` folder of a training")


def _check_trainings(key: str, model: Model, phases: dict[str, Phase]) -> None:
    for phase in phases.values():
        if isinstance(phase.config, TrainConfig):
            trained, file = phase.config.model, phase.arguments[1]
            require(trained == model.model, f"models: {key}: {file} trains {trained!r}, not {model.model!r}")
