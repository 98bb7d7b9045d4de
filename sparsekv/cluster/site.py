"""What differs from cluster to cluster: `configs/cluster.yaml`, and environment variables, which win."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sparsekv.cluster.schema import make, read_yaml
from sparsekv.errors import require

PREFIX = "SPARSEKV_"
# Set by `sparsekv submit` itself: given twice, one of them would be ignored.
TAKEN = (
    "array",
    "dependency",
    "job-name",
    "kill-on-invalid-dep",
    "output",
    "error",
    "parsable",
    "wrap",
    "wait",
    "test",
)


@dataclass(frozen=True)
class Site:
    """A cluster; what is not set is not asked for.

    Parameters
    ----------
    account, partition, qos, constraint
        As sbatch takes them.
    gpu
        Kind of GPU, such as h100, where the cluster has several.
    modules
        Environment modules to load in a job.
    venv
        Virtual environment to activate in a job.
    conda
        Conda environments to try in a job, in this order.
    sbatch
        Further options of sbatch, such as --exclude=node7, a word each.
    """

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpu: str | None = None
    modules: list[str] = field(default_factory=list)
    venv: str | None = None
    conda: list[str] = field(default_factory=lambda: ["sparsekv"])
    sbatch: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for option in self.sbatch:
            require(
                bool(re.fullmatch(r"--[a-z][a-z-]*(=.*)?", option)),
                f"sbatch: {option!r} is no --option or --option=value",
            )
            name = option[2:].partition("=")[0]
            require(not name.startswith(TAKEN), f"sbatch: {option!r} is set by sparsekv submit; leave it out")

    def options(self) -> list[str]:
        """For sbatch."""
        named = ("account", "partition", "qos", "constraint")
        return [f"--{name}={value}" for name in named if (value := getattr(self, name))] + self.sbatch

    def environment(self) -> dict[str, str]:
        """For the job, which looks for its environment by these."""
        values = {"MODULES": " ".join(self.modules), "VENV": self.venv or "", "CONDA": " ".join(self.conda)}
        return {PREFIX + name: value for name, value in values.items() if value}


def load_site(path: Path, environment: Mapping[str, str] | None = None) -> Site:
    """Read a site file; `SPARSEKV_ACCOUNT` and its like win over it.

    Raises
    ------
    UserError
        Names the file: it is missing, has an unknown key, or a value that cannot be.
    """
    values: dict[str, Any] = read_yaml(path, "--cluster")
    environment = os.environ if environment is None else environment
    lists = {each.name for each in fields(Site) if each.name in ("modules", "conda", "sbatch")}
    for name in (each.name for each in fields(Site)):
        given = environment.get(PREFIX + name.upper())
        if given is not None:
            values[name] = given.split() if name in lists else given or None
    return make(Site, values, str(path))
