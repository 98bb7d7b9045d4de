"""The experiment file `configs/pipeline.yaml`: models, their files, what each phase asks of the cluster."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsekv.cluster.schema import make, read_yaml
from sparsekv.errors import require

PHASES = ("analyze", "baseline", "teacher", "control", "train", "trained")
MEMORY = re.compile(r"[1-9]\d*[KMGT]?")
TIME = re.compile(r"(?:(\d+)-)?(\d{1,3}):(\d{2}):(\d{2})")


@dataclass(frozen=True)
class Resources:
    """What a job asks for.

    Parameters
    ----------
    gpus, cpus
        Of a job, on one node.
    mem
        Main memory, such as 80G.
    time
        Time limit as [D-]HH:MM:SS; a job that reaches it saves, queues again and goes on.
    tasks
        Tasks of the array that shares a matrix; default: from the estimate.
    """

    gpus: int = 1
    cpus: int = 8
    mem: str = "80G"
    time: str = "12:00:00"
    tasks: int | None = None

    def __post_init__(self) -> None:
        for name in ("gpus", "cpus", "tasks"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} {value}: must be at least 1")
        require(bool(MEMORY.fullmatch(self.mem)), f"mem {self.mem!r}: must be a number with K, M, G or T, such as 80G")
        require(
            bool(TIME.fullmatch(self.time)), f"time {self.time!r}: must be [D-]HH:MM:SS in quotes, such as '12:00:00'"
        )

    @property
    def hours(self) -> float:
        """The time limit."""
        match = TIME.fullmatch(self.time)
        assert match is not None
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return days * 24 + hours + minutes / 60 + seconds / 3600


@dataclass(frozen=True)
class Workload:
    """How large a benchmark is; of one that is not listed, the estimate assumes the defaults here.

    Parameters
    ----------
    rows
        Questions.
    context
        Tokens of a context, mean.
    steps
        Decoding steps of an answer, where it is long; they are taken one cell and question at a time.
    """

    rows: int = 500
    context: int = 4096
    steps: int = 0


@dataclass(frozen=True)
class Throughput:
    """What was measured on one GPU; seconds = parameters × tokens / rate.

    Parameters
    ----------
    measured
        On what, and by which command.
    train, evaluate, analyze
        Parameters × tokens a second: of training with its teacher; of contexts × cells; of analyzed rows.
    step_seconds
        Of one decoding step while a press evicts.
    workloads
        NAME or NAME:DATA_DIR of a benchmark → its size.
    """

    measured: str = ""
    train: float = 4e13
    evaluate: float = 1.5e14
    analyze: float = 5e13
    step_seconds: float = 0.09
    workloads: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("train", "evaluate", "analyze", "step_seconds"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} {value}: must be above 0")

    def workload(self, name: str) -> Workload:
        """Of a benchmark."""
        return make(Workload, self.workloads.get(name, {}), f"throughput: workloads: {name}")


@dataclass(frozen=True)
class Model:
    """A model of the experiment.

    Parameters
    ----------
    model
        Hub name, local folder, or smollm2-135m.
    billions
        Of its parameters.
    train
        Options of `sparsekv train`, a YAML file.
    train_script
        The job that trains it.
    matrix
        Options of `sparsekv eval`, a YAML file with runs.
    base, control, trained
        Names of the runs in it; control may be null.
    teacher
        Options of `sparsekv train` for the model that control and trained are held to, a YAML file; default: to base.
    results
        Folder of the results; default: results/KEY.
    analyze
        Options of `sparsekv analyze`, over those that all models share.
    resources
        By phase, over those that all models share.
    """

    model: str
    billions: float
    train: str
    train_script: str
    matrix: str
    base: str
    trained: str
    control: str | None = None
    teacher: str | None = None
    results: str = ""
    analyze: dict[str, Any] = field(default_factory=dict)
    resources: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(0 < self.billions < math.inf, f"billions {self.billions}: must be above 0")
        plain = bool(self.results) and {*"%\\"}.isdisjoint(self.results) and self.results.isprintable()
        require(
            plain, f"results {self.results!r}: must be a folder without % or \\ in its name, which sbatch would replace"
        )


@dataclass(frozen=True)
class Pipeline:
    """The whole file.

    Parameters
    ----------
    models
        KEY → Model.
    batch
        Jobs of a matrix at a time.
    resources
        By phase: analyze, baseline, teacher, control, train, trained.
    analyze
        Options of `sparsekv analyze`.
    throughput
        For the estimate.
    """

    models: dict[str, Any]
    batch: int = 4
    resources: dict[str, Any] = field(default_factory=dict)
    analyze: dict[str, Any] = field(default_factory=dict)
    throughput: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(bool(self.models), "models: name at least one")
        require(self.batch >= 1, f"batch {self.batch}: must be at least 1")
        for key in self.models:
            valid = isinstance(key, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*", key, re.ASCII)
            require(bool(valid), f"models: {key!r} cannot be a key; take letters, digits, _ . -")
            reserved = key == "pipeline" or key.endswith("_trained")
            require(not reserved, f"models: {key!r} means something else to sparsekv submit; take another key")
            self.model(key)
            for phase in PHASES:
                self.needs(key, phase)
        self.rates()

    def model(self, key: str) -> Model:
        """By its key; raises UserError with the known ones."""
        require(key in self.models, f"--model {key}: unknown; known are {', '.join(self.models)}")
        values = self.models[key]
        if isinstance(values, dict):
            values = {"results": f"results/{key}", **values}
            own = values.get("analyze", {})
            values["analyze"] = self.analyze | own if isinstance(own, dict) else own
        model = make(Model, values, f"models: {key}")
        unknown = sorted({*map(str, self.resources), *map(str, model.resources)} - {*PHASES})
        require(not unknown, f"models: {key}: resources: unknown phase {', '.join(unknown)}; {', '.join(PHASES)}")
        return model

    def needs(self, key: str, phase: str) -> Resources:
        """Resources of a phase of a model; teacher and control are trained as `train` is, unless it says otherwise."""
        values: dict[str, Any] = {}
        for given in (self.resources, self.model(key).resources):
            for name in ("train", phase) if phase in ("teacher", "control") else (phase,):
                part = given.get(name, {})
                require(isinstance(part, dict), f"resources: {name}: must be a mapping")
                values |= part
        return make(Resources, values, f"resources: {phase}")

    def rates(self) -> Throughput:
        """For the estimate."""
        found = make(Throughput, self.throughput, "throughput")
        for name in found.workloads:
            found.workload(name)
        return found


def load_pipeline(path: Path) -> Pipeline:
    """Read an experiment file; raises UserError with one line."""
    return make(Pipeline, read_yaml(path, "--pipeline"), f"--pipeline {path}")
