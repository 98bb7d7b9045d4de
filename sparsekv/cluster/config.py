"""Options of `sparsekv submit`, `status` and `cancel`."""

from dataclasses import dataclass
from typing import Literal, get_args

from sparsekv.errors import require

Executor = Literal["slurm", "local"]
PIPELINE = "configs/pipeline.yaml"
CLUSTER = "configs/cluster.yaml"


@dataclass(frozen=True)
class SubmitConfig:
    """What to submit.

    Parameters
    ----------
    target
        pipeline; or a model's key for phase 1, KEY_trained for phase 3.
    model
        Key of the model, for target pipeline.
    pipeline
        The experiment file.
    cluster
        The site file.
    executor
        slurm, or local: the same chain on this machine, one process a GPU.
    batch
        Jobs of a matrix at a time; default: what the experiment file says.
    gpus
        GPUs of a job of a matrix; default: what the experiment file says.
    dry_run
        Only say what would be submitted and what it would cost.
    yes
        Submit without a question.
    """

    target: str
    model: str | None = None
    pipeline: str = PIPELINE
    cluster: str = CLUSTER
    executor: Executor = "slurm"
    batch: int | None = None
    gpus: int | None = None
    dry_run: bool = False
    yes: bool = False

    def __post_init__(self) -> None:
        kinds = get_args(Executor)
        require(self.executor in kinds, f"--executor {self.executor}: must be one of {', '.join(kinds)}")
        for name in ("batch", "gpus"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name} {value}: must be at least 1")
        whole = self.target == "pipeline"
        require(not whole or self.model is not None, "submit pipeline: --model is missing: the key of a model")
        require(whole or self.model is None, f"--model {self.model}: submit {self.target} names its model already")


@dataclass(frozen=True)
class StatusConfig:
    """Whose jobs.

    Parameters
    ----------
    model
        Key of the model; default: every model that has results or jobs.
    pipeline
        The experiment file.
    """

    model: str | None = None
    pipeline: str = PIPELINE
